"""Builds the network that a resolved config names, and the task that it is trained and measured on."""

import inspect

from lightning import LightningDataModule
from torch import nn

from pipeline.compressed import load_as
from pipeline.compression.checkpoint import is_compressed
from pipeline.models import build_model
from pipeline.models.checkpoint import load_into, read_state
from pipeline.tables import UserError, call, pick
from pipeline.tasks import TASKS, USUAL, Task
from scripts.config import Config, without


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
