"""What data can mend after compression: statistics without labels, norm parameters with them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pipeline.compression.group import ChannelGroup
from pipeline.compression.projection import Projection, compressed_tensors, named_tensors
from pipeline.tables import UserError

STATISTICS = ("running_var", "running_mean")  # of BatchNorm
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


def tracked_norms(model: nn.Module) -> list[_NormBase]:
    """The normalisations of a model that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]


def norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The gains and shifts of all norms of a model."""
    return {p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}


class Expected(NamedTuple):
    """BatchNorm statistics, {buffer: (C,)}, that a smaller network would have had compression changed nothing of them.

    kept: as training left them; seen: as the pictures show them, which are not quite what it trained on.
    """

    kept: Mapping[str, Tensor]
    seen: Mapping[str, Tensor]


def expected(
    model: nn.Module,
    seen: Mapping[str, Tensor],
    groups: Sequence[ChannelGroup] = (),
    projections: Sequence[Projection] = (),
    norm_scale: bool = True,
) -> Expected:
    """What becomes of the statistics of `model` and of seen = statistics(model, batches) under these projections."""
    tensors = {name: t.detach() for name, t in named_tensors(model).items()}

    def merged(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        edited = compressed_tensors({**tensors, **found}, groups, projections, norm_scale, reads=False)
        return {name: edited.get(name, tensor) for name, tensor in found.items()}

    return Expected(merged({name: tensors[name] for name in seen}), merged(seen))


@torch.no_grad()
def statistics(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """{buffer: (C,)}: the BatchNorm statistics of a model on unlabelled pictures (B, C, H, W); it stays as it is.

    The exact mean over the batches, each normalised by its own statistics as in training. A batch counts the same
    whatever its size, so batches should be of one size. Empty for a model without running statistics.
    """
    norms = tracked_norms(model)
    if not norms:
        return {}
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise UserError("repair needs at least one batch of pictures, got none")
    before = [(norm.momentum, {name: t.clone() for name, t in norm.named_buffers()}) for norm in norms]
    names = [name for name, module in model.named_modules() if module in set(norms)]
    with kept_modes(model):
        model.eval()  # only norms are put in training mode: dropout stays off
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative mean, in place of a running one in which the first ones survive
                norm.train()
            for batch in chain([first], batches):
                model(batch)
            return {
                f"{n}.{kind}": getattr(m, kind).clone()
                for n, m in zip(names, norms, strict=True)
                for kind in STATISTICS
            }
        finally:
            for norm, (momentum, buffers) in zip(norms, before, strict=True):
                norm.momentum = momentum
                for name, value in buffers.items():
                    getattr(norm, name).copy_(value)


@torch.no_grad()
def repair_(model: nn.Module, batches: Iterable[Tensor], usual: Expected | None = None) -> bool:
    """In place: re-estimate all BatchNorm statistics on unlabelled pictures (REPAIR, arXiv:2211.08403, section 4).

    batches: (B, C, H, W) network inputs without augmentation.
    usual: of the network that was compressed (`expected`). Then every statistic changes by as much as compression
        changed it on the pictures. Augmentation, or other pictures, shift statistics too: a CIFAR-10 ResNet-20 of
        which nothing was removed falls from 92.0 to 88.5% under statistics of the plain training pictures.
        None: the statistics are those of the pictures.

    Returns False, and does nothing, for a model without running statistics.
    """
    found = statistics(model, batches)
    for name in {name.rpartition(".")[0] for name in found}:
        norm, at = model.get_submodule(name), [f"{name}.{kind}" for kind in STATISTICS]
        if usual is None:
            set_statistics_(norm, [found[n] for n in at])
        else:
            set_statistics_(norm, [usual.kept[n] for n in at])
            follow_(norm, [found[n] for n in at], [usual.seen[n] for n in at])
    return bool(found)


def set_statistics_(norm: Any, values: Sequence[Tensor]) -> None:
    """values: of STATISTICS"""
    for kind, value in zip(STATISTICS, values, strict=True):
        getattr(norm, kind).copy_(value)


def follow_(norm: Any, now: Sequence[Tensor], usual: Sequence[Tensor]) -> None:
    """In place: what the norm keeps changes as STATISTICS did on some pictures: from `usual` to `now`, each (C,)."""
    (var, mean), (usual_var, usual_mean) = now, usual
    scale = (norm.running_var + norm.eps) / (usual_var + norm.eps)
    norm.running_mean += (mean - usual_mean) * scale.sqrt()
    norm.running_var.copy_(((var + norm.eps) * scale - norm.eps).clamp(min=0))


def tune_norms_(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    lr: float = 1e-3,
) -> bool:
    """In place: train the gains and shifts of all norms, and nothing else, on labelled pictures.

    This is what the study calls REPAIR for ViT and CLIP (one supervised epoch on LayerNorm parameters). It sees labels,
    so its results belong to a stage of their own. batches: (inputs, labels (B,) int64); one Adam step each. Statistics
    of BatchNorm stay as they are.

    Returns False, and does nothing, for a model without such parameters.
    """
    tuned = norm_parameters(model)
    if not tuned:
        return False
    needed_grad = {p: p.requires_grad for p in model.parameters()}
    optimizer = torch.optim.Adam([p for p in needed_grad if p in tuned], lr)
    with kept_modes(model), torch.enable_grad():
        model.eval()  # dropout off, BatchNorm statistics fixed
        try:
            for p in needed_grad:
                p.requires_grad_(p in tuned)
            for inputs, labels in batches:
                loss = F.cross_entropy(model(inputs), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        finally:
            for p, flag in needed_grad.items():
                p.requires_grad_(flag)
            for p in tuned:
                p.grad = None
    return True


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training mode of every module afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
