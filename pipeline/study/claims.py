"""Effects as sentences, each with its interval and its n, or the reason why there is none.

A sentence that says "raises", "lowers" or "depends on" is false where the true effect is zero. The chance of one false
sentence or more, over all sentences of one stage and ratio, stays below 5%: Holm's correction bounds it within each
family of tests, and LEVELS shares the 5% out among the families (Bonferroni).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from pipeline.metrics import Metric
from pipeline.study.intervals import POINT
from pipeline.study.matching import BOTH
from pipeline.study.noise import Noise
from pipeline.study.words import amount, change, named, one_point, outcome_at, outcome_name, signed

FEWEST = 8  # pairs; below, a t-interval leans on differences being normal more than they show
# Each family's part of the 5%: the headline's effects, the gap's, changes of sign, differences between halves.
LEVELS = {"fold": 0.02, "gap": 0.01, "flip": 0.01, "interaction": 0.01}
Line = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A sentence about one step of a setting. other: the setting that it depends on, "" where there is none

    kind: effect, flip (its sign changes over another setting), interaction, none (not told from 0), few (n too small)
    size: the largest effect in it, absolute, in points; n: pairs; signs: +1, -1: those that it asserts
    """

    text: str
    kind: str
    setting: str
    low: str
    high: str
    outcome: str
    size: float
    n: int
    other: str = ""
    signs: frozenset[int] = frozenset()

    @property
    def sure(self) -> bool:
        """Does it assert something?"""
        return self.kind in ("effect", "interaction") or (self.kind == "flip" and bool(self.signs))


def claims(
    effects: pl.DataFrame, interactions: pl.DataFrame, noise: dict[str, Noise] | None, metric: Metric
) -> list[str]:
    """Sentences over the tables of one stage and ratio: the noise, each step of each setting, interactions, the gap.

    effects, interactions, noise: of the functions of these names; interactions: of the headline. Nothing is said of the
    gap but what is sure, because it is the second and noisier number.
    """
    heard = [] if noise is None else [noise_sentence(noise, metric)]
    return heard + [claim.text for claim in weighed(effects, interactions, metric)]


def weighed(effects: pl.DataFrame, interactions: pl.DataFrame, metric: Metric) -> list[Claim]:
    """`claims` as records, without the noise."""
    lines = effects.filter(pl.col("outcome").is_in(["fold", "gap"]))
    if lines.is_empty():
        return []
    steps = lines.partition_by("outcome", "setting", "low", "high", maintain_order=True)
    found = _one_few_each([claim for step in steps for claim in _step(step.to_dicts(), metric)])
    return found + list(_interacting(interactions, lines["stage"][0], lines["ratio"][0], metric))


def _one_few_each(found: list[Claim]) -> list[Claim]:
    """Of a setting whose n is too small at every step, one step: that with the most pairs."""
    settings = {claim.setting for claim in found} - {claim.setting for claim in found if claim.kind != "few"}
    most = {name: max((c for c in found if c.setting == name), key=lambda claim: claim.n) for name in settings}
    return [claim for claim in found if claim is most.get(claim.setting, claim)]


def _step(lines: list[Line], metric: Metric) -> Iterator[Claim]:
    """The claim over one step and outcome: one line, or one for each level of the setting that turns the sign."""
    claim = _turning(lines, metric) if lines[0]["over"] else _plain(lines[0], metric)
    if claim.sure or claim.outcome == "fold":
        yield claim


def _is_sure(line: Line) -> bool:
    return line["n"] >= FEWEST and line["p_holm"] is not None and line["p_holm"] < LEVELS[line["outcome"]]


def _plain(line: Line, metric: Metric) -> Claim:
    about = (line["setting"], line["low"], line["high"], line["outcome"], abs(line["effect"]), line["n"])
    subject, what = named(line), outcome_at(line, metric)
    if line["n"] < FEWEST:
        text = f"{subject}: n too small for a word on {what} ({_n(line['n'])}{_would(line, metric)})."
        return Claim(text, "few", *about)
    beside = f"({_n(line['n'])}; {_beside(line, metric)})"
    if _is_sure(line):
        text = f"{subject} {change(line['effect'], what, line['half'], line['outcome'], metric)} {beside}."
        return Claim(text, "effect", *about, signs=frozenset([_sign(line)]))
    text = f"{subject} has no sure effect on {what}: {signed(line['effect'], line['half'], metric)} {beside}"
    return Claim(f"{text}{_would(line, metric) if line['half'] > POINT else ''}.", "none", *about)


