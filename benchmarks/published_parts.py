"""The later parts of the page on the published study: what misleads, claims, other networks, prediction, limits."""

import math
from collections.abc import Iterator

import polars as pl

from benchmarks.published_numbers import (
    ADAM,
    CLIP,
    HALF,
    LARGE,
    PREACT,
    SGD,
    SMALL,
    STAGES,
    TITLES,
    VIT,
    Mean,
    Study,
    augmentations,
    correlation,
    corruptions,
    cyclic,
    falls,
    gap,
    last,
    level,
    llama,
    mean,
    networks,
    outgrown,
    repeats,
    rises,
    sharpness,
    step,
    table,
)
from pipeline.study.prediction import predictions


def misleading(study: Study) -> Iterator[str]:
    yield "## Where the gap misleads"
    yield ""
    rows = []
    for family, title in TITLES.items():
        for stage in ("raw", last(family)):
            at = networks(study.found[family], family, stage)
            cells = []
            for x, y in (("gap", "fold"), ("gap", "prune"), ("base", "fold"), ("base", "gap")):
                r, low, high, rank = correlation(at, x, y)
                cells.append(f"{r:+.2f} ({low:+.2f} to {high:+.2f}), {rank:+.2f}")
            rows.append([title, stage.replace("_", " "), *cells, str(len(at))])
    head = ["correlation, its interval, rank correlation", "stage", "gap with folded", "gap with pruned"]
    yield from table([*head, "base with folded", "base with gap", "networks"], rows)
    yield ""
    at = study.found[SGD].at("repaired", HALF)
    low, high = at["gap"].quantile(0.9), at["fold"].quantile(0.9)
    both = at.filter((pl.col("gap") >= low) & (pl.col("fold") >= high))
    yield (
        f"Among the 541 SGD networks, {len(both)} are in the best tenth by folded accuracy and by gap at once; chance "
        f"alone would put {len(at) / 100:.0f} there. The tenth with the largest gap folds to "
        f"{at.filter(pl.col('gap') >= low)['fold'].mean():.1f}% on average, all of them to {at['fold'].mean():.1f}%."
    )
    yield ""
    yield "![folded accuracy and gap](study_gap_and_fold.png)"


def claims(study: Study) -> Iterator[str]:
    """The study's own claims, with what its own figures say."""
    sgd, adam = study.found[SGD], study.found[ADAM]
    mild, strong = gap(study, SGD, ratio=0.1), gap(study, SGD, ratio=0.7)
    end = gap(study, SGD, ratio=0.9)
    sam, sam_adam = (step(found, "repaired", "rho", 0.0, 0.1) for found in (sgd, adam))
    rate = step(adam, "repaired", "lr", 0.001, 0.1, "gap", weight_decay=0.0)
    augmented = step(sgd, "repaired", "augment", *augmentations(sgd), "gap")
    low = gap(study, ADAM, ratio=0.1)
    rows = [
        [
            "Folding typically gives the higher accuracy",
            "holds on ResNets and CLIP, not on SimpleViTs",
            f"{rises(gap(study, SGD), 'networks')} under SGD; {level(gap(study, VIT), 'networks')} on SimpleViTs",
        ],
        [
            "Its lead is largest at moderate to high compression",
            "holds up to .7; it is gone at both ends",
            f"SGD, repaired: {level(mild, 'networks')} at .1, {rises(strong, 'networks')} at .7, "
            f"{rises(end, 'networks')} at .9; Adam at .1: {level(low, 'networks')}",
        ],
        [
            "The lead narrows or reverses at some settings, such as very high rates under Adam",
            "holds without weight decay only; with it the lead grows",
            f"rate .001 to .1 without decay {falls(rate)}; with decay 1e-3 "
            f"{rises(step(adam, 'repaired', 'lr', 0.001, 0.1, 'gap', weight_decay=0.001))}",
        ],
        [
            "SAM, by flatter minima, makes networks foldable",
            "holds under SGD behind a repair; raw it is reversed, under Adam it is not seen",
            f"folded: SGD repaired {rises(sam)}, raw {falls(step(sgd, 'raw', 'rho', 0.0, 0.1))}; Adam repaired "
            f"{level(sam_adam)}, raw {falls(step(adam, 'raw', 'rho', 0.0, 0.1))}",
        ],
        [
            "Augmentation helps folding over pruning",
            "reversed for RandAugment on ResNet18 under SGD; a little on SimpleViTs",
            f"gap: {falls(augmented)}; SimpleViT {rises(_vit(study, 'gap')['crop, flip and RandAugment'], 'networks')}",
        ],
        [
            "The lead persists through 1 to 5 epochs of fine-tuning",
            "holds in sign; most of its size is gone",
            f"Adam {rises(gap(study, ADAM), 'networks')} before, {rises(gap(study, ADAM, STAGES[3]), 'networks')} "
            f"after; PreAct {rises(gap(study, PREACT), 'networks')} and "
            f"{rises(gap(study, PREACT, STAGES[3]), 'networks')}",
        ],
    ]
    yield "## The study's claims, by its own figures"
    yield ""
    yield from table(["claim", "verdict", "gap or folded accuracy, in points"], rows)


