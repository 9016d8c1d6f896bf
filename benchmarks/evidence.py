"""The part of docs/accuracy.md on well-trained networks, from the lines of benchmarks.trained.

A recipe is a way to train and an architecture: seeds of one are averaged first, and every interval is over recipes
(Student's t), because networks of one recipe are not independent of each other.
"""

import polars as pl

from benchmarks.common import line
from pipeline.study.summary import half_interval

HALF = 0.5
RECIPE = ("model", "recipe")
GRAIL = ("l1+grail", "repaired")  # what others are compared with: their data, and statistics re-estimated on it

# (method, stage) with the same information: 512 or fewer unlabelled pictures, and statistics that follow pictures.
EQUAL = [
    ("l1", "repaired"),
    ("fold", "repaired"),
    ("mix+synthetic", "repaired"),
    ("l1+grail", "repaired"),
    ("fold+grail", "repaired"),
    ("l1: grail, in sequence", "repaired"),
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
    (("mix+data", "raw"), ("l1+data", "raw")),
]


def page(lines: pl.DataFrame) -> list[str]:
    first = lines.filter(pl.col("draw") == 0)
    recipes = by_recipe(first)
    parts = [
        ["## Well-trained networks", "", *networks(lines)],
        ["### Equal information, at half of the channels", "", *equal(recipes)],
        ["### Points of difference", "", *duels(recipes)],
        ["### From GRAIL to ours, a part at a time", "", *ladder(recipes)],
        ["### Every stage, at half of the channels", "", *every(recipes)],
        ["### Other ratios, repaired", "", *ratios(recipes)],
        ["### Repair by reset beside ours", "", *resets(recipes)],
        ["### Three draws of the calibration pictures", "", *draws(lines)],
    ]
    return [text for part in parts for text in (*part, "")][:-1]


def by_recipe(lines: pl.DataFrame) -> pl.DataFrame:
    """One line for each recipe, method, stage and ratio: the mean over its seeds, in per cent."""
    keys = [*RECIPE, "method", "stage", "ratio", "pictures", "statistics"]
    return lines.group_by(keys, maintain_order=True).agg(pl.col("acc").mean(), pl.col("dense").mean())


def networks(lines: pl.DataFrame) -> list[str]:
    alone = lines.unique("network", maintain_order=True)
    made = [
        f"{len(alone)} networks of {alone.select(RECIPE).n_unique()} recipes, all {lines['n'].max():,} test pictures. "
        "None of them chose a default, a method or an option.",
        "",
        line("network", ["recipe", "dense accuracy of its seeds"]),
        "|---|---|---|",
    ]
    for (model, recipe), own in alone.partition_by(*RECIPE, as_dict=True, maintain_order=True).items():
        made.append(line(model, [recipe, ", ".join(f"{acc:.2f}" for acc in own["dense"])]))
    return made


def equal(recipes: pl.DataFrame) -> list[str]:
    made = [
        "Statistics of BatchNorm are re-estimated in every line, so that what differs is the channels and the weights. "
        f"Accuracy in %, and points over {' '.join(GRAIL)}; ± half of a 95% interval over recipes.",
        "",
        line("method", ["stage", "pictures it saw", "statistics", "accuracy", "over l1+grail", "recipes"]),
        "|---" * 7 + "|",
    ]
    return made + [stage_line(recipes, method, stage) for method, stage in EQUAL if has(recipes, method, stage)]


def every(recipes: pl.DataFrame) -> list[str]:
    half = at(recipes, HALF)
    made = [
        line("method", ["stage", "pictures it saw", "statistics", "accuracy", "over l1+grail repaired", "recipes"]),
        "|---" * 7 + "|",
    ]
    pairs = half.select("method", "stage").unique(maintain_order=True)
    return made + [stage_line(recipes, method, stage) for method, stage in pairs.iter_rows()]


def stage_line(recipes: pl.DataFrame, method: str, stage: str) -> str:
    own = of(recipes, method, stage)
    seen = {"none": "-", "synthetic": "128 synthetic", "data": "512"}[own["pictures"][0]]
    follow = {"none": "as trained", "weights": "from weights", "synthetic": "re-estimated, synthetic"}
    follow |= {"data": "re-estimated, 512" if stage == "raw" else "re-estimated, 1,024"}
    over = "-" if (method, stage) == GRAIL else signed(difference(recipes, (method, stage), GRAIL))
    cells = [stage, seen, follow[own["statistics"][0]], interval(own["acc"]), over, str(len(own))]
    return line(method, cells)


def duels(recipes: pl.DataFrame) -> list[str]:
    made = [line("what", ["than what", "points", "better in"]), "|---|---|---|---|"]
    for what, than in DUELS:
        if has(recipes, *what) and has(recipes, *than):
            found = difference(recipes, what, than)
            wins = f"{(found > 0).sum()} of {len(found)} recipes"
            made.append(line(", ".join(what), [", ".join(than), signed(found), wins]))
    return made


def ladder(recipes: pl.DataFrame) -> list[str]:
    made = [line("method", ["what is new", "raw", "step", "repaired", "step"]), "|---" * 6 + "|"]
    before = None
    for method, what in STEPS.items():
        if not has(recipes, method, "repaired"):
            continue
        cells = [what]
        for stage in ("raw", "repaired"):
            step = "-" if before is None else signed(difference(recipes, (method, stage), (before, stage)))
            cells += [interval(of(recipes, method, stage)["acc"]), step]
        made.append(line(method, cells))
        # Both selections are compared with the solver on l1's channels, not with each other.
        before = method if method != "fold+data" else "l1+data"
    return made


def ratios(recipes: pl.DataFrame) -> list[str]:
    there = sorted(recipes["ratio"].unique())
    few = recipes.filter(pl.col("ratio") != HALF)["method"].unique(maintain_order=True)
    made = [line("ratio removed", [f"{ratio:g}" for ratio in there]), "|---" * (1 + len(there)) + "|"]
    for method in few:
        made.append(line(method, [interval(of(recipes, method, "repaired", ratio)["acc"]) for ratio in there]))
    return made


def resets(recipes: pl.DataFrame) -> list[str]:
    reset = recipes.filter(pl.col("stage") == "reset")["method"].unique(maintain_order=True)
    made = [
        "Reset: statistics are those of the 1,024 pictures (REPAIR, arXiv:2211.08403). Ours: they change by as much as "
        "compression changed them.",
        "",
        line("method", ["reset", "ours", "points that ours wins"]),
        "|---|---|---|---|",
    ]
    for method in reset:
        cells = [interval(of(recipes, method, stage)["acc"]) for stage in ("reset", "repaired")]
        made.append(line(method, [*cells, signed(difference(recipes, (method, "repaired"), (method, "reset")))]))
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


def has(recipes: pl.DataFrame, method: str, stage: str) -> bool:
    return not of(recipes, method, stage).is_empty()


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
