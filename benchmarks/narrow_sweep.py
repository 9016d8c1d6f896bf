"""Compares the narrow sweep with the study's networks of the same 32 recipes; writes docs/narrow_sweep.md and pictures.

    python -m scripts.train sweep=narrow_resnet18_sgd_cifar10 data.root=cifar10.npz launcher=joblib
    python -m scripts.train sweep=narrow_resnet18_adam_cifar10 data.root=cifar10.npz launcher=joblib
    python -m scripts.report runs --out benchmarks/results/narrow_sweep.parquet
    python -m benchmarks.narrow_sweep --study study_rows.csv.gz

A recipe here is the training's: optimizer, learning rate, ... study_rows: the figures of the study's published logs
(osaukh/folding_as_projection, output/), one line each: log, checkpoint (its file name says the recipe), ratio, event
(BASE, PRUNE, REPAIR), value in %. Without it the page shows our side alone.
"""

import argparse
import itertools
from pathlib import Path

import polars as pl
from scipy.stats import spearmanr

from pipeline.results import DENSE, means, read_joined
from pipeline.study.intervals import half_interval
from pipeline.study.pictures import plot_curves
from pipeline.study.published import published
from pipeline.study.summary import dense_rows, duels, gaps
from pipeline.study.sweep import joined

ROWS = Path("benchmarks/results/narrow_sweep.parquet")
PAGE = Path("docs/narrow_sweep.md")
RECIPE = ["optimizer", "lr", "rand_augment", "sam", "l1"]
LOW = {"sgd": 0.01, "adam": 0.001}  # the smaller of each optimizer's two learning rates
TITLES = {"sgd": "SGD", "adam": "Adam"}
EFFECTS = {
    "optimizer": "Adam instead of SGD",
    "lr": "the larger learning rate",
    "rand_augment": "RandAugment",
    "sam": "SAM, rho 0.05",
    "l1": "L1, 1e-5",
}
RATIOS = [0.3, 0.5, 0.7]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, help="study_rows.csv.gz")
    args = parser.parse_args()
    sides = {"ours": with_recipe(read_joined(ROWS))}
    if args.study:
        same = study(args.study).join(sides["ours"].select(RECIPE).unique(), on=RECIPE, how="semi")
        sides["study"] = same
    cells = [rows.select("cell", *RECIPE).unique() for rows in sides.values()]
    assert all(len(one) == one.select(RECIPE).n_unique() == len(cells[0]) for one in cells), "not one cell a recipe"
    PAGE.write_text(page(sides))
    for optimizer in TITLES:
        mine = of(sides["ours"], optimizer)
        title = f"{mine['cell'].n_unique()} narrow ResNet18 under {TITLES[optimizer]}, CIFAR-10: mean accuracy"
        plot_curves(mine, PAGE.with_name(f"narrow_sweep_{optimizer}.png"), title)
    plot_gaps(sides, PAGE.with_name("narrow_sweep_gap.png"))


# --- the two sides, as rows with the columns of RECIPE


