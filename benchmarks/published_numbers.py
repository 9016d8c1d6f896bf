"""What the page on the published study states, as numbers with their intervals and n (see benchmarks.published_study).

Prose cannot outlive its numbers: `rises`, `falls` and `level` write a number into a sentence only while its interval
says so, and stop the page otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import fisher_exact, pearsonr, spearmanr

from pipeline.study.effects import pairs
from pipeline.study.intervals import summary
from pipeline.study.lines import Lines
from pipeline.study.published import FAMILIES
from pipeline.study.sweep import Sweep

TITLES = {
    "resnet18-adam": "ResNet18, Adam",
    "resnet18-sgd": "ResNet18, SGD",
    "preactresnet18": "PreActResNet18",
    "vit": "SimpleViT, base ≥ 50%",
    "clip": "CLIP ViT-B/32",
}
ADAM, SGD, PREACT, VIT, CLIP = TITLES
NAMES = {
    "lr": "rate",
    "momentum": "momentum",
    "weight_decay": "decay",
    "l1": "L1",
    "rho": "SAM rho",
    "schedule": "schedule",
    "augment": "RandAugment",
}
SMALL, LARGE = "llama_60m", "llama_130m"
STAGES = ("raw", "repaired", "tuned", "tuned 5 epochs")


@dataclass
class Study:
    """found: the lines of each family; extras: see published.extras; llama: lines in points, 100 ln(perplexity)

    sweeps: of each family, as read; told: what the reader said was left out; predicted: see prediction.predictions
    """

    found: dict[str, Lines] = field(default_factory=dict)
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    extras: pl.DataFrame = field(default_factory=pl.DataFrame)
    llama: Lines | None = None
    predicted: dict[str, pl.DataFrame] = field(default_factory=dict)


REPAIRED = {"vit": "norm_tuned", "clip": "norm_tuned"}  # what follows the compression; "repaired" for all others
HALF = 0.5
LEARNT = 50.0  # %: below, a SimpleViT had not learnt, and nothing is left to lose


@dataclass(frozen=True)
class Mean:
    """A mean in points, half of its 95% interval (Student's t), over n; wins: share of the values above 0."""

    value: float
    half: float
    n: int
    wins: float

    @property
    def short(self) -> str:
        return f"{self.value:+.1f} ± {self.half:.1f}"

    def text(self, of: str) -> str:
        """ "+8.3 ± 1.7 points (184 networks)" """
        return f"{self.short} points ({self.n} {of})"


def mean(values: pl.Series | np.ndarray) -> Mean:
    found = np.asarray(values, np.float64)
    found = found[~np.isnan(found)]
    every = summary(found[:, None])
    return Mean(float(every.mean[0]), float(every.half[0]), len(found), float((found > 0).mean()))


def rises(found: Mean, of: str = "pairs") -> str:
    assert found.value > found.half, f"the page says that this is above 0: {found}"
    return found.text(of)


def falls(found: Mean, of: str = "pairs") -> str:
    assert found.value < -found.half, f"the page says that this is below 0: {found}"
    return found.text(of)


def level(found: Mean, of: str = "pairs") -> str:
    assert abs(found.value) <= found.half, f"the page says that this is not told from 0: {found}"
    return found.text(of)


def said(found: Mean, of: str = "pairs") -> str:
    """A number that the sentence takes no side on."""
    return found.text(of)


def last(family: str) -> str:
    """The stage that REPAIR of this family is."""
    return REPAIRED.get(family, "repaired")


def networks(found: Lines, family: str, stage: str, ratio: float | None = HALF) -> pl.DataFrame:
    """The networks of one stage and ratio that have both sides; of SimpleViTs, those that had learnt."""
    table = found.at(stage, ratio).drop_nulls("gap")
    return table.filter(pl.col("base") >= LEARNT) if family == "vit" else table


def step(
    found: Lines, stage: str, setting: str, low: object, high: object, outcome: str = "fold", **where: object
) -> Mean:
    """A matched effect at HALF, `high` less `low`: networks that differ in `setting` alone; where: levels of others.

    outcome: fold, prune (the better one), base or gap
    """
    table = found.at(stage, HALF)
    for name, value in where.items():
        table = table.filter(pl.col(name) == value)
    if outcome == "prune":
        table, outcome = table.with_columns(fold="prune"), "fold"
    return mean(pairs(table, setting, found.settings, low, high)[outcome])


def named(line: dict[str, Any]) -> str:
    """A line of `effects`: "SAM rho 0 to 0.1", with the levels of the setting over which its sign changes."""
    change = "off to on" if line["setting"] == "augment" else f"{line['low']} to {line['high']}"
    where = f" ({line['where'].replace('lr=', 'rate ').replace('=', ' ')})" if line["over"] else ""
    return f"{NAMES[line['setting']]} {change}{where}"


def factor(found: Mean, sign: int) -> str:
    """A gap of language models as a ratio of perplexities, pruned to folded: "0.58 (0.49 to 0.69)".

    sign: what the sentence says of it: 1 folding has the lower one, -1 pruning has, 0 not told
    """
    {1: rises, -1: falls, 0: level}[sign](found)
    value, low, high = (np.exp((found.value + end * found.half) / 100) for end in (0, -1, 1))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def ranked(table: pl.DataFrame, x: str, y: str) -> str:
    """Rank correlation and its 95% interval: Fisher's z with the error of Fieller et al., Biometrika 44 (1957)."""
    r = float(spearmanr(table[x], table[y]).statistic)
    low, high = np.tanh(np.arctanh(r) + np.array([-1, 1]) * 1.96 * (1.06 / (len(table) - 3)) ** 0.5)
    return f"{r:+.2f} ({low:+.2f} to {high:+.2f})"


def llama(study: Study, rates: Sequence[float], *models: str, ratio: float = HALF) -> Mean:
    """The gap of the language models of these learning rates, in points: 100 ln(pruned / folded perplexity)."""
    at = study.llama.at("raw", ratio)
    return mean(at.filter(pl.col("lr").is_in(list(rates)) & pl.col("model").is_in(list(models)))["gap"])


def augmentations(found: Lines) -> tuple[str, str]:
    """The levels of augmentation, the shorter first."""
    plain, augmented = sorted(found.table["augment"].unique(), key=len)
    return plain, augmented


def correlation(table: pl.DataFrame, x: str, y: str) -> tuple[float, float, float, float]:
    """(Pearson's r, the ends of its 95% interval by Fisher's z, Spearman's rank correlation)"""
    found = pearsonr(table[x], table[y])
    low, high = found.confidence_interval()
    return float(found.statistic), float(low), float(high), float(spearmanr(table[x], table[y]).statistic)


def explained(table: pl.DataFrame, outcome: str, columns: Sequence[np.ndarray]) -> float:
    """Share of the outcome's variance that a linear model of these columns explains (least squares, in sample)."""
    y = table[outcome].to_numpy()
    x = np.stack([np.ones(len(y)), *columns], axis=1)
    rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float(1 - rest @ rest / ((y - y.mean()) @ (y - y.mean())))


def within(table: pl.DataFrame, draws: int = 1000) -> str:
    """ "31 to 54%": 95% interval of what rate, decay and their product explain of the gap; networks drawn again."""
    rng = np.random.default_rng(0)
    found = [rate_and_decay(table[rng.integers(0, len(table), len(table))])["product"] for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return f"{100 * low:.0f} to {high:.0%}"


def rate_and_decay(table: pl.DataFrame, outcome: str = "gap") -> dict[str, float]:
    """`explained` by log10 of the learning rate, by weight decay, by both, and by both and their product."""
    rate, decay = np.log10(table["lr"].to_numpy()), table["weight_decay"].to_numpy()
    sets = {"rate": [rate], "decay": [decay], "both": [rate, decay], "product": [rate, decay, rate * decay]}
    return {name: explained(table, outcome, columns) for name, columns in sets.items()}


def cyclic(table: pl.DataFrame, outcome: str) -> dict[str, Mean]:
    """Effects where every network has a peak rate of its own, so that no two are alike but in one setting.

    A linear model of the outcome: a decade of the peak rate (and its square), augmentation, and SAM's two radii, each
    beside the others. Intervals from errors that may differ between networks (HC3: MacKinnon and White, Journal of
    Econometrics 29 (1985)).
    """
    import statsmodels.api as sm

    rate = np.log10(table["lr"].to_numpy())
    rate = rate - rate.mean()
    told = {
        "peak rate, ten times": rate,
        "squared": rate**2,
        "crop, flip and RandAugment": (table["augment"] != "[]").to_numpy().astype(float),
        "SAM, rho 0 to 0.05": (table["rho"] == 0.05).to_numpy().astype(float),
        "SAM, rho 0 to 0.1": (table["rho"] == 0.1).to_numpy().astype(float),
    }
    x = np.stack([np.ones(len(rate)), *told.values()], axis=1)
    fitted = sm.OLS(table[outcome].to_numpy(), x).fit(cov_type="HC3", use_t=True)
    halves = np.diff(fitted.conf_int(0.05), axis=1)[:, 0] / 2
    found = zip(told, fitted.params[1:], halves[1:], strict=True)
    return {name: Mean(float(b), float(h), len(rate), np.nan) for name, b, h in found if name != "squared"}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def gap(study: Study, family: str, stage: str = "repaired", ratio: float = HALF) -> Mean:
    stage = last(family) if stage == "repaired" else stage
    return mean(networks(study.found[family], family, stage, ratio)["gap"])


def simple_vit(study: Study, outcome: str) -> dict[str, Mean]:
    return cyclic(networks(study.found[VIT], VIT, "norm_tuned"), outcome)


# --- figures that are no accuracies


def repeats(found: Lines, extras: pl.DataFrame, family: str, log: str) -> dict[str, float]:
    """{outcome: standard deviation of one measurement}, from networks that two logs folded and repaired at HALF."""
    again = extras.filter((pl.col("family") == family) & (pl.col("event") == "REPAIR") & (pl.col("ratio") == HALF))
    again = again.filter(pl.col("log").str.ends_with(log)).pivot("method", index="cell", values="value")
    again = again.select("cell", fold_="fold", gap_=pl.col("fold") - pl.max_horizontal("l1", "l2"))
    both = found.at("repaired", HALF).join(again, on="cell")
    return {name: float((both[name] - both[f"{name}_"]).std() / 2**0.5) for name in ("fold", "gap")}


def corruptions(extras: pl.DataFrame, family: str, dense: pl.DataFrame) -> pl.DataFrame:
    """One line per network and ratio: the lead of folding on corrupted and on clean pictures, in points.

    excess: accuracy under corruption of the folded network less that of an l2-pruned network of the same clean accuracy
    (a less pruned one: read off the line through all ratios of that network); null beyond that line. dense: cell, base.
    """
    zeroshot = extras.filter((pl.col("family") == family) & pl.col("log").str.ends_with("-zeroshot"))
    event = "REPAIR" if (zeroshot["event"] == "REPAIR").any() else "PRUNE"
    wide = [
        zeroshot.filter(pl.col("event") == e).select("cell", "ratio", "method", pl.col("value").alias(name))
        for e, name in (("CORR", "corrupt"), (event, "clean"))
    ]
    start = zeroshot.filter((pl.col("event") == "CORR") & (pl.col("ratio") == 0)).unique("cell")
    start = start.select("cell", corrupt="value").join(dense.unique("cell"), on="cell")
    measured = wide[0].join(wide[1], on=["cell", "ratio", "method"])
    lines = []
    for (cell,), table in measured.partition_by("cell", as_dict=True).items():
        origin = start.row(by_predicate=pl.col("cell") == cell, named=True)
        pruned = table.filter(pl.col("method") == "l2").sort("clean")
        x, y = [*pruned["clean"], origin["base"]], [*pruned["corrupt"], origin["corrupt"]]
        order = np.argsort(x)
        x, y = np.array(x)[order], np.array(y)[order]
        for (ratio,), at in table.partition_by("ratio", as_dict=True).items():
            clean, corrupt = (dict(at.select("method", name).rows()) for name in ("clean", "corrupt"))
            lead = {
                name: values["fold"] - max(values["l1"], values["l2"])
                for name, values in (("clean", clean), ("corrupt", corrupt))
            }
            inside = x[0] <= clean["fold"] <= x[-1]
            excess = corrupt["fold"] - np.interp(clean["fold"], x, y) if inside else None
            lines.append({"cell": cell, "ratio": ratio, **lead, "excess": excess})
    return pl.DataFrame(lines, infer_schema_length=None).sort("cell", "ratio")


def distances(found: Lines, extras: pl.DataFrame, family: str, ratio: float = HALF) -> pl.DataFrame:
    """One line per network: gap, and nearer, by how much folding's outputs are nearer to the whole network's than those
    of the nearer pruning (log2 of the distances' ratio; distances between logits, behind the repair)."""
    at = extras.filter((pl.col("family") == family) & (pl.col("event") == "FD") & (pl.col("ratio") == ratio))
    at = at.filter(pl.col("log").str.ends_with(FAMILIES[family].log))
    wide = at.filter(pl.col("value") > 0).pivot("method", index="cell", values="value").drop_nulls()
    wide = wide.select("cell", nearer=(pl.min_horizontal("l1", "l2") / pl.col("fold")).log(2))
    return networks(found, family, last(family), ratio).join(wide, on="cell")


def sharpness(found: Lines, extras: pl.DataFrame, family: str, ratio: float = HALF) -> pl.DataFrame:
    """One line per network: folding's sharpness over the less sharp pruning's (log2), fold and gap, in points."""
    at = extras.filter((pl.col("family") == family) & (pl.col("event") == "SHARP_1") & (pl.col("ratio") == ratio))
    wide = at.filter(pl.col("value") > 0).pivot("method", index="cell", values="value").drop_nulls()
    relative = (pl.col("fold") / pl.min_horizontal("l1", "l2")).log(2)
    stage = "raw" if family == "clip" else "repaired"
    wide = wide.select("cell", sharp="fold", relative=relative)
    return networks(found, family, stage, ratio).join(wide, on="cell")


def outgrown(found: Lines) -> tuple[int, int, float, tuple[int, int]]:
    """Networks that are over a point better folded by a tenth and repaired than whole: stale statistics.

    (such networks, all, p of Fisher's exact test against the schedule, (those of a constant rate, those of cosine))
    """
    table = found.at("repaired", 0.1).with_columns(over=pl.col("fold") > pl.col("base") + 1)
    counts = table.group_by("schedule").agg(yes=pl.col("over").sum(), no=(~pl.col("over")).sum()).sort("schedule")
    p = fisher_exact(counts.select("yes", "no").to_numpy()).pvalue
    return int(table["over"].sum()), len(table), float(p), (counts["yes"][0], counts["yes"][1])
