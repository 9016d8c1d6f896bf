"""Image classifiers of Hugging Face transformers, from a folder or from the hub."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.library import InputConfig, muted, side, trained_weights
from pipeline.tables import UserError, optional

RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
SETTINGS = "preprocessor_config.json"


class Wrapped(nn.Module):
    """Around a model of transformers, so that it takes and gives plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def names_of_today(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file under the names that this version of transformers has for them.

        transformers renames its modules from time to time but not the tensors in its files, so names in a file differ
        from those of its state_dict. Tensors that it does not know keep their names.
        """
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        with muted():
            found, report = type(self.model).from_pretrained(
                None,
                config=self.model.config,
                state_dict=dict(state),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
        known = {name: t for name, t in found.state_dict().items() if name not in report["missing_keys"]}
        # Tensors of other shapes are not loaded into `found`; empty ones keep their names and shapes for the error.
        known |= {name: torch.empty(shape, device="meta") for name, shape, _ in report["mismatched_keys"]}
        known |= {name: state[name] for name in report["unexpected_keys"]}
        return {f"model.{name}": tensor for name, tensor in known.items()}


class ImageClassifier(Wrapped):
    """(B, channels, H, W) pictures to (B, classes) logits, around a model that returns its logits in a record."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def huggingface_model(
    classes: int, channels: int, architecture: str, pretrained: bool = True, **options: Any
) -> nn.Module:
    """An image classifier of transformers. Options change its config (image_size, hidden_dropout_prob, ...).

    architecture: a folder with config.json and safetensors, or a name on the hub; code that comes with a model is
        never run
    pretrained: with its weights; the classifier is new unless it has as many classes
    """

    def check(config: Any) -> None:
        expected = getattr(config, "num_channels", channels)
        if expected != channels:
            raise UserError(f"{architecture} takes {expected} channels, these pictures have {channels}; use model=timm")

    options["num_labels"] = classes
    return ImageClassifier(auto_model("AutoModelForImageClassification", architecture, pretrained, check, options))


def auto_model(
    auto: str, architecture: str, pretrained: bool, check: Callable[[Any], None], options: Mapping[str, Any]
) -> nn.Module:
    """The model that a class of transformers, `auto`, makes for this architecture, in float32 and in training mode.

    check: raises where the config does not fit the data; options: change the config
    """
    transformers = optional("this model", "transformers", "huggingface")
    transformers.logging.disable_progress_bar()
    source, file = source_of(architecture)
    # Bars of transformers can be switched off, but for the one of GGUF files.
    with loading(source), redirect_stderr(StringIO()) if file else nullcontext():
        config, unknown = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=False, return_unused_kwargs=True, **file, **options
        )
        unknown.pop("gguf_file", None)
        if unknown:
            raise UserError(f"the config of {architecture} has no {min(unknown)!r}")
        check(config)
        factory = getattr(transformers, auto)
        if not pretrained:
            return factory.from_config(config, dtype=torch.float32)
        model = factory.from_pretrained(
            source,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # a classifier may have other classes
            dtype=torch.float32,  # whatever the file's is
            **file,
        )
    return model.train()


def huggingface_input(architecture: str, **_: Any) -> InputConfig | None:
    """The InputConfig of the model's preprocessor_config.json; None where there is none.

    Where that file would squash pictures to a square, we crop them.
    """
    transformers = optional("this model", "transformers", "huggingface")
    source, _ = source_of(architecture)
    if source.is_dir() and not (source / SETTINGS).is_file():
        return None
    with loading(source):
        found, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source)
    size, share = side(found["size"]), found.get("crop_pct", 1.0)
    if found.get("do_center_crop"):
        crop = side(found["crop_size"])
        size, share = crop, crop / size
    return InputConfig(
        size=size,
        crop_pct=share,
        mean=tuple(found["image_mean"]),
        std=tuple(found["image_std"]),
        interpolation=RESAMPLE.get(found["resample"], "bicubic"),
    )


def source_of(architecture: str) -> tuple[Path, dict[str, str]]:
    """(path of a local folder, or a name on the hub, which looks like a path; {"gguf_file": name} of a GGUF in it)"""
    source = Path(architecture).expanduser()
    if source.suffix == ".gguf" and source.is_file():
        for package in ("gguf", "accelerate"):  # transformers reads the files with both
            optional("a GGUF file", package, "gguf")
        return source.parent, {"gguf_file": source.name}
    if not source.is_dir() and (architecture.startswith((".", "~", "/")) or len(source.parts) > 2):
        raise UserError(f"no folder {source}; give one that has config.json, or a name on the hub")
    return source, {}


def loading(source: Path) -> AbstractContextManager[None]:
    fix = "give the folder of one that is whole" if source.is_dir() else "give its folder as model.architecture"
    return trained_weights(f"Hugging Face's {source}", hub=not source.is_dir(), fix=fix)
