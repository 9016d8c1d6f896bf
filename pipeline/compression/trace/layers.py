"""Rules of operations that have weights, or multiply what others computed: layers, attention, norms, embeddings."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from pipeline.compression.group import Norm
from pipeline.compression.trace.nodes import argument, meet, no_channels, op_name, shape_of, spread, varies

if TYPE_CHECKING:
    from pipeline.compression.trace.tracer import Tracer

CONV = frozenset(["conv1d", "conv2d", "conv3d"])
CONV_TRANSPOSE = frozenset(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])


def _weighted(t: "Tracer", node: fx.Node, dim: int, read_axis: int, write_axis: int) -> Any:
    """A layer whose weight reads the channels along `dim` of its input and writes those of its output."""
    weight = t.parameter(argument(node, 1, "weight"))
    if weight is None:
        return NotImplemented
    t.unite(t.along(t.value(argument(node, 0, "input")), dim), t.axis_ids(weight, read_axis, "read"))
    written = t.axis_ids(weight, write_axis, "write")
    _bias(t, node, written)
    return spread(written, shape_of(node), dim)


def _bias(t: "Tracer", node: fx.Node, written: Tensor) -> None:
    """Unite the bias of a layer with its channels. It may be a concatenation, with zeros that write nothing."""
    bias = argument(node, 2, "bias")
    if bias is not None:
        name = t.parameter(bias)
        ids = t.value(bias) if name is None else t.axis_ids(name, 0, "write")
        t.biases |= t.owners(ids) if name is None else {name}
        t.unite(torch.where(ids > 0, written, 0), ids)


def _names(t: "Tracer", node: fx.Node) -> tuple[str | None, str | None]:
    """The names of a layer's weight and bias: None where it is computed, "" where there is no bias."""
    bias = argument(node, 2, "bias")
    return t.parameter(argument(node, 1, "weight")), "" if bias is None else t.parameter(bias)


def linear(t: "Tracer", node: fx.Node) -> Any:
    return _weighted(t, node, dim=-1, read_axis=1, write_axis=0)


def addmm(t: "Tracer", node: fx.Node) -> Any:
    """bias + x @ weight, the transposed linear layer of GPT-2."""
    bias, weight = t.parameter(argument(node, 0, "self")), t.parameter(argument(node, 2, "mat2"))
    if bias is None or weight is None or t.tensors[bias].dim() != 1:
        return NotImplemented
    t.unite(t.along(t.value(argument(node, 1, "mat1")), -1), t.axis_ids(weight, 0, "read"))
    written = t.axis_ids(weight, 1, "write")
    t.unite(written, t.axis_ids(bias, 0, "write"))
    t.biases.add(bias)
    return spread(written, shape_of(node), -1)


def matmul(t: "Tracer", node: fx.Node) -> Any:
    x, weight = t.value(node.args[0]), t.parameter(node.args[1])
    if weight is not None:
        if t.tensors[weight].dim() != 2:
            return NotImplemented
        t.unite(t.along(x, -1), t.axis_ids(weight, 0, "read"))
        return spread(t.axis_ids(weight, 1, "write"), shape_of(node), -1)
    y = t.value(node.args[1])
    if x.dim() < 3 or y.dim() < 3:
        return NotImplemented
    if varies(x, -1) and varies(y, -2):
        return _scores(t, x, y.transpose(-1, -2), shape_of(node), temperature=0.0)
    return _mix(t, x, y, shape_of(node))


def attention(t: "Tracer", node: fx.Node) -> Any:
    q, k, v = (t.value(argument(node, i, name)) for i, name in enumerate(("query", "key", "value")))
    mask = argument(node, 3, "attn_mask")
    if argument(node, 7, "enable_gqa", False):
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    # Without a scale the operation divides by the square root of the width that it finds.
    temperature = 0.5 if argument(node, 6, "scale") is None else 0.0
    scores: Any = _scores(t, q, k, (*q.shape[:-1], k.shape[-2]), temperature)
    if scores is not NotImplemented and mask is not None:
        scores = meet(t, scores, t.value(mask), tuple(scores.shape))
    return scores if scores is NotImplemented else _mix(t, scores, v, shape_of(node))


