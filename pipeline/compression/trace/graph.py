"""Find the coupled channel groups of any network from its torch.export graph.

Every parameter axis is given one integer id per position. The network is then run symbolically on these ids: each
activation is an integer tensor of its true shape that says, element by element, which channel it carries (0: none).
Operations that only move data (view, permute, cat, flatten, ...) are executed as they are on the ids; element-wise
operations with two operands unite the ids that meet; convolutions and linear layers consume a channel axis and produce
another. In attention, keys write channels that queries read. Channels that an operation without a rule (rules.py)
touches are frozen: a network can come out less compressible than it is, never wrong. A final check on duplicated
channels (verify.py) freezes groups whose coupling the trace cannot see.

Where several channels can only go together (an attention head, a group of a grouped convolution), a second run gives
all of them one id.

Source: DepGraph (Fang et al. 2023, arXiv:2301.12900), where coupling is a property of the graph.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn

from pipeline.compression.copies import bare_copy
from pipeline.compression.group import DEFAULT_PARTS, PARTS, Axis, ChannelGroup, ChannelGroups, Frozen, Norm, Number
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.trace.rules import RULES, argument, no_channels, op_name
from pipeline.compression.trace.verify import plain_attention, verified
from pipeline.tables import UserError, first_line, pick

Example = Tensor | tuple | dict

# Names under which attention modules keep sizes as Python numbers, and the power of the group's size that each follows.
# A number follows only where its value is the size, or a multiple of it (all heads together).
ALL_HEADS = dict.fromkeys("attn_dim inner_dim all_head_size split_size dim_attn".split(), 1.0)
NUMBERS = {
    "width": {
        **dict.fromkeys("head_dim dim_head head_size attention_head_size attn_head_dim d_head d_k".split(), 1.0),
        **ALL_HEADS,
        **dict.fromkeys("scale scaling softmax_scale".split(), -0.5),
    },
    "head": {
        **dict.fromkeys("num_heads n_heads n_head heads nhead num_attention_heads".split(), 1.0),
        **dict.fromkeys("num_key_value_heads num_kv_heads n_kv_heads".split(), 1.0),
        **ALL_HEADS,
    },
}


def channel_groups(model: nn.Module, example: Example, parts: Sequence[str] = DEFAULT_PARTS) -> ChannelGroups:
    """Trace `model` once on `example` and return its coupled channel groups.

    parts: those of PARTS to compress: hidden channels between two layers, residual streams (where their norms allow it
        exactly), the width of attention heads or whole heads.
    example: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments; only shapes
        matter and a batch of one is enough.

    The names in the result are those of `model.state_dict()`, so the groups stay valid for every checkpoint of the same
    architecture. The model is left as it is.

    Raises UserError for unknown or contradicting parts, and where torch.export cannot trace the model.
    """
    for part in parts:
        pick("part", dict.fromkeys(PARTS), part)
    if {"width", "head"} <= set(parts):
        raise UserError("parts can hold 'width' or 'head', not both: compress twice to shrink heads and drop some")
    args, kwargs = call_arguments(example)
    # A copy, as export needs eval mode and its pass must not run hooks or change buffers of the live model.
    twin = bare_copy(model).eval()
    try:
        with torch.no_grad(), plain_attention():
            program = torch.export.export(twin, args, kwargs)
    except Exception as error:
        raise UserError(
            f"torch.export cannot trace {type(model).__name__}: {first_line(error)} "
            "(make its forward free of data-dependent control flow, or compress a submodule)"
        ) from error
    try:
        return verified(twin, args, kwargs, _traced(program, twin, parts))
    finally:  # an exported program has reference cycles, which keep these tensors until a later garbage collection
        for tensor in named_tensors(twin).values():
            tensor.data = tensor.new_empty(0)


def _traced(program: torch.export.ExportedProgram, twin: nn.Module, parts: Sequence[str]) -> ChannelGroups:
    """The groups and the frozen channels of the graph, before the check of verify.py."""
    first = Tracer(program, twin)
    first.run()
    instead = first.whole_blocks(parts)
    if instead is None:
        return first.collect(parts)
    second = Tracer(program, twin, instead)
    second.blocks = [(torch.from_numpy(instead[rows]), part) for rows, part in first.blocks]
    second.run()
    blocks = np.flatnonzero(instead != np.arange(len(instead)))
    of_blocks = second.collect(parts, of=instead[blocks])
    covered = np.isin(second.component[instead], second.component[instead[blocks]])
    singles = first.collect(parts, but=np.flatnonzero(covered))
    return ChannelGroups(singles.groups + of_blocks.groups, singles.frozen + of_blocks.frozen)


def call_arguments(example: Example) -> tuple[tuple, dict]:
    """(args, kwargs) to call a model with `example`."""
    if isinstance(example, dict):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}


def _thin(*ids: Tensor) -> list[Tensor]:
    """Broadcast to one shape, then keep one entry of each dimension along which every tensor is only expanded."""
    full = torch.broadcast_tensors(*ids)
    for dim in range(full[0].dim()):
        if full[0].shape[dim] > 1 and all(t.stride(dim) == 0 for t in full):
            full = [t.narrow(dim, 0, 1) for t in full]
    return list(full)


class Tracer:
    """One symbolic run. `env` maps a node to its ids; a parameter or buffer stays a name until an operation uses it.

    instead: (ids,) int64, the id that replaces each id, in a second run on whole blocks of channels; None: no change
    """

    def __init__(
        self, program: torch.export.ExportedProgram, model: nn.Module, instead: np.ndarray | None = None
    ) -> None:
        self.graph, self.model, self.instead = program.graph, model, instead
        signature = program.graph_signature
        owned = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        # Tied tensors go by the first of their names.
        first: dict[int, str] = {}
        for name, tensor in owned.items():
            first.setdefault(id(tensor), name)
        # Tensors that no checkpoint holds, masks and counters are constants to the trace: channels that meet them stay.
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
        self.added: list[Tensor] = []  # ids that an addition joins
        self.gated: list[Tensor] = []  # ids of channels that are products of two others, element by element
        self.biases: set[str] = set()  # tensors that are biases of layers
        self.sized: list[tuple[Tensor, str]] = []  # ids whose number a module without tensors states, the attribute
        self.products: list[tuple[Tensor, Tensor, float]] = []  # queries, keys, temperature
        self.is_query, self.component = np.zeros(0, bool), np.zeros(0, np.int64)
        self.temperature: dict[int, float] = {}  # by component, for those of queries and keys
        self.tags: list[tuple[Tensor, tuple[str, int, int]]] = []  # ids of one kind (of a head, of a piece), the kind
        self.blocks: list[tuple[Tensor, str]] = []  # ids (blocks, channels) that only go by whole blocks, their part

    # ids of parameters

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
        if self.instead is not None:
            ids = torch.from_numpy(self.instead[start : start + size])
        if known != role:
            self.freeze(ids, "a tied weight both writes and reads these channels")
        return ids

    # relations

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
                "meets the input, a constant or the output of a frozen operation",
            )
        once = np.unique(pairs[0, ~fixed] * self.count + pairs[1, ~fixed])  # np.unique of pairs is many times slower
        self.edges.append(np.stack([once // self.count, once % self.count]))

    def freeze(self, ids: Tensor, reason: str) -> None:
        found = np.unique(_thin(ids)[0].numpy())
        self.freezes.append((found[found > 0], reason))

    def tag(self, kinds: Sequence[Tensor], by: str) -> None:
        """Keep channels of different kinds, one tensor of ids each, in groups apart. by: what tells the kinds apart."""
        self.tags += [(ids, (by, len(self.tags), i)) for i, ids in enumerate(kinds)]

    def heads(self, ids: Tensor) -> None:
        """Tag the ids of each head, the last dimension of (..., D), as a kind of its own and as one block."""
        rows = _thin(ids)[0].reshape(-1, ids.shape[-1]).unique(dim=0)
        self.tag(list(rows), "attention")
        self.blocks.append((rows, "head"))

    def owners(self, ids: Tensor) -> set[str]:
        """The tensors whose positions these ids are."""
        found = ids.unique().numpy()
        inside = {key: (found >= s) & (found < s + self.span_size(key)) for key, (s, _) in self.spans.items()}
        return {tensor for (tensor, _), of in inside.items() if of.any()}

    def along(self, ids: Tensor, dim: int) -> Tensor:
        """The ids along one dimension, (N,), united over all others: a position is the same channel everywhere."""
        shape = [1] * ids.dim()
        shape[dim] = ids.shape[dim]
        line = ids[tuple(slice(None) if d == dim % ids.dim() else 0 for d in range(ids.dim()))]
        self.unite(ids, line.view(shape))
        return line

    # the run

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
        self.env.clear()
        self.solve()

    def step(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.env[argument(node, 0, "a")][argument(node, 1, "b")]
        name = op_name(node)
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
            return no_channels(getattr(v, "shape", ()))

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

    # from ids to groups

    def solve(self) -> None:
        """Find the component of every id, and the ids that make queries.

        component: (count,) int64; ids of one component are one channel
        """
        edges = list(self.edges)
        self.is_query, self.temperature = np.zeros(self.count, bool), {}
        if self.products:
            own = _components(edges, self.count)
            sides = ([q for q, _, _ in self.products], [k for _, k, _ in self.products])
            pairs = np.stack([torch.cat([ids.reshape(-1) for ids in side]).numpy() for side in sides])
            hot = np.repeat([t for *_, t in self.products], [q.numel() for q, *_ in self.products])
            real = (pairs != 0).all(0)
            self.freeze(torch.from_numpy(pairs[:, ~real]), "is multiplied with values that are not channels")
            pairs, hot = pairs[:, real], hot[real]
            queries, keys = own[pairs]
            reads = [own[s : s + self.span_size(key)] for key, (s, role) in self.spans.items() if role == "read"]
            odd = np.isin(queries, np.concatenate([keys, *reads]))
            self.freeze(torch.from_numpy(pairs[:, odd]), "queries are used as something else too")
            # Queries take cluster sums. If a query is a product of parameters, summing each does not sum the product.
            factors = np.zeros(self.count, np.int64)
            for key, (start, _) in self.spans.items():
                if key[0] not in self.biases:
                    factors[np.unique(own[start : start + self.span_size(key)])] += 1
            several = factors[queries] > 1
            self.freeze(torch.from_numpy(pairs[:, several]), "queries go through several parameters")
            odd |= several
            self.is_query = np.isin(own, np.setdiff1d(queries, queries[odd]))
            edges.append(pairs)
        self.component = _components(edges, self.count)
        if self.products:
            self.temperature = dict(zip(self.component[pairs[0]].tolist(), hot.tolist(), strict=True))

    def span_size(self, key: tuple[str, int | None]) -> int:
        tensor, axis = key
        return self.tensors[tensor].numel() if axis is None else self.tensors[tensor].shape[axis]

    def whole_blocks(self, parts: Sequence[str]) -> np.ndarray | None:
        """(count,): the id that replaces each id when every block becomes one channel; None without blocks."""
        rows = [(rows.numpy(), part) for rows, part in self.blocks if part == "hidden" or part in parts]
        rows = [(r, part) for r, part in rows if r.all() and r.shape[1] > 1]
        if not rows:
            return None
        # Blocks that share a channel become one block, and all ids of a channel go with it.
        edges = [np.stack([np.repeat(r[:, :1], r.shape[1] - 1, 1).reshape(-1), r[:, 1:].reshape(-1)]) for r, _ in rows]
        _, one, inverse = np.unique(self.component, return_index=True, return_inverse=True)
        block = _components([inverse[e] for e in edges], len(one))
        _, first = np.unique(block, return_index=True)
        inside = np.isin(block, block[inverse[np.concatenate([r.reshape(-1) for r, _ in rows])]])[inverse]
        return np.where(inside, one[first[block]][inverse], np.arange(self.count))

    def collect(
        self, parts: Sequence[str], of: np.ndarray | None = None, but: np.ndarray | None = None
    ) -> ChannelGroups:
        """The groups of these parts, and the frozen channels.

        of: (n,) ids; only channels with one of them. but: only channels with none of them.
        """
        component = self.component
        chosen = np.ones(self.count, bool)
        if of is not None:
            chosen = np.isin(np.arange(self.count), component[of])
        if but is not None:
            chosen &= ~np.isin(np.arange(self.count), component[but])
        reasons: dict[int, str] = {int(component[0]): "not a channel"}

        def freeze(components: Iterable[int], reason: str) -> None:
            for c in components:
                reasons.setdefault(int(c), reason)

        for ids, reason in self.freezes:
            freeze(np.unique(component[ids]), reason)
        lines = self._lines(freeze)
        touched: dict[int, list[Place]] = defaultdict(list)
        for (tensor, axis, role), line in lines.items():
            for c, n in np.transpose(np.unique(line[line < self.count], return_counts=True)).tolist():
                if chosen[c]:
                    touched[c].append(Place(tensor, axis, role, n))
        kinds: dict[int, set[tuple[str, int, int]]] = defaultdict(set)
        for tagged, kind in self.tags:
            for c in np.unique(component[tagged.numpy()]).tolist():
                kinds[c].add(kind)
        blocks = {int(c) for rows, part in self.blocks if part == "head" for c in np.unique(component[rows.numpy()])}
        added, gated = (
            {int(c) for ids in found for c in np.unique(component[_thin(ids)[0].numpy()])}
            for found in (self.added, self.gated)
        )

        def part_of(c: int) -> str:
            if c in blocks:
                return "width" if self.instead is None else "head"
            weights = {p.tensor for p in touched[c] if p.role == "write" and self.tensors[p.tensor].dim() > 1}
            return "residual" if c in added and len(weights) > 1 else "hidden"

        part = {c: part_of(c) for c in touched}
        for c, places in touched.items():
            roles = {place.role for place in places}
            if "write" not in roles:
                freeze([c], "is written by nothing that can shrink")
            elif not roles & {"read", "query"}:
                freeze([c], "is read by nothing that can shrink")
            elif part[c] not in parts:
                freeze([c], f"{part[c]} is not among the parts to compress")
        signatures: dict[tuple, list[int]] = defaultdict(list)
        for c, places in touched.items():
            if c not in reasons:
                signatures[tuple(places), frozenset(kinds[c]), part[c]].append(c)
        together = [(places, members) for (places, _, _), members in signatures.items() if len(members) > 1]
        groups = [
            replace(
                self._group(places, members, lines, part[members[0]]),
                cut_by=tuple(sorted({by for by, *_ in kinds[members[0]]})),
                gated=members[0] in gated,
            )
            for places, members in together
        ]
        frozen: dict[tuple[tuple[str, ...], str], int] = defaultdict(int)
        kept = {c for _, members in together for c in members}
        for c, places in touched.items():
            if c not in kept:
                frozen[tuple(dict.fromkeys(p.tensor for p in places)), reasons.get(c, "only one channel")] += 1
        still = tuple(Frozen(size, tensors, reason) for (tensors, reason), size in frozen.items())
        return ChannelGroups(tuple(_tied(groups)), still)

    def _lines(self, freeze: Callable[[Iterable[int], str], None]) -> dict[tuple[str, int, str], np.ndarray]:
        """The component at every position of every parameter axis in use: {(tensor, axis, role): (N,)}.

        An axis with queries and other positions gets one line for each, with `count` at the positions of the other.
        """
        lines = {}
        queries = np.append(self.is_query, False)
        component = np.append(self.component, self.count)
        ids = np.arange(self.count) if self.instead is None else self.instead

        def put(tensor: str, axis: int, role: str, line: np.ndarray) -> None:
            asking = queries[line]
            if role == "read" or not asking.any():
                lines[tensor, axis, role] = component[line]
                return
            lines[tensor, axis, "query"] = np.where(asking, component[line], self.count)
            if not asking.all():
                lines[tensor, axis, role] = np.where(asking, self.count, component[line])

        for (tensor, axis), (start, role) in self.spans.items():
            shape = self.tensors[tensor].shape
            line = ids[start : start + self.span_size((tensor, axis))]
            if axis is not None:
                put(tensor, axis, role, line)
                continue
            elements = component[line].reshape(shape)
            for a in range(len(shape)):
                across = elements[tuple(slice(None) if d == a else slice(0, 1) for d in range(len(shape)))]
                if (elements == across).all():
                    along = line.reshape(shape)[tuple(slice(None) if d == a else 0 for d in range(len(shape)))]
                    put(tensor, a, role, along)
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
        places: Sequence["Place"],
        members: list[int],
        lines: dict[tuple[str, int, str], np.ndarray],
        part: str,
    ) -> ChannelGroup:
        first = lines[places[0].tensor, places[0].axis, places[0].role]
        rank = np.full(self.count + 1, -1)  # place of each component in the group, in the order of the first tensor
        in_order = list(dict.fromkeys(first[np.isin(first, members)].tolist()))
        rank[in_order] = np.arange(len(in_order))
        axes: dict[str, list[Axis]] = {"write": [], "read": []}
        for tensor, axis, role, m in places:
            line = lines[tensor, axis, role]
            inside = np.flatnonzero(rank[line] >= 0)
            by_channel = inside[np.argsort(rank[line[inside]], kind="stable")]
            index = torch.from_numpy(by_channel.reshape(len(members), m).copy())
            axes["write" if role == "write" else "read"].append(Axis(tensor, axis, index, role == "query"))
        written = {a.tensor for a in axes["write"]}
        writer = next((a.tensor for a in axes["write"] if self.tensors[a.tensor].dim() > 1), axes["write"][0].tensor)
        temperature = self.temperature.get(members[0], 0.0) if part == "width" else 0.0
        return ChannelGroup(
            name=writer.rpartition(".")[0] or writer,
            size=len(members),
            writes=tuple(axes["write"]),
            reads=tuple(axes["read"]),
            norms=tuple(dict.fromkeys(self._own(n) for n in self.norms if written & {n.weight, n.bias, n.mean, n.var})),
            part=part,
            temperature=temperature,
            numbers=(
                *self._numbers(dict.fromkeys(p.tensor for p in places), len(members), part, temperature),
                *(Number(path, 1.0) for ids, path in self.sized if self.component[int(ids.flatten()[0])] in members),
            ),
        )

    def _numbers(self, tensors: Iterable[str], size: int, part: str, temperature: float) -> tuple[Number, ...]:
        """The Python numbers of an attention layer that follow this group's size."""
        names = NUMBERS.get(part, {})
        paths = [tensor.rpartition(".")[0] for tensor in tensors]
        found = []
        for path in dict.fromkeys([*paths, *(path.rpartition(".")[0] for path in paths)]):
            module = self.model.get_submodule(path)
            for name, value in vars(module).items():
                power = names.get(name)
                if power is None or isinstance(value, bool) or not isinstance(value, (int, float)):
                    continue
                if power == 1:
                    follows = value >= size and value % size == 0
                else:  # follows only where attention divides by the width that it finds, not by this number
                    follows = temperature > 0 and abs(value / size**power - 1) < 1e-6
                if follows:
                    found.append(Number(f"{path}.{name}" if path else name, power))
        return tuple(found)

    def _own(self, norm: Norm) -> Norm:
        """The norm, without its writer if either is applied more than once: then the two are not one affine map."""
        names = {norm.weight, norm.bias, norm.mean, norm.var, norm.writer, norm.writer_bias}
        return replace(norm, writer=None, writer_bias=None) if names & self.shared else norm


