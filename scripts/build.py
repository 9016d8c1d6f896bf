"""Builds the objects that a resolved config names. Config objects stop here: parts get plain arguments."""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from callbacks import CompressionCallback, EpochSeed, Shrink, Throughput
from callbacks.pacing import Pacing
from callbacks.progress import progress
from callbacks.resume import WholeCheckpointIO, latest_checkpoint
from callbacks.shrink import NO_ACCUMULATION, NO_AVERAGES, TUNED
from pipeline.cells import flat
from pipeline.compressed import load_as
from pipeline.compression.checkpoint import is_compressed, source_of
from pipeline.data import DATASETS
from pipeline.data.corruptions import corruptions
from pipeline.data.module import module_of
from pipeline.data.picture_set import DataSource, PictureSet
from pipeline.entries import Entry
from pipeline.loggers import WANDB_MODES, check_login, wandb_logger
from pipeline.models import build_model, input_config
from pipeline.models.checkpoint import load_into, read_state, weight_files
from pipeline.optim import build_schedule
from pipeline.results import ROWS
from pipeline.sharpness import asked_for
from pipeline.tables import UserError, call, first_line, pick
from pipeline.tasks import TASKS, USUAL, Task
from pipeline.training import Training
from scripts.labels import label_of
from scripts.stop import check_processes

Config = dict[str, Any]


def resolved(config: DictConfig) -> Config:
    """Plain dicts and lists, every value set."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} is not set; give it on the command line: {missing[0]}=...")
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return plain


def check(config: Config) -> None:
    """UserError for values that the parts would refuse too late, or not in one line."""
    values = flat(config)
    for key, least in {"seed": 0, "trainer.max_epochs": 1, "trainer.accumulate_grad_batches": 1}.items():
        value = values.get(key, least)
        if not isinstance(value, int) or value < least:
            raise UserError(f"{key} {value} must be a whole number of at least {least}")
    if not re.fullmatch(r"[\w.-]+", str(config["name"])):
        raise UserError(f"name {config['name']!r} becomes a folder's name; use letters, digits, '.', '_' and '-'")
    if "trainer" in config:
        trainer = config["trainer"]
        check_processes(trainer["accelerator"], trainer["devices"], torch.cuda.is_available())
    mode = values.get("wandb.mode", "auto")
    pick("wandb.mode", dict.fromkeys(WANDB_MODES), mode)
    check_login(mode)
    if values.get("wandb.artifacts") and not values["compression.save"] and values["shrink.method"] is None:
        raise UserError(
            "wandb.artifacts=true uploads the smaller networks that a run keeps, and this one keeps none; add "
            "compression.save=true"
        )
    asked_for((config.get("compression") or {}).get("sharpness"))  # {} has no name in the hash of the cell


# Settings that are younger than cells that people have, with the values at which they change nothing: a cell's name
# leaves them out there.
AT_REST: dict[str, tuple[Any, ...]] = {
    "task.name": (None,),
    "compile": (False,),
    "optim.decay": ("all",),
    "checkpoint_prefix": (None,),
    "compression.sharpness": (None, False),
    "compression.corruptions": (None,),
    "shrink.every_n_batches": (None,),
    "shrink.pace": ("geometric",),
    "shrink.layers": (None,),
    "shrink.rewind_to": (0,),
}

# Settings that say where a cell runs and what it shows, which leaves its results alone, so its name leaves them out.
# Chains run behind a training or on a checkpoint, and their stages have names of their own.
WHERE = (
    "paths wandb device named save_every_n_steps data.root data.workers data.download data.cache trainer.accelerator "
    "trainer.enable_progress_bar trainer.enable_model_summary trainer.log_every_n_steps chain chains teachers"
).split()

# Parts of a training that are off unless their switch is set.
SWITCHES = {"shrink": "method", "distil": "teacher"}


def recipe_of(config: Config) -> str:
    """Name that the cells of one recipe share: of a config without its seed."""
    return cell_of(without(config, "seed"))


def cell_of(config: Config) -> str:
    """Name of the run, with a hash of every setting that changes its results: those of WHERE do not."""
    where = [*WHERE, *["profile"] * ("trainer" in config)]  # a training times the networks of its chains alone
    what = {key: value for key, value in flat(config).items() if not under(key, where)}
    source = DATASETS.get(config["data"]["name"])
    usual = {**AT_REST, "task.name": (None, source and USUAL[module_of(config["data"]["name"]).kind])}
    what = {key: value for key, value in what.items() if value not in usual.get(key, ())}
    if source and source.root_names_data:
        what["data.root"] = Path(config["data"]["root"]).name
    if config["checkpoint"] is not None:
        what["checkpoint"] = file_hash(config["checkpoint"])
    for part, switch in SWITCHES.items():
        chosen = config.get(part, {}).get(switch)
        if chosen is None:  # settings of a part that is off change nothing
            what = {key: value for key, value in what.items() if not under(key, [part])}
        elif switch == "teacher":
            what[f"{part}.{switch}"] = teacher_hash(chosen, config)
    architecture = Path(str(config["model"].get("architecture", "")))
    if architecture.name and architecture.is_dir():  # a folder of Hugging Face is the same wherever it lies
        what["model.architecture"] = architecture.name
    if architecture.suffix == ".gguf" and architecture.is_file():
        what["model.architecture"] = file_hash(str(architecture))
    # 1 and 1.0 are the same learning rate
    what = {key: float(value) if isinstance(value, int) else value for key, value in what.items()}
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return f"{config['name']}-{digest[:10]}"


def file_hash(path: str) -> str:
    """SHA-256 of a checkpoint's content: of the file, or of the weight files of a folder, wherever they lie."""
    try:
        digests = [_digest(file, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(path)]
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror}); check its permissions") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def teacher_hash(name: str, config: Config) -> str:
    """What a teacher is: one of `teachers`, or the file of this name. UserError for a file that is not there."""
    told = teacher_told(name, config)
    path = told.get("checkpoint")
    return ("" if path is None else file_hash(path)) + json.dumps(told.get("model"), sort_keys=True)


