"""Measures how long folding takes at nine ratios, beside the study's algorithm, scikit-learn and Torch-Pruning.

    python -m benchmarks.speed                                  # ten minutes on two busy cores of an EPYC
    python -m benchmarks.speed --networks resnet18,simple_vit   # these anew, the others stay in the page
    python -m benchmarks.speed --quick                          # ResNet18 after one epoch, all once; writes nothing

Every side (ours or a peer) runs in a process of its own on the same network, with the same number of threads, after it
has run on a tiny network. The baselines are timed for their clustering alone, from finished feature rows; ours from the
weights on. Writes docs/speed.md and benchmarks/results/speed.json.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans, ward_tree
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from benchmarks.common import alone, described, machine, rounded, spent, timed, write_below
from pipeline.compression import METHODS, ChannelGroups, Projection, channel_groups, compressions
from pipeline.compression.budget import channels_left
from pipeline.compression.choose.cluster import cuts
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.sizes.count import parameters
from pipeline.tables import pick

RATIOS = [r / 10 for r in range(1, 10)]
SEED = 0
THREADS = 1  # where other jobs share the cores, threads that wait for each other cost the baselines more than ours
TOLERANCE = 1e-6  # relative; a smaller difference is rounding in single precision, not a worse clustering
RESULTS = Path("benchmarks/results/speed.json")
PAGE = Path("docs/speed.md")
MARK = "<!-- written by python -m benchmarks.speed from here on -->"
PACKAGES = ("numpy", "scipy", "scikit-learn", "torch-pruning")
Labels = dict[int, np.ndarray]  # (C,) for every number of clusters

# Libraries that only some processes need are imported there: that takes seconds, and there are many processes.


class Case(NamedTuple):
    model: nn.Module
    example: Tensor
    groups: ChannelGroups


class Network(NamedTuple):
    """A network to measure on. build: epochs -> (model, example).

    study, kmeans: ratios at which these baselines run; groups: how many groups of each shape they see
    """

    build: Callable[[int], tuple[nn.Module, Tensor]]
    weights: str
    study: Sequence[float] = (0.1, 0.5, 0.9)
    kmeans: Sequence[float] = (0.5, 0.9)
    groups: int = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", default=",".join(NETWORKS), help="names with commas between them; '': only the page"
    )
    parser.add_argument("--epochs", type=int, default=2, help="of training the ResNet18 on the digits")
    parser.add_argument("--repeats", type=int, default=3, help="of our sides and Torch-Pruning")
    parser.add_argument("--quick", action="store_true", help="ResNet18, one epoch, one group of each shape; no files")
    args = parser.parse_args()
    limit_threads()
    if args.quick:
        network = NETWORKS["resnet18"]._replace(study=(0.5, 0.9), kmeans=(0.9,), groups=1)
        print("\n".join(page({"machine": machine(*PACKAGES), "networks": {"resnet18": measured(network, 1, 1)}})))
        return
    known = json.loads(RESULTS.read_text())["networks"] if RESULTS.exists() else {}
    for name in args.networks.split(",") if args.networks else []:
        known[name] = measured(pick("network", NETWORKS, name), args.epochs, args.repeats)
        found = {n: known[n] for n in NETWORKS if n in known}
        result = {"ratios": RATIOS, "seed": SEED, "machine": machine(*PACKAGES), "networks": found}
        RESULTS.write_text(json.dumps(rounded(result), indent=1) + "\n")
    write_below(PAGE, MARK, "How long folding takes", page(json.loads(RESULTS.read_text())))


# --- networks


def trained(epochs: int) -> tuple[nn.Module, Tensor]:
    """A ResNet18 of width 64 after `epochs` of SGD with weight decay on the digits."""
    from pipeline.data.module import PictureData
    from pipeline.models import build_model

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
    return model, torch.zeros(1, 1, 32, 32)  # pictures of CIFAR's size


def of_ours(name: str) -> nn.Module:
    from pipeline.models import build_model

    return build_model(name, classes=10, channels=3)


def vit_b32() -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch32_224")


def structured(build: Callable[[], nn.Module], example: Tensor) -> Callable[[int], tuple[nn.Module, Tensor]]:
    """A builder of the network with every weight W (outputs, inputs) low-rank plus noise, of the spread that it had.

    W ~ U V / sqrt(r) + N / 2 with U, V, N normal and r an eighth of W's smaller side. Rows of independent draws would
    all be equally far from each other, and one clustering as good as another; trained rows are not like that.
    """

    def built(epochs: int) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(SEED)
        model = build()
        for weight in model.parameters():
            if weight.dim() > 1:
                spread, (rows, columns) = weight.detach().std(), weight.flatten(1).shape
                rank = max(1, min(rows, columns) // 8)
                low = torch.randn(rows, rank) @ torch.randn(rank, columns) / rank**0.5
                new = low + torch.randn(rows, columns) / 2
                weight.data = (new * spread / new.std()).view_as(weight)
        return model, example

    return built


STRUCTURED = "low rank plus noise"
NETWORKS = {
    "resnet18": Network(trained, "trained on digits", groups=12),
    "preact_resnet18": Network(
        structured(lambda: of_ours("preact_resnet18"), torch.zeros(1, 3, 32, 32)),
        STRUCTURED,
    ),
    "simple_vit": Network(structured(lambda: of_ours("simple_vit"), torch.zeros(1, 3, 32, 32)), STRUCTURED),
    "vit_b32": Network(
        structured(vit_b32, torch.zeros(1, 3, 224, 224)),
        STRUCTURED,
        study=(0.5, 0.9),  # minutes for each group and ratio
        kmeans=(0.9,),
    ),
}


# --- ours and Torch-Pruning: a function of a case that may return a record of more than its time


def group_weights(case: Case) -> Iterator[GroupWeights]:
    """The weights by which `compressions` describes channels by default, a group at a time, with its Gram matrix."""
    tensors = {name: t.detach() for name, t in case.model.state_dict().items()}
    return (GroupWeights(group, tensors) for group in case.groups)


def sizes(weights: GroupWeights) -> list[int]:
    """Channels left at each ratio, ascending."""
    return sorted({channels_left(weights.group.size, ratio) for ratio in RATIOS})


def trace(case: Case) -> None:
    channel_groups(case.model, case.example)


def gram_matrices(case: Case) -> None:
    deque((w.gram for w in group_weights(case)), maxlen=0)


def gram_matrices_gpu(case: Case) -> None:
    """The same sums on a GPU; from the second time on the weights are there already."""
    case.model.cuda()
    for weights in group_weights(case):
        sum(b @ b.T / b.square().sum() for b in weights.blocks()).cpu()


def clusters(case: Case) -> None:
    """From weights to labels, Gram matrices included."""
    deque((METHODS["fold"](w, sizes(w)) for w in group_weights(case)), maxlen=0)


def nine_networks(case: Case, method: str) -> dict[str, Any]:
    """All of `compressions`: choice, smaller networks, errors, parameters, MACs."""
    made = compressions(case.model, case.example, method, RATIOS, groups=case.groups, certify=False)
    # `map` frees each network before the next is made: two large ones may not fit into memory.
    return {"parameters": list(map(lambda smaller: smaller.report.params_after, made))}


def torch_pruning(case: Case) -> dict[str, Any]:
    """Nine networks by its magnitude importance (l1, first layer of a group), each from its own copy and graph.

    It may prune only the layers that write our groups, so that both sides make networks of the same sizes.
    """
    import torch_pruning as tp

    written = {axis.tensor.rpartition(".")[0] for group in case.groups for axis in group.writes}
    importance = tp.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer=None)
    record: dict[str, Any] = {"copy_s": 0.0, "trace_s": 0.0, "prune_s": 0.0, "parameters": []}
    for ratio in RATIOS:
        copied, model = timed(lambda: copy.deepcopy(case.model))
        layers = (nn.Linear, nn.Conv2d, nn.Embedding)
        others = [m for name, m in model.named_modules() if isinstance(m, layers) and name not in written]
        traced, pruner = timed(
            lambda model=model, ratio=ratio, others=others: tp.pruner.BasePruner(
                model,
                case.example,
                importance,
                pruning_ratio=ratio,
                ignored_layers=others,
                output_transform=lambda out: getattr(out, "logits", out),
            )
        )
        pruned, _ = timed(pruner.step)
        for step, seconds in zip(("copy_s", "trace_s", "prune_s"), (copied, traced, pruned), strict=True):
            record[step] += seconds
        record["parameters"].append(parameters(model))
    return record


SIDES: dict[str, Callable[[Case], dict[str, Any] | None]] = {
    "trace": trace,
    "gram": gram_matrices,
    "clusters": clusters,
    "fold": lambda case: nine_networks(case, "fold"),
    "l1": lambda case: nine_networks(case, "l1"),
    "torch_pruning": torch_pruning,
} | ({"gram_gpu": gram_matrices_gpu} if torch.cuda.is_available() else {})


# --- the baselines: feature rows (C, F) and numbers of clusters to labels


def study(features: np.ndarray, sizes: Sequence[int]) -> Labels:
    """The study's algorithm, run for every size: rotate by a full PCA, then k-means from one start."""
    return {k: kmeans(PCA(n_components=min(features.shape)).fit_transform(features), [k])[k] for k in sizes}


