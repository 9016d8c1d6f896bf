"""Measures the cost of compressing a large network: tracing, folding at nine ratios, and memory at the peak.

    python -m benchmarks.large                             # ViT-B/32, half a minute on two quiet cores
    python -m benchmarks.large --architecture llama_130m   # the feed-forward channels of a LLaMA

The process uses the library alone, because the scripts let glibc keep free memory. Weights are random, which fold
slower than trained ones, because no two rows are alike. Memory is the resident set at its highest, the network
included, less the memory of Python and the libraries after a tiny network has been compressed. The study's code takes
474 s for one ratio of a SimpleViT of this size on two cores, its MLPs alone.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.common import THREADS, alone, described, machine, peak_mib, write
from pipeline.compression import channel_groups, compress, compressions
from pipeline.compression.sizes.count import parameters
from pipeline.models import build_model

RATIOS = [round(i / 10, 1) for i in range(1, 10)]
PARTS = ("hidden", "residual", "width")
LLAMA = "llama_130m"


def measured(architecture: str) -> dict[str, Any]:
    """Seconds of each step, and its highest resident set in multiples of the network's size."""
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
    for compressed in compressions(net, example, "fold", RATIOS, groups=groups, certify=False):
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


def llama_130m() -> nn.Module:
    """The study's larger language model."""
    sizes = {"hidden": 768, "ffn": 2048, "layers": 12, "heads": 12}
    return build_model("llama", vocabulary=32000, context=256, **sizes).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="vit_base_patch32_224", help=f"of timm, or {LLAMA}")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/large")
    options = parser.parse_args()
    where = machine("timm")
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


if __name__ == "__main__":
    main()
