"""The published study of "Cut Less, Fold More" (arXiv:2602.18116) as rows, apart from those that this code measured.

Two files hold its figures, read off the text logs of osaukh/folding_as_projection, output/: STUDY, one line a figure of
its 1,045 vision networks, and LLAMA, one line a perplexity of its 36 language models. `published` gives the accuracies
that the logs measured first, as a Sweep; `extras` gives every other figure of STUDY.

Three things are said here otherwise than in the logs. REPAIR is what follows the compression there: for convolutional
networks, BatchNorm statistics re-estimated on training pictures without a reset (our stage "repaired"); for
transformers, one supervised epoch on LayerNorm parameters (our "norm_tuned", because it sees labels). A file name gives
a rho also where SAM is off; here it is 0 then. Adam's momentum is written as 0; here it is null.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipeline.results import DENSE, SCHEMA, Row, table
from pipeline.study.sweep import Sweep
from pipeline.tables import UserError, first_line, pick

SOURCE = "osaukh/folding_as_projection"  # stands in the column `version`: this code measured none of these rows
STUDY = {
    "family": pl.String,
    "log": pl.String,
    "index": pl.Int64,
    "checkpoint": pl.String,
    "ratio": pl.Float64,
    "event": pl.String,
    "value": pl.Float64,
    "params": pl.Int64,
}
LLAMA = {
    "model": pl.String,
    "checkpoint": pl.String,
    "weight_decay": pl.Float64,
    "warmup_steps": pl.Int64,
    "max_lr": pl.Float64,
    "ratio": pl.Float64,
    "method": pl.String,
    "perplexity": pl.Float64,
}


@dataclass(frozen=True)
class Family:
    """Networks of one kind, which the study trained or took from elsewhere.

    model, data: by the names of configs/; n: test pictures; epochs: of training, None where no file says
    repair: the stage that its REPAIR is; scope: the parts that were compressed
    log: ending of the logs whose BASE, PRUNE and REPAIR become rows; fine-tuned epochs are in logs without an ending
    """

    model: str
    data: str
    n: int
    epochs: int | None
    repair: str = "repaired"
    scope: str = "hidden,residual"
    log: str = ""


CIFAR10, IMAGENET = 10_000, 50_000
FAMILIES = {
    "resnet18-adam": Family("resnet18", "cifar10", CIFAR10, 200),
    # Nobody fine-tuned the folded SGD networks, and their only log of folding is the one with sharpness.
    "resnet18-sgd": Family("resnet18", "cifar10", CIFAR10, 200, log="-sharpness"),
    "preactresnet18": Family("preact_resnet18", "cifar10", CIFAR10, 200),
    "vit": Family("simple_vit", "cifar10", CIFAR10, 200, "norm_tuned", "hidden"),
    # 22 of the 72 networks have a log with fine-tuning, all of them one without ("no epochs").
    "clip": Family("clip_vit_b32", "imagenet", IMAGENET, None, "norm_tuned", "hidden", "-noe"),
}
METHODS = {"fold": "fold", "mag-l1": "l1", "mag-l2": "l2"}
LLAMA_METHODS = {"dense": DENSE, "fold": "fold", "mag": "magnitude"}  # no file says which norm of the weights it takes
KINDS = {DENSE: DENSE, "fold": "fold", "l1": "prune", "l2": "prune", "magnitude": "prune"}
EPOCH = "FINETUNE_EPOCH"
TUNED = {f"{EPOCH}1": "tuned", **{f"{EPOCH}{k}": f"tuned {k} epochs" for k in range(2, 6)}}
CLEAN = "_CLEAN"  # ending of the events of logs with corruptions that repeat BASE and PRUNE
AUGMENTATIONS = {  # by family, and whether RandAugment was on
    ("resnet18", False): ["crop", "flip", "rotate"],
    ("resnet18", True): ["crop", "flip", "rotate", "rand_augment"],
    ("preactresnet18", False): [],
    ("preactresnet18", True): ["crop", "flip", "rand_augment"],
    ("vit", False): [],
    ("vit", True): ["crop", "flip", "rand_augment"],
}
# Settings by the keys that file names spell them with: "_lr=0.1_" or " lr_max=0.1 ".
NUMBERS = {
    "optim.lr": ("lr", "lr_max"),
    "optim.weight_decay": ("wd", "l2_reg"),
    "optim.l1": ("l1",),
    "optim.momentum": ("momentum",),
}
SCHEDULES = {"True": "cosine", "False": "constant", "cyclic": "cyclic"}

Warn = Callable[[str], None]


def published(path: str | Path, family: str | None = None, warn: Warn = warnings.warn) -> Sweep:
    """The study's networks as cells, and their accuracies (fractions) or perplexities as rows.

    family: these alone, one of FAMILIES; None: all networks of the file, null where a family lacks a setting
    warn: is told what the rows leave out: repeated figures, networks without a number, methods that are missing
    """
    columns = _columns(path)
    if columns == list(LLAMA):
        if family is not None:
            raise UserError(f"family {family!r}: {path} has language models alone; leave it out")
        return _llama(pl.read_csv(path, schema=LLAMA))
    if columns != list(STUDY):
        raise UserError(
            f"{path} has the columns {', '.join(columns)}; a CSV can be read where it holds the published study: "
            f"{', '.join(STUDY)}, or {', '.join(LLAMA)}"
        )
    if family is not None:
        pick("family", FAMILIES, family)
    figures = _figures(path, warn)
    figures = figures if family is None else figures.filter(pl.col("group") == family)
    rows, cells = figures.filter("is_row"), _cells(figures, warn)
    compressed = _compressed(rows.filter(pl.col("event") != "BASE"), warn)
    return Sweep(cells, pl.concat([_dense(rows, warn), compressed]).sort("cell", maintain_order=True))


def extras(path: str | Path) -> pl.DataFrame:
    """The figures of a STUDY file that are no rows of `published`, one line each.

    cell, family (one of FAMILIES), method, ratio, log; stage: that of the network that was measured, null at ratio 0;
    event and value: FD (mean distance between the outputs of the two networks on test pictures, in logits), SHARP_0 to
    SHARP_2 (adaptive worst-case rise of the loss, l-infinity, rho 1e-4, 5e-4 and 1e-3, in nats), CORR (mean accuracy
    over corruptions, %), and BASE, PRUNE or REPAIR (accuracy, %) of logs that compressed the same network once more.
    """
    columns = _columns(path)
    if columns != list(STUDY):
        raise UserError(f"{path} has no figures but perplexities; give a file with the columns {', '.join(STUDY)}")
    figures = _figures(path, warn=lambda text: None).filter(~pl.col("is_row"))
    # For these two the scripts of CLIP measure before they tune norms, those of the others behind the repair.
    early = (pl.col("family") == "clip") & pl.col("event").str.contains("CORR|SHARP")
    raw = early | (pl.col("event") == "PRUNE")
    stage = pl.when(raw).then(pl.lit("raw")).otherwise(_by_group("repair"))
    stage = pl.when(pl.col("ratio") > 0).then(stage)
    return figures.with_columns(stage=stage, family="group").select(
        "cell", "family", "method", "ratio", "log", "stage", "event", "value"
    )


# --- the figures


def _columns(path: str | Path) -> list[str]:
    try:
        return pl.read_csv(path, n_rows=0, infer_schema=False).columns
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} cannot be read as CSV: {first_line(error)}") from error


def _figures(path: str | Path, warn: Warn) -> pl.DataFrame:
    """The lines of a STUDY file with group (one of FAMILIES), method, cell, event without CLEAN, and is_row."""
    try:
        found = pl.read_csv(path, schema=STUDY)
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    parts = pl.col("log").str.extract_groups(r"^(?:(adam|sgd)-)?(fold|mag-l1|mag-l2)(-[a-z]+)?$").struct
    found = found.with_columns(optimizer=parts[0], method=parts[1], ending=parts[2].fill_null(""))
    group = pl.concat_str("family", "optimizer", separator="-", ignore_nulls=True)
    found = found.with_columns(group=group, event=pl.col("event").str.strip_suffix(CLEAN))
    strange = found.filter(pl.col("method").is_null() | ~pl.col("group").is_in(list(FAMILIES)))
    if len(strange):
        family, log = strange.select("family", "log").row(0)
        raise UserError(f"{path}: log {log!r} of family {family!r} is not known; known: {', '.join(FAMILIES)}")
    found = found.with_columns(
        cell=_names(found.select("group", "checkpoint")),
        method=pl.col("method").replace_strict(METHODS),
        is_row=pl.when(pl.col("event").is_in(list(TUNED)))
        .then(pl.col("ending") == "")
        .when(pl.col("event").is_in(["BASE", "PRUNE", "REPAIR"]))
        .then(pl.col("ending") == _by_group("log"))
        .otherwise(False),
    )
    return _once(found, warn)


def _once(figures: pl.DataFrame, warn: Warn) -> pl.DataFrame:
    """Each figure once; `warn` is told of lines that repeat one, because no mean is taken over them."""
    once = figures.unique(["cell", "log", "ratio", "event"], keep="first", maintain_order=True)
    if repeated := len(figures) - len(once):
        warn(f"{repeated} figures stand more than once in their log; the first of each counts")
    return once


def _by_group(name: str) -> pl.Expr:
    """A field of the family that a figure belongs to."""
    return pl.col("group").replace_strict({group: getattr(family, name) for group, family in FAMILIES.items()})


def _names(checkpoints: pl.DataFrame) -> pl.Series:
    """The cell of each (group, checkpoint): the group and eight digits of the file name's hash, as our cells have."""
    digits = {name: hashlib.sha256(name.encode()).hexdigest()[:8] for name in checkpoints["checkpoint"].unique()}
    hashes = pl.col("checkpoint").replace_strict(digits, return_dtype=pl.String)
    return checkpoints.select(pl.concat_str(pl.first(), hashes, separator="-")).to_series()


