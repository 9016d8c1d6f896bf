"""The only evaluation loop."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compression.calibrate.repair import kept_modes
from pipeline.example import Example, call_arguments
from pipeline.tasks import Task


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batches: Iterable[Any], check: bool = False) -> Tensor | None:
    """(task.size,) float64 sums on the CPU, over batches that lie on the model's device; None for no batches.

    check: let the task check every batch, once for one network is enough; UserError for a batch that it cannot measure.
    The model keeps its mode.
    """
    sums: Tensor | None = None
    with evaluating(model):
        for batch in batches:
            output = outputs(model, task, batch)
            if check:
                task.check(output, batch)
            found = task.totals(output, batch)
            sums = found if sums is None else sums + found  # stays on the device: one synchronisation at the end
    return None if sums is None else sums.cpu().double()


def metrics_of(model: nn.Module, task: Task, batches: Iterable[Any]) -> dict[str, float]:
    """Every metric of a settled task by its name."""
    totals = evaluate(model, task, batches)
    return task.values(torch.zeros(task.size) if totals is None else totals)


@torch.no_grad()
def settle(model: nn.Module, task: Task, batch: Any) -> Task:
    """The task, settled on this batch: it measures all batches like it. UserError where it cannot."""
    with evaluating(model):
        return task.settled(outputs(model, task, batch), batch)


@torch.no_grad()
def output_on(model: nn.Module, example: Example) -> Any:
    """The output of the model in eval mode for these arguments."""
    args, kwargs = call_arguments(example)
    with evaluating(model):
        return model(*args, **kwargs)


def outputs(model: nn.Module, task: Task, batch: Any) -> Any:
    args, kwargs = call_arguments(task.inputs(batch))
    return model(*args, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards every module has its own mode back, also one that was frozen."""
    with kept_modes(model):
        model.eval()
        yield
