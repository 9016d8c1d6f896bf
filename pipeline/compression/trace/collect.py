"""From the components of a traced network to its channel groups: channels that the same places write and read."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.compression.group import Axis, ChannelGroup, ChannelGroups, Frozen, Norm, Number
from pipeline.compression.trace.tracer import Tracer, components, thin

Lines = dict[tuple[str, int, str], np.ndarray]  # (tensor, axis, role): the component at every position, (N,)

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


class Place(NamedTuple):
    """n positions along one axis of one tensor that belong to a channel. role: write, read or query"""

    tensor: str
    axis: int
    role: str
    n: int


class Reasons(dict[int, str]):
    """{component: why it stays as it is}; the first reason stands."""

    def freeze(self, found: Iterable[int], reason: str) -> None:
        for c in found:
            self.setdefault(int(c), reason)


def collect(
    t: Tracer, parts: Sequence[str], of: np.ndarray | None = None, but: np.ndarray | None = None
) -> ChannelGroups:
    """The groups of these parts, and the frozen channels, of a run that is solved.

    of: (n,) ids; only channels with one of them. but: only channels with none of them.
    """
    reasons = Reasons({int(t.component[0]): "not a channel"})
    for ids, reason in t.freezes:
        reasons.freeze(np.unique(t.component[ids]), reason)
    lines = axis_lines(t, reasons)
    touched = places_of(t, lines, chosen_components(t, of, but))
    part = parts_of(t, touched)
    for c, places in touched.items():
        roles = {place.role for place in places}
        if "write" not in roles:
            reasons.freeze([c], "is written by nothing that can shrink")
        elif not roles & {"read", "query"}:
            reasons.freeze([c], "is read by nothing that can shrink")
        elif part[c] not in parts:
            reasons.freeze([c], f"{part[c]} is not among the parts to compress")
    kinds = kinds_of(t)
    alike: dict[tuple, list[int]] = defaultdict(list)
    for c, places in touched.items():
        if c not in reasons:
            alike[id(places), frozenset(kinds[c]), part[c]].append(c)
    gated = joined(t, t.gated)
    groups = [
        replace(
            group_of(t, touched[members[0]], members, lines, of_part),
            cut_by=tuple(sorted({by for by, *_ in kind})),
            gated=members[0] in gated,
        )
        for (_, kind, of_part), members in alike.items()
        if len(members) > 1
    ]
    kept = {c for members in alike.values() if len(members) > 1 for c in members}
    frozen: dict[tuple[tuple[str, ...], str], int] = defaultdict(int)
    for c, places in touched.items():
        if c not in kept:
            frozen[tuple(dict.fromkeys(p.tensor for p in places)), reasons.get(c, "only one channel")] += 1
    still = tuple(Frozen(size, tensors, reason) for (tensors, reason), size in frozen.items())
    return ChannelGroups(tuple(tied(groups)), still)


def chosen_components(t: Tracer, of: np.ndarray | None, but: np.ndarray | None) -> np.ndarray:
    """Whether each component, (count,) bool, has one of the ids `of` and none of the ids `but`."""
    every = np.arange(t.count)
    chosen = np.ones(t.count, bool) if of is None else np.isin(every, t.component[of])
    return chosen if but is None else chosen & ~np.isin(every, t.component[but])


def axis_lines(t: Tracer, reasons: Reasons) -> Lines:
    """The component at every position of every parameter axis in use.

    An axis with queries and other positions gets one line for each, with `count` at the positions of the other.
    """
    lines: Lines = {}
    queries = np.append(t.is_query, False)
    component = np.append(t.component, t.count)
    ids = np.arange(t.count) if t.instead is None else t.instead

    def put(tensor: str, axis: int, role: str, line: np.ndarray) -> None:
        asking = queries[line]
        if role == "read" or not asking.any():
            lines[tensor, axis, role] = component[line]
            return
        lines[tensor, axis, "query"] = np.where(asking, component[line], t.count)
        if not asking.all():
            lines[tensor, axis, role] = np.where(asking, t.count, component[line])

    for (tensor, axis), (start, role) in t.spans.items():
        line = ids[start : start + t.span_size((tensor, axis))]
        if axis is not None:
            put(tensor, axis, role, line)
            continue
        along, by_axis = only_axis(line.reshape(t.tensors[tensor].shape), component)
        if by_axis is None:
            reasons.freeze(np.unique(component[line]), f"{tensor} mixes channels over several axes")
        else:
            put(tensor, along, role, by_axis)
    as_weight = {tensor for tensor, axis in t.spans if axis is not None}
    as_elements = {tensor for tensor, axis in t.spans if axis is None}
    for (tensor, _, _), line in lines.items():
        if tensor in as_weight & as_elements:
            reasons.freeze(np.unique(line), f"{tensor} is used both as a weight and element by element")
    return lines


def only_axis(ids: np.ndarray, component: np.ndarray) -> tuple[int, np.ndarray | None]:
    """The axis of a tensor's ids along which alone the component changes, and the ids along it; None if none is."""
    elements, dims = component[ids], range(ids.ndim)
    for axis in dims:
        across = elements[tuple(slice(None) if d == axis else slice(0, 1) for d in dims)]
        if (elements == across).all():
            return axis, ids[tuple(slice(None) if d == axis else 0 for d in dims)]
    return 0, None


