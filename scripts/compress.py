"""Compress trained networks, measure what is left of their accuracy and how fast they are, keep the smaller ones.

python -m scripts.compress checkpoint=net.pt model=resnet18 data=cifar10 data.root=/data/cifar10
python -m scripts.compress checkpoints='nets/**/*.pt' methods=[fold,l1,l2] ratios=[0.3,0.5] model=resnet18 \
    data.root=/data/cifar10 launcher=joblib
python -m scripts.compress model=vit_b32 data=imagenet data.root=/data/imagenet    # a model with weights of its own
python -m scripts.compress checkpoint=net.pt chain='mix+data@0.3 > repair > distil(epochs=5)' model=resnet18 ...

A checkpoint is a file or a folder of Hugging Face; many are the cells of a sweep. methods=, ratios=, stages=, parts=
and save= stand for compression.methods= and so on.
"""

import glob
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
import lightning
import polars as pl
import torch
from lightning import LightningDataModule
from lightning.fabric.utilities import move_data_to_device
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from pipeline.batches import Passes, sample
from pipeline.cells import flat, read_record
from pipeline.compression import Compressed
from pipeline.compression.checkpoint import save_compressed
from pipeline.data.module import module_of
from pipeline.entries import Chains, Entry, chains, check_sizes, trace
from pipeline.evaluate import settle
from pipeline.export import export_onnx, export_program
from pipeline.latency import BESIDE, profile
from pipeline.measure import Host, Inputs, Once, measure, warn_where_blind
from pipeline.models.checkpoint import IN_FOLDER, settings_in
from pipeline.models.huggingface_folder import export_huggingface
from pipeline.openvino_network import export_openvino
from pipeline.results import DENSE, ROWS, SPEED, Row, RowStore, code_version
from pipeline.stages import Traces
from pipeline.tables import UserError, call, one_line, pick
from pipeline.tasks.task import Batch
from scripts.arguments import checked, quoted, refuse
from scripts.build_callbacks import compression_options
from scripts.build_data import data_options, load_data
from scripts.build_network import architecture_of, build_net, task_of, without_weights
from scripts.cell import launch, run_cell
from scripts.chain import (
    BATCH_SIZES,
    CHAINS,
    Moved,
    chains_in,
    chosen_device,
    prepared,
    quoted_chains,
    source,
    timing_options,
)
from scripts.chain import show as show_chains
from scripts.config import Config, under, without
from scripts.naming import SWITCHES, WHERE, row_context
from scripts.stop import run_stoppable
from scripts.sweep import SILENCE, check_launcher
from scripts.train import quiet

# Settings that say how a run trained.
TRAINING = "seed checkpoint optim label_smoothing data trainer shrink distil".split()
GRID = ("methods", "ratios", "stages", "parts", "save")  # settings of the grid that chains take the place of
SHORT = GRID  # short for compression.methods, ...
REPAIR_SIZE = "compression.repair_size"  # the one setting of compression that chains draw on
# Name: the ending of its files, and what writes one.
EXPORTS: dict[str, tuple[str, Callable[..., float]]] = {
    "onnx": (".onnx", export_onnx),
    "openvino": (".openvino.zip", export_openvino),
    "program": (".pt2", export_program),
    "huggingface": ("", export_huggingface),  # a folder
}


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="compress")
def main(config: DictConfig) -> None:
    launch(completed(config), run)


def completed(config: DictConfig) -> DictConfig:
    """The config, where a checkpoint folder of Hugging Face or a GGUF file is also the architecture if none is set."""
    if config.profile.batch_sizes is None:
        config.profile.batch_sizes = BATCH_SIZES[module_of(config.data.name).kind]
    if OmegaConf.is_missing(config.model, "architecture") and config.checkpoint is not None:
        config.model.architecture = config.checkpoint
        if str(config.checkpoint).endswith(".gguf"):  # whose weights the architecture brings
            config.checkpoint = None
    return config


def run(config: Config, sweeping: bool = False) -> Path:
    """Compress and measure one checkpoint as the config says; returns the folder of its results."""
    quiet()
    checkpoint = config["checkpoint"]
    if checkpoint is not None:
        # Settings that it was trained with; they become columns of the report.
        named = settings_of_run(checkpoint) | settings_in(checkpoint)
        config = {**config, "named": named, "model": without_weights(config["model"])}
    elif not config["model"].get("pretrained"):
        raise UserError(
            f"model {config['model']['name']!r} has no trained weights; give them as checkpoint=FILE (or many as "
            "checkpoints='FOLDER/*.pt'), or take a model with model.pretrained"
        )
    if chains_in(config):
        return run_cell(only_chains(config), begin_chains, "", sweeping, True, lambda folder, _: show_chains(folder))
    return run_cell(config, begin, sweeping=sweeping)


def only_chains(config: Config) -> Config:
    """The config of a cell that runs chains: in place of methods, ratios and stages, which it would be named by."""
    return {**config, "compression": {"repair_size": config["compression"]["repair_size"], "chains": True}}


