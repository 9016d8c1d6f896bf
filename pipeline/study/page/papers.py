"""The pictures of the page as matplotlib figures, for papers. Values are in points, see `lines.in_points`."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from pipeline.study.claims import FEWEST
from pipeline.study.interactions import interactions
from pipeline.study.intervals import SHOWN, shown_half
from pipeline.study.matching import coded_levels, design
from pipeline.study.page.colors import BASE, DASHES, FOLD, GAP, PRUNE, styles
from pipeline.study.page.columns import axes_of
from pipeline.study.page.families import Family, stages
from pipeline.study.page.foretold import SETS, drawn
from pipeline.study.sweep import shown
from pipeline.study.terminal import TITLES

OUTCOMES = {"base": (BASE, "uncompressed"), "prune": (PRUNE, "best pruning"), "fold": (FOLD, "best folding")}
FOREST = {"fold": (FOLD, "o", "folded value"), "base": (BASE, "s", "uncompressed"), "gap": (GAP, "D", "gap")}
ROWS = 24  # of a forest plot
PANELS = 7  # settings in one picture
LEVELS = 16  # of a setting; with more a panel cannot be read
OUTLINE = [withStroke(linewidth=1.5, foreground="#1b1f24")]  # of letters on any colour


def curves(family: Family) -> Figure | None:
    """The headline over the ratio, mean over recipes with 95% intervals, a panel for each of the leading stages."""
    axes, drawn = axes_of(family), styles(axes_of(family).methods)
    figure, panels = _panels(family, sharey=True)
    for panel, stage in zip(panels, _stages(family), strict=True):
        for method in axes.methods:
            of = family.found.methods.filter((pl.col("stage") == stage) & (pl.col("method") == method))
            line = over_recipes(of, ["ratio"], "value").sort("ratio")
            if len(line):
                look = {"color": drawn[method]["color"], "ls": DASHES[drawn[method]["dash"]], "label": method}
                _line(panel, family, line, "ratio", look)
        base = family.found.at(stage, None)["base"].mean()
        if base is not None:
            panel.axhline(_value(family, base), color=BASE, ls=":", label="uncompressed")
        if family.chance is not None:
            panel.axhline(_value(family, family.chance), color=BASE, ls="--", lw=1, label="chance")
        panel.set_xlabel("fraction of channels removed")
    panels[0].set_ylabel(family.metric.heading)
    if family.found.methods["value"].min() >= 0:  # an interval may reach below what the metric can be
        panels[0].set_ylim(bottom=max(0.0, panels[0].get_ylim()[0]))
    return _finished(figure, panels)


def settings(family: Family) -> Figure | None:
    """Folded value, best pruning and uncompressed value by each setting, and the gap below; at the leading stage."""
    stage, ratio = family.shown
    table = family.found.at(stage, ratio)
    names = _telling(table, family.found.settings)
    if not names:
        return None
    figure = Figure(figsize=(0.6 + 2.6 * len(names), 4.6), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharey="row", height_ratios=[2, 1])
    for name, above, below in zip(names, *panels, strict=True):
        codes, levels = coded_levels(table[name])
        coded = table.with_columns(place=pl.Series(codes))
        for outcome, (color, title) in {**OUTCOMES, "gap": (GAP, "gap")}.items():
            line = over_recipes(coded, ["place"], outcome).sort("place")
            look = {"color": color, "label": title}
            _line(below if outcome == "gap" else above, family, line, "place", look, plain=outcome == "gap")
        below.axhline(0, color=BASE, lw=0.8)
        for panel in (above, below):
            panel.set_xticks(range(len(levels)), [] if panel is above else levels)
        below.set_xlabel(name)
    panels[0][0].set_ylabel(family.metric.heading)
    panels[1][0].set_ylabel("gap, points")
    figure.suptitle(f"{_title(stage)}, ratio {ratio:g}; mean of recipes, n = {table['recipe'].n_unique()}", fontsize=10)
    return _finished(figure, [panels[0][0]])


def _telling(table: pl.DataFrame, settings: Sequence[str]) -> list[str]:
    """Up to PANELS settings, those first over whose levels the folded mean ranges most; of settings that always change
    together one."""
    names = [name for name in design(table, settings, ["fold"]).settings if table[name].n_unique() <= LEVELS]
    means = {name: over_recipes(table, [name], "fold")["mean"] for name in names}
    ranges = {name: mean.max() - mean.min() for name, mean in means.items() if len(mean) > 1}
    return sorted(ranges, key=ranges.get, reverse=True)[:PANELS]


def forest(family: Family) -> Figure | None:
    """Effects by matched pairs with 95% intervals, a panel for each of the leading stages; filled: survives Holm."""
    _, ratio = family.shown
    found = {stage: family.effects(stage, ratio) for stage in _stages(family)}
    first = next(iter(found.values())).filter(pl.col("outcome") == "fold")
    order = first.sort(pl.col("effect").abs(), descending=True).head(ROWS)
    if order.is_empty():
        return None
    names = list(map(_comparison, order.iter_rows(named=True)))
    figure = Figure(figsize=(2.6 + 3.2 * len(found), 1.3 + 0.42 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (stage, table) in zip(panels, found.items(), strict=True):
        _forest(panel, table, names)
        panel.set_title(f"{_title(stage)}, ratio {ratio:g}", fontsize=9)
        panel.set_xlabel("change in points" if not family.metric.log else "change in % (100 ln)")
    labels = [f"{name}\n{n} pair{'s' * (n != 1)}" for name, n in zip(names, order["n"], strict=True)]
    panels[0].set_yticks(range(len(names)), labels, fontsize=8)
    panels[0].invert_yaxis()
    return _finished(figure, panels[:1])


def interacting(family: Family) -> Figure | None:
    """Folded value at the levels of the two settings that most surely interact, a panel for each leading stage.

    Surely: by the smallest p of the difference between the halves (see `interactions`) at the first of the stages.
    """
    stage, ratio = family.shown
    tested = interactions(family.found, stage, ratio).drop_nulls("p").filter(pl.col("n") >= SHOWN)
    surest = tested.sort("p", maintain_order=True)
    if surest.is_empty():
        return None
    line = surest.row(0, named=True)
    names, tables = (line["other"], line["setting"]), {name: family.found.at(name, ratio) for name in _stages(family)}
    levels = {name: coded_levels(pl.concat(t[name] for t in tables.values()))[1] for name in names}
    figure = Figure(figsize=(1.6 + 3.4 * len(tables), 1.8 + 0.5 * len(levels[names[1]])), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for panel, (name, table) in zip(panels, tables.items(), strict=True):
        image = _map(panel, family, table, levels)
        panel.set_title(f"{_title(name)}, ratio {ratio:g}; n = {table['recipe'].n_unique()} recipes", fontsize=9)
        figure.colorbar(image, ax=panel)
    panels[0].set_ylabel(names[1])
    sure = f"{line['difference']:+.1f} ± {line['half']:.1f} over {line['n']} quadruples, p {line['p_holm']:.2g} (Holm)"
    step = f"{line['setting']} {line['low']} to {line['high']} at {line['other']} {line['other_high']}"
    what = f"100 ln of folded {family.metric.title}" if family.metric.log else f"folded: {family.metric.heading}"
    figure.suptitle(f"{what}\n{step}, less at {line['other_low']}: {sure}", fontsize=9)
    return figure


def _map(panel: Axes, family: Family, table: pl.DataFrame, levels: dict[str, tuple[str, ...]]) -> Any:
    """Draw means over recipes, (levels of the second name, of the first), in points; each with its n."""
    across, down = levels
    grid = np.full((len(levels[down]), len(levels[across])), np.nan)
    for line in over_recipes(table, [across, down], "fold").iter_rows(named=True):
        y, x = levels[down].index(shown(line[down])), levels[across].index(shown(line[across]))
        grid[y, x] = line["mean"]
        text = f"{line['mean']:.{family.metric.digits}f}\nn {line['n']}"
        panel.text(x, y, text, ha="center", va="center", fontsize=7, color="white", path_effects=OUTLINE)
    panel.set_xticks(range(len(levels[across])), levels[across], fontsize=8)
    panel.set_yticks(range(len(levels[down])), levels[down], fontsize=8)
    panel.set_xlabel(across)
    up = family.metric.higher_is_better
    return panel.imshow(grid, cmap="cividis" if up else "cividis_r", origin="lower", aspect="auto")


def predicted(family: Family) -> Figure | None:
    """Folded value over what was foretold of each network whose recipe was held out; None where nothing was."""
    made = family.prediction
    if isinstance(made, str):
        return None
    of, said = drawn(made)
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    panel = figure.subplots()
    points = [[_value(family, v) for v in values] for values in (said.tolist(), made.cells["fold"].to_list())]
    panel.scatter(*points, color=FOLD, s=14, alpha=0.6, lw=0)
    ends = [min(map(min, points)), max(map(max, points))]
    panel.plot(ends, ends, color=BASE, ls=":", label="as foretold")
    panel.set_xlabel(f"foretold: {family.metric.heading}")
    panel.set_ylabel(f"folded: {family.metric.heading}")
    panel.grid(alpha=0.3)
    stage, ratio = family.shown
    scores = f"R² {of['r2']:.2f} ({of['r2_low']:.2f} to {of['r2_high']:.2f})"
    model = f"{of['model']} on {SETS[of['features']]}; {scores}; n = {of['n']} networks, {of['recipes']} recipes"
    panel.set_title(f"{_title(stage)}, ratio {ratio:g}\n{model}", fontsize=8)
    return _finished(figure, [panel])


def base_value(family: Family) -> Figure | None:
    """What folding leaves of each recipe over the value of its uncompressed network."""
    _, ratio = family.shown
    figure, panels = _panels(family)
    for panel, stage in zip(panels, _stages(family), strict=True):
        table = family.found.at(stage, ratio).group_by("recipe").agg(pl.col("base", "fold").mean()).drop_nulls()
        points = [[_value(family, v) for v in table[name]] for name in ("base", "fold")]
        panel.scatter(*points, color=FOLD, s=14, alpha=0.6, lw=0)
        if points[0]:
            ends = [min(map(min, points)), max(map(max, points))]
            panel.plot(ends, ends, color=BASE, ls=":", label="nothing lost")
        panel.set_xlabel(f"uncompressed: {family.metric.heading}")
        panel.set_title(f"{_title(stage)}, ratio {ratio:g}; n = {len(table)} recipes", fontsize=9)
    panels[0].set_ylabel(f"folded: {family.metric.heading}")
    return _finished(figure, panels[:1])


PAPERS: dict[str, Callable[[Family], Figure | None]] = {
    "curves": curves,
    "settings": settings,
    "effects": forest,
    "interactions": interacting,
    "prediction": predicted,
    "base": base_value,
}


def over_recipes(table: pl.DataFrame, by: Sequence[str], value: str) -> pl.DataFrame:
    """by, mean, half, n: seeds of a recipe are averaged first; half of the 95% interval, null below SHOWN recipes."""
    recipes = table.drop_nulls(value).group_by(*by, "recipe").agg(pl.col(value).mean())
    found = recipes.group_by(*by).agg(pl.col(value).mean().alias("mean"), pl.col(value).std().alias("sd"), n=pl.len())
    half = [shown_half(sd, n) for sd, n in found.select("sd", "n").iter_rows()]
    return found.with_columns(half=pl.Series(half, dtype=pl.Float64))


def _stages(family: Family) -> list[str]:
    """The two stages that lead."""
    return stages(family.found.methods["stage"].unique().to_list())[:2]


def _title(stage: str) -> str:
    return TITLES.get(stage, stage)


def _value(family: Family, points: float) -> float:
    return math.exp(points / 100) if family.metric.log else points


def _panels(family: Family, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    names = _stages(family)
    figure = Figure(figsize=(0.8 + 3.6 * len(names), 3.8), layout="constrained")
    panels = list(figure.subplots(1, len(names), sharey=sharey, squeeze=False)[0])
    for panel, stage in zip(panels, names, strict=True):
        recipes = family.found.methods.filter(pl.col("stage") == stage)["recipe"].n_unique()
        panel.set_title(f"{_title(stage)}; n = {recipes} recipes", fontsize=9)
        panel.grid(alpha=0.3)
        if family.metric.log:
            panel.set_yscale("log")
    return figure, panels


def _line(panel: Axes, family: Family, line: pl.DataFrame, x: str, look: dict[str, Any], plain: bool = False) -> None:
    """Means with error bars, on the scale of the metric; plain: in points."""
    scale = (lambda points: points) if plain else (lambda points: _value(family, points))
    means = np.array([scale(mean) for mean in line["mean"]])
    halves = line["half"].fill_null(0.0)
    below = [scale(mean) - scale(mean - half) for mean, half in zip(line["mean"], halves, strict=True)]
    above = [scale(mean + half) - scale(mean) for mean, half in zip(line["mean"], halves, strict=True)]
    panel.errorbar(line[x].to_numpy(), means, yerr=[below, above], marker="o", ms=3.5, lw=1.3, capsize=2, **look)
    if family.metric.log and not plain:
        panel.set_yscale("log")


def _forest(panel: Axes, table: pl.DataFrame, names: list[str]) -> None:
    for shift, (outcome, (color, marker, title)) in zip((-0.22, 0, 0.22), FOREST.items(), strict=True):
        for at, line in _placed(table.filter(pl.col("outcome") == outcome), names):
            sure = line["p_holm"] is not None and line["p_holm"] < 0.05 and line["n"] >= FEWEST
            panel.errorbar(
                line["effect"], at + shift, xerr=line["half"] or 0.0, color=color, marker=marker, ms=4.5, lw=1.1,
                capsize=2, mfc=color if sure else "white", label=title,
            )  # fmt: skip
    panel.axvline(0, color=BASE, lw=0.8)
    panel.grid(alpha=0.3, axis="x")


def _placed(table: pl.DataFrame, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line in table.iter_rows(named=True):
        if (name := _comparison(line)) in names:
            yield names.index(name), line


def _comparison(line: dict[str, Any]) -> str:
    """ "lr 0.01 to 0.1 if optim=sgd" """
    where = f" if {line['where']}" * bool(line["where"])
    return f"{line['setting']} {line['low']} to {line['high']}{where}"


def _finished(figure: Figure, panels: Sequence[Axes]) -> Figure:
    """The figure with one legend below, each label once."""
    labelled = [panel.get_legend_handles_labels() for panel in panels]
    handles = {label: handle for pair in labelled for handle, label in zip(*pair, strict=True)}
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
