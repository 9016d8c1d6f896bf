"""How much accuracy the methods leave, of real networks, without data and with 512 unlabelled pictures.

    python -m scripts.train sweep=accuracy_resnets_cifar10 data.root=cifar10.npz     # and accuracy_vit_cifar10
    python -m scripts.compress checkpoint=.../last.ckpt model=resnet18 model.width=16 name=resnet18 \\
        data.root=cifar10.npz data.test_size=2000 compression.repair_size=1024 save=false profile.runtimes=[] \\
        'methods=[fold,l1,l2,mix,l1+synthetic,fold+synthetic,mix+synthetic,obs+synthetic,l1+grail,fold+grail,
        l1+data,fold+data,mix+data,obs+data]' paths.runs=runs/accuracy
    python -m scripts.report runs/accuracy --out benchmarks/results/accuracy.parquet
    # and with 'methods=[mix+synthetic,mix+synthetic+macs,mix+data,mix+data+macs]' ratios=[0.3,0.5,0.7] stages=[raw]
    # paths.runs=runs/allocation:
    python -m scripts.report runs/allocation --out benchmarks/results/allocation.parquet
    python -m benchmarks.accuracy

One `scripts.compress` a network; ResNet-20 and -32 are those of akamaster/pytorch_resnet_cifar10 (model=resnet20,
data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225]). Writes docs/accuracy.md and its picture.
"""

import argparse
from pathlib import Path

import polars as pl
from scipy.special import stdtrit

from benchmarks.common import write_below
from pipeline.results import DENSE, measured
from pipeline.study import dense_rows, plot_curves

ROWS = Path("benchmarks/results/accuracy.parquet")
ALLOCATION = Path("benchmarks/results/allocation.parquet")
PAGE = Path("docs/accuracy.md")
MARK = "<!-- written by python -m benchmarks.accuracy from here on -->"
STUDY = ["fold", "l1", "l2"]
SHOWN = ["fold", "l1", "mix", "mix+synthetic", "l1+grail", "mix+data"]
NETWORK = "cell"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    args = parser.parse_args()
    rows = pl.read_parquet(args.rows)
    lines = [*page(rows), "", *sizes(pl.read_parquet(ALLOCATION))]
    write_below(PAGE, MARK, "How much accuracy the methods leave", lines)
    networks = rows[NETWORK].n_unique()
    shown = rows.filter(pl.col("method").is_in([DENSE, *SHOWN]))
    plot_curves(shown, PAGE.with_suffix(".png"), f"Mean accuracy of {networks} networks on CIFAR-10")


