"""Documents come out of every kind of file as they went in."""

import gzip
import json

import polars as pl
import pytest
from texts import stories

from pipeline.data.text import files
from pipeline.data.text.files import load
from pipeline.tables import UserError

TEXTS = stories(10)


def write(path, texts=TEXTS):
    """`texts` in the form that the name of the file says."""
    kind = path.name.partition(".")[2]
    if kind == "parquet":
        pl.DataFrame({"text": texts, "url": ["x"] * len(texts)}).write_parquet(path, row_group_size=3)
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif kind.startswith("jsonl"):
        lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines, mtime=0) if kind.endswith("gz") else lines)
    else:
        path.write_text("\n<|end|>\n".join(texts))
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.jsonl", "a.jsonl.gz", "a.txt", "a"])
@pytest.mark.parametrize("skip", [0, 4, 10])
def test_every_kind_gives_the_same_documents(tmp_path, monkeypatch, name, skip):
    monkeypatch.setattr(files, "ROWS", 4)
    monkeypatch.setattr(files, "CHUNK", 7)  # a separator lies over two chunks
    source = load(write(tmp_path / name), separator="<|end|>")
    assert list(source.train(skip)) == TEXTS[skip:]


def test_a_folder_is_read_in_the_order_of_its_paths_and_a_test_part_apart(tmp_path):
    (tmp_path / "texts" / "b").mkdir(parents=True)
    (tmp_path / "texts" / ".git").mkdir()
    write(tmp_path / "texts" / "b" / "c.jsonl", TEXTS[4:8])
    write(tmp_path / "texts" / "a.txt", TEXTS[:4])
    write(tmp_path / "texts" / ".git" / "a.txt", ["hidden"])
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89")
    source = load(tmp_path / "texts", separator="<|end|>", test=write(tmp_path / "test.json", TEXTS[8:]))
    assert list(source.train(0)) == TEXTS[:8]
    assert list(source.test(0)) == TEXTS[8:]


def test_a_plain_file_is_one_document_unless_a_separator_parts_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("= One =\r\ntext\n\n= Two =\nmore")
    assert list(load(path).train(0)) == ["= One =\r\ntext\n\n= Two =\nmore"]
    assert list(load(path, separator="re:\n{2,}(?==)").train(0)) == ["= One =\r\ntext", "= Two =\nmore"]


def test_identity_changes_with_a_file_and_with_options(tmp_path):
    path = write(tmp_path / "a.txt")
    before = load(path).identity
    assert load(path).identity == before
    assert load(path, separator="x").identity != before
    write(path, TEXTS[:9])
    assert load(path).identity != before


def broken(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", b'{"content": "x", "url": "y"}', {}, "has no field 'text'; set data.field to one of: content, url"),
        ("a.jsonl", b'{"text": 3}', {}, "line 1: 'text' is a int, no text; set data.field"),
        ("a.jsonl", b'{"text": "x"}\n{"te', {}, "a.jsonl line 2 is no JSON"),
        ("a.jsonl", b"3", {}, "line 1 is a int; it must be an object with the field 'text'"),
        ("a.txt", b"caf\xe9", {}, "a.txt is not UTF-8 .*; convert it"),
        ("a.txt", b"x", {"separator": ""}, "separator '' is empty"),
        ("a.txt", b"x", {"separator": "re:("}, r"separator 're:\(' is no regular expression"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-9], {}, "a.jsonl.gz is damaged"),
        ("a.parquet", b"PAR1", {}, "a.parquet is damaged"),
    ],
)
def test_errors_name_the_file_and_the_fix(tmp_path, name, content, options, message):
    with pytest.raises(UserError, match=message):
        list(load(broken(tmp_path, name, content), **options).train(0))


def test_a_missing_column_names_those_there_are(tmp_path):
    with pytest.raises(UserError, match=r"has no column 'body'; set data.field to one of: text, url"):
        list(load(write(tmp_path / "a.parquet"), field="body").train(0))


def test_a_missing_root_is_refused(tmp_path):
    with pytest.raises(UserError, match="data set 'text' needs root"):
        load()
    with pytest.raises(UserError, match=r"no text at .*nowhere: it must be a file or a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no text files; put .txt, .*parquet files there"):
        load(tmp_path)
