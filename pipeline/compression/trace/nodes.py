"""What rules share: reading a node of a graph, and channels that meet element by element."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from pipeline.compression.trace.tracer import Tracer


def varies(ids: Tensor, dim: int) -> bool:
    return ids.shape[dim] > 1 and ids.stride(dim) != 0 and bool((ids != ids.narrow(dim, 0, 1)).any())


def op_name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(node.target)
    namespace, _, name = schema.name.partition("::")
    if namespace != "aten":
        return schema.name  # mylib::relu is not torch's relu
    # relu_ counts as relu: the ids of a value do not depend on where it is stored
    return name if name.startswith("_") else name.rstrip("_")


def argument(node: fx.Node, i: int, name: str, default: Any = None) -> Any:
    return node.args[i] if len(node.args) > i else node.kwargs.get(name, default)


def no_channels(shape: Iterable[int]) -> Tensor:
    return torch.zeros((), dtype=torch.int64).expand(tuple(map(int, shape)))


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(map(int, node.meta["val"].shape))


def spread(line: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    view = [1] * len(shape)
    view[dim] = -1
    return line.view(view).expand(shape)


def meet(t: "Tracer", x: Tensor, y: Tensor, shape: tuple[int, ...], is_sum: bool = False) -> Any:
    """The channels of two operands that meet element by element, both broadcast to `shape`."""
    x, y = (v.view((1,) * (len(shape) - v.dim()) + tuple(v.shape)) for v in (x, y))

    def stretched_over(x: Tensor, y: Tensor) -> bool:
        """Is one element of x used for several channels of y?"""
        return any(x.shape[d] == 1 < y.shape[d] and varies(y, d) for d in range(len(shape)))

    x_stretched, y_stretched = stretched_over(x, y), stretched_over(y, x)
    if x_stretched and y_stretched:
        return NotImplemented  # an outer product of two channel axes
    if x_stretched or y_stretched:
        one, many = (x, y) if x_stretched else (y, x)
        t.freeze(one, "one channel acts on several others")
        if any(one.shape[d] > 1 and varies(many, d) for d in range(len(shape))):
            t.freeze(many, "meets what differs between these channels and does not go with them")
        return many.expand(shape)
    t.unite(x, y)
    if is_sum:
        t.added.append(x)
    return x.expand(shape) if x.any() else y.expand(shape)
