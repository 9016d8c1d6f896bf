"""Compensation: every layer that reads compressed channels is solved anew, so that it puts out what it did before.

A layer that read x (I inputs) with the weight W now reads x' (I' inputs) from a network whose earlier layers are
compressed, and compensated already. Its new weight W' has the least E‖W x - W' x'‖² + λ m ‖W' - S‖², where S are the
cluster sums, to which it keeps where the pictures do not say (ridge regression; m is the mean of E[x'²]). For a
convolution x is the patch under its kernel, I = channels x taps (as OBC, arXiv:2208.11580, does for single weights):
the neighbours of a pixel tell of a channel that is gone what the other channels at that pixel cannot. (Transposed ones
and those that pad by themselves are solved for one factor a channel, as GRAIL does.)

GRAIL (arXiv:2602.23795) takes for x' the cluster means of the dense network's x, pixel by pixel, which is right for
kept channels of an exact x. Here x' is what the smaller network really computes: what earlier layers get wrong is
mended as far as it can be seen in x', and for merged channels nothing is assumed. Statistics of BatchNorm follow on the
way (see repair.py), before what reads behind them is solved: the other way round they would undo it. All of it takes
one pass through each of the networks.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.compression.graph import Example, call_arguments
from pipeline.compression.group import ChannelGroup
from pipeline.compression.projection import Projection, compressed_tensors, merged_inputs, named_tensors
from pipeline.compression.repair import STATISTICS, follow_, tracked_norms
from pipeline.tables import pick

Hook = Callable[[Any, tuple[Tensor, ...]], None]

ROWS = 8192  # pixels or tokens that are looked at in a layer, drawn from all pictures
# λ of above, by what readers are solved on: the same within a point from 1e-3 to 1e-1, and as in GRAIL's paper.
RIDGES = {"smaller": 1e-2, "dense": 1e-3}
# Those that pad within (timm's Conv2dSame) see other patches than they say.
PLAIN = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class Seen(NamedTuple):
    """What a network does on some pictures.

    inputs: {weight: (rows, inputs)} of what the layers that read channels are given, rows = pixels or tokens: at most
        ROWS, drawn alike for every network. Of linear layers and convolutions that the forward calls, once.
    outputs: {weight: (outputs, rows)} of those that see patches (`sees_patches`), less their biases; here rows are
        pixels of the output
    statistics: {buffer: (C,)}, means and variances of the BatchNorms on these pictures
    """

    pictures: Example
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    statistics: dict[str, Tensor]


@torch.no_grad()
def observe(model: nn.Module, groups: Iterable[ChannelGroup], pictures: Example) -> Seen:
    """One pass over the pictures, which are one batch of network inputs."""
    seen, calls = Seen(pictures, {}, {}, {}), Counter[nn.Module]()

    def keep(name: str, layer: Any, given: tuple[Tensor, ...]) -> None:
        calls[layer] += 1
        seen.inputs[name] = _rows(layer, given[0])
        if sees_patches(layer):
            seen.outputs[name] = (_patches(layer, given[0]) @ _wide(matrix(layer.weight, 1, taps=True))).T

    def measure(name: str, norm: Any, given: tuple[Tensor, ...]) -> None:
        calls[norm] += 1
        for kind, found in zip(STATISTICS, channel_moments(given[0]), strict=True):
            seen.statistics[f"{name}.{kind}"] = found

    reads = {axis.tensor: axis.axis for group in groups for axis in group.reads if not axis.query}
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in reads}
    hooks: list[tuple[nn.Module, Hook]] = [
        (layer, partial(keep, name)) for name, layer in layers.items() if input_dim(layer) == reads[name]
    ]
    hooks += [(norm, partial(measure, name)) for name, norm in tracked_norms(model).items()]
    _watched(model, hooks, pictures)
    for found in seen[1:]:  # what is called twice cannot be right for both
        for name in [n for n in found if calls[model.get_submodule(n.rpartition(".")[0])] > 1]:
            del found[name]
    return seen


@torch.no_grad()
def compensate_(
    smaller: nn.Module,
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    projections: Iterable[Projection],
    seen: Seen,
    *,
    norm_scale: bool = True,
    ridge: float | None = None,
    solve_on: str = "smaller",
) -> list[str]:
    """In place: the BatchNorms of `smaller` follow and its readers are solved, in the order of the forward pass.

    smaller: apply(model, groups, projections, norm_scale); seen: observe(model, groups, pictures).
    A statistic changes by as much as it does on the pictures, so pictures that are not quite the training ones will do.
    solve_on: "smaller", or "dense" for GRAIL: x' are the cluster means of x, and statistics stay as they are.
    ridge: λ of the module; None: that of RIDGES.
    Returns the weights that were solved. What else reads channels (queries; weights that a forward uses without
    calling their layer, or more than once) keeps its cluster sums.
    """
    usual_ridge = pick("solve_on", RIDGES, solve_on)
    ridge = usual_ridge if ridge is None else ridge
    groups, projections = list(groups), list(projections)
    tensors = {name: t.detach() for name, t in named_tensors(model).items()}
    work = [g for g, p in zip(groups, projections, strict=True) if not p.is_identity]
    reads = [axis for group in work for axis in group.reads]
    queries = {axis.tensor for axis in reads if axis.query}
    changed = {axis.tensor: axis.axis for axis in reads if axis.tensor not in queries}  # and which of its axes

    def narrowed(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All tensors with the new outputs, and the inputs of before."""
        return {**tensors, **compressed_tensors(tensors, groups, projections, norm_scale, reads=False)}

    mends = solve_on == "smaller"
    # What a layer puts out is merged as the rows of its weight are, in whose place it stands.
    written = narrowed({**tensors, **seen.outputs} if mends else tensors)
    on_pictures = narrowed({**tensors, **seen.statistics}) if mends and seen.statistics else {}
    solved: list[str] = []

    def solve(name: str, layer: Any, given: tuple[Tensor, ...]) -> None:
        dim, taps = changed[name], mends and name in seen.outputs
        if taps:
            inputs, wanted = _patches(layer, given[0]), written[name].T
        else:
            before = seen.inputs[name]
            inputs = _rows(layer, given[0]) if mends else merged_inputs(before, name, groups, projections)
            wanted = before @ _wide(matrix(written[name], dim, taps))
        now = _wide(matrix(layer.weight, dim, taps))
        moments, missing = (inputs.T @ inputs).double(), (inputs.T @ (wanted - inputs @ now)).double()
        scale = moments.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        moments.diagonal().add_(ridge * scale)
        set_matrix_(layer.weight, dim, taps, now + torch.linalg.solve(moments, missing))
        solved.append(name)

    def estimate(name: str, norm: Any, given: tuple[Tensor, ...]) -> None:
        follow_(norm, channel_moments(given[0]), [on_pictures[f"{name}.{kind}"] for kind in STATISTICS])

    hooks: list[tuple[nn.Module, Hook]] = [
        (smaller.get_submodule(name.rpartition(".")[0]), partial(solve, name))
        for name in seen.inputs
        if name in changed
    ]
    norms = {name.rpartition(".")[0] for name in seen.statistics}
    hooks += [(smaller.get_submodule(name), partial(estimate, name)) for name in norms if mends]
    _watched(smaller, hooks, seen.pictures)
    return solved


