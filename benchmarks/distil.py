"""Measures what an epoch of distillation without labels gives back, beside an epoch of training on labels.

    python -m benchmarks.distil --data cifar10.npz --checkpoints FOLDER                              # everything
    python -m benchmarks.distil --data cifar10.npz --checkpoints FOLDER --starts 'fold@0.5 > repair' # others are kept

ResNet-20 (resnet20-12fca82f.th of akamaster/pytorch_resnet_cifar10) is made smaller and repaired on 1,024 training
pictures. Then it learns for one epoch of `--samples` training pictures that the seed draws, without augmentation: from
their labels, from the answers of the whole network, or from its answers and its features. `tune` is tried at three
learning rates, because its default is low for a network that lost this much; distil(labels=0.999) is training on labels
with the optimizer, the shuffling and the schedule of distillation. Accuracy is that on the test pictures. Rates and
weights are compared on these same pictures, so the best row of a table is a little too good.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import described, machine, write
from benchmarks.quantize import REPAIR, Batches, batches, network
from pipeline.data.cifar10 import load_npz
from pipeline.data.picture_set import Portion
from pipeline.evaluate import metrics_of
from pipeline.stages import Followed, State, Supplies, parse_chain
from pipeline.tasks import Classification

STARTS = ("fold@0.5 > repair", "mix+data@0.5 > repair")
LABELS = ("tune", "tune(lr=0.001)", "tune(lr=0.003)", "distil(labels=0.999)")
ANSWERS = ("distil", "distil(labels=0.1)")
FEATURES = ("distil(features=1)", "distil(features=10)", "distil(features=100)")
LESSONS = (*LABELS, *ANSWERS, *FEATURES)
TARGET = 2.0  # points that an epoch without labels should be ahead of the best one on labels alone
BATCH = 128
TASK = Classification("multiclass", "logits", classes=10)


def learned(net: nn.Module, start: str, part: Portion, test: Batches, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for the network that is made smaller and one for each lesson. asked: samples, seed and lessons"""
    images, labels = part.images, part.labels
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(asked["seed"]))[: asked["samples"]]
    chosen = replace(part, images=images[drawn], labels=labels[drawn])
    repair, lesson = batches(part, slice(REPAIR), BATCH), batches(chosen, slice(None), BATCH)
    supplies = Supplies(net, repair[0][0][:1], TASK, repair, asked["seed"])
    with torch.no_grad():
        state = Followed(State(net), supplies).state(parse_chain(start))
        followed = Followed(replace(state, seconds=0.0), replace(supplies, batches=lesson))
        rows = []
        for text in ("", *asked["lessons"]):
            after = followed.state(parse_chain(text))
            accuracy = 100 * metrics_of(after.model, TASK, test)["acc"]
            said = {"start": start, "lesson": text, "seed": asked["seed"], "samples": asked["samples"]}
            rows.append({**said, "accuracy": accuracy, "seconds": after.seconds, "n": sum(len(y) for _, y in test)})
            print(f"{start:24} {text or 'nothing':24} seed {asked['seed']}: {accuracy:.2f}%", flush=True)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lessons behind one start as lines of a table, and whether distillation reaches its target."""
    found = {text: [row for row in rows if row["lesson"] == text] for text in ("", *LESSONS)}
    found = {text: of for text, of in found.items() if of}
    means = {text: statistics.mean(row["accuracy"] for row in of) for text, of in found.items()}
    lines = ["| learns by | accuracy, % | of each seed | seconds |", "|---|---|---|---|"]
    for text, of in found.items():
        each = ", ".join(f"{row['accuracy']:.2f}" for row in of)
        seconds = statistics.mean(row["seconds"] for row in of)
        lines.append(f"| {text or 'nothing'} | {means[text]:.2f} | {each} | {seconds:.0f} |")
    with_labels = {text: means[text] for text in LABELS if text in means}
    without = {text: means[text] for text in (ANSWERS[0], *FEATURES) if text in means}
    if not with_labels:
        return lines
    best, theirs = max(with_labels.items(), key=lambda pair: pair[1])
    lines += ["", f"Points beside `{best}`, the best with labels alone (target: at least +{TARGET:g}):", ""]
    for text, mine in without.items():
        lines.append(f"- `{text}` {mine - theirs:+.2f}: {'reached' if mine - theirs >= TARGET else 'missed'}")
    return lines


def page(found: Mapping[str, Any]) -> str:
    lines = ["# Distillation beside labels", "", f"`python -m benchmarks.distil`, {described(found['machine'])}.", ""]
    rows = found["rows"]
    for start, samples in sorted({(row["start"], row["samples"]) for row in rows}):
        of = [row for row in rows if (row["start"], row["samples"]) == (start, samples)]
        seeds = len({row["seed"] for row in of})
        title = f"## ResNet-20, {start}, an epoch of {samples:,} pictures"
        lines += [title, "", f"{of[0]['n']:,} test pictures, {seeds} seeds.", "", *table(of), ""]
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.npz")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of the .th file")
    parser.add_argument("--starts", nargs="*", default=STARTS)
    parser.add_argument("--lessons", nargs="*", default=LESSONS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--samples", type=int, default=10_000, help="training pictures in the epoch")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distil"))
    options = parser.parse_args()
    data = load_npz(options.data)
    assert data.train is not None
    net, test = network("resnet20", options.checkpoints), batches(data.test, slice(None))
    kept = options.out.with_suffix(".json")
    rows = json.loads(kept.read_text())["rows"] if kept.exists() else []
    for start in options.starts:
        for seed in options.seeds:
            asked = {"seed": seed, "samples": options.samples, "lessons": options.lessons}
            new = learned(net, start, data.train, test, asked)
            rows = [*[row for row in rows if of(row) not in map(of, new)], *new]
            found = {"rows": sorted(rows, key=of), "machine": machine()}
            write(options.out, found, page(found))


def of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is about, in the order of the page."""
    place = ("", *LESSONS).index(row["lesson"]) if row["lesson"] in LESSONS else -1
    return row["start"], row["samples"], place, row["lesson"], row["seed"]


if __name__ == "__main__":
    main()
