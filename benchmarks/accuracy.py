"""Measures how much accuracy the methods leave real networks, without data and with 512 unlabelled pictures.

    # well-trained networks, which chose nothing: see benchmarks.trained, which measures them
    python -m benchmarks.trained runs/trained --data cifar10.npz

    # narrow networks of two and three epochs, which chose defaults
    python -m scripts.train sweep=accuracy_resnets_cifar10 model=resnet18 data.root=cifar10.npz paths.runs=runs/resnet18
    python -m scripts.train sweep=accuracy_resnets_cifar10 model=preact_resnet18 ... paths.runs=runs/preact_resnet18
    python -m scripts.train sweep=accuracy_vit_cifar10 data.root=cifar10.npz paths.runs=runs/simple_vit
    python -m scripts.compress 'checkpoints=runs/resnet18/*/last.ckpt' model=resnet18 model.width=16 $COMMON $SHOWN
    python -m scripts.compress 'checkpoints=runs/preact_resnet18/*/last.ckpt' model=preact_resnet18 model.width=16 ...
    python -m scripts.compress 'checkpoints=runs/simple_vit/*/last.ckpt' model=simple_vit model.patch_size=8 \\
        model.dim=128 model.heads=2 model.mlp_dim=256 ...
    python -m scripts.compress checkpoint=resnet20-12fca82f.th model=resnet20 $NORMAL $COMMON $SHOWN     # and resnet32
    python -m scripts.report runs/accuracy --out benchmarks/results/accuracy.parquet

    # fidelity, which foretells, and all methods; on networks trained as above and on resnet20 (with $NORMAL), resnet32
    python -m scripts.compress checkpoint=.../last.ckpt model=resnet18 model.width=16 name=foretold $COMMON \\
        ratios=[0.1,0.3,0.5,0.7] 'methods=[fold,l1,l2,mix,fold+ar,auto]' stages=[raw] \\
        compression.predict=true paths.runs=runs/foretold
    python -m scripts.report runs/foretold --out benchmarks/results/foretold.parquet
    python -m scripts.compress ... name=methods $COMMON ratios=[0.3,0.5,0.7] \\
        paths.runs=runs/methods 'methods=[fold,fold+ar,mix,mix+ar,kmeans,special,random_fold,l1,l2,obs,wanda,fpgm,
        bn_scale,random,auto,
        obs+synthetic,fold+synthetic,l1+synthetic,mix+synthetic,taylor+data,fisher+data,wanda+data,obs+data,fold+data,
        l1+data,mix+data,fold+grail,l1+grail]'     # resnet20, and of seed 0 with decay resnet18 and preact_resnet18
    python -m scripts.report runs/methods --out benchmarks/results/methods.parquet

    # an epoch of tuning, and networks of the same size from scratch
    python -m scripts.train sweep=tuned_cifar10 model=resnet18 seed=... checkpoint=.../last.ckpt \\
        data.root=cifar10.npz paths.runs=runs/tuned                 # both ResNets, their three seeds with decay, no SAM
    python -m scripts.train sweep=tuned_cifar10 shrink.method=random trainer.max_epochs=3 optim.lr=0.1 seed=... ...
    python -m scripts.report runs/tuned --out benchmarks/results/tuned.parquet

    # sizes chosen by how many channels each group can spare
    python -m scripts.compress ... 'methods=[mix+synthetic,mix+synthetic+macs,mix+data,mix+data+macs]' \\
        data.test_size=2000 ratios=[0.3,0.5,0.7] stages=[raw] paths.runs=runs/allocation
    python -m scripts.report runs/allocation --out benchmarks/results/allocation.parquet
    python -m benchmarks.accuracy

$COMMON: data.root=cifar10.npz data.test_size=1000 compression.repair_size=1024 save=false profile.runtimes=[].
$SHOWN: 'methods=[fold,l1,l2,mix,mix+synthetic,l1+grail,mix+data]' ratios=[0.1,0.3,0.5,0.7,0.9] name=accuracy
paths.runs=runs/accuracy. $NORMAL: data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225], as ResNet-20 and -32 of
akamaster/pytorch_resnet_cifar10 want. Writes docs/accuracy.md and its picture.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from benchmarks import evidence
from benchmarks.common import line, write_below
from pipeline.results import DENSE, measured, read_joined
from pipeline.study.intervals import half_interval, shown_half
from pipeline.study.pictures import plot_curves
from pipeline.study.summary import dense_rows, foretold

RESULTS = Path("benchmarks/results")
PAGE = Path("docs/accuracy.md")
MARK = "<!-- written by python -m benchmarks.accuracy from here on -->"
EARLIER = ["accuracy", "methods", "foretold", "tuned", "allocation"]
CHOSE = [
    "## Earlier: short-trained networks, which chose defaults",
    "",
    "Everything below was measured on networks of two or three epochs, and on ResNet-20 and -32, by test pictures on "
    "which defaults were chosen as well. Directions hold on the well-trained networks above where both were measured; "
    "sizes here are too favourable to what was chosen. Intervals are over recipes, seeds averaged first.",
]
STUDY = ["fold", "l1", "l2"]
SHOWN = ["fold", "l1", "mix", "mix+synthetic", "l1+grail", "mix+data"]
NETWORK = "cell"
TRAINED_BY = ["named.optim.sam.rho", "named.optim.weight_decay"]  # settings by which the recipes of a model differ


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = {name: read_joined(RESULTS / f"{name}.parquet") for name in EARLIER}
    parts = [
        evidence.page(pl.read_parquet(RESULTS / "trained.parquet")),
        CHOSE,
        page(rows["accuracy"]),
        recipes(rows["accuracy"]),
        everything(rows["methods"]),
        prediction(rows["foretold"]),
        tuning(rows["tuned"]),
        sizes(rows["allocation"]),
    ]
    lines = "\n\n".join("\n".join(part) for part in parts).split("\n")
    write_below(PAGE, MARK, "How much accuracy the methods leave", lines)
    networks = rows["accuracy"][NETWORK].n_unique()
    shown = rows["accuracy"].filter(pl.col("method").is_in([DENSE, *SHOWN]))
    plot_curves(shown, PAGE.with_suffix(".png"), f"Mean accuracy of {networks} networks on CIFAR-10")


def against_the_study(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows in %, with the dense accuracy, the best of the study's methods, and the gain over it.

    won: gain in % of the mean loss of the study's best, so that its mean is the mean gain divided by the mean loss
    """
    dense = dict(dense_rows(rows).group_by(NETWORK, maintain_order=True).agg(pl.col("acc").first()).iter_rows())
    found = measured(rows).with_columns(dense=100 * pl.col(NETWORK).replace_strict(dense), acc=100 * pl.col("acc"))
    here = [NETWORK, "stage", "ratio"]
    study = pl.col("acc").filter(pl.col("method").is_in(STUDY)).max().over(here)
    grail = pl.col("acc").filter(pl.col("method") == "l1+grail").first().over(here)
    found = found.with_columns(study=study, grail=grail)
    mean_loss = (pl.col("dense") - pl.col("study")).mean().over("method", "stage", "ratio")
    found = found.with_columns(gain=pl.col("acc") - pl.col("study"), over_grail=pl.col("acc") - pl.col("grail"))
    return found.with_columns(won=100 * pl.col("gain") / mean_loss)


