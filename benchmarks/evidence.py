"""The part of docs/accuracy.md on well-trained networks, from the lines of benchmarks.trained.

A recipe is a way to train and an architecture: seeds of one are averaged first, and every interval is over recipes
(Student's t), because networks of one recipe are not independent of each other.
"""

from collections.abc import Sequence

import polars as pl

from benchmarks.common import line
from pipeline.study.summary import half_interval

HALF = 0.5
RECIPE = ("model", "recipe")
IS_PUBLISHED = pl.col("recipe") == "published"
# What a line of the results says, in words; statistics by stage.
SEEN = {"none": "-", "synthetic": "128 synthetic", "data": "512"}
FOLLOW = {
    ("none", "raw"): "as trained",
    ("weights", "raw"): "from weights",
    ("synthetic", "raw"): "re-estimated, 128 synthetic",
    ("data", "raw"): "re-estimated, 512",
    ("data", "repaired"): "re-estimated, 1,024",
    ("data", "reset"): "set anew, 1,024",
}
GRAIL = ("l1+grail", "repaired")  # what others are compared with: their data, and statistics re-estimated on it

# (method, stage) with the same information: 512 or fewer unlabelled pictures, and statistics that follow pictures.
EQUAL = [
    ("l1", "repaired"),
    ("fold", "repaired"),
    ("mix+synthetic", "repaired"),
    ("l1+grail", "repaired"),
    ("fold+grail", "repaired"),
    ("l1: grail, in sequence", "repaired"),
    ("channel pruning", "raw"),
    ("channel pruning", "repaired"),
    ("l1+data", "raw"),
    ("fold+data", "raw"),
    ("mix+data", "raw"),
]
# One part more in every line, on the channels that l1 keeps; the last two choose the channels anew.
STEPS = {
    "l1+grail": "GRAIL as its code for pictures does it",
    "l1: grail, in sequence": "order: each layer on what reaches it now",
    "l1: + errors mended": "solved for the dense network's output",
    "l1: + taps": "every tap of a kernel by itself",
    "l1+data": "statistics updated on the way",
    "fold+data": "selection: fold",
    "mix+data": "selection: mix",
}
# Differences that a reader asks for: (what, than what).
DUELS = [
    (("fold", "repaired"), ("l1", "repaired")),
    (("mix+synthetic", "raw"), ("fold", "repaired")),
    (("mix+synthetic", "repaired"), GRAIL),
    (("mix+data", "raw"), GRAIL),
    (("mix+data", "raw"), ("fold+grail", "repaired")),
    (("mix+data", "raw"), ("l1: grail, in sequence", "repaired")),
    (("mix+data", "raw"), ("channel pruning", "repaired")),
    (("mix+data", "raw"), ("channel pruning", "raw")),
    (("mix+data", "raw"), ("l1+data", "raw")),
    (("fold+data", "raw"), ("l1+data", "raw")),
]


def page(lines: pl.DataFrame) -> list[str]:
    found = by_recipe(lines.filter(pl.col("draw") == 0))
    ours, published = (found.filter(mask) for mask in (~IS_PUBLISHED, IS_PUBLISHED))
    parts = [
        ["## Well-trained networks", "", *networks(lines)],
        ["### Equal information, at half of the channels", "", EQUALLY, "", *stages(ours, published, EQUAL)],
        ["### Points of difference", "", *duels(ours, published)],
        ["### From GRAIL to ours, a part at a time", "", *ladder(ours, published)],
        ["### Every stage, at half of the channels", "", *stages(ours, published, every(found))],
        ["### Other ratios, repaired", "", *ratios(ours, published)],
        ["### Repair by reset beside ours", "", *resets(ours, published)],
        ["### Three draws of the calibration pictures", "", *draws(lines)],
    ]
    return [text for part in parts for text in (*part, "")][:-1]


def by_recipe(lines: pl.DataFrame) -> pl.DataFrame:
    """One line for each recipe, method, stage and ratio: the mean over its seeds, in per cent."""
    keys = [*RECIPE, "method", "stage", "ratio", "pictures", "statistics"]
    return lines.group_by(keys, maintain_order=True).agg(pl.col("acc").mean(), pl.col("dense").mean())