def teacher_told(name: str, config: Config) -> Config:
    """{"checkpoint", "model"} of a teacher, each where it is said."""
    told = (config["teachers"] or {}).get(name, {"checkpoint": name})
    if not isinstance(told, Mapping) or not set(told) <= {"checkpoint", "model"}:
        raise UserError(f"teachers.{name} must be {{checkpoint: FILE, model: {{name: ...}}}}, got {told!r}")
    return dict(told)


@lru_cache(16)  # one cell needs it several times, and hashing a large file takes a second
def _digest(file: Path, size: int, changed: int) -> str:
    return source_of(file)["sha256"]


def under(key: str, names: Iterable[str]) -> bool:
    """Is the dotted `key` one of `names` or inside of one?"""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")  # in a folder of Hugging Face
OF_PICTURES = ("mixup", "cutmix", "mean", "std")  # settings in base.yaml that other data do not have


def build_data(config: Config) -> LightningDataModule:
    return load_data(**data_options(config))


def data_options(config: Config) -> Config:
    """Arguments of `load_data`. Settings that data. leaves open come from the model's library (timm, ...).

    data.preprocessing names another model, and then its library decides. Size and crop are set only for data that is
    cropped: other pictures have one size, which is then the network's.
    """
    options = {**config["data"], "seed": config["seed"]}
    if module_of(options["name"]).kind != "pictures":
        options = {key: value for key, value in options.items() if key not in OF_PICTURES or value}
    if options.get("tokenizer", "") is None:
        options |= tokenizer_of(config["model"])
    known = None if options.get("preprocessing") else input_config(**config["model"])
    if known is None:
        return {**options, "usual": None}
    for key in ("size", "crop_pct", "interpolation"):
        if "crop_pct" in options and options[key] is None:
            options[key] = getattr(known, key)
    return {**options, "usual": [list(known.mean), list(known.std)]}


