"""The classifiers of torchvision."""

from typing import Any

from torch import nn
from torchvision import models
from torchvision.models import Weights

from pipeline.models.checkpoint import load_into
from pipeline.models.library import InputConfig, check_known, trained_weights
from pipeline.tables import UserError, pick

AUXILIARY = ("googlenet", "inception_v3")  # these have auxiliary classifiers, which give further logits in training


def torchvision_model(
    classes: int, channels: int, architecture: str = "resnet50", pretrained: bool | str = False, **options: Any
) -> nn.Module:
    """A classifier of torchvision. Options go to torchvision's builder (dropout, ...).

    pretrained: with torchvision's best weights of ImageNet-1K, or with those of a name such as "IMAGENET1K_V1"; the
        classifier is new unless it has as many classes
    """
    trained = weights_of(architecture, pretrained)
    if channels != 3:
        raise UserError(
            f"torchvision's {architecture} takes 3 channels, these pictures have {channels}; use model=timm"
        )
    if architecture in AUXILIARY:
        # The trained weights want pictures in -1..1; transform_input turns ImageNet's normalisation into that.
        options = {"aux_logits": False, "init_weights": not pretrained, "transform_input": bool(pretrained)} | options
    net = models.get_model(architecture, weights=None, num_classes=classes, **options)
    if pretrained:
        with trained_weights(f"torchvision's {architecture}", hub=False):
            state = trained.get_state_dict(progress=True, check_hash=True)
        own, theirs = net.state_dict(), len(trained.meta["categories"])
        state = {name: tensor for name, tensor in state.items() if name in own or "aux" not in name.lower()}
        if classes != theirs:  # a layer with one row for each class is the classifier
            rows = [n for n, t in state.items() if n in own and len(t.shape) and len(t) == theirs]
            state |= {name: own[name] for name in rows if len(own[name]) == classes}
        load_into(net, state, f"torchvision's {architecture}")
    return net


def torchvision_input(architecture: str = "resnet50", pretrained: bool | str = False, **_: Any) -> InputConfig:
    found = weights_of(architecture, pretrained).transforms()
    size = found.crop_size[0]
    return InputConfig(
        size, size / found.resize_size[0], tuple(found.mean), tuple(found.std), found.interpolation.value
    )


def weights_of(architecture: str, pretrained: bool | str) -> Weights:
    check_known("torchvision model", architecture, models.list_models(models), "torchvision.models.list_models()")
    named = pretrained if isinstance(pretrained, str) else "DEFAULT"
    return pick(f"weights of {architecture}", models.get_model_weights(architecture).__members__, named)