def begin_chains(config: Config, folder: Path, sweeping: bool) -> Callable[[], None]:
    lightning.seed_everything(config["seed"], verbose=False)
    device = chosen_device(config["device"])
    data = data_of(json.dumps(data_options(config)))
    timing = call("profile", timing_options, **config["profile"], kind=data.kind, sweeping=sweeping)
    net = build_net(config, data, tell=not sweeping).to(memory_format=torch.channels_last)
    if not sweeping:
        print(data.told(), flush=True)
    return prepared(config, folder, data, net, device, timing, {"epoch": 0, "step": 0})


def settings_of_run(checkpoint: str) -> Config:
    """Settings (optimizer, augmentation, seed, ...) of the training run in whose folder the checkpoint lies."""
    try:
        record = read_record(Path(checkpoint).parent)
    except UserError as error:
        warnings.warn(f"how {checkpoint} was trained is not known: {error}", RuntimeWarning, stacklevel=2)
        return {}
    told = record["config"] if record else {}
    for part, switch in SWITCHES.items():  # settings of a part that is off change nothing
        if (told.get(part) or {}).get(switch) is None:
            told = without(told, part)
    if told.get("checkpoint"):
        told = {**told, "checkpoint": Path(told["checkpoint"]).name}
    return {key: value for key, value in flat(told).items() if under(key, TRAINING) and not under(key, WHERE)}


def begin(config: Config, folder: Path, sweeping: bool) -> Callable[[], None]:
    """Load everything; returns the measurement. In a sweep, a checkpoint that cannot be loaded becomes a failed row."""
    context = row_context(config, folder.name) | {"epoch": 0, "step": 0, "split": "test", "version": code_version()}
    try:
        return ready(config, folder, sweeping, context)
    except Exception as error:
        if sweeping:
            reason = {"status": "failed", "reason": one_line(error)}
            write_rows(folder, [Row(**context, method=DENSE, ratio=0.0, stage="raw", **reason)])
        raise


def ready(config: Config, folder: Path, sweeping: bool, context: Config) -> Callable[[], None]:
    lightning.seed_everything(config["seed"], verbose=False)
    device = chosen_device(config["device"])
    exports = exporters(config["export"])
    data = data_of(json.dumps(data_options(config)))
    timing = call("profile", timing_options, **config["profile"], kind=data.kind, sweeping=sweeping)
    what = {key: config[key] for key in ("model", "data", "seed")}
    tree, traces = chains_of(json.dumps({**what, "compression": compression_options(config, data)}))
    check_sizes(tree, config["compression"]["repair_size"])
    repair_data = data.repair_data if tree.needs else None
    net = build_net(config, data, tell=not sweeping).eval().to(memory_format=torch.channels_last)
    asked = task_of(config, data)
    trace(tree, net, data.example, asked, traces)
    task = settle(net, asked, next(iter(data.test_dataloader())))
    keep = wanted(config["compression"]["save"], tree.entries(net), sweeping)
    if exports and not keep:
        raise UserError("export= writes the networks that are kept, and none are kept; add save=true")
    if not sweeping:
        print(data.told(), flush=True)
    example = data.example.to(device)
    speeds = Speeds(net, timing, example, {key: context[key] for key in ("cell", "model", "data")})
    named = {"architecture": architecture_of(config, data), "source": source(config)}
    once = Once()

    def move(batch: Batch) -> Batch:
        return move_data_to_device(batch, device)

    def inputs() -> Inputs:
        training: Sequence[Batch] = []
        if repair_data is not None:
            drawn = sample(len(repair_data), config["compression"]["repair_size"], config["seed"])
            training = list(map(move, data.eval_dataloader(repair_data.subset(drawn))))
        return Inputs(example, {"test": Passes(Moved(data.test_dataloader(), move))}, training)

    def done(entry: Entry, compressed: Compressed) -> None:
        path = folder / "compressed" / entry.file
        if entry in keep:
            with once.instead(f"{path} cannot be written"):
                save_compressed(compressed, path, {"stage": entry.stage, data.unit: data.preparation()}, **named)
            for suffix, write in exports:
                with once.instead(f"{entry} cannot be exported"):
                    write(compressed.model, example, path.with_suffix(suffix))
        with once.instead(f"{entry} cannot be timed"):
            speeds.add(entry, compressed.model, compressed.report.params_after, compressed.report.macs_after)

    def work() -> None:
        bar = {"desc": "Compressing", "disable": sweeping, **({} if sys.stderr.isatty() else LINES)}
        host = Host(task, inputs, ("test",), device, traces, once, done=done, bar=bar, certify=bool(keep))
        with torch.no_grad():
            with once.instead("the uncompressed network cannot be timed"):
                speeds.add(Entry(DENSE, 0.0, "raw"), net.to(device))
            rows = measure(net, tree, host, context)
        write_rows(folder, rows)
        speeds.write(folder / SPEED)
        warn_where_blind(rows, once)

    return work


