"""The answer of a whole sweep, in at most ten plain sentences."""

import numpy as np
import polars as pl
from scipy.stats import pearsonr

from pipeline.metrics import Metric
from pipeline.study.claims import FEWEST, Claim, noise_sentence, weighed
from pipeline.study.effects import effects
from pipeline.study.interactions import interactions
from pipeline.study.intervals import SHOWN, summary
from pipeline.study.lines import Lines
from pipeline.study.matching import BOTH, OUTCOMES
from pipeline.study.noise import noise
from pipeline.study.summary import HEADLINE_RATIO, HEADLINE_STAGES
from pipeline.study.words import STAGES, amount, named, outcome_name, place, signed

MOST = 10
LITTLE = 0.5  # a correlation that explains less than a quarter of the variance


def answer(found: Lines) -> list[str]:
    """What was measured, what folding leaves, the noise, what the settings do (the largest first), what is not settled.

    Over the headline's stage (the first of HEADLINE_STAGES that most networks have) and the ratio nearest to
    HEADLINE_RATIO. Each sentence on an effect is one of `claims`, with the same bound on false ones.
    """
    stage, ratio = headline_place(found)
    table = found.at(stage, ratio)
    if table.is_empty():
        several = found.methods["cell"].n_unique()
        counted = "1 network was" if several == 1 else f"{several:,} networks were"
        return [
            f"{counted} measured, and none by plain folding or pruning, by which recipes are compared; add fold, l1."
        ]
    heard = noise(found, stage, ratio)
    seeds = (
        "No recipe has two seeds, so that the noise of a single network is unknown."
        if heard is None
        else noise_sentence(heard, found.metric)
    )
    told = [_measured(found, table), _left(found, stage, ratio), seeds, _related(table, found.metric)]
    table_of_effects = effects(found, stage, ratio)
    weighted = weighed(table_of_effects, interactions(found, stage, ratio), found.metric)
    rest = _unsettled(table_of_effects, weighted, found)
    told = [sentence for sentence in told if sentence]
    return [*told, *(claim.text for claim in telling(weighted, MOST - len(told) - len(rest))), *rest]


def headline_place(found: Lines) -> tuple[str, float | None]:
    """(stage, ratio) of the headline: the first of HEADLINE_STAGES that at least half of the networks have."""
    counts = dict(found.table.group_by("stage").agg(pl.col("cell").n_unique()).drop_nulls().iter_rows())
    half = max(counts.values(), default=0) / 2
    stage = next((name for name in (*HEADLINE_STAGES, *counts) if counts.get(name, -1) >= half), HEADLINE_STAGES[0])
    ratios = found.table.filter(pl.col("stage") == stage)["ratio"].drop_nulls().unique().sort().to_list()
    # Rounded, so that 0.4 and 0.6 are equally near, whatever their last bits.
    return stage, min(ratios, key=lambda ratio: round(abs(ratio - HEADLINE_RATIO), 9), default=None)


def telling(found: list[Claim], room: int = MOST) -> list[Claim]:
    """Sure claims, at most `room`: the largest of each topic, which is a setting's effect on the headline, and one more
    where its sign is another; then the largest interaction and the largest effect on the gap, which have a place each.
    """
    sure = sorted((claim for claim in found if claim.sure), key=lambda claim: -claim.size)
    second = [next((c for c in sure if c.kind == "interaction"), None), next((c for c in sure if _on_gap(c)), None)]
    second = [claim for claim in second if claim is not None]
    kept: list[Claim] = []
    for claim in (claim for claim in sure if claim.kind != "interaction" and not _on_gap(claim)):
        before = [k for k in kept if k.setting == claim.setting]
        if not before or not claim.signs <= frozenset().union(*(k.signs for k in before)):
            kept.append(claim)
    return [*kept[: max(room - len(second), 0)], *second][:room]


def _on_gap(claim: Claim) -> bool:
    return claim.outcome == "gap"


def _measured(found: Lines, table: pl.DataFrame) -> str:
    recipes = table["recipe"].n_unique()
    settings = f"; they differ in {', '.join(found.settings)}" if found.settings else ""
    lost = table.filter(pl.col("cell").is_in(found.blind))["cell"].n_unique()
    if len(table) == 1:
        return "One network was measured" + (", which is no better than chance uncompressed." if lost else ".")
    counted = f"{len(table):,} networks of {recipes:,} recipe{'s' * (recipes != 1)} were measured{settings}."
    if not lost:
        return counted
    are = "is" if lost == 1 else "are"
    return f"{counted} {lost:,} of them {are} no better than chance uncompressed, and in every mean."


