"""Copies of live networks: bare of what training hangs on them."""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


def bare_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the network itself, in the same mode.

    Unwraps torch.compile; leaves out forward and backward hooks (`wandb.watch` hangs some there that cannot be copied);
    makes masks of torch.nn.utils.prune permanent (their `weight` is no leaf, which deepcopy refuses).
    """
    model = getattr(model, "_orig_mod", model)
    memo: dict[int, object] = {}
    for module in model.modules():
        for hooks in (module._forward_hooks, module._backward_hooks):
            memo[id(hooks)] = OrderedDict()
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    with torch.no_grad():
        twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name in [n.removesuffix("_orig") for n, _ in module.named_parameters(recurse=False) if n.endswith("_orig")]:
            if hasattr(module, f"{name}_mask"):
                prune.remove(module, name)
    return twin
