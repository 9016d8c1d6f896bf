"""Chains: stages in their order.

    mix+data@0.5 > repair > tune_norms(lr=0.01)

A ">" separates two stages. A compression is the spelling of a method with its ratio behind "@"; any other stage is a
row of STAGES, with its options in brackets. In a config a chain may also be a list:

    [{fold: {method: mix+data, ratio: 0.5}}, repair, {tune_norms: {lr: 0.01}}]

Both spellings give the same record, and `parse_chain(spell_chain(chain)) == chain`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from torch import nn

from pipeline.compression.plan import Step, remember_
from pipeline.compression.recipe import respelled, value_of
from pipeline.stages.compress import Compress
from pipeline.stages.distil import Distil
from pipeline.stages.export import Export
from pipeline.stages.ptq import Ptq
from pipeline.stages.qat import Qat
from pipeline.stages.quantize import Quantize
from pipeline.stages.repair import Repair
from pipeline.stages.stage import Stage, State, Supplies, timed
from pipeline.stages.tune import Tune, TuneNorms
from pipeline.tables import UserError, call, pick
from pipeline.vocabulary import TAILS

Chain = tuple[Stage, ...]

STAGES: dict[str, type] = {
    "repair": Repair,
    "tune_norms": TuneNorms,
    "tune": Tune,
    "distil": Distil,
    "quantize": Quantize,
    "qat": Qat,
    "ptq": Ptq,
    "export": Export,
}
# In a list, a compression is named by what it does; by that name: the kinds of methods that do so.
FAMILIES = {"fold": ("fold", "mix", "auto"), "prune": ("prune",), "mask": ("mask",)}
# Why a stage that changes weights cannot follow, by the form in which a stage left them.
FINISHED = {
    "grid": (
        "the weights lie on the grid of a quantizer, which it would leave; put it before the quantization, or train on "
        "the grid with qat"
    ),
    "file": "the network is a finished file, which only measuring may follow; put it before",
    "openvino": "the network is a finished file of OpenVINO, which only measuring may follow; put it before",
    "program": "the network is a program for torch.compile, which only measuring may follow; put it before",
}


def parse_chain(said: str | Sequence[Any]) -> Chain:
    """The chain that a text or a list spells. UserError for an unknown stage or an impossible order."""
    if isinstance(said, str):
        return checked(tuple(_stage(part.strip()) for part in said.split(">") if part.strip()))
    if not isinstance(said, Sequence):
        raise UserError(f"chain {said!r} must be a text, such as 'fold@0.5 > repair', or a list of stages")
    return checked(tuple(map(_of_list, said)))


def parse_chains(said: str | Mapping[str, Any] | Sequence[Any]) -> dict[str, Chain]:
    """{name: chain} of many chains: a mapping, or a list, whose chains are named by their spelling.

    A text stands for several chains where it has alternatives in braces, "fold@{0.3,0.5} > repair": one for each
    choice. UserError as for `parse_chain`, and where there is no chain or one without a stage.
    """
    named = said.items() if isinstance(said, Mapping) else (("", one) for one in [said] * isinstance(said, str) or said)
    found: dict[str, Chain] = {}
    for name, one in named:
        texts = alternatives(one) if isinstance(one, str) else [one]
        for chosen in texts:
            chain = parse_chain(chosen)
            if not chain:
                raise UserError(f"chain {name or chosen!r} has no stage; give one, such as fold@0.5")
            label = name if name and len(texts) == 1 else f"{name}: {spell_chain(chain)}".removeprefix(": ")
            found[label] = chain
    if not found:
        raise UserError("chains is empty; give at least one chain, such as 'fold@0.5 > repair'")
    return found


def alternatives(text: str) -> list[str]:
    """Every text that a choice from each pair of braces gives: "a{b,c}" -> ["ab", "ac"]; the last braces vary first."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


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
    """The chain, if its order is possible. UserError for a stage that cannot work on what those before it leave."""
    form, by, repaired = "float", "", False
    for stage in chain:
        terms = stage.terms
        if form not in terms.takes:
            raise UserError(f"{spell_chain(chain)}: {stage} cannot follow {by}: {FINISHED[form]}")
        if isinstance(stage, Repair) and repaired:
            raise UserError(f"{spell_chain(chain)}: the second repair finds nothing to repair; compress in between")
        repaired = {"clears": True, "sets": False, "begins": False}.get(terms.before, repaired)
        form, by = (terms.leaves, str(stage)) if terms.leaves else (form, by)
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


