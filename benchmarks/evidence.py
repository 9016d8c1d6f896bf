"""The first half of docs/accuracy.md: our own networks, which chose nothing, and published ones.

The lines are those of benchmarks.trained.

A recipe is a way to train and an architecture: seeds of one are averaged first, and every interval is over recipes
(Student's t), because networks of one recipe are not independent of each other. Differences are those of one network,
so a seed that was not measured by both methods is in no difference.
"""

from collections.abc import Sequence

import polars as pl

from benchmarks.common import line
from pipeline.study.intervals import SHOWN, half_interval

HALF = 0.5
RECIPE = ("model", "recipe")
IS_PUBLISHED = pl.col("recipe") == "published"
# What a line of the results says, in words; statistics by stage.
SEEN = {"none": "-", "synthetic": "512 synthetic", "data": "512"}
FOLLOW = {
    ("none", "raw"): "as trained",
    ("weights", "raw"): "from weights",
    ("synthetic", "raw"): "re-estimated, 512 synthetic",
    ("data", "raw"): "re-estimated, 512",
    ("data", "repaired"): "re-estimated, 1,024",
    ("data", "reset"): "set anew, 1,024",
}
FEWER = "+size=128"  # a method that sees so many
GRAIL = ("l1+grail", "repaired")  # what others are compared with: their data, and statistics re-estimated on it

# (method, stage) with the same information: 512 or fewer unlabelled pictures, and statistics that follow pictures.
EQUAL = [
    ("l1", "repaired"),
    ("fold", "repaired"),
    ("mix+synthetic+size=128", "repaired"),
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
    (("mix+synthetic", "repaired"), ("fold+grail", "repaired")),
    (("mix+synthetic", "repaired"), ("mix+synthetic+size=128", "repaired")),
    (("mix+data", "raw"), ("mix+synthetic", "repaired")),
    (("mix+data", "raw"), GRAIL),
    (("mix+data", "raw"), ("fold+grail", "repaired")),
    (("mix+data", "raw"), ("l1: grail, in sequence", "repaired")),
    (("mix+data", "raw"), ("channel pruning", "repaired")),
    (("mix+data", "raw"), ("channel pruning", "raw")),
    (("mix+data", "raw"), ("l1+data", "raw")),
    (("fold+data", "raw"), ("l1+data", "raw")),
]


def page(lines: pl.DataFrame) -> list[str]:
    found = whole(lines.filter(pl.col("draw") == 0))
    lines = lines.join(at(found, HALF), on=RECIPE, how="semi", maintain_order="left")
    parts = [
        [f"## Networks of {lines['dense'].min():.0f} to {lines['dense'].max():.0f}%", "", *networks(lines)],
        ["### Equal information, at half of the channels", "", EQUALLY, "", *stages(found, EQUAL)],
        ["### Points of difference", "", *duels(found)],
        ["### From GRAIL to ours, a part at a time", "", *ladder(found)],
        ["### Every stage, at half of the channels", "", *stages(found, every(found))],
        ["### Other ratios, repaired", "", *ratios(found)],
        ["### Repair by reset beside ours", "", *resets(found)],
        ["### Three draws of the calibration pictures", "", *draws(lines)],
    ]
    return [text for part in parts for text in (*part, "")][:-1]


