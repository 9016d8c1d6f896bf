"""Measures what methods leave of well-trained networks, on all test pictures, every stage with what it saw.

    python -m scripts.train sweep=trained_cifar10 data.root=cifar10.npz paths.runs=runs/trained    # and its recipes
    python -m benchmarks.trained runs/trained --data cifar10.npz
    python -m benchmarks.trained resnet20-12fca82f.th --model resnet20 --data cifar10.npz          # and resnet32
    python -m benchmarks.accuracy

A line that is in the results already is not measured again. Calibration sees the first 512 of the 1,024 unlabelled
training pictures that repair sees; none was augmented or held out.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import nn

from benchmarks.baselines import LADDER, channel_pruning, solved
from pipeline.batches import sample
from pipeline.cells import cells, flat, read_record
from pipeline.compression import Compressed, channel_groups, compress
from pipeline.compression.calibrate.batches import batches_of
from pipeline.compression.calibrate.compensate import observe
from pipeline.compression.calibrate.repair import reference, repair_, statistics
from pipeline.compression.calibrate.synthetic import synthesize
from pipeline.compression.copies import bare_copy
from pipeline.compression.plan import Plan
from pipeline.compression.recipe import Calibration, about, parse
from pipeline.data.module import PictureData
from pipeline.evaluate import metrics_of, settle
from pipeline.models import build_model
from pipeline.models.checkpoint import load_into, read_state
from pipeline.stages.stage import CALIBRATION, first_samples
from pipeline.tables import UserError
from pipeline.tasks.classification import Classification

OUT = Path("benchmarks/results/trained.parquet")
REPAIR = 1024  # pictures
# akamaster/pytorch_resnet_cifar10 normalises by these.
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = 0.5
# At half of the channels; FEWER at the other ratios; DRAWN again on other calibration pictures.
RECIPES = [
    *("fold", "l1", "l2", "mix", "l1+grail", "fold+grail"),
    *("l1+synthetic", "mix+synthetic", "mix+synthetic+size=128", "l1+data", "fold+data", "mix+data"),
]
FEWER = {0.3: ["fold", "l1", "l1+grail", "mix+synthetic", "mix+synthetic+size=128", "mix+data"]}
FEWER[0.7] = FEWER[0.3]
# By label: (dense network, plan of l1, what was seen of the dense network) -> smaller network.
BASELINES = {f"l1: {step}": make for step, make in LADDER.items() if make is not solved}  # which is l1+data
BASELINES["channel pruning"] = channel_pruning
DRAWN = ["l1+grail", "mix+synthetic", "l1+data", "mix+data"]
DRAWS = (1, 2)
RESET = ["fold", "l1", "l1+grail", "mix+data"]  # also repaired as in the paper of REPAIR: statistics set anew


@dataclass(frozen=True)
class Subject:
    """A network to measure. told: settings that it was trained with, {} where they are not known."""

    name: str
    checkpoint: Path
    model: Mapping[str, Any]
    told: Mapping[str, Any]


def subjects(path: Path, model: str | None) -> Iterator[Subject]:
    """The cells under a folder of runs that are done, or the one network of a file."""
    if path.is_file():
        if model is None:
            raise UserError(f"{path} does not say what network it is; give --model, such as resnet20")
        yield Subject(path.stem, path, {"name": model}, {})
        return
    for folder in cells(path):
        record = read_record(folder)
        if record is not None and record["state"] == "done":
            yield Subject(folder.name, folder / "last.ckpt", record["config"]["model"], record["config"])


def data_of(subject: Subject, root: Path) -> PictureData:
    options: dict[str, Any] = {key: subject.told["data"][key] for key in ("val_fraction",)} if subject.told else {}
    options |= {"seed": subject.told["seed"]} if subject.told else {"val_fraction": 0.0, **IMAGENET}
    data = PictureData("cifar10", root, **options)
    data.setup()
    return data


class Made(NamedTuple):
    """A smaller network. pictures: those that its method saw; statistics: those that BatchNorm statistics follow."""

    net: nn.Module
    plan: Plan
    pictures: str
    statistics: str


class Bench:
    """One network on its data. draw: seed of the training pictures that calibration and repair see."""

    def __init__(self, subject: Subject, data: PictureData, draw: int = 0) -> None:
        net = build_model(**subject.model, **data.facts())
        load_into(net, read_state(subject.checkpoint), subject.checkpoint)
        self.net = bare_copy(net).eval().to(memory_format=torch.channels_last)
        self.data, self.draw = data, draw
        self.batches = list(data.test_dataloader())
        self.task = settle(self.net, Classification("multiclass"), self.batches[0])
        drawn = data.repair_data.subset(sample(len(data.repair_data), REPAIR, draw))
        self.inputs = [pictures for pictures, _ in data.eval_dataloader(drawn)]
        self.pictures = batches_of(first_samples(self.inputs, CALIBRATION))

    @cached_property
    def groups(self):
        return channel_groups(self.net, self.data.example)

    @cached_property
    def synthetic(self):
        return synthesize(self.net, self.data.example, seed=self.draw)

    @cached_property
    def seen(self):
        return observe(self.net, self.groups, self.pictures)

    @cached_property
    def statistics(self):
        return statistics(self.net, self.inputs)

    def accuracy(self, net: nn.Module) -> float:
        """Per cent of all test pictures."""
        return 100 * metrics_of(net, self.task, self.batches)["acc"]

    def compressed(self, spelling: str, ratio: float) -> Compressed:
        given = self.given(parse(spelling).calibration)
        made = partial(compress, self.net, self.data.example, spelling, ratio)
        return made(groups=self.groups, pictures=given, seed=self.draw)

    def given(self, calibration: Calibration) -> Any:
        """The pictures that a calibration looks at."""
        if calibration.pictures == "synthetic":
            return self.synthetic[: calibration.size]  # the first are the same, however many are made
        return self.pictures if calibration.pictures == "data" else None

    def repaired(self, net: nn.Module, plan: Plan, reset: bool = False) -> nn.Module:
        """A copy whose statistics changed by as much as compression changed them; reset: they are the pictures'."""
        against = reference(self.net, self.statistics, plan.groups, plan.projections, plan.joint_norms)
        net = bare_copy(net)
        repair_(net, self.inputs, None if reset else against)
        return net

    def lines(self, method: str, ratio: float) -> Iterator[dict[str, Any]]:
        """What a method leaves, raw and repaired."""
        made = self.made(method, ratio)
        line = {"method": method, "ratio": ratio, "draw": self.draw, "pictures": made.pictures}
        yield {**line, "stage": "raw", "statistics": made.statistics, "acc": self.accuracy(made.net)}
        repaired = self.repaired(made.net, made.plan)
        yield {**line, "stage": "repaired", "statistics": "data", "acc": self.accuracy(repaired)}
        if method in RESET and ratio == HALF and self.draw == 0:
            reset = self.repaired(made.net, made.plan, reset=True)
            yield {**line, "stage": "reset", "statistics": "data", "acc": self.accuracy(reset)}

    def made(self, method: str, ratio: float) -> Made:
        """The network that a spelling of a recipe gives, or a row of BASELINES."""
        if method not in BASELINES:
            made, said = self.compressed(method, ratio), about(parse(method))
            return Made(made.model, made.report.plan, said["calibration"], said["statistics"])
        plan = self.compressed("l1", ratio).report.plan
        return Made(BASELINES[method](self.net, plan, self.seen), plan, "data", "none")


