"""Measures how much faster folded networks run: dense and folded take turns in one process, beside the limit of MACs.

    python -m benchmarks.latency                                        # all: an hour on two cores
    python -m benchmarks.latency --networks ResNet18 --runtimes eager --batch-sizes 32 --seconds 30

Weights are random, because time does not depend on them. A pair is a pass of the dense network and one of the folded
network right after it, so that other load on the machine slows both; `times faster` is the median over the pairs of the
ratio of their times, and its spread the quartiles.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import THREADS, described, machine, write
from pipeline.compression import channel_groups, compress
from pipeline.compression.group import DEFAULT_PARTS
from pipeline.export import batch_of
from pipeline.latency import RUNTIMES, device_of, eager, peak_memory, race
from pipeline.models import build_model

SEED = 0
BATCH = 32  # batch size of the pairs that the targets are about
ROUNDED_RATIO, ROUNDED = 0.3, (1, 8, 16)  # not 0.5, where the channels left are multiples of 16 without rounding


@dataclass(frozen=True)
class Case:
    """A network at full size, the side of its pictures, the parts to fold, and the target of times faster at 0.5."""

    name: str
    build: Callable[[], nn.Module]
    size: int
    target: float | None = None
    parts: Sequence[str] = DEFAULT_PARTS
    ratio: float = 0.5
    round_to: int = 1


def resnet18() -> nn.Module:
    return build_model("resnet18", 10, 3).to(memory_format=torch.channels_last)


def vit_b32() -> nn.Module:
    return build_model("timm", 1000, 3, architecture="vit_base_patch32_224")


CASES = [
    Case("ResNet18", resnet18, 32, target=2.5),
    Case("ViT-B/32, FFN", vit_b32, 224, parts=["hidden"]),
    Case("ViT-B/32, FFN and width of heads", vit_b32, 224, target=1.6, parts=["hidden", "width"]),
    Case("ViT-B/32, FFN and heads", vit_b32, 224, target=1.6, parts=["hidden", "head"]),
    *(
        Case(f"{name}, ratio {ROUNDED_RATIO}, round_to {n}", build, size, None, parts, ROUNDED_RATIO, n)
        for name, build, size, parts in (
            ("ResNet18", resnet18, 32, DEFAULT_PARTS),
            ("ViT-B/32, FFN and width of heads", vit_b32, 224, ["hidden", "width"]),
        )
        for n in ROUNDED
    ),
]


@dataclass(frozen=True)
class Pairs:
    """Dense and folded in turns: median seconds of a pass of each; median and quartiles of the ratio over the pairs."""

    network: str
    runtime: str
    batch_size: int
    pairs: int
    dense_s: float
    folded_s: float
    low: float
    times_faster: float
    high: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="", help="those whose name begins with this")
    parser.add_argument("--runtimes", nargs="+", default=["eager", "compiled", "onnx"], choices=RUNTIMES)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, BATCH, 128])
    parser.add_argument("--seconds", type=float, default=20.0, help="for the pairs of one network, runtime and batch")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latency"), help="writes OUT.json, OUT.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    networks, pairs = {}, []
    for case in CASES:
        if not case.name.startswith(args.networks):
            continue
        torch.manual_seed(SEED)
        # Rounding helps kernels whatever the batch, so one batch size is enough.
        batch_sizes = args.batch_sizes if case.ratio == 0.5 else [BATCH]
        dense, example = case.build().eval(), torch.zeros(1, 3, case.size, case.size)
        groups = channel_groups(dense, example, case.parts)
        folded, done = compress(dense, example, "fold", case.ratio, groups=groups, round_to=case.round_to)
        memory = [peak_memory(eager(net, example)(batch_of(example, BATCH)), device_of(net)) for net in (dense, folded)]
        networks[case.name] = {
            "ratio": case.ratio,
            "params": [done.params_before, done.params_after],
            "macs": [done.macs_before, done.macs_after],
            "limit": done.macs_before / done.macs_after,
            "memory": memory,
            "target": case.target,
        }
        for runtime in args.runtimes:
            for one in measured(case.name, dense, folded, example, runtime, batch_sizes, args.seconds):
                pairs.append(one)
                print(line(one, networks[case.name]), flush=True)
    packages = ("timm", "onnxruntime")
    result = {
        "seed": SEED,
        "n": 1,
        "machine": machine(*packages),
        "networks": networks,
        "pairs": [asdict(one) for one in pairs],
    }
    write(args.out, result, report(networks, pairs, described(result["machine"], *packages)))


def measured(
    name: str,
    dense: nn.Module,
    folded: nn.Module,
    example: Tensor,
    runtime: str,
    batch_sizes: list[int],
    seconds: float,
) -> list[Pairs]:
    """Pairs of both networks under one runtime, for each batch size."""
    binds = [RUNTIMES[runtime](network, example) for network in (dense, folded)]
    found = []
    for batch_size in batch_sizes:
        inputs = batch_of(example, batch_size)
        of_dense, of_folded = race([bind(inputs) for bind in binds], device_of(dense), seconds)
        ratios = [a / b for a, b in zip(of_dense, of_folded, strict=True)]
        medians = statistics.median(of_dense), statistics.median(of_folded)
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        found.append(Pairs(name, runtime, batch_size, len(ratios), *medians, *quartiles))
    return found


HEAD = (
    "| network | runtime | batch | dense ms | folded ms | times faster | quartiles | MACs allow | pairs |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(one: Pairs, network: dict[str, Any]) -> str:
    return (
        f"| {one.network} | {one.runtime} | {one.batch_size} | {1000 * one.dense_s:.1f} | {1000 * one.folded_s:.1f} "
        f"| **{one.times_faster:.2f}** | {one.low:.2f} ... {one.high:.2f} | {network['limit']:.2f} | {one.pairs} |"
    )


def report(networks: dict[str, dict[str, Any]], pairs: list[Pairs], where: str) -> str:
    """Tables, and lines that compare them with the targets, as Markdown."""
    lines = [
        "# How much faster folded networks run",
        f"Random weights, seed {SEED}, n = 1 network each; float32, convolutional networks channels-last; {where}. "
        f"Written by `{' '.join(['python -m benchmarks.latency', *sys.argv[1:]])}`. "
        "Dense and folded run by turns; *times faster* is the median over "
        "the pairs. *MACs allow*: how many times fewer multiplications there are, the limit for what is bound by "
        "them; norms, activations and softmax get cheaper in proportion to the channels at most.",
        "",
        f"| network | ratio | parameters | MACs of one picture | MACs allow | peak of activations, batch {BATCH} |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {n['ratio']:g} | {change(n['params'])} | {change(n['macs'])} | {n['limit']:.2f} "
            f"| {change(n['memory'], 'B')} |"
            for name, n in networks.items()
        ),
        "",
        HEAD,
        *(line(one, networks[one.network]) for one in pairs),
        "",
    ]
    for one in pairs:
        target = networks[one.network]["target"]
        if target and one.batch_size == BATCH:
            verdict = "reached" if one.times_faster >= target else "**missed**"
            lines.append(
                f"- {one.network}, {one.runtime}, batch {BATCH}: {one.times_faster:.2f} times faster; "
                f"at least {target:g} was to be: {verdict}."
            )
    return "\n".join(lines)


def change(counts: list[int], unit: str = "") -> str:
    before, after = (f"{count / 1e6:,.1f}M{unit}" for count in counts)
    return f"{before} -> {after}"


if __name__ == "__main__":
    main()
