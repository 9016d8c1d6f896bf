"""Compress trained networks, measure what is left of their accuracy, keep the smaller ones.

python -m scripts.compress checkpoint=net.pt model=resnet18 data=cifar10 data.root=/data/cifar10 compression.save=true
python -m scripts.compress checkpoints='nets/**/*.pt' model=resnet18 data.root=/data/cifar10 launcher=joblib
"""

import glob
import json
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from pipeline.compression import Compressed
from pipeline.compression.checkpoint import save_compressed
from pipeline.data.module import PictureData
from pipeline.measure import Entry, Inputs, Measurement, sample
from pipeline.models import build_model
from pipeline.models.checkpoint import load_into, read_state, settings_in
from pipeline.results import ROWS, RowStore, code_version
from pipeline.tables import call
from scripts.build import Config, build_data, row_context, without
from scripts.cell import launch, run_cell
from scripts.sweep import check_launcher
from scripts.train import quiet


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="compress")
def main(config: DictConfig) -> None:
    launch(config, run)


def run(config: Config, sweeping: bool = False) -> Path:
    """Compress and measure one checkpoint as the config says; returns the folder with everything that came of it."""
    quiet()
    # What the file's name says of its training, as the study names its checkpoints: columns of the report.
    config = {**config, "named": settings_in(config["checkpoint"])}
    return run_cell(config, begin, " and what was kept in compressed/", sweeping)


def begin(config: Config, folder: Path, sweeping: bool) -> Callable[[], None]:
    """Load everything; returns the measurement."""
    data = loaded(json.dumps({"data": config["data"], "seed": config["seed"]}))
    net = build_model(classes=data.num_classes, channels=data.channels, **config["model"])
    load_into(net, read_state(config["checkpoint"]), config["checkpoint"])
    net = net.eval().to(memory_format=torch.channels_last)
    options = config["compression"]
    measurement = prepared(json.dumps({key: config[key] for key in ("model", "compression", "data", "seed")}))
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if config["device"] == "auto" else config["device"])

    def inputs() -> Inputs:
        drawn = sample(len(data.repair_data), options["repair_size"], config["seed"])
        mending = data.eval_dataloader(data.repair_data.subset(drawn)) if measurement.mends else []
        test, mending = ([(x.to(device), y.to(device)) for x, y in part] for part in (data.test_dataloader(), mending))
        return Inputs(data.example.to(device), test, mending)

    def keep(entry: Entry, compressed: Compressed) -> None:
        if options["save"]:
            about = {"checkpoint": Path(config["checkpoint"]).name, "model": config["model"], "stage": entry.stage}
            save_compressed(compressed, folder / "compressed" / entry.file, about)

    def measure() -> None:
        context = row_context(config, folder.name) | {"epoch": 0, "step": 0, "split": "test"}
        context["version"] = code_version()
        with torch.no_grad():
            bar = {"desc": "Compressing", "disable": sweeping}
            rows = measurement.rows(net, inputs, context, device=device, done=keep, bar=bar)
        store = RowStore(folder / ROWS)
        store.add(rows)
        store.write()

    return measure


@lru_cache(1)
def loaded(what: str) -> PictureData:
    """The data, once for all checkpoints of a process."""
    return build_data(json.loads(what))


@lru_cache(1)
def prepared(what: str) -> Measurement:
    """With its trace, once for all checkpoints of one architecture."""
    config = json.loads(what)
    options = without(config["compression"], "save", "repair_size", "every_n_epochs")
    return call("compression", Measurement, **options, seed=config["seed"])


def expanded(arguments: list[str]) -> list[str]:
    """`checkpoints=PATTERN` as the sweep over every file that the pattern finds; file names quoted for Hydra."""
    found: list[str] = []
    for argument in arguments:
        name, _, path = argument.partition("=")
        if name == "checkpoint":
            found.append(f"checkpoint={quoted(path)}")
        elif name == "checkpoints":
            files = sorted(filter(os.path.isfile, glob.glob(os.path.expanduser(path), recursive=True)))
            if not files:
                sys.exit(f"error: no file matches {path}")
            found = ["-m", *found, f"checkpoint={','.join(map(quoted, files))}"]
        else:
            found.append(argument)
    return found


def quoted(path: str) -> str:
    """Names such as "lr=0.1,wd=0.pt" mean something else to Hydra."""
    return "'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'"


def start(arguments: list[str]) -> Any:
    check_launcher(arguments)
    sys.argv[1:] = expanded(arguments)
    return main()


if __name__ == "__main__":
    # By its own name, so that a cluster's workers can import what they are told to run.
    from scripts.compress import start

    start(sys.argv[1:])
