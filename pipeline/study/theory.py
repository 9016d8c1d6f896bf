"""The theory in numbers: tables of parameter errors and of functional perturbations become sentences and pictures.

errors: a line for every network, group, features and rank, with relative errors ‖W - W'‖ / ‖W‖ of the best pruning
    (prune), of special, fold, mix, kmeans and "kmeans, best of n", and of the truncated singular values (svd)
pairs: a line for every network, group and method at one rank, with the fields of compression.perturbation.Perturbation,
    "logits" and "logits_bound"

The square of an error is the energy that is lost, as a share of ‖W‖²; means and differences are of these shares.
Intervals are t-intervals of 95% over groups, which are channels of few networks and so not wholly independent.
"""

from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import NamedTuple

import polars as pl
from scipy import stats

from pipeline.study.intervals import half_interval

GROUP = ["network", "group"]
COMPARED = ("special", "kmeans", "fold", "mix")


class Mean(NamedTuple):
    """A mean over n, and the half width of its 95% t-interval; NaN for n below 2."""

    value: float
    half: float
    n: int

    def points(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.half:.1f} points of the energy (n = {self.n} groups)"


def mean(values: Sequence[float]) -> Mean:
    values = pl.Series(values, dtype=pl.Float64)
    n = len(values)
    if n < 2:
        return Mean(values.mean() if n else nan, nan, n)
    return Mean(values.mean(), float(half_interval(values.std(), n)), n)


class Share(NamedTuple):
    """How many of n comparisons hold."""

    count: int
    n: int

    def __str__(self) -> str:
        return f"{self.count:,} of {self.n:,}"

    @property
    def percent(self) -> str:
        return f"{100 * self.count / self.n:.1f}%"


SLACK = 1e-9  # two shares of the energy that differ by less are equal


def never_above(errors: pl.DataFrame, method: str, other: str, more: int = 0) -> Share:
    """How often a method at rank k + more loses at most what the other does at rank k."""
    key = [*GROUP, "features"]
    ahead = errors.select(*key, (pl.col("rank") - more).alias("rank"), pl.col(method).alias("own"))
    both = errors.join(ahead, on=[*key, "rank"], how="inner")
    holds = both["own"] ** 2 <= both[other] ** 2 + SLACK
    return Share(int(holds.sum()), len(both))


def gained(errors: pl.DataFrame, method: str, other: str) -> Mean:
    """By how much a method loses less energy than another at the same rank: means over the ranks, then over groups."""
    difference = (pl.col(other) ** 2 - pl.col(method) ** 2).mean().alias("difference")
    return mean(errors.group_by(GROUP, maintain_order=True).agg(difference)["difference"].to_list())


def at_share(errors: pl.DataFrame, method: str, kept: float) -> Mean:
    """The energy that a method loses where this share of the channels is kept; over groups."""
    at = errors.filter(pl.col("rank") == (pl.col("channels") * kept).round().cast(pl.Int64))
    return mean((at[method] ** 2).to_list())


def methods_of(errors: pl.DataFrame) -> list[str]:
    """The methods of a table of errors, pruning first and the bound last."""
    best = [name for name in errors.columns if name.startswith("kmeans, ")]
    return ["prune", "special", "kmeans", *best, "fold", "mix", "svd"]


def error_lines(errors: pl.DataFrame) -> list[str]:
    """Sentences and a table on one kind of features."""
    n = errors.select(GROUP).n_unique()
    theorem = {name: never_above(errors, name, "prune", more=1) for name in COMPARED}
    matched = {name: never_above(errors, name, "prune") for name in COMPARED}
    kept = (0.25, 0.5, 0.75)
    lines = [
        f"{len(errors):,} ranks of {n} groups. "
        f"Folding at rank k + 1 loses at most what the best pruning loses at rank k in {theorem['fold']} cases "
        f"({theorem['fold'].percent}), the special folding in {theorem['special']}, k-means in {theorem['kmeans']}.",
        f"At the same rank folding loses at most as much as the best pruning in {matched['fold']} cases "
        f"({matched['fold'].percent}), the mix in {matched['mix']}, k-means in {matched['kmeans']}, the special "
        f"folding in {matched['special']}.",
        f"Folding loses {gained(errors, 'fold', 'prune').points()} less than the best pruning, "
        f"{gained(errors, 'fold', 'kmeans').points()} less than k-means, and the mix "
        f"{gained(errors, 'mix', 'fold').points()} less than folding.",
        f"No projection can lose less than the singular values, and folding loses "
        f"{gained(errors, 'svd', 'fold').points()} more than these.",
        "",
        "| energy lost, % | " + " | ".join(f"{100 * share:g}% of channels kept" for share in kept) + " |",
        "|---|" + "---|" * len(kept),
    ]
    for name in methods_of(errors):
        found = (at_share(errors, name, share) for share in kept)
        cells = " | ".join(f"{100 * m.value:.1f} ± {100 * m.half:.1f}" for m in found)
        lines.append(f"| {label_of(name)} | {cells} |")
    return lines


