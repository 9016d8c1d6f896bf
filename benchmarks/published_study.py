"""Writes docs/study.md and its pictures: what the published study's networks say about foldability.

    python -m benchmarks.published_study --rows study_rows.csv.gz --llama study_llama.csv

The two files hold the figures of osaukh/folding_as_projection, output/ (see pipeline.study.published). Every number on
the page is computed here, and a sentence whose number no longer says what it says stops the page.
"""

import argparse
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.published_claims import claims, misleading, tuned
from benchmarks.published_numbers import (
    ADAM,
    CLIP,
    HALF,
    LARGE,
    PREACT,
    SGD,
    STAGES,
    TITLES,
    VIT,
    Mean,
    Study,
    augmentations,
    correlation,
    factor,
    falls,
    gap,
    last,
    level,
    llama,
    mean,
    named,
    networks,
    rate_and_decay,
    rises,
    said,
    step,
    table,
    within,
)
from benchmarks.published_parts import PARTS, best, farthest, foretold
from benchmarks.published_pictures import PICTURES
from pipeline.study.effects import effects
from pipeline.study.interactions import interactions
from pipeline.study.lines import Lines, lines
from pipeline.study.published import extras, published

PAGE = Path("docs/study.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="study_rows.csv.gz")
    parser.add_argument("--llama", type=Path, required=True, help="study_llama.csv")
    args = parser.parse_args()
    study = read(args.rows, args.llama)
    PAGE.write_text("\n".join(map(wrapped, page(study))))
    for name, draw in PICTURES.items():
        draw(study, PAGE.with_name(f"study_{name}.png"))


def wrapped(line: str) -> str:
    """Prose in lines of 120 characters; tables and commands as they are."""
    if len(line) <= 120 or line.startswith("|"):
        return line
    indent = "  " if line.startswith(("- ", "  ")) else ""
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def read(rows: Path, llama: Path) -> Study:
    study = Study(extras=extras(rows), llama=lines(published(llama)))
    for family in TITLES:
        study.sweeps[family] = published(rows, family, study.told.append)
        study.found[family] = lines(study.sweeps[family])
    study.predicted = foretold(study)
    return study


def page(study: Study) -> Iterator[str]:
    for part in (opening, leads, levers, misleading, claims, tuned, *PARTS):
        yield from part(study)
        yield ""


# --- the parts of the page


def opening(study: Study) -> list[str]:
    sgd, adam = study.found[SGD], study.found[ADAM]
    cells = sum(len(sweep.cells) for sweep in study.sweeps.values())
    rate = step(sgd, "repaired", "lr", 0.001, 0.1)
    base, also, lead = (step(sgd, "repaired", "lr", 0.001, 0.1, outcome) for outcome in ("base", "prune", "gap"))
    decay = step(adam, "repaired", "weight_decay", 0.0, 0.0005)
    decay_base = step(adam, "repaired", "weight_decay", 0.0, 0.0005, "base")
    sam, sam_raw = (step(sgd, stage, "rho", 0.0, 0.1) for stage in ("repaired", "raw"))
    without, with_l1 = (step(sgd, "repaired", "rho", 0.0, 0.1, "gap", l1=l1) for l1 in (0.0, 1e-5))
    pruned, undone = (step(sgd, "repaired", "l1", 0.0, 1e-5, "prune", rho=rho) for rho in (0.0, 0.1))
    fast, slow = (llama(study, (rate,), LARGE) for rate in (0.005, 0.001))
    return [
        f"# {cells + study.llama.recipes:,} published networks, and what makes them foldable",
        "",
        "```sh",
        "python -m benchmarks.published_study --rows study_rows.csv.gz --llama study_llama.csv",
        "```",
        "",
        f"These are {cells:,} vision networks and {study.llama.recipes} language models of *Cut Less, Fold More* (ICLR "
        "2026, arXiv:2602.18116), whose authors published every accuracy of theirs "
        "([osaukh/folding_as_projection](https://github.com/osaukh/folding_as_projection)). Nothing was trained or "
        "compressed here; the figures were read again, by matched pairs.",
        "",
        "*Folded accuracy*: that of the network after folding. *Gap*: folded accuracy less that of the better of l1 "
        "and l2 pruning at the same size. *Base*: accuracy of the whole network. *Repaired*: BatchNorm statistics "
        "re-estimated on training pictures; for SimpleViT and CLIP the study's repair is one supervised epoch on the "
        "LayerNorm parameters instead, which sees labels. *Matched pairs*: networks that differ in one setting "
        "alone. All intervals are 95% (Student's t); all figures are at half of the channels unless a ratio stands "
        "beside them, and in points of accuracy.",
        "",
        "## The answer",
        "",
        "- **Folding leads the better pruning on convolutional networks and CLIP.** Repaired, by "
        f"{rises(gap(study, ADAM), 'networks')} under Adam, {rises(gap(study, SGD), 'networks')} under SGD, "
        f"{rises(gap(study, PREACT), 'networks')} on PreActResNet18, {rises(gap(study, CLIP), 'networks')} on CLIP; "
        f"and by nothing, {level(gap(study, VIT), 'networks')}, on the SimpleViTs that had learnt.",
        "- **A large learning rate makes an SGD network foldable, and its gap hides that.** From .001 to .1 the "
        f"folded accuracy changes by {rises(rate)}, the base by {falls(base)}; the pruned accuracy changes by "
        f"{rises(also)}, so that the gap changes by {falls(lead)}.",
        "- **Weight decay makes an Adam network foldable and costs base accuracy.** From 0 to 5e-4 the folded accuracy "
        f"changes by {rises(decay)} and the base by {falls(decay_base)}.",
        "- **SAM under SGD helps only behind a repair.** From rho 0 to .1 the folded accuracy changes by "
        f"{rises(sam)} repaired and by {falls(sam_raw)} raw.",
        f"- **SAM's effect on the gap comes with L1.** It is {level(without)} without L1 and {rises(with_l1)} with "
        f"it, a difference of {rises(meeting(sgd), 'quadruples')}. L1 changes the pruned accuracy by {rises(pruned)} "
        f"without SAM and by {level(undone)} with rho .1, which is what a second pass of SAM without the L1 term "
        "would do.",
        "- **Repaired, the gap says little about what folding leaves.** Over the 184 Adam and 541 SGD networks the "
        f"two correlate by {related(study, ADAM)} and {related(study, SGD)}; the gap goes with how badly pruning "
        f"does, {related(study, ADAM, 'prune')} and {related(study, SGD, 'prune')}. Raw, where pruning leaves little, "
        f"they agree: {related(study, ADAM, stage='raw')} and "
        f"{related(study, SGD, stage='raw')}.",
        f"- **Five epochs of fine-tuning leave little of the lead**: {rises(gap(study, ADAM, STAGES[3]), 'networks')} "
        f"under Adam, {rises(gap(study, PREACT, STAGES[3]), 'networks')} on PreActResNet18, "
        f"{rises(gap(study, CLIP, STAGES[3]), 'networks')} on CLIP.",
        "- **LLaMA depends on the learning rate**: at half of the gated channels of the 130M model, magnitude "
        f"pruning leads at rate .001 (pruned over folded perplexity {factor(slow, -1)}, {slow.n} networks) and "
        f"folding at .005 ({factor(fast, 1)}, {fast.n} networks).",
        "- **A recipe foretells what folding leaves**, for recipes that were held out within the grid: R² "
        f"{best(study, SGD, 'settings'):.2f} under SGD (541 networks) and {best(study, ADAM, 'settings'):.2f} under "
        f"Adam (184), where base accuracy alone reaches {best(study, SGD, 'base'):.2f} and "
        f"{best(study, ADAM, 'base'):.2f}. It does not where a whole level of a setting was held out: at worst "
        f"{farthest(study, SGD)['r2']:.2f} and {farthest(study, ADAM)['r2']:.2f}.",
    ]


def meeting(found: Lines) -> Mean:
    """How much more SAM (rho 0 to .1) moves the gap with L1 than without, over recipes that differ in both alone."""
    every = interactions(found, "repaired", HALF, "gap")
    which = {"setting": "rho", "low": "0", "high": "0.1", "other": "l1"}
    line = every.row(by_predicate=pl.all_horizontal(pl.col(name) == text for name, text in which.items()), named=True)
    return Mean(line["difference"], line["half"], line["n"], math.nan)


def related(study: Study, family: str, side: str = "fold", stage: str = "repaired") -> str:
    """ "-0.04 (-0.18 to 0.11)": how the gap goes with the folded or the pruned accuracy"""
    r, low, high, _ = correlation(networks(study.found[family], family, stage), "gap", side)
    return f"{r:+.2f} ({low:+.2f} to {high:+.2f})"


def leads(study: Study) -> Iterator[str]:
    yield "## Does folding lead?"
    yield ""
    head = ["", "stage", *(f"{ratio:g}" for ratio in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9))]
    rows = []
    for family, title in TITLES.items():
        for stage in STAGES:
            cells = [_gap_cell(study, family, stage, float(ratio)) for ratio in head[2:]]
            if any(cell != "-" for cell in cells):
                shown = last(family).replace("_", " ") if stage == "repaired" else stage.replace("tuned", "fine-tuned")
                rows.append([title, shown, *cells])
    yield from table(head, rows)
    yield ""
    yield (
        "Gap in points; in brackets how often folding is ahead, and the networks. The mean accuracies behind it are "
        "in the next table. Fine-tuned networks were tuned behind the repair (Adam, rate 1e-4, one epoch or five); "
        "nobody fine-tuned the folded SGD networks, and 22 of CLIP's 72."
    )
    yield ""
    rows = []
    for family, title in TITLES.items():
        for stage in ("raw", last(family)):
            at = networks(study.found[family], family, stage)
            methods = study.found[family].methods.filter((pl.col("stage") == stage) & (pl.col("ratio") == HALF))
            methods = methods.join(at.select("cell"), on="cell", how="semi")
            means = dict(methods.group_by("method").agg(pl.col("value").mean()).rows())
            values = [f"{means[name]:.1f}" for name in ("fold", "l1", "l2")]
            rows.append([title, str(len(at)), f"{at['base'].mean():.1f}", stage.replace("_", " "), *values])
    yield from table(["at half of the channels", "networks", "base", "stage", "fold", "l1", "l2"], rows)
    yield ""
    yield "![gap over the ratio](study_gap.png)"


