"""How long folding takes at nine ratios, beside PCA + k-means per ratio as the study's code does it, in one run.

    python -m benchmarks.speed                 # all 9 ratios x 12 groups of the baseline: many minutes
    python -m benchmarks.speed --quick         # one epoch, three of the baseline's ratios

The network is a full-width ResNet18 trained on scikit-learn's digits, so anybody can repeat it without a download. Both
sides see the same feature rows, and every labelling is judged by the same Gram matrix. Ours is timed whole: clustering,
nine smaller models and their reports. The baseline is timed for its clustering alone.
"""

import argparse
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from benchmarks.common import THREADS, described, machine, timed, write
from pipeline.compression import METHODS, ChannelGroups, Projection, channel_groups, compressions
from pipeline.compression.compress import channels_left
from pipeline.compression.methods import GroupWeights
from pipeline.data.module import PictureData
from pipeline.models import build_model

RATIOS = [r / 10 for r in range(1, 10)]
SEED = 0
TOLERANCE = 1e-9  # relative: rounding, not a worse clustering
Times = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="of training on the digits")
    parser.add_argument("--repeats", type=int, default=3, help="of our side, before and again after the baseline")
    parser.add_argument("--quick", action="store_true", help="one epoch; the baseline at ratios .1, .5 and .9 only")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed"), help="writes OUT.json and OUT.md")
    args = parser.parse_args()
    epochs = 1 if args.quick else args.epochs
    measured = [0.1, 0.5, 0.9] if args.quick else RATIOS
    torch.set_num_threads(THREADS)
    with threadpool_limits(THREADS), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # duplicates: fewer distinct rows than clusters
        model, accuracy = trained(epochs)
        example = torch.zeros(1, 1, 32, 32)  # pictures of CIFAR's size
        trace, groups = timed(lambda: channel_groups(model, example))
        times = ours(model, example, groups, args.repeats)
        cells = baseline(model, groups, measured)
        # Load comes and goes on a shared machine: ours on both sides of the long part.
        for name, more in ours(model, example, groups, args.repeats).items():
            times[name] += more
    result = {
        "config": {"model": "resnet18", "width": 64, "data": "digits", "epochs": epochs, "ratios": RATIOS},
        "baseline": "PCA(min(C, F)) + KMeans(n_init=1) on float32 rows, for each ratio and group",
        "seed": SEED,
        "n": 1,
        "validation_accuracy": accuracy,
        "machine": machine("scipy", "scikit-learn"),
        "trace_s": trace,
        "times_s": times,
        "cells": cells,
    }
    write(args.out, result, report(result))


def trained(epochs: int) -> tuple[nn.Module, float]:
    """A ResNet18 of width 64 after `epochs` of SGD with weight decay on the digits, and its validation accuracy."""
    torch.manual_seed(SEED)
    data = PictureData("digits", batch_size=128, seed=SEED)
    data.setup()
    model = build_model("resnet18", classes=data.num_classes, channels=data.channels)
    loader = data.train_dataloader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.val_dataloader())
    return model, hits / len(data.val_data)


def group_weights(model: nn.Module, groups: ChannelGroups) -> list[GroupWeights]:
    """What `compressions` describes the channels by, at its defaults."""
    tensors = {name: t.detach() for name, t in model.state_dict().items()}
    return [GroupWeights(group, tensors) for group in groups]


def ours(model: nn.Module, example: Tensor, groups: ChannelGroups, repeats: int) -> Times:
    """Seconds of `compressions` at all ratios after the trace, and of its parts, one entry per repeat."""
    times: Times = {"gram": [], "clustering": [], "whole": []}
    for _ in range(repeats):
        weights = group_weights(model, groups)
        seconds, _ = timed(lambda weights=weights: [w.gram for w in weights])
        times["gram"].append(seconds)
        seconds, _ = timed(lambda weights=weights: [METHODS["fold"](w, sizes(w)) for w in weights])
        times["clustering"].append(seconds)
        seconds, _ = timed(lambda: list(compressions(model, example, "fold", RATIOS, groups=groups)))
        times["whole"].append(seconds)
    return times


def sizes(weights: GroupWeights) -> list[int]:
    """Channels left at each ratio, ascending."""
    return sorted({channels_left(weights.group.size, ratio) for ratio in RATIOS})


