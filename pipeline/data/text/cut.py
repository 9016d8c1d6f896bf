"""Parts of a text: by document, or, where there are few, by stretches of it. The same text is never in two parts."""

from dataclasses import dataclass

import numpy as np

from .shards import Tokens

FEW = 20  # documents below which a text is cut into stretches


@dataclass(frozen=True)
class Part:
    """Stretches of a stream, each a document or a piece of one, in order. starts, ends: (D,) int64 positions"""

    tokens: Tokens
    starts: np.ndarray
    ends: np.ndarray

    @property
    def size(self) -> int:
        return int((self.ends - self.starts).sum())


def too_few(digests: np.ndarray) -> bool:
    return len(digests) < FEW


def chosen(digests: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A share of different documents, at least one unless fraction is 0; their order in the text does not matter.

    digests: (n,) uint64, ascending and different
    """
    count = max(1, round(fraction * len(digests))) if fraction else 0
    return np.random.default_rng(seed).permutation(digests)[:count]


def parts(tokens: Tokens, val_fraction: float, test_fraction: float, seed: int) -> dict[str, Part]:
    """{"train", "val", "test"}: the test part is the same for every seed. Where documents are few, the last
    stretch is the test part and the one before it the validation part, both measured in bytes of text."""
    digests = np.unique(tokens.documents["digest"][tokens.documents["tokens"] > 0])
    if too_few(digests):
        return stretches(tokens, val_fraction, test_fraction)
    test = chosen(digests, test_fraction, seed=0)
    val = chosen(np.setdiff1d(digests, test), val_fraction, seed)
    in_test, in_val = (np.isin(tokens.documents["digest"], some) for some in (test, val))
    rows = {"train": ~(in_test | in_val), "val": in_val, "test": in_test}
    return {name: of_documents(tokens, mask) for name, mask in rows.items()}


def of_documents(tokens: Tokens, mask: np.ndarray) -> Part:
    """The documents of a mask (D,) that have tokens."""
    mask = mask & (tokens.documents["tokens"] > 0)
    ends = tokens.ends_of_documents[mask]
    return Part(tokens, ends - tokens.documents["tokens"][mask], ends)


def everything(tokens: Tokens) -> Part:
    return of_documents(tokens, np.ones(len(tokens.documents), bool))


def stretches(tokens: Tokens, val_fraction: float, test_fraction: float) -> dict[str, Part]:
    total = int(tokens.documents["bytes"].sum())
    test = len(tokens) if not test_fraction else tokens.position(int(total * (1 - test_fraction)))
    # The validation part is a share of what is left, as it is where documents are cut.
    val = test if not val_fraction else tokens.position(int(total * (1 - test_fraction) * (1 - val_fraction)))
    borders = {"train": (0, val), "val": (val, test), "test": (test, len(tokens))}
    return {name: clipped(everything(tokens), *span) for name, span in borders.items()}


def clipped(part: Part, start: int, end: int) -> Part:
    """What lies between two positions of the stream."""
    starts, ends = part.starts.clip(start, end), part.ends.clip(start, end)
    kept = ends > starts
    return Part(part.tokens, starts[kept], ends[kept])
