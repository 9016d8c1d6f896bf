"""Runs chains of a tiny network on disk; as a script, it kills itself: chains_to_kill.py FOLDER POINT."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stage_nets
import torch
from torch import nn

import pipeline.chains
import pipeline.stages.distil
from pipeline.chains import Ground, run
from pipeline.measure import Host, Inputs
from pipeline.results import Row
from pipeline.stages import Supplies, parse_chain
from pipeline.tasks import Classification

PICTURES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(4, (64,), generator=torch.Generator().manual_seed(0))
CHAIN = "mix+data@0.5 > repair > distil(epochs=3) > quantize(bits=4) > repair"
# {point: (module, function that is cut off, calls of it that come through)}
POINTS: dict[str, tuple[Any, str, int]] = {
    "behind the first stage": (pipeline.chains, "advanced", 1),
    "inside of distil": (pipeline.stages.distil, "train_epoch_", 2),
    "while a network is written": (pipeline.chains, "save_compressed", 2),
    "before a network has its record": (pipeline.chains, "record_of", 6),
    "before the last repair": (pipeline.chains, "advanced", 4),
}


def net() -> nn.Module:
    return stage_nets.net(PICTURES, passes=30)


def ground(store: Path, dense: nn.Module | None = None, **more: Any) -> Ground:
    dense = net() if dense is None else dense
    task = Classification("multiclass", "logits", classes=4)
    batches = list(zip(PICTURES.split(16), LABELS.split(16), strict=True))
    supplies = Supplies(dense, PICTURES[:1], task, **{"batches": batches, **more})
    given = Inputs(PICTURES[:1], {"test": [(PICTURES, LABELS)]}, batches)
    context = {"cell": "c", "model": "m", "data": "d", "seed": 0, "epoch": 1, "step": 9}
    return Ground(supplies, given, Host(task, lambda: given, ("test",)), store, "start", net(), context)


def rows_of(texts: list[str], on: Ground) -> list[Row]:
    return run([parse_chain(text) for text in texts], on, lambda node, network: None)


def cut_off(point: str, end: Callable[[], Any]) -> tuple[Any, str, Callable[..., Any]]:
    """(module, name, what to put there): `end` is called in the place of the function, once some calls came through."""
    module, name, through = POINTS[point]
    real, left = getattr(module, name), [through]

    def cut(*args: Any, **options: Any) -> Any:
        if not left[0]:
            end()
        left[0] -= 1
        return real(*args, **options)

    return module, name, cut


def main(folder: str, point: str) -> None:
    setattr(*cut_off(point, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    rows_of([CHAIN], ground(Path(folder)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
