"""Runs the chains of a config: on a checkpoint in scripts.compress, behind the training in scripts.train.

chain=TEXT is one chain, chains= are several: {name: chain}, or a list; see pipeline.stages.chain.
"""

import hashlib
import json
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from lightning import LightningDataModule
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from pipeline.batches import Passes, sample
from pipeline.chains import Ground, Node, ready
from pipeline.chains import run as run_chains
from pipeline.compression.checkpoint import digest_of, stored_tensors
from pipeline.compression.merge.modules import named_tensors
from pipeline.evaluate import settle
from pipeline.latency import check_timing, profile
from pipeline.measure import Host, Inputs, Once, warn_where_blind
from pipeline.models import build_model
from pipeline.results import CHAIN_ROWS, CHAIN_SPEED, RowStore, code_version, read
from pipeline.stages import Chain, Supplies, Traces, Training, parse_chain, parse_chains
from pipeline.stages.distil import DENSE, Distil
from pipeline.stages.qat import Qat
from pipeline.study.chains import print_chains
from pipeline.study.pictures import plot_pareto
from pipeline.tables import UserError, one_line
from pipeline.tasks.task import Batch
from scripts.arguments import quoted
from scripts.build_network import architecture_of, task_of, without_weights
from scripts.config import Config, without
from scripts.naming import file_hash, row_context, teacher_hash
from scripts.teachers import teacher

CHAINS = ("chain", "chains")  # settings
BATCH_SIZES = {"pictures": [1, 128], "text": [1, 8]}  # to time networks with
STORE = "chains"  # folder, in that of the cell, of the stages' folders
PICTURE = "pareto.png"


def chains_in(config: Config) -> dict[str, Chain]:
    """{name: chain} of the config; {} where it has none. UserError for a chain that is none, and where both are set."""
    chain, chains = config["chain"], config["chains"]
    if chain is not None and chains is not None:
        raise UserError("chain= is one chain and chains= are several; choose one")
    if chain is not None:
        return parse_chains([chain]) if isinstance(chain, str) else {"chain": parse_chain(chain)}
    return {} if chains is None else parse_chains(chains)


def prepared(
    config: Config,
    folder: Path,
    data: LightningDataModule,
    net: nn.Module,
    device: torch.device,
    timing: Config,
    place: Mapping[str, Any],
) -> Callable[[], None]:
    """Check everything that the chains need; returns the work, which leaves rows and times in the cell's folder.

    net: where chains begin. timing: options of `profile`. place: epoch and step of the rows.
    """
    chains = list(chains_in(config).values())
    ground = ground_of(config, data, net.eval().to(device), chains, device)
    ground.context = {**row_context(config, folder.name), **place, "version": code_version()}
    ground.store = folder / STORE
    ready(chains, ground)

    def work() -> None:
        times = Times(ground, timing)
        store = RowStore(folder / CHAIN_ROWS)
        rows = run_chains(chains, ground, times.add)
        store.add(rows)
        store.write()
        times.write(folder / CHAIN_SPEED)
        warn_where_blind(rows, ground.host.once)

    return work


def ground_of(
    config: Config, data: LightningDataModule, net: nn.Module, chains: list[Chain], device: torch.device
) -> Ground:
    needs = frozenset().union(*(stage.needs for chain in chains for stage in chain))
    move = partial(move_data_to_device, device=device)
    batches: list[Batch] = []
    if needs:
        drawn = sample(len(data.repair_data), config["compression"]["repair_size"], config["seed"])
        batches = list(map(move, data.eval_dataloader(data.repair_data.subset(drawn))))
    task = settle(net, task_of(config, data), move(next(iter(data.test_dataloader()))))
    names = {stage.teacher for chain in chains for stage in chain if isinstance(stage, Distil | Qat)} - {DENSE}
    traces, example = Traces(), data.example.to(device)
    supplies = Supplies(
        dense=net,
        example=example,
        task=task,
        batches=batches,
        seed=config["seed"],
        traces=traces,
        training=training_of(data, move) if needs else None,
        teachers={name: cache(partial(teacher, name, config, data, device)) for name in names},
    )
    given = Inputs(example, {"test": Passes(Moved(data.test_dataloader(), move))}, batches)
    return Ground(
        supplies,
        given,
        Host(task, lambda: given, ("test",), device, traces, Once()),
        store=Path(),
        name=name_of(config, net),
        full=build_model(**without_weights(config["model"]), **data.facts()),
        context={},
        hashes={name: teacher_hash(name, config) for name in names},
        architecture=architecture_of(config, data),
        source=source(config),
    )


def source(config: Config) -> dict[str, str]:
    """Name and hash of the checkpoint, which a compressed file names as its source."""
    path = config["checkpoint"]
    return {} if path is None else {"file": Path(path).name, "sha256": file_hash(path)}