def networks(lines: pl.DataFrame) -> list[str]:
    alone = lines.unique("network", maintain_order=True).sort(IS_PUBLISHED, maintain_order=True)
    made = [
        f"{len(alone)} networks, all {lines['n'].max():,} test pictures. Those of our own recipes chose nothing: every "
        "default stood before they were trained. ResNet-20 and -32 are published ones, on which defaults were chosen, "
        "and so stand in columns of their own, outside of every mean and interval.",
        "",
        line("network", ["recipe", "dense accuracy of its seeds"]),
        "|---|---|---|",
    ]
    for (model, recipe), own in alone.partition_by(*RECIPE, as_dict=True, maintain_order=True).items():
        made.append(line(model, [recipe, ", ".join(f"{acc:.2f}" for acc in own["dense"])]))
    return made


EQUALLY = (
    "Statistics of BatchNorm are re-estimated in every line but one, channel pruning as its paper has it, so that what "
    "differs is the channels and the weights. Accuracy in %, and points over l1+grail, repaired; ± half of a 95% "
    "interval over recipes."
)


def every(found: pl.DataFrame) -> list[tuple[str, str]]:
    """(method, stage) of all that was measured at half of the channels."""
    return list(at(found, HALF).select("method", "stage").unique(maintain_order=True).iter_rows())


def stages(ours: pl.DataFrame, published: pl.DataFrame, shown: Sequence[tuple[str, str]]) -> list[str]:
    """One line for each method and stage: what it saw, its accuracy, and its lead over GRAIL."""
    names = list(published["model"].unique(maintain_order=True))
    columns = ["stage", "pictures it saw", "statistics", "accuracy", "over l1+grail", "recipes", *names]
    made = [line("method", columns), "|---" * (1 + len(columns)) + "|"]
    for method, stage in shown:
        own = of(ours, method, stage)
        if own.is_empty():
            continue
        over = "-" if (method, stage) == GRAIL else signed(difference(ours, (method, stage), GRAIL))
        facts = [stage, SEEN[own["pictures"][0]], FOLLOW[own["statistics"][0], stage]]
        beside = [shown_beside(of(published, method, stage), name) for name in names]
        made.append(line(method, [*facts, interval(own["acc"]), over, str(len(own)), *beside]))
    return made


def shown_beside(there: pl.DataFrame, model: str) -> str:
    own = there.filter(pl.col("model") == model)["acc"]
    return f"{own[0]:.1f}" if len(own) else "-"


def duels(ours: pl.DataFrame, published: pl.DataFrame) -> list[str]:
    names = list(published["model"].unique(maintain_order=True))
    made = [line("what", ["than what", "points", "better in", *names]), "|---" * (4 + len(names)) + "|"]
    for what, than in DUELS:
        found = difference(ours, what, than)
        if len(found):
            wins = f"{(found > 0).sum()} of {len(found)} recipes"
            beside = [difference(published.filter(pl.col("model") == name), what, than) for name in names]
            cells = [", ".join(than), signed(found), wins, *(signed(one) if len(one) else "-" for one in beside)]
            made.append(line(", ".join(what), cells))
    return made


def ladder(ours: pl.DataFrame, published: pl.DataFrame) -> list[str]:
    names = list(published["model"].unique(maintain_order=True))
    columns = ["what is new", "raw", "step", "repaired", "step", *(f"{name}, raw" for name in names)]
    made = [line("method", columns), "|---" * (1 + len(columns)) + "|"]
    before = None
    for method, what in STEPS.items():
        if of(ours, method, "repaired").is_empty():
            continue
        cells = [what]
        for stage in ("raw", "repaired"):
            step = "-" if before is None else signed(difference(ours, (method, stage), (before, stage)))
            cells += [interval(of(ours, method, stage)["acc"]), step]
        made.append(line(method, [*cells, *(shown_beside(of(published, method, "raw"), name) for name in names)]))
        # Both selections are compared with the solver on l1's channels, not with each other.
        before = method if method != "fold+data" else "l1+data"
    return made


