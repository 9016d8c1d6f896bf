"""Plan: what a compression recipe decided for one network. Step: a stage that a network went through.

Both travel with the network.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pipeline.compression.group import ChannelGroups
from pipeline.compression.merge.projection import Projection

HISTORY = "compression_history"  # attribute of a module that holds its steps; copies of the module keep it


@dataclass(frozen=True)
class Plan:
    """The decisions of a compression recipe for one network: its groups, their projections and how they merge.

    projections: one for each group. joint_norms: a weight and the norm behind it merge as one affine map.
    approximate_repair: variances of merged channels follow the weights (see `modules.apply`).
    masks: {weight: bool of its shape, False where it is zero}; a masked network has no groups.
    """

    groups: ChannelGroups
    projections: Sequence[Projection] = ()
    joint_norms: bool = True
    approximate_repair: bool = False
    masks: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Step:
    """One stage that a network went through, in JSON values alone, so that a file can hold it.

    stage: the spelling of the stage: "mix+data", "repair", "tune". about: facts on the stage. A compression has
    "method" (with what "auto" chose), "ratio", "params", "params_before", "macs", "macs_before", "numbers" (sizes that
    modules keep as Python numbers), "groups": {name: {"before", "after", "error", "labels": the new channel of each old
    one, -1 = dropped, and, where they are known, "chosen" and "certificate" (see report.told_of)}}; a mask also has
    "layers": {name: {"before", "after", "error"}}.
    """

    stage: str
    about: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.stage}@{self.about['ratio']:g}" if "ratio" in self.about else self.stage

    def __deepcopy__(self, memo: dict[int, Any]) -> "Step":
        """The step itself: it never changes, so copies of a network share it and its labels of all channels."""
        return self


def history(model: nn.Module) -> tuple[Step, ...]:
    """The stages that this network went through, in their order; none for a network that is as it was built."""
    return getattr(getattr(model, "_orig_mod", model), HISTORY, ())


def remember_(model: nn.Module, *steps: Step) -> None:
    """In place: the network has gone through these stages, too."""
    went_through_(model, (*history(model), *steps))


def went_through_(model: nn.Module, steps: Iterable[Step]) -> None:
    """In place: the network has gone through exactly these stages."""
    setattr(getattr(model, "_orig_mod", model), HISTORY, tuple(steps))


def numbers(steps: Iterable[Step]) -> dict[str, int | float]:
    """{path of the attribute: value} of sizes that modules keep as Python numbers, after these steps."""
    return {path: value for step in steps for path, value in step.about.get("numbers", {}).items()}


def told(steps: Iterable[Step]) -> list[dict[str, Any]]:
    """Steps in JSON values, as a file holds them: [{"stage": ..., and the entries of `about`}]."""
    return [{"stage": step.stage, **step.about} for step in steps]


def steps_of(told: Iterable[Mapping[str, Any]]) -> tuple[Step, ...]:
    """The inverse of `told`: steps from their JSON values."""
    return tuple(Step(one["stage"], {key: value for key, value in one.items() if key != "stage"}) for one in told)