def _left(found: Lines, stage: str, ratio: float | None) -> str:
    """What folding leaves, and whether it leads, over recipes; the other stage beside it."""
    metric = found.metric
    here = _means(found.at(stage, ratio))
    if "fold" not in here:
        return ""
    text = f"Folding {place(stage, ratio)} leaves {_value(here['fold'], metric)}"
    beside = [f"uncompressed {_value(here['base'], metric)}"] if "base" in here else []
    others = {name: _means(found.at(name, ratio)) for name in BOTH if name != stage}
    beside += [f"{STAGES[name]} {_value(means['fold'], metric)}" for name, means in others.items() if "fold" in means]
    text += f" ({'; '.join(beside)})" if beside else ""
    if "gap" not in here:
        return f"{text}, over {(n := here['fold'][2]):,} recipe{'s' * (n != 1)}."
    lead, half, n, wins = here["gap"]
    if half is None:
        few = f"{n} recipe{'s' * (n != 1)}, too few for an interval"
        return f"{text}, and {signed(lead, None, metric)} against the best pruning (over {few})."
    also = [f"; {STAGES[name]} {signed(*means['gap'][:2], metric)}" for name, means in others.items() if "gap" in means]
    tie = abs(lead) <= half
    verb = "neither leads nor trails" if tie else "leads" if lead > 0 else "trails"
    by = signed(lead, half, metric) if tie else amount(abs(lead), half, metric)
    return f"{text}, and {verb} the best pruning by {by} over {n:,} recipes (ahead in {wins:.0%}{''.join(also)})."


def _means(table: pl.DataFrame) -> dict[str, tuple[float, float | None, int, float]]:
    """{outcome: (mean, half of its 95% interval from SHOWN recipes on, recipes, share above 0)}, seeds averaged."""
    recipes = table.group_by("recipe").agg(pl.col(OUTCOMES).mean()).select(OUTCOMES)
    values = recipes.cast(pl.Float64).fill_null(np.nan).to_numpy()
    every = summary(values)
    return {
        name: (float(every.mean[i]), float(every.half[i]) if every.n[i] >= SHOWN else None, int(every.n[i]), above)
        for i, (name, above) in enumerate(zip(OUTCOMES, (values > 0).sum(0) / np.maximum(every.n, 1), strict=True))
        if every.n[i]
    }


def _value(mean: tuple[float, float | None, int, float], metric: Metric) -> str:
    """ "61.7 ± 1.2%"; the geometric mean and its interval on a log axis."""
    value, half = mean[:2]
    if metric.log:
        ends = [value] if half is None else [value, value - half, value + half]
        texts = [metric.number(float(np.exp(end / 100))) for end in ends]
        return texts[0] if half is None else f"{texts[0]} ({texts[1]} to {texts[2]})"
    spread = "" if half is None else f" ± {half:.{metric.digits}f}"
    return f"{value:.{metric.digits}f}{spread}{metric.unit}"


def _related(table: pl.DataFrame, metric: Metric) -> str:
    """How far the gap goes with what folding leaves, over recipes (Pearson's r, Fisher's interval)."""
    both = table.group_by("recipe").agg(pl.col("fold", "gap").mean()).drop_nulls(["fold", "gap"])
    if len(both) < FEWEST or both["fold"].n_unique() < 2 or both["gap"].n_unique() < 2:
        return ""
    found = pearsonr(both["fold"], both["gap"])
    low, high = found.confidence_interval()
    little = max(abs(low), abs(high)) < LITTLE
    return (
        f"The lead of folding over the best pruning and {outcome_name('fold', metric)} correlate by "
        f"{found.statistic:.2f} ({low:.2f} to {high:.2f}) over {len(both):,} recipes"
        f"{', so that the lead says little about what is left' if little else ''}."
    )


def _unsettled(table: pl.DataFrame, weighted: list[Claim], found: Lines) -> list[str]:
    """One sentence on the settings of which nothing is sure, with their intervals."""
    if table.is_empty():
        return ["No two recipes differ in one setting alone, so that nothing is said of any setting's effect."]
    sure = {claim.setting for claim in weighted if claim.sure and claim.outcome == "fold"}
    open_ = table.filter((pl.col("outcome") == "fold") & ~pl.col("setting").is_in(list(sure)))
    widest = open_.join(  # the first level with the last, in all its halves
        open_.unique("setting", keep="last", maintain_order=True).select("setting", "low", "high"),
        on=["setting", "low", "high"],
        how="semi",
        maintain_order="left",
    )
    parts = [
        f"{named(line)} {signed(line['effect'], line['half'], found.metric)} ({line['n']} pairs)"
        if line["n"] >= FEWEST
        else f"{named(line)} (n too small: {line['n']} pair{'s' * (line['n'] != 1)})"
        for line in widest.to_dicts()
    ]
    return [f"Not settled: {', '.join(parts)}."] if parts else []
