"""W&B dashboards as code: which panels there are follows from what the runs measured.

Panels name what runs log (`pipeline.study.logged`) and the settings of their configs. W&B draws an empty panel for a
name that no run has and says nothing, so names are taken from the rows and never written down here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.metrics import Metric
from pipeline.results import headline, measured, side
from pipeline.study.lines import BESIDE, SEEDS
from pipeline.study.logged import FOLDING, GAP, PRUNING, area_name, curve_name, dense_name, ratio_name, table_name
from pipeline.study.summary import last_measurement
from pipeline.study.sweep import Sweep, short
from pipeline.tables import UserError, optional

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

MODEL = "model.name"  # the setting that tells families apart
ELSEWHERE = ("data.root", "data.workers", "data.cache")  # settings that are no axis of a plot
TITLE = "Foldability"
WIDTH, HEIGHT = 24, 8  # of a report's grid; of a panel that takes its whole width
SEEDS_COLLAPSE = "Runs that differ in their seed alone are one line: their mean, and their range as a band."


@dataclass(frozen=True)
class Family:
    """Runs of one kind of model, which the same panels show.

    model: their value of MODEL, "" for all runs; runs: how many were looked at, 0: none
    metric: the headline; split: where it was measured last, "test" or "val"
    methods: {stage: methods}; sides: {stage: those of "fold" and "prune" that it has}
    settings: {setting that differs between runs: is its axis logarithmic?}
    watched: whether epochs were measured on the way, on validation samples
    """

    model: str
    metric: Metric
    methods: Mapping[str, tuple[str, ...]]
    sides: Mapping[str, frozenset[str]]
    split: str = "test"
    settings: Mapping[str, bool] = field(default_factory=dict)
    watched: bool = True
    runs: int = 0

    @property
    def title(self) -> str:
        return self.model or "all models"

    @property
    def stage(self) -> str:
        """The stage that stands for all: the last one in which folding can be compared with pruning."""
        compared = [stage for stage, sides in self.sides.items() if len(sides) == 2]
        return (compared or list(self.methods))[-1]

    @property
    def goal(self) -> str:
        """The number by which settings are judged: the folded value, else the area of the first method."""
        first = self.methods[self.stage][0]
        return area_name(FOLDING if "fold" in self.sides[self.stage] else first, self.stage, self.split)

    def curve(self, of: str, stage: str) -> str:
        """Name of the headline's curve. of: a method or GAP."""
        return curve_name(of, self.metric.name, stage, self.split)

    def has_gap(self, stage: str) -> bool:
        return len(self.sides[stage]) == 2


def families(sweep: Sweep) -> list[Family]:
    """The families of a sweep's cells that are done and have rows. UserError where there are none."""
    done = sweep.cells.filter(pl.col("state") == "done")
    found = [
        family_of(model, Sweep(cells, part.rows.join(cells.select("cell"), on="cell", how="semi")))
        for part in Sweep(done, sweep.rows).by_metric().values()
        for model, cells in by_model(part.cells)
    ]
    kept = [family for family in found if family is not None]
    if not kept:
        raise UserError("no cell that is done has rows yet; come back when one has, or leave the folder of runs out")
    return kept


