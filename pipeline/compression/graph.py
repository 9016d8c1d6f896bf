"""Find the coupled channel groups of any network from its torch.export graph.

Every parameter axis is given one integer id per position. The network is then run symbolically on these ids: each
activation is an integer tensor of its true shape that says, element by element, which channel it carries (0: none).
Operations that only move data (view, permute, cat, flatten, ...) are executed as they are on the ids; element-wise
operations with two operands unite the ids that meet; convolutions and linear layers consume a channel axis and produce
another. What an operation that is not in these tables touches is frozen: a network can come out less compressible than
it is, never wrong. A final check on duplicated channels (`_verified`) freezes what the trace cannot see, such as sizes
that a module keeps as Python numbers.

After the idea that coupling is a property of the graph, DepGraph (Fang et al. 2023, arXiv:2301.12900).
"""

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.compression.copies import bare_copy
from pipeline.compression.group import Axis, ChannelGroup, ChannelGroups, Frozen, Norm
from pipeline.compression.projection import Projection, apply, named_tensors
from pipeline.tables import UserError, first_line

Example = Tensor | tuple | dict

# Element-wise in one operand: the output carries the input's channels. Also true of f(0) != 0: a dropped channel is
# taken out of its readers, not set to zero.
PASS = frozenset(
    "relu relu6 gelu silu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu celu selu softplus mish "
    "logsigmoid dropout feature_dropout alpha_dropout clone contiguous alias detach to _to_copy type_as neg negative "
    "exp abs absolute sqrt rsqrt square erf pow clamp clamp_min clamp_max clip lift_fresh_copy".split()
)
# Element-wise in two operands: channels that meet are one channel.
MEET = frozenset("add sub rsub subtract mul multiply div divide true_divide maximum minimum".split())
# Moves elements and computes nothing: executed on the ids themselves.
MOVE = frozenset(
    "view _unsafe_view reshape flatten unflatten permute transpose t swapaxes swapdims movedim moveaxis squeeze "
    "unsqueeze expand repeat unbind select slice narrow split split_with_sizes chunk roll flip cat concat concatenate "
    "stack pixel_shuffle pixel_unshuffle channel_shuffle".split()
)
# Those of MOVE that hold positions as numbers, which would mean another channel in a smaller network, and the place of
# the dimension among their arguments.
CUTS = {"select": 1, "slice": 1, "narrow": 1, "unbind": 1, "split": 2, "split_with_sizes": 2, "chunk": 2, "roll": 2}
# Works on every channel by itself, over the dimensions behind the channel's.
SPATIAL = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d".split()
)
REDUCE = frozenset(["mean", "sum", "amax", "amin"])
CONV = frozenset(["conv1d", "conv2d", "conv3d"])
CONV_TRANSPOSE = frozenset(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])


def channel_groups(model: nn.Module, example: Example) -> ChannelGroups:
    """Trace `model` once on `example` and return its coupled channel groups.

    example: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments; only shapes
    matter and a batch of one is enough. The names in the result are those of `model.state_dict()`, so the groups stay
    valid for every checkpoint of the same architecture. The model is left as it is.

    Raises UserError where torch.export cannot trace the model.
    """
    args, kwargs = call_arguments(example)
    # A copy: export needs eval mode and must not meet hooks' or buffers' side effects on the live model.
    twin = bare_copy(model).eval()
    try:
        with torch.no_grad():
            program = torch.export.export(twin, args, kwargs)
    except Exception as error:
        raise UserError(
            f"torch.export cannot trace {type(model).__name__}: {first_line(error)} "
            "(make its forward free of data-dependent control flow, or compress a submodule)"
        ) from error
    tracer = _Tracer(program, twin)
    tracer.run()
    return _verified(twin, args, kwargs, tracer.collect())


def call_arguments(example: Example) -> tuple[tuple, dict]:
    """(args, kwargs) to call a model with `example`."""
    if isinstance(example, dict):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}


def varies(ids: Tensor, dim: int) -> bool:
    return ids.shape[dim] > 1 and ids.stride(dim) != 0 and bool((ids != ids.narrow(dim, 0, 1)).any())