# --- rows


def _dense(rows: pl.DataFrame, warn: Warn) -> pl.DataFrame:
    """One row per cell from the BASE lines of its three logs, which must agree."""
    base = rows.filter(pl.col("event") == "BASE")
    several = base.group_by("cell").agg(pl.col("value").n_unique()).filter(pl.col("value") > 1)
    if len(several):
        warn(f"{len(several)} networks have another dense accuracy in each log; the first one counts")
    return _rows(base.unique("cell", keep="first", maintain_order=True).with_columns(method=pl.lit(DENSE)))


def _compressed(rows: pl.DataFrame, warn: Warn) -> pl.DataFrame:
    """Rows of PRUNE, REPAIR and fine-tuned epochs.

    Where one of the two prunings is missing, both are left out: the better of two and one alone are no equal rivals.
    """
    prunings = pl.col("method").is_in(["l1", "l2"])
    lonely = rows.filter(prunings).group_by("cell", "event", "ratio").len().filter(pl.col("len") == 1)
    if len(lonely):
        networks = lonely["cell"].n_unique()
        warn(f"{len(lonely)} figures of {networks} networks have one of l1 and l2 alone and are left out")
        alone = rows.filter(prunings).join(lonely, on=["cell", "event", "ratio"], how="semi")
        rows = rows.join(alone, on=["cell", "event", "ratio", "method"], how="anti", maintain_order="left")
    return _rows(rows)