def page(rows: pl.DataFrame) -> list[str]:
    dense = dict(dense_rows(rows).group_by(NETWORK, maintain_order=True).agg(pl.col("acc").first()).iter_rows())
    names = {cell: cell.rpartition("-")[0] for cell in dense}
    found = measured(rows).with_columns(dense=pl.col(NETWORK).replace_strict(dense), acc=100 * pl.col("acc"))
    found = found.with_columns(dense=100 * pl.col("dense"))
    of_study = pl.col("acc").filter(pl.col("method").is_in(STUDY)).max().over(NETWORK, "stage", "ratio")
    grail = pl.col("acc").filter(pl.col("method") == "l1+grail").first().over(NETWORK, "stage", "ratio")
    found = found.with_columns(study=of_study, grail=grail)
    mean_loss = (pl.col("dense") - pl.col("study")).mean().over("method", "stage", "ratio")
    found = found.with_columns(gain=pl.col("acc") - pl.col("study"), over_grail=pl.col("acc") - pl.col("grail"))
    found = found.with_columns(won=100 * pl.col("gain") / mean_loss)  # its mean: mean gain by mean loss
    raw, repaired = (found.filter(pl.col("stage") == stage) for stage in ("raw", "repaired"))
    return [
        f"{len(dense)} networks, n = 1 checkpoint each, {found['n'].max():,} test pictures: "
        + "; ".join(f"{names[cell]} {100 * acc:.1f}%" for cell, acc in dense.items())
        + ".",
        "",
        f"![curves]({PAGE.stem}.png)",
        "",
        "## Mean accuracy, raw",
        "",
        *table(raw, "acc", signed=False),
        "",
        "## Mean accuracy, repaired (statistics re-estimated on 1,024 pictures)",
        "",
        *table(repaired, "acc", signed=False),
        "",
        "## Raw: share of the loss that is won back, in %",
        "",
        "Loss: dense accuracy less that of the best of fold, l1 and l2, network by network; mean gain by mean loss.",
        "",
        *table(raw.filter(~pl.col("method").is_in(STUDY)), "won"),
        "",
        "## Raw: points over the best of fold, l1 and l2",
        "",
        "± half of a 95% interval over the networks (Student's t), here and below.",
        "",
        *table(raw.filter(~pl.col("method").is_in(STUDY)), "gain", margin=True),
        "",
        "## Repaired: points over the best of fold, l1 and l2",
        "",
        *table(repaired.filter(~pl.col("method").is_in(STUDY)), "gain", margin=True),
        "",
        "## Raw: points over l1+grail",
        "",
        *table(raw.filter(pl.col("method").str.ends_with("+data")), "over_grail", margin=True),
        "",
        "## Every network, raw, half of the channels gone",
        "",
        *of_networks(raw.filter((pl.col("ratio") - 0.5).abs() < 1e-9), names),
    ]


def table(found: pl.DataFrame, value: str, signed: bool = True, margin: bool = False) -> list[str]:
    """Methods x ratios, means over the networks."""
    ratios = sorted(set(found["ratio"]))
    mean = found.group_by("method", "ratio", maintain_order=True).agg(
        pl.col(value).mean().alias("mean"), std=pl.col(value).std(), n=pl.len()
    )
    lines = [line("ratio removed", [f"{r:g}" for r in ratios]), "|---|" + "---|" * len(ratios)]
    for method in dict.fromkeys(found["method"]):
        cells = []
        for ratio in ratios:
            at = mean.filter((pl.col("method") == method) & (pl.col("ratio") == ratio)).row(0, named=True)
            text = f"{at['mean']:+.1f}" if signed else f"{at['mean']:.1f}"
            if margin and at["n"] > 2:
                text += f" ±{stdtrit(at['n'] - 1, 0.975) * at['std'] / at['n'] ** 0.5:.1f}"
            cells.append(text)
        lines.append(line(method, cells))
    return lines


def of_networks(found: pl.DataFrame, names: dict[str, str]) -> list[str]:
    methods = list(dict.fromkeys(found["method"]))
    lines = [line("network", ["dense", *methods]), "|---|---|" + "---|" * len(methods)]
    for (cell,), group in found.partition_by(NETWORK, as_dict=True, maintain_order=True).items():
        at = dict(zip(group["method"], group["acc"], strict=True))
        lines.append(line(names[cell], [f"{group['dense'][0]:.1f}", *(f"{at[m]:.1f}" for m in methods)]))
    return lines


def sizes(rows: pl.DataFrame) -> list[str]:
    """Every network of the rows whose methods differ in how sizes are allocated: accuracy and MACs."""
    found = measured(rows).filter(pl.col("stage") == "raw")
    ratios = sorted(set(found["ratio"]))
    lines = ["## Sizes by what groups can spare, at equal MACs: raw accuracy (million MACs)", ""]
    lines += [line("network", ["method", *(f"{r:g}" for r in ratios)]), "|---|---|" + "---|" * len(ratios)]
    for (cell, method), group in found.partition_by(NETWORK, "method", as_dict=True, maintain_order=True).items():
        at = {r: f"{100 * acc:.1f} ({count / 1e6:.1f})" for r, acc, count in group["ratio", "acc", "macs"].iter_rows()}
        lines.append(line(cell.rpartition("-")[0], [method, *(at[r] for r in ratios)]))
    return lines


def line(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