def _turning(lines: list[Line], metric: Metric) -> Claim:
    """Every half, never the mean; an assertion only where halves of both signs are sure."""
    signs = frozenset(_sign(line) for line in lines if _is_sure(line))
    settled = len(signs) == 2 and lines[0]["p_flip"] < LEVELS["flip"]
    halves = ", ".join(_half(line, metric) for line in lines)
    first, over, n = lines[0], lines[0]["over"], sum(line["n"] for line in lines)
    about = (first["setting"], first["low"], first["high"], first["outcome"], max(abs(i["effect"]) for i in lines), n)
    subject, what = named({**first, "where": ""}), outcome_at(first, metric)
    if sum(line["n"] >= FEWEST for line in lines) < 2:
        counts = ", ".join(f"{_n(line['n'])} where {line['where']}" for line in lines)
        text = f"{subject}: n too small for a word on {what}, where its sign may depend on {over} ({counts})."
        return Claim(text, "few", *about, over)
    if settled:
        return Claim(f"{subject} raises or lowers {what}, depending on {over}: {halves}.", "flip", *about, over, signs)
    text = f"{subject} may raise or lower {what}, depending on {over}: {halves}; not settled."
    return Claim(text, "flip", *about, over)


def _half(line: Line, metric: Metric) -> str:
    if line["n"] < FEWEST:
        return f"n too small where {line['where']} ({_n(line['n'])})"
    effect = signed(line["effect"], line["half"], metric)
    return f"{effect} where {line['where']} ({_n(line['n'])}; {_beside(line, metric)})"


def _interacting(table: pl.DataFrame, stage: str, ratio: float | None, metric: Metric) -> Iterator[Claim]:
    """The surest difference between halves of each two settings, if it is sure and no change of sign."""
    enough = pl.min_horizontal("n", "n_low", "n_high") >= FEWEST
    turned = table.filter("flips").select("setting", "low", "high", "other")
    sure = table.filter(enough & (pl.col("p_holm") < LEVELS["interaction"])).join(
        turned, on=["setting", "low", "high", "other"], how="anti", maintain_order="left"
    )
    told = set()
    for line in sure.sort(pl.col("p"), -pl.col("difference").abs(), maintain_order=True).to_dicts():
        if (both := frozenset([line["setting"], line["other"]])) in told:
            continue
        told.add(both)
        halves = [
            f"{signed(line[f'effect_{at}'], line[f'half_{at}'], metric)} where {line['other']}={line[f'other_{at}']} "
            f"({_n(line[f'n_{at}'])}; {_beside_half(line, at, stage, metric)})"
            for at in ("low", "high")
        ]
        what = outcome_at({"outcome": "fold", "stage": stage, "ratio": ratio}, metric)
        subject = named({**line, "where": "", "along": ""})
        difference = signed(line["difference"], line["half"], metric)
        text = f"{subject} acts on {what}, by an amount that depends on {line['other']}: {' and '.join(halves)}, "
        text += f"a difference of {difference} ({line['n']} quadruples)."
        about = (line["setting"], line["low"], line["high"], "fold", abs(line["difference"]), line["n"])
        yield Claim(text, "interaction", *about, line["other"])


def noise_sentence(noise: dict[str, Noise], metric: Metric) -> str:
    """What seeds do to single networks: their spread, and how much of what is seen is the recipe."""
    parts = []
    for outcome, one in noise.items():
        spread = f"{outcome_name(outcome, metric)} by {amount(one.sd, None, metric)}"
        if one.reliability is not None:
            share, low, high = (max(value, 0) for value in (one.reliability, one.low, one.high))
            spread += f" (recipes make {share:.0%} of its variance, {low:.0%} to {high:.0%})"
        parts.append(spread)
    first = next(iter(noise.values()))
    over = f"{first.recipes} recipe{'s' * (first.recipes != 1)} with several seeds, {first.cells} networks"
    asked = f"seeds alone ask for {_pairs(first.needed)} to show {one_point(metric)}"
    spreads = f"{', '.join(parts)} (standard deviations over {over})"
    return f"Networks that differ in their seed alone scatter: {spreads}; {asked}."


def _beside(line: Line, metric: Metric) -> str:
    """The other stage, base accuracy and the gap (or the headline), over the same pairs."""
    other = {"fold": "gap", "gap": "fold"}[line["outcome"]]
    names = [stage for stage in reversed(BOTH) if stage != line["stage"]]
    return _listed({name: (line[f"{name}_effect"], line[f"{name}_half"]) for name in (*names, "base", other)}, metric)


def _beside_half(line: Line, at: str, stage: str, metric: Metric) -> str:
    names = [name for name in reversed(BOTH) if name != stage]
    return _listed({name: (line[f"{name}_{at}"], line[f"{name}_half_{at}"]) for name in (*names, "base")}, metric)


def _listed(values: dict[str, tuple[float | None, float | None]], metric: Metric) -> str:
    """ "raw +3.0 ± 1.0; base +0.3 ± 0.2" """
    labels = {"gap": "lead over pruning", "fold": "folded"}
    return "; ".join(
        f"{labels.get(name, name)} {signed(effect, half, metric, bare=True)}"
        for name, (effect, half) in values.items()
        if effect is not None
    )


def _would(line: Line, metric: Metric) -> str:
    return "" if line["needed"] is None else f"; {_pairs(line['needed'])} would show {one_point(metric)}"


def _pairs(n: int) -> str:
    return f"about {n:,} pairs"


def _n(n: int) -> str:
    return f"{n:,} pair{'s' * (n != 1)}"


def _sign(line: Line) -> int:
    return 1 if line["effect"] > 0 else -1