def name_of(config: Config, net: nn.Module) -> str:
    """Hash of what stages draw on beside their options: the weights, the data, how many samples, the seed."""
    what = {
        "weights": digest_of("", {name: tensor.cpu() for name, tensor in stored_tensors(net)[0].items()}),
        "model": without_weights(config["model"]),
        "data": without(config["data"], "root", "workers", "download", "cache"),
        "repair_size": config["compression"]["repair_size"],
        "seed": config["seed"],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def training_of(data: LightningDataModule, move: Callable[[Batch], Batch]) -> Training:
    """The training batches as training sees them: shuffled, augmented, mixed."""
    loader, mixing = data.train_dataloader(), getattr(data, "mixing", None)

    def epoch(number: int) -> Iterator[Batch]:
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(number)
        for batch in map(move, loader):
            yield batch if mixing is None else mixing(*batch)

    count = len(loader.sampler)
    return Training(epoch, count // loader.batch_size * loader.batch_size if loader.drop_last else count, len(loader))


def timing_options(
    runtimes: Sequence[str] | None, batch_sizes: Sequence[int] | None, seconds: float, kind: str, sweeping: bool
) -> dict[str, Any]:
    """Arguments of `profile`, checked before anything starts.

    runtimes: None: eager, and in a sweep none. batch_sizes: None: the usual ones of the kind of data.
    """
    batch_sizes = BATCH_SIZES[kind] if batch_sizes is None else batch_sizes
    if runtimes is None:
        runtimes = [] if sweeping else ["eager"]
    for name, values in {"runtimes": runtimes, "batch_sizes": batch_sizes}.items():
        if isinstance(values, str | int):
            raise UserError(f"profile.{name} must be a list, such as [{values}], got {values!r}")
    check_timing(runtimes, batch_sizes)
    return {"runtimes": runtimes, "batch_sizes": batch_sizes, "seconds": seconds}


def chosen_device(name: str) -> torch.device:
    """The device. auto: a GPU where there is one; joblib's workers, which are numbered and see all GPUs, take turns."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        worker = re.search(r"\d+$", multiprocessing.current_process().name)
        return torch.device("cuda", int(worker[0]) % torch.cuda.device_count() if worker else 0)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise UserError(f"device {name!r} is not there ({one_line(error)}); use auto or cpu") from error


class Moved:
    """A loader's batches on the device, fetched anew at every pass."""

    def __init__(self, loader: Iterable[Batch], move: Callable[[Batch], Batch]) -> None:
        self.loader, self.move = loader, move

    def __iter__(self) -> Iterator[Batch]:
        return map(self.move, self.loader)


class Times:
    """Times of the networks of chains, each kept in the folder of its stage; networks of one shape are timed once."""

    def __init__(self, ground: Ground, options: Config) -> None:
        self.ground, self.options, self.tables = ground, options, list[pl.DataFrame]()
        self.seen: dict[tuple[Any, ...], pl.DataFrame] = {}
        digest = hashlib.sha256(json.dumps([options, str(self.device), torch.get_num_threads()]).encode()).hexdigest()
        self.file = f"speed-{digest[:8]}.parquet"

    @property
    def device(self) -> torch.device:
        return self.ground.supplies.example.device

    def add(self, node: Node, network: Callable[[], nn.Module]) -> None:
        if not self.options["runtimes"]:
            return
        path = node.folder / self.file
        with self.ground.host.once.instead(f"{node.folder.name} cannot be timed"):
            if not path.exists():
                found = self.timed(network(), None if not node.chain else self.ground.supplies.dense)
                part = path.with_suffix(".part")
                found.write_parquet(part)
                part.replace(path)
            chain = " > ".join(map(str, node.chain))
            self.tables.append(pl.read_parquet(path).with_columns(chain=pl.lit(chain)))

    def timed(self, net: nn.Module, beside: nn.Module | None) -> pl.DataFrame:
        shapes = tuple((name, tuple(t.shape)) for name, t in named_tensors(net).items())
        if shapes not in self.seen:
            found = profile(net, self.ground.supplies.example, beside=beside, **self.options)
            self.seen[shapes] = pl.DataFrame(list(map(asdict, found)), infer_schema_length=None)
        return self.seen[shapes]

    def write(self, path: Path) -> None:
        if self.tables:
            context = {key: pl.lit(self.ground.context[key]) for key in ("cell", "model", "data")}
            place = {"device": pl.lit(self.device.type), "threads": pl.lit(torch.get_num_threads())}
            pl.concat(self.tables, how="diagonal_relaxed").with_columns(**context, **place).write_parquet(path)


def show(folder: Path) -> None:
    """The chains of a cell as a table on the terminal, and their picture."""
    rows = read(folder / CHAIN_ROWS)
    times = pl.read_parquet(folder / CHAIN_SPEED) if (folder / CHAIN_SPEED).exists() else None
    print_chains(rows, times)
    plot_pareto(rows, folder / PICTURE, times)
    print(f"{CHAIN_ROWS}, {PICTURE} and {STORE}/, the network of every stage, are in {folder}")


def quoted_chains(arguments: Iterable[str]) -> list[str]:
    """The command line with chains that are texts in quotes: Hydra would else read their signs as its own."""
    found = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        is_text = name in CHAINS and value != "null" and value[:1] not in ("[", "{", "'", '"')
        found.append(f"{name}={quoted(value)}" if is_text else argument)
    return found
