"""The pictures of the page on the published study (see benchmarks.published_study)."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

from benchmarks.published_numbers import ADAM, HALF, SGD, STAGES, TITLES, Study, last, mean, named, networks
from pipeline.study.effects import effects


def draw_gap(study: Study, path: Path) -> None:
    """The mean gap over the ratio with its 95% interval: a panel per stage, a colour per family."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    heads = ("raw", "repaired (transformers: norms tuned)", "fine-tuned, one epoch", "fine-tuned, five epochs")
    for panel, stage, head in zip(panels, STAGES, heads, strict=True):
        for color, (family, title) in enumerate(TITLES.items()):
            named = last(family) if stage == "repaired" else stage
            points = {
                ratio: mean(found["gap"])
                for ratio in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
                if len(found := networks(study.found[family], family, named, ratio)) > 2
            }
            if points:
                values, halves = [p.value for p in points.values()], [p.half for p in points.values()]
                low, high = ([v + sign * h for v, h in zip(values, halves, strict=True)] for sign in (-1, 1))
                panel.plot(list(points), values, "o-", color=f"C{color}", label=title, markersize=3)
                panel.fill_between(list(points), low, high, color=f"C{color}", alpha=0.15, linewidth=0)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(title=head, xlabel="fraction of channels removed")
        panel.title.set_fontsize(10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("gap: folded less best pruned, points")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)


SHOWN = (("fold", "C0", "folded accuracy"), ("gap", "C1", "gap"), ("base", "grey", "base"))


def draw_effects(study: Study, path: Path) -> None:
    """Matched effects on the folded accuracy, the gap and the base, repaired at half: a panel per optimizer."""
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    for panel, family in zip(figure.subplots(1, 2), (SGD, ADAM), strict=True):
        found = study.found[family]
        lines = effects(found, "repaired", HALF, ("fold",)).drop_nulls("half").to_dicts()
        labels = [f"{named(line)} ({line['n']})" for line in lines]
        for shift, (outcome, color, label) in enumerate(SHOWN):
            values, halves = ([line[f"{outcome}_{part}"] for line in lines] for part in ("effect", "half"))
            places = [place + 0.25 * (shift - 1) for place in range(len(lines))]
            panel.errorbar(values, places, xerr=halves, fmt="o", color=color, markersize=4, label=label)
        panel.set_yticks(range(len(labels)), labels)
        panel.invert_yaxis()
        panel.axvline(0, color="black", linewidth=0.8)
        panel.grid(alpha=0.3, axis="x")
        panel.set(title=f"{TITLES[family]}: repaired, half of the channels", xlabel="mean change over pairs, points")
        panel.title.set_fontsize(10)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def draw_rate(study: Study, path: Path) -> None:
    """SGD: accuracies and gap over the effective learning rate; open marks where momentum is .99."""
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    panel = figure.subplots()
    at = study.found[SGD].at("repaired", HALF).with_columns(rate=(pl.col("lr") / (1 - pl.col("momentum"))).round(6))
    names = {"base": ("base", "grey"), "fold": ("folded", "C0"), "prune": ("best pruned", "C3"), "gap": ("gap", "C1")}
    for momentum, fill in ((0.9, "full"), (0.99, "none")):
        groups = at.filter(pl.col("momentum") == momentum).partition_by("rate", as_dict=True)
        for name, (label, color) in names.items():
            points = {rate: mean(group[name]) for (rate,), group in sorted(groups.items())}
            values, halves = [p.value for p in points.values()], [p.half for p in points.values()]
            style = {"color": color, "fillstyle": fill, "label": label if fill == "full" else None}
            panel.errorbar(list(points), values, yerr=halves, fmt="o-" if fill == "full" else "o--", **style)
    panel.set(xscale="log", xlabel="effective learning rate, rate / (1 - momentum)", ylabel="accuracy, gap (points)")
    panel.set_title("ResNet18 under SGD, repaired, half of the channels; open: momentum .99", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.savefig(path, dpi=130)


def draw_gap_and_fold(study: Study, path: Path) -> None:
    """Every network's gap over its folded accuracy; colour: the learning rate."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for panel, family in zip(figure.subplots(1, 2, sharey=True), (SGD, ADAM), strict=True):
        at = networks(study.found[family], family, "repaired")
        for color, ((rate,), group) in enumerate(sorted(at.partition_by("lr", as_dict=True).items())):
            panel.scatter(group["fold"], group["gap"], s=9, alpha=0.7, color=f"C{color}", label=f"rate {rate:g}")
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(title=TITLES[family], xlabel="folded accuracy, %")
        panel.title.set_fontsize(10)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
        if family == SGD:
            panel.set_ylabel("gap: folded less best pruned, points")
    figure.savefig(path, dpi=130)


PICTURES: dict[str, Callable[[Study, Path], None]] = {
    "gap": draw_gap,
    "effects": draw_effects,
    "rate": draw_rate,
    "gap_and_fold": draw_gap_and_fold,
}
