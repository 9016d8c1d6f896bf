"""Copies of live networks: bare of what training hangs on them."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


def bare_copy(model: nn.Module, share: bool = False) -> nn.Module:
    """A deep copy of the network itself, in the same mode.

    share: the tensors are the model's own where nothing hangs on them, for copies that nobody writes to.

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
        if share and not any(name.endswith("_orig") for name in module._parameters):
            memo |= {id(t): t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    with torch.no_grad():
        twin = deep_copy(model, memo)
    for module in twin.modules():
        for name in [n.removesuffix("_orig") for n, _ in module.named_parameters(recurse=False) if n.endswith("_orig")]:
            if hasattr(module, f"{name}_mask"):
                prune.remove(module, name)
    return twin


def deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """copy.deepcopy(model, memo), in half of the time.

    Every module has a dozen empty dicts of hooks, each of which deepcopy takes apart and builds anew; here fresh ones
    stand in the memo. What is shared before is shared after.
    """
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in (OrderedDict, dict, set) and not value:
                memo.setdefault(id(value), type(value)())
    return copy.deepcopy(model, memo)