def with_recipe(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows joined with the settings of their cells, with the columns of RECIPE."""
    return rows.with_columns(
        optimizer=pl.col("optim.name"),
        lr=pl.col("optim.lr") > pl.col("optim.name").replace_strict(LOW),
        rand_augment=pl.col("data.augment").str.contains("rand_augment"),
        sam=pl.col("optim.sam.rho") > 0,
        l1=pl.col("optim.l1") > 0,
    )


def study(figures: Path) -> pl.DataFrame:
    """Rows of the study's ResNet18 with our recipes: weight decay 5e-4, cosine, momentum 0.9, same rates and rho."""
    both = [joined(published(figures, family)) for family in ("resnet18-adam", "resnet18-sgd")]
    low, rate = pl.col("optim.name").replace_strict(LOW), pl.col("optim.lr")
    same = (
        (pl.col("optim.weight_decay") == 5e-4)
        & (pl.col("optim.schedule.name") == "cosine")
        & (pl.col("optim.momentum").fill_null(0.9) == 0.9)
        & (pl.col("optim.sam.rho") <= 0.05)
        & ((rate == low) | (rate == 10 * low))
        & pl.col("stage").is_in(["raw", "repaired"])
    )
    return with_recipe(pl.concat(both, how="diagonal_relaxed").filter(same))


def of(rows: pl.DataFrame, optimizer: str) -> pl.DataFrame:
    return rows.filter(pl.col("optimizer") == optimizer)


# --- what is computed


def outcomes(rows: pl.DataFrame) -> pl.DataFrame:
    """One line per recipe: dense accuracy, folded accuracy and gap (repaired) at RATIOS, in points."""
    lines = dense_rows(rows).group_by("cell", *RECIPE).agg(dense=100 * pl.col("acc").mean())
    found = duels(rows).filter(pl.col("stage") == "repaired")
    for ratio in RATIOS:
        at = found.filter((pl.col("ratio") - ratio).abs() < 1e-9)
        at = at.select(
            "cell", (100 * pl.col("fold")).alias(f"fold {ratio}"), (100 * pl.col("gap")).alias(f"gap {ratio}")
        )
        lines = lines.join(at, on="cell", how="left")
    return lines.sort(RECIPE)


def effect(lines: pl.DataFrame, factor: str, outcome: str) -> tuple[float, float]:
    """(mean change of the outcome between recipes that differ in `factor` alone, half of its 95% interval)"""
    rest = [name for name in RECIPE if name != factor]
    on = pl.col(factor) == ("adam" if factor == "optimizer" else True)
    first = {name: pl.col(outcome).filter(which).first() for name, which in (("on", on), ("off", ~on))}
    pairs = lines.group_by(rest).agg(**first).select(pl.col("on") - pl.col("off")).drop_nulls()["on"]
    return pairs.mean(), half_interval(pairs.std(), len(pairs))


# --- the page


def page(sides: dict[str, pl.DataFrame]) -> str:
    lines = {name: outcomes(rows) for name, rows in sides.items()}
    parts = [PAGE.read_text().split(MARK)[0].rstrip(), "", MARK, ""] if PAGE.exists() else [MARK, ""]
    for optimizer, title in TITLES.items():
        count = of(lines["ours"], optimizer)["cell"].n_unique()
        parts += [f"## Means over the {count} recipes of {title}", ""]
        for name, rows in sides.items():
            mine = of(rows, optimizer)
            dense = dense_rows(mine).group_by("cell").agg(pl.col("acc").first())["acc"]
            low, mean, high = (100 * value for value in (dense.min(), dense.mean(), dense.max()))
            parts += [f"{OWNERS[name]}: dense {mean:.1f}% ({low:.1f} to {high:.1f})", "", *means_table(mine), ""]
        parts += [f"![curves](narrow_sweep_{optimizer}.png)", ""]
    parts += ["## Gap of folding to the better of l1 and l2", "", "![gap over ratio](narrow_sweep_gap.png)", ""]
    parts += ["## Effect of each setting", "", *effects_table(lines), ""]
    if len(lines) == 2:
        parts += ["## Do the same recipes come out foldable?", "", *agreement(lines), ""]
    parts += ["## Every cell of ours", "", *cells_table(lines["ours"])]
    return "\n".join(parts) + "\n"


MARK = "<!-- written by python -m benchmarks.narrow_sweep from here on -->"
OWNERS = {"ours": "**Ours** (width 16, 4 epochs of 16,000 pictures)", "study": "**Study** (width 64, 200 epochs)"}


def means_table(rows: pl.DataFrame) -> list[str]:
    """Stage and method x ratio, mean accuracy in %; gap with its 95% interval in points; win rate."""
    ratios = sorted(set(rows.filter(pl.col("method") != DENSE)["ratio"]))
    table = [row("ratio removed", [f"{r:g}" for r in ratios]), "|---|" + "---|" * len(ratios)]
    found = {tuple(keys): acc for *keys, acc in means(rows).drop("n").iter_rows()}
    compared = {(line["stage"], line["ratio"]): line for line in gaps(rows).iter_rows(named=True)}
    for stage in ("raw", "repaired"):
        for method in ("fold", "l1", "l2"):
            table.append(row(f"{stage} {method}", [f"{100 * found[stage, method, r]:.1f}" for r in ratios]))
        at = [compared[stage, r] for r in ratios]
        table.append(row(f"{stage} gap", [f"{100 * c['gap']:+.1f} ±{100 * c['margin']:.1f}" for c in at]))
        table.append(row(f"{stage} win rate", [f"{c['wins']:.0%}" for c in at]))
    return table


def effects_table(lines: dict[str, pl.DataFrame]) -> list[str]:
    names = ["dense", "fold 0.5", *(f"gap {ratio}" for ratio in RATIOS)]
    table = [row("change, in points, by", ["", *names]), "|---|---|" + "---|" * len(names)]
    for factor, title in EFFECTS.items():
        for name, cells in lines.items():
            changes = [effect(cells, factor, outcome) for outcome in names]
            table.append(row(title, [name, *(f"{mean:+.1f} ±{margin:.1f}" for mean, margin in changes)]))
    return table


def agreement(lines: dict[str, pl.DataFrame]) -> list[str]:
    """Rank correlation over recipes between our outcomes and the study's."""
    both = lines["ours"].join(lines["study"], on=RECIPE, suffix=" of study")
    names = ["dense", *(f"{what} {ratio}" for what in ("fold", "gap") for ratio in RATIOS)]
    table = [row("Spearman's rho", names), "|---|" + "---|" * len(names)]
    for title, cells in {"all": both, **{TITLES[o]: of(both, o) for o in TITLES}}.items():
        values = [spearmanr(cells[name], cells[f"{name} of study"]).statistic for name in names]
        table.append(row(f"{title}, n = {len(cells)}", [f"{value:+.2f}" for value in values]))
    return table


def cells_table(lines: pl.DataFrame) -> list[str]:
    names = ["dense", *itertools.chain(*((f"fold {ratio}", f"gap {ratio}") for ratio in RATIOS))]
    table = [row("cell", [*RECIPE, *names]), "|---|" + "---|" * (len(RECIPE) + len(names))]
    for line in lines.iter_rows(named=True):
        rate = LOW[line["optimizer"]] * (10 if line["lr"] else 1)
        recipe = [line["optimizer"], f"{rate:g}", *("on" if line[name] else "-" for name in RECIPE[2:])]
        numbers = [f"{line[name]:+.1f}" if "gap" in name else f"{line[name]:.1f}" for name in names]
        table.append(row(line["cell"].rpartition("-")[2], recipe + numbers))
    return table


def row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def plot_gaps(sides: dict[str, pl.DataFrame], path: Path) -> None:
    """Mean gap over ratio with its 95% interval; one panel per stage; ours in full lines, the study's dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, stage in zip(panels, ("raw", "repaired"), strict=True):
        for (name, rows), (index, optimizer) in itertools.product(sides.items(), enumerate(TITLES)):
            at = gaps(of(rows, optimizer)).filter(pl.col("stage") == stage).sort("ratio")
            ratio, gap, margin = (at[column].to_numpy() for column in ("ratio", "gap", "margin"))
            style = {"color": f"C{index}", "linestyle": "-" if name == "ours" else "--"}
            panel.plot(ratio, 100 * gap, marker="o", markersize=4, label=f"{TITLES[optimizer]}, {name}", **style)
            panel.fill_between(
                ratio, 100 * (gap - margin), 100 * (gap + margin), color=style["color"], alpha=0.12, lw=0
            )
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_title(stage, fontsize=10)
        panel.set_xlabel("fraction of channels removed")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("folding minus best pruning, points")
    panels[0].legend(frameon=False)
    figure.suptitle("Gap of folding, mean over the same recipes and 95% interval", fontsize=11)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
