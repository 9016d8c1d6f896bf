"""What data can mend after compression: statistics without labels, norm parameters with them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pipeline.tables import UserError

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


def tracked_norms(model: nn.Module) -> list[_NormBase]:
    """The normalisations of a model that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]


def norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The gains and shifts of all norms of a model."""
    return {p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}


@torch.no_grad()
def repair_(model: nn.Module, batches: Iterable[Tensor]) -> bool:
    """In place: re-estimate all BatchNorm statistics on unlabelled pictures (REPAIR, arXiv:2211.08403, section 4).

    batches: (B, C, H, W) network inputs without augmentation. The statistics are reset and become the exact mean over
    the batches (momentum None), instead of a running average in which the first estimates survive. A batch counts the
    same whatever its size, so batches should be of one size. Only norms are put in training mode: dropout stays off.

    Returns False, and does nothing, for a model without running statistics.
    """
    norms = tracked_norms(model)
    if not norms:
        return False
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise UserError("repair needs at least one batch of pictures, got none")
    momenta = [norm.momentum for norm in norms]
    with kept_modes(model):
        model.eval()
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for batch in chain([first], batches):
                model(batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return True


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
