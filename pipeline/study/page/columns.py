"""A family of cells as compact columns: typed arrays in base64, and one table of names for each kind of category.

Rows as JSON would take ten times the place and the time to read: a thousand cells have some 50,000 measurements.
"""

import base64
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from pipeline.results import DENSE
from pipeline.study.lines import in_points, told
from pipeline.study.matching import coded_levels
from pipeline.study.page.families import Family, stages
from pipeline.study.page.foretold import data_of, drawn, lines_of
from pipeline.study.page.numbers import MEASURED, of_folded
from pipeline.study.summary import PER_CELL, dense_rows
from pipeline.study.terminal import TITLES

UNSIGNED = (np.uint8, np.uint16, np.uint32)
Column = tuple[str, str]  # name of its type ("u1", "u2", "u4", "f4"), and its little-endian bytes in base64


@dataclass(frozen=True)
class Places:
    """Where a cell's files are, for the links of the table, and its page in W&B; "" where unknown."""

    folders: dict[str, str]
    wandb: dict[str, str]


@dataclass(frozen=True)
class Axes:
    """The categories of a family; a code is a place in one of them. The last ratio, null, is the area."""

    stages: list[str]
    ratios: list[float | None]
    methods: list[str]


def floats(values: pl.Series) -> Column:
    """null becomes NaN."""
    return "f4", _text(values.cast(pl.Float64).to_numpy().astype("<f4"))


def codes(values: pl.Series) -> Column:
    """Unsigned integers, in the smallest type that holds the largest of them."""
    array = values.to_numpy()
    kind = next(k for k in UNSIGNED if not len(array) or array.max() <= np.iinfo(k).max)
    return f"u{kind().itemsize}", _text(array.astype(kind).astype(f"<u{kind().itemsize}"))


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def packed(family: Family, places: Places, speeds: pl.DataFrame) -> dict[str, Any]:
    """The family as the page reads it: names, categories and columns. Values are in points, see `lines.in_points`.

    cells: one entry per cell, those of one recipe behind each other
    lines: fold and prune per cell, stage and ratio; rows: one entry per measurement. Both are sorted by (stage, ratio),
        rows then by method, then both by cell, so that the seeds of a recipe follow each other.
    sizes: parameters and MACs, which most measurements share; a size is a place in it
    numbers: one entry per cell, of the uncompressed network; left: one per line, of the best folding
    prediction: the table of `prediction`, and what was foretold of the cells; {"reason"} where nothing was
    """
    found = family.found
    head = {"title": family.title, "label": family.label, "metric": asdict(family.metric)}
    head["metric"] |= {"heading": family.metric.heading}
    head["chance"] = family.chance
    if found is None or family.shown is None:
        return head | {"empty": family.sentences[0]}
    cells, settings = _cells(family)
    axes = axes_of(family)
    rows = _rows(family, axes, cells)
    sizes = pl.concat([rows.select("params", "macs"), cells.select("params", "macs")]).unique(maintain_order=True)
    return head | {
        "stages": [{"name": stage, "title": TITLES.get(stage, stage)} for stage in axes.stages],
        "ratios": axes.ratios[:-1],
        "methods": axes.methods,
        "lead": [axes.stages.index(family.shown[0]), axes.ratios.index(family.shown[1])],
        "settings": settings,
        "names": cells["cell"].to_list(),
        "folders": [places.folders.get(cell, "") for cell in cells["cell"]],
        "wandb": [places.wandb.get(cell, "") for cell in cells["cell"]],
        "cells": {
            "recipe": codes(cells["recipe"].rank("dense") - 1),
            "base": floats(cells["base"]),
            "size": codes(_size(cells, sizes)),
            "settings": [codes(cells[f"code {place}"]) for place in range(len(settings))],
        },
        "lines": _lines(family, axes, cells),
        "rows": {name: codes(rows[name]) for name in ("at", "method", "cell")}
        | {"value": floats(rows["value"]), "size": codes(_size(rows, sizes))},
        "sizes": {name: floats(sizes[name]) for name in ("params", "macs")},
        "numbers": _numbers(family, cells),
        "prediction": _prediction(family, cells),
        "speeds": _speeds(speeds, axes, cells),
    }


def axes_of(family: Family) -> Axes:
    methods = family.found.methods
    ratios = sorted(methods["ratio"].unique().to_list())
    kinds = methods.select("method", "kind").unique(maintain_order=True)
    order = {"fold": 0, "mix": 1, "auto": 2, "prune": 3, "mask": 4}
    ordered = kinds.sort(pl.col("kind").replace_strict(order, default=9), maintain_order=True)
    names = ordered["method"].unique(maintain_order=True).to_list()
    return Axes(stages(methods["stage"].unique().to_list()), [*ratios, None], names)