def ratios(ours: pl.DataFrame, published: pl.DataFrame) -> list[str]:
    there = sorted(ours["ratio"].unique())
    names = list(published["model"].unique(maintain_order=True))
    columns = [*(f"{ratio:g}" for ratio in there), *(f"{name} {ratio:g}" for name in names for ratio in there)]
    made = [line("ratio removed", columns), "|---" * (1 + len(columns)) + "|"]
    for method in ours.filter(pl.col("ratio") != HALF)["method"].unique(maintain_order=True):
        cells = [interval(of(ours, method, "repaired", ratio)["acc"]) for ratio in there]
        cells += [shown_beside(of(published, method, "repaired", ratio), name) for name in names for ratio in there]
        made.append(line(method, cells))
    return made


def resets(ours: pl.DataFrame, published: pl.DataFrame) -> list[str]:
    names = list(published["model"].unique(maintain_order=True))
    made = [
        "Reset: statistics are those of the 1,024 pictures (REPAIR, arXiv:2211.08403). Ours: they change by as much as "
        "compression changed them. Points that ours wins:",
        "",
        line("method", ["reset", "ours", "points", *names]),
        "|---" * (4 + len(names)) + "|",
    ]
    for method in ours.filter(pl.col("stage") == "reset")["method"].unique(maintain_order=True):
        pair = (method, "repaired"), (method, "reset")
        cells = [interval(of(ours, method, stage)["acc"]) for stage in ("reset", "repaired")]
        beside = [difference(published.filter(pl.col("model") == name), *pair) for name in names]
        won = [signed(difference(ours, *pair)), *(signed(one) if len(one) else "-" for one in beside)]
        made.append(line(method, [*cells, *won]))
    return made


def draws(lines: pl.DataFrame) -> list[str]:
    """The spread over draws of one network: pooled standard deviation, over the networks that have several draws."""
    half = at(lines, HALF)
    spread = half.group_by("method", "stage", "network", maintain_order=True).agg(pl.col("acc").var(), n=pl.len())
    spread = spread.filter(pl.col("n") > 2)
    made = [
        "Standard deviation of one network's accuracy over draws (seeds of the training pictures, or of the synthetic "
        "ones), pooled over networks.",
        "",
        line("method", ["raw", "repaired", "networks"]),
        "|---|---|---|---|",
    ]
    for (method,), own in spread.partition_by("method", as_dict=True, maintain_order=True).items():
        by_stage = {stage: of_stage["acc"].mean() ** 0.5 for (stage,), of_stage in own.group_by("stage")}
        cells = [f"{by_stage[stage]:.2f}" for stage in ("raw", "repaired")]
        made.append(line(method, [*cells, str(own["network"].n_unique())]))
    return made


def at(table: pl.DataFrame, ratio: float) -> pl.DataFrame:
    return table.filter((pl.col("ratio") - ratio).abs() < 1e-9)


def of(recipes: pl.DataFrame, method: str, stage: str, ratio: float = HALF) -> pl.DataFrame:
    return at(recipes, ratio).filter(pl.col("method") == method, pl.col("stage") == stage)


def difference(recipes: pl.DataFrame, what: tuple[str, str], than: tuple[str, str]) -> pl.Series:
    """Points of difference at half of the channels, one for each recipe that has both."""
    both = of(recipes, *what).join(of(recipes, *than), on=RECIPE, suffix="_than")
    return both["acc"] - both["acc_than"]


def interval(values: pl.Series) -> str:
    return f"{values.mean():.1f}" + margin(values)


def signed(values: pl.Series) -> str:
    return f"{values.mean():+.1f}" + margin(values)


def margin(values: pl.Series) -> str:
    """ " ± half of the 95% interval", or nothing for fewer than three values."""
    return f" ± {half_interval(values.std(), len(values)):.1f}" if len(values) > 2 else ""