def apart(found: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """{column: its recipes}: our own, which chose nothing, and each published network, which chose defaults."""
    published = found.filter(IS_PUBLISHED)
    parts = {model: of_model for (model,), of_model in published.partition_by("model", as_dict=True).items()}
    return {"our recipes": found.filter(~IS_PUBLISHED), **dict(sorted(parts.items()))}


def whole(found: pl.DataFrame) -> pl.DataFrame:
    """The recipes that have every line of a ratio: means of two methods are over the same recipes."""
    count = pl.struct("method", "stage").n_unique().over(*RECIPE, "ratio")
    return found.filter(count == count.max().over("ratio"))


def by_recipe(lines: pl.DataFrame) -> pl.Series:
    """acc of one method and stage, a number for each recipe: the mean over its seeds."""
    return lines.group_by(RECIPE, maintain_order=True).agg(pl.col("acc").mean())["acc"]


def networks(lines: pl.DataFrame) -> list[str]:
    alone = lines.unique("network", maintain_order=True).sort(IS_PUBLISHED, maintain_order=True)
    made = [
        f"{len(alone)} networks of {alone.select(RECIPE).n_unique()} recipes, all {lines['n'].max():,} test pictures. "
        "Those of our own recipes chose nothing: every default stood before they were trained, but for the number of "
        "synthetic pictures, which two other networks chose. On the published "
        "ResNet-20 and -32 defaults were chosen, so both, and the mean of our own, also stand by themselves.",
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


def stages(found: pl.DataFrame, shown: Sequence[tuple[str, str]]) -> list[str]:
    """One line for each method and stage: what it saw, its accuracy, and its lead over GRAIL."""
    parts = apart(found)
    columns = ["stage", "pictures it saw", "statistics", "accuracy", "over l1+grail", "recipes", *parts]
    made = [line("method", columns), "|---" * (1 + len(columns)) + "|"]
    for method, stage in shown:
        own = of(found, method, stage)
        if len(own):
            over = "-" if (method, stage) == GRAIL else signed(difference(found, (method, stage), GRAIL))
            facts = [stage, SEEN[own["pictures"][0]], FOLLOW[own["statistics"][0], stage]]
            if FEWER in method:
                facts = [text.replace("512 synthetic", "128 synthetic") for text in facts]
            accs = by_recipe(own)
            beside = [interval(by_recipe(of(part, method, stage))) for part in parts.values()]
            made.append(line(method, [*facts, interval(accs), over, str(len(accs)), *beside]))
    return made


def duels(found: pl.DataFrame) -> list[str]:
    parts = apart(found)
    made = [line("what", ["than what", "points", "better in", *parts]), "|---" * (4 + len(parts)) + "|"]
    for what, than in DUELS:
        won = difference(found, what, than)
        if len(won):
            beside = [signed(difference(part, what, than)) for part in parts.values()]
            wins = f"{(won > 0).sum()} of {len(won)} recipes"
            made.append(line(", ".join(what), [", ".join(than), signed(won), wins, *beside]))
    return made


def ladder(found: pl.DataFrame) -> list[str]:
    parts = apart(found)
    columns = ["what is new", "raw", "step", "repaired", "step", *(f"{name}, raw step" for name in parts)]
    made = [line("method", columns), "|---" * (1 + len(columns)) + "|"]
    before = ""
    for method, what in STEPS.items():
        if of(found, method, "raw").is_empty():
            continue
        cells = [what]
        for stage in ("raw", "repaired"):
            step = signed(difference(found, (method, stage), (before, stage)))
            cells += [interval(by_recipe(of(found, method, stage))), step]
        cells += [signed(difference(part, (method, "raw"), (before, "raw"))) for part in parts.values()]
        made.append(line(method, cells))
        # Both selections are compared with the solver on l1's channels, not with each other.
        before = method if method != "fold+data" else "l1+data"
    return made


def ratios(found: pl.DataFrame) -> list[str]:
    there = sorted(found["ratio"].unique())
    parts = {"all": found, **apart(found)}
    columns = [f"{name} {ratio:g}" for name in parts for ratio in there]
    made = [line("ratio removed", columns), "|---" * (1 + len(columns)) + "|"]
    for method in found.filter(pl.col("ratio") != HALF)["method"].unique(maintain_order=True):
        cells = [interval(by_recipe(of(part, method, "repaired", r))) for part in parts.values() for r in there]
        made.append(line(method, cells))
    return made


def resets(found: pl.DataFrame) -> list[str]:
    parts = apart(found)
    made = [
        "Reset: statistics are those of the 1,024 pictures (REPAIR, arXiv:2211.08403). Ours: they change by as much as "
        "compression changed them. Points that ours wins:",
        "",
        line("method", ["reset", "ours", "points", *parts]),
        "|---" * (4 + len(parts)) + "|",
    ]
    for method in found.filter(pl.col("stage") == "reset")["method"].unique(maintain_order=True):
        pair = (method, "repaired"), (method, "reset")
        cells = [interval(by_recipe(of(found, method, stage))) for stage in ("reset", "repaired")]
        made.append(line(method, [*cells, *(signed(difference(part, *pair)) for part in (found, *parts.values()))]))
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


def of(lines: pl.DataFrame, method: str, stage: str, ratio: float = HALF) -> pl.DataFrame:
    return at(lines, ratio).filter(pl.col("method") == method, pl.col("stage") == stage)


def difference(lines: pl.DataFrame, what: tuple[str, str], than: tuple[str, str]) -> pl.Series:
    """Points of difference at half of the channels, for each recipe: the mean over its networks that have both."""
    both = of(lines, *what).join(of(lines, *than), on="network", suffix="_than")
    return by_recipe(both.with_columns(acc=pl.col("acc") - pl.col("acc_than")))


def interval(values: pl.Series) -> str:
    return f"{values.mean():.1f}" + margin(values) if len(values) else "-"


def signed(values: pl.Series) -> str:
    return f"{values.mean():+.1f}" + margin(values) if len(values) else "-"


def margin(values: pl.Series) -> str:
    """ " ± half of the 95% interval", or nothing for fewer than three values."""
    return f" ± {half_interval(values.std(), len(values)):.1f}" if len(values) >= SHOWN else ""
