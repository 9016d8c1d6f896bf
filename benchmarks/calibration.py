"""Measures the cost of compensating large networks: seconds, and memory beyond the network, by the size of the data.

    python -m benchmarks.calibration                        # half an hour on one core
    python -m benchmarks.calibration --code ../before .     # the same with two checkouts, one after the other

Each row is `compress` at ratio 0.5 in a process of its own, with random weights: a ResNet50 on pictures of 224 pixels,
and a LLaMA of 135 million parameters on texts of 1,024 tokens (short: 256), where only the FFN is made smaller.
Channels are pruned by their norm, because clustering costs the same whatever the data is. Memory is the resident set
at its highest, less the resident set with the network and the data before.
"""

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import alone, described, machine, spent, write

# Network, samples
ROWS = (("resnet50", 64), ("resnet50", 512), ("llama_short", 64), ("llama", 8), ("llama", 128))
LIMIT_GB = 4.0


def resnet50(count: int) -> tuple[nn.Module, Any, Any, dict[str, Any]]:
    """(network, example, data, options)"""
    import timm

    data = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return timm.create_model("resnet50"), data[:1], data, {}


def llama(count: int, length: int = 1024) -> tuple[nn.Module, Any, Any, dict[str, Any]]:
    """(network, example, data, options)"""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )
    tokens = torch.randint(49152, (count, length), generator=torch.Generator().manual_seed(0))
    return LlamaForCausalLM(config), {"input_ids": tokens[:1, :64]}, {"input_ids": tokens}, {"parts": ["hidden"]}


NETWORKS = {"resnet50": resnet50, "llama": llama, "llama_short": partial(llama, length=256)}


def measured(name: str, count: int, threads: int, code: str) -> dict[str, Any]:
    """One row of the table. code: the checkout whose pipeline is measured."""
    sys.path.insert(0, code)
    from pipeline.compression import channel_groups, compress

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net, example, data, options = NETWORKS[name](count)
    groups = channel_groups(net.eval(), example, options.pop("parts", ("hidden", "residual")))
    cost, _ = spent(lambda: compress(net, example, "l2", 0.5, groups=groups, pictures=data, **options))
    size = sum(t.numel() * t.element_size() for t in net.parameters()) / 2**20
    return {"network": name, "samples": count, "network_mib": size, "load": os.getloadavg()[0], **cost}


def commit(code: Path) -> str:
    """The commit of a checkout, with -dirty behind it where files differ from it."""
    told = ["git", "-C", os.fspath(code), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(told, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def page(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    lines = [
        "# Compensation at ratio 0.5",
        "",
        f"`python -m benchmarks.calibration`, n = 1, {described(where, 'timm', 'transformers')}.",
        "",
        "| code | network | samples | network, MiB | seconds | seconds of all cores | load "
        "| GB over the network, peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        gigabytes = r["peak_mib"] * 2**20 / 1e9
        sizes = [r["code"], r["network"], r["samples"], f"{r['network_mib']:.0f}"]
        cells = [*sizes, f"{r['wall_s']:.1f}", f"{r['cpu_s']:.1f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{r['load']:.1f}", f"{gigabytes:.2f}"])) + " |")
    lines += ["", f"The limit is {LIMIT_GB:g} GB. Seconds depend on what else the machine does (see the load)."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, nargs="+", default=[Path(".")], help="checkouts that are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", nargs="*", default=[f"{n}:{count}" for n, count in ROWS], help="network:samples")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/calibration"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = [(name, int(count)) for name, _, count in (row.partition(":") for row in options.rows)]
    where = machine("timm", "transformers")
    found = [
        {"code": commit(code), **alone("calibration:measured", *row, options.threads, os.fspath(code.resolve()))}
        for row in wanted
        for code in options.code
    ]
    text = page(found, where)
    write(options.out, {"rows": found, "machine": where}, text)


if __name__ == "__main__":
    main()