def page(rows: pl.DataFrame) -> list[str]:
    found = against_the_study(rows)
    raw, repaired = (found.filter(pl.col("stage") == stage) for stage in ("raw", "repaired"))
    ours = ~pl.col("method").is_in(STUDY)
    families = found.group_by("model", maintain_order=True).agg(pl.col(NETWORK).n_unique(), pl.col("dense").mean())
    return [
        f"{found[NETWORK].n_unique()} networks (and their mean dense accuracy), {found['n'].max():,} test pictures: "
        + "; ".join(f"{n} {name} ({acc:.1f}%)" for name, n, acc in families.iter_rows())
        + ".",
        "",
        f"![curves]({PAGE.stem}.png)",
        "",
        "### Mean accuracy, raw",
        "",
        *table(raw, "acc", signed=False),
        "",
        f"### Mean accuracy, repaired, of the {repaired[NETWORK].n_unique()} that have BatchNorm",
        "",
        "Statistics changed by as much as compression changed them on 1,024 training pictures.",
        "",
        *table(repaired, "acc", signed=False),
        "",
        "### Raw: share of the loss that is won back, in %",
        "",
        "Loss: dense accuracy less that of the best of fold, l1 and l2, network by network; mean gain by mean loss.",
        "",
        *table(raw.filter(ours), "won"),
        "",
        "### Raw: points over the best of fold, l1 and l2",
        "",
        "± half of a 95% interval over recipes (Student's t), seeds averaged first, here and below.",
        "",
        *table(raw.filter(ours), "gain", margin=True),
        "",
        "### Repaired: points over the best of fold, l1 and l2",
        "",
        *table(repaired.filter(ours), "gain", margin=True),
        "",
        "### Raw: points over l1+grail",
        "",
        "Statistics of BatchNorm are re-estimated in mix+data and not in l1+grail: no equal information.",
        "",
        *table(raw.filter(pl.col("method").str.ends_with("+data")), "over_grail", margin=True),
        "",
        "### Half of the channels gone, by architecture",
        "",
        *by(half(raw), ["model"], "raw"),
        "",
        *by(half(repaired), ["model"], "repaired"),
    ]