def by_model(cells: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    if MODEL not in cells.columns:
        return [("", cells)]
    groups = cells.partition_by(MODEL, as_dict=True, maintain_order=True)
    return [(str(model), group) for (model,), group in groups.items()]


def family_of(model: str, sweep: Sweep) -> Family | None:
    """The family of these cells; None where they have no rows of smaller networks."""
    rows = last_measurement(sweep.rows)
    smaller = measured(rows)  # what failed in every run has no curve
    if smaller.is_empty():
        return None
    return Family(
        model,
        headline(rows),
        *methods_and_sides(smaller),
        split="test" if "test" in rows["split"] else "val",
        settings={name: spans_decades(sweep.cells[name]) for name in sweep.differing() if is_axis(name)},
        watched="val" in measured(sweep.rows)["split"],
        runs=rows["cell"].n_unique(),
    )


def methods_and_sides(rows: pl.DataFrame) -> tuple[dict[str, tuple[str, ...]], dict[str, frozenset[str]]]:
    """Fields of a Family, from rows with the columns that `results.side` reads, and stage and method."""
    methods: dict[str, tuple[str, ...]] = {}
    sides: dict[str, frozenset[str]] = {}
    told = rows.select("stage", "method", side=side())
    for (stage,), part in told.partition_by("stage", as_dict=True, maintain_order=True).items():
        methods[str(stage)] = tuple(part["method"].unique(maintain_order=True))
        sides[str(stage)] = frozenset(part["side"].drop_nulls())
    return methods, sides


def is_axis(setting: str) -> bool:
    """Does a setting say how a run was trained? Seeds do not: runs that differ in it are one line."""
    return not setting.startswith((*BESIDE, *ELSEWHERE)) and setting not in SEEDS


def spans_decades(values: Iterable[Any]) -> bool:
    """Are these numbers above zero, the largest at least ten times the smallest?"""
    told = [value for value in values if value is not None]
    numbers = [value for value in told if isinstance(value, int | float) and not isinstance(value, bool)]
    return len(numbers) == len(told) > 1 and 0 < 10 * min(numbers) <= max(numbers)


# --- panels


def sections(family: Family) -> dict[str, list[Any]]:
    """{heading: its panels}, new ones at every call; a section that a family has nothing for is left out."""
    found = {
        "What is left, over the ratio": over_ratio(family),
        "Folding against pruning": against_pruning(family),
        "Settings": by_setting(family),
        "Each method": each_method(family),
        "While training": while_training(family) if family.watched else [],
        "Side by side": side_by_side(),
    }
    return {name: panels for name, panels in found.items() if panels}


def over_ratio(family: Family) -> list[Any]:
    """A plot for each stage: the headline of every method over the ratio, mean over all runs of a model."""
    wr = reports()
    return [
        wr.LinePlot(
            title=f"{family.metric.heading}, {stage}: mean over runs and its standard error",
            x=ratio_name(family.split),
            y=[family.curve(method, stage) for method in methods],
            title_x="ratio removed",
            log_y=family.metric.log,
            groupby=wr.Config(MODEL),
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
        )
        for stage, methods in family.methods.items()
    ]


def against_pruning(family: Family) -> list[Any]:
    """The gap over the ratio, and the folded value against what the whole network had and against the gap."""
    wr, panels = reports(), []
    for stage in family.methods:
        if not family.has_gap(stage):
            continue
        folded, gap = (area_name(of, stage, family.split) for of in (FOLDING, GAP))
        dense, lead = dense_name(family.metric.name, family.split), family.curve(GAP, stage)
        panels += [
            recipe_lines(family, f"Lead of folding over pruning, {stage}", lead),
            wr.ScatterPlot(title=f"Folded against dense, {stage}", x=dense, y=folded),
            wr.ScatterPlot(title=f"Gap against folded, {stage}", x=folded, y=gap),
        ]
    return panels


def by_setting(family: Family) -> list[Any]:
    """Parallel coordinates of the settings that differ, and how well each foretells the folded value."""
    if not family.settings:
        return []
    wr = reports()
    names, columns = short(list(family.settings)), wr.ParallelCoordinatesPlotColumn
    numbers = [dense_name(family.metric.name, family.split), family.goal]
    if family.has_gap(family.stage):
        numbers.append(area_name(GAP, family.stage, family.split))
    axes = [columns(wr.Config(name), display_name=names[name], log=log) for name, log in family.settings.items()]
    return [
        wr.ParallelCoordinatesPlot(
            title="Settings and what they leave",
            columns=[*axes, *(columns(wr.SummaryMetric(number)) for number in numbers)],
            layout=wr.Layout(w=WIDTH, h=HEIGHT),
        ),
        wr.ParameterImportancePlot(with_respect_to=family.goal, layout=wr.Layout(w=WIDTH, h=HEIGHT)),
    ]


def each_method(family: Family) -> list[Any]:
    """For every method its curves, a line for each recipe, then its table; and the areas of all methods as bars."""
    wr, panels = reports(), []
    for method in dict.fromkeys(method for methods in family.methods.values() for method in methods):
        for stage in (stage for stage, methods in family.methods.items() if method in methods):
            title = f"{method}, {stage}: a line for each recipe"
            panels.append(recipe_lines(family, title, family.curve(method, stage), family.metric.log))
        panels.append(wr.WeavePanelSummaryTable(table_name=table_name(method, family.split)))
    areas = {stage: [area_name(m, stage, family.split) for m in of] for stage, of in family.methods.items()}
    mean = {"groupby": wr.Config(MODEL), "groupby_aggfunc": "mean"}
    bars = [wr.BarPlot(title=f"Area under the curve, {stage}", metrics=names, **mean) for stage, names in areas.items()]
    return [*bars, *panels]


def while_training(family: Family) -> list[Any]:
    """The areas and the dense headline over the epochs, on validation samples."""
    areas = {stage: [area_name(method, stage) for method in methods] for stage, methods in family.methods.items()}
    dense = [dense_name(family.metric.name)]
    plots = {"Dense": dense, **{f"Area under the curve, {stage}": names for stage, names in areas.items()}}
    return [reports().LinePlot(title=f"{title}, validation", x="epoch", y=names) for title, names in plots.items()]


def side_by_side() -> list[Any]:
    wr = reports()
    note = "The Run Comparer shows the first ten visible runs; hide others in the list of runs to choose."
    return [
        wr.MarkdownPanel(markdown=note, layout=wr.Layout(w=WIDTH, h=2)),
        wr.RunComparer(diff_only="split", layout=wr.Layout(w=WIDTH, h=2 * HEIGHT)),
    ]


def recipe_lines(family: Family, title: str, curve: str, log: bool = False) -> Any:
    """A curve over the ratio, one line for each recipe: the mean over its seeds, and their range."""
    return reports().LinePlot(
        title=title,
        x=ratio_name(family.split),
        y=[curve],
        title_x="ratio removed",
        log_y=log,
        groupby="Group",
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=100,
    )


# --- the workspace and the report


def workspaces(found: Iterable[Family], project: str, entity: str = "") -> list["Workspace"]:
    """A workspace for each family, not yet saved: a workspace has one list of runs, so one filter."""
    ws, expr = (optional("a dashboard", f"wandb_workspaces.{name}", "dashboard") for name in ("workspaces", "expr"))
    return [
        ws.Workspace(
            name=f"{TITLE}: {family.title} by {family.metric.title}",
            entity=entity,
            project=project,
            sections=[
                ws.Section(name=name, panels=panels, is_open=True, layout_settings=ws.SectionLayoutSettings(3, 2))
                for name, panels in sections(family).items()
            ],
            settings=ws.WorkspaceSettings(max_runs=100),
            runset_settings=ws.RunsetSettings(
                filters=own_runs(family),
                groupby=[expr.Metric("Group")],
                order=[expr.Ordering(expr.Summary(family.goal), ascending=not family.metric.higher_is_better)],
                pinned_columns=pinned(family),
            ),
        )
        for family in found
    ]


def own_runs(family: Family) -> str:
    """The filter for the runs of a family.

    W&B keeps a config as {"model": {"value": {"name": ...}}}; wandb-workspaces adds ".value" everywhere but in filters.
    """
    first, _, rest = MODEL.partition(".")
    return f"Config('{first}.value.{rest}') = '{family.model}'" if family.model else ""


def pinned(family: Family) -> list[str]:
    """Columns of the list of runs: the headline of the whole network, what folding leaves of it, and its lead."""
    numbers = [dense_name(family.metric.name, family.split), family.goal]
    if family.has_gap(family.stage):
        numbers += [area_name(of, family.stage, family.split) for of in (PRUNING, GAP)]
    return ["run:displayName", *(f"summary:{number}" for number in numbers)]


def report(found: Iterable[Family], project: str, entity: str = "") -> "Report":
    """A report with a part for each family, not yet saved. Without an entity, W&B is not asked for the project."""
    wr = reports()
    blocks = [
        wr.TableOfContents(),
        wr.P("What is left of networks after folding and pruning, over the fraction of channels that are removed. "),
        wr.P(SEEDS_COLLAPSE),
    ]
    for family in found:
        blocks.append(wr.H1(f"{family.title}, {family.metric.title}"))
        for name, panels in sections(family).items():
            runs = wr.Runset(
                entity=entity,
                project=project,
                name=family.title,
                filters=own_runs(family),
                groupby=["group"],
                order=[wr.OrderBy(wr.SummaryMetric(family.goal), ascending=not family.metric.higher_is_better)],
            )
            blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(
        project=project, entity=entity, title=f"{TITLE}: what folding leaves", blocks=blocks, width="fluid"
    )


def reports() -> Any:
    return optional("a dashboard", "wandb_workspaces.reports.v2", "dashboard")
