"""One symbolic run of a network's graph on channel ids; rules.py says what each operation does to them."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn

from pipeline.compression.group import Norm
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.trace.nodes import argument, no_channels, op_name
from pipeline.compression.trace.rules import RULES


def thin(*ids: Tensor) -> list[Tensor]:
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
        a, b = thin(a, b)
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
        found = np.unique(thin(ids)[0].numpy())
        self.freezes.append((found[found > 0], reason))

    def tag(self, kinds: Sequence[Tensor], by: str) -> None:
        """Keep channels of different kinds, one tensor of ids each, in groups apart. by: what tells the kinds apart."""
        self.tags += [(ids, (by, len(self.tags), i)) for i, ids in enumerate(kinds)]

    def heads(self, ids: Tensor) -> None:
        """Tag the ids of each head, the last dimension of (..., D), as a kind of its own and as one block."""
        rows = thin(ids)[0].reshape(-1, ids.shape[-1]).unique(dim=0)
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
            own = components(edges, self.count)
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
        self.component = components(edges, self.count)
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
        block = components([inverse[e] for e in edges], len(one))
        _, first = np.unique(block, return_index=True)
        inside = np.isin(block, block[inverse[np.concatenate([r.reshape(-1) for r, _ in rows])]])[inverse]
        return np.where(inside, one[first[block]][inverse], np.arange(self.count))


def components(edges: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The connected component of each of `count` nodes, (count,)."""
    pairs = np.concatenate(edges, axis=1) if edges else np.zeros((2, 0), np.int64)
    ones = np.ones(pairs.shape[1], np.int8)
    return connected_components(coo_matrix((ones, tuple(pairs)), shape=(count, count)), directed=False)[1]
