"""Writes docs/study.md and its pictures: what the published study's networks say about foldability.

    python -m benchmarks.published_study --rows study_rows.csv.gz --llama study_llama.csv

The two files hold the figures of osaukh/folding_as_projection, output/ (see pipeline.study.published). Every number on
the page is computed here, and a sentence whose number no longer says what it says stops the page.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from benchmarks.published_numbers import (
    ADAM,
    CLIP,
    HALF,
    LARGE,
    NAMES,
    PREACT,
    SGD,
    STAGES,
    TITLES,
    VIT,
    Mean,
    Study,
    augmentations,
    correlation,
    falls,
    gap,
    last,
    level,
    llama,
    mean,
    networks,
    rate_and_decay,
    rises,
    said,
    step,
    table,
)
from benchmarks.published_parts import PARTS, best, foretold
from benchmarks.published_pictures import PICTURES
from pipeline.study.effects import effects
from pipeline.study.lines import Lines, lines
from pipeline.study.published import extras, published

PAGE = Path("docs/study.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="study_rows.csv.gz")
    parser.add_argument("--llama", type=Path, required=True, help="study_llama.csv")
    args = parser.parse_args()
    study = read(args.rows, args.llama)
    PAGE.write_text("\n".join(page(study)) + "\n")
    for name, draw in PICTURES.items():
        draw(study, PAGE.with_name(f"study_{name}.png"))


def read(rows: Path, llama: Path) -> Study:
    study = Study(extras=extras(rows), llama=lines(published(llama)))
    for family in TITLES:
        study.sweeps[family] = published(rows, family, study.told.append)
        study.found[family] = lines(study.sweeps[family])
    study.predicted = foretold(study)
    return study


def page(study: Study) -> Iterator[str]:
    for part in (opening, leads, levers, *PARTS):
        yield from part(study)
        yield ""


# --- the parts of the page


def opening(study: Study) -> list[str]:
    sgd, adam = study.found[SGD], study.found[ADAM]
    cells = sum(len(sweep.cells) for sweep in study.sweeps.values())
    rate = step(sgd, "repaired", "lr", 0.001, 0.1)
    base, lead = (step(sgd, "repaired", "lr", 0.001, 0.1, outcome) for outcome in ("base", "gap"))
    decay = step(adam, "repaired", "weight_decay", 0.0, 0.0005)
    decay_base = step(adam, "repaired", "weight_decay", 0.0, 0.0005, "base")
    sam, sam_raw = (step(sgd, stage, "rho", 0.0, 0.1) for stage in ("repaired", "raw"))
    without, with_l1 = (step(sgd, "repaired", "rho", 0.0, 0.1, "gap", l1=l1) for l1 in (0.0, 1e-5))
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
        f"folded accuracy changes by {rises(rate)}, the base by {falls(base)}, the gap by {falls(lead)}: pruning "
        "gains as much.",
        f"- **Weight decay does under Adam, at a price.** From 0 to 5e-4 the folded accuracy changes by {rises(decay)} "
        f"and the base by {falls(decay_base)}.",
        "- **SAM under SGD helps only behind a repair.** From rho 0 to .1 the folded accuracy changes by "
        f"{rises(sam)} repaired and by {falls(sam_raw)} raw.",
        f"- **SAM's effect on the gap is an artefact of L1.** It is {level(without)} without L1 and {rises(with_l1)} "
        "with it. L1 makes pruning better where there is no SAM, and the study's second SAM pass leaves the L1 term "
        "out, so that SAM undoes it.",
        "- **The gap says little about what folding leaves**: over the 184 Adam and 541 SGD networks their "
        f"correlations are {related(study, ADAM)} and {related(study, SGD)}. A study of foldability that ranks "
        "recipes by the gap ranks them by how badly pruning does.",
        f"- **Five epochs of fine-tuning leave little of the lead**: {rises(gap(study, ADAM, STAGES[3]), 'networks')} "
        f"under Adam, {rises(gap(study, PREACT, STAGES[3]), 'networks')} on PreActResNet18, "
        f"{rises(gap(study, CLIP, STAGES[3]), 'networks')} on CLIP.",
        "- **LLaMA depends on the learning rate**: at half of the gated channels of the 130M model, magnitude "
        f"pruning leads at .001 ({falls(slow, 'networks')} of 100 ln perplexity) and folding at .005 "
        f"({rises(fast, 'networks')}).",
        "- **A recipe foretells what folding leaves**, also for recipes that were held out: R² "
        f"{best(study, SGD, 'settings'):.2f} under SGD (541 networks) and {best(study, ADAM, 'settings'):.2f} under "
        f"Adam (184), where base accuracy alone reaches {best(study, SGD, 'base'):.2f} and "
        f"{best(study, ADAM, 'base'):.2f}.",
    ]


def related(study: Study, family: str) -> str:
    """ "-0.04 (-0.18 to 0.11)": how the gap goes with the folded accuracy"""
    r, low, high, _ = correlation(networks(study.found[family], family, "repaired"), "gap", "fold")
    return f"{r:.2f} ({low:.2f} to {high:.2f})"


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
        "Gap in points, in brackets how often folding is ahead. The mean accuracies behind it are in the next table. "
        "Fine-tuned networks were tuned behind the repair (Adam, rate 1e-4, one epoch or five); nobody fine-tuned the "
        "folded SGD networks, and 22 of CLIP's 72."
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
        yield f"**{TITLES[family]}.** Mean change over matched pairs, repaired, with the raw one beside it."
        yield ""
        yield from effect_table(study.found[family])
        yield ""
    same, other = effective(sgd)
    yield (
        "- **Learning rate and momentum are one setting.** Rate .01 with momentum .9 and rate .001 with .99 have the "
        f"same effective rate, rate / (1 - momentum) = .1, and differ by {level(same)} of folded accuracy and "
        f"{level(other)} of base."
    )
    yield from effective_table(sgd)
    yield ""
    yield "![effective learning rate](study_rate.png)"
    yield ""
    low, high = (step(sgd, "repaired", "weight_decay", 0.0, 0.001, lr=lr) for lr in (0.01, 0.1))
    yield (
        "- **Decay and rate replace one another under SGD.** Decay of 1e-3 changes the folded accuracy by "
        f"{rises(low)} at rate .01 and by {falls(high)} at rate .1."
    )
    cosine, cosine_base = (step(sgd, "repaired", "schedule", "constant", "cosine", o) for o in ("fold", "base"))
    slow = step(sgd, "repaired", "schedule", "constant", "cosine", lr=0.001)
    yield (
        f"- **A cosine schedule under SGD raises the base by {rises(cosine_base)}** and changes the folded accuracy by "
        f"{said(cosine)}; at rate .001 by {falls(slow)}. Annealing takes from a small rate what made it foldable."
    )
    for family, found in ((SGD, sgd), (ADAM, adam)):
        plain, augmented = augmentations(found)
        fold, gap_ = (step(found, "repaired", "augment", plain, augmented, o) for o in ("fold", "gap"))
        told = falls(gap_) if family == SGD else level(gap_)
        yield (
            f"- **RandAugment lowers what folding leaves of a {TITLES[family]}**: by {falls(fold)}; the gap changes "
            f"by {told}."
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
        f"{parts['both']:.0%} of its variance, and {parts['product']:.0%} with their product (184 networks, in sample)."
    )
    free, decayed = (step(adam, "repaired", "lr", 0.001, 0.1, "gap", weight_decay=w) for w in (0.0, 0.001))
    yield (
        f"  From rate .001 to .1 the gap changes by {falls(free)} without decay and by {rises(decayed)} with 1e-3; "
        "the mean over both would be near nothing, and false of each."
    )


def effect_table(found: Lines) -> list[str]:
    made = effects(found, "repaired", HALF, ("fold",))
    # An effect whose sign depends on another setting stands in halves there; here each step's mean is one line.
    rows = []
    for setting, low, high in made.select("setting", "low", "high").unique(maintain_order=True).rows():
        outcomes = [step(found, "repaired", setting, low, high, name) for name in ("fold", "prune", "gap", "base")]
        raw = step(found, "raw", setting, low, high)
        over = made.filter((pl.col("setting") == setting) & (pl.col("low") == low) & (pl.col("high") == high))["over"][
            0
        ]
        change = "off to on" if setting == "augment" else f"{low} to {high}"
        note = f" (sign changes over {NAMES[over]})" if over else ""
        texts = [value.short for value in (outcomes[0], raw, *outcomes[1:])]
        rows.append([f"{NAMES[setting]} {change}{note}", *texts, str(outcomes[0].n)])
    return table(["setting", "folded", "folded, raw", "pruned", "gap", "base", "pairs"], rows)


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
