"""Rules: how the operations of a torch.export graph act on channels.

RULES maps the names of operations to functions `rule(tracer, node) -> ids of the node's value`. A rule that meets a
case it does not know returns NotImplemented, and the channels that the operation touches are frozen.
"""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from pipeline.compression.group import Norm

if TYPE_CHECKING:
    from pipeline.compression.trace.tracer import Tracer


# Element-wise in one operand: the output carries the input's channels. f(0) may differ from 0, as a dropped channel is
# taken out of its readers and not set to zero.
PASS = frozenset(
    "relu relu6 gelu silu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu celu selu softplus mish "
    "log_sigmoid rrelu threshold softshrink hardshrink special_expit logit dropout feature_dropout alpha_dropout "
    "feature_alpha_dropout clone contiguous alias detach to _to_copy type_as neg negative positive exp exp2 expm1 log "
    "log2 log10 log1p reciprocal abs absolute sign sgn sqrt rsqrt square erf erfc erfinv pow clamp clamp_min clamp_max "
    "clip lift_fresh_copy sin cos tan sinh cosh asin acos atan asinh acosh atanh sinc floor ceil round trunc fix frac "
    "nan_to_num".split()
)
# Element-wise in two operands: channels that meet are one channel.
MEET = frozenset("add sub rsub subtract mul multiply div divide true_divide maximum minimum".split())
# Move elements and compute nothing: executed on the ids themselves.
MOVE = frozenset(
    "view _unsafe_view reshape flatten unflatten permute transpose t swapaxes swapdims movedim moveaxis squeeze "
    "unsqueeze expand repeat unbind select slice narrow split split_with_sizes chunk roll flip cat concat concatenate "
    "stack pixel_shuffle pixel_unshuffle channel_shuffle repeat_interleave mT mH adjoint "
    "reshape_as view_as expand_as".split()
)
# Operations of MOVE that cut a dimension into pieces, and the place of the dimension among their arguments. Channels of
# different pieces are of different kinds: no group holds both.
CUTS = {"select": 1, "slice": 1, "narrow": 1, "unbind": 1, "split": 2, "split_with_sizes": 2, "chunk": 2}
# Work on every channel by itself, over the dimensions behind the channel's.
SPATIAL = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices "
    "max_pool2d_with_indices max_pool3d_with_indices upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d "
    "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa".split()
)
# Reductions, and the place of the dimensions among their arguments. Some give values and their places.
REDUCE = {
    **dict.fromkeys("mean nanmean sum nansum prod amax amin max min median std var std_mean var_mean".split(), 1),
    **{"logsumexp": 1, "linalg_vector_norm": 2, "norm": 2},
}
CONV = frozenset(["conv1d", "conv2d", "conv3d"])
CONV_TRANSPOSE = frozenset(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])


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


def _pass(t: "Tracer", node: fx.Node) -> Any:
    if op_name(node) in ("to", "type_as"):  # another tensor may give the type; its channels do not matter
        return t.value(argument(node, 0, "self"))
    operands = t.operands(node)
    return operands[0] if len(operands) == 1 else NotImplemented  # two: e.g. a power or a clamp by another tensor


def _meet(t: "Tracer", node: fx.Node) -> Any:
    operands = t.operands(node)
    if len(operands) == 1:  # with a number, or with itself
        return operands[0].expand(shape_of(node))
    x, y = operands
    if op_name(node) in ("mul", "multiply") and x.shape == y.shape and not any(map(t.parameter, node.args)):
        t.gated.append(x)
    return meet(t, x, y, shape_of(node), op_name(node) == "add")


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


def _meet_all(t: "Tracer", node: fx.Node) -> Any:
    """Element-wise in several operands, of which a mask, too, must be the same for all channels of a group."""
    found, *others = t.operands(node)
    for other in others:
        found = meet(t, found, other, shape_of(node))
        if found is NotImplemented:
            break
    return found


def _softmax(t: "Tracer", node: fx.Node) -> Any:
    x = t.value(argument(node, 0, "self"))
    return NotImplemented if varies(x, argument(node, 1, "dim")) else x


