"""Tokens are written once, go on behind an interruption, and damage is told."""

import json

import numpy as np
import pytest
from texts import ready, stories

from pipeline.data.text import c4, corpus, shards
from pipeline.data.text.corpus import MANIFEST
from pipeline.data.text.shards import read_shards, write_shards
from pipeline.data.text.source import whole
from pipeline.data.text.tokenizers import Bytes
from pipeline.tables import UserError

TEXTS = stories(30)


def stream(skip):
    return iter(TEXTS[skip:])


def contents(tokens):
    return tokens[np.arange(len(tokens))][0].tolist()


def test_shards_hold_every_document_and_its_end(tmp_path):
    tokens = write_shards(tmp_path, stream, Bytes(), set(), size=400)
    assert contents(tokens) == [i for text in TEXTS for i in [*text.encode(), 256]]
    assert len(tokens.starts) > 3
    assert np.diff(tokens.starts).max() <= 400
    assert tokens.documents["bytes"].tolist() == [len(text.encode()) for text in TEXTS]
    assert np.load(tmp_path / "00000" / "tokens.npy").dtype == np.uint16


class Interrupted(Exception):
    pass


def test_preparing_goes_on_behind_the_last_whole_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "AT_ONCE", 3)
    asked = []

    def stopping(skip):
        asked.append(skip)
        for number, text in enumerate(TEXTS[skip:]):
            if len(asked) < 3 and number == 8:
                raise Interrupted
            yield text

    for _ in range(2):
        with pytest.raises(Interrupted):
            write_shards(tmp_path / "parts", stopping, Bytes(), set(), size=300)
    again = write_shards(tmp_path / "parts", stopping, Bytes(), set(), size=300)
    assert asked[0] == 0 < asked[1] < asked[2]
    assert contents(again) == contents(write_shards(tmp_path / "once", stream, Bytes(), set(), size=300))


def test_half_a_shard_is_no_shard(tmp_path, monkeypatch):
    def full(path, values):
        raise OSError("No space left")

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space"):
            write_shards(tmp_path, stream, Bytes(), set())
    assert len(read_shards(tmp_path)) == 0
    assert len(write_shards(tmp_path, stream, Bytes(), set())) > 0


def test_repeated_documents_are_left_out_also_behind_an_interruption(tmp_path):
    first = write_shards(tmp_path, lambda skip: iter(TEXTS[:10][skip:]), Bytes(), set(), size=300)
    twice = write_shards(tmp_path, lambda skip: iter((TEXTS[:10] + TEXTS[5:12])[skip:]), Bytes(), set(), size=300)
    assert contents(twice) == [i for text in TEXTS[:12] for i in [*text.encode(), 256]]
    assert len(twice.documents) == 17
    assert len(first.documents) == 10


def test_prepared_tokens_are_found_again_and_only_by_the_same_settings(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(corpus, "write_shards", lambda *a, real=write_shards: made.append(a) or real(*a))
    for options in ({}, {"seed": 1, "context": 8, "val_fraction": 0.2, "test_fraction": 0.2}):
        ready(tmp_path, root=written(tmp_path), separator="|", **options)
        assert len(made) == 1
    ready(tmp_path, root=tmp_path / "stories.txt", separator="|", tokenizer="bpe", vocabulary=300)
    ready(tmp_path, root=tmp_path / "stories.txt")
    assert len(made) == 3


def written(tmp_path):
    path = tmp_path / "stories.txt"
    if not path.exists():
        path.write_text("|".join(TEXTS))
    return path


def test_a_bpe_is_trained_once(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(corpus, "train_bpe", lambda *a, real=corpus.train_bpe: trained.append(a) or real(*a))
    options = {"root": written(tmp_path), "separator": "|", "tokenizer": "bpe", "vocabulary": 300}
    first, again = (ready(tmp_path, **options, seed=seed) for seed in (0, 1))
    assert len(trained) == 1
    assert first.tokenizer.identity == again.tokenizer.identity
    (folder,) = (path for path in (tmp_path / "cache" / "text").iterdir() if path.is_dir())
    assert ready(tmp_path, **{**options, "tokenizer": folder, "vocabulary": None}).tokenizer.vocabulary == 300


def test_a_bpe_does_not_see_the_test_part(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(corpus, "train_bpe", lambda texts, n, real=corpus.train_bpe: real(keep(texts, seen), n))
    data = ready(tmp_path, tokenizer="bpe", vocabulary=300, test_fraction=0.25, texts=TEXTS)
    tested = {text for text in TEXTS if text not in seen}
    assert len(tested) == round(0.25 * len(TEXTS))
    assert data.test_data.part.size == sum(len(ids) + 1 for ids, _ in data.tokenizer.encode(sorted(tested)))


def keep(texts, seen):
    seen += texts
    return seen


@pytest.mark.parametrize("name", ["tokens.npy", "bytes.npy", "documents.npy"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damage_is_told_in_one_line(tmp_path, name, damage):
    ready(tmp_path)
    (path,) = tmp_path.glob(f"cache/text/*/train/00000/{name}")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=f"{name} is missing or damaged .*; delete .* to make it anew"):
        ready(tmp_path, root=tmp_path / "stories.txt", separator="|")


def test_a_missing_shard_and_a_damaged_manifest_are_told(tmp_path):
    ready(tmp_path)
    options = {"root": tmp_path / "stories.txt", "separator": "|"}
    (manifest,) = tmp_path.glob(f"cache/text/*/{MANIFEST}")
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**told, "shards": {"train": 2}}))
    with pytest.raises(UserError, match="00001 is missing; delete"):
        ready(tmp_path, **options)
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is damaged .*; delete"):
        ready(tmp_path, **options)
    manifest.unlink()
    with pytest.raises(UserError, match=r"the tokens of 'text' are not prepared in .*; set data.download=true"):
        ready(tmp_path, **options, download=False)


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write tokens to .*cache.*; set data.cache"):
        ready(tmp_path)


def test_half_characters_are_replaced():
    assert whole("a\ud83d b") == "a? b"
    assert whole("é🙂") == "é🙂"


class Rows(list):
    """What C4 needs of a streamed data set."""

    def skip(self, count):
        return Rows(self[count:])

    def take(self, count):
        return Rows(self[:count])


def test_c4_skips_what_is_done_and_takes_no_more_than_asked(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = {split: Rows({"text": f"{split} {i}"} for i in range(9)) for split in ("train", "validation")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, split, streaming: rows[split])
    source = c4.load(documents=5, test_documents=2)
    assert list(source.train(3)) == ["train 3", "train 4"]
    assert list(source.test(0)) == ["validation 0", "validation 1"]
    assert list(source.train(5)) == []

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/c4'")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"cannot read C4 \(Couldn't reach .*\); check the network"):
        list(source.train(0))
    with pytest.raises(UserError, match="documents 0 must be at least 1"):
        c4.load(documents=0)