def _gap_cell(study: Study, family: str, stage: str, ratio: float) -> str:
    found = networks(study.found[family], family, last(family) if stage == "repaired" else stage, ratio)
    if len(found) < 3:
        return "-"
    value = mean(found["gap"])
    return f"{value.short} ({value.wins:.0%}; {value.n})"


def levers(study: Study) -> Iterator[str]:
    sgd, adam = study.found[SGD], study.found[ADAM]
    yield "## Which settings make a ResNet18 foldable"
    yield ""
    yield "![effects of settings](study_effects.png)"
    yield ""
    for family in (SGD, ADAM):
        yield (
            f"**{TITLES[family]}.** Mean change over matched pairs, repaired, with the raw one beside it. Bold: sure "
            "also beside all other lines of the column (Holm, 5%). Where the sign depends on another setting, its "
            "levels stand apart."
        )
        yield ""
        yield from effect_table(study.found[family])
        yield ""
    same, other = effective(sgd)
    yield (
        "- **Learning rate and momentum are one setting.** Rate .01 with momentum .9 and rate .001 with .99 have the "
        f"same effective rate, rate / (1 - momentum) = .1, and differ by {level(same)} of folded accuracy and "
        f"{said(other)} of base."
    )
    yield ""
    yield from effective_table(sgd)
    yield ""
    yield "![effective learning rate](study_rate.png)"
    yield ""
    low, high = (step(sgd, "repaired", "weight_decay", 0.0, 0.001, lr=lr) for lr in (0.01, 0.1))
    yield (
        "- **Decay helps an SGD network where the rate is small.** Decay of 1e-3 changes the folded accuracy by "
        f"{rises(low)} at rate .01 and by {falls(high)} at rate .1."
    )
    base, few, many = (
        step(sgd, "repaired", "schedule", "constant", "cosine", outcome, **where)
        for outcome, where in (("base", {}), ("fold", {"momentum": 0.9}), ("fold", {"momentum": 0.99}))
    )
    yield (
        f"- **A cosine schedule under SGD raises the base by {rises(base)}** and changes the folded accuracy by "
        f"{falls(few)} at momentum .9 and by {rises(many)} at .99."
    )
    fold, lead = (step(sgd, "repaired", "augment", *augmentations(sgd), outcome) for outcome in ("fold", "gap"))
    fold_adam, lead_adam = (step(adam, "repaired", "augment", *augmentations(adam), o) for o in ("fold", "gap"))
    yield (
        f"- **RandAugment takes from what folding leaves of a ResNet18**: {falls(fold)} under SGD, {falls(fold_adam)} "
        f"under Adam. The gap changes by {falls(lead)} and {level(lead_adam)}."
    )
    raw, repaired = (step(adam, stage, "lr", 0.001, 0.1) for stage in ("raw", "repaired"))
    yield (
        "- **Raw and repaired disagree on what is foldable.** Under Adam the rate .001 to .1 changes the folded "
        f"accuracy by {rises(raw)} raw and by {falls(repaired)} repaired; under SGD SAM does the reverse (above). A "
        "repair that sees training pictures mends other networks than those that fold well without any."
    )
    under = {
        name: step(adam, "repaired", "weight_decay", 0.0, 0.0005, name, schedule="cosine") for name in ("fold", "base")
    }
    yield (
        "- **Stale statistics do not explain the price of decay under Adam** (see the end). Under a cosine schedule "
        f"alone, where no network shows any, decay of 5e-4 changes the folded accuracy by {rises(under['fold'])} and "
        f"the base by {falls(under['base'])}."
    )
    without, with_l1 = (step(sgd, "repaired", "rho", 0.0, 0.1, l1=l1) for l1 in (0.0, 1e-5))
    pruned = step(sgd, "repaired", "l1", 0.0, 1e-5, "prune", rho=0.0)
    yield (
        f"- **SAM raises the folded accuracy more without L1** ({rises(without)}) than with it ({rises(with_l1)}), the "
        f"reverse of its effect on the gap. Without SAM, L1 changes the pruned accuracy by {rises(pruned)}."
    )
    parts = rate_and_decay(adam.at("repaired", HALF))
    yield (
        "- **Rate and decay under Adam act on the gap only together**: a line in both explains "
        f"{parts['both']:.0%} of its variance, and {parts['product']:.0%} with their product (184 networks, in sample; "
        f"{within(adam.at('repaired', HALF))} by bootstrap)."
    )
    free, decayed = (step(adam, "repaired", "lr", 0.001, 0.1, "gap", weight_decay=w) for w in (0.0, 0.001))
    both = step(adam, "repaired", "lr", 0.001, 0.1, "gap")
    yield (
        f"  From rate .001 to .1 the gap changes by {falls(free)} without decay and by {rises(decayed)} with 1e-3; "
        f"the mean over all decays, {both.text('pairs')}, is false of each."
    )


