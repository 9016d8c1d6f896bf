"""Any model of timm by its name."""

from typing import Any

from torch import nn

from pipeline.models.library import InputConfig, check_known, trained_weights
from pipeline.tables import UserError


def timm_model(classes: int, channels: int, architecture: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """A model of timm. Options go to `timm.create_model` (img_size, patch_size, drop_path_rate, ...).

    pretrained: with timm's weights; the classifier is new unless it has as many classes, and the first layer's weights
        are fitted to the channels
    """
    import timm  # takes seconds to import, and most runs do not need it

    check(architecture)
    options |= {"num_classes": classes, "in_chans": channels}
    try:
        if not pretrained:
            return timm.create_model(architecture, **options)
        with trained_weights(f"timm's {architecture}"):
            return timm.create_model(architecture, pretrained=True, **options)
    except TypeError as error:  # timm's own constructors refuse unknown keywords
        raise UserError(f"timm model {architecture!r} with {options}: {error}") from error


def timm_input(architecture: str, img_size: int | None = None, **_: Any) -> InputConfig:
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    check(architecture)
    trained = get_pretrained_cfg(architecture)
    found = resolve_data_config({"img_size": img_size}, pretrained_cfg=trained.to_dict() if trained else {})
    return InputConfig(
        found["input_size"][-1], found["crop_pct"], tuple(found["mean"]), tuple(found["std"]), found["interpolation"]
    )


def check(architecture: str) -> None:
    import timm

    if not timm.is_model(architecture):
        check_known("timm model", architecture, timm.list_models(), "timm.list_models()")
