"""The parts of the page on the published study that judge: where the gap misleads, claims, fine-tuning."""

from collections.abc import Iterator

import polars as pl

from benchmarks.published_numbers import (
    ADAM,
    HALF,
    PREACT,
    SGD,
    STAGES,
    TITLES,
    VIT,
    Study,
    augmentations,
    correlation,
    falls,
    gap,
    last,
    level,
    mean,
    networks,
    rises,
    simple_vit,
    step,
    table,
)


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
    yield (
        "The gap is bound to be small at both ends: a network that folds to chance leaves nothing to lead with, and "
        "one that keeps nearly everything is kept by pruning, too. Between them it says which method to take, not "
        "which network."
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
            "abstract",
            "holds on ResNets and CLIP, not on SimpleViTs",
            f"{rises(gap(study, SGD), 'networks')} under SGD; {level(gap(study, VIT), 'networks')} on SimpleViTs",
        ],
        [
            "Its lead is largest at moderate to high compression",
            "abstract",
            "holds; at .1 and .9 little or nothing is left of it",
            f"SGD, repaired: {level(mild, 'networks')} at .1, {rises(strong, 'networks')} at .7, "
            f"{rises(end, 'networks')} at .9; Adam at .1: {level(low, 'networks')}",
        ],
        [
            "The lead narrows or reverses at some settings, such as very high rates under Adam",
            "abstract; reviews",
            "holds without weight decay only; with it the lead grows",
            f"rate .001 to .1 without decay {falls(rate)}; with decay 1e-3 "
            f"{rises(step(adam, 'repaired', 'lr', 0.001, 0.1, 'gap', weight_decay=0.001))}",
        ],
        [
            "SAM, by flatter minima, makes networks foldable",
            "reviews",
            "holds under SGD behind a repair; raw it is reversed, under Adam it is not seen",
            f"folded: SGD repaired {rises(sam)}, raw {falls(step(sgd, 'raw', 'rho', 0.0, 0.1))}; Adam repaired "
            f"{level(sam_adam)}, raw {falls(step(adam, 'raw', 'rho', 0.0, 0.1))}",
        ],
        [
            "Augmentation helps folding over pruning",
            "reviews",
            "reversed for RandAugment on ResNet18 under SGD; a little on SimpleViTs",
            f"gap: {falls(augmented)}; SimpleViT "
            f"{rises(simple_vit(study, 'gap')['crop, flip and RandAugment'], 'networks')}",
        ],
        [
            "The lead persists through 1 to 5 epochs of fine-tuning",
            "reviews",
            "holds in sign; at half of the channels most of its size is gone, at .7 less of it",
            f"Adam {rises(gap(study, ADAM), 'networks')} before, {rises(gap(study, ADAM, STAGES[3]), 'networks')} "
            f"after; PreAct {rises(gap(study, PREACT), 'networks')} and "
            f"{rises(gap(study, PREACT, STAGES[3]), 'networks')}, at .7 "
            f"{rises(gap(study, PREACT, ratio=0.7), 'networks')} and "
            f"{rises(gap(study, PREACT, STAGES[3], 0.7), 'networks')}",
        ],
    ]
    yield "## The study's claims, by its own figures"
    yield ""
    yield (
        "The claims are those of the paper's abstract, and of its public reviews where these sum up what it says of "
        "settings."
    )
    yield ""
    yield from table(["claim", "from", "verdict", "gap or folded accuracy, in points"], rows)


def tuned(study: Study) -> Iterator[str]:
    yield "## Behind fine-tuning"
    yield ""
    adam = study.found[ADAM]
    rate, base = (step(adam, STAGES[3], "lr", 0.001, 0.1, outcome) for outcome in ("fold", "base"))
    decay, before = (step(adam, stage, "weight_decay", 0.0, 0.0005) for stage in (STAGES[3], "repaired"))
    relearnt = adam.at(STAGES[3], HALF)
    under = mean(relearnt["fold"] - relearnt["base"])
    yield (
        "Five epochs behind the repair, under Adam, what decay gave to the folded accuracy is gone: 5e-4 changes it "
        f"by {level(decay)}, where the repaired network had {rises(before)}. The loss by a high rate stays: .001 to "
        f".1 changes it by {falls(rate)}, the base by {falls(base)}. Half of the channels, folded and tuned, are at "
        f"{falls(under, 'networks')} of the base; the whole networks were not tuned as well, so that this is no price "
        "of folding alone."
    )
