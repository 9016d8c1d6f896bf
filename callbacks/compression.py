"""Measure at the end of training epochs what compression leaves of the network's accuracy.

    Trainer(callbacks=[CompressionCallback(methods=["fold", "l2"], ratios=[0.3, 0.5])])

works with any LightningModule that classifies (inputs, labels) batches and holds its network in an attribute. Training
is bit for bit what it is without the callback: only copies are compressed, and the random state, the modes, the
optimizer, the metrics and the global step are left as they are.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from pipeline.compression import Compressed
from pipeline.compression.checkpoint import save_compressed
from pipeline.compression.group import DEFAULT_PARTS
from pipeline.measure import Entry, Inputs, Measurement, passes, sample
from pipeline.results import DENSE, Row, RowStore, code_version, foldability
from pipeline.tables import UserError


class CompressionCallback(Callback):
    """Compress copies of the network at the end of training epochs, measure them, log the accuracies.

    methods: names in METHODS, also with "+synthetic", "+data" ... behind (compensated on pictures, see Measurement), or
        in MASKS (single weights set to zero), or
        {label: {"method": name, "pictures": "synthetic" or "data", options of `compressions` and of the method}}
    ratios: fractions of channels to remove (of weights, by MASKS), 0 <= r < 1
    every_n_epochs: measure after every n-th epoch (and after the last one); 0: only in a test run
    stages: "raw", "repaired" (BatchNorm statistics), "norm_tuned" (norm parameters; sees labels); a stage that a
        network has nothing for (repair without BatchNorm) gives no rows
    round_to: leave multiples of so many channels (8 or 16 are faster on some hardware)
    parts: what is compressed: "hidden" channels, "residual" streams, and of attention the "width" of heads or whole
        ones ("head"); a method's own options may say other parts
    network: attribute of the LightningModule that holds the network, dots allowed
    eval_data: Dataset or DataLoader to measure on; None: the validation set that the Trainer uses
    repair_data: Dataset or DataLoader of training samples without augmentation, for repair and norm tuning; None: the
        data module's `repair_data`
    repair_size: how many of them, drawn by `seed`; batch_size: for repair and evaluation, None: the loader's own
    rows: Parquet file for the rows (None: only in memory, see `rows`); context: values of the Row fields cell, model,
        data, seed
    save_to: folder for every compressed network (None: none is saved); architecture: what builds the network at full
        size, {"name": ..., arguments} of `pipeline.models.build_model`, so that `pipeline.compressed.load` needs only
        the file

    Logs `compress/{method}/r{ratio}/acc_{stage}`, `compress/dense/acc`, `foldability/{method}_{stage}` (area under the
    accuracy-over-ratio curve) and `foldability/gap_{stage}` (best folding minus best pruning). A test run
    (`trainer.test`) measures on the test set in the same way, under `compress_test/` and `foldability_test/`.
    What fails becomes a failed row and a NaN; training goes on. Beside a Lightning WeightAveraging callback (EMA) it is
    the averaged network that is measured.
    """

    def __init__(
        self,
        methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("fold", "l1", "l2"),
        ratios: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        every_n_epochs: int = 1,
        stages: Sequence[str] = ("raw", "repaired"),
        round_to: int = 1,
        parts: Sequence[str] = DEFAULT_PARTS,
        network: str = "net",
        eval_data: Dataset | DataLoader | None = None,
        repair_data: Dataset | DataLoader | None = None,
        repair_size: int = 2048,
        batch_size: int | None = None,
        rows: str | Path | None = None,
        context: Mapping[str, Any] | None = None,
        save_to: str | Path | None = None,
        architecture: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.measurement = Measurement(methods, ratios, stages, round_to, seed, parts, who=type(self).__name__)
        if every_n_epochs < 0:
            raise UserError(f"every_n_epochs {every_n_epochs} must be at least 1, or 0 for test runs alone")
        self.every_n_epochs, self.network, self.seed = every_n_epochs, network, seed
        self.eval_data, self.repair_data = eval_data, repair_data
        self.repair_size, self.batch_size = repair_size, batch_size
        self.save_to, self.architecture = None if save_to is None else Path(save_to), architecture
        self.context = {"cell": "", "model": "", "data": "", "seed": seed, **(context or {})}
        self.store = RowStore(rows)

    @property
    def rows(self) -> pl.DataFrame:
        """All rows so far, one column per field of `results.Row`."""
        return self.store.rows

    # --- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise UserError(
                f"CompressionCallback cannot see whole weights under {type(trainer.strategy).__name__}; "
                "use strategy 'ddp', or compress the saved checkpoints"
            )
        self._net(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse at the start what cannot work at the end of the first epoch."""
        self.store.truncate(trainer.current_epoch)
        self._repair_set(trainer)
        with isolate_rng():
            example = self._example(self._eval_loader(trainer, "val"), self._mover(trainer, pl_module))
            self.measurement.trace(self._net(pl_module), example)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch, every = trainer.current_epoch + 1, self.every_n_epochs
        if every and (epoch % every == 0 or trainer.should_stop or epoch == trainer.max_epochs):
            self._run(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run(trainer, pl_module, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_table(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_table(trainer)

    # --- measuring

    def _run(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        # inference_mode(False): a test run may be inside inference mode, where nothing could be tuned
        with isolate_rng(), torch.inference_mode(False), torch.no_grad():
            rows = self._measure(trainer, pl_module, split)
        self.store.add(rows)
        if trainer.is_global_zero:
            with self.measurement.or_warn(f"rows stay in memory: {self.store.path} cannot be written"):
                self.store.write()
        suffix = "" if split == "val" else f"_{split}"
        for name, value in summary(rows, self.measurement.folds).items():
            pl_module.log(name.replace("/", f"{suffix}/", 1), value, rank_zero_only=False, sync_dist=False)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, split: str) -> list[Row]:
        """All rows of this epoch. Every process compresses everything and evaluates its share of the pictures."""
        loader, move = self._eval_loader(trainer, split), self._mover(trainer, pl_module)
        mending = self._repair_batches(trainer) if self.measurement.mends else []
        epoch = trainer.current_epoch + (split == "val")
        fixed = {"epoch": epoch, "step": trainer.global_step, "split": split, "version": code_version()}

        def total(sums: Tensor) -> Tensor:
            device = trainer.strategy.root_device
            sums = sums.to(device) if device.type != "mps" else sums.float().to(device)
            return trainer.strategy.reduce(sums, reduce_op="sum").cpu()

        own = trainer.progress_bar_callback
        hidden = own is None or own.is_disabled or not trainer.is_global_zero

        def inputs() -> Inputs:
            example = self._example(loader, move)
            return Inputs(example, passes(loader, move, example), list(map(move, mending)))

        return self.measurement.rows(
            self._measured_net(trainer, pl_module, split),
            inputs,
            {**self.context, **fixed},
            device=trainer.strategy.root_device,
            forward=trainer.precision_plugin.forward_context,
            total=total,
            done=lambda entry, compressed: self._save(trainer, compressed, epoch, entry),
            bar={"desc": f"Compressing ({split})", "disable": hidden},
        )

    # --- pictures

    def _eval_loader(self, trainer: Trainer, split: str) -> DataLoader:
        """This process's share, every world_size-th sample: Lightning's own loader would repeat some to fill up."""
        given = self.eval_data if split == "val" else None
        if given is None:
            given = trainer.test_dataloaders if split == "test" else trainer.val_dataloaders
        if given is None and split == "val" and trainer.datamodule is not None:
            given = trainer.datamodule.val_dataloader()
        if isinstance(given, list | tuple):
            given = given[0] if given else None
        if given is None:
            raise UserError(
                "CompressionCallback has nothing to measure on; give the Trainer validation data or pass eval_data="
            )
        size = given.batch_size if isinstance(given, DataLoader) else None
        return self._own_loader(given, slice(trainer.global_rank, None, trainer.world_size), size)

    def _repair_set(self, trainer: Trainer) -> Dataset | DataLoader | None:
        if not self.measurement.mends:
            return None
        data = self.repair_data
        if data is None:
            data = getattr(trainer.datamodule, "repair_data", None)
        if data is None:
            raise UserError(
                "stages 'repaired' and 'norm_tuned' need training pictures without augmentation; pass repair_data= to "
                "CompressionCallback, or stages=['raw']"
            )
        return data

    def _repair_batches(self, trainer: Trainer) -> DataLoader:
        """The same batches on every process, so that all get the same statistics."""
        data = self._repair_set(trainer)
        size = self.batch_size or 256
        drawn = sample(len(getattr(data, "dataset", data)), self.repair_size, self.seed, size)
        return self._own_loader(data, drawn, min(size, len(drawn)))

    def _own_loader(self, data: Dataset | DataLoader, which: slice | list[int], batch_size: int | None) -> DataLoader:
        dataset = data.dataset if isinstance(data, DataLoader) else data
        indices = range(len(dataset))[which] if isinstance(which, slice) else which
        size = self.batch_size or batch_size or 256
        given = isinstance(data, DataLoader)
        return DataLoader(
            Subset(dataset, indices),
            size,
            num_workers=data.num_workers if given else 0,
            collate_fn=data.collate_fn if given else getattr(dataset, "collate", None),
            generator=torch.Generator(),  # of its own, because iterating a loader draws from the global one
        )

    def _mover(self, trainer: Trainer, pl_module: LightningModule) -> Callable[[Any], tuple[Tensor, Tensor]]:
        def move(batch: Any) -> tuple[Tensor, Tensor]:
            if not isinstance(batch, list | tuple) or len(batch) < 2:
                raise UserError(f"CompressionCallback needs (inputs, labels) batches, got {type(batch).__name__}")
            batch = pl_module.transfer_batch_to_device(tuple(batch[:2]), trainer.strategy.root_device, 0)
            inputs, labels = trainer.precision_plugin.convert_input(batch)
            return inputs, labels

        return move

    def _example(self, loader: DataLoader, move: Callable) -> Tensor:
        """A batch of one on the device, fetched in this process: others would fetch whole batches ahead."""
        first = Subset(loader.dataset, range(1))
        return move(next(iter(DataLoader(first, collate_fn=loader.collate_fn, generator=torch.Generator()))))[0]

    # --- the network

    def _net(self, pl_module: LightningModule) -> nn.Module:
        try:
            net = operator.attrgetter(self.network)(pl_module)
        except AttributeError:
            net = None
        if not isinstance(net, nn.Module):
            children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise UserError(
                f"{type(pl_module).__name__} has no network {self.network!r}; "
                f"pass network= to CompressionCallback with one of its modules: {children}"
            )
        return net

    def _measured_net(self, trainer: Trainer, pl_module: LightningModule, split: str) -> nn.Module:
        """The network whose accuracy counts: during training with WeightAveraging (EMA, SWA) the averaged one.

        It is what Lightning validates and saves; the live weights are swapped back before epochs end. By a test run
        Lightning has copied the average into the module, or the module was loaded from the checkpoint under test.
        """
        for averaging in trainer.callbacks if split == "val" else ():
            if isinstance(averaging, WeightAveraging) and averaging._average_model is not None:
                return self._net(averaging._average_model.module)
        return self._net(pl_module)

    def _save(self, trainer: Trainer, compressed: Compressed, epoch: int, entry: Entry) -> None:
        if self.save_to is None or not trainer.is_global_zero:
            return
        path = self.save_to / f"epoch{epoch:03d}" / entry.file
        with self.measurement.or_warn(f"{path} cannot be written"):
            about = {**self.context, "epoch": epoch, "stage": entry.stage}
            save_compressed(compressed, path, about, architecture=self.architecture)

    def _log_table(self, trainer: Trainer) -> None:
        data = [list(row) for row in self.rows.iter_rows()]
        for logger in trainer.loggers:
            if data and trainer.is_global_zero and hasattr(logger, "log_table"):
                with self.measurement.or_warn(f"{type(logger).__name__} did not take the table of rows"):
                    logger.log_table("compress/rows", columns=self.rows.columns, data=data)


def summary(rows: Iterable[Row], folds: Mapping[str, bool]) -> dict[str, float]:
    """The numbers that an epoch logs. folds: of the methods that the gap compares, whether they fold (or prune)."""
    logged: dict[str, float] = {}
    curves: dict[tuple[str, str], dict[float, float]] = {}
    dense = math.nan
    for row in rows:
        acc = math.nan if row.acc is None else row.acc
        if row.method == DENSE:
            dense = logged["compress/dense/acc"] = acc
        else:
            logged[f"compress/{row.method}/r{row.ratio:g}/acc_{row.stage}"] = acc
            curves.setdefault((row.stage, row.method), {})[row.ratio] = acc
    for stage in dict.fromkeys(stage for stage, _ in curves):
        areas = {method: foldability(dense, curve) for (s, method), curve in curves.items() if s == stage}
        logged.update({f"foldability/{method}_{stage}": area for method, area in areas.items()})
        folded, pruned = ([a for m, a in areas.items() if folds.get(m) is kind] for kind in (True, False))
        if folded and pruned:
            logged[f"foldability/gap_{stage}"] = max(folded) - max(pruned)
    return logged
