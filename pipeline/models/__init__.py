"""MODELS: every architecture by name. A builder takes the number of classes and of input channels, and its own options.

Adding a model is one row here and, where it needs code, one file.
"""

from collections.abc import Callable

from torch import nn

from pipeline.models.cifar_resnet import resnet20, resnet32
from pipeline.models.resnet import preact_resnet18, resnet18
from pipeline.tables import UserError, call, pick


def timm_model(classes: int, channels: int, architecture: str, pretrained: bool = False, **options) -> nn.Module:
    """Any model of timm by its name; options go to `timm.create_model` (img_size, patch_size, drop_path_rate, ...)."""
    import timm  # takes seconds, and most runs do not need it

    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture}*")[:5]
        hint = f"near it: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise UserError(f"unknown timm model {architecture!r}; {hint}")
    try:
        return timm.create_model(architecture, pretrained=pretrained, num_classes=classes, in_chans=channels, **options)
    except TypeError as error:  # timm's own constructors refuse unknown keywords
        raise UserError(f"timm model {architecture!r} with {options}: {error}") from error


def simple_vit(
    classes: int,
    channels: int,
    size: int = 32,
    patch_size: int = 4,
    dim: int = 512,
    depth: int = 6,
    heads: int = 16,
    mlp_dim: int = 1024,
) -> nn.Module:
    """SimpleViT (arXiv:2205.01580): sine positions, mean pooling. The folding study's small one: 18.93M parameters.

    size: side of the pictures in pixels, a multiple of patch_size; dim: channels of the stream, a multiple of 4;
    heads: of 64 channels each; mlp_dim: hidden channels of a block's MLP
    """
    from vit_pytorch import SimpleViT  # takes a moment, and most runs do not need it

    for name, value, unit in (("size", size, patch_size), ("dim", dim, 4)):
        if unit < 1 or value % unit:
            raise UserError(f"model 'simple_vit': {name} {value} must be a multiple of {unit}")
    return SimpleViT(
        image_size=size,
        patch_size=patch_size,
        num_classes=classes,
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_dim=mlp_dim,
        channels=channels,
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "preact_resnet18": preact_resnet18,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "simple_vit": simple_vit,
    "timm": timm_model,
}


def build_model(name: str, classes: int, channels: int, **options) -> nn.Module:
    """The network called `name` for (B, channels, H, W) pictures, with fresh weights."""
    return call(f"model {name!r}", pick("model", MODELS, name), classes, channels, **options)
