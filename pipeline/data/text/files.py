"""Text files, JSON lines and Parquet, one file or a folder of them."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import polars as pl

from pipeline.tables import UserError, first_line

from .source import Source

PLAIN, LINES, ARRAY = (".txt", ".text", ".md"), (".jsonl", ".ndjson", ".json"), (".parquet",)
CHUNK = 2**24  # characters read at once
ROWS = 4096  # rows of a Parquet file read at once
REGEX = "re:"


def load(
    root: str | Path | None = None, field: str = "text", separator: str | None = None, test: str | Path | None = None
) -> Source:
    """The documents of a file, or of all files under a folder, in the order of their paths.

    root: .txt, .text, .md (plain), .jsonl, .ndjson, .json (objects, one a line or in one list), each also as .gz, and
        .parquet; a single file of any other kind is plain text
    field: which field of JSON and Parquet is the text
    separator: what parts the documents of plain text, such as <|endoftext|>, or re: and a regular expression; line ends
        around it belong to no document. None: a file is one document
    test: file or folder of the test part, in place of a share of `root`
    """
    if root is None:
        raise UserError("data set 'text' needs root, a file or a folder of .txt, .jsonl, .json or .parquet files")
    options = {"field": field, "separator": separator}
    named = {"train": root} | ({} if test is None else {"test": test})
    files = {part: listed(Path(path).expanduser()) for part, path in named.items()}
    streams = {part: partial(documents, [path for _, path in paths], **options) for part, paths in files.items()}
    identity = {part: [stamp(name, path) for name, path in paths] for part, paths in files.items()}
    return Source({"files": identity, **options}, streams["train"], streams.get("test"))


def listed(root: Path) -> list[tuple[str, Path]]:
    """(name under root, path) of every file."""
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise UserError(f"no text at {root}: it must be a file or a folder; fix data.root")
    paths = sorted(path for path in root.rglob("*") if path.is_file() and kind_of(path) is not None)
    shown = [(path.relative_to(root).as_posix(), path) for path in paths]
    shown = [(name, path) for name, path in shown if not any(part.startswith(".") for part in name.split("/"))]
    if not shown:
        raise UserError(f"{root} has no text files; put {', '.join((*PLAIN, *LINES, *ARRAY))} files there")
    return shown


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, None for one of no known kind."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in (*PLAIN, *LINES, *ARRAY) else None


def stamp(name: str, path: Path) -> list[Any]:
    """What changes with a file. Hashing gigabytes at every start would take longer than many a run."""
    found = path.stat()
    return [name, found.st_size, found.st_mtime_ns]


def documents(paths: list[Path], skip: int, field: str, separator: str | None) -> Iterator[str]:
    return islice(chain.from_iterable(map(partial(read, field=field, separator=separator), paths)), skip, None)


def read(path: Path, field: str, separator: str | None) -> Iterator[str]:
    """The documents of one file that hold more than white space."""
    suffix = kind_of(path)
    if suffix in ARRAY:
        found = rows(path, field)
    elif suffix in LINES:
        found = objects(path, field)
    else:
        found = plain(path, separator)
    try:
        yield from (text for text in found if text.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({first_line(error)}); convert it, or take it away") from error
    except (OSError, EOFError, zlib.error, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} is damaged or cannot be read ({first_line(error)}); copy it again") from error


def opened(path: Path) -> IO[str]:
    how: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    return how(path, "rt", encoding="utf-8", newline="")  # newline: line ends stay as they are


def plain(path: Path, separator: str | None) -> Iterator[str]:
    with opened(path) as file:
        if separator is None:
            yield file.read()
        elif separator.startswith(REGEX):
            yield from (part.strip("\r\n") for part in split_by(separator.removeprefix(REGEX), file.read()))
        else:
            yield from (part.strip("\r\n") for part in pieces(file, separator))


def split_by(pattern: str, text: str) -> Iterator[str]:
    """The text between matches."""
    try:
        matches = re.finditer(pattern, text)
    except re.error as error:
        raise UserError(f"separator 're:{pattern}' is no regular expression ({error})") from error
    start = 0
    for match in matches:
        yield text[start : match.start()]
        start = match.end()
    yield text[start:]


def pieces(file: IO[str], separator: str) -> Iterator[str]:
    """The text between separators, from a file that may be larger than memory."""
    if not separator:
        raise UserError("separator '' is empty; give what parts the documents, or null where a file is one document")
    rest = ""
    while chunk := file.read(CHUNK):
        *done, rest = (rest + chunk).split(separator)
        yield from done
    yield rest


def objects(path: Path, field: str) -> Iterator[str]:
    """The field of JSON objects: one list of them, or one a line."""
    with opened(path) as file:
        if file.read(1) == "[":
            file.seek(0)
            found: Any = enumerate([file.read()], 1)
        else:
            file.seek(0)
            found = enumerate(file, 1)
        for number, line in found:
            try:
                value = json.loads(line) if line.strip() else []
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is no JSON ({error}); write one object a line") from error
            for one in value if isinstance(value, list) else [value]:
                yield text_of(one, field, f"{path} line {number}")


def text_of(value: Any, field: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__}; it must be an object with the field {field!r}")
    if field not in value:
        raise UserError(f"{where} has no field {field!r}; set data.field to one of: {', '.join(sorted(value))}")
    if not isinstance(value[field], str):
        raise UserError(f"{where}: {field!r} is a {type(value[field]).__name__}, no text; set data.field")
    return value[field]


def rows(path: Path, field: str) -> Iterator[str]:
    """The column of a Parquet file, some thousand rows at a time: row groups before them are not read."""
    table = pl.scan_parquet(path)
    columns = table.collect_schema()
    if field not in columns:
        raise UserError(f"{path} has no column {field!r}; set data.field to one of: {', '.join(sorted(columns))}")
    if columns[field] != pl.String:
        raise UserError(f"{path}: column {field!r} is {columns[field]}, no text; set data.field")
    count = table.select(pl.len()).collect().item()
    for start in range(0, count, ROWS):
        found = table.select(field).slice(start, ROWS).collect()[field]
        yield from (text for text in found if text is not None)
