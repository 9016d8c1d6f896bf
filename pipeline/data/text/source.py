"""The record that every source of text returns, and what makes a text the same as another."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Stream = Callable[[int], Iterator[str]]  # skip -> the documents behind the first `skip`, always in the same order


@dataclass(frozen=True)
class Source:
    """Documents, read when they are asked for.

    identity: JSON values that change whenever the documents do; prepared tokens are found again by them
    train: the documents that training, and validation by its share of them, may use
    test: the documents of a test part; None: it is cut off from `train`
    """

    identity: dict[str, Any]
    train: Stream
    test: Stream | None = None


def digest(text: str) -> int:
    """64 bits that stand for a document: the same text has the same digest wherever it lies."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def whole(text: str) -> str:
    """The text, with half characters (lone surrogates, which JSON can spell) replaced: no tokenizer takes them."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