def tokenizer_of(model: Config) -> Config:
    """Arguments of the data by which a text is read as the model was trained; a model of ours takes any tokenizer."""
    if "architecture" not in model:
        return {"tokenizer": "bpe"}
    source = Path(model["architecture"]).expanduser()
    if source.is_dir() and not any((source / name).is_file() for name in TOKENIZERS):
        raise UserError(
            f"{source} has no tokenizer ({TOKENIZERS[0]}); give the one that it was trained with as data.tokenizer, "
            "and with it data.vocabulary=null"
        )
    return {"tokenizer": str(source), "vocabulary": None}


def load_data(usual: list[list[float]] | None, **options: Any) -> LightningDataModule:
    """The data, ready to use. usual: mean and std to normalise by unless options set others; None: those of the set."""
    data = call("data", module_of(options["name"]), **options)
    if usual is not None:
        data.source = normalised_by(data.source, *usual)
    data.prepare_data()
    data.setup()
    return data


def normalised_by(source: DataSource, mean: list[float], std: list[float]) -> DataSource:
    """The same source, whose pictures are normalised by this mean and std if they have as many channels."""

    @wraps(source.load)
    def load(**options: Any) -> PictureSet:
        pictures = source.load(**options)
        return replace(pictures, mean=mean, std=std) if len(pictures.mean) == len(mean) else pictures

    return replace(source, load=load)


def without_weights(model: Config) -> Config:
    """The same architecture for weights of a file: nothing is downloaded, and no head is made of class names."""
    linear = {"head": "linear"} if model.get("head") == "zero_shot" else {}
    return {**model, **({"pretrained": None} if "pretrained" in model else {}), **linear}


def architecture_of(config: Config, data: LightningDataModule) -> Config:
    """The architecture from which `pipeline.compressed.load` builds a network of this config."""
    return {**without_weights(config["model"]), **data.facts()}


def build_net(config: Config, data: LightningDataModule, tell: bool = False) -> nn.Module:
    """The network, with the weights of the checkpoint where one is given: a compressed one is as small as its file.

    tell: print which tensors of the file are left out.
    """
    path = config["checkpoint"]
    model = config["model"] if path is None else without_weights(config["model"])
    net = build_model(**model, **data.facts())
    if path is not None and is_compressed(path):
        return load_as(path, model["name"], net)
    if path is not None:
        left_out = load_into(net, read_state(path), path, config.get("checkpoint_prefix"))
        if left_out and tell:
            names = ", ".join(left_out[:3]) + ", ..." * (len(left_out) > 3)
            print(f"{len(left_out)} tensors of {path} are no part of the network and left out: {names}")
    return net


def task_of(config: Config, data: LightningDataModule) -> Task:
    """What is trained on and measured: the task that config names, else that of the data."""
    usual, facts = USUAL[data.kind], data.facts()
    name = config["task"]["name"] or usual
    builder = pick("task", TASKS, name)
    if next(iter(inspect.signature(builder).parameters)) not in facts:
        raise UserError(f"task {name!r} is not for {data.unit}; leave it out for {usual!r}, or choose other data")
    return call("task", builder, **facts, **without(config["task"], "name"))


def build_task(config: Config, data: LightningDataModule) -> Training:
    net = build_net(config, data)
    net = net.to(memory_format=torch.channels_last)  # convolutions train 1.7 times as fast on a CPU
    optim = config["optim"]
    loss = {key: optim[key] for key in ("l1", "l2", "sam", "decay")}
    loss |= {key: config[key] for key in ("label_smoothing", "compile")}
    pacing = shrink_pacing(config)
    steps = list(pacing.ratios) if pacing and rewound(config) else []
    restarts = [place / training_length(config, data) for place in steps]
    task = call(
        "optim",
        Training,
        net=net,
        task=task_of(config, data),
        optim=without(optim, "schedule", "l1", "l2", "sam", "ema", "decay"),
        schedule=optim["schedule"],
        restarts=restarts,
        **loss,
    )
    check_training(config, task)
    norms = [name for name, module in task.net.named_modules() if isinstance(module, _BatchNorm)]
    if norms and config["data"]["batch_size"] == 1:
        raise UserError(f"data.batch_size 1 gives BatchNorm ({norms[0]}) nothing to normalise over; take 2 or more")
    return task


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


