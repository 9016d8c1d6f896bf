"""How many channels each group keeps, under one budget for the whole network.

The error of each group is measured: the group alone is compressed to some sizes and compensated, and the output of the
network on the pictures is compared with the dense one's; or the rise of the loss is foretold from its gradients (see
sensitivity.py). Without pictures, the method's parameter error stands in for it (see parameter_errors). Errors are
taken to add up, and sizes are found greedily: of all steps that save anything, the one with the least error per MAC (or
parameter) saved comes next, until the budget of the uniform ratio is reached.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.compression.calibrate.outputs import Outputs
from pipeline.compression.group import ChannelGroup, ChannelGroups
from pipeline.compression.merge.modules import apply, named_tensors
from pipeline.compression.merge.projection import Projection
from pipeline.compression.plan import Plan
from pipeline.compression.sizes.count import places
from pipeline.example import Example

MEASURED = (0.85, 0.7, 0.5, 0.35, 0.2, 0.1)  # fractions of the channels at which a group is measured
LEVELS = [round(1 - i / 20, 2) for i in range(19)]  # fractions that a group may keep: 1.0, 0.95 ... 0.1
AHEAD = 3  # levels that one step may go down, so that a costly level does not hide a cheap one below

# The projections of a group at some sizes, each with its relative parameter error
Choose = Callable[[ChannelGroup, Sequence[int]], Mapping[int, tuple[Projection, float]]]
# Solves the readers of a smaller network in place, after its plan
Solve = Callable[[nn.Module, Plan], None]
# The error that the network has where the groups of one tie alone have some size, as a function of that size
Errors = Callable[[int], float]


@torch.no_grad()
def allocated(
    model: nn.Module,
    example: Example,
    groups: ChannelGroups,
    errors_of: Callable[[Sequence[int], Sequence[int]], Errors],
    uniform: Mapping[float, Sequence[int]],
    budget: str,
    rounded: Callable[[int, float], int],
    exact: Callable[[Sequence[int]], float],
) -> dict[float, list[int]]:
    """{ratio: channels left of every group}, with no more MACs or parameters than `uniform` leaves at that ratio.

    errors_of: (places of the groups of one tie, sizes that they may have) -> their errors. budget: one of BUDGETS.
    rounded: (size, fraction) -> channels that stay. exact: sizes -> MACs or parameters of the network; `costs` counts
        only the layers that the forward calls.
    A group that keeps all its channels in `uniform` keeps them here. Groups of one tie get the same size.
    """
    cost = costs(model, example, groups, budget)
    free = [tie for tie in groups.ties if any(sizes[tie[0]] < groups[tie[0]].size for sizes in uniform.values())]
    levels = [sorted({rounded(groups[tie[0]].size, f) for f in LEVELS}, reverse=True) for tie in free]
    errors = [errors_of(tie, of_tie) for tie, of_tie in zip(free, levels, strict=True)]

    def sizes_at(place: Sequence[int]) -> list[int]:
        sizes = [group.size for group in groups]
        for tie, of_tie, p in zip(free, levels, place, strict=True):
            for i in tie:
                sizes[i] = of_tie[p]
        return sizes

    def shrunk(place: Sequence[int], limit: float) -> list[int]:
        """The place in `levels` of every tie, taken down until the sizes cost no more than the limit."""
        place = list(place)

        def moved(u: int, p: int) -> float:
            return cost(sizes_at([*place[:u], p, *place[u + 1 :]]))

        def loss(u: int, p: int) -> float:
            return errors[u](levels[u][p]) - errors[u](levels[u][place[u]])

        while (now := cost(sizes_at(place))) > limit:
            ahead = [(u, p) for u, at in enumerate(place) for p in range(at + 1, min(at + 1 + AHEAD, len(levels[u])))]
            steps = [(loss(u, p) / saved, u, p) for u, p in ahead if (saved := now - moved(u, p)) > 0]
            if not steps:
                break
            _, u, place[u] = min(steps)
        # If the last step overshot, give channels back where the error falls most.
        while back := [(loss(u, p - 1), u) for u, p in enumerate(place) if p and moved(u, p - 1) <= limit]:
            place[min(back)[1]] -= 1
        return place

    found = {}
    for ratio, even in uniform.items():
        allowed = exact(even)
        place = shrunk([0] * len(free), cost(even))
        smallest = [len(of_tie) - 1 for of_tie in levels]
        while (over := exact(sizes_at(place)) - allowed) > 0 and place != smallest:
            place = shrunk(place, cost(sizes_at(place)) - over)
        found[ratio] = sizes_at(place)
    return found


def output_errors(
    model: nn.Module,
    groups: ChannelGroups,
    tie: Sequence[int],
    dense: Outputs,
    solve: Solve,
    choose: Choose,
    rounded: Callable[[int, float], int],
) -> Errors:
    """The relative squared error of the network's output on pictures.

    dense: the model's outputs on the same pictures. The error is monotone, and linear between measured sizes.
    """
    size = groups[tie[0]].size
    sizes = sorted({rounded(size, f) for f in MEASURED})
    chosen = {i: choose(groups[i], sizes) for i in tie}
    spread = max(spread_of(dense.kept), torch.finfo(torch.float32).tiny)
    errors = []
    for k in sizes:
        of_tie, projections = [groups[i] for i in tie], [chosen[i][k][0] for i in tie]
        smaller = apply(model, of_tie, projections)
        solve(smaller, Plan(ChannelGroups(tuple(of_tie)), projections))
        errors.append(sum(float((given - wanted).square().sum()) for given, wanted in dense.beside(smaller)) / spread)
    return monotone([*sizes, size], [*errors, 0.0])


def parameter_errors(
    model: nn.Module, groups: ChannelGroups, tie: Sequence[int], sizes: Sequence[int], choose: Choose
) -> Errors:
    """The parameter error of the groups, relative to what is kept.

    This is e / (1 - e) of the squared relative error e, so that no group is emptied, once for each weight that writes
    or reads the group: a residual stream reaches many layers (e alone, each group once, was worse than uniform sizes).
    """
    sizes, tensors = sorted(sizes), named_tensors(model)
    errors = dict.fromkeys(sizes, 0.0)
    for group in (groups[i] for i in tie):
        count = sum(tensors[axis.tensor].dim() > 1 for axis in (*group.writes, *group.reads))
        for k, (_, error) in choose(group, sizes).items():
            errors[k] += count * error**2 / max(1 - error**2, 1e-6)
    return monotone(sizes, [errors[k] for k in sizes])


def monotone(sizes: Sequence[int], errors: Sequence[float]) -> Errors:
    """A function from size to error, from ascending sizes: never smaller for fewer channels, linear in between."""
    curve = np.maximum.accumulate(errors[::-1])[::-1]
    return lambda k: float(np.interp(k, sizes, curve))


def spread_of(batches: Sequence[Tensor]) -> float:
    """Σ (row - mean row)² over the (rows, values) of all batches."""
    mean = sum(rows.sum(0) for rows in batches) / sum(map(len, batches))
    return sum(float((rows - mean).square().sum()) for rows in batches)


def costs(model: nn.Module, example: Example, groups: ChannelGroups, budget: str) -> Callable[[Sequence[int]], float]:
    """A function from the sizes of all groups to the parameters, or to the MACs of the layers that a forward calls."""
    tensors = named_tensors(model)
    times = {name: 1.0 for name, t in tensors.items() if isinstance(t, nn.Parameter)}
    if budget == "macs":
        times = {name: float(count) for name, count in places(model, example).items()}
    at: dict[tuple[str, int], list[tuple[int, int]]] = {}  # (group, positions of a channel) that stand along each axis
    for i, group in enumerate(groups):
        for axis in (*group.writes, *group.reads):
            at.setdefault((axis.tensor, axis.axis), []).append((i, axis.index.shape[1]))
    full = [group.size for group in groups]

    def cost(sizes: Sequence[int]) -> float:
        total = 0.0
        for name, count in times.items():
            for dim, n in enumerate(tensors[name].shape):
                count *= n - sum(m * (full[i] - sizes[i]) for i, m in at.get((name, dim), ()))
            total += count
        return total

    return cost