def _thin(*ids: Tensor) -> list[Tensor]:
    """Broadcast to one shape, then keep one entry of each dimension along which every tensor is only expanded."""
    full = torch.broadcast_tensors(*ids)
    for dim in range(full[0].dim()):
        if full[0].shape[dim] > 1 and all(t.stride(dim) == 0 for t in full):
            full = [t.narrow(dim, 0, 1) for t in full]
    return list(full)


class _Tracer:
    """One symbolic run. `env` maps a node to its ids; a parameter or buffer stays a name until an operation uses it."""

    def __init__(self, program: torch.export.ExportedProgram, model: nn.Module) -> None:
        self.graph = program.graph
        signature = program.graph_signature
        owned = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        # Tied tensors go by the first of their names.
        first: dict[int, str] = {}
        for name, tensor in owned.items():
            first.setdefault(id(tensor), name)
        # What no checkpoint holds, and masks and counters, are constants to us: channels that meet them stay.
        stored = {name for name, tensor in named_tensors(model).items() if tensor.is_floating_point()}
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.names = {node: first[id(owned[name])] for node, name in names.items() if first[id(owned[name])] in stored}
        self.tensors = {name: owned[name].detach() for name in first.values()}
        self.env: dict[fx.Node, Any] = {}
        self.count = 1  # id 0 is "no channel"
        self.spans: dict[tuple[str, int | None], tuple[int, str]] = {}  # (tensor, axis or None) -> first id, role
        self.shared: set[str] = set()  # tensors that several operations use
        self.edges: list[np.ndarray] = []
        self.freezes: list[tuple[np.ndarray, str]] = []
        self.norms: list[Norm] = []

    # --- ids of parameters

    def axis_ids(self, tensor: str, axis: int, role: str) -> Tensor:
        """One id per position of this axis: (N,)."""
        size = self.tensors[tensor].shape[axis]
        return self._ids((tensor, axis), role, size)

    def element_ids(self, tensor: str) -> Tensor:
        """One id per element, for a tensor that meets an activation directly (a position embedding, a gain)."""
        shape = self.tensors[tensor].shape
        key = (tensor, 0 if len(shape) == 1 else None)
        return self._ids(key, "write", self.tensors[tensor].numel()).view(shape)

    def _ids(self, key: tuple[str, int | None], role: str, size: int) -> Tensor:
        if key not in self.spans:
            self.spans[key] = (self.count, role)
            self.count += size
        else:
            self.shared.add(key[0])
        start, known = self.spans[key]
        ids = torch.arange(start, start + size)
        if known != role:
            self.freeze(ids, "a tied weight both writes and reads these channels")
        return ids

    # --- relations

    def unite(self, a: Tensor, b: Tensor) -> None:
        a, b = _thin(a, b)
        pairs = np.stack([a.reshape(-1).numpy(), b.reshape(-1).numpy()])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if not pairs.size:
            return
        fixed = (pairs == 0).any(0)
        if fixed.any():
            self.freeze(
                torch.from_numpy(pairs[:, fixed]),
                "meets what is not a channel: the input, a constant or what a frozen operation puts out",
            )
        self.edges.append(np.unique(pairs[:, ~fixed], axis=1))

    def freeze(self, ids: Tensor, reason: str) -> None:
        found = np.unique(_thin(ids)[0].numpy())
        self.freezes.append((found[found > 0], reason))

    def along(self, ids: Tensor, dim: int) -> Tensor:
        """The ids along one dimension, (N,), which must mean the same wherever else they stand."""
        shape = [1] * ids.dim()
        shape[dim] = ids.shape[dim]
        line = ids[tuple(slice(None) if d == dim % ids.dim() else 0 for d in range(ids.dim()))]
        self.unite(ids, line.view(shape))
        return line

    # --- the run

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                name = self.names.get(node.name)
                self.env[node] = name if name is not None else self.blank(node)
            elif node.op == "output":
                for value in self.operands(node):
                    self.freeze(value, "leaves the network as its output")
            elif node.op == "call_function":
                self.env[node] = self.step(node)
            else:  # get_attr: a constant or a submodule of a control-flow operation
                self.env[node] = self.blank(node)

    def step(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.env[_argument(node, 0, "a")][_argument(node, 1, "b")]
        name = _op_name(node)
        for table, rule in RULES:
            if name in table:
                result = rule(self, node)
                if result is not NotImplemented:
                    return result
        return self.unknown(node, f"operation {name} is not known to keep channels apart")

    def unknown(self, node: fx.Node, reason: str) -> Any:
        for value in self.operands(node):
            self.freeze(value, reason)
        return self.blank(node)

    def blank(self, node: fx.Node) -> Any:
        """Ids 0 in the shape (or shapes) of the node's value."""
        value = node.meta.get("val")

        def zeros(v: Any) -> Any:
            if isinstance(v, (list, tuple)):
                return [zeros(part) for part in v]
            return _no_channels(getattr(v, "shape", ()))

        return zeros(value)

    def value(self, arg: Any) -> Any:
        """Ids of an argument; a parameter that comes here is used element by element."""
        if isinstance(arg, fx.Node):
            ids = self.env[arg]
            return self.element_ids(ids) if isinstance(ids, str) else ids
        if isinstance(arg, (list, tuple)):
            return type(arg)(self.value(part) for part in arg)
        return arg

    def operands(self, node: fx.Node) -> list[Tensor]:
        """The id tensors among a node's inputs."""
        found: list[Tensor] = []

        def walk(value: Any) -> None:
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, (list, tuple)):
                for part in value:
                    walk(part)

        for source in node.all_input_nodes:
            walk(self.value(source))
        return found

    def parameter(self, arg: Any) -> str | None:
        """The tensor's name if the argument is a parameter or buffer used as it is."""
        value = self.env[arg] if isinstance(arg, fx.Node) else None
        return value if isinstance(value, str) else None

    # --- from ids to groups

    def collect(self) -> ChannelGroups:
        edges = np.concatenate(self.edges, axis=1) if self.edges else np.zeros((2, 0), np.int64)
        ones = np.ones(edges.shape[1], np.int8)
        _, component = connected_components(
            coo_matrix((ones, tuple(edges)), shape=(self.count, self.count)), directed=False
        )
        reasons: dict[int, str] = {int(component[0]): "not a channel"}

        def freeze(components: Iterable[int], reason: str) -> None:
            for c in components:
                reasons.setdefault(int(c), reason)

        for ids, reason in self.freezes:
            freeze(np.unique(component[ids]), reason)
        lines = self._lines(component, freeze)
        touched: dict[int, list[tuple[str, int, str, int]]] = defaultdict(list)
        for (tensor, axis, role), line in lines.items():
            for c, n in np.transpose(np.unique(line, return_counts=True)).tolist():
                touched[c].append((tensor, axis, role, n))
        for c, places in touched.items():
            roles = {role for *_, role, _ in places}
            if "write" not in roles:
                freeze([c], "is written by nothing that can shrink")
            elif "read" not in roles:
                freeze([c], "is read by nothing that can shrink")
        signatures: dict[tuple, list[int]] = defaultdict(list)
        for c, places in touched.items():
            if c not in reasons:
                signatures[tuple(places)].append(c)
        groups = [self._group(places, members, lines) for places, members in signatures.items() if len(members) > 1]
        frozen: dict[tuple[tuple[str, ...], str], int] = defaultdict(int)
        for c, places in touched.items():
            if c in reasons or len(signatures[tuple(places)]) == 1:
                frozen[tuple(dict.fromkeys(p[0] for p in places)), reasons.get(c, "only one channel")] += 1
        return ChannelGroups(
            tuple(groups), tuple(Frozen(size, tensors, reason) for (tensors, reason), size in frozen.items())
        )

    def _lines(
        self, component: np.ndarray, freeze: Callable[[Iterable[int], str], None]
    ) -> dict[tuple[str, int, str], np.ndarray]:
        """The component at every position of every parameter axis in use: {(tensor, axis, role): (N,)}."""
        lines = {}
        for (tensor, axis), (start, role) in self.spans.items():
            shape = self.tensors[tensor].shape
            if axis is not None:
                lines[tensor, axis, role] = component[start : start + shape[axis]]
                continue
            elements = component[start : start + self.tensors[tensor].numel()].reshape(shape)
            for a in range(len(shape)):
                line = elements[tuple(slice(None) if d == a else slice(0, 1) for d in range(len(shape)))]
                if (elements == line).all():
                    lines[tensor, a, role] = line.reshape(-1)
                    break
            else:
                freeze(np.unique(elements), f"{tensor} mixes channels over several axes")
        as_weight = {tensor for tensor, axis in self.spans if axis is not None}
        as_elements = {tensor for tensor, axis in self.spans if axis is None}
        for (tensor, _, _), line in lines.items():
            if tensor in as_weight & as_elements:
                freeze(np.unique(line), f"{tensor} is used both as a weight and element by element")
        return lines

    def _group(
        self,
        places: Sequence[tuple[str, int, str, int]],
        members: list[int],
        lines: dict[tuple[str, int, str], np.ndarray],
    ) -> ChannelGroup:
        first = lines[places[0][:3]]
        rank = np.full(self.count, -1)  # of a component: its place in the group, in the order of the first tensor
        in_order = list(dict.fromkeys(first[np.isin(first, members)].tolist()))
        rank[in_order] = np.arange(len(in_order))
        axes: dict[str, list[Axis]] = {"write": [], "read": []}
        for tensor, axis, role, m in places:
            line = lines[tensor, axis, role]
            inside = np.flatnonzero(rank[line] >= 0)
            by_channel = inside[np.argsort(rank[line[inside]], kind="stable")]
            axes[role].append(Axis(tensor, axis, torch.from_numpy(by_channel.reshape(len(members), m).copy())))
        written = {a.tensor for a in axes["write"]}
        writer = next((a.tensor for a in axes["write"] if self.tensors[a.tensor].dim() > 1), axes["write"][0].tensor)
        return ChannelGroup(
            name=writer.rpartition(".")[0] or writer,
            size=len(members),
            writes=tuple(axes["write"]),
            reads=tuple(axes["read"]),
            norms=tuple(dict.fromkeys(self._own(n) for n in self.norms if written & {n.weight, n.bias, n.mean, n.var})),
        )

    def _own(self, norm: Norm) -> Norm:
        """Without its writer if one of the two is applied twice: then they are not one affine map."""
        names = {norm.weight, norm.bias, norm.mean, norm.var, norm.writer, norm.writer_bias}
        return replace(norm, writer=None, writer_bias=None) if names & self.shared else norm