def places_of(t: Tracer, lines: Lines, chosen: np.ndarray) -> dict[int, tuple[Place, ...]]:
    """{component: its places}, of the chosen components, (count,) bool.

    Components with the same places share one tuple. It grows line by line for all of them at once, because a large
    network has thousands of channels for each such tuple.
    """
    known: list[tuple[Place, ...]] = [()]
    of = np.zeros(t.count, np.int64)  # the place in `known` of each component's tuple
    touched: dict[int, None] = {}  # in the order in which the lines meet them
    for (tensor, axis, role), line in lines.items():
        found, counts = np.unique(line[line < t.count], return_counts=True)
        found, counts = found[chosen[found]], counts[chosen[found]]
        base = len(line) + 1  # so that a tuple and a count are one number, of which np.unique is many times faster
        pairs, inverse = np.unique(of[found] * base + counts, return_inverse=True)
        of[found] = len(known) + inverse
        known += [(*known[pair // base], Place(tensor, axis, role, pair % base)) for pair in pairs.tolist()]
        touched |= dict.fromkeys(found.tolist())
    return {c: known[of[c]] for c in touched}


def kinds_of(t: Tracer) -> dict[int, set[tuple[str, int, int]]]:
    """{component: the kinds that its ids are tagged with}."""
    kinds: dict[int, set[tuple[str, int, int]]] = defaultdict(set)
    for tagged, kind in t.tags:
        for c in np.unique(t.component[tagged.numpy()]).tolist():
            kinds[c].add(kind)
    return kinds


def joined(t: Tracer, found: Iterable[torch.Tensor]) -> set[int]:
    """The components of these ids."""
    return {int(c) for ids in found for c in np.unique(t.component[thin(ids)[0].numpy()])}


def parts_of(t: Tracer, touched: Mapping[int, Sequence[Place]]) -> dict[int, str]:
    """{component: which row of PARTS it is}."""
    blocks = joined(t, (rows for rows, part in t.blocks if part == "head"))
    added = joined(t, t.added)

    def part_of(c: int) -> str:
        if c in blocks:
            return "width" if t.instead is None else "head"
        weights = {p.tensor for p in touched[c] if p.role == "write" and t.tensors[p.tensor].dim() > 1}
        return "residual" if c in added and len(weights) > 1 else "hidden"

    return {c: part_of(c) for c in touched}


def group_of(t: Tracer, places: Sequence[Place], members: list[int], lines: Lines, part: str) -> ChannelGroup:
    """The group of components that share their places."""
    first = lines[places[0].tensor, places[0].axis, places[0].role]
    rank = np.full(t.count + 1, -1)  # place of each component in the group, in the order of the first tensor
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
    writer = next((a.tensor for a in axes["write"] if t.tensors[a.tensor].dim() > 1), axes["write"][0].tensor)
    temperature = t.temperature.get(members[0], 0.0) if part == "width" else 0.0
    return ChannelGroup(
        name=writer.rpartition(".")[0] or writer,
        size=len(members),
        writes=tuple(axes["write"]),
        reads=tuple(axes["read"]),
        norms=tuple(dict.fromkeys(own(t, n) for n in t.norms if written & {n.weight, n.bias, n.mean, n.var})),
        part=part,
        temperature=temperature,
        numbers=(
            *numbers_of(t, dict.fromkeys(p.tensor for p in places), len(members), part, temperature),
            *(Number(path, 1.0) for ids, path in t.sized if rank[t.component[int(ids.flatten()[0])]] >= 0),
        ),
    )


def numbers_of(t: Tracer, tensors: Iterable[str], size: int, part: str, temperature: float) -> tuple[Number, ...]:
    """The Python numbers of an attention layer that follow this group's size."""
    names = NUMBERS.get(part, {})
    paths = [tensor.rpartition(".")[0] for tensor in tensors]
    found = []
    for path in dict.fromkeys([*paths, *(path.rpartition(".")[0] for path in paths)]):
        module = t.model.get_submodule(path)
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


def own(t: Tracer, norm: Norm) -> Norm:
    """The norm, without its writer if either is applied more than once: then the two are not one affine map."""
    names = {norm.weight, norm.bias, norm.mean, norm.var, norm.writer, norm.writer_bias}
    return replace(norm, writer=None, writer_bias=None) if names & t.shared else norm


def tied(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The groups with unique names, and with ties among those that are cut out of one tensor or share a number."""
    often, before = Counter(group.name for group in groups), Counter[str]()
    unique = []
    for name in (group.name for group in groups):
        unique.append(name if often[name] == 1 else f"{name}[{before[name]}]")
        before[name] += 1
    shares = [
        {*((a.tensor, a.axis) for a in (*g.writes, *g.reads)), *(n.path for n in g.numbers)} if g.cut_by else set()
        for g in groups
    ]
    first: dict[Any, int] = {}
    edges = [np.array([[i], [first.setdefault(key, i)]]) for i, share in enumerate(shares) for key in share]
    component = components(edges, len(groups)).tolist()
    heads, sizes = {c: unique[i] for i, c in reversed(list(enumerate(component)))}, Counter(component)
    return [
        replace(g, name=name, tie=heads[c] if sizes[c] > 1 else "")
        for g, name, c in zip(groups, unique, component, strict=True)
    ]