def effect_table(found: Lines) -> list[str]:
    rows = []
    for line in effects(found, "repaired", HALF, ("fold",)).to_dicts():
        values = {name: _interval(line, name) for name in ("fold", "raw", "gap", "base")}
        if line["p_holm"] is not None and line["p_holm"] < 0.05:
            values["fold"] = f"**{values['fold']}**"
        rows.append([named(line), *values.values(), str(line["n"])])
    return table(["setting", "folded", "folded, raw", "gap", "base", "pairs"], rows)


def _interval(line: dict[str, Any], name: str) -> str:
    effect, half = line[f"{name}_effect"], line[f"{name}_half"]
    return f"{effect:+.1f}" + ("" if half is None else f" ± {half:.1f}")


def effective(found: Lines) -> tuple[Mean, Mean]:
    """(folded accuracy, base): rate .01 with momentum .9 less rate .001 with momentum .99, all else alike."""
    at = found.at("repaired", HALF)
    rest = [name for name in found.settings if name not in ("lr", "momentum")]
    halves = [at.filter((pl.col("lr") == lr) & (pl.col("momentum") == m)) for lr, m in ((0.001, 0.99), (0.01, 0.9))]
    both = halves[0].join(halves[1], on=rest, suffix="_high")
    return mean(both["fold_high"] - both["fold"]), mean(both["base_high"] - both["base"])


def effective_table(found: Lines) -> list[str]:
    at = found.at("repaired", HALF).with_columns(rate=(pl.col("lr") / (1 - pl.col("momentum"))).round(6))
    rows = []
    for (rate, lr, momentum), group in sorted(at.partition_by("rate", "lr", "momentum", as_dict=True).items()):
        values = [mean(group[name]) for name in ("fold", "prune", "gap", "base")]
        rows.append([f"{rate:g}", f"{lr:g}", f"{momentum:g}", *(f"{v.value:.1f} ± {v.half:.1f}" for v in values)])
        rows[-1].append(str(len(group)))
    return table(["effective rate", "rate", "momentum", "folded", "pruned", "gap", "base", "networks"], rows)


if __name__ == "__main__":
    main()
