"""The later parts of the page on the published study: other networks, corruptions, language, prediction, limits."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import polars as pl

from benchmarks.published_numbers import (
    ADAM,
    CLIP,
    HALF,
    LARGE,
    LEARNT,
    NAMES,
    PREACT,
    SGD,
    SMALL,
    TITLES,
    VIT,
    Study,
    corruptions,
    cyclic,
    distances,
    factor,
    falls,
    last,
    llama,
    mean,
    networks,
    outgrown,
    ranked,
    repeats,
    rises,
    sharpness,
    simple_vit,
    table,
)
from pipeline.study.prediction import predictions


def others(study: Study) -> Iterator[str]:
    yield "## PreActResNet18 and SimpleViT"
    yield ""
    yield (
        "Every network has a peak learning rate of its own, so that no two differ in one setting alone. A linear "
        "model in its place (the rate and its square in decades, augmentation, SAM; HC3 errors) gives each effect "
        "beside the others. Augmentation is crop, flip and RandAugment together against none."
    )
    yield ""
    rows = []
    for family in (PREACT, VIT):
        at = networks(study.found[family], family, last(family))
        models = {outcome: cyclic(at, outcome) for outcome in ("fold", "prune", "gap", "base")}
        for name in models["fold"]:
            texts = [models[outcome][name].short for outcome in models]
            rows.append([TITLES[family], name, *texts, str(len(at))])
    yield from table(["", "setting", "folded", "pruned", "gap", "base", "networks"], rows)
    yield ""
    preact = cyclic(networks(study.found[PREACT], PREACT, "repaired"), "fold")["crop, flip and RandAugment"]
    whole = cyclic(networks(study.found[PREACT], PREACT, "repaired"), "base")["crop, flip and RandAugment"]
    vit, vit_base = (simple_vit(study, outcome)["crop, flip and RandAugment"] for outcome in ("fold", "base"))
    yield (
        f"With augmentation a PreActResNet18 folds to an accuracy that differs by {falls(preact, 'networks')} from "
        f"that without, while its base gains {rises(whole, 'networks')}. A SimpleViT keeps nearly all that "
        f"augmentation gives: {rises(vit, 'networks')} of {rises(vit_base, 'networks')}. Only its MLPs were "
        f"compressed: without half of their channels it has {_left(study):.0%} of its parameters, and a ResNet a "
        "quarter."
    )


def _left(study: Study) -> float:
    """Share of its parameters that a SimpleViT keeps without half of the channels of its MLPs."""
    rows = study.sweeps[VIT].rows.filter(pl.col("method").is_in(["dense", "l1"]))
    params = dict(
        rows.filter(pl.col("ratio").is_in([0.0, HALF])).group_by("ratio").agg(pl.col("params").median()).rows()
    )
    return params[HALF] / params[0]


def beyond(study: Study) -> Iterator[str]:
    yield "## Corruptions and sharpness"
    yield ""
    rows = []
    leads = {}
    for family in (PREACT, CLIP):
        dense = study.found[family].table.select("cell", "base")
        found = leads[family] = corruptions(study.extras, family, dense)
        for ratio in (0.1, 0.2, 0.3, 0.4, 0.5):
            at = found.filter((pl.col("ratio") - ratio).abs() < 1e-9)
            values = [mean(at[name]) for name in ("clean", "corrupt", "excess")]
            stage = "raw" if family == CLIP else "repaired"
            rows.append([f"{TITLES[family]}, {stage}", f"{ratio:g}", *(v.short for v in values), str(values[2].n)])
    head = ["", "ratio", "lead on clean pictures", "lead on corrupted", "at equal clean accuracy", "networks"]
    yield from table(head, rows)
    yield ""
    at = leads[PREACT].filter((pl.col("ratio") - HALF).abs() < 1e-9)
    yield (
        "Folding leads on corrupted pictures (CIFAR-10-C, ImageNet-C) as well, by "
        f"{rises(mean(at['corrupt']), 'networks')} on PreActResNet18 at half of the channels. The last column asks "
        "whether that is more than its clean lead: it takes from it the accuracy under corruption of an l2-pruned "
        "network of the same clean accuracy, which is a less pruned one. There folding is "
        f"{falls(mean(at['excess']), 'networks')} on PreActResNet18, so that its robustness is that of any network of "
        "its accuracy, or a little less. This compares networks of different sizes."
    )
    yield ""
    rows = []
    for family in (ADAM, SGD, PREACT, CLIP):
        at = sharpness(study.found[family], study.extras, family)
        times = mean(at["relative"])
        related = [ranked(at, "sharp", "fold"), ranked(at, "relative", "gap")]
        factor = (
            f"{2**times.value:.2f} ({2 ** (times.value - times.half):.2f} to {2 ** (times.value + times.half):.2f})"
        )
        rows.append([TITLES[family], factor, f"{1 - times.wins:.0%}", *related, str(times.n)])
    head = ["at half of the channels", "folded over less sharp pruned network", "folded is less sharp"]
    yield from table([*head, "sharpness with folded accuracy", "relative sharpness with gap", "networks"], rows)
    yield ""
    yield (
        "Sharpness is the adaptive worst-case rise of the training loss (l-infinity, rho 5e-4); ratios are geometric "
        "means, correlations those of ranks. Folded networks are less sharp than pruned ones in every family; on "
        "ResNet18 the more so the larger their lead. A network that has lost its accuracy has a larger loss to "
        "raise, so that this goes with the lead and does not explain it."
    )
    yield ""
    worse: list[str] = []
    rows = []
    for family in (ADAM, PREACT, VIT, CLIP):
        at = distances(study.found[family], study.extras, family)
        agree = at.filter(pl.col("gap") != 0).select((pl.col("gap").sign() == pl.col("nearer").sign()).mean()).item()
        shares = [(at["nearer"] > 0).mean(), agree, (at["gap"] > 0).mean()]
        texts = [f"{2 ** mean(at['nearer']).value:.2f}", *(f"{share:.0%}" for share in shares)]
        worse += [TITLES[family]] if agree <= shares[2] else []
        rows.append([TITLES[family], *texts, ranked(at, "nearer", "gap"), str(len(at))])
    head = [
        "outputs, behind the repair",
        "distance, pruned over folded",
        "folded is nearer",
        "nearer is better",
        "folded is better",
    ]
    yield from table([*head, "rank correlation with gap", "networks"], rows)
    yield ""
    yield (
        "The distance between the outputs of the smaller and the whole network, on the test pictures, goes with the "
        "gap. To take the nearer of the two needs no labels, and is right no more often than folding always on "
        f"{'; '.join(worse)}. SGD's folded networks have no distances in the logs."
    )


def language(study: Study) -> Iterator[str]:
    yield "## LLaMA"
    yield ""
    rows = []
    for model in (SMALL, LARGE):
        for ratio in (0.2, 0.5):
            for rate in (0.001, 0.005, 0.01):
                at = study.llama.at("raw", ratio).filter((pl.col("lr") == rate) & (pl.col("model") == model))
                values = [f"{math.exp(at[name].mean() / 100):.1f}" for name in ("base", "fold", "prune")]
                lead = mean(at["gap"])
                rows.append([f"{model[6:].upper()}, rate {rate:g}", f"{ratio:g}", *values, lead.short, str(lead.n)])
    head = ["", "ratio", "perplexity", "folded", "pruned by magnitude", "gap, 100 ln", "networks"]
    yield from table(head, rows)
    yield ""
    high = llama(study, (0.005, 0.01), SMALL, LARGE)
    low = llama(study, (0.001,), SMALL, LARGE)
    small, large = (llama(study, (0.001,), model) for model in (SMALL, LARGE))
    poor = study.llama.at("raw", HALF).filter(pl.col("base") > 100 * math.log(50)).height
    yield (
        f"At half of the gated channels folding has the lower perplexity in all {high.n} networks of rates .005 and "
        f".01, by a factor of {factor(high, 1)}. At .001 nothing is told over both sizes ({factor(low, 0)}, {low.n} "
        f"networks): magnitude wins on the 130M model ({factor(large, -1)}, {large.n} networks), and the 60M one "
        f"leaves it open ({factor(small, 0)}, {small.n} networks). Factors are pruned over folded perplexity with 95% "
        f"intervals on the logarithm, perplexities geometric means. {poor} whole networks, all at rate .01, have a "
        "perplexity above 50. Six networks a line: such intervals settle directions, not sizes."
    )
    assert high.wins == 1, "the page says that folding wins in all of them"


def foretelling(study: Study) -> Iterator[str]:
    yield "## Prediction from the recipe"
    yield ""
    rows = []
    for family in (ADAM, SGD, PREACT, VIT):
        at = study.predicted[family]
        for target in ("fold", "gap"):
            own = at.filter((pl.col("target") == target) & (pl.col("held_out") == "recipe"))
            always = own.filter(pl.col("model") == "always fold")["regret"]
            cells = []
            for features in ("base", "settings", "settings + base"):
                scored = own.filter((pl.col("features") == features) & (pl.col("model") == "forest")).row(0, named=True)
                cells.append(f"{scored['r2']:.2f}, {scored['mae']:.1f}")
            worst = farthest(study, family, target)
            chosen = own.filter((pl.col("features") == "settings + base") & (pl.col("model") == "forest"))["regret"]
            regrets = f"{always[0]:.2f}, {chosen[0]:.2f}" if len(always) else "-"
            mae = own.filter(pl.col("model") == "mean")["mae"][0]
            name = "folded" if target == "fold" else "gap"
            last_cells = [f"{worst['r2']:.2f} ({NAMES[worst['held_out']]})", regrets, str(own["n"][0])]
            rows.append([TITLES[family], name, f"{mae:.1f}", *cells, *last_cells])
    head = ["R², mean absolute error", "target", "mean: error", "base alone", "settings", "settings + base"]
    yield from table([*head, "a level held out, worst R²", "regret: always fold, forest", "networks"], rows)
    yield ""
    yield (
        "A random forest on networks whose recipe was held out, a tenth of them at a time. In the last columns but "
        "one all networks of one level of a setting were held out, at the setting where that went worst, and the "
        "points that are lost by folding always, and by the forest's choice of method. Every recipe has one seed, so "
        f"that the ceiling that noise sets is not known; {_noise(study)}"
    )
    yield ""
    yield (
        "Base accuracy tells what folding leaves of a SimpleViT, which loses little (R² "
        f"{best(study, VIT, 'base'):.2f}, 161 networks), and next to nothing of a ResNet18 under SGD "
        f"({best(study, SGD, 'base'):.2f}, 541 networks); its recipe tells it ({best(study, SGD, 'settings'):.2f}). A "
        "level of a setting that no training network had is another matter: there the forest does not reach beyond "
        "what it saw."
    )


def _noise(study: Study) -> str:
    once = repeats(study.found[ADAM], study.extras, ADAM, "-sharpness")
    return (
        f"measuring a network once more (k-means and the repair's batches drawn again) scatters by {once['fold']:.2f} "
        f"points of folded accuracy and {once['gap']:.2f} of gap (standard deviations, Adam, 184 networks), so "
        "that the noise is at least that."
    )


def limits(study: Study) -> Iterator[str]:
    lost = {family: outgrown(study.found[family]) for family in (ADAM, SGD)}
    failed = study.sweeps[VIT].cells.filter(pl.col("state") == "failed").height
    poor = study.found[VIT].at("raw", HALF).filter(pl.col("base") < LEARNT).height
    yield "## What these figures cannot say"
    yield ""
    yield "- **One seed a recipe.** Intervals are over recipes; no other seed of any was trained."
    decayed = {family: _missing(study, family) for family in GRIDS}
    yield (
        f"- **Survivors.** The grids have {GRIDS[ADAM]} Adam and {GRIDS[SGD]} SGD cells; {decayed[ADAM][0]} and "
        f"{decayed[SGD][0]} are missing because they stayed under 50%, {decayed[ADAM][1]} and {decayed[SGD][1]} of "
        f"them with weight decay, {decayed[ADAM][2]} and {decayed[SGD][2]} at rate .1. Matched pairs leave their "
        f"partners out, so that effects of decay and of high rates are those on networks that survived. {failed} "
        f"SimpleViTs give NaN and {poor} more stayed under 50%; they are left out here."
    )
    for family, (yes, n, p, (constant, cosine)) in lost.items():
        yield (
            f"- **Stale statistics in the base, {TITLES[family]}.** {yes} of {n} networks are more than a point "
            f"better with a tenth of their channels folded and repaired than whole; {constant} of them were trained "
            f"at a constant rate, {cosine} by cosine (Fisher's exact p = {p:.1g}). The dense networks had no repair, "
            "so that their base understates them, and the loss by folding is understated with it."
        )
    yield (
        "- **The folding is the study's own.** Its code sums what writes a channel and averages what reads it, the "
        "reverse of the paper's formula; here folding leads in spite of it. Its l1 and l2 score a residual group by "
        "one writer only. Both could move every gap on this page."
    )
    yield f"- **Left out by the reader**: {'; '.join(study.told)}."


GRIDS = {ADAM: 216, SGD: 576}  # cells that were trained: three levels of decay, all at every rate


def _missing(study: Study, family: str) -> tuple[int, int, int]:
    """Cells of the grid that have no network: all, those with weight decay, those at rate .1."""
    cells, grid = study.sweeps[family].cells, GRIDS[family]
    rates = cells["optim.lr"].n_unique()
    decayed, fast = cells.filter(pl.col("optim.weight_decay") > 0), cells.filter(pl.col("optim.lr") == 0.1)
    return grid - len(cells), grid * 2 // 3 - len(decayed), grid // rates - len(fast)


def foretold(study: Study) -> dict[str, pl.DataFrame]:
    """The predictions of every family whose networks have settings."""
    found = {family: study.found[family] for family in (ADAM, SGD, PREACT, VIT)}
    learnt = found[VIT].table.filter(pl.col("base") >= LEARNT)
    found[VIT] = replace(found[VIT], table=learnt)
    return {family: predictions(one, last(family), HALF) for family, one in found.items()}


def farthest(study: Study, family: str, target: str = "fold") -> dict[str, Any]:
    """The forest's line at the setting where holding out whole levels goes worst."""
    at = study.predicted[family].filter((pl.col("target") == target) & (pl.col("held_out") != "recipe"))
    at = at.filter((pl.col("features") == "settings + base") & (pl.col("model") == "forest"))
    return at.sort("r2").row(0, named=True)


def best(study: Study, family: str, features: str) -> float:
    """R² of the forest on the folded accuracy, recipes held out."""
    at = study.predicted[family].filter((pl.col("target") == "fold") & (pl.col("held_out") == "recipe"))
    return at.filter((pl.col("features") == features) & (pl.col("model") == "forest"))["r2"][0]


PARTS = (others, beyond, language, foretelling, limits)