def recipes(rows: pl.DataFrame) -> list[str]:
    """How SAM and weight decay change the networks that sweeps trained."""
    rho, decay = (pl.col(f"named.optim.{name}") for name in ("sam.rho", "weight_decay"))
    found = against_the_study(rows).filter(rho.is_not_null())
    found = found.with_columns(
        SAM=pl.when(rho > 0).then(pl.lit("on")).otherwise(pl.lit("off")),
        decay=decay.cast(pl.String),
    )
    lines = ["### Half of the channels gone, by recipe", ""]
    for stage in ("raw", "repaired"):
        at = half(found.filter(pl.col("stage") == stage))
        lines += [*by(at.sort("model", "decay", "SAM", maintain_order=True), ["model", "decay", "SAM"], stage), ""]
    return lines[:-1]


def half(found: pl.DataFrame) -> pl.DataFrame:
    return found.filter((pl.col("ratio") - 0.5).abs() < 1e-9)


def by(found: pl.DataFrame, keys: list[str], stage: str) -> list[str]:
    """Mean accuracies of the methods, one line for each value of the keys."""
    methods = list(dict.fromkeys(found["method"]))
    lines = [line(stage, [*keys[1:], "n", "dense", *methods]), "|---" * (len(keys) + 2 + len(methods)) + "|"]
    for values, group in found.partition_by(keys, as_dict=True, maintain_order=True).items():
        means = dict(group.group_by("method").agg(pl.col("acc").mean()).iter_rows())
        cells = [*values[1:], str(group[NETWORK].n_unique()), f"{group['dense'].mean():.1f}"]
        lines.append(line(values[0], [*cells, *(f"{means[m]:.1f}" for m in methods)]))
    return lines


def everything(rows: pl.DataFrame) -> list[str]:
    """All methods, on fewer networks."""
    found = against_the_study(rows)
    lines = [
        "### Every method",
        "",
        f"On {counted(found['model'], found[NETWORK])}; {found['n'].max():,} test pictures.",
        "",
    ]
    for stage in ("raw", "repaired"):
        lines += [
            f"Mean accuracy, {stage}:",
            "",
            *table(found.filter(pl.col("stage") == stage), "acc", signed=False),
            "",
        ]
    return lines[:-1]


def counted(models: Iterable[str], cells: Iterable[str]) -> str:
    named = dict(zip(cells, models, strict=True))
    names = list(named.values())
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def prediction(rows: pl.DataFrame) -> list[str]:
    """How well fidelity on synthetic pictures foretells, and how much choosing the method by it gains."""
    lines = [
        "### Foretold without data",
        "",
        "Fidelity (top-1 agreement times correlation with the dense network, on 128 synthetic pictures) against raw "
        "accuracies, and the difference of fidelity between fold or mix and the better of l1 and l2 against the gap "
        "of their accuracies. Spearman's rank correlations over networks, methods and ratios; a gap of more than 2 "
        f"points is clear. {rows['n'].max():,} test pictures.",
        "",
        line("networks", ["n", "accuracy", "gap", "winner named, of clear gaps"]),
        "|---|---|---|---|---|",
    ]
    groups = {"all": rows, **{model: rows.filter(pl.col("model") == model) for model in dict.fromkeys(rows["model"])}}
    for name, group in groups.items():
        if group[NETWORK].n_unique() < 3:
            continue
        told = foretold(group)
        assert told is not None
        cells = [f"{told.value:.2f}", f"{told.gap:.2f}", f"{told.sign:.0%} of {told.sure}"]
        lines.append(line(name, [str(group[NETWORK].n_unique()), *cells]))
    found = against_the_study(rows)
    best = pl.col("acc").filter(pl.col("method") != "auto").max().over(NETWORK, "ratio")
    found = found.with_columns(behind=best - pl.col("acc"))
    lines += ["", "Points behind the best of the others in hindsight, mean over networks:", ""]
    return [*lines, *table(found, "behind", signed=False)]


