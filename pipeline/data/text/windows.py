"""A part of a text as windows of equal length, cut from memory-mapped tokens when a batch is fetched."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.tasks.language import IGNORED

from ..pictures import collate
from .cut import Part

Batch = dict[str, Tensor]


class Windows(Dataset):
    """Windows of `context` tokens that do not overlap, over the documents of a part, one behind the other.

    padding: id that fills up the last window; None: a last window that is shorter is left out, as training wants it.
        What is filled up is not counted, and since a network of language sees only what is before a token, it changes
        nothing: so batches need no attention_mask, and all have one shape
    rows: (n,) int64; serve only these windows

    A batch is {"input_ids": (B, T) int64, "labels": (B, T) int64, "bytes": (B,) int64, of the text that the counted
    labels stand for}. Labels are IGNORED where nothing before them in the window tells of them: the first token of a
    window and the first of a document. A DataLoader needs `collate_fn=Windows.collate`.
    """

    collate = staticmethod(collate)

    def __init__(self, part: Part, context: int, padding: int | None = None, rows: Tensor | None = None) -> None:
        self.part, self.context, self.padding = part, context, padding
        # (D + 1,) where each document starts in the part, and where the last one ends
        self._starts = np.concatenate([[0], np.cumsum(part.ends - part.starts, dtype=np.int64)])
        whole, left = divmod(part.size, context)
        count = whole + (padding is not None and left > 1)  # a single token has nothing to be predicted from
        self.rows = torch.arange(count) if rows is None else rows

    @property
    def tokens(self) -> int:
        """How many tokens the windows hold, without what fills up the last one."""
        stops = (self.rows + 1) * self.context
        return int((stops.clamp(max=self.part.size) - self.rows * self.context).sum())

    def subset(self, indices: Tensor | Sequence[int]) -> "Windows":
        rows = self.rows[torch.as_tensor(indices, dtype=torch.int64)]
        return Windows(self.part, self.context, self.padding, rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """One window: (T,), (T,) and ()."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch at once: DataLoader prefers this to B single fetches."""
        rows = self.rows[torch.as_tensor(indices, dtype=torch.int64)].numpy()
        places = rows[:, None] * self.context + np.arange(self.context)  # (B, T) in the part
        there = places < self.part.size
        places = np.minimum(places, self.part.size - 1)
        documents = np.searchsorted(self._starts, places, "right") - 1
        inside = places - self._starts[documents]
        ids, sizes = self.part.tokens[self.part.starts[documents] + inside]
        counted = there & (inside > 0)
        counted[:, 0] = False
        found = {
            "input_ids": ids if self.padding is None else np.where(there, ids, self.padding),
            "labels": np.where(counted, ids, IGNORED),
            "bytes": np.where(counted, sizes, 0).sum(1),
        }
        return {key: torch.from_numpy(value) for key, value in found.items()}
