"""Tensors of a checkpoint as the network uses them: masks applied, parametrizations computed, all dense and float.

Training code keeps a weight as something else where it prunes it by a mask, normalises it, stores it sparse or in eight
bits. Every such form is a row of FORMS.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.tables import UserError

# Wrappers of submodules leave these in the middle of names.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def masked(original: Tensor, mask: Tensor) -> Tensor:
    """A weight under torch.nn.utils.prune."""
    return original * mask


def weight_normed(g: Tensor, v: Tensor) -> Tensor:
    """g v / ||v||, the norm over all axes that g does not have (arXiv:1602.07868, equation 2)."""
    axes = [axis for axis, size in enumerate(g.shape) if size == 1]
    return g * v / torch.linalg.vector_norm(v, dim=axes or None, keepdim=bool(axes))


def spectral_normed(original: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """W / (uᵀ W v), with W as a matrix whose rows are axis 0 (arXiv:1802.05957, equation 8)."""
    return original / (u @ original.flatten(1) @ v)


class Form(NamedTuple):
    """endings: what stands behind "conv.weight" in the names of the parts; whole: the weight from these parts."""

    endings: tuple[str, ...]
    whole: Callable[..., Tensor]


FORMS = (
    Form(("_orig", "_mask"), masked),
    Form(("_orig", "_u", "_v"), spectral_normed),
    Form(("_g", "_v"), weight_normed),
    Form((".original0", ".original1"), weight_normed),
    Form((".original", ".0._u", ".0._v"), spectral_normed),
)
PARAMETRIZED = "parametrizations."


def plain(state: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """The same weights under the names and in the form that an ordinary module has them.

    UserError where a weight is computed by a parametrization that is no row of FORMS.
    """
    found = {WRAPPERS.sub("", name): dense(tensor) for name, tensor in state.items()}
    for name in [name for name in found if PARAMETRIZED in name or name.endswith(("_orig", "_g"))]:
        if name in found:
            put_together_(found, name, path)
    return found


def put_together_(state: dict[str, Tensor], part: str, path: object) -> None:
    """Replace the parts of the weight that this tensor is one of by the weight; nothing where it is no such part."""
    for form in FORMS:
        stem = part.removesuffix(form.endings[0])
        names = [stem + ending for ending in form.endings]
        is_new = PARAMETRIZED in stem
        if stem == part or is_new != (form.endings[0][0] == ".") or not all(name in state for name in names):
            continue
        if is_new and len([name for name in state if name.startswith(f"{stem}.")]) > len(names):
            continue  # a chain of several parametrizations
        state[stem.replace(PARAMETRIZED, "")] = form.whole(*(state.pop(name) for name in names))
        return
    if PARAMETRIZED in part:
        weight = re.sub(r"\.(original\d*|\d+\..*)$", "", part)
        raise UserError(
            f"{path} computes {weight.replace(PARAMETRIZED, '')} by a parametrization that its tensors do not tell; "
            "call torch.nn.utils.parametrize.remove_parametrizations on the layer, then save its state_dict()"
        )


def dense(tensor: Tensor) -> Tensor:
    """The tensor without sparse storage and without quantization."""
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()
