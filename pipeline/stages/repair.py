"""BatchNorm statistics re-estimated on unlabelled samples."""

from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from pipeline.compression.calibrate.repair import reference, repair_, tracked_norms
from pipeline.compression.group import ChannelGroups
from pipeline.compression.plan import Plan
from pipeline.stages.stage import State, Supplies


@dataclass(frozen=True)
class Repair:
    """Every statistic changes by as much as the last compression changed it on the samples (REPAIR, 2211.08403)."""

    needs = frozenset({"calibration"})
    facts = MappingProxyType({"statistics": "data"})

    def __str__(self) -> str:
        return "repair"

    def reason_against(self, model: nn.Module) -> str:
        return "" if tracked_norms(model) else "no BatchNorm keeps statistics"

    def run(self, state: State, supplies: Supplies) -> State:
        whole = supplies.dense if state.before is None else state.before
        plan = (state.report.plan if state.report else None) or Plan(ChannelGroups(()))
        found = supplies.statistics(whole)
        against = reference(whole, found, plan.groups, plan.projections, plan.joint_norms)
        repair_(state.model, supplies.inputs, against)
        return state