def tuned(study: Study) -> Iterator[str]:
    yield "## Behind fine-tuning"
    yield ""
    adam = study.found[ADAM]
    rate, base = (step(adam, STAGES[3], "lr", 0.001, 0.1, outcome) for outcome in ("fold", "base"))
    decay, before = (step(adam, stage, "weight_decay", 0.0, 0.0005) for stage in (STAGES[3], "repaired"))
    relearnt = adam.at(STAGES[3], HALF)
    over = mean(relearnt["fold"] - relearnt["base"])
    yield (
        "- Five epochs behind the repair, settings act on the folded accuracy as they act on the base: the rate .001 "
        f"to .1 changes it by {falls(rate)}, the base by {falls(base)}. Decay of 5e-4 changes it by {level(decay)}, "
        f"where the repaired network had {rises(before)}."
    )
    yield (
        f"- Half of the channels, folded and tuned for five epochs, are {falls(over, 'networks')} from the base under "
        "Adam; the dense networks were not tuned as well, so that this is no price of folding alone."
    )


def _vit(study: Study, outcome: str) -> dict[str, Mean]:
    return cyclic(networks(study.found[VIT], VIT, "norm_tuned"), outcome)


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
    vit, vit_base = (_vit(study, outcome)["crop, flip and RandAugment"] for outcome in ("fold", "base"))
    yield (
        f"Augmentation costs a PreActResNet18 {falls(preact, 'networks')} of folded accuracy while its base gains "
        f"{rises(whole, 'networks')}. A SimpleViT keeps nearly all of what augmentation gives: "
        f"{rises(vit, 'networks')} of {rises(vit_base, 'networks')}. Only its MLPs were compressed, and a sixth of "
        "its parameters is what half of their channels come to."
    )


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
        fold, lead = correlation(at, "sharp", "fold")[3], correlation(at, "relative", "gap")[3]
        factor = (
            f"{2**times.value:.2f} ({2 ** (times.value - times.half):.2f} to {2 ** (times.value + times.half):.2f})"
        )
        rows.append([TITLES[family], factor, f"{1 - times.wins:.0%}", f"{fold:+.2f}", f"{lead:+.2f}", str(times.n)])
    head = ["at half of the channels", "folded over less sharp pruned network", "folded is less sharp"]
    yield from table([*head, "sharpness with folded accuracy", "relative sharpness with gap", "networks"], rows)
    yield ""
    yield (
        "Sharpness is the adaptive worst-case rise of the training loss (l-infinity, rho 5e-4), geometric means, "
        "correlations by rank. Folded networks are less sharp than pruned ones, and the more so the more they lead. "
        "A network that has lost its accuracy has also a larger loss to raise, so that this goes with the lead and "
        "does not explain it."
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
    yield (
        f"Over both sizes, at half of the gated channels, folding leads by {rises(high, 'networks')} at rates .005 "
        f"and .01, in {high.wins:.0%} of them, and by nothing at .001 ({level(low, 'networks')}): there magnitude "
        f"wins on the 130M model ({falls(llama(study, (0.001,), LARGE), 'networks')}) and nothing is told on the 60M "
        f"one ({level(llama(study, (0.001,), SMALL), 'networks')}). Perplexities are geometric means; a point of the "
        "gap is one per cent of perplexity. Six networks a line: intervals this wide settle directions, not sizes."
    )


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
                best = own.filter((pl.col("features") == features) & (pl.col("model") == "forest")).row(0, named=True)
                cells.append(f"{best['r2']:.2f}, {best['mae']:.1f}")
            levels = at.filter((pl.col("target") == target) & (pl.col("held_out") != "recipe"))
            levels = levels.filter((pl.col("features") == "settings + base") & (pl.col("model") == "ridge"))
            worst = levels.sort("r2").row(0, named=True)
            chosen = own.filter((pl.col("features") == "settings + base") & (pl.col("model") == "forest"))["regret"]
            regrets = f"{always[0]:.2f}, {chosen[0]:.2f}" if len(always) else "-"
            mae = own.filter(pl.col("model") == "mean")["mae"][0]
            name = "folded" if target == "fold" else "gap"
            last_cells = [f"{worst['r2']:.2f} ({worst['held_out']})", regrets, str(own["n"][0])]
            rows.append([TITLES[family], name, f"{mae:.1f}", *cells, *last_cells])
    head = ["R², mean absolute error", "target", "mean: error", "base alone", "settings", "settings + base"]
    yield from table([*head, "a level held out, worst R²", "regret: always fold, forest", "networks"], rows)
    yield ""
    yield (
        "A random forest, on networks whose recipe was held out (tenths); in the last columns but one, ridge with "
        "all networks of one level of a setting held out, at its worst setting, and the points lost by folding "
        "always or by the forest's choice. Every recipe has one seed, so that the ceiling that noise sets is not "
        f"known; {_noise(study)}"
    )


def _noise(study: Study) -> str:
    once = repeats(study.found[ADAM], study.extras, ADAM, "-sharpness")
    return (
        f"measuring a network once more (k-means and the repair's batches drawn again) scatters by {once['fold']:.2f} "
        f"points of folded accuracy and {once['gap']:.2f} of gap (standard deviations, Adam, 184 networks), which "
        "bounds it from below."
    )


def limits(study: Study) -> Iterator[str]:
    lost = {family: outgrown(study.found[family]) for family in (ADAM, SGD)}
    failed = study.sweeps[VIT].cells.filter(pl.col("state") == "failed").height
    poor = study.found[VIT].at("raw", HALF).filter(pl.col("base") < 50).height
    yield "## What these figures cannot say"
    yield ""
    yield "- **One seed a recipe.** Intervals are over recipes; no other seed of any was trained."
    yield (
        f"- **Survivors.** The grids have 216 Adam and 576 SGD cells; {216 - _n(study, ADAM)} and "
        f"{576 - _n(study, SGD)} are missing because they stayed under 50%, most of them at high rates and decay. "
        f"Matched pairs leave their partners out. {failed} SimpleViTs give NaN and {poor} more stayed under 50%; they "
        "are left out here."
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


def _n(study: Study, family: str) -> int:
    return len(study.sweeps[family].cells)


def foretold(study: Study) -> dict[str, pl.DataFrame]:
    """The predictions of every family whose networks have settings."""
    return {f: predictions(study.found[f], last(f), HALF) for f in (ADAM, SGD, PREACT, VIT)}


def best(study: Study, family: str, features: str) -> float:
    """R² of the forest on the folded accuracy, recipes held out."""
    at = study.predicted[family].filter((pl.col("target") == "fold") & (pl.col("held_out") == "recipe"))
    return at.filter((pl.col("features") == features) & (pl.col("model") == "forest"))["r2"][0]


PARTS = (misleading, claims, tuned, others, beyond, language, foretelling, limits)