def baseline(model: nn.Module, groups: ChannelGroups, ratios: list[float]) -> list[dict[str, Any]]:
    """One cell per ratio and group: seconds of PCA + k-means, and the relative parameter error of either side."""
    weights = group_weights(model, groups)
    found = [METHODS["fold"](w, sizes(w)) for w in weights]
    cells = []
    for ratio in ratios:
        for w, projections in zip(weights, found, strict=True):
            k = channels_left(w.group.size, ratio)
            features = rows(w)
            seconds, labels = timed(lambda x=features, k=k: pca_kmeans(x, k))
            cells.append(
                {
                    "group": w.group.name,
                    "channels": w.group.size,
                    "ratio": ratio,
                    "k": k,
                    "seconds": seconds,
                    "ours": w.error(projections[k]),
                    "baseline": w.error(Projection(torch.from_numpy(np.unique(labels, return_inverse=True)[1]))),
                }
            )
    return cells


def rows(weights: GroupWeights) -> np.ndarray:
    """The features of a group as one matrix, (C, F) float32, whose Gram matrix is the one that folding sees."""
    blocks = [b / b.norm() if weights.scale == "tensor" else b for b in weights.blocks()]
    features = torch.cat(blocks, 1)
    assert torch.allclose(features @ features.T, weights.gram, rtol=0, atol=1e-9 * float(weights.gram.trace()))
    return features.float().numpy()


def pca_kmeans(features: np.ndarray, k: int) -> np.ndarray:
    """Labels (C,) as in the study's code: rotate by a full PCA, then k-means from one start."""
    rotated = PCA(n_components=min(features.shape)).fit_transform(features)
    return KMeans(n_clusters=k, n_init=1, random_state=SEED).fit(rotated).labels_


def report(result: dict[str, Any]) -> str:
    """Tables and the line that sums them up, as Markdown."""
    cells, times = result["cells"], result["times_s"]
    whole = statistics.median(times["whole"])
    lines = [
        "# Folding at nine ratios beside PCA + k-means",
        f"ResNet18 of width 64 after {result['config']['epochs']} epochs on the digits (validation accuracy "
        f"{result['validation_accuracy']:.1%}), seed {result['seed']}, n = {result['n']} network; "
        f"{described(result['machine'], 'scipy', 'scikit-learn')}. Written by `python -m benchmarks.speed`.",
        "",
        "Seconds are wall time; errors are ‖W - P W‖ / ‖W‖, mean over the groups. The baseline is "
        f"{result['baseline']}: its clustering alone, against all of ours.",
        "",
        "| ratio | ours s | baseline s | times faster | error ours | error baseline | cells where ours is higher "
        "| largest ours / baseline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    share = whole / len(RATIOS)
    for ratio in sorted({c["ratio"] for c in cells}):
        at = [c for c in cells if c["ratio"] == ratio]
        seconds = sum(c["seconds"] for c in at)
        worst = max(at, key=lambda c: c["ours"] / c["baseline"])
        lines.append(
            f"| {ratio} | {share:.2f} | {seconds:.1f} | {seconds / share:.0f} "
            f"| {statistics.mean(c['ours'] for c in at):.4f} | {statistics.mean(c['baseline'] for c in at):.4f} "
            f"| {higher(at)} of {len(at)} | {worst['ours'] / worst['baseline']:.4f} ({worst['group']}) |"
        )
    measured = len({c["ratio"] for c in cells})
    seconds = sum(c["seconds"] for c in cells) / measured * len(RATIOS)
    clustering = [g + c for g, c in zip(times["gram"], times["clustering"], strict=True)]
    lines += [
        "",
        f"| ours, all nine ratios, {len(times['whole'])} repeats | min s | median s |",
        "|---|---|---|",
        f"| trace, once per architecture | {result['trace_s']:.2f} | |",
        *(
            f"| {name} | {min(spent):.2f} | {statistics.median(spent):.2f} |"
            for name, spent in {
                "Gram matrices": times["gram"],
                "clustering": times["clustering"],
                "making and counting nine models": [w - c for w, c in zip(times["whole"], clustering, strict=True)],
                "whole, after the trace": times["whole"],
            }.items()
        ),
        "",
        f"Nine ratios: ours {min(times['whole']):.2f} s at best, {whole:.2f} s median; baseline {seconds:.0f} s"
        f"{'' if measured == len(RATIOS) else f' (from {measured} ratios)'}: {seconds / whole:.0f} times faster "
        f"({seconds / statistics.median(clustering):.0f} times, clustering against clustering). "
        f"Error higher in {higher(cells)} of {len(cells)} cells.",
    ]
    return "\n".join(lines)


def higher(cells: list[dict[str, Any]]) -> int:
    """In how many cells ours has the larger error."""
    return sum(c["ours"] > c["baseline"] * (1 + TOLERANCE) for c in cells)


if __name__ == "__main__":
    main()
