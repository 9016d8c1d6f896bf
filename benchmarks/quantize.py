"""Measures what quantization leaves of a network, in accuracy, bytes and time: weights on grids, int8 files.

    python -m benchmarks.quantize --data cifar10.npz --checkpoints FOLDER                    # everything
    python -m benchmarks.quantize --data cifar10.npz --checkpoints FOLDER --parts resnet20   # one part; others are kept

The checkpoints are resnet20-12fca82f.th and resnet32-d509ac18.th of akamaster/pytorch_resnet_cifar10. Repair sees 1,024
training pictures without labels, GPTQ and int8 files 512 of them or synthetic ones. Chains are measured on the test
pictures; the part `choices`, behind the defaults of the stage, on 2,000 other training pictures. The part `qat` trains
on 10,000 training pictures, without labels and as they are. Bytes are those of the file: safetensors, or ONNX. The part
`latency` times int8 networks beside each other and beside the whole network as floats, in the same runtimes and
eagerly, all in turns; its rows are kept by their number of threads. It needs the extras onnx, openvino and torchao.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks.common import described, machine, write
from benchmarks.features import RESNET20_MEAN, RESNET20_STD
from pipeline.compression.checkpoint import save_compressed
from pipeline.compression.plan import history
from pipeline.data.cifar10 import load_npz
from pipeline.data.picture_set import Portion
from pipeline.evaluate import metrics_of
from pipeline.export import batch_of
from pipeline.finished import FinishedNetwork
from pipeline.latency import RUNTIMES, eager, race
from pipeline.models import build_model
from pipeline.models.checkpoint import load_into, read_state
from pipeline.stages import Followed, State, Supplies, Training, parse_chain
from pipeline.tasks import Classification

FILES = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}
GPTQ = "quantize(bits={},rounding=gptq)"
CHAINS = (
    "quantize",
    *(
        f"{stage.format(bits)}{tail}"
        for bits in (4, 3, 2)
        for stage in ("quantize(bits={})", GPTQ)
        for tail in ("", " > repair")
    ),
    "quantize(bits=3,rounding=gptq,calibrate=synthetic) > repair",
    "ptq",
    "ptq(calibrate=synthetic)",
    "fold@0.3 > repair",
    "fold@0.3 > quantize(bits=3) > repair",
    "mix+data@0.3 > repair",
    "mix+data@0.3 > repair > ptq",
    *(
        f"mix+data@{ratio} > repair > {GPTQ.format(bits)} > repair"
        for ratio, bits in ((0.3, 3), (0.4, 3), (0.3, 2), (0.2, 2), (0.1, 2))
    ),
)
CHOICES = (
    *("quantize(bits=3) > repair", "quantize(bits=3,ends=3) > repair", "quantize(bits=3,ends=32) > repair"),
    *("quantize(bits=3,grid=symmetric) > repair", "quantize(bits=3,range=minmax) > repair"),
    *("quantize(bits=3,per=tensor) > repair", "quantize(bits=3,per=group) > repair"),
    *("quantize(bits=2) > repair", "quantize(bits=2,ends=2) > repair"),
    *("ptq", *(f"ptq(range={name})" for name in ("average", "percentile", "entropy"))),
)
QAT = (
    *("quantize(bits=2) > repair", "quantize(bits=2,rounding=gptq) > repair", "qat(bits=2)", "qat(bits=2) > repair"),
    *("qat(bits=3) > repair", "quantize(bits=2,rounding=gptq) > qat(bits=2) > repair"),
    *(f"mix+data@0.3 > repair > {stage} > repair" for stage in (GPTQ.format(2), "qat(bits=2)")),
)
REPAIR, CHOOSE, LEARN = 1024, slice(10_000, 12_000), slice(10_000, 20_000)  # training pictures
# (points of accuracy that may be lost at most, or None; accuracy that is left at least; times smaller at least)
TARGETS: dict[str, tuple[float | None, float, float]] = {
    "ptq": (0.3, 0, 0),
    "ptq(calibrate=synthetic)": (0.3, 0, 0),
    "quantize(bits=4) > repair": (0.5, 0, 0),
    "quantize(bits=3) > repair": (2.0, 0, 0),
    **{chain: (None, 85.0, 14.0) for chain in CHAINS if chain.startswith("mix") and "bits" in chain},
}
BATCH_SIZES = (1, 32)
OPENVINO = "ptq(backend=openvino)"
# pruned: dropped at once, and time does not depend on which
TIMED = ("ptq", "l2@0.5 > ptq", OPENVINO, f"l2@0.5 > {OPENVINO}", "ptq(backend=pt2e)")
PACKAGES = ("onnxruntime", "openvino", "nncf")  # whose versions are told where they are there
TITLES = {
    "choices": "Choices behind the defaults, ResNet-20",
    "qat": "Training on the grid, ResNet-20: an epoch of 10,000 training pictures without labels",
}

Batches = list[tuple[Tensor, Tensor]]


def batches(part: Portion, which: slice, size: int = 250) -> Batches:
    """Pictures as the checkpoints want them, with their labels."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (RESNET20_MEAN, RESNET20_STD))
    pictures = ((part.images[which].float() / 255 - mean) / std).contiguous()
    return list(zip(pictures.split(size), part.labels[which].split(size), strict=True))


