"""Size and cost of a network: parameters, and multiply-accumulates (MACs) of one forward pass.

MACs come from torch's counter while the network runs on shapes alone (the device "meta"), with nothing computed. Such a
run of a small network takes as long as a forward pass of some hundred pictures, and networks that differ in widths
alone need few of them: a linear layer or convolution costs the entries of its weight, times the places at which it is
applied.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.compression.copies import deep_copy
from pipeline.compression.merge.modules import named_tensors
from pipeline.example import Example, call_arguments

# BatchNorm adds no counted MACs, but takes half of the time of a count on shapes; skipped.
UNCOUNTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# On shapes torch takes these functions apart in Python, at up to a millisecond a call. Their outputs, or the first of
# them, have the shape of their input, or of their inputs where these are alike, and add no counted MACs.
UNARY = ("relu", "relu_", "gelu", "silu", "silu_", "hardswish", "hardswish_", "hardtanh", "hardtanh_", "_safe_softmax")
BINARY = ("add", "add_", "mul", "mul_", "sub", "sub_")
SHAPE_KEEPING = frozenset(getattr(torch.ops.aten, name) for name in (*UNARY, *BINARY))
CONVOLUTIONS = nn.modules.conv._ConvNd
TRANSPOSED = nn.modules.conv._ConvTransposeNd

Shapes = Mapping[str, tuple[int, ...]]  # by the names of the state_dict


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, example: Example, counted: "Counted | None" = None) -> int:
    """Multiply-accumulates of one forward pass on `example` (convolutions, linear layers, attention).

    MACs are counted on shapes alone, or by a real pass where the forward looks at values.
    counted: a cache of MACs of networks of this architecture.
    """
    counted = Counted() if counted is None else counted
    try:
        return counted.macs(model, example)
    except Exception:  # a forward may raise anything on shapes; an error of the model itself is raised again here
        return _passed(model, example, None)[0]


def places(model: nn.Module, example: Example) -> dict[str, int]:
    """{weight: how many times a forward pass multiplies with it}, of linear layers and convolutions that it calls."""
    try:
        return _passed(model, example, "meta")[1]
    except Exception:  # as in `macs`
        return _passed(model, example, None)[1]


@dataclass
class _Widest:
    """The widest network of one architecture, and the formula that it gives for narrower ones.

    places: see the function `places`. rest: its MACs outside of them: attention, and layers of other kinds.
    proven: sets of axes, (name, dimension); for each set a network that was narrower there had the MACs of the formula.
        Fewer channels never cost more, so no two errors cancel: neither places nor rest depend on these axes.
    """

    shapes: Shapes
    places: Mapping[str, int]
    rest: int
    proven: list[frozenset[tuple[str, int]]] = field(default_factory=list)

    def formula(self, shapes: Shapes) -> int:
        return self.rest + _products(self.places, shapes)

    def narrowed(self, shapes: Shapes) -> frozenset[tuple[str, int]] | None:
        """The axes along which these shapes are narrower; None where they are wider somewhere, or of other tensors."""
        if shapes.keys() != self.shapes.keys():
            return None
        found = set()
        for name, shape in shapes.items():
            if shape == (own := self.shapes[name]):
                continue
            if len(shape) != len(own) or any(n > o for n, o in zip(shape, own, strict=True)):
                return None
            found |= {(name, dim) for dim, (n, o) in enumerate(zip(shape, own, strict=True)) if n != o}
        return frozenset(found)


class Counted:
    """MACs of networks of one architecture, kept by the shapes of their tensors and inputs, so that methods share them.

    A network that is narrower than one that was counted, along axes where the formula was right before, is not run.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], int] = {}
        self._widest: dict[tuple[Any, ...], _Widest] = {}  # by the shapes of the inputs

    def macs(self, model: nn.Module, example: Example) -> int:
        """As the function `macs`, on shapes alone; raises what a forward on shapes raises."""
        inputs, shapes = _inputs(example), {n: tuple(t.shape) for n, t in named_tensors(model).items()}
        key = (inputs, tuple(shapes.values()))
        if key not in self.found:
            self.found[key] = self._new(model, example, inputs, shapes)
        return self.found[key]

    def _new(self, model: nn.Module, example: Example, inputs: tuple[Any, ...], shapes: Shapes) -> int:
        widest = self._widest.get(inputs)
        narrowed = widest.narrowed(shapes) if widest else None
        if widest and narrowed is not None and any(narrowed <= axes for axes in widest.proven):
            return widest.formula(shapes)
        total, at = _passed(model, example, "meta")
        if widest and narrowed is not None:
            if widest.formula(shapes) == total:
                widest.proven.append(narrowed)
        else:
            self._widest[inputs] = _Widest(shapes, at, total - _products(at, shapes))
        return total