def channel_moments(x: Tensor, correction: int = 0) -> tuple[Tensor, Tensor]:
    """STATISTICS, variance (correction as of torch.var) and mean, of (N, C, ...) over all but the channels."""
    x = _wide(x).reshape(*x.shape[:2], -1)  # (N, C, pixels)
    count = x.shape[0] * x.shape[2]
    mean = x.sum(2).sum(0) / count
    centred = x - mean[:, None]
    # On the CPU torch.var_mean takes twice as long, its gradient, too, and was half of a compensation.
    return torch.linalg.vecdot(centred, centred).sum(0) / (count - correction), mean


def input_dim(layer: nn.Module) -> int | None:
    """The dimension of a layer's weight along which its inputs stand; None: a layer whose inputs cannot be read off."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        if layer.groups > 1:
            return None
        return 0 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 1
    if isinstance(layer, nn.Linear):
        return 1
    return 0 if hasattr(layer, "nf") else None  # Conv1D of Hugging Face's GPT-2, a linear layer transposed


def sees_patches(layer: Any) -> bool:
    """Is it a convolution whose outputs do not stand for one pixel of the input each?"""
    return type(layer).forward in PLAIN and max(*layer.kernel_size, *layer.stride) > 1


def matrix(weight: Tensor, dim: int, taps: bool) -> Tensor:
    """A weight as (inputs, outputs), its inputs along `dim`; taps: every tap of a channel is an input of its own."""
    return weight.flatten(1).T if taps else weight.movedim(dim, 0).flatten(1)


def set_matrix_(weight: Tensor, dim: int, taps: bool, new: Tensor) -> None:
    """In place: the weight whose `matrix` is the new one."""
    weight.copy_(new.T.reshape(weight.shape) if taps else new.view_as(weight.movedim(dim, 0)).movedim(0, dim))


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """(rows, inputs) of what the layer is given, at most ROWS, from the same places in every network."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        x = x.movedim(-1 - len(layer.kernel_size), -1)
    rows = x.reshape(-1, x.shape[-1])
    return _wide(rows[_drawn(len(rows)).to(x.device)])


def _patches(layer: Any, x: Tensor) -> Tensor:
    """(rows, inputs x taps) of what a convolution sees for pixels of its output, at most ROWS, the same everywhere."""
    sides = len(layer.kernel_size)
    x = x if x.dim() == sides + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    for i, (size, stride, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + i, gap * (size - 1) + 1, stride)[..., ::gap]
    places = x.movedim(1, 1 + sides)  # (N, pixels..., channels, taps...)
    shape = places.shape[: 1 + sides]
    return _wide(places[torch.unravel_index(_drawn(shape.numel()).to(x.device), shape)].flatten(1))


def _drawn(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:ROWS]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _watched(model: nn.Module, hooks: Iterable[tuple[nn.Module, Hook]], pictures: Example) -> None:
    """One forward pass in eval mode, with hooks before these layers."""
    handles = [layer.register_forward_pre_hook(hook) for layer, hook in hooks]
    training = [module for module in model.modules() if module.training]
    args, kwargs = call_arguments(pictures)
    try:
        model.eval()
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