def network(name: str, folder: Path) -> nn.Module:
    net = build_model(name, 10, 3)
    load_into(net, read_state(folder / FILES[name]), folder / FILES[name])
    return net.eval()


def size_of(net: nn.Module) -> int:
    """Bytes of the file that a network is kept in."""
    if isinstance(net, FinishedNetwork):
        return len(net.content)
    if not history(net):
        return len(safetensors.torch.save(net.state_dict()))
    with tempfile.TemporaryDirectory() as folder:
        save_compressed(net, path := Path(folder) / "net.safetensors")
        return path.stat().st_size


def measured(
    net: nn.Module, chains: Sequence[str], seen: Batches, shown: Batches, learnt: Batches = ()
) -> list[dict[str, Any]]:
    """A row for the network and one for each chain. learnt: what stages train on; without it, `seen`."""
    task = Classification("multiclass", "logits", classes=10)
    training = Training(partial(shuffled, learnt), sum(len(labels) for _, labels in learnt), len(learnt))
    supplies = Supplies(net, seen[0][0][:1], task, seen, training=training if learnt else None)
    followed = Followed(State(net), supplies)
    rows: list[dict[str, Any]] = []
    for text in ("", *chains):
        with torch.no_grad():
            state = followed.state(parse_chain(text))
        accuracy = 100 * metrics_of(state.model, task, shown)["acc"]
        row = {"chain": text, "accuracy": accuracy, "bytes": size_of(state.model), "seconds": state.seconds}
        rows.append({**row, "n": sum(len(labels) for _, labels in shown)})
        print(f"{text or 'floats':60} {accuracy:6.2f}% {row['bytes']:>9,} bytes {state.seconds:6.1f} s", flush=True)
    return rows


def shuffled(found: Batches, epoch: int) -> Batches:
    return [found[i] for i in torch.randperm(len(found)).tolist()]


def timed(name: str, seconds: float) -> list[dict[str, Any]]:
    """A network of random weights in int8, whole or pruned, beside the whole network as floats.

    off: of the logits, on other pictures, from those of the network that became int8.
    """
    torch.manual_seed(0)
    net = build_model(name, 10, 3).eval().to(memory_format=torch.channels_last)
    pictures = torch.randn(64, 3, 32, 32)
    task = Classification("multiclass", "logits", classes=10)
    followed = Followed(State(net), Supplies(net, pictures[:1], task, [(pictures, torch.zeros(64, dtype=torch.long))]))
    small, off, others = {}, {}, torch.randn(64, 3, 32, 32)
    for text in TIMED:
        chain = parse_chain(text)
        with torch.no_grad():
            before, small[text] = (followed.state(part).model for part in (chain[:-1], chain))
            expected = before(others)
            off[text] = float((small[text](others) - expected).norm() / expected.norm())
    rows = []
    for size in BATCH_SIZES:
        given = batch_of(pictures[:1].contiguous(memory_format=torch.channels_last), size)
        there = {one.runtime: RUNTIMES[one.runtime](net, pictures[:1]) for one in small.values()}
        runs = {name: bind(given) for name, bind in {"eager": eager(net, pictures[:1]), **there}.items()}
        runs |= {text: RUNTIMES[one.runtime](one, pictures[:1])(given) for text, one in small.items()}
        times = dict(zip(runs, race(list(runs.values()), torch.device("cpu"), seconds), strict=True))
        for text, one in small.items():
            rivals = {"than eager": "eager", "than floats there": one.runtime, "than ptq": "ptq"}
            row = {"network": name, "chain": text, "batch": size, "threads": torch.get_num_threads()}
            row |= {"runtime": one.runtime, "off": off[text], "ms": 1e3 * statistics.median(times[text])}
            row |= {"passes": len(times[text]), "load": os.getloadavg()[0]}
            for title, rival in rivals.items():
                row[title] = statistics.median(a / b for a, b in zip(times[rival], times[text], strict=True))
            rows.append(row)
            print(row, flush=True)
    return rows


