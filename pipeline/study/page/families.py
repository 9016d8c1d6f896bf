"""Which cells of a sweep may be averaged: those of one model, one data set and one headline."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from pipeline.cells import STATES
from pipeline.metrics import METRICS, Metric
from pipeline.results import BEFORE, headline
from pipeline.study.answer import answer, headline_place
from pipeline.study.effects import effects
from pipeline.study.lines import Lines, in_points, lines
from pipeline.study.page.foretold import foretold
from pipeline.study.page.numbers import MEASURED, of_networks
from pipeline.study.pictures import chance
from pipeline.study.prediction import Prediction
from pipeline.study.summary import HEADLINE_STAGES, last_measurement
from pipeline.study.sweep import COLUMNS, Sweep
from pipeline.tables import UserError

FAMILY = ("model", "data")  # columns of a row that no mean is over


@dataclass(frozen=True)
class Family:
    """Cells of one model, data set and headline.

    title: "resnet18 on cifar10"; label: the parts of it that tell the family from the others, "" where it is alone
    """

    title: str
    label: str
    sweep: Sweep

    @cached_property
    def metric(self) -> Metric:
        return headline(self.sweep.rows)

    @property
    def slug(self) -> str:
        """The label as a part of a file's name."""
        return re.sub(r"[^\w.=+-]+", "-", self.label)

    @cached_property
    def found(self) -> Lines | None:
        """What statistics read; None where no cell that is done has rows yet."""
        try:
            return lines(Sweep(self.sweep.cells, self.rows))
        except UserError:
            return None

    @cached_property
    def rows(self) -> pl.DataFrame:
        """The rows of the last measurement of the cells that are done."""
        return last_measurement(self.sweep.done_rows)

    @cached_property
    def chance(self) -> float | None:
        """See pictures.chance; in points (see lines.in_points)."""
        name = self.metric.name
        found = pl.DataFrame({name: [chance(self.rows, self.metric)]}, {name: pl.Float64})
        return found.select(in_points(self.metric)).item()

    @cached_property
    def sentences(self) -> list[str]:
        """The answer in plain sentences, or the one line that says why there is none."""
        return answer(self.found) if self.found else [f"No cell of {self.title} that is done has rows yet."]

    @cached_property
    def _effects(self) -> dict[tuple[str, float | None], pl.DataFrame]:
        return {}

    def effects(self, stage: str, ratio: float | None) -> pl.DataFrame:
        """The table of `effects`, computed once, because picture and file both show it."""
        if (stage, ratio) not in self._effects:
            self._effects[stage, ratio] = effects(self.found, stage, ratio)
        return self._effects[stage, ratio]

    @cached_property
    def numbers(self) -> pl.DataFrame | None:
        """Numbers on the uncompressed networks, see `numbers.of_networks`."""
        return of_networks(self.sweep, self.rows)

    @cached_property
    def prediction(self) -> Prediction | str:
        """How well foldability is foretold where `shown` is, or why it is not."""
        return foretold(self.found, self.shown, self.numbers)

    @cached_property
    def shown(self) -> tuple[str, float] | None:
        """The stage and ratio that lead (see headline_place), else any; None where nothing was measured."""
        if self.found is None or self.found.methods.is_empty():
            return None
        stage, ratio = headline_place(self.found)
        there = self.found.methods.select("stage", "ratio").unique().sort(pl.all())
        return (stage, ratio) if ratio is not None else there.row(0)


def families(sweep: Sweep) -> list[Family]:
    """The families of a sweep, the largest first. Cells without rows are with the first of their headline.

    Their rows have the columns that statistics and pages read, because each family is a copy of its rows.
    """
    parts = {}
    for metric, part in Sweep(sweep.cells, sweep.rows.select(read(sweep.rows))).by_metric().items():
        rows = apart(part.rows)
        measured = part.rows["cell"].unique().to_list()
        bare = ~part.cells["cell"].is_in(measured)
        for names, own in rows.items():
            there = part.cells["cell"].is_in(own["cell"].unique().to_list())
            cells = part.cells.filter(there if any(key[0] == metric for key in parts) else there | bare)
            parts[metric, *names] = Sweep(cells, own)
        if not rows:
            parts[metric, "", ""] = part
    ordered = sorted(parts, key=lambda key: -len(parts[key].cells))
    differs = [len({key[place] for key in parts}) > 1 for place in range(3)]
    return [Family(_title(*key), _label(key, differs), parts[key]) for key in ordered]


def read(rows: pl.DataFrame) -> list[str]:
    """The columns that statistics and pages read; of a metric, or of MEASURED, only where a row has a value."""
    there = [name for name in (*COLUMNS, *MEASURED) if name in rows.columns]
    headlines = {*rows["metric"].unique(), BEFORE["metric"]}
    beside = {*METRICS, *MEASURED} - headlines
    return [name for name in there if name not in beside or rows[name].count()]


def apart(rows: pl.DataFrame) -> dict[tuple[str, ...], pl.DataFrame]:
    """{values of FAMILY: their rows}; where there is one family alone, the rows themselves."""
    if rows.select(FAMILY).n_unique() == 1:
        return {rows.select(FAMILY).row(0): rows}
    return rows.partition_by(*FAMILY, as_dict=True, maintain_order=True)


def stages(names: list[str]) -> list[str]:
    """Names of stages, those that lead first, the others by name."""
    return sorted(names, key=lambda name: (rank(name), name))


def rank(stage: str) -> int:
    return HEADLINE_STAGES.index(stage) if stage in HEADLINE_STAGES else len(HEADLINE_STAGES)


def states(sweep: Sweep) -> str:
    """ "3 done, 1 running, 1 failed, 1 broken" """
    counts = Counter(sweep.cells["state"])
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) or "no cells"


def failures(sweep: Sweep) -> list[tuple[str, int]]:
    """(reason, number of cells) for cells that ended with a reason, the most frequent first."""
    return Counter(reason for reason in sweep.cells["reason"] if reason).most_common()


def _title(metric: str, model: str, data: str) -> str:
    return (f"{model} on {data}" if model else "this sweep") + f", {metric}" * bool(metric)


def _label(key: tuple[str, ...], differs: list[bool]) -> str:
    metric, model, data = (part if differ else "" for part, differ in zip(key, differs, strict=True))
    return " ".join(filter(None, (model, data, metric)))