def _rows(figures: pl.DataFrame) -> pl.DataFrame:
    """The figures in the columns of SCHEMA."""
    event = pl.col("event")
    stage = pl.when(event == "REPAIR").then(_by_group("repair")).otherwise(event.replace_strict(TUNED, default="raw"))
    figures = figures.with_columns(stage=stage)
    missing = pl.col("value").is_nan()
    normed = _by_group("repair") == "repaired"  # networks with BatchNorm
    dense = pl.col("method") == DENSE

    def compressed(value: pl.Expr) -> pl.Expr:
        return pl.when(~dense).then(value)

    return _schema(
        figures.with_columns(
            model=_by_group("model"),
            data=_by_group("data"),
            n=_by_group("n"),
            epoch=_by_group("epochs").fill_null(0),
            seed=_spelled("seed").cast(pl.Int64).fill_null(0),
            acc=pl.when(~missing).then(pl.col("value") / 100),
            status=pl.when(missing).then(pl.lit("failed")).otherwise(pl.lit("ok")),
            reason=pl.when(missing).then(pl.lit("the log has no number")).otherwise(pl.lit("")),
            task=pl.lit("classification"),
            metric=pl.lit("acc"),
            kind=pl.col("method").replace_strict(KINDS),
            scope=compressed(_by_group("scope")),
            calibration=compressed(pl.lit("none")),
            sizes=compressed(pl.lit("uniform")),
            statistics=compressed(
                pl.when((pl.col("stage") == "raw") | ~normed).then(pl.lit("none")).otherwise(pl.lit("data"))
            ),
        )
    )


