"""Copies of live networks, without the hooks and masks that training adds."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

UNCHANGING = (bool, int, float, str, type(None))
PICKLED = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__new__", "__slots__")
CONTAINERS = (dict, set, OrderedDict)


def bare_copy(model: nn.Module, share: bool = False) -> nn.Module:
    """A deep copy of the network itself, in the same mode.

    share: keep the model's own tensors, except those of masked modules; for copies that nobody writes to.

    Unwraps torch.compile; leaves out forward and backward hooks (`wandb.watch` adds some that cannot be copied); makes
    masks of torch.nn.utils.prune permanent (their `weight` is no leaf, which deepcopy refuses).
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
    """copy.deepcopy(model, memo), in a quarter of the time; objects that are shared stay shared.

    deepcopy rebuilds each of the dozen empty hook dicts of a module and looks at its numbers one by one; both are
    shortened here. Modules with copy or pickle methods of their own are left to deepcopy.
    """
    kinds = {kind for kind in set(map(type, model.modules())) if _is_plain(kind)}
    plain = [module for module in model.modules() if type(module) in kinds and id(module) not in memo]
    for module in plain:
        memo[id(module)] = module.__new__(type(module))
    for module in plain:
        memo[id(module)].__setstate__({name: _copied(value, memo) for name, value in module.__getstate__().items()})
    return copy.deepcopy(model, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in UNCHANGING or (kind is tuple and all(type(part) in UNCHANGING for part in value)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in CONTAINERS and not value:
        return memo.setdefault(id(value), kind())
    if kind is dict and all(type(key) is str for key in value):  # such as parameters, buffers and modules
        copied = memo[id(value)] = {}
        copied.update((key, _copied(part, memo)) for key, part in value.items())
        return copied
    return copy.deepcopy(value, memo)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Are these modules copied as nn.Module is: a new object with copies of its attributes?"""
    return all(getattr(kind, name, None) == getattr(nn.Module, name, None) for name in PICKLED)
