"""BatchNorm statistics re-estimated on unlabelled samples."""

from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import nn

from pipeline.compression.calibrate.repair import reference, repair_, tracked_norms
from pipeline.compression.group import ChannelGroups
from pipeline.compression.plan import Plan
from pipeline.stages.stage import Seen, State, Supplies, Terms


@dataclass(frozen=True)
class Repair:
    """Every statistic changes by as much as the last compression changed it on the samples (REPAIR, 2211.08403)."""

    needs = frozenset({"calibration"})
    facts = MappingProxyType({"statistics": "data"})
    terms = Terms(frozenset({"float", "grid"}), before="clears")

    def __str__(self) -> str:
        return "repair"

    def reason_against(self, model: nn.Module) -> str:
        return "" if tracked_norms(model) else "no BatchNorm keeps statistics"

    def seen(self, supplies: Supplies) -> Seen:
        return Seen(supplies.samples)

    def run(self, state: State, supplies: Supplies) -> State:
        whole = supplies.dense if state.before is None else state.before
        plan = state.plan or Plan(ChannelGroups(()))
        found = supplies.statistics(whole)
        against = reference(whole, found, plan.groups, plan.projections, plan.joint_norms)
        repair_(state.model, supplies.inputs, against)
        return replace(state, before=None, plan=None)