def jobs(draws: Sequence[int]) -> list[tuple[str, float, int]]:
    """(method, ratio, draw) of all that is measured of a network."""
    found = [(method, HALF, 0) for method in (*RECIPES, *BASELINES)]
    found += [(method, ratio, 0) for ratio, methods in FEWER.items() for method in methods]
    return found + [(method, HALF, draw) for draw in draws for method in DRAWN]


def measure(subject: Subject, data: PictureData, draws: Sequence[int], out: Path) -> None:
    """Add all lines of one network to the file, after every method, so that a run that is cut off goes on there."""
    facts = {"network": subject.name, "model": subject.model["name"], "recipe": recipe_of(flat(subject.told))}
    facts |= {"seed": subject.told.get("seed"), "n": len(data.test_data)}
    there = pl.read_parquet(out) if out.exists() else None
    own = [] if there is None else there.filter(pl.col("network") == subject.name).to_dicts()
    done = {(line["method"], line["ratio"], line["draw"]) for line in own}
    left = [job for job in jobs(draws) if job not in done]
    bench: Bench | None = None
    for method, ratio, draw in sorted(left, key=lambda job: job[2]):
        if bench is None or bench.draw != draw:
            bench = Bench(subject, data, draw)
            facts["dense"] = own[0]["dense"] if own else bench.accuracy(bench.net)
        lines = pl.DataFrame([{**facts, **line} for line in bench.lines(method, ratio)], infer_schema_length=None)
        there = lines if there is None else pl.concat([there, lines], how="diagonal_relaxed")
        there.write_parquet(part := out.with_suffix(".part"))
        part.replace(out)
        told = ", ".join(f"{stage} {acc:.1f}" for stage, acc in lines["stage", "acc"].iter_rows())
        print(f"{subject.name} ({facts['dense']:.2f}%): {method} at {ratio:g}, draw {draw}: {told}", flush=True)


def recipe_of(told: Mapping[str, Any]) -> str:
    """The settings by which the recipes of sweep=trained_cifar10 differ, in words."""
    if not told:
        return "published"
    words = {
        told["optim.name"]: True,
        "no decay": told["optim.weight_decay"] == 0,
        f"SAM {told['optim.sam.rho']:g}": told["optim.sam.rho"] > 0,
        f"L1 {told['optim.l1']:g}": told["optim.l1"] > 0,
        "RandAugment": "rand_augment" in told.get("data.augment", ""),
    }
    return ", ".join(word for word, holds in words.items() if holds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a folder of runs, or a file of weights")
    parser.add_argument("--model", help="the network of a file, a row of pipeline.models.MODELS")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10, in any form that data=cifar10 reads")
    parser.add_argument("--draws", type=int, nargs="*", default=DRAWS, help="more seeds of the calibration pictures")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    try:
        for subject in subjects(options.path, options.model):
            measure(subject, data_of(subject, options.data), options.draws, options.out)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