def _scores(t: "Tracer", q: Tensor, k: Tensor, shape: tuple[int, ...], temperature: float) -> Any:
    """Products of queries (..., N, D) and keys (..., M, D), summed over D: (..., N, M).

    A score is a sum over D of products of queries and keys, so keys write the channels along D and queries read them.
    Different heads share no channel.
    """
    if varies(q, -2) or varies(k, -2):
        return NotImplemented
    q, k = torch.broadcast_tensors(q[..., 0, :], k[..., 0, :])
    if not varies(q, -1) and not varies(k, -1):  # whole heads
        t.unite(q[..., 0], k[..., 0])
        return q[..., :1, None].expand(shape)
    t.products.append((q, k, temperature))
    t.heads(q)
    t.heads(k)
    return no_channels(shape)


def _mix(t: "Tracer", weights: Tensor, v: Tensor, shape: tuple[int, ...]) -> Any:
    """Sums of values (..., M, D) by weights (..., N, M), which hold no channels, or whole heads as the values do."""
    if any(varies(weights, d) for d in (-1, -2)) or varies(v, -2):
        return NotImplemented
    if varies(v, -1):
        t.freeze(weights, "one channel acts on several others")
        line = v[..., :1, :].expand(*shape[:-2], 1, -1)
        t.heads(line[..., 0, :])
        return line.expand(shape)
    t.unite(weights[..., :1, :1], v[..., :1, :1])
    return weights[..., :1, :1].expand(shape)


def conv(t: "Tracer", node: fx.Node) -> Any:
    if len(shape_of(node)) != int(op_name(node)[-2]) + 2:
        return NotImplemented  # without a batch dimension
    if argument(node, 6, "groups", 1) == 1:
        return _weighted(t, node, dim=1, read_axis=1, write_axis=0)
    weight = t.parameter(argument(node, 1, "weight"))
    if weight is None:
        return NotImplemented
    written = t.axis_ids(weight, 0, "write")
    _bias(t, node, written)
    taken = t.along(t.value(argument(node, 0, "input")), 1)
    rows_in, rows_out = taken.view(argument(node, 6, "groups"), -1), written.view(argument(node, 6, "groups"), -1)
    if varies(rows_in, 1):  # the channels of one group are not those of another: only a whole group can go
        for rows in (rows_in, rows_out):
            t.blocks.append((rows, "hidden"))
            t.freeze(rows, "the channels of a grouped convolution go with their whole group")
    else:
        t.unite(rows_out, rows_in[:, :1])
    return spread(written, shape_of(node), 1)