def tuning(rows: pl.DataFrame) -> list[str]:
    """Accuracies after an epoch of training, beside networks of the same size from scratch."""
    found = dense_rows(rows).with_columns(
        acc=100 * pl.col("acc"),
        ratio=pl.col("shrink.ratio"),
        method=pl.when(pl.col("checkpoint").is_null())
        .then(pl.format("from scratch, {} epochs", pl.col("trainer.max_epochs")))
        .otherwise(pl.col("shrink.method")),
    )
    lines = [
        "### Tuned for one epoch, and the same size from scratch",
        "",
        "Width 16, weight decay .005, no SAM: mean accuracy of the seeds. Dense networks had two epochs.",
    ]
    for (model,), of_model in found.sort("ratio", "method").partition_by("model", as_dict=True).items():
        lines += ["", f"{model}:", "", *table(of_model, "acc", signed=False, counts=True)]
    return lines


def table(
    found: pl.DataFrame, value: str, signed: bool = True, margin: bool = False, counts: bool = False
) -> list[str]:
    """Methods x ratios, means over the networks.

    margin: means over recipes, seeds averaged first, with half of a 95% interval; counts: add how many there are.
    """
    ratios = sorted(set(found["ratio"]))
    each = by_recipe(found, value) if margin else found
    mean = each.group_by("method", "ratio", maintain_order=True).agg(
        pl.col(value).mean().alias("mean"), std=pl.col(value).std(), n=pl.len()
    )
    at = {(method, ratio): rest for method, ratio, *rest in mean.iter_rows()}
    lines = [line("ratio removed", [f"{r:g}" for r in ratios]), "|---|" + "---|" * len(ratios)]
    for method in dict.fromkeys(found["method"]):
        cells = []
        for ratio in ratios:
            here, std, n = at.get((method, ratio), (None, None, 0))
            text = "-" if here is None else f"{here:+.1f}" if signed else f"{here:.1f}"
            if margin and (half := shown_half(std, n)) is not None:
                text += f" ±{half:.1f}"
            cells.append(text + f" (n {n})" * (counts and n > 0))
        lines.append(line(method, cells))
    return lines


def by_recipe(found: pl.DataFrame, value: str) -> pl.DataFrame:
    """The mean over the seeds of each recipe, for every method and ratio: seeds of one recipe are not independent."""
    return found.group_by("method", "ratio", "model", *TRAINED_BY, maintain_order=True).agg(pl.col(value).mean())


def sizes(rows: pl.DataFrame) -> list[str]:
    """Accuracy and MACs of every network whose methods differ in how they choose the sizes of groups."""
    found = measured(rows).filter(pl.col("stage") == "raw").with_columns(acc=100 * pl.col("acc"))
    ratios = sorted(set(found["ratio"]))
    lines = [
        "### Sizes by what groups can spare, at equal MACs: raw accuracy (million MACs)",
        "",
        f"{found['n'].max():,} test pictures.",
        "",
        line("network", ["method", *(f"{r:g}" for r in ratios)]),
        "|---|---|" + "---|" * len(ratios),
    ]
    for (_, method), group in found.partition_by(NETWORK, "method", as_dict=True, maintain_order=True).items():
        at = {r: f"{acc:.1f} ({count / 1e6:.1f})" for r, acc, count in group["ratio", "acc", "macs"].iter_rows()}
        lines.append(line(group["model"][0], [method, *(at[r] for r in ratios)]))
    even = found.with_columns(method=pl.col("method").str.strip_suffix("+macs"))
    sized = even.filter(found["method"].str.ends_with("+macs"))
    even = even.filter(~found["method"].str.ends_with("+macs"))
    won = sized.join(even, on=[NETWORK, "method", "ratio"], suffix="_even", maintain_order="left")
    won = won.with_columns(won=pl.col("acc") - pl.col("acc_even"))
    lines += ["", "Points that this wins, mean over the networks:", "", *table(won, "won", margin=True)]
    every = won.group_by("model", *TRAINED_BY).agg(pl.col("won").mean())["won"]
    spread = half_interval(every.std(), len(every))
    return [
        *lines,
        "",
        f"Over both and all ratios: {every.mean():+.1f} ±{spread:.1f} points (n {len(every)} recipes).",
    ]


if __name__ == "__main__":
    main()