def _products(places: Mapping[str, int], shapes: Shapes) -> int:
    """MACs of these weights alone. The inputs of each group of a convolution are in the shape of its weight."""
    return sum(times * prod(shapes[name]) for name, times in places.items())


def _inputs(example: Example) -> tuple[Any, ...]:
    """The shapes of the tensors that a forward pass is given, and its other arguments as text."""
    args, kwargs = call_arguments(example)
    given = torch.utils._pytree.tree_leaves((args, dict(sorted(kwargs.items()))))
    return tuple(tuple(v.shape) if isinstance(v, Tensor) else repr(v) for v in given)


def _passed(model: nn.Module, example: Example, device: str | None) -> tuple[int, dict[str, int]]:
    """(MACs, places) of one pass with the weights and inputs on `device` (None: where they are).

    The pass runs on a twin, so that what a forward stores (a mask, a cache) and eval mode stay out of the live model.
    """

    def moved(value: Any) -> Any:
        return value.detach().to(device) if isinstance(value, Tensor) else value

    memo: dict[int, Any] = {id(t): moved(t) for t in model.buffers()}
    memo |= {id(t): nn.Parameter(moved(t), requires_grad=False) for t in model.parameters()}
    twin = deep_copy(model, memo).eval()
    for module in twin.modules():
        if device == "meta" and type(module) in UNCOUNTED:
            module.forward = lambda input: input
    found = _watched(twin)
    args, kwargs = torch.utils._pytree.tree_map(moved, call_arguments(example))
    shortcut = _Shortcut() if device == "meta" else nullcontext()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, shortcut:
        twin(*args, **kwargs)
    return counter.get_total_flops() // 2, found


class _Shortcut(TorchDispatchMode):
    """Within, functions that keep the shape of their input answer with it; for passes on shapes alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.native_layer_norm:
            return args[0], args[0], args[0]  # F.layer_norm takes the first; the others are for its gradient
        if func.overloadpacket in SHAPE_KEEPING and _alike(args):
            in_place = func.overloadpacket.__name__.endswith("_")
            return args[0] if in_place else args[0].detach()  # so that a later change of its shape is not the input's
        if func is torch.ops.aten.addmm.default:
            return torch.mm(*args[1:3])  # the same shape and MACs
        return func(*args, **(kwargs or {}))


def _alike(args: tuple[Any, ...]) -> bool:
    """Is the first argument a tensor of real numbers, with the shape and dtype of every other tensor?"""
    first = args[0]
    tensors = [value for value in args if isinstance(value, Tensor)]
    real = isinstance(first, Tensor) and first.is_floating_point()
    return real and all(t.shape == first.shape and t.dtype == first.dtype for t in tensors)


def _watched(model: nn.Module) -> dict[str, int]:
    """{weight: times it was multiplied with}, filled in by hooks, which stay, at every pass of the network."""
    found: dict[str, int] = {}

    def count(name: str, layer: Any, given: tuple[Any, ...], output: Any) -> None:
        if isinstance(layer, TRANSPOSED):
            tensor, channels = given[0] if given else None, layer.in_channels
        else:
            tensor, channels = output, layer.out_channels if isinstance(layer, CONVOLUTIONS) else layer.out_features
        if isinstance(tensor, Tensor):  # else the layer was called in an unusual way, and counts among the rest
            found[name] = found.get(name, 0) + tensor.numel() // max(1, channels)

    tensors = named_tensors(model)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, CONVOLUTIONS)) and f"{name}.weight".removeprefix(".") in tensors:
            module.register_forward_hook(partial(count, f"{name}.weight".removeprefix(".")))
    return found
