"""Report: sizes and errors of one compression, in all and for every group or masked weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.compression.certify import Certificate, as_json
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.group import Frozen
from pipeline.compression.merge.projection import Projection
from pipeline.compression.plan import Plan, Step


@dataclass(frozen=True)
class GroupReport:
    """One group: channels before and after, and the relative parameter error ‖W - P W‖ / ‖W‖ of its features.

    labels: (before,) int64, the new channel of each old one, -1 = dropped.
    chosen: (after,) int64, the channel that stands for each cluster; None: the mean of its members.
    certificate: the least errors at this size (see certify.py); None: not asked for.
    tie: the name that groups of one layer, such as its heads, have in common.
    """

    name: str
    before: int
    after: int
    error: float
    labels: torch.Tensor = field(repr=False, compare=False)
    tie: str = ""
    chosen: torch.Tensor | None = field(default=None, repr=False, compare=False)
    certificate: Certificate | None = None


@dataclass(frozen=True)
class LayerReport:
    """One masked weight: its entries before and those that the mask leaves, and the relative error ‖W - W'‖ / ‖W‖."""

    name: str
    before: int
    after: int
    error: float

    @property
    def sparsity(self) -> float:
        """The fraction of its entries that are zero by the mask."""
        return 1 - self.after / self.before


@dataclass(frozen=True)
class Report:
    """The outcome of `compress`. params: parameters; macs: multiply-accumulates for one sample.

    A masked network has `layers` in place of `groups`. Its params_after are the parameters that masks leave. Its
    macs_after are those of the dense network, which hardware computes where it cannot skip zeros.

    numbers: new values of sizes that modules keep as Python numbers: {"blocks.0.attn.head_dim": 32}.
    recipe: the spelling of the recipe; plan: its decisions for this network.
    """

    method: str
    ratio: float
    groups: tuple[GroupReport, ...]
    frozen: tuple[Frozen, ...]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    layers: tuple[LayerReport, ...] = ()
    recipe: str = ""
    plan: Plan | None = field(default=None, repr=False, compare=False)

    @property
    def error(self) -> float:
        """Mean relative parameter error over the groups, or over the masked weights."""
        of = self.groups or self.layers
        return sum(one.error for one in of) / len(of)

    def __str__(self) -> str:
        layers: dict[str, list[GroupReport | LayerReport]] = {}
        for one in self.groups or self.layers:
            tie = one.tie if isinstance(one, GroupReport) else ""
            layers.setdefault(tie or one.name, []).append(one)
        width = max(len(name) for name in layers)
        lines = [
            f"{self.method} at ratio {self.ratio:g}: "
            f"parameters {self.params_before:,} -> {self.params_after:,} "
            f"({self.params_after / self.params_before:.1%}), "
            f"MACs {self.macs_before:,} -> {self.macs_after:,} ({self.macs_after / max(1, self.macs_before):.1%})",
            f"{'group':<{width}}  channels  relative error"
            if self.groups
            else f"{'layer':<{width}}  weights  relative error",
            *(
                f"{name:<{width}}  {of[0].before:>4} -> {of[0].after:<4}  {sum(g.error for g in of) / len(of):.4f}"
                + (f"  (mean of {len(of)} groups)" if len(of) > 1 else "")
                + (f"  {of[0].sparsity:.1%} zero" if isinstance(of[0], LayerReport) else "")
                for name, of in layers.items()
            ),
        ]
        return "\n".join([*lines, *(f"frozen: {f}" for f in self.frozen)])


def group_report(weights: GroupWeights, projection: Projection, certificate: Certificate | None = None) -> GroupReport:
    """The row of one group: its sizes, its labels and its relative parameter error under a projection."""
    group, size = weights.group, len(projection.counts)
    return GroupReport(
        name=group.name,
        before=group.size,
        after=size,
        error=weights.error(projection),
        labels=projection.labels,
        tie=group.tie,
        chosen=projection.chosen,
        certificate=certificate,
    )


def layer_report(name: str, weight: torch.Tensor, masked: torch.Tensor, mask: torch.Tensor) -> LayerReport:
    """The row of one masked weight: its entries before and after, and its relative error."""
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    lost = float(torch.linalg.vector_norm(weight - masked, dtype=torch.float64))
    return LayerReport(name, mask.numel(), int(mask.sum()), lost / norm if norm else 0.0)


def told_of(group: GroupReport) -> dict[str, Any]:
    """The row of a group in JSON values. "chosen" and "certificate" are there where the group has them."""
    told = {"before": group.before, "after": group.after, "error": group.error, "labels": group.labels.tolist()}
    chosen = {} if group.chosen is None else {"chosen": group.chosen.tolist()}
    return {**told, **chosen, **as_json(group.certificate)}


def step_of(report: Report) -> Step:
    """The compression as a step of the network's history, in JSON values."""
    about: dict[str, Any] = {
        "method": report.method,
        "ratio": report.ratio,
        "params": report.params_after,
        "params_before": report.params_before,
        "macs": report.macs_after,
        "macs_before": report.macs_before,
        "numbers": dict(report.numbers),
        "groups": {g.name: told_of(g) for g in report.groups},
    }
    if report.layers:
        about["layers"] = {r.name: {"before": r.before, "after": r.after, "error": r.error} for r in report.layers}
    return Step(report.recipe or report.method, about)