def _move(t: "Tracer", node: fx.Node) -> Any:
    name = op_name(node)
    args = [t.value(a) for a in node.args]
    if name in ("view", "_unsafe_view"):  # expanded ids have no strides that a view could keep
        return args[0].reshape(shape_of(node))
    moved = cast(Callable, node.target)(*args, **node.kwargs)
    if name == "roll" and not torch.equal(moved, args[0]):
        t.freeze(args[0], "roll turns the channels by a fixed number")
    if name in CUTS and varies(args[0], argument(node, CUTS[name], "dim", 0)):
        pieces = moved if isinstance(moved, (list, tuple)) else [moved]
        if any(piece.shape != args[0].shape for piece in pieces):
            t.tag(pieces, by=name)
    return moved


def _glu(t: "Tracer", node: fx.Node) -> Any:
    """One half of the channels gates the other."""
    x, dim = t.value(argument(node, 0, "self")), argument(node, 1, "dim", -1)
    value, gate = x.chunk(2, dim)
    if varies(x, dim):
        t.tag([value, gate], by="glu")
    return meet(t, value, gate, shape_of(node))


def _index(t: "Tracer", node: fx.Node) -> Any:
    """Pick rows along dimensions that hold no channels: a table of relative positions."""
    table, picked = t.parameter(argument(node, 0, "self")), argument(node, 1, "indices")
    count = len(picked)
    if any(i is None for i in picked):
        return NotImplemented
    if table is not None and count == t.tensors[table].dim() - 1:
        return spread(t.axis_ids(table, count, "write"), shape_of(node), -1)
    x = t.value(argument(node, 0, "self"))
    if any(varies(x, d) for d in range(count)):
        return NotImplemented
    return x[(0,) * count].expand(shape_of(node))


def _spatial(t: "Tracer", node: fx.Node) -> Any:
    value = node.meta["val"]
    x = t.value(argument(node, 0, "input"))
    behind = int(re.findall(r"(\d)d", op_name(node))[0])  # the "2" of max_pool2d
    channel = x.dim() - behind - 1
    line = t.along(x, channel)
    if isinstance(value, Tensor):
        return spread(line, shape_of(node), channel)
    return [spread(line, tuple(map(int, value[0].shape)), channel), *(no_channels(v.shape) for v in value[1:])]


