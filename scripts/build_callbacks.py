"""Builds the callbacks of a training: what measures it, what makes its network smaller, what counts its tokens."""

from pathlib import Path

from lightning import Callback, LightningDataModule

from callbacks import CompressionCallback, Shrink, Throughput
from callbacks.pacing import Pacing
from callbacks.shrink import NO_ACCUMULATION, NO_AVERAGES, TUNED
from pipeline.data.corruptions import corruptions
from pipeline.entries import Entry
from pipeline.results import ROWS
from pipeline.tables import UserError, call, pick
from scripts.build_network import architecture_of, task_of
from scripts.config import Config, without
from scripts.naming import row_context


def compression_options(config: Config, data: LightningDataModule) -> Config:
    """The settings of compression; corruptions also know how the pictures of the data are normalised."""
    options = config["compression"]
    if (asked := corruptions(options["corruptions"])) is None:
        return options
    if data.kind != "pictures":
        raise UserError(f"compression.corruptions are of pictures, and the data are {data.unit}; set it to null")
    known = {key: data.preparation()[key] for key in ("mean", "std")}
    return {**options, "corruptions": {"names": list(asked.names), "severity": asked.severity, **known}}


def build_compression(config: Config, cell: str, folder: Path, data: LightningDataModule) -> CompressionCallback:
    options = without(compression_options(config, data), "save")
    return call(
        "compression",
        CompressionCallback,
        **options,
        task=task_of(config, data),
        rows=folder / ROWS,
        save_to=folder / "compressed" if config["compression"]["save"] else None,
        architecture=architecture_of(config, data),
        context=row_context(config, cell),
        seed=config["seed"],
    )


def check_validation(config: Config, data: LightningDataModule) -> None:
    """UserError where training would measure on validation samples and there are none."""
    if len(data.val_data) or not (config["compression"]["every_n_epochs"] or config["shrink"]["method"]):
        return
    raise UserError(
        f"data.val_fraction {config['data']['val_fraction']:g} leaves no samples to validate on; hold some out "
        "(data.val_fraction=0.1), or measure on the test samples alone (compression.every_n_epochs=0, no shrink)"
    )


# What goes back after a step of `shrink`: nothing; the learning rate's schedule, which starts anew
# (arXiv:2003.02389); or weights, too (arXiv:1803.03635).
REWINDS: dict[str, str | None] = {"false": None, "true": "rate", "weights": "weights"}


def rewound(config: Config) -> str | None:
    """What goes back after a step, in the words of REWINDS."""
    return pick("shrink.rewind", REWINDS, str(config["shrink"]["rewind"]).lower())


def shrink_pacing(config: Config) -> Pacing | None:
    """The steps of `shrink`; None where it is off"""
    options = config["shrink"]
    if options["method"] is None:
        return None
    return call("shrink", Pacing, **without(options, "method", "rewind", "rewind_to"))


def training_length(config: Config, data: LightningDataModule, pacing: Pacing) -> int:
    """The epochs, or the batches, of the training, in the unit of the steps of `shrink`."""
    trainer, epochs = config["trainer"], config["trainer"]["max_epochs"]
    if pacing.unit == "epochs":
        return epochs
    batches, limit = len(data.train_dataloader()), trainer.get("limit_train_batches")
    if isinstance(limit, float):
        batches = int(batches * limit)
    return epochs * (min(batches, limit) if isinstance(limit, int) else batches)


def build_shrink(config: Config, folder: Path, data: LightningDataModule) -> list[Shrink]:
    pacing = shrink_pacing(config)
    if pacing is None:
        return []
    options = {key: config["compression"][key] for key in ("round_to", "parts", "repair_size")}
    options |= without(config["shrink"], "rewind", "rewind_to")
    pacing.check(training_length(config, data, pacing))
    if rewound(config) == "weights":
        options["rewind_to"] = config["shrink"]["rewind_to"]
    if pacing.unit == "batches" and config["trainer"]["accumulate_grad_batches"] > 1:
        raise UserError(NO_ACCUMULATION)
    if config["optim"]["ema"]:
        raise UserError(NO_AVERAGES)
    file = Entry(options["method"], options["ratio"], TUNED).file
    shrink = call(
        "shrink",
        Shrink,
        **options,
        task=task_of(config, data),
        save_to=folder / "compressed" / file,
        architecture=architecture_of(config, data),
        seed=config["seed"],
    )
    return [shrink]


def build_throughput(data: LightningDataModule) -> list[Callback]:
    return [Throughput()] if data.kind == "text" else []
