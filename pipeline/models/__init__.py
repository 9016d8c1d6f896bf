"""MODELS: every architecture by name. A builder takes the number of classes and of input channels, and its own options.

Adding a model is one row here and, where it needs code, one file.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from pipeline.models.cifar_resnet import resnet20, resnet32
from pipeline.models.huggingface_models import huggingface_input, huggingface_model
from pipeline.models.library import InputConfig
from pipeline.models.open_clip_models import open_clip_input, open_clip_model
from pipeline.models.resnet import preact_resnet18, resnet18
from pipeline.models.simple_vit import simple_vit
from pipeline.models.timm_models import timm_input, timm_model
from pipeline.models.torchvision_models import torchvision_input, torchvision_model
from pipeline.tables import call, pick

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "preact_resnet18": preact_resnet18,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "simple_vit": simple_vit,
    "timm": timm_model,
    "torchvision": torchvision_model,
    "open_clip": open_clip_model,
    "huggingface": huggingface_model,
}

# By model name: a function of the builder's options that gives the pictures which the library's model was trained on.
INPUTS: dict[str, Callable[..., InputConfig | None]] = {
    "timm": timm_input,
    "torchvision": torchvision_input,
    "open_clip": open_clip_input,
    "huggingface": huggingface_input,
}


def build_model(name: str, classes: int, channels: int, **options: Any) -> nn.Module:
    """The network called `name` for (B, channels, H, W) pictures; its weights are fresh unless `pretrained` is set."""
    return call(f"model {name!r}", pick("model", MODELS, name), classes, channels, **options)


def input_config(name: str, **options: Any) -> InputConfig | None:
    """How pictures are made ready for the network that `build_model` makes from the same name and options.

    Neither the network nor its weights are needed. None: nothing is known, as for our own models, which take pictures
    of any size.
    """
    pick("model", MODELS, name)
    return call(f"model {name!r}", INPUTS[name], **options) if name in INPUTS else None