def conv_transpose(t: "Tracer", node: fx.Node) -> Any:
    groups = argument(node, 6, "groups", 1)
    if len(shape_of(node)) != int(op_name(node)[-2]) + 2:
        return NotImplemented  # without a batch dimension
    if groups == 1:
        return _weighted(t, node, dim=1, read_axis=0, write_axis=1)
    weight = t.parameter(argument(node, 1, "weight"))
    if weight is None:
        return NotImplemented
    # A row of the weight belongs to one input channel, and to all output channels of its group.
    rows = t.axis_ids(weight, 0, "write").view(groups, -1)
    taken = t.along(t.value(argument(node, 0, "input")), 1).view(groups, -1)
    t.unite(taken, rows)
    if varies(rows, 1):
        t.blocks.append((rows, "hidden"))
        t.freeze(rows, "the channels of a grouped convolution go with their whole group")
    written = rows[:, :1].expand(groups, shape_of(node)[1] // groups).reshape(-1)
    _bias(t, node, written)
    return spread(written, shape_of(node), 1)


def _states(t: "Tracer", node: fx.Node, x: Tensor, *attributes: str) -> None:
    """The module of this node, which has no tensors, states the number of these channels in its attributes."""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    t.sized += [(x, f"{path}.{name}") for name in attributes if path and hasattr(t.model.get_submodule(path), name)]


def group_norm(t: "Tracer", node: fx.Node) -> Any:
    """Statistics over a group of channels, which can only go as a whole."""
    if argument(node, 2, "weight") is None:
        _states(t, node, t.along(t.value(argument(node, 0, "input")), 1), "num_groups", "num_channels")
    x = t.along(t.value(argument(node, 0, "input")), 1)
    rows = x.view(argument(node, 1, "num_groups"), -1)
    for i, name in ((2, "weight"), (3, "bias")):
        given = argument(node, i, name)
        if given is not None:
            tensor = t.parameter(given)
            if tensor is None:
                return NotImplemented
            t.unite(x, t.axis_ids(tensor, 0, "write"))
    if varies(rows, 1):
        t.blocks.append((rows, "hidden"))
        t.freeze(rows, "group_norm normalises over these channels, which go with their whole group")
    return spread(x, shape_of(node), 1)


def instance_norm(t: "Tracer", node: fx.Node) -> Any:
    """Statistics of every channel by itself, of this input or, as in a BatchNorm, of training."""
    if not argument(node, 5, "use_input_stats"):
        return batch_norm(t, node)
    x = t.along(t.value(argument(node, 0, "input")), 1)
    given = [argument(node, i, name) for i, name in enumerate(("weight", "bias", "running_mean", "running_var"), 1)]
    if given[0] is None:
        _states(t, node, x, "num_features")
    for tensor in (t.parameter(g) for g in given if g is not None):
        if tensor is None:
            return NotImplemented
        t.unite(x, t.axis_ids(tensor, 0, "write"))
    return spread(x, shape_of(node), 1)


def batch_norm(t: "Tracer", node: fx.Node) -> Any:
    given = [argument(node, i, name) for i, name in enumerate(("weight", "bias", "running_mean", "running_var"), 1)]
    names = [None if g is None else t.parameter(g) for g in given]
    if any(g is not None and n is None for g, n in zip(given, names, strict=True)):
        return NotImplemented
    source = argument(node, 0, "input")
    x = t.along(t.value(source), 1)
    for name in names:
        if name is not None:
            t.unite(x, t.axis_ids(name, 0, "write"))
    writer, writer_bias = None, None
    if source.op == "call_function" and len(source.users) == 1 and op_name(source) in CONV | {"linear"}:
        writer, writer_bias = _names(t, source)
    weight, bias, mean, var = names
    t.norms.append(Norm(weight, bias, mean, var, float(argument(node, 7, "eps", 1e-5)), writer, writer_bias or None))
    return spread(x, shape_of(node), 1)


def layer_norm(t: "Tracer", node: fx.Node) -> Any:
    """Statistics over channels freeze these channels, together with their gain and shift."""
    x = t.value(argument(node, 0, "input"))
    affine = [t.value(given) for given in node.args[2:4] if isinstance(given, fx.Node)]
    if any(varies(x, d) for d in range(-len(argument(node, 1, "normalized_shape")), 0)):
        t.freeze(x, f"{op_name(node)} normalises over these channels")
        for given in affine:
            t.unite(x, given)
    elif any(meet(t, x, given, shape_of(node)) is NotImplemented for given in affine):
        return NotImplemented
    return x


def embedding(t: "Tracer", node: fx.Node) -> Any:
    weight = t.parameter(argument(node, 0, "weight"))
    if weight is None:
        return NotImplemented
    t.freeze(t.value(argument(node, 1, "indices")), "indexes an embedding")
    return spread(t.axis_ids(weight, 1, "write"), shape_of(node), -1)