class Place(NamedTuple):
    """n positions along one axis of one tensor that belong to a channel. role: write, read or query"""

    tensor: str
    axis: int
    role: str
    n: int


def _components(edges: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The connected component of each of `count` nodes, (count,)."""
    pairs = np.concatenate(edges, axis=1) if edges else np.zeros((2, 0), np.int64)
    ones = np.ones(pairs.shape[1], np.int8)
    return connected_components(coo_matrix((ones, tuple(pairs)), shape=(count, count)), directed=False)[1]


def _tied(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The groups with unique names, and with ties among those that are cut out of one tensor or share a number."""
    names = [group.name for group in groups]
    unique = [name if names.count(name) == 1 else f"{name}[{names[:i].count(name)}]" for i, name in enumerate(names)]
    shares = [
        {*((a.tensor, a.axis) for a in (*g.writes, *g.reads)), *(n.path for n in g.numbers)} if g.cut_by else set()
        for g in groups
    ]
    first: dict[Any, int] = {}
    edges = [np.array([[i], [first.setdefault(key, i)]]) for i, share in enumerate(shares) for key in share]
    component = _components(edges, len(groups))
    heads = {c: unique[i] for i, c in reversed(list(enumerate(component.tolist())))}
    return [
        replace(g, name=name, tie=heads[c] if component.tolist().count(c) > 1 else "")
        for g, name, c in zip(groups, unique, component.tolist(), strict=True)
    ]
