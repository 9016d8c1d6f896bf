"""A network to compress, with what all its compressions share: what was seen of it, what each group could become."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from pipeline.compression.calibrate.batches import Batches, samples
from pipeline.compression.calibrate.blocks import compensate_blocks_
from pipeline.compression.calibrate.compensate import Seen, compensate_, observe, second_moments
from pipeline.compression.calibrate.outputs import Answers
from pipeline.compression.certify import certificates
from pipeline.compression.choose.gradients import Gradients
from pipeline.compression.choose.methods import METHODS
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.group import ChannelGroup, ChannelGroups
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.merge.projection import Projection
from pipeline.compression.plan import Plan
from pipeline.compression.recipe import Recipe
from pipeline.compression.report import GroupReport, group_report
from pipeline.compression.sizes.count import Counted, macs, parameters
from pipeline.example import Example
from pipeline.tables import call

# One group at one size: its projection, and the line of the report on it.
Choice = tuple[Projection, GroupReport]


@dataclass
class Network:
    """A network to compress, with the values that all its compressions share.

    model: without hooks and masks. example: what it is called with; a batch of one is enough.
    groups: its channel groups. pictures: unlabelled inputs that methods look at. seed: for all that is drawn at random.
    answers: output -> (rows, classes), by which two networks are compared; None: all outputs side by side.
    full: {group name: channels before any compression}, which ratios count from; None: the present sizes.
    counted: a cache of MACs for this architecture.
    target: what readers are solved for on the pictures, a row of TARGETS.
    certify: whether reports hold certificates (see certify.py).
    own: ratios that some groups, or masked weights, have in place of the given one (see layers.own_ratios).
    """

    model: nn.Module
    example: Example
    groups: ChannelGroups
    pictures: Batches | None = None
    answers: Answers | None = None
    seed: int = 0
    full: Mapping[str, int] | None = None
    counted: Counted = field(default_factory=Counted)
    target: str = "mend"
    certify: bool = True
    own: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: t.detach() for name, t in named_tensors(self.model).items()}

    @cached_property
    def seen(self) -> Seen | None:
        """Rows of activations on the pictures; None without pictures, and where blocks are solved one by one."""
        return None if self.pictures is None or self.blockwise else observe(self.model, self.groups, self.pictures)

    @cached_property
    def moments(self) -> Mapping[str, torch.Tensor]:
        """Second moments of the readers' inputs; {} without pictures."""
        return {} if self.pictures is None else second_moments(self.model, self.groups, self.pictures)

    @property
    def blockwise(self) -> bool:
        return self.target == "same"

    @cached_property
    def gradients(self) -> Gradients | None:
        """Gradients on the pictures, computed when a method first asks for them; None without pictures."""
        if self.pictures is None:
            return None
        return Gradients(self.model, self.groups, self.pictures, self.seed, self.answers)

    @cached_property
    def cost(self) -> tuple[int, int]:
        """Its parameters and MACs."""
        return self.cost_of(self.model)

    def cost_of(self, model: nn.Module) -> tuple[int, int]:
        """Parameters of a network of this architecture, and its MACs for one sample."""
        return parameters(model), macs(model, self.example, self.counted) // samples(self.example)


def choices(
    net: Network, recipe: Recipe, group: ChannelGroup, sizes: Iterable[int], certify: bool = False
) -> dict[int, Choice]:
    """{size: projection that the method chooses for this group, and its row of the report}"""
    described, method = recipe.features, METHODS[recipe.method]
    looks, seen = method.activations, net.seen
    weights = GroupWeights(
        group,
        net.tensors,
        described.features,
        described.scale,
        described.norm,
        net.seed,
        seen.inputs if seen and looks else {},
        net.gradients,
        lambda: net.moments if net.blockwise and looks else {},
    )
    found = call(f"method {recipe.method!r}", method.choose, weights, sorted(set(sizes)), **recipe.option)
    proved = certificates(weights.gram, found) if certify else {}
    return {k: (projection, group_report(weights, projection, proved.get(k))) for k, projection in found.items()}


def compensated_(net: Network, smaller: nn.Module, plan: Plan, ridge: float | None = None) -> None:
    """In place: solve the readers of a smaller network for the target, where there are pictures."""
    if net.pictures is None:
        return
    if net.blockwise:
        compensate_blocks_(smaller, net.model, plan, net.pictures, ridge)
    elif net.seen:
        compensate_(smaller, net.model, plan, net.seen, ridge=ridge, target=net.target)
