"""Networks that others learn from, by name: in the stage distil, and in training (distil.teacher=)."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import nn

from pipeline.compressed import load
from pipeline.compression.checkpoint import is_compressed, read_manifest
from pipeline.compression.group import DEFAULT_PARTS
from pipeline.compression.trace.graph import channel_groups
from pipeline.data.text.module import TextData
from pipeline.data.text.tokenizers import Fast, load_tokenizer
from pipeline.evaluate import output_on, outputs
from pipeline.models.checkpoint import read_content
from pipeline.stages.distil import Lesson
from pipeline.tables import UserError, call
from pipeline.tasks import Task
from pipeline.tasks.distilled import check_alike
from pipeline.training import Training
from scripts.build_data import has_tokenizer
from scripts.build_network import build_net
from scripts.config import Config, without
from scripts.naming import teacher_told


def teacher(name: str, config: Config, data: LightningDataModule, device: torch.device) -> nn.Module:
    """A teacher in eval mode: one of `teachers`, {name: {checkpoint: FILE, model: {...}}}, or a file.

    A file is a compressed network that says its architecture, or weights of this config's model. UserError for a model
    that nobody trained, and for one that reads texts by another tokenizer than that of the data.
    """
    told = teacher_told(name, config)
    path, model = told.get("checkpoint"), told.get("model", config["model"])
    if path is None and not model.get("pretrained"):
        raise UserError(
            f"teacher {name!r} has no trained weights; give them as teachers.{name}.checkpoint=FILE, or a model with "
            "pretrained"
        )
    if isinstance(data, TextData):
        check_tokenizer(name, path, model.get("architecture"), data)
    if path is not None and is_compressed(path) and "model" not in told:
        return load(path)[0].to(device).eval()
    net = build_net({"checkpoint": path, "model": model}, data)
    return net.to(device).eval()


def check_tokenizer(name: str, path: str | None, architecture: str | None, data: TextData) -> None:
    """UserError for a teacher of another tokenizer, whose tokens are other words by the same numbers.

    A warning where neither the teacher's file nor the folder of its architecture says which tokenizer it has.
    """
    ours, folder = data.tokenizer, folder_with_tokenizer(path, architecture)
    theirs = tokenizer_in(path)
    if theirs is None and folder is not None:
        read = load_tokenizer(str(folder))
        # One tokenizer may be written down in two ways, so the words behind the ids decide.
        alike = isinstance(ours, Fast) and isinstance(read, Fast) and ours.words() == read.words()
        theirs = ours.identity if alike else read.identity
    if theirs is None:
        warnings.warn(
            f"teacher {name!r} does not say its tokenizer; it is taken to be that of the data, {data.tokenizer_name}",
            RuntimeWarning,
            stacklevel=2,
        )
    elif theirs != ours.identity:
        raise UserError(
            f"teacher {name!r} has another tokenizer than the data, {data.tokenizer_name}: the same ids are other "
            "words to it; choose a teacher that was trained with this one, or the teacher's as data.tokenizer"
        )


def tokenizer_in(path: str | None) -> str | None:
    """The identity of the tokenizer that a file names: a compressed network, or a checkpoint of a training on texts."""
    if path is None or Path(path).is_dir():
        return None
    if is_compressed(path):
        return read_manifest(path)["about"].get(TextData.unit, {}).get("identity")
    kept = read_content(Path(path))
    state = kept.get(TextData.__qualname__) if isinstance(kept, dict) else None  # by Lightning, under the class's name
    return state.get("tokenizer") if isinstance(state, dict) else None


def folder_with_tokenizer(*places: str | None) -> Path | None:
    """The first of these places that is a folder with a tokenizer."""
    return next(filter(has_tokenizer, (Path(place).expanduser() for place in places if place)), None)


def learning(module: Training, config: Config, data: LightningDataModule) -> Training:
    """The training on the answers of `distil.teacher`, where there is one. UserError for a teacher of other classes.

    The teacher is part of no module and of no checkpoint; it follows the network to its device.
    """
    name = config["distil"]["teacher"]
    lesson = call("distil", Lesson, **lesson_options(config))
    if name is None:
        return module
    check_together(config)
    wise = teacher(name, config, data, torch.device("cpu")).requires_grad_(False)
    try:
        check_alike(*(module.task.answers(output_on(net, data.example)) for net in (module.net, wise)))
    except UserError as error:
        raise UserError(f"distil.teacher {name!r}: {error}") from error
    hints = lesson.hints(module.net, wise, data.example, lambda: channel_groups(wise, data.example, DEFAULT_PARTS))
    module.task = lesson.task(module.task, answering(wise, module.task, module), hints)
    if hints is not None:
        module.regressors = hints.regressors
    return module


def lesson_options(config: Config) -> Config:
    """The arguments of a Lesson: YAML has lists where a record has tuples."""
    options = without(config["distil"], "teacher")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def check_together(config: Config) -> None:
    """UserError for settings that cannot go with the features of a teacher."""
    if not config["distil"]["features"]:
        return
    for setting, on in (("shrink.method", config["shrink"]["method"]), ("compile", config["compile"])):
        if on:
            raise UserError(f"distil.features look into the network, which {setting} changes; leave one of them out")


def answering(wise: nn.Module, task: Task, module: nn.Module) -> Callable[[Any], Any]:
    """batch -> the answers of the teacher, without gradients, on the device of the module's network."""

    @torch.no_grad()
    def answer(batch: Any) -> Any:
        device = next(module.parameters()).device
        if next(wise.parameters()).device != device:
            wise.to(device)
        return outputs(wise, task, batch)

    return answer