def check_stage(stage: Stage, supplies: Supplies) -> None:
    """UserError for a stage whose options do not fit the network, the task or the teachers; most stages fit any."""
    if hasattr(stage, "check"):
        stage.check(supplies)


def needed(tail: str) -> frozenset[str]:
    """Those of stage.NEEDS that the stages of a tail draw on."""
    return frozenset().union(*(stage.needs for stage in parse_tail(tail)))


class Followed:
    """The states that tails make of one network. Stages that tails begin with in common run once, each on a copy."""

    def __init__(self, start: State, supplies: Supplies) -> None:
        self.supplies, self.found = supplies, {(): start}

    def state(self, tail: Chain) -> State:
        if tail not in self.found:
            self.found[tail] = advanced(tail[-1], self.state(tail[:-1]), self.supplies)
        return self.found[tail]


def advanced(stage: Stage, before: State, supplies: Supplies) -> State:
    """The state after a stage, whose network remembers it; `before` stays as it is."""
    took = {"seconds": before.seconds}
    with timed(took), supplies.forward():
        after = stage.run(before.copied(), supplies)
    if not isinstance(stage, Compress):  # a compression adds itself to the network's history
        remember_(after.model, Step(str(stage)))
    return replace(after, seconds=took["seconds"])


def _of_list(said: Any) -> Stage:
    """A stage from a list: a text, or {name: its options}."""
    if isinstance(said, str):
        return _stage(said.strip())
    if not isinstance(said, Mapping) or len(said) != 1:
        raise UserError(f"stage {said!r} must be a name, or one name with its options: {{tune: {{epochs: 3}}}}")
    ((name, options),) = said.items()
    if options is not None and not isinstance(options, Mapping):
        raise UserError(f"options of stage {name!r} must be {{option: value}}, got {options!r}")
    return _named(str(name), {key: tuple(v) if isinstance(v, list) else v for key, v in (options or {}).items()})


def _stage(text: str) -> Stage:
    if "@" in text:
        return Compress.parsed(text)
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
    if match is None:
        raise UserError(f"{text!r} is no stage; write one as name(option=value), or a compression as fold@0.5")
    name, options = match.groups()
    return _named(name, dict(_options(text, options or "")))


def _named(name: str, options: Mapping[str, Any]) -> Stage:
    if name in FAMILIES:
        return _compression(name, **options)
    return call(f"stage {name!r}", pick("stage", {**STAGES, **FAMILIES}, name), **options)


def _compression(family: str, method: str = "", ratio: Any = None, **options: Any) -> Compress:
    """A compression recipe at a ratio.

    method: a spelling, such as mix+data; without it, the method that the family is named by.
    """
    if isinstance(ratio, str | bool | None):
        raise UserError(f"{family}: ratio {ratio!r} must be a number, such as {{{family}: {{ratio: 0.5}}}}")
    chosen = respelled(method or family, **options)
    if chosen.kind not in FAMILIES[family]:
        right = next(name for name, kinds in FAMILIES.items() if chosen.kind in kinds)
        raise UserError(f"{family}: method {method or family!r} is of the kind {chosen.kind}; write it as {right}:")
    return Compress(chosen, float(ratio))


def _options(text: str, said: str) -> Iterable[tuple[str, Any]]:
    for option in filter(None, (part.strip() for part in re.split(r",(?![^\[]*\])", said))):
        name, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"{text!r}: give options as name=value, got {option!r}")
        yield name.strip(), value_of(value.strip())