def _op_name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(node.target)
    namespace, _, name = schema.name.partition("::")
    if namespace != "aten":
        return schema.name  # mylib::relu is not the relu that we know
    # relu_ is relu to us: the ids of a value do not depend on where it is stored
    return name if name.startswith("_") else name.rstrip("_")


def _argument(node: fx.Node, i: int, name: str, default: Any = None) -> Any:
    return node.args[i] if len(node.args) > i else node.kwargs.get(name, default)


def _no_channels(shape: Iterable[int]) -> Tensor:
    return torch.zeros((), dtype=torch.int64).expand(tuple(map(int, shape)))


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(map(int, node.meta["val"].shape))


def _spread(line: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
    view = [1] * len(shape)
    view[dim] = -1
    return line.view(view).expand(shape)


def _pass(t: _Tracer, node: fx.Node) -> Any:
    if _op_name(node) in ("to", "type_as"):  # perhaps the type of another tensor, whose channels are nothing to us
        return t.value(_argument(node, 0, "self"))
    operands = t.operands(node)
    return operands[0] if len(operands) == 1 else NotImplemented  # two: e.g. a power or a clamp by another tensor


def _meet(t: _Tracer, node: fx.Node) -> Any:
    operands = t.operands(node)
    if len(operands) == 1:  # with a number, or with itself
        return operands[0].expand(_shape(node))
    shape = _shape(node)
    x, y = (v.view((1,) * (len(shape) - v.dim()) + tuple(v.shape)) for v in operands)

    def stretched_over(x: Tensor, y: Tensor) -> bool:
        """Is one element of x used for several channels of y?"""
        return any(x.shape[d] == 1 < y.shape[d] and varies(y, d) for d in range(len(shape)))

    x_stretched, y_stretched = stretched_over(x, y), stretched_over(y, x)
    if x_stretched and y_stretched:
        return NotImplemented  # an outer product of two channel axes
    if x_stretched or y_stretched:
        one, many = (x, y) if x_stretched else (y, x)
        t.freeze(one, "one channel acts on several others")
        return many.expand(shape)
    t.unite(x, y)
    return x.expand(shape) if x.any() else y.expand(shape)


def _move(t: _Tracer, node: fx.Node) -> Any:
    name = _op_name(node)
    args = [t.value(a) for a in node.args]
    if name in CUTS:
        x = args[0]
        dims = _argument(node, CUTS[name], "dims" if name == "roll" else "dim", 0)
        if not isinstance(dims, int):
            dims = dims or range(x.dim())  # a roll over all
        whole = name == "slice" and tuple(x.shape) == _shape(node)
        if not whole and any(varies(x, d) for d in ([dims] if isinstance(dims, int) else dims)):
            t.freeze(x, f"{name} cuts the channels at fixed positions")
    if name in ("view", "_unsafe_view"):  # expanded ids have no strides that a view could keep
        return args[0].reshape(_shape(node))
    return cast(Callable, node.target)(*args, **node.kwargs)


def _spatial(t: _Tracer, node: fx.Node) -> Any:
    value = node.meta["val"]
    x = t.value(_argument(node, 0, "input"))
    behind = int(_op_name(node)[-2])  # the "2" of max_pool2d
    channel = x.dim() - behind - 1
    line = t.along(x, channel)
    if isinstance(value, Tensor):
        return _spread(line, _shape(node), channel)
    return [_spread(line, tuple(map(int, value[0].shape)), channel), *(_no_channels(v.shape) for v in value[1:])]


def _pad(t: _Tracer, node: fx.Node) -> Any:
    x, widths = t.value(_argument(node, 0, "self")), list(_argument(node, 1, "pad"))
    padded = [x.dim() - 1 - i // 2 for i, width in enumerate(widths) if width]
    for dim in sorted(set(padded)):
        if varies(x, dim):
            t.freeze(x, "the channels are padded by a fixed number")
            return t.blank(node)
        x = x.narrow(dim, 0, 1)
    return x.expand(_shape(node))


def _reduce(t: _Tracer, node: fx.Node) -> Any:
    dims = _argument(node, 1, "dim")
    x = t.value(_argument(node, 0, "self"))
    if not isinstance(dims, (int, list, tuple)) or dims == []:
        dims = list(range(x.dim()))
    dims = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)]
    if any(varies(x, d) for d in dims):
        return NotImplemented  # a statistic over channels
    for d in dims:
        x = x.narrow(d, 0, 1)
    return x.reshape(_shape(node))