class Lines:
    """A file for tqdm where no terminal can rewrite a line: each state of the bar is a line of standard error."""

    def write(self, text: str) -> None:
        if shown := text.strip():
            print(shown, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


LINES = {
    "file": Lines(),
    "mininterval": SILENCE,
    "delay": 1e-3,  # no line before the first network is named
    "bar_format": "{n_fmt} of {total_fmt} networks measured in {elapsed}, about {remaining} to go{postfix} now",
}


class Speeds:
    """Size and speed of one network of each size: different methods at one ratio often leave the same shapes."""

    def __init__(self, dense: nn.Module, options: Config, example: Tensor, context: Config) -> None:
        self.dense, self.options, self.example, self.lines = dense, options, example, []
        self.context = {**context, "device": example.device.type, "threads": torch.get_num_threads()}
        self.seen: set[tuple[Any, ...]] = set()

    def add(self, entry: Entry, model: nn.Module, *sizes: int) -> None:
        if not self.options["runtimes"] or (entry.ratio, *sizes) in self.seen:
            return
        self.seen.add((entry.ratio, *sizes))
        of = {**self.context, "method": entry.method, "ratio": entry.ratio}
        beside = None if entry.method == DENSE else self.dense.to(self.example.device)
        self.lines += [{**of, **asdict(found)} for found in profile(model, self.example, beside=beside, **self.options)]

    def write(self, path: Path) -> None:
        if self.lines:
            pl.DataFrame(self.lines, infer_schema_length=None).write_parquet(path)


def exporters(names: Sequence[str]) -> list[tuple[str, Callable[..., float]]]:
    if isinstance(names, str):
        raise UserError(f"export must be a list, such as [{names}], got {names!r}")
    found = [pick("export", EXPORTS, name) for name in names]
    for name in names:
        if name in BESIDE:
            BESIDE[name].need()
    return found


def wanted(save: bool | None, plan: Sequence[Entry], sweeping: bool) -> set[Entry]:
    """The networks to keep. save: True: all; False: none; None: the first method's in the last stage, in a sweep none.

    The best network of the table is not chosen, because that would let the test pictures choose.
    """
    smaller = [entry for entry in plan if entry.method != DENSE]
    if save is None and smaller:
        method, stage = smaller[0].method, smaller[-1].stage
        smaller = [e for e in smaller if (e.method, e.stage) == (method, stage) and not sweeping]
    return set(smaller) if save is not False else set()


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    store = RowStore(folder / ROWS)
    store.add(rows)
    store.write()


@lru_cache(1)
def data_of(options: str) -> LightningDataModule:
    """The data, once for all checkpoints of a process."""
    return load_data(**json.loads(options))


@lru_cache(1)
def chains_of(what: str) -> tuple[Chains, Traces]:
    """The chains and their traces, once for all checkpoints of one architecture."""
    config = json.loads(what)
    options = without(config["compression"], "save", "repair_size", "every_n_epochs")
    return call("compression", chains, **options, seed=config["seed"]), Traces()


def expanded(arguments: list[str]) -> list[str]:
    """The command line for Hydra: `checkpoints=PATTERN` becomes a sweep over the files that the pattern finds, file
    names are quoted, and short names become full ones."""
    found: list[str] = []
    names = [argument.partition("=")[0].lstrip("+~") for argument in arguments]
    of_grid = (name for name in names if name in GRID or name.partition(".")[0] == "compression")
    if set(names) & set(CHAINS) and (other := next((name for name in of_grid if name != REPAIR_SIZE), None)):
        other = other.removeprefix("compression.")
        raise UserError(f"chains come in the place of methods, ratios and stages; leave {other}= out")
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "checkpoint" and value != "null":
            found.append(f"checkpoint={quoted(value)}")
        elif name in CHAINS:
            found += quoted_chains([argument])
        elif name == "checkpoints":
            files = sorted(filter(is_checkpoint, glob.glob(os.path.expanduser(value), recursive=True)))
            if not files:
                raise UserError(f"no file matches {value}")
            found = ["-m", *found, f"checkpoint={','.join(map(quoted, files))}"]
        else:
            found.append(f"compression.{argument}" if equals and name in SHORT else argument)
    return found


def is_checkpoint(path: str) -> bool:
    """Is it a file, of any content, or a folder with weights?"""
    return os.path.isfile(path) or any(os.path.isfile(os.path.join(path, name)) for name in IN_FOLDER)


def start(arguments: list[str]) -> Any:
    try:
        check_launcher(arguments)
        sys.argv[1:] = checked(expanded(arguments), "compress")
    except UserError as error:
        refuse(error)
    return run_stoppable(main)


if __name__ == "__main__":
    # Imported by its module's name, so that a cluster's workers can import the function, too.
    from scripts.cli import main as command

    command(["compress", *sys.argv[1:]])
