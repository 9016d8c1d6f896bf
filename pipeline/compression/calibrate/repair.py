"""Repair: BatchNorm statistics, re-estimated on unlabelled data after compression."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pipeline.compression.group import ChannelGroup
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.merge.projection import Projection
from pipeline.compression.merge.tensors import compressed_tensors
from pipeline.example import Example, call_arguments
from pipeline.tables import UserError

STATISTICS = ("running_var", "running_mean")  # of BatchNorm
SHOWN = 1e-4  # fraction of a channel's training variance that pictures must show, or its statistics stay
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


def tracked_norms(model: nn.Module) -> dict[str, _NormBase]:
    """The normalisations of a model that keep running statistics, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _NormBase) and m.running_mean is not None}


def norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The gains and shifts of all norms of a model."""
    return {p for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False)}


def is_norm(module: nn.Module) -> bool:
    """Libraries write norms of their own (LlamaRMSNorm): a class that is called one and holds a vector at most."""
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return isinstance(module, NORMS) or (named and all(p.dim() == 1 for p in module.parameters(recurse=False)))


class Reference(NamedTuple):
    """BatchNorm statistics that repair starts from, {buffer: (C,)}, as if compression had changed none of them.

    trained: those of training; on_pictures: those on the pictures, which are not quite the training data.
    """

    trained: Mapping[str, Tensor]
    on_pictures: Mapping[str, Tensor]


def reference(
    model: nn.Module,
    on_pictures: Mapping[str, Tensor],
    groups: Sequence[ChannelGroup] = (),
    projections: Sequence[Projection] = (),
    norm_scale: bool = True,
) -> Reference:
    """The statistics of `model`, and on_pictures = statistics(model, batches), both merged by the projections."""
    tensors = {name: t.detach() for name, t in named_tensors(model).items()}

    def merged(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        edited = compressed_tensors({**tensors, **found}, groups, projections, norm_scale, reads=False)
        return {name: edited.get(name, tensor) for name, tensor in found.items()}

    return Reference(merged({name: tensors[name] for name in on_pictures}), merged(on_pictures))


@torch.no_grad()
def statistics(model: nn.Module, batches: Iterable[Example]) -> dict[str, Tensor]:
    """{buffer: (C,)}: the BatchNorm statistics of a model on unlabelled network inputs; it stays as it is.

    The result is the exact mean over the batches, each normalised by its own statistics as in training. A batch counts
    the same whatever its size, so batches should be of one size. Empty for a model without running statistics.
    Raises UserError where there is no batch.
    """
    norms = tracked_norms(model)
    if not norms:
        return {}
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise UserError("repair needs at least one batch of pictures, got none")
    before = {norm: (norm.momentum, [t.clone() for t in norm.buffers()]) for norm in norms.values()}
    with kept_modes(model):
        model.eval()  # only norms are put in training mode: dropout stays off
        try:
            for norm in before:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative mean; in a running one the initial values survive
                norm.train()
            for batch in chain([first], batches):
                args, kwargs = call_arguments(batch)
                model(*args, **kwargs)
            return {f"{name}.{kind}": getattr(m, kind).clone() for name, m in norms.items() for kind in STATISTICS}
        finally:
            for norm, (momentum, values) in before.items():
                norm.momentum = momentum
                for buffer, value in zip(norm.buffers(), values, strict=True):
                    buffer.copy_(value)


@torch.no_grad()
def repair_(model: nn.Module, batches: Iterable[Example], against: Reference | None = None) -> bool:
    """In place: re-estimate all BatchNorm statistics on unlabelled pictures (REPAIR, arXiv:2211.08403, section 4).

    batches: network inputs without augmentation, each a tensor, a tuple of arguments or a dict of keyword arguments.
    against: `reference` of the network that was compressed. Every statistic then changes by as much as compression
        changed it on the pictures, since augmentation and other pictures shift statistics too: a CIFAR-10 ResNet-20
        of which nothing was removed falls from 92.0 to 88.5% under statistics of the plain training pictures.
        None: the statistics become those of the pictures, as in the paper.

    Returns False, and does nothing, for a model without running statistics. Raises UserError where there is no batch.
    """
    found = statistics(model, batches)
    for name, norm in tracked_norms(model).items():
        at = [f"{name}.{kind}" for kind in STATISTICS]
        set_statistics_(norm, [found[n] if against is None else against.trained[n] for n in at])
        if against is not None:
            follow_(norm, [found[n] for n in at], [against.on_pictures[n] for n in at])
    return bool(found)


def set_statistics_(norm: Any, values: Sequence[Tensor]) -> None:
    """In place: set the running statistics of a norm; values: in the order of STATISTICS, each (C,)."""
    for kind, value in zip(STATISTICS, values, strict=True):
        getattr(norm, kind).copy_(value)


def follow_(norm: Any, now: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """In place: change the running statistics of a norm as STATISTICS changed on pictures, each (C,).

    before, now: STATISTICS on the pictures before and after compression.
    Channels with hardly any variance on the pictures before (SHOWN) stay, as no change can be measured. Channels whose
    `now` equals `before` to the bit stay too, as computing no change would round.
    """
    (var, mean), (var_before, mean_before) = now, before
    scale = (norm.running_var + norm.eps) / (var_before + norm.eps)
    follows = (var_before > SHOWN * norm.running_var) & ((var != var_before) | (mean != mean_before))
    new_mean = norm.running_mean + (mean - mean_before) * scale.sqrt()
    new_var = ((var + norm.eps) * scale - norm.eps).clamp(min=0)
    set_statistics_(
        norm, [torch.where(follows, new_var, norm.running_var), torch.where(follows, new_mean, norm.running_mean)]
    )


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training mode of every module afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
