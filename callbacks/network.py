"""What callbacks that compress have in common: the network of a module, and pictures to compress it by."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from callbacks.loaders import Batches, calibration_batches, evaluation_batches
from pipeline.batches import first_sample, sample
from pipeline.measure import Measurement
from pipeline.tables import UserError
from pipeline.tasks import Example, Task


class NetworkCallback(Callback):
    """A callback that looks at `pl_module.<network>` by a Measurement.

    network: attribute of the LightningModule that holds the network, dots allowed
    eval_data: Dataset or DataLoader to measure on; None: the validation set that the Trainer uses
    repair_data: Dataset or DataLoader of training samples without augmentation; None: the data module's `repair_data`
    repair_size: how many of them, drawn by `seed`; batch_size: None: the loader's own
    """

    def __init__(
        self,
        measurement: Measurement,
        network: str,
        eval_data: Dataset | DataLoader | None,
        repair_data: Dataset | DataLoader | None,
        repair_size: int,
        batch_size: int | None,
        seed: int,
    ) -> None:
        self.measurement, self.network, self.seed = measurement, network, seed
        self.eval_data, self.repair_data = eval_data, repair_data
        self.repair_size, self.batch_size = repair_size, batch_size

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise UserError(
                f"{type(self).__name__} cannot see whole weights under {type(trainer.strategy).__name__}; "
                "use strategy 'ddp', or compress the saved checkpoints"
            )
        self._net(pl_module)

    def _net(self, pl_module: LightningModule) -> nn.Module:
        try:
            net = operator.attrgetter(self.network)(pl_module)
        except AttributeError:
            net = None
        if not isinstance(net, nn.Module):
            children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise UserError(
                f"{type(pl_module).__name__} has no network {self.network!r}; "
                f"pass network= to {type(self).__name__} with one of its modules: {children}"
            )
        return net

    def batches(self, trainer: Trainer, pl_module: LightningModule, split: str) -> dict[str, Batches]:
        """This process's share of what the Trainer validates (or tests) on, a loader an entry.

        Processes agree on their shares here, so all must come here before anything can fail on one of them.
        """
        given = self.eval_data if split == "val" else None
        return evaluation_batches(trainer, pl_module, split, given, self.batch_size)

    def calibration(self, trainer: Trainer, pl_module: LightningModule) -> Batches | None:
        """Training samples, the same on every process; None where the measurement needs none."""
        data = self._repair_set(trainer)
        if data is None:
            return None
        return calibration_batches(trainer, pl_module, data, self.repair_size, self.seed, self.batch_size)

    def example(self, batches: Batches, task: Task) -> Example:
        """A batch of one on the device, to call the network with."""
        return first_sample(task.inputs(batches.first()))

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
                f"{type(self).__name__} has nothing to look at; give the Trainer validation data or pass eval_data="
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
                "stages 'repaired' and 'norm_tuned' and methods '+data' need training pictures without augmentation; "
                f"pass repair_data= to {type(self).__name__}, or stages=['raw']"
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
                raise UserError(f"{type(self).__name__} needs (inputs, labels) batches, got {type(batch).__name__}")
            batch = pl_module.transfer_batch_to_device(tuple(batch[:2]), trainer.strategy.root_device, 0)
            inputs, labels = trainer.precision_plugin.convert_input(batch)
            return inputs, labels

        return move

    def _example(self, loader: DataLoader, move: Callable) -> Tensor:
        """A batch of one on the device, fetched in this process: others would fetch whole batches ahead."""
        first = Subset(loader.dataset, range(1))
        return move(next(iter(DataLoader(first, collate_fn=loader.collate_fn, generator=torch.Generator()))))[0]
