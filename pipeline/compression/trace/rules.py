"""Rules: how the operations of a torch.export graph act on channels.

RULES maps the names of operations to functions `rule(tracer, node) -> ids of the node's value`. A rule that meets a
case it does not know returns NotImplemented, and the channels that the operation touches are frozen.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from pipeline.compression.trace import layers
from pipeline.compression.trace.nodes import argument, meet, no_channels, op_name, shape_of, spread, varies

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


def _check(t: "Tracer", node: fx.Node) -> Any:
    """A check of types, which has no value; export puts one before every conversion."""


Rule = Callable[["Tracer", fx.Node], Any]
RULES: tuple[tuple[frozenset[str], Rule], ...] = (
    (PASS, _pass),
    (MEET, _meet),
    (MOVE, _move),
    (SPATIAL, _spatial),
    (frozenset(REDUCE), _reduce),
    (layers.CONV, layers.conv),
    (layers.CONV_TRANSPOSE, layers.conv_transpose),
    (frozenset({"linear"}), layers.linear),
    (frozenset({"addmm"}), layers.addmm),
    (frozenset({"matmul", "bmm"}), layers.matmul),
    (frozenset({"scaled_dot_product_attention"}), layers.attention),
    (frozenset({"softmax", "_softmax", "log_softmax", "_safe_softmax"}), _softmax),
    (frozenset({"where", "masked_fill", "addcmul", "addcdiv", "lerp"}), _meet_all),
    (frozenset({"glu"}), _glu),
    (frozenset({"index"}), _index),
    (frozenset({"batch_norm"}), layers.batch_norm),
    (frozenset({"instance_norm"}), layers.instance_norm),
    (frozenset({"group_norm"}), layers.group_norm),
    (frozenset({"grid_sampler"}), _grid_sampler),
    (frozenset({"prelu"}), _prelu),
    (frozenset({"layer_norm", "rms_norm"}), layers.layer_norm),
    (frozenset({"embedding"}), layers.embedding),
    (frozenset({"pad", "constant_pad_nd"}), _pad),
    (frozenset({"_assert_tensor_metadata", "_assert_scalar", "_assert_async"}), _check),
)
