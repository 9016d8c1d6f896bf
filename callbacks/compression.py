"""Measure at the end of training epochs what compression leaves of a network.

    Trainer(callbacks=[CompressionCallback(methods=["fold", "l2"], ratios=[0.3, 0.5])])

works with any LightningModule that holds its network in an attribute, and measures what a Task can measure: without
task=, classification of every kind. Training is bit for bit what it is without the callback: only copies are
compressed, and the random state, the modes, the optimizer, the metrics and the global step are left as they are.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from callbacks.loaders import Data
from callbacks.network import NetworkCallback
from pipeline.batches import Passes
from pipeline.compression import Compressed
from pipeline.compression.checkpoint import save_compressed
from pipeline.compression.group import DEFAULT_PARTS
from pipeline.entries import Entry, chains
from pipeline.measure import Host, Inputs, measure
from pipeline.results import Row, RowStore, code_version
from pipeline.study.logged import ROWS_TABLE, epoch_numbers
from pipeline.tables import UserError
from pipeline.tasks import Task


class CompressionCallback(NetworkCallback):
    """Compress copies of the network at the end of training epochs, measure them, log the accuracies.

    methods: spellings: a name in METHODS or MASKS, "+synthetic" or "+data" behind it for a calibrated one (see
        `pipeline.compression.recipe`), or {label: {"method": name, options of a compression recipe and of the method}}
    ratios: fractions of channels to remove (of weights, by MASKS), 0 <= r < 1
    every_n_epochs: measure after every n-th epoch (and after the last one); 0: only in a test run
    stages: what comes behind each compression, on copies: "raw" (nothing), "repaired" (BatchNorm statistics),
        "norm_tuned" (then norm parameters; sees labels), "tuned" (all weights; sees labels), or a chain of stages,
        "repair > tune(epochs=3)"; a named stage that the network has nothing for gives no rows
    round_to: leave multiples of so many channels (8 or 16 are faster on some hardware)
    parts: what is compressed: "hidden" channels, "residual" streams, the "width" of attention heads, or whole heads
        ("head"); a method's own options may name other parts
    predict: foretell on synthetic pictures how well every network will do: the `fidelity` of its rows (see predict.py)
    sharpness: measure how fast the loss rises when weights move, on training samples, which `repair_data` gives: True
        or options of `pipeline.sharpness.Sharpness`; None: not
    corruptions: also evaluate on corrupted pictures: {"names": [...], "mean": [...], "std": [...]}, where mean and std
        are those that pictures are normalised by (see `pipeline.data.corruptions`); None: not
    network: attribute of the LightningModule that holds the network, dots allowed
    task: what a batch is and what is measured on it; None: classification of the kind that the first batch shows
    eval_data: Dataset, loader or batches to measure on; None: what the Trainer validates on, as it validates
    repair_data: Dataset, loader or batches of training samples without augmentation, for repair and tuning; None: the
        data module's `repair_data`
    repair_size: how many of these samples, drawn by `seed`; batch_size: for Datasets; None: 256
    rows: Parquet file for the rows (None: only in memory, see `rows`); context: values of the Row fields cell, model,
        data, seed
    save_to: folder for every compressed network (None: none is saved); architecture: what builds the network at full
        size, {"name": ..., arguments} of `pipeline.models.build_model`, so that `pipeline.compressed.load` needs only
        the file

    Logs `compress/{method}/r{ratio}/acc_{stage}`, `compress/dense/acc`, `foldability/{method}_{stage}` (area under the
    accuracy-over-ratio curve), `foldability/folding_{stage}` and `foldability/pruning_{stage}` (the best of each side),
    and `foldability/gap_{stage}` (folding minus pruning); another task's headline metric takes the place of "acc"
    (`pipeline.study.logged` has all names). A test run (`trainer.test`) measures on the test set in the same way, under
    `compress_test/` and `foldability_test/`; further validation loaders log under `compress_val1/` and so on.
    A measurement that fails becomes a failed row and a NaN; training goes on. Beside a Lightning WeightAveraging
    callback (EMA) the averaged network is measured.
    """

    def __init__(
        self,
        methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("fold", "l1", "l2"),
        ratios: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        every_n_epochs: int = 1,
        stages: Sequence[str] = ("raw", "repaired"),
        round_to: int = 1,
        parts: Sequence[str] = DEFAULT_PARTS,
        predict: bool = False,
        sharpness: Mapping[str, Any] | bool | None = None,
        corruptions: Sequence[str] | Mapping[str, Any] | None = None,
        network: str = "net",
        task: Task | None = None,
        eval_data: Data | None = None,
        repair_data: Data | None = None,
        repair_size: int = 2048,
        batch_size: int | None = None,
        rows: str | Path | None = None,
        context: Mapping[str, Any] | None = None,
        save_to: str | Path | None = None,
        architecture: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        beside = {"sharpness": sharpness, "corruptions": corruptions}
        tree = chains(methods, ratios, stages, round_to, seed, parts, predict, **beside)
        super().__init__(tree, task, network, eval_data, repair_data, repair_size, batch_size)
        if every_n_epochs < 0:
            raise UserError(f"every_n_epochs {every_n_epochs} must be at least 1, or 0 for test runs alone")
        self.every_n_epochs = every_n_epochs
        self.save_to, self.architecture = None if save_to is None else Path(save_to), architecture
        self.context = {"cell": "", "model": "", "data": "", "seed": seed, **(context or {})}
        self.store = RowStore(rows)

    @property
    def rows(self) -> pl.DataFrame:
        """All rows so far, one column per field of `results.Row`."""
        return self.store.rows

    # --- when

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse at the start any setting that would fail at the end of the first epoch."""
        self.store.truncate(trainer.current_epoch)
        if self.every_n_epochs:
            self.settle(trainer, pl_module, "val")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, every = trainer.current_epoch + 1, self.every_n_epochs
        steps_are_done = 0 < trainer.max_steps <= trainer.global_step
        if every and (epoch % every == 0 or trainer.should_stop or epoch == trainer.max_epochs or steps_are_done):
            self._run(trainer, pl_module, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.settle(trainer, pl_module, "test")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run(trainer, pl_module, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_rows(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_rows(trainer, "test")

    # --- measuring

    def _run(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        # inference_mode(False): a test run may be inside inference mode, where nothing could be tuned
        with isolate_rng(), torch.inference_mode(False), torch.no_grad():
            rows = self._measure(trainer, pl_module, split)
        self.store.add(rows)
        if trainer.is_global_zero:
            with self.once.instead(f"rows stay in memory: {self.store.path} cannot be written"):
                self.store.write()
        for name, value in epoch_numbers(rows).items():
            pl_module.log(name, value, rank_zero_only=False, sync_dist=False)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, split: str) -> list[Row]:
        """All rows of this epoch. Every process compresses everything and evaluates its share of the samples."""
        epoch = trainer.current_epoch + (split == "val")
        task, example, splits = self.settled(split)

        def inputs() -> Inputs:
            batches, training = self.batches(trainer, pl_module, split), self.calibration(trainer, pl_module)
            return Inputs(example, {name: Passes(found) for name, found in batches.items()}, list(training))

        def total(sums: Tensor) -> Tensor:
            device = trainer.strategy.root_device
            sums = sums.to(device) if device.type != "mps" else sums.float().to(device)
            return trainer.strategy.reduce(sums, reduce_op="sum").cpu()

        own = trainer.progress_bar_callback
        host = Host(
            task,
            inputs,
            splits,
            trainer.strategy.root_device,
            self.traces,
            self.once,
            trainer.precision_plugin.forward_context,
            total,
            lambda entry, compressed: self._save(trainer, compressed, epoch, entry),
            {
                "desc": f"Compressing ({split})",
                "disable": own is None or own.is_disabled or not trainer.is_global_zero,
            },
            self.save_to is not None,
        )
        fixed = {"epoch": epoch, "step": trainer.global_step, "version": code_version()}
        return measure(self._measured_net(trainer, pl_module, split), self.chains, host, {**self.context, **fixed})

    # --- the network

    def _measured_net(self, trainer: Trainer, pl_module: LightningModule, split: str) -> nn.Module:
        """The network whose accuracy counts: during training with WeightAveraging (EMA, SWA) the averaged one.

        Lightning validates and saves the averaged network, and swaps the live weights back before epochs end. Before a
        test run Lightning has copied the average into the module, or the module was loaded from the tested checkpoint.
        """
        for averaging in trainer.callbacks if split == "val" else ():
            if isinstance(averaging, WeightAveraging) and averaging._average_model is not None:
                return self._net(averaging._average_model.module)
        return self._net(pl_module)

    def _save(self, trainer: Trainer, compressed: Compressed, epoch: int, entry: Entry) -> None:
        if self.save_to is None or not trainer.is_global_zero:
            return
        path = self.save_to / f"epoch{epoch:03d}" / entry.file
        with self.once.instead(f"{path} cannot be written"):
            about = {**self.context, "epoch": epoch, "stage": entry.stage}
            save_compressed(compressed, path, about, architecture=self.architecture)

    def _log_rows(self, trainer: Trainer, split: str) -> None:
        """Hand the rows to loggers that take them, and a table of them to others that take tables."""
        for logger in trainer.loggers if trainer.is_global_zero and len(self.rows) else ():
            with self.once.instead(f"{type(logger).__name__} did not take the table of rows"):
                if hasattr(logger, "log_rows"):
                    logger.log_rows(self.rows, split)
                elif hasattr(logger, "log_table"):
                    logger.log_table(ROWS_TABLE, self.rows.columns, [list(row) for row in self.rows.iter_rows()])
