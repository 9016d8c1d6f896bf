"""Weights of a network that became smaller go back to earlier ones of the same training (arXiv:1803.03635)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from callbacks.pacing import Pacing
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.merge.tensors import compressed_tensors
from pipeline.compression.plan import Plan
from pipeline.stages.tune import show_
from pipeline.tables import UserError


def check_rewind(rewind_to: int | None, pacing: Pacing) -> None:
    """UserError where the weights to go back to would not be there before the first step."""
    if rewind_to is None:
        return
    if rewind_to != int(rewind_to) or not 0 <= rewind_to <= pacing.after:
        raise UserError(
            f"rewind_to {rewind_to} must be a whole number of {pacing.unit} in 0..{pacing.after}, before the first step"
        )


@torch.no_grad()
def rewound_(
    net: nn.Module, early: Mapping[str, Tensor], plan: Plan, held: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """In place: the weights of a network that was made smaller are those of before, made smaller by the same plan.

    early: {name: tensor} in the sizes before the plan; held: (weight, entries that a mask left); returns the tensors
    that the network has now, apart from it.
    """
    own = named_tensors(net)
    before = {name: tensor.to(own[name].device) for name, tensor in early.items()}
    smaller = compressed_tensors(before, list(plan.groups), list(plan.projections), plan.joint_norms)
    for name, tensor in own.items():
        tensor.copy_({**before, **smaller}[name])
    for weight, kept in held:
        weight.mul_(kept)
        show_(weight, kept)
    return {name: tensor.detach().clone() for name, tensor in own.items()}


def forget_(optimizer: Optimizer, net: nn.Module) -> None:
    """In place: the optimizer knows nothing of the network's past: its momenta were of other weights."""
    for p in net.parameters():
        optimizer.state.pop(p, None)
