"""The base of callbacks that compress: finds a module's network and the data to compress and measure it on."""

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from callbacks.loaders import Batches, Data, calibration_batches, evaluation_batches
from pipeline.batches import first_sample
from pipeline.compression.copies import bare_copy
from pipeline.entries import Chains, check_sizes, trace
from pipeline.evaluate import settle
from pipeline.example import Example
from pipeline.measure import Once
from pipeline.stages import Supplies, Traces
from pipeline.tables import UserError
from pipeline.tasks import Classification, Task


class NetworkCallback(Callback):
    """A callback that compresses `pl_module.<network>`.

    chains: recipes, ratios and stages to apply to it
    task: what a batch is and what is measured on it; None: classification of the kind that the first batch shows
    network: attribute of the LightningModule that holds the network, dots allowed
    eval_data: Dataset, loader or batches to measure on; None: what the Trainer validates on
    repair_data: Dataset, loader or batches of training samples without augmentation; None: the data module's
        `repair_data`
    repair_size: how many of these samples, drawn by the seed of the chains; batch_size: for Datasets; None: 256
    """

    def __init__(
        self,
        chains: Chains,
        task: Task | None,
        network: str,
        eval_data: Data | None,
        repair_data: Data | None,
        repair_size: int,
        batch_size: int | None,
    ) -> None:
        self.chains, self.network, self.asked = chains, network, task or Classification()
        self.eval_data, self.repair_data = eval_data, repair_data
        if not isinstance(repair_size, int) or repair_size < 1:
            raise UserError(f"repair_size {repair_size} must be a whole number of at least 1 sample")
        check_sizes(chains, repair_size)
        self.repair_size, self.batch_size = repair_size, batch_size
        self.traces, self.once = Traces(), Once(type(self).__name__)
        self._traced: Callable[[], nn.Module | None] = lambda: None
        self._settled: dict[str, tuple[Task, Example, tuple[str, ...]]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise UserError(
                f"{type(self).__name__} cannot see whole weights under {type(trainer.strategy).__name__}; "
                "use strategy 'ddp', or compress the saved checkpoints"
            )
        self._net(pl_module)

    def settle(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        """Settle the task. UserError, before anything is measured, for unfit batches, outputs and networks."""
        self._repair_set(trainer)
        live = self._net(pl_module)
        # A test run may be inside inference mode, where nothing could be tuned or traced.
        with isolate_rng(), torch.inference_mode(False), torch.no_grad(), trainer.precision_plugin.forward_context():
            batches = self.batches(trainer, pl_module, split)
            net = bare_copy(live, share=True).eval()
            first = batches[split].first()
            task = trainer.strategy.broadcast(settle(net, self.asked, first))
            example = first_sample(task.inputs(first))
            self.check(live, example)
        self._settled[split] = task, example, tuple(batches)

    def check(self, live: nn.Module, example: Example, traces: Traces | None = None) -> None:
        """UserError for settings that this network has nothing for, such as the name of a layer that it does not have.

        live: the network that is trained; what is found out about it is kept for the training. traces: of this very
        network, which several callbacks share; None: its own.
        """
        if self._traced() is not live:  # another network may have another graph behind the same shapes
            self.traces, self._traced = traces or Traces(), weakref.ref(live)
        with isolate_rng(), torch.inference_mode(False), torch.no_grad():
            trace(self.chains, bare_copy(live, share=True).eval(), example, self.asked, self.traces)

    def settled(self, split: str) -> tuple[Task, Example, tuple[str, ...]]:
        """(task, arguments of the network as a batch of one, names of the splits), as `settle` found them."""
        return self._settled[split]

    def batches(self, trainer: Trainer, pl_module: LightningModule, split: str) -> dict[str, Batches]:
        """This process's share of the validation (or test) batches, one entry for each loader.

        Processes agree on their shares here, so all must call this before anything can fail on one of them.
        """
        given = self.eval_data if split == "val" else None
        return evaluation_batches(trainer, pl_module, split, given, self.batch_size)

    def calibration(self, trainer: Trainer, pl_module: LightningModule) -> Batches | tuple[()]:
        """Training samples, the same on every process; none where the chains need none."""
        data = self._repair_set(trainer)
        if data is None:
            return ()
        return calibration_batches(trainer, pl_module, data, self.repair_size, self.chains.seed, self.batch_size)

    def supplies(self, trainer: Trainer, pl_module: LightningModule, net: nn.Module, split: str) -> Supplies:
        """The supplies of this network's chains: example, task, training samples, seed, traces."""
        task, example, _ = self.settled(split)
        training = list(self.calibration(trainer, pl_module))
        forward = trainer.precision_plugin.forward_context
        return Supplies(net, example, task, training, self.chains.seed, self.traces, forward)

    def _net(self, pl_module: LightningModule) -> nn.Module:
        try:
            net: Any = operator.attrgetter(self.network)(pl_module)
        except AttributeError:
            net = None
        if not isinstance(net, nn.Module):
            children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise UserError(
                f"{type(pl_module).__name__} has no network {self.network!r}; "
                f"pass network= to {type(self).__name__} with one of its modules: {children}"
            )
        return net

    def _repair_set(self, trainer: Trainer) -> Data | None:
        if not self.chains.needs:
            return None
        data = self.repair_data
        if data is None:
            data = getattr(trainer.datamodule, "repair_data", None)
        if data is None:
            raise UserError(
                "stages behind 'raw' and methods '+data' need training samples without augmentation; "
                f"pass repair_data= to {type(self).__name__}, or stages=['raw']"
            )
        return data
