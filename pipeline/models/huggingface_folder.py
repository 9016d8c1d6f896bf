"""Writes a smaller model of transformers as a folder that `from_pretrained` reads, where a config can say its sizes."""

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.batches import tensors
from pipeline.compression.copies import bare_copy
from pipeline.example import Example, call_arguments
from pipeline.models.huggingface_models import Wrapped
from pipeline.models.library import muted
from pipeline.tables import UserError

FFN = ("intermediate_size", "n_inner", "ffn_dim")  # names in configs of the channels of hidden layers
HEADS = ("num_attention_heads", "num_key_value_heads")
FAR = 1e-4  # largest relative difference of outputs that rounding explains


def export_huggingface(model: nn.Module, example: Example, path: str | Path) -> float:
    """Write `model`, one of ours around one of transformers, as a folder with config.json and model.safetensors.

    The folder is read back and compared. Returns the largest relative difference of outputs for the example,
    ‖found - expected‖ / ‖expected‖. Raises UserError, and leaves no folder, for other models, and for sizes that no
    config can say, such as another number of hidden channels in each layer.
    """
    path = Path(path)
    if not isinstance(model, Wrapped):
        raise UserError(f"{type(model).__name__} is no model of transformers; export it as onnx or program")
    net = bare_copy(model).cpu().eval()
    made = like(net.model)
    made.generation_config = getattr(net.model, "generation_config", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, torch.no_grad(), muted():
        made.save_pretrained(folder)
        again = type(net)(type(made).from_pretrained(folder, dtype=next(made.parameters()).dtype)).eval()
        args, kwargs = call_arguments(example)
        args, kwargs = [a.cpu() for a in args], {k: v.cpu() for k, v in kwargs.items()}
        (expected,), (found,) = tensors(net(*args, **kwargs)), tensors(again(*args, **kwargs))
        difference = float((found - expected).norm() / expected.norm())
        if not difference <= FAR:
            raise UserError(f"the folder's outputs differ by {difference:.1e} from those of the network; keep its file")
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder, path)
    return difference


def like(model: Any) -> Any:
    """A model of transformers with the same tensors, built by a config that says their sizes."""
    wanted = {name: t.shape for name, t in model.state_dict().items()}
    made = type(model)(config_of(model))
    if {name: t.shape for name, t in made.state_dict().items()} == wanted:
        made.load_state_dict(model.state_dict())
        return made.eval()
    raise UserError(
        f"the config of {type(model).__name__} cannot say these sizes, which differ from layer to layer or within "
        "heads; keep the file, or compress by one ratio for all layers, parts=[hidden] or [head]"
    )


def config_of(model: Any) -> Any:
    """The config with the sizes that some of the model's tensors have; others may not follow it."""
    config = model.config
    with torch.device("meta"):
        full = type(model)(copy.deepcopy(config)).state_dict()
    pairs = {
        (before, after)
        for name, tensor in model.state_dict().items()
        for before, after in zip(full[name].shape, tensor.shape, strict=True)
        if before != after
    }
    changed = copy.deepcopy(config)
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    for before, after in sorted(pairs):
        for name in FFN:
            if hasattr(config, name) and before == (getattr(config, name) or 4 * config.hidden_size):
                setattr(changed, name, after)
        for name in HEADS:
            if head_dim and before == getattr(config, name, 0) * head_dim and after % head_dim == 0:
                setattr(changed, name, after // head_dim)
                changed.head_dim = head_dim
    return changed
