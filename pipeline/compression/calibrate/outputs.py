"""Outputs of a network on batches, kept so that other networks can be compared with it row by row."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.compression.calibrate.batches import batches_of
from pipeline.compression.calibrate.repair import kept_modes
from pipeline.example import Example, call_arguments
from pipeline.tables import UserError

VALUES = 2**26  # outputs that are kept of a network; where there are more, rows are drawn

Answers = Callable[[Any], Tensor]  # output of a network -> its (rows, classes)


class Outputs:
    """The outputs of a network on pictures, (rows, values) for each batch.

    answers: output of a network -> its (rows, classes), where a row is a picture or a token; None: all floating-point
        outputs of a sample side by side.

    Raises UserError where `answers` returns another shape, and for pictures that `batches_of` refuses.
    """

    def __init__(self, model: nn.Module, pictures: Example | Iterable[Example], answers: Answers | None = None) -> None:
        self.pictures, self.answers = batches_of(pictures), answers or every_output
        self.kept = list(self._of(model))

    def beside(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """For every batch (outputs of the model, outputs that were kept), each (rows, values)."""
        return zip(self._of(model), self.kept, strict=True)

    @torch.no_grad()
    def _of(self, model: nn.Module) -> Iterator[Tensor]:
        for i, (batch, one) in enumerate(zip(self.pictures, self.pictures.outlines, strict=True)):
            args, kwargs = call_arguments(batch)
            with kept_modes(model):
                rows = self.answers(model.eval()(*args, **kwargs))
            if not isinstance(rows, Tensor) or rows.dim() != 2:
                shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise UserError(f"answers= must return a tensor (rows, classes), got {shape}")
            yield drawn_rows(rows, VALUES * one.samples // self.pictures.count, seed=i)


def drawn_rows(rows: Tensor, values: int, seed: int) -> Tensor:
    """(rows left, classes), drawn from (rows, classes): at most `values` values, but at least one row, by the seed."""
    most = max(1, values // max(1, rows.shape[1]))
    if len(rows) <= most:
        return rows
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most]
    return rows[drawn.sort().values.to(rows.device)]


def every_output(output: Any) -> Tensor:
    """(N, values): all floating-point outputs of a network side by side."""
    return torch.cat([t.flatten(1) for t in float_leaves(output)], 1)


def float_leaves(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
