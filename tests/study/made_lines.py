"""Small sweeps with known numbers."""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import polars as pl

from pipeline.study.lines import Lines
from pipeline.study.sweep import shown
from pipeline.tasks import METRICS

VALUES = ("fold", "base", "prune")


def lines_of(cells: Iterable[dict[str, Any]], settings: tuple[str, ...], metric: str = "acc") -> Lines:
    """One line per cell at ratio 0.5: settings and any of VALUES, "raw" (folded, raw), "seed"; repaired elsewhere."""
    table, sign = [], 1 if METRICS[metric].higher_is_better else -1
    for number, cell in enumerate(cells):
        recipe = ", ".join(f"{name}={shown(cell[name])}" for name in settings)
        own = {"cell": f"{number}", "recipe": recipe, "seed": cell.get("seed", 0)}
        own |= {name: cell[name] for name in settings} | {"ratio": 0.5, "base": cell.get("base", 90.0)}
        stages = {"repaired": cell.get("fold")} | ({"raw": cell["raw"]} if "raw" in cell else {})
        prune = cell.get("prune", 50.0)
        table += [
            own | {"stage": stage, "fold": fold, "prune": prune, "gap": None if fold is None else sign * (fold - prune)}
            for stage, fold in stages.items()
        ]
    return Lines(pl.DataFrame(table, infer_schema_length=None), pl.DataFrame(), settings, METRICS[metric])


def grid(levels: dict[str, tuple[Any, ...]], values: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """A cell for each combination of levels. values: from the levels, by name, to VALUES."""
    cells = [dict(zip(levels, combination, strict=True)) for combination in product(*levels.values())]
    return [cell | values(**cell) for cell in cells]