def training_length(config: Config, data: LightningDataModule) -> int:
    """The epochs, or the batches, of the training, in the unit of the steps of `shrink`."""
    trainer, pacing = config["trainer"], shrink_pacing(config)
    epochs = trainer["max_epochs"]
    if pacing is None or pacing.unit == "epochs":
        return epochs
    batches, limit = len(data.train_dataloader()), trainer.get("limit_train_batches")
    if isinstance(limit, float):
        batches = int(batches * limit)
    return epochs * (min(batches, limit) if isinstance(limit, int) else batches)


def build_shrink(config: Config, folder: Path, data: LightningDataModule) -> list[Shrink]:
    if config["shrink"]["method"] is None:
        return []
    options = {key: config["compression"][key] for key in ("round_to", "parts", "repair_size")}
    options |= without(config["shrink"], "rewind", "rewind_to")
    pacing = shrink_pacing(config)
    assert pacing is not None
    pacing.check(training_length(config, data))
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


def row_context(config: Config, cell: str) -> dict[str, Any]:
    """The fields of a Row that the config decides."""
    model = config["model"]
    name = model.get("architecture", model["name"])
    name = Path(name).name if Path(name).exists() else name
    return {"cell": cell, "model": name, "data": config["data"]["name"], "seed": config["seed"]}


def build_trainer(
    config: Config,
    cell: str,
    folder: Path,
    compression: CompressionCallback,
    more: Sequence[Callback] = (),
    quiet: bool = False,
) -> Trainer:
    """The Trainer of a run.

    more: callbacks that come before the one that compresses
    quiet: no progress bars, because those of many cells would overwrite each other
    """
    options = {**config["trainer"], "enable_progress_bar": config["trainer"]["enable_progress_bar"] and not quiet}
    callbacks: list[Callback] = [
        EpochSeed(config["seed"]),
        *more,
        compression,
        *call("checkpoints", latest_checkpoint, folder, config["save_every_n_steps"]),
    ]
    callbacks += call("optim", averaging, ema=config["optim"]["ema"])
    if options["enable_progress_bar"]:
        middle = min(compression.chains.ratios, key=lambda ratio: abs(ratio - 0.5))
        callbacks.append(progress(list(compression.chains.recipes), middle))
        options["enable_progress_bar"] = isinstance(callbacks[-1], ProgressBar)
    label = label_of(config, recipe_of(config), WHERE)
    loggers = [
        CSVLogger(folder, name="metrics"),  # a folder version_<n> for every start, resumed ones too
        call("wandb", wandb_logger, folder, cell, config, label, **config["wandb"]),
    ]
    return lightning_trainer(
        **options,
        default_root_dir=folder,
        logger=[logger for logger in loggers if logger is not None],
        callbacks=callbacks,
        plugins=[WholeCheckpointIO()],
    )


def lightning_trainer(**options: Any) -> Trainer:
    try:
        return call("trainer", Trainer, **options)
    except (MisconfigurationException, ModuleNotFoundError) as error:  # an accelerator whose library is not there
        raise UserError(f"trainer: {first_line(error)}") from error


def check_training(config: Config, task: Training) -> None:
    """UserError for settings that would otherwise be refused when the folder of the run is there already."""
    taken = {"callbacks", "logger", "default_root_dir", "plugins"} & set(config["trainer"])
    if taken:
        raise UserError(f"trainer.{min(taken)} is set by the script; the callbacks of a run follow from its config")
    call("optim", averaging, ema=config["optim"]["ema"])
    latest_checkpoint(".", config["save_every_n_steps"])
    build_schedule(task.build_optimizer(), 1000, config["optim"]["schedule"], task.restarts)
    lightning_trainer(**{**config["trainer"], "logger": False, "enable_checkpointing": False})


def averaging(ema: float) -> list[Callback]:
    if not 0 <= ema < 1:
        raise UserError(f"optim.ema {ema} must be in 0 < decay < 1, or 0 for none")
    return [EMAWeightAveraging(decay=ema)] if ema else []