LABELS = {
    "prune": "best pruning",
    "special": "special folding",
    "kmeans": "k-means, one draw",
    "fold": "fold",
    "mix": "mix",
    "svd": "singular values (bound)",
}


def label_of(name: str) -> str:
    return LABELS.get(name, name.replace("kmeans", "k-means"))


def pair_lines(pairs: pl.DataFrame) -> list[str]:
    """A table of perturbations and bounds per method, and how loose the bounds are for folding."""
    n = pairs.select(GROUP).n_unique()
    columns = {
        "measured": "‖f - f̃‖ / ‖f‖",
        "seen": "‖V‖ ‖Δ x̂‖",
        "spectral": "‖V‖ ‖Δ‖₂ ‖x̂‖",
        "frobenius": "‖V‖ ‖Δ‖_F ‖x̂‖",
        "logits": "logits",
    }
    lines = [
        "| half of one group's channels | " + " | ".join(columns.values()) + " | bound of the logits |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for method in pairs["method"].unique(maintain_order=True):
        of = pairs.filter(method=method)
        cells = [f"{(m := mean(of[name].to_list())).value:.3g} ± {m.half:.2g}" for name in columns]
        lines.append(f"| {label_of(method)} | {' | '.join(cells)} | {of['logits_bound'].median():.2g} (median) |")
    fold = pairs.filter(method="fold")
    loose = {name: (fold[name] / fold["measured"]).median() for name in ("seen", "spectral", "frobenius")}
    whole = (fold["logits_bound"] / fold["logits"]).median()
    lower = {name: fewer(pairs, "fold", "prune", name) for name in ("shift", "measured", "logits")}
    rank = stats.spearmanr(pairs["frobenius"], pairs["measured"]).statistic
    broken = sum(int((pairs["measured"] > pairs[name] * (1 + 1e-9)).sum()) for name in loose)
    broken += int((pairs["logits"] > pairs["logits_bound"]).sum())
    return [
        *lines,
        "",
        f"Over {n} groups the bounds are broken {broken} times. For folding they are too large by {loose['seen']:.1f} "
        f"(pictures seen), {loose['spectral']:.1f} (spectral norm) and {loose['frobenius']:.1f} times (Frobenius norm, "
        f"the form in which the parameter error bounds the perturbation), in the median; the product of operator norms "
        f"from the pair to the logits by {whole:.1e} times.",
        f"The Frobenius bound ranks the {len(pairs)} perturbations of all methods at {rank:.2f} (Spearman).",
        f"Folding changes the affine map Δ less than the best pruning in {lower['shift']} groups, the pair's answer "
        f"less in {lower['measured']}, and the logits less in {lower['logits']}. On average it changes the "
        f"pair's answer less by {closer(pairs, 'measured')}, and the logits less by {closer(pairs, 'logits')}.",
    ]


def closer(pairs: pl.DataFrame, column: str) -> str:
    """By how much folding changes less than the best pruning, in percent of the norm, with its interval."""
    at = {name: pairs.filter(method=name).sort(GROUP)[column] for name in ("prune", "fold")}
    found = mean((at["prune"] - at["fold"]).to_list())
    told = f"{100 * found.value:.1f} ± {100 * found.half:.1f}% of its norm (n = {found.n} groups)"
    return told if abs(found.value) > found.half else f"{told}, which may be nothing"


def fewer(pairs: pl.DataFrame, method: str, other: str, column: str) -> Share:
    """In how many groups the method's value is below the other's."""
    at = {name: pairs.filter(method=name).sort(GROUP)[column] for name in (method, other)}
    return Share(int((at[method] < at[other]).sum()), len(at[method]))


def page(errors: pl.DataFrame, pairs: pl.DataFrame) -> str:
    """The page in Markdown."""
    networks = ", ".join(errors["network"].unique(maintain_order=True))
    lines = [
        "# The theory measured",
        "",
        f"Trained networks: {networks} on CIFAR-10 (akamaster/pytorch_resnet_cifar10). Their residual streams cannot "
        "be compressed, so a group is the hidden channels of a block. Written by `python -m benchmarks.theory`; every "
        "compressed file holds the same numbers for its own groups, which `python -m scripts.certify FILE` checks.",
        "",
        "![energy lost over the share of channels kept, and perturbations against their bounds](theory.png)",
        "",
        "## Parameter error",
        "",
        'The energy lost is ‖W - W\'‖² / ‖W‖². Theorem 1 of "Cut Less, Fold More" compares folding at rank k + 1 with '
        "pruning at rank k. It holds for every method that never does worse than the special folding. k-means has no "
        "such guarantee, because it may end in a poor optimum.",
    ]
    for features in errors["features"].unique(maintain_order=True):
        of = errors.filter(pl.col("features") == features)
        lines += ["", f"### Channels described by their {features}", "", *error_lines(of)]
    lines += [
        "",
        "## Functional perturbation",
        "",
        "A pair of layers is f(x) = V ReLU(A x̂): the affine map A of a convolution and the norm behind it, the reader "
        "V, patches x̂ with a 1 behind. With Δ = A - Ã, ‖f(x) - f̃(x)‖ <= ‖V‖ ‖Δ x̂‖ <= ‖V‖ ‖Δ‖₂ ‖x̂‖ <= "
        "‖V‖ ‖Δ‖_F ‖x̂‖. Behind the pair every layer passes a change on by at most its operator norm. Half of one "
        "group's channels is removed at a time, nothing is repaired, and all numbers are relative to ‖f(x)‖, or to the "
        "norm of the logits.",
        "",
        *pair_lines(pairs),
    ]
    return "\n".join(lines) + "\n"


def plot(errors: pl.DataFrame, pairs: pl.DataFrame, path: Path) -> None:
    """Left: energy lost above the singular values. Right: perturbation of each folded pair and its bounds."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = errors.filter(pl.col("features") == errors["features"][0])
    share = (pl.col("rank") / pl.col("channels") * 16).round().clip(1, 15) / 16
    for place, name in enumerate(methods_of(first)[:-1]):
        above = (pl.col(name) ** 2 - pl.col("svd") ** 2).mean()
        line = first.group_by(share.alias("kept")).agg((100 * above).alias("above")).sort("kept")
        left.plot(line["kept"], line["above"], "o-", color=f"C{place}", label=label_of(name), markersize=3)
    left.set_xlabel("share of channels kept")
    left.set_ylabel("energy lost above the singular values, % of ‖W‖²")
    left.legend(frameon=False)
    fold = pairs.filter(method="fold").sort("measured")
    bounds = {
        "logits_bound": "bound of the logits",
        "frobenius": "‖V‖ ‖Δ‖_F ‖x̂‖",
        "spectral": "‖V‖ ‖Δ‖₂ ‖x̂‖",
        "seen": "‖V‖ ‖Δ x̂‖",
        "measured": "measured, pair",
        "logits": "measured, logits",
    }
    for place, (name, label) in enumerate(bounds.items()):
        style = {"color": f"C{place}", "markersize": 3, "linestyle": "-" if name == "measured" else ":"}
        right.plot(range(1, len(fold) + 1), fold[name], marker="o", label=label, **style)
    right.set_yscale("log")
    right.set_xlabel("groups, by measured perturbation")
    right.set_ylabel("change of the answer / its norm")
    right.legend(frameon=False)
    for panel in (left, right):
        panel.grid(alpha=0.3)
    n = first.select(GROUP).n_unique()
    figure.suptitle(f"Parameter error over the rank, and half of one group's channels folded ({n} groups)", fontsize=11)
    figure.savefig(path, dpi=130)
