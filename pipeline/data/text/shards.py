"""Tokens in flat files: written once, shard by shard, and mapped into memory by every run.

A shard is a folder of three arrays. It appears under its name in one step, so what an interruption leaves is no shard.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.tables import UserError, first_line

from .source import Stream, digest
from .tokenizers import Encoded, Tokenizer

SHARD = 2**25  # tokens
AT_ONCE = 256  # documents that are tokenised together
DOCUMENT = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("digest", "<u8")])
NAMES = ("tokens", "bytes", "documents")


class Tokens:
    """The tokens of whole shards as one long array on disk.

    folder: holds the shards; counts: (S,) tokens in each
    documents: (D,) DOCUMENT, in order; one whose text was there before has no tokens
    """

    def __init__(self, folder: Path, counts: list[int], documents: np.ndarray) -> None:
        self.folder, self.documents = folder, documents
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.ends_of_documents = np.cumsum(documents["tokens"], dtype=np.int64)
        self._maps: list[tuple[np.ndarray, np.ndarray]] | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}  # a pickled memory map is a copy of the whole file

    @property
    def maps(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, bytes) of each shard, mapped when they are first used."""
        if self._maps is None:
            names = [shard_name(number) for number in range(len(self.starts) - 1)]
            self._maps = [(array(self.folder / name, "tokens"), array(self.folder / name, "bytes")) for name in names]
        return self._maps

    def __getitem__(self, positions: np.ndarray) -> Encoded:
        """Ids and bytes at `positions`, int64 of any shape."""
        ids, sizes = np.empty_like(positions), np.empty_like(positions)
        shards = np.searchsorted(self.starts, positions, "right") - 1
        for number in np.unique(shards):
            here = shards == number
            tokens, lengths = self.maps[number]
            inside = positions[here] - self.starts[number]
            ids[here], sizes[here] = tokens[inside], lengths[inside]
        return ids, sizes

    def position(self, size: float) -> int:
        """The first token before which lie at least `size` bytes of text."""
        left = size
        for (_, lengths), start in zip(self.maps, self.starts, strict=False):
            for block in range(0, len(lengths), 2**22):
                sums = np.cumsum(lengths[block : block + 2**22], dtype=np.int64)
                if sums[-1] >= left:
                    return int(start) + block + int(np.searchsorted(sums, left)) + 1
                left -= int(sums[-1])
        return len(self)


def shard_name(number: int) -> str:
    return f"{number:05}"


def array(shard: Path, name: str) -> np.ndarray:
    """A memory-mapped array of a shard. UserError where it is missing or cut short."""
    path = shard / f"{name}.npy"
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        reason = first_line(error)
        raise UserError(
            f"{path} is missing or damaged ({reason}); delete {shard.parent.parent} to make it anew"
        ) from error


def read_shards(folder: Path, limit: int | None = None) -> Tokens:
    """The whole shards that `folder` holds. limit: how many there must be; UserError for another number."""
    counts, documents = [], [np.empty(0, DOCUMENT)]
    while (shard := folder / shard_name(len(counts))).is_dir() and (limit is None or len(counts) < limit):
        tokens, lengths, found = (array(shard, name) for name in NAMES)
        if found.dtype != DOCUMENT or not len(tokens) == len(lengths) == found["tokens"].sum():
            raise UserError(f"the arrays of {shard} do not fit together; delete {folder.parent} to make it anew")
        counts.append(len(tokens))
        documents.append(np.array(found))
    if limit is not None and len(counts) != limit:
        raise UserError(f"{folder / shard_name(len(counts))} is missing; delete {folder.parent} to make it anew")
    return Tokens(folder, counts, np.concatenate(documents))


def write_shards(folder: Path, stream: Stream, tokenizer: Tokenizer, seen: set[int], size: int = SHARD) -> Tokens:
    """Tokenise what whole shards of an earlier, interrupted attempt do not have.

    seen: digests of documents that are left out when they come (again); those of this stream are added
    size: tokens after which a shard ends; a document is never parted, so a longer one is a shard of its own
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = read_shards(folder)
    seen.update(before.documents["digest"].tolist())
    encoded = tokenised(stream(len(before.documents)), tokenizer, seen)
    kind = np.uint16 if tokenizer.vocabulary <= 2**16 else np.uint32
    for number, documents in enumerate(grouped(encoded, size), len(before.starts) - 1):
        write_shard(folder / shard_name(number), documents, kind)
    return read_shards(folder)


def tokenised(texts: Iterator[str], tokenizer: Tokenizer, seen: set[int]) -> Iterator[tuple[int, Encoded]]:
    """(digest, ids and bytes with the end of the document) of each text; none for a text that was seen before."""
    nothing = np.empty(0, np.int64), np.empty(0, np.int64)
    while some := list(islice(texts, AT_ONCE)):
        digests = [digest(text) for text in some]
        fresh = {}
        for text, key in zip(some, digests, strict=True):
            if key not in seen:
                seen.add(key)
                fresh[key] = text
        encoded = dict(zip(fresh, tokenizer.encode(list(fresh.values())), strict=True))
        for key in digests:
            yield key, ended(encoded.pop(key), tokenizer.end) if key in encoded else nothing


def ended(encoded: Encoded, end: int | None) -> Encoded:
    ids, sizes = encoded
    return (ids, sizes) if end is None else (np.append(ids, end), np.append(sizes, 0))


def grouped(documents: Iterable[tuple[int, Encoded]], size: int) -> Iterator[list[tuple[int, Encoded]]]:
    """The documents of each shard."""
    group: list[tuple[int, Encoded]] = []
    tokens = 0
    for document in documents:
        length = len(document[1][0])
        if group and tokens + length > size:
            yield group
            group, tokens = [], 0
        group.append(document)
        tokens += length
    if group:
        yield group


def write_shard(path: Path, documents: list[tuple[int, Encoded]], kind: type) -> None:
    ids, sizes = (np.concatenate([document[i] for _, document in documents]) for i in range(2))
    rows = [(len(tokens), lengths.sum(), key) for key, (tokens, lengths) in documents]
    # A token of more than 65,535 bytes, such as one unknown token for a whole text, counts as that many.
    arrays = ids.astype(kind), np.minimum(sizes, 2**16 - 1).astype(np.uint16), np.array(rows, DOCUMENT)
    partly = path.with_name(f"{path.name}.part")
    shutil.rmtree(partly, ignore_errors=True)
    partly.mkdir()
    for name, values in zip(NAMES, arrays, strict=True):
        with (partly / f"{name}.npy").open("wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())
    partly.replace(path)