def _schema(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with all columns of SCHEMA: what the study does not say is as in a Row that says nothing."""
    silent = Row("", "", "", seed=0, epoch=0, step=0, method="", ratio=0.0, stage="", split="test", version=SOURCE)
    said = table([silent]).row(0, named=True)
    filled = [pl.lit(said[name], dtype).alias(name) for name, dtype in SCHEMA.items() if name not in rows.columns]
    return rows.with_columns(filled).select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items())


# --- cells


def _cells(figures: pl.DataFrame, warn: Warn) -> pl.DataFrame:
    """One line per network, with the settings that its file name spells.

    A network that has a figure that is no number is "failed": training had diverged, and its outputs are NaN.
    """
    lost = pl.col("value").is_nan().sum()
    cells = figures.group_by("cell", "group", "family", "checkpoint", maintain_order=True).agg(lost=lost)
    if failed := len(cells.filter(pl.col("lost") > 0)):
        warn(f"{failed} networks give outputs that are NaN; they count as failed")
    diverged = pl.col("lost") > 0
    return cells.select(
        "cell",
        state=pl.when(diverged).then(pl.lit("failed")).otherwise(pl.lit("done")),
        reason=pl.when(diverged).then(pl.lit("its outputs are NaN: the training diverged")).otherwise(pl.lit("")),
        seconds=pl.lit(0.0),
        **_settings(),
        **{"checkpoint.source": pl.lit(SOURCE)},
    )


def _settings() -> Mapping[str, pl.Expr]:
    """The settings by our names, null where a file name does not spell them."""
    numbers = {name: pl.coalesce(_spelled(key).cast(pl.Float64) for key in keys) for name, keys in NUMBERS.items()}
    adam = pl.col("group") == "resnet18-adam"
    augmented = pl.coalesce(_spelled("rand_aug"), _spelled("randaug")) == "True"
    augment = pl.coalesce(
        pl.when((pl.col("family") == family) & (augmented == on)).then(pl.lit(json.dumps(names)))
        for (family, on), names in AUGMENTATIONS.items()
    )
    rho = pl.when(_spelled("sam") == "False").then(0.0).otherwise(_spelled("sam_rho").cast(pl.Float64))
    return {
        "model.name": _by_group("model"),
        "data.name": _by_group("data"),
        "optim.name": _spelled("opt"),
        **numbers,
        "optim.momentum": pl.when(~adam).then(numbers["optim.momentum"]),
        "optim.sam.rho": rho,
        "optim.schedule.name": _spelled("lr_schedule").replace_strict(SCHEDULES, default=None),
        "data.augment": augment,
        "seed": _spelled("seed").cast(pl.Int64),
        # The soup's networks are told apart by their number alone; without it they would be seeds of one recipe.
        "soup.member": pl.col("checkpoint").str.extract(r"^model_(\d+)\.pt$").cast(pl.Int64),
        "checkpoint": pl.col("checkpoint"),
    }


def _spelled(key: str) -> pl.Expr:
    """The value of "key=value" in the file name, between underscores or between spaces."""
    return pl.col("checkpoint").str.extract(rf"(?:^|[_ ]){key}=([^_ ]+?)(?:[_ ]|\.pth$|$)")


# --- language models


def _llama(figures: pl.DataFrame) -> Sweep:
    """Rows of perplexity: the channels of the gated hidden layers were compressed, and nothing was done behind it."""
    strange = figures.filter(~pl.col("method").is_in(list(LLAMA_METHODS)))
    if len(strange):
        raise UserError(f"method {strange['method'][0]!r} is not known; known: {', '.join(LLAMA_METHODS)}")
    figures = figures.with_columns(
        model=pl.concat_str(pl.lit("llama_"), "model"), method=pl.col("method").replace_strict(LLAMA_METHODS)
    )
    figures = figures.with_columns(cell=_names(figures.select("model", "checkpoint")))
    compressed = pl.col("method") != DENSE
    rows = figures.with_columns(
        data=pl.lit("c4"),
        stage=pl.lit("raw"),
        task=pl.lit("language"),
        metric=pl.lit("perplexity"),
        kind=pl.col("method").replace_strict(KINDS),
        calibration=pl.when(compressed).then(pl.lit("none")),
        sizes=pl.when(compressed).then(pl.lit("uniform")),
        scope=pl.when(compressed).then(pl.lit("hidden")),
        statistics=pl.when(compressed).then(pl.lit("none")),
    )
    cells = figures.unique("cell", keep="first", maintain_order=True).select(
        "cell",
        state=pl.lit("done"),
        reason=pl.lit(""),
        seconds=pl.lit(0.0),
        **{
            "model.name": pl.col("model"),
            "data.name": pl.lit("c4"),
            "optim.lr": pl.col("max_lr"),
            "optim.weight_decay": pl.col("weight_decay"),
            "optim.schedule.warmup_steps": pl.col("warmup_steps"),
            "checkpoint": pl.col("checkpoint"),
            "checkpoint.source": pl.lit(SOURCE),
        },
    )
    return Sweep(cells, _schema(rows))