def _cells(family: Family) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """(cells by recipe, settings): a code for each setting, and the texts of its levels."""
    metric = family.metric
    cells = family.found.methods.select("cell", "recipe", "seed").unique("cell", maintain_order=True)
    dense = dense_rows(family.rows).with_columns(base=in_points(metric))
    base = dense.group_by("cell").agg(pl.col("base").mean(), pl.col("params", "macs").max())
    names = told(family.sweep)
    cells = cells.join(family.sweep.cells.select("cell", *names), on="cell", how="left")
    cells = cells.join(base, on="cell", how="left").sort("recipe", "seed", "cell").with_row_index("place")
    settings = []
    for place, (full, short) in enumerate(names.items()):
        code, levels = coded_levels(cells[full])
        cells = cells.with_columns(pl.Series(f"code {place}", code, dtype=pl.UInt32))
        settings.append({"name": short, "levels": list(levels)})
    return cells, settings


def _coded(table: pl.DataFrame, axes: Axes, cells: pl.DataFrame) -> pl.DataFrame:
    """The table with `at`, a code of stage and ratio together, and the cells' places for their names."""
    at = _code("stage", axes.stages) * len(axes.ratios) + _code("ratio", axes.ratios)
    return table.with_columns(at=at, cell=_code("cell", cells["cell"].to_list())).drop("stage", "ratio")


def _code(name: str, values: list[Any]) -> pl.Expr:
    """The places of a column's values among these. A join would take several times the memory."""
    return pl.col(name).replace_strict(values, range(len(values)), return_dtype=pl.UInt32)


def _lines(family: Family, axes: Axes, cells: pl.DataFrame) -> dict[str, Any]:
    table = family.found.table.select("cell", "stage", "ratio", "fold", "prune")
    beside = of_folded(family.rows, family.metric.higher_is_better)
    table = table.join(beside, on=PER_CELL, how="left", nulls_equal=True)
    table = _coded(table, axes, cells).sort("at", "cell")
    left = [_number(table, n, family) for n in beside.columns if n in MEASURED]
    columns = {name: floats(table[name]) for name in ("fold", "prune")}
    return {name: codes(table[name]) for name in ("at", "cell")} | columns | {"left": left}


def _numbers(family: Family, cells: pl.DataFrame) -> list[dict[str, Any]]:
    if family.numbers is None:
        return []
    table = cells.select("cell").join(family.numbers, on="cell", how="left", maintain_order="left")
    return [_number(table, n, family) for n in table.columns if n != "cell"]


def _number(table: pl.DataFrame, name: str, family: Family) -> dict[str, Any]:
    """A column of numbers with its title; a value of the headline as people read it."""
    scale = family.metric.scale if name == "corrupted" else 1.0
    return {"name": MEASURED.get(name, name), "values": floats(table[name] * scale)}


def _prediction(family: Family, cells: pl.DataFrame) -> dict[str, Any]:
    made = family.prediction
    if isinstance(made, str):
        return {"reason": made}
    chosen, places = drawn(made), cells.select("cell", "place")
    there = made.cells.select("cell", "fold").with_columns(said=pl.Series(chosen.said))
    there = there.join(places, on="cell", maintain_order="left")
    return {
        "stage": family.shown[0],
        "ratio": family.shown[1],
        "lines": lines_of(made),
        "drawn": made.lines.index(chosen),
        "data": data_of(made),
        "cell": codes(there["place"]),
        "fold": floats(there["fold"]),
        "said": floats(there["said"]),
    }


def _rows(family: Family, axes: Axes, cells: pl.DataFrame) -> pl.DataFrame:
    read = family.found.methods.select("cell", "stage", "ratio", "method", "value", "params", "macs")
    points = _coded(read, axes, cells).with_columns(_code("method", axes.methods))
    return points.sort("at", "method", "cell")


def _size(table: pl.DataFrame, sizes: pl.DataFrame) -> pl.Series:
    numbered = sizes.with_row_index("size")
    return table.join(numbered, on=["params", "macs"], nulls_equal=True, how="left", maintain_order="left")["size"]


def _speeds(speeds: pl.DataFrame, axes: Axes, cells: pl.DataFrame) -> dict[str, Any] | None:
    """Milliseconds per cell, method and ratio, by the runtime and batch size that most networks were timed with."""
    if speeds.is_empty():
        return None
    there = speeds.filter(
        (pl.col("method") != DENSE) & pl.col("median").is_not_null() & pl.col("median").is_not_nan()
    ).filter(pl.col("method").is_in(axes.methods) & pl.col("ratio").is_in(axes.ratios[:-1]))
    there = there.join(cells.select("cell", "place"), on="cell")
    if there.is_empty():
        return None
    how = ["runtime", "batch_size", "device"]
    most = there.group_by(how).len().sort("len", *how, descending=[True, False, False, False]).row(0)
    there = there.filter(*(pl.col(name) == value for name, value in zip(how, most, strict=False)))
    place = {name: i for i, name in enumerate(axes.methods)}
    ratio = {value: i for i, value in enumerate(axes.ratios)}
    return {
        "how": "{}, batch {}, {}".format(*most[:3]),
        "cell": codes(there["place"]),
        "method": codes(there["method"].replace_strict(place, return_dtype=pl.UInt32)),
        "ratio": codes(there["ratio"].replace_strict(ratio, return_dtype=pl.UInt32)),
        "ms": floats(1000 * there["median"]),
    }