def missed(row: Mapping[str, Any], floats: Mapping[str, Any]) -> str:
    """How a chain stands to its target: "" where it has none, else what was asked for and whether it was reached."""
    if row["chain"] not in TARGETS:
        return ""
    loss, left, smaller = TARGETS[row["chain"]]
    asked = f"at most {loss:g} points lost" if loss is not None else f"{left:g}% at {smaller:g} times smaller"
    reached = (loss is None or floats["accuracy"] - row["accuracy"] <= loss) and row["accuracy"] >= left
    reached = reached and floats["bytes"] / row["bytes"] >= smaller
    return f"{asked}: {'reached' if reached else 'missed'}"


def page(found: Mapping[str, Any]) -> str:
    packages = [name for name in PACKAGES if name in found["machine"]]
    lines = ["# Quantization", "", f"`python -m benchmarks.quantize`, {described(found['machine'], *packages)}.", ""]
    for name in [*FILES, *TITLES]:
        rows = found.get(name)
        if not rows:
            continue
        pictures = "training" if name == "choices" else "test"
        title = TITLES.get(name, name)
        lines += [f"## {title}: {rows[0]['n']:,} {pictures} pictures, one network", ""]
        lines += ["| chain | accuracy, % | lost | kB | times smaller | target |", "|---|---|---|---|---|---|"]
        for row in rows:
            cells = [f"{row['accuracy']:.2f}", f"{rows[0]['accuracy'] - row['accuracy']:.2f}"]
            cells += [f"{row['bytes'] / 1e3:.1f}", f"{rows[0]['bytes'] / row['bytes']:.1f}"]
            cells.append(missed(row, rows[0]) if pictures == "test" else "")
            lines.append(f"| {' | '.join([row['chain'] or 'floats', *cells])} |")
        lines.append("")
    if found.get("latency"):
        lines += ["## Times faster, int8 against the whole network as floats, random weights", ""]
        lines += ["*off*: of the logits, from those of the floats; *n*: passes, all networks of a batch in turns.", ""]
        faster = ("than eager", "than floats there", "than ptq")
        titles = ["network", "chain", "runtime", "threads", "load", "batch", "off, %", "n", "ms", *faster, ""]
        lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for row in found["latency"]:
            slower = [name for name in faster[:2] if row[name] < 1]
            note = f"int8 is slower {' and '.join(slower)} here" if slower else ""
            cells = [row["chain"], row["runtime"], str(row["threads"]), f"{row['load']:.1f}", str(row["batch"])]
            cells += [f"{100 * row['off']:.2f}", str(row["passes"]), f"{row['ms']:.2f}"]
            cells += [*(f"{row[name]:.2f}" for name in faster), note]
            lines.append(f"| {' | '.join([row['network'], *cells])} |")
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.npz")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of the .th files")
    parser.add_argument("--parts", nargs="*", default=[*FILES, *TITLES, "latency"])
    parser.add_argument("--chains", nargs=2, type=int, default=[0, None], help="from which to before which")
    parser.add_argument("--test-size", type=int, default=10_000, help="of the test pictures, the first ones")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each race")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--timed", nargs="*", default=["resnet20", "resnet18"], help="networks of the part latency")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantize"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_npz(options.data)
    assert data.train is not None
    seen, chosen = batches(data.train, slice(REPAIR), 128), batches(data.train, CHOOSE)
    learnt = batches(data.train, LEARN, 128)
    test = batches(data.test, slice(options.test_size))
    chains = CHAINS[slice(*options.chains)]
    work = {
        **{name: partial(measured, network(name, options.checkpoints), chains, seen, test) for name in FILES},
        "choices": partial(measured, network("resnet20", options.checkpoints), CHOICES, seen, chosen),
        "qat": partial(measured, network("resnet20", options.checkpoints), QAT, seen, test, learnt),
        "latency": lambda: [row for name in options.timed for row in timed(name, options.seconds)],
    }
    kept = options.out.with_suffix(".json")
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for name in options.parts:
        rows = work[name]()
        if name in FILES:  # chains that were measured before are kept
            named = {row["chain"]: row for row in (*found.get(name, ()), *rows)}
            rows = [named[chain] for chain in ("", *CHAINS) if chain in named]
        if name == "latency":
            now = {(row["network"], row["threads"]) for row in rows}
            rows = [row for row in found.get(name, ()) if (row["network"], row["threads"]) not in now] + rows
        found |= {name: rows, "machine": machine(*filter(find_spec, PACKAGES))}
        write(options.out, found, page(found))


if __name__ == "__main__":
    main()
