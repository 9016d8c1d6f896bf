"""A compressed network from its file: alone, where the file names an architecture of MODELS, or as a checkpoint."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.compression.checkpoint import load_compressed, read_manifest
from pipeline.models import MODELS, build_model
from pipeline.tables import UserError, call, pick


def load(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """(the compressed network in eval mode, its manifest). No weights are downloaded, no random number is drawn.

    Raises UserError as `load_compressed` does, and for a file that does not say its architecture.
    """
    return load_compressed(path, full_size(path))


def full_size(path: str | Path) -> nn.Module:
    """The network at full size that a file names, with fresh weights, in eval mode. UserError where it names none."""
    architecture = read_manifest(path)["architecture"]
    if "name" not in architecture:
        raise UserError(f"{path} does not say its architecture; build it and call load_compressed(path, model)")
    if "pretrained" in inspect.signature(pick("model", MODELS, architecture["name"])).parameters:
        architecture["pretrained"] = None  # the weights are those in the file
    with torch.random.fork_rng(devices=[]):
        return call(f"the architecture in {path}", build_model, **architecture).eval()


def load_as(path: str | Path, name: str, model: nn.Module) -> nn.Module:
    """The compressed network as a checkpoint of `model`, which `build_model` made under this name at full size.

    Raises UserError as `load_compressed` does, and for a file that names another model.
    """
    architecture = dict(read_manifest(path)["architecture"])
    saved = architecture.pop("name", name)
    if saved != name:
        raise UserError(f"{path} is a compressed {saved} of {architecture}, not a {name}; choose model={saved}")
    return load_compressed(path, model)[0]
