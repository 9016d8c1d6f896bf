"""Smaller modules: projected tensors put in the place of a network's own, and the numbers that follow their shapes."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compression.copies import deep_copy
from pipeline.compression.group import ChannelGroup
from pipeline.compression.merge.attention import NarrowMultiheadAttention
from pipeline.compression.merge.projection import Projection
from pipeline.compression.merge.tensors import compressed_tensors

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions of a weight


def apply(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    projections: Iterable[Projection],
    norm_scale: bool = True,
    share: bool = False,
    approximate_repair: bool = False,
) -> nn.Module:
    """A smaller copy of `model`: an ordinary module whose channel groups went through their projections.

    norm_scale: merge a weight and the norm behind it as one affine map (see `merge_norms`), rather than each tensor by
    its own mean.
    share: the tensors that do not change are the model's own, not copies.
    approximate_repair: running variances of merged channels follow the weights (see `repaired_variances`).
    """
    groups, projections = list(groups), list(projections)
    tensors = {name: t.detach() for name, t in named_tensors(model).items()}
    new = compressed_tensors(tensors, groups, projections, norm_scale, approximate_repair=approximate_repair)
    return resized(model, new, new_numbers(model, groups, projections), share)


def new_numbers(
    model: nn.Module, groups: Iterable[ChannelGroup], projections: Iterable[Projection]
) -> dict[str, int | float]:
    """{path of the attribute: new value} of the Python numbers that follow these groups.

    Raises ValueError where groups that share one number keep different fractions of their channels.
    """
    found: dict[str, int | float] = {}
    for group, projection in zip(groups, projections, strict=True):
        for number in group.numbers if not projection.is_identity else ():
            owner, _, attribute = number.path.rpartition(".")
            old = getattr(model.get_submodule(owner), attribute)
            new = old * (len(projection.counts) / group.size) ** number.power
            new = round(new) if isinstance(old, int) else new
            if found.setdefault(number.path, new) != new:
                raise ValueError(
                    f"groups that share {number.path} must keep the same number of channels: "
                    f"{group.name} makes it {new}, another {found[number.path]}"
                )
    return found


def resized(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int | float] | None = None,
    share: bool = False,
) -> nn.Module:
    """A copy of `model` with these tensors, by name and of any sizes, in place of its own.

    numbers: new values of sizes that modules keep as Python numbers, by the path of the attribute.
    share: the tensors that do not change are the model's own, not copies.
    """
    state = named_tensors(model)
    # deepcopy puts the new tensors in the place of the old ones, tied ones under all their names.
    memo: dict[int, Any] = {id(t): t for t in state.values()} if share else {}
    for name, given in tensors.items():
        old = state[name]
        new = laid_out_as(old, given)
        memo[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    changed = {id(memo[id(state[name])]) for name in tensors}
    smaller = deep_copy(model, memo)
    for module in smaller.modules():
        if any(id(t) in changed for t in module.parameters(recurse=False)):
            _follow_shape_(module)
    for path, value in (numbers or {}).items():
        owner, _, attribute = path.rpartition(".")
        module = smaller.get_submodule(owner)
        setattr(module, attribute, value)
        if type(module) is nn.MultiheadAttention and module.num_heads * module.head_dim != module.embed_dim:
            module.__class__ = NarrowMultiheadAttention
    return smaller


def laid_out_as(old: Tensor, new: Tensor) -> Tensor:
    """`new`, channels-last if `old` is: a convolution chooses its kernel by the layout of its weight."""
    layout = CHANNELS_LAST.get(old.dim())
    if layout is None or old.is_contiguous() or not old.is_contiguous(memory_format=layout):
        return new
    return new.contiguous(memory_format=layout)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{name: tensor} of the state_dict, parameters and persistent buffers; it may hold more than tensors."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _follow_shape_(module: nn.Module) -> None:
    """Bring the numbers that a layer states about itself in line with its weight."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return
    shape = tuple(weight.shape)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        if module.groups > 1:  # by whole groups
            module.groups = shape[0] // (module.in_channels // module.groups)
        module.in_channels, module.out_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:  # only depthwise convolutions are compressed
            multiplier = module.out_channels // module.groups
            module.groups = shape[0] // multiplier
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = shape[0] // (module.num_channels // module.num_groups)
        module.num_channels = shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
    elif hasattr(module, "nf") and len(shape) == 2:  # Conv1D of Hugging Face's GPT-2, a linear layer transposed
        module.nf = shape[1]
