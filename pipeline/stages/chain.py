"""Chains: stages in their order.

    mix+data@0.5 > repair > tune_norms(lr=0.01)

A ">" separates two stages. A compression is the spelling of a recipe with its ratio behind "@"; any other stage is a
row of STAGES, with its options in brackets. `parse_chain(spell_chain(chain)) == chain`.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from pipeline.compression.plan import Step, remember_
from pipeline.stages.compress import Compress
from pipeline.stages.quantize import Quantize
from pipeline.stages.repair import Repair
from pipeline.stages.stage import Stage, State, Supplies, timed
from pipeline.stages.tune import Tune, TuneNorms
from pipeline.tables import UserError, call, pick

Chain = tuple[Stage, ...]

STAGES: dict[str, type] = {
    "repair": Repair,
    "tune_norms": TuneNorms,
    "tune": Tune,
    "quantize": Quantize,
}
# A tail is the chain behind a compression; these are the names that `stages=` has for some. A stage that a network has
# nothing for (repair without BatchNorm) is left out of a named tail; where it is the last one, the tail has no rows.
TAILS = {"raw": "", "repaired": "repair", "norm_tuned": "repair > tune_norms", "tuned": "repair > tune"}


def parse_chain(text: str) -> Chain:
    """The chain that a text spells. UserError for an unknown stage or an impossible order."""
    return checked(tuple(_stage(part.strip()) for part in text.split(">") if part.strip()))


def spell_chain(chain: Sequence[Stage]) -> str:
    return " > ".join(map(str, chain))


def parse_tail(name: str) -> Chain:
    """The chain behind a compression, from a name of TAILS or its spelling."""
    if not isinstance(name, str):
        raise UserError(f"stage {name!r} must be a name or a chain, such as repaired or 'repair > tune'")
    if name in TAILS:
        return parse_chain(TAILS[name])
    found = parse_chain(name) if re.search(r"[>@(]", name) or name in STAGES else None
    if not found:
        pick("stage", {**TAILS, **STAGES}, name)
    return found or ()


def checked(chain: Chain) -> Chain:
    """The chain, if its order is possible. UserError for a second repair with no compression since the first."""
    repaired = False
    for stage in chain:
        if isinstance(stage, Repair) and repaired:
            raise UserError(f"{spell_chain(chain)}: the second repair finds nothing to repair; compress in between")
        repaired = isinstance(stage, Repair) or (repaired and not isinstance(stage, Compress))
    return chain


def fitting(name: str, model: nn.Module) -> Chain | None:
    """The stages of a tail that this network has something for; None where it has nothing for the last one.

    UserError where a spelled-out tail has a stage that the network has nothing for.
    """
    tail = parse_tail(name)
    against = [(stage, stage.reason_against(model)) for stage in tail]
    if name not in TAILS:
        for stage, reason in against:
            if reason:
                raise UserError(f"{name}: {stage} cannot be done on {type(model).__name__}: {reason}; leave it out")
    if against and against[-1][1]:
        return None
    return tuple(stage for stage, reason in against if not reason)


def needed(tail: str) -> frozenset[str]:
    """Those of stage.NEEDS that the stages of a tail draw on."""
    return frozenset().union(*(stage.needs for stage in parse_tail(tail)))


class Followed:
    """The states that tails make of one network. Stages that tails begin with in common run once, each on a copy."""

    def __init__(self, start: State, supplies: Supplies) -> None:
        self.supplies, self.found = supplies, {(): start}

    def state(self, tail: Chain) -> State:
        if tail not in self.found:
            before = self.state(tail[:-1])
            took = {"seconds": before.seconds}
            with timed(took), self.supplies.forward():
                after = tail[-1].run(before.copied(), self.supplies)
            if not isinstance(tail[-1], Compress):  # a compression adds itself to the network's history
                remember_(after.model, Step(str(tail[-1])))
            self.found[tail] = State(after.model, after.report, after.before, took["seconds"])
        return self.found[tail]


def _stage(text: str) -> Stage:
    if "@" in text:
        return Compress.parsed(text)
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
    if match is None:
        raise UserError(f"{text!r} is no stage; write one as name(option=value), or a compression as fold@0.5")
    name, options = match.groups()
    return call(f"stage {name!r}", pick("stage", STAGES, name), **_options(text, options or ""))


def _options(text: str, said: str) -> dict[str, Any]:
    found = {}
    for option in filter(None, (part.strip() for part in said.split(","))):
        name, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"{text!r}: give options as name=value, got {option!r}")
        try:
            found[name.strip()] = int(value) if re.fullmatch(r"\s*-?\d+\s*", value) else float(value)
        except ValueError:
            found[name.strip()] = value.strip()
    return found
