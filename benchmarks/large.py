"""Measures the cost of compressing a large network: tracing, folding at nine ratios, and memory at the peak.

    python -m benchmarks.large                             # ViT-B/32, half a minute on two quiet cores
    python -m benchmarks.large --architecture llama_130m   # the feed-forward channels of a LLaMA
    python -m benchmarks.large --before ../before --turns 3    # by turns with the checkout of an earlier commit

The process uses the library alone, because the scripts let glibc keep free memory. Weights are random, which fold
slower than trained ones, because no two rows are alike. Memory is the resident set at its highest, the network
included, less the memory of Python and the libraries after a tiny network has been compressed. The study's code takes
474 s for one ratio of a SimpleViT of this size on two cores, its MLPs alone.
"""

import argparse
import inspect
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.calibration import commit
from benchmarks.common import THREADS, alone, described, machine, peak_mib, write

RATIOS = [round(i / 10, 1) for i in range(1, 10)]
PARTS = ("hidden", "residual", "width")
LLAMA = "llama_130m"


def measured(architecture: str, code: str = ".") -> dict[str, Any]:
    """Seconds of each step, and its highest resident set in multiples of the network's size.

    code: the checkout whose pipeline is measured.
    """
    sys.path.insert(0, code)
    from pipeline.compression import channel_groups, compress, compressions

    # Earlier commits made no certificates.
    plain = {"certify": False} if "certify" in inspect.signature(compressions).parameters else {}
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    compress(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(1, 8))
    before = peak_mib()
    if architecture == LLAMA:
        net, example, parts = llama_130m(), torch.zeros(1, 64, dtype=torch.long), ("hidden",)
    else:
        net, example, parts = timm.create_model(architecture).eval(), torch.randn(1, 3, 224, 224), PARTS
    size = sum(t.numel() * t.element_size() for t in net.state_dict().values()) / 2**20
    start, busy = time.perf_counter(), time.process_time()
    groups = channel_groups(net, example, parts)
    traced, busy_traced, memory = time.perf_counter(), time.process_time(), peak_mib()
    sizes = {}
    for compressed in compressions(net, example, "fold", RATIOS, groups=groups, **plain):
        sizes[compressed.report.ratio] = parameters(compressed.model)
        del compressed  # frees the memory for the next one
    return {
        "architecture": architecture,
        "parts": parts,
        "groups": len(groups),
        "parameters": parameters(net),
        "smaller": sizes,
        "trace_s": traced - start,
        "fold_s": time.perf_counter() - traced,
        "trace_cpu_s": busy_traced - busy,
        "fold_cpu_s": time.process_time() - busy_traced,
        "network_mib": size,
        "memory_traced": (memory - before) / size,
        "memory_folded": (peak_mib() - before) / size,
    }


def parameters(net: nn.Module) -> int:
    """Counted here, because earlier commits count elsewhere."""
    return sum(weight.numel() for weight in net.parameters())


def llama_130m() -> nn.Module:
    """The study's larger language model."""
    from pipeline.models import build_model

    sizes = {"hidden": 768, "ffn": 2048, "layers": 12, "heads": 12}
    return build_model("llama", vocabulary=32000, context=256, **sizes).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="vit_base_patch32_224", help=f"of timm, or {LLAMA}")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit, to compare with by turns")
    parser.add_argument("--turns", type=int, default=3, help="with --before")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/large")
    options = parser.parse_args()
    where = machine("timm")
    if options.before:
        return beside(options, where)
    r = alone("large:measured", options.architecture)
    text = "\n".join(
        [
            f"# Folding {r['architecture']} at ratios {RATIOS[0]} to {RATIOS[-1]}",
            "",
            f"`python -m benchmarks.large`, n = 1, {described(where, 'timm')}.",
            "",
            f"{r['groups']} groups ({', '.join(r['parts'])}), {r['parameters']:,} parameters, "
            f"{r['network_mib']:.0f} MiB.",
            "",
            "| step | seconds | seconds of all cores | memory at the peak, in networks |",
            "|---|---|---|---|",
            f"| trace and check | {r['trace_s']:.1f} | {r['trace_cpu_s']:.1f} | {r['memory_traced']:.2f} |",
            f"| nine folded networks | {r['fold_s']:.1f} | {r['fold_cpu_s']:.1f} | {r['memory_folded']:.2f} |",
            f"| together | {r['trace_s'] + r['fold_s']:.1f} | {r['trace_cpu_s'] + r['fold_cpu_s']:.1f} "
            f"| {r['memory_folded']:.2f} |",
            "",
            "Seconds depend on what else the machine does (see its load), seconds of all cores hardly.",
        ]
    )
    usual = "large" if options.architecture != LLAMA else f"large_{LLAMA}"
    write(options.out or Path("benchmarks/results", usual), {**r, "machine": where}, text)


def beside(options: argparse.Namespace, where: dict[str, Any]) -> None:
    """Measure two checkouts by turns, and write a line a turn and their ratios."""
    codes = [options.before, Path()]
    names = list(map(commit, codes))
    found: list[list[dict[str, Any]]] = [
        [alone("large:measured", options.architecture, os.fspath(code.resolve())) for code in codes]
        for _ in range(options.turns)
    ]
    lines = [
        f"# Folding {options.architecture} at ratios {RATIOS[0]} to {RATIOS[-1]}: {names[1]} beside {names[0]}",
        "",
        f"`python -m benchmarks.large --before <{names[0]}> --turns {options.turns}`, {described(where, 'timm')}.",
        "",
        "| turn | seconds | ratio | seconds of all cores | ratio | memory at the peak, in networks |",
        "|---|---|---|---|---|---|",
    ]
    ratios = {unit: [total(new, unit) / total(old, unit) for old, new in found] for unit in ("s", "cpu_s")}
    for i, (old, new) in enumerate(found):
        cells = [str(i + 1)]
        for unit, ratio in ratios.items():
            cells += [f"{total(new, unit):.1f} / {total(old, unit):.1f}", f"{ratio[i]:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{new['memory_folded']:.2f} / {old['memory_folded']:.2f}"]) + " |")
    middle = {unit: median(ratio) for unit, ratio in ratios.items()}
    lines += ["", f"Median ratio: {middle['s']:.2f} of the seconds, {middle['cpu_s']:.2f} of those of all cores."]
    out = options.out or Path("benchmarks/results/large_before")
    write(out, {"turns": [dict(zip(names, turn, strict=True)) for turn in found], "machine": where}, "\n".join(lines))


def total(found: dict[str, Any], unit: str) -> float:
    return found[f"trace_{unit}"] + found[f"fold_{unit}"]


if __name__ == "__main__":
    main()