def _pad(t: "Tracer", node: fx.Node) -> Any:
    x, widths = t.value(argument(node, 0, "self")), list(argument(node, 1, "pad"))
    padded = [x.dim() - 1 - i // 2 for i, width in enumerate(widths) if width]
    for dim in sorted(set(padded)):
        if varies(x, dim):
            t.freeze(x, "the channels are padded by a fixed number")
            return t.blank(node)
        x = x.narrow(dim, 0, 1)
    return x.expand(shape_of(node))


def _grid_sampler(t: "Tracer", node: fx.Node) -> Any:
    """Pick places of every channel alike, by a grid that holds no channels."""
    x, grid = t.value(argument(node, 0, "input")), t.value(argument(node, 1, "grid"))
    return NotImplemented if grid.any() else spread(t.along(x, 1), shape_of(node), 1)


def _prelu(t: "Tracer", node: fx.Node) -> Any:
    """One slope for all channels, or one for each."""
    x, slope = t.value(argument(node, 0, "self")), t.parameter(argument(node, 1, "weight"))
    if slope is None:
        return NotImplemented
    if t.tensors[slope].numel() > 1:
        t.unite(t.along(x, 1), t.axis_ids(slope, 0, "write"))
    return x


def _reduce(t: "Tracer", node: fx.Node) -> Any:
    dims = argument(node, REDUCE[op_name(node)], "dim")
    if isinstance(dims, fx.Node):  # the larger one of two tensors
        return _meet(t, node)
    x = t.value(argument(node, 0, "self"))
    if not isinstance(dims, (int, list, tuple)) or dims == []:
        dims = list(range(x.dim()))
    dims = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)]
    if any(varies(x, d) for d in dims):
        return NotImplemented  # a statistic over channels
    for d in dims:
        x = x.narrow(d, 0, 1)
    value = node.meta["val"]
    found = [x.reshape(tuple(map(int, v.shape))) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return found if isinstance(value, (list, tuple)) else found[0]


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


def _linear(t: "Tracer", node: fx.Node) -> Any:
    return _weighted(t, node, dim=-1, read_axis=1, write_axis=0)


def _addmm(t: "Tracer", node: fx.Node) -> Any:
    """bias + x @ weight, the transposed linear layer of GPT-2."""
    bias, weight = t.parameter(argument(node, 0, "self")), t.parameter(argument(node, 2, "mat2"))
    if bias is None or weight is None or t.tensors[bias].dim() != 1:
        return NotImplemented
    t.unite(t.along(t.value(argument(node, 1, "mat1")), -1), t.axis_ids(weight, 0, "read"))
    written = t.axis_ids(weight, 1, "write")
    t.unite(written, t.axis_ids(bias, 0, "write"))
    t.biases.add(bias)
    return spread(written, shape_of(node), -1)


def _matmul(t: "Tracer", node: fx.Node) -> Any:
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


def _attention(t: "Tracer", node: fx.Node) -> Any:
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


def _conv(t: "Tracer", node: fx.Node) -> Any:
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


def _conv_transpose(t: "Tracer", node: fx.Node) -> Any:
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


def _group_norm(t: "Tracer", node: fx.Node) -> Any:
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


def _instance_norm(t: "Tracer", node: fx.Node) -> Any:
    """Statistics of every channel by itself, of this input or, as in a BatchNorm, of training."""
    if not argument(node, 5, "use_input_stats"):
        return _batch_norm(t, node)
    x = t.along(t.value(argument(node, 0, "input")), 1)
    given = [argument(node, i, name) for i, name in enumerate(("weight", "bias", "running_mean", "running_var"), 1)]
    if given[0] is None:
        _states(t, node, x, "num_features")
    for tensor in (t.parameter(g) for g in given if g is not None):
        if tensor is None:
            return NotImplemented
        t.unite(x, t.axis_ids(tensor, 0, "write"))
    return spread(x, shape_of(node), 1)


def _batch_norm(t: "Tracer", node: fx.Node) -> Any:
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


def _layer_norm(t: "Tracer", node: fx.Node) -> Any:
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


def _embedding(t: "Tracer", node: fx.Node) -> Any:
    weight = t.parameter(argument(node, 0, "weight"))
    if weight is None:
        return NotImplemented
    t.freeze(t.value(argument(node, 1, "indices")), "indexes an embedding")
    return spread(t.axis_ids(weight, 1, "write"), shape_of(node), -1)


def _check(t: "Tracer", node: fx.Node) -> Any:
    """A check of types, which has no value; export puts one before every conversion."""


Rule = Callable[["Tracer", fx.Node], Any]
RULES: tuple[tuple[frozenset[str], Rule], ...] = (
    (PASS, _pass),
    (MEET, _meet),
    (MOVE, _move),
    (SPATIAL, _spatial),
    (frozenset(REDUCE), _reduce),
    (CONV, _conv),
    (CONV_TRANSPOSE, _conv_transpose),
    (frozenset({"linear"}), _linear),
    (frozenset({"addmm"}), _addmm),
    (frozenset({"matmul", "bmm"}), _matmul),
    (frozenset({"scaled_dot_product_attention"}), _attention),
    (frozenset({"softmax", "_softmax", "log_softmax", "_safe_softmax"}), _softmax),
    (frozenset({"where", "masked_fill", "addcmul", "addcdiv", "lerp"}), _meet_all),
    (frozenset({"glu"}), _glu),
    (frozenset({"index"}), _index),
    (frozenset({"batch_norm"}), _batch_norm),
    (frozenset({"instance_norm"}), _instance_norm),
    (frozenset({"group_norm"}), _group_norm),
    (frozenset({"grid_sampler"}), _grid_sampler),
    (frozenset({"prelu"}), _prelu),
    (frozenset({"layer_norm", "rms_norm"}), _layer_norm),
    (frozenset({"embedding"}), _embedding),
    (frozenset({"pad", "constant_pad_nd"}), _pad),
    (frozenset({"_assert_tensor_metadata", "_assert_scalar", "_assert_async"}), _check),
)