def kmeans(features: np.ndarray, sizes: Sequence[int]) -> Labels:
    return {k: KMeans(n_clusters=k, n_init=1, random_state=SEED).fit(features).labels_ for k in sizes}


def ward(features: np.ndarray, sizes: Sequence[int]) -> Labels:
    """scikit-learn's tree of AgglomerativeClustering(linkage="ward"), built once, with our cuts of it, because its own
    give one size only."""
    return dict(cuts(ward_tree(features)[0], sizes))


BASELINES = {"study": study, "kmeans": kmeans, "ward": ward}
AT_ONCE = {"ward"}  # baselines that give all sizes from one call


# --- in processes of their own


def measured(network: Network, epochs: int, repeats: int) -> dict[str, Any]:
    model, example = network.build(epochs)
    model.eval()
    case = Case(model, example, channel_groups(model, example))
    shapes = Counter((w.group.size, sum(b.shape[1] for b in w.blocks())) for w in group_weights(case))
    record: dict[str, Any] = {
        "weights": network.weights,
        "parameters": parameters(model),
        "network_mib": sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 2**20,
        "shapes": [{"groups": n, "channels": c, "features": f} for (c, f), n in shapes.items()],
        "load_average": os.getloadavg(),
        "product_gflops": product_gflops(),
        "sides": {},
        "cells": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/case.pt"
        torch.save(tuple(case), path)
        # Load comes and goes on a shared machine, so short sides of ours and long ones of others take turns.
        turns = [*SIDES][:2], ["study"], [*SIDES][2:4], ["kmeans"], [*SIDES][4:], ["ward"]
        for name in (name for turn in turns for name in turn):
            print(f"{time.strftime('%X')} {record['parameters']:,} parameters: {name}", flush=True)
            if name in SIDES:
                record["sides"][name] = alone("speed:side", name, path, repeats)
            else:
                ratios = {"study": network.study, "kmeans": network.kmeans}.get(name, RATIOS)
                record["cells"][name] = alone("speed:cells", name, path, ratios, network.groups)
    return record


def product_gflops() -> float:
    """GFLOP/s that a product of two large matrices in single precision reaches on this machine now."""
    matrix = np.ones((2048, 2048), np.float32)
    return 2 * 2048**3 / min(spent(lambda: matrix @ matrix)[0]["cpu_s"] for _ in range(5)) / 1e9


def limit_threads() -> None:
    torch.set_num_threads(THREADS)
    threadpool_limits(THREADS)  # for NumPy, SciPy and scikit-learn, until the process ends


def set_up(path: str) -> Case:
    limit_threads()
    warnings.simplefilter("ignore")  # the peers' warnings are about their own code
    return Case(*torch.load(path, weights_only=False))


def side(name: str, path: str, repeats: int) -> list[dict[str, Any]]:
    case = set_up(path)
    tiny = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    SIDES[name](Case(tiny, torch.zeros(1, 8), channel_groups(tiny, torch.zeros(1, 8))))
    taken = [spent(lambda: SIDES[name](case)) for _ in range(repeats)]
    return [record | (more or {}) for record, more in taken]


def cells(name: str, path: str, ratios: list[float], per_shape: int) -> list[dict[str, Any]]:
    """One record per call of the baseline, with the relative parameter errors of both sides at its ratios."""
    case, found, seen = set_up(path), [], Counter()
    BASELINES[name](np.random.default_rng(SEED).normal(size=(16, 8)).astype(np.float32), [4])
    for weights in group_weights(case):
        features = rows(weights)
        seen[features.shape] += 1
        if seen[features.shape] > per_shape:
            continue
        ours = METHODS["fold"](weights, sizes(weights))
        for at in [RATIOS] if name in AT_ONCE else [[ratio] for ratio in ratios]:
            left = [channels_left(weights.group.size, ratio) for ratio in at]
            record, labels = spent(lambda left=left, features=features: BASELINES[name](features, left))
            theirs = [Projection(torch.from_numpy(np.unique(labels[k], return_inverse=True)[1])) for k in left]
            found.append(
                {"group": weights.group.name, "shape": features.shape, "ratios": at}
                | record
                | {"ours": [weights.error(ours[k]) for k in left], "baseline": [weights.error(p) for p in theirs]}
            )
    return found


def rows(weights: GroupWeights) -> np.ndarray:
    """The features of a group as one matrix, (C, F) float32, whose Gram matrix is the one that folding sees."""
    features = torch.cat([b / b.norm() for b in weights.blocks()], 1)
    assert torch.allclose(features @ features.T, weights.gram, rtol=0, atol=1e-5 * float(weights.gram.trace()))
    return features.float().numpy()


# --- the page


def page(result: dict[str, Any]) -> list[str]:
    networks = result["networks"]
    return [
        f"{described(result['machine'], *PACKAGES)}. Seed {SEED}, n = 1 network each. Runs: of our sides and of "
        "Torch-Pruning, whose medians are given; the others ran once. CPU seconds of one thread are what a quiet core "
        "takes; wall seconds also hold what else this machine did.",
        "",
        *what_they_are(networks),
        *beside_clusterings(networks),
        *beside_torch_pruning(networks),
        *beside_the_bound(networks),
        *memory(networks),
        *errors(networks),
    ]


def table(title: str, text: str, head: list[str], lines: list[list[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *lines]
    return [f"## {title}", "", *([text, ""] if text else []), *(f"| {' | '.join(line)} |" for line in cells), ""]


def of_side(record: dict[str, Any], side: str, what: str = "cpu_s") -> float:
    """Median over the repeats."""
    return statistics.median(taken[what] for taken in record["sides"][side])


def nine(record: dict[str, Any], baseline: str, what: str = "cpu_s") -> float:
    """Seconds of all groups at nine ratios. A group that was not measured counts as the mean of its shape, and a ratio
    as the next higher one that was measured, which takes less time, because it leaves fewer clusters."""
    total = 0.0
    for shape in record["shapes"]:
        groups: dict[str, dict[float, float]] = {}
        for cell in record["cells"][baseline]:
            if cell["shape"] == [shape["channels"], shape["features"]]:
                at = groups.setdefault(cell["group"], {})
                at |= dict.fromkeys(cell["ratios"], cell[what] / len(cell["ratios"]))
        taken = [sum(at[min(m for m in at if m >= ratio)] for ratio in RATIOS) for at in groups.values()]
        total += shape["groups"] * statistics.mean(taken)
    return total


def both(cpu: float, wall: float) -> str:
    return f"{seconds(cpu)} ({seconds(wall)})"


def seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def times(factor: float) -> str:
    return f"{factor:.0f}" if factor >= 10 else f"{factor:.1f}"


def side_text(record: dict[str, Any], side: str) -> str:
    return both(of_side(record, side), of_side(record, side, "wall_s"))


def nine_text(record: dict[str, Any], baseline: str) -> str:
    return both(nine(record, baseline), nine(record, baseline, "wall_s"))


def group_count(record: dict[str, Any]) -> int:
    return sum(shape["groups"] for shape in record["shapes"])


def what_they_are(networks: dict[str, Any]) -> list[str]:
    lines = []
    for name, r in networks.items():
        channels, features = ([s[axis] for s in r["shapes"]] for axis in ("channels", "features"))
        cells = [f"{sum(len(c['ratios']) for c in r['cells'][b])} of {group_count(r) * len(RATIOS)}" for b in BASELINES]
        lines.append(
            [
                name,
                f"{r['parameters'] / 1e6:.1f} M",
                r["weights"],
                str(group_count(r)),
                span(channels),
                span(features),
                str(len(r["sides"]["fold"])),
                *cells,
            ]
        )
    head = ["network", "parameters", "weights", "groups", "channels", "features", "runs"]
    head += [f"{baseline}: cells" for baseline in BASELINES]
    return table(
        "What is measured",
        "Cells: ratio x group at which a baseline was run. The others count as a group of the same shape, and as the "
        "next higher ratio that was run, which takes less.",
        head,
        lines,
    )


def span(values: list[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def beside_clusterings(networks: dict[str, Any]) -> list[str]:
    sides = ("clusters", "fold")
    seconds, factors = [], []
    for name, r in networks.items():
        seconds.append([name, *(side_text(r, side) for side in sides), *(nine_text(r, b) for b in BASELINES)])
        pairs = [*(("study", side) for side in sides), ("kmeans", "clusters"), ("ward", "clusters")]
        by = [[nine(r, b, what) / of_side(r, side, what) for what in ("cpu_s", "wall_s")] for b, side in pairs]
        factors.append([name, *(f"{times(cpu)} ({times(wall)})" for cpu, wall in by)])
    head = ["network", "study / our clusters", "study / our nine networks", "k-means / our clusters"]
    return [
        *table(
            "How many times faster than the study's algorithm?",
            "Nine ratios, in CPU seconds (in wall seconds). Clusters: from weights to labels, Gram matrices included.",
            [*head, "Ward of scikit-learn / our clusters"],
            factors,
        ),
        *table(
            "The seconds behind it",
            "Nine ratios, CPU (wall).",
            ["network", "our clusters", "our nine networks", "study", "k-means", "Ward of scikit-learn"],
            seconds,
        ),
    ]


def beside_torch_pruning(networks: dict[str, Any]) -> list[str]:
    lines = []
    for name, r in networks.items():
        peer = r["sides"]["torch_pruning"]
        same = sum(a == b for a, b in zip(r["sides"]["l1"][0]["parameters"], peer[0]["parameters"], strict=True))
        traced, whole = of_side(r, "trace"), of_side(r, "torch_pruning")
        graphs = whole * statistics.median(taken["trace_s"] / taken["wall_s"] for taken in peer)
        l1, fold = of_side(r, "l1"), of_side(r, "fold")
        lines.append(
            [
                name,
                *(side_text(r, side) for side in ("trace", "l1", "fold")),
                seconds(graphs),
                side_text(r, "torch_pruning"),
                *(times(factor) for factor in ((whole - graphs) / l1, whole / (traced + l1), whole / (traced + fold))),
                f"{same} of {len(RATIOS)}",
            ]
        )
    head = ["network", "our trace, once", "our l1", "our fold", "its nine graphs", "whole of it"]
    head += ["without graphs / our l1", "whole / our trace + l1", "whole / our trace + fold", "same sizes"]
    text = (
        "Nine networks, CPU seconds (wall seconds). Its whole: copies, graphs, importance (l1) and pruning; its graphs "
        "by their share of the wall time. Ours also reports errors and MACs, which it does not. Factors above 1: ours "
        "is faster."
    )
    return table("And beside Torch-Pruning?", text, head, lines)


def beside_the_bound(networks: dict[str, Any]) -> list[str]:
    lines, rate = [], max(r["product_gflops"] for r in networks.values())
    for name, r in networks.items():
        # Every feature is read once in single precision; a Gram matrix is C^2 F multiplications and additions, halved.
        read = sum(s["groups"] * s["channels"] * s["features"] * 4 for s in r["shapes"])
        flops = sum(s["groups"] * s["channels"] ** 2 * s["features"] for s in r["shapes"])
        gpu = [seconds(of_side(r, "gram_gpu", "wall_s"))] if "gram_gpu" in r["sides"] else ["-"]
        lines.append(
            [
                name,
                f"{read / 2**20:.0f}",
                f"{flops / 1e9:.1f}",
                seconds(flops / 1e9 / rate),
                side_text(r, "gram"),
                *gpu,
                side_text(r, "clusters"),
                *(times(of_side(r, side) / of_side(r, "gram")) for side in ("clusters", "fold")),
            ]
        )
    head = ["network", "MiB to read", "GFLOP", "s as one product", "Gram matrices", "on a GPU, s", "clusters with Gram"]
    head += ["clusters / Gram", "nine networks / Gram"]
    text = (
        "Every method that compares all channels needs this much: reading every feature once, and half of a Gram "
        "matrix (C²F operations). As one product: at the highest rate that a float32 product of 2048 x 2048 reached "
        "in the same run. CPU seconds (wall seconds)."
    )
    return table("How near is it to the Gram matrices alone?", text, head, lines)


def memory(networks: dict[str, Any]) -> list[str]:
    lines = []
    for name, r in networks.items():
        sides = [f"{max(taken['peak_mib'] for taken in r['sides'][side]):.0f}" for side in MEMORY]
        peers = [f"{max(cell['peak_mib'] for cell in r['cells'][b]):.0f}" for b in BASELINES]
        lines.append([name, f"{r['network_mib']:.0f}", *sides, *peers])
    head = ["network", "itself", *(side.replace("_", "-") for side in MEMORY), "study", "k-means", "Ward"]
    text = "MiB at the peak over what the process held with the network (and, for a baseline, its features) in memory."
    return table("How much memory does it take?", text, head, lines)


MEMORY = ["trace", "fold", "l1", "torch_pruning"]


def errors(networks: dict[str, Any]) -> list[str]:
    lines = []
    for name, r in networks.items():
        for baseline in BASELINES:
            pairs = [p for c in r["cells"][baseline] for p in zip(c["ours"], c["baseline"], strict=True)]
            higher = sum(ours > theirs * (1 + TOLERANCE) for ours, theirs in pairs)
            means = [f"{statistics.mean(side):.4f}" for side in zip(*pairs, strict=True)]
            worst = max(ours / theirs for ours, theirs in pairs)
            lines.append([name, baseline, *means, f"{higher} of {len(pairs)}", f"{worst:.4f}"])
    head = ["network", "baseline", "ours", "baseline's", "cells where ours is higher", "largest ours / baseline"]
    text = "‖W - P W‖ / ‖W‖ of the same features, mean over the cells that were run."
    return table("Are the clusters as good?", text, head, lines)[:-1]


if __name__ == "__main__":
    main()