def _weighted(t: _Tracer, node: fx.Node, dim: int, read_axis: int, write_axis: int) -> Any:
    """A layer whose weight reads the channels along `dim` of its input and writes those of its output."""
    weight, bias = _weight_and_bias(t, node)
    if weight is None or bias is None:
        return NotImplemented
    t.unite(t.along(t.value(_argument(node, 0, "input")), dim), t.axis_ids(weight, read_axis, "read"))
    written = t.axis_ids(weight, write_axis, "write")
    if bias:
        t.unite(written, t.axis_ids(bias, 0, "write"))
    return _spread(written, _shape(node), dim)


def _weight_and_bias(t: _Tracer, node: fx.Node) -> tuple[str | None, str | None]:
    """The names of a layer's weight and bias: None where it is computed, "" where there is no bias."""
    bias = _argument(node, 2, "bias")
    return t.parameter(_argument(node, 1, "weight")), "" if bias is None else t.parameter(bias)


def _linear(t: _Tracer, node: fx.Node) -> Any:
    return _weighted(t, node, dim=-1, read_axis=1, write_axis=0)


def _conv(t: _Tracer, node: fx.Node) -> Any:
    if len(_shape(node)) != int(_op_name(node)[-2]) + 2:
        return NotImplemented  # without a batch dimension
    if _argument(node, 6, "groups", 1) == 1:
        return _weighted(t, node, dim=1, read_axis=1, write_axis=0)
    weight, bias = _weight_and_bias(t, node)
    if weight is None or bias is None or t.tensors[weight].shape[1] != 1:
        return NotImplemented  # grouped, but not depthwise
    written = t.axis_ids(weight, 0, "write")
    taken = t.along(t.value(_argument(node, 0, "input")), 1)
    t.unite(written, taken.repeat_interleave(len(written) // len(taken)))
    if bias:
        t.unite(written, t.axis_ids(bias, 0, "write"))
    return _spread(written, _shape(node), 1)


def _conv_transpose(t: _Tracer, node: fx.Node) -> Any:
    if _argument(node, 6, "groups", 1) != 1 or len(_shape(node)) != int(_op_name(node)[-2]) + 2:
        return NotImplemented
    return _weighted(t, node, dim=1, read_axis=0, write_axis=1)


def _batch_norm(t: _Tracer, node: fx.Node) -> Any:
    given = [_argument(node, i, name) for i, name in enumerate(("weight", "bias", "running_mean", "running_var"), 1)]
    names = [None if g is None else t.parameter(g) for g in given]
    if any(g is not None and n is None for g, n in zip(given, names, strict=True)):
        return NotImplemented
    source = _argument(node, 0, "input")
    x = t.along(t.value(source), 1)
    for name in names:
        if name is not None:
            t.unite(x, t.axis_ids(name, 0, "write"))
    writer, writer_bias = None, None
    if source.op == "call_function" and len(source.users) == 1 and _op_name(source) in CONV | {"linear"}:
        writer, writer_bias = _weight_and_bias(t, source)
    weight, bias, mean, var = names
    t.norms.append(Norm(weight, bias, mean, var, float(_argument(node, 7, "eps", 1e-5)), writer, writer_bias or None))
    return _spread(x, _shape(node), 1)


def _layer_norm(t: _Tracer, node: fx.Node) -> Any:
    """The statistics run over channels, so these stay; the gain and shift belong to them."""
    x = t.value(_argument(node, 0, "input"))
    t.freeze(x, f"{_op_name(node)} normalises over these channels")
    for given in (_argument(node, 2, "weight"), _argument(node, 3, "bias")):
        if isinstance(given, fx.Node):
            t.unite(x, t.value(given))
    return x


def _embedding(t: _Tracer, node: fx.Node) -> Any:
    weight = t.parameter(_argument(node, 0, "weight"))
    if weight is None:
        return NotImplemented
    t.freeze(t.value(_argument(node, 1, "indices")), "indexes an embedding")
    return _spread(t.axis_ids(weight, 1, "write"), _shape(node), -1)


def _check(t: _Tracer, node: fx.Node) -> Any:
    """Looks at types and writes nothing; export puts one before every conversion."""


Rule = Callable[[_Tracer, fx.Node], Any]
RULES: tuple[tuple[frozenset[str], Rule], ...] = (
    (PASS, _pass),
    (MEET, _meet),
    (MOVE, _move),
    (SPATIAL, _spatial),
    (REDUCE, _reduce),
    (CONV, _conv),
    (CONV_TRANSPOSE, _conv_transpose),
    (frozenset({"linear"}), _linear),
    (frozenset({"batch_norm"}), _batch_norm),
    (frozenset({"layer_norm", "rms_norm"}), _layer_norm),
    (frozenset({"embedding"}), _embedding),
    (frozenset({"pad", "constant_pad_nd"}), _pad),
    (frozenset({"_assert_tensor_metadata", "_assert_scalar", "_assert_async"}), _check),
)


def _verified(model: nn.Module, args: tuple, kwargs: dict, traced: ChannelGroups) -> ChannelGroups:
    """Keep the groups that survive a fold of exact duplicates, in uneven clusters, without loss; freeze the others.

    The check runs on random weights, so that it speaks of the architecture and not of this checkpoint; in float64,
    unless the model holds to float32 by itself. model: a copy that this function may overwrite.
    """
    if not len(traced):
        return traced
    generator = torch.Generator().manual_seed(0)
    model = model.cpu()
    _randomise_(model, generator)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            tolerance, args, kwargs = _runs_on_noise_(model, args, kwargs, generator)
        except Exception as error:
            return _frozen_too(traced, dict.fromkeys(range(len(traced)), f"the check fails ({first_line(error)})"))
        # Two draws, as a channel order that survives one by chance will hardly survive another, and of two successive
        # numbers of channels, as no size that must divide by something is a multiple of it twice.
        fewer = [round(group.size * (1 + float(torch.rand((), generator=generator))) / 3) for group in traced]
        draws = [
            [Projection(_uneven_labels(g.size, n + more, generator)) for g, n in zip(traced, fewer, strict=True)]
            for more in range(2)
        ]

        def failure(chosen: list[int]) -> str | None:
            groups = [traced[i] for i in chosen]
            for draw in draws:
                labels = [draw[i] for i in chosen]
                twin = copy.deepcopy(model)
                duplicate_(twin, groups, labels)
                expected = twin(*args, **kwargs)
                try:
                    found = apply(twin, groups, labels)(*args, **kwargs)
                except Exception as error:
                    return f"the smaller network does not run ({first_line(error)})"
                for e, f in zip(_tensors(expected), _tensors(found), strict=True):
                    if e.shape != f.shape or not torch.allclose(e, f, rtol=0, atol=tolerance * float(e.abs().max())):
                        return "folding exact duplicates changes the output"
            return None

        everything = list(range(len(traced)))
        if failure(everything) is None:
            return traced
        reasons = {i: reason for i in everything if (reason := failure([i])) is not None}
        kept = [i for i in everything if i not in reasons]
        together = failure(kept) if kept else None
    if together is not None:
        reasons.update(dict.fromkeys(kept, f"together with other groups, {together}"))
    return _frozen_too(traced, reasons)


def _runs_on_noise_(
    model: nn.Module, args: tuple, kwargs: dict, generator: torch.Generator
) -> tuple[float, tuple, dict]:
    """Bring the model to a precision in which it runs; (how far outputs may differ there, noise to call it with)."""
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        model.to(dtype)
        noise_args, noise_kwargs = tree_map(lambda v, d=dtype: _noise_like(v, d, generator), (args, kwargs))
        try:
            outputs = _tensors(model(*noise_args, **noise_kwargs))
        except RuntimeError:
            if dtype == torch.float32:
                raise
            continue
        if all(output.isfinite().all() for output in outputs):
            return tolerance, noise_args, noise_kwargs
    raise ArithmeticError("NaN or Inf on random weights")


def _frozen_too(traced: ChannelGroups, reasons: dict[int, str]) -> ChannelGroups:
    """Move the groups at these places to what is frozen."""
    kept = tuple(group for i, group in enumerate(traced) if i not in reasons)
    frozen = tuple(
        Frozen(group.size, tuple(dict.fromkeys(a.tensor for a in (*group.writes, *group.reads))), reason)
        for group, reason in ((traced[i], reasons[i]) for i in sorted(reasons))
    )
    return ChannelGroups(kept, traced.frozen + frozen)


def duplicate_(model: nn.Module, groups: Iterable[ChannelGroup], projections: Iterable[Projection]) -> None:
    """In place: make the channels of every cluster exact copies of its first one, as far as they are written."""
    tensors = named_tensors(model)
    with torch.no_grad():
        for group, projection in zip(groups, projections, strict=True):
            source = projection.representatives[projection.labels]
            for write in group.writes:
                tensor = tensors[write.tensor]
                copies = tensor.index_select(write.axis, write.index[source].reshape(-1).to(tensor.device))
                tensor.index_copy_(write.axis, write.index.reshape(-1).to(tensor.device), copies)


def _uneven_labels(size: int, clusters: int, generator: torch.Generator) -> Tensor:
    """Clusters of very different sizes, fewer than there are channels: (size,) int64."""
    clusters = min(max(clusters, 1), size - 1)
    drawn = (torch.rand(size, generator=generator) ** 2 * clusters).long()
    drawn[torch.randperm(size, generator=generator)[:clusters]] = torch.arange(clusters)  # none is empty
    return drawn


def _noise_like(value: Any, dtype: torch.dtype, generator: torch.Generator) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn(value.shape, generator=generator, dtype=dtype)
    return value.cpu() if isinstance(value, Tensor) else value


def _randomise_(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of variance 1 / fan-in, everything else (gains, shifts, variances) uniform in [0.5, 1.5)."""
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            if not tensor.is_floating_point():
                continue
            if tensor.dim() > 1 and isinstance(tensor, nn.Parameter):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
            elif isinstance(tensor, nn.Parameter) or "running_" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
