"""MODELS: every architecture by name. A builder takes the facts of the data and its own options.

Facts are `classes` and `channels` of pictures, `vocabulary` and `context` of texts.

Adding a model is one row here and, where it needs code, one file.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from pipeline.models.cifar_resnet import resnet20, resnet32
from pipeline.models.huggingface_models import huggingface_input, huggingface_model
from pipeline.models.language_models import language_model, llama
from pipeline.models.library import InputConfig
from pipeline.models.open_clip_models import open_clip_input, open_clip_model
from pipeline.models.resnet import preact_resnet18, resnet18
from pipeline.models.resnet9 import resnet9
from pipeline.models.simple_vit import simple_vit
from pipeline.models.timm_models import timm_input, timm_model
from pipeline.models.torchvision_models import torchvision_input, torchvision_model
from pipeline.tables import UserError, call, first_line, pick

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "preact_resnet18": preact_resnet18,
    "resnet9": resnet9,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "simple_vit": simple_vit,
    "timm": timm_model,
    "torchvision": torchvision_model,
    "open_clip": open_clip_model,
    "huggingface": huggingface_model,
    "llama": llama,
    "language_model": language_model,
}

# By model name: a function of the builder's options that gives the pictures which the library's model was trained on.
INPUTS: dict[str, Callable[..., InputConfig | None]] = {
    "timm": timm_input,
    "torchvision": torchvision_input,
    "open_clip": open_clip_input,
    "huggingface": huggingface_input,
}


READS = {"pictures": ("classes", "channels"), "text": ("vocabulary", "context")}  # facts of the data, by their kind


def build_model(name: str, *facts: int, **options: Any) -> nn.Module:
    """The network called `name`; its weights are fresh unless `pretrained` is set.

    facts: the first arguments of the builder, of the data (see READS); they may also stand among the options.
    Raises UserError for a model of pictures that is given facts of texts, and the reverse.
    """
    builder = pick("model", MODELS, name)
    needed = reads(name)
    for kind, names in READS.items():
        if kind != needed and any(fact in options for fact in names):
            own = ", ".join(other for other in MODELS if reads(other) == kind)
            raise UserError(f"model {name!r} reads {needed}, the data are {kind}; choose other data, or from: {own}")
    for fact in READS[needed][len(facts) :]:  # by position, so that errors list the model's own options alone
        if fact not in options:
            raise TypeError(f"missing argument of model {name!r}: {fact!r}")
        facts = (*facts, options.pop(fact))
    check_sizes(name, builder, options)
    try:
        return call(f"model {name!r}", builder, *facts, **options)
    except RuntimeError as error:  # shapes that do not fit each other
        raise UserError(f"model {name!r} with {options}: {first_line(error)}") from error


def check_sizes(name: str, builder: Callable[..., Any], options: dict[str, Any]) -> None:
    """UserError for an option that is a size of the builder and no whole number of at least 1."""
    for option, parameter in inspect.signature(builder).parameters.items():
        value = options.get(option, 1)
        if parameter.annotation in (int, "int") and isinstance(value, int | float) and (value < 1 or value % 1):
            raise UserError(f"model.{option} {value} must be a whole number of at least 1 (model {name!r})")


def reads(name: str) -> str:
    """The kind of data that a model reads: "pictures" or "text"."""
    first = next(iter(inspect.signature(MODELS[name]).parameters))
    return next(kind for kind, names in READS.items() if first in names)


def input_config(name: str, **options: Any) -> InputConfig | None:
    """How pictures are made ready for the network that `build_model` makes from the same name and options.

    Neither the network nor its weights are needed. None: nothing is known, as for our own models, which take pictures
    of any size.
    """
    pick("model", MODELS, name)
    return call(f"model {name!r}", INPUTS[name], **options) if name in INPUTS else None
