"""The LightningModule: trains any network on any task, and logs the metrics of the task."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from pipeline.backward import sound_backward
from pipeline.compression.merge.modules import named_tensors, resized
from pipeline.compression.plan import steps_of, went_through_
from pipeline.example import call_arguments
from pipeline.optim import build_optimizer, build_schedule, decayed
from pipeline.optim.sam import Ascent, frozen_statistics
from pipeline.stages.tune import masks
from pipeline.tables import UserError, call, pick
from pipeline.tasks import Task

SECOND_PASS = {"freeze": frozen_statistics, "update": nullcontext}
SUMS = torch.float32 if torch.backends.mps.is_available() else torch.float64  # mps has no other


class Sums(Metric):
    """(size,) sums over all batches of an epoch and all processes, and the number that `read` makes of them.

    torchmetrics' MeanMetric is not used, because it either waits for the device, to look for NaN, or forgets weights.
    """

    full_state_update = False

    def __init__(self, size: int, read: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.read = read
        self.add_state("sums", torch.zeros(size, dtype=SUMS), dist_reduce_fx="sum")

    def update(self, found: Tensor) -> None:
        self.sums = self.sums + found

    def compute(self) -> Tensor:
        return torch.tensor(self.read(self.sums), dtype=SUMS, device=self.sums.device)


def metric_of(task: Task, metric: str, totals: Tensor) -> float:
    return task.values(totals)[metric]


def mean(totals: Tensor) -> float:
    """The mean of n samples. totals: (2,), n and the sum over the samples"""
    return float(totals[1] / totals[0])


class Training(LightningModule):
    """Trains `net` by the loss of a task. Logs {train,val,test}/{metric} for every metric of it.

    Weights that a mask removed before stay zero. train/loss is the loss that is trained on, smoothed labels included,
    before penalties.

    task: one whose metrics are known, such as Classification("multiclass"). It is not settled on the first batch,
        because labels may be mixed in training alone
    optim: {"name", "lr", options of the optimizer}; schedule: {"name", options}; see pipeline.optim.
    label_smoothing: for the training loss alone, 0 <= s <= 1
    l1, l2: add l1 * sum|w| + l2 / 2 * sum w^2 over all parameters to the training loss (not to the one that is logged);
        SGD's weight_decay is l2 outside of the loss, which SAM's ascent does not see
    sam: {"rho" (0: none), "adaptive", "bn_second_pass": "freeze" BatchNorm's running statistics in SAM's second pass
        or "update" them twice a batch}; see pipeline.optim.sam
    restarts: fractions of the training at which the schedule starts anew
    decay: a row of pipeline.optim.DECAYS: what the optimizer's weight decay is for
    compile: train with torch.compile; the network is measured without
    """

    def __init__(
        self,
        net: nn.Module,
        task: Task,
        optim: Mapping[str, Any],
        schedule: Mapping[str, Any],
        label_smoothing: float = 0.0,
        l1: float = 0.0,
        l2: float = 0.0,
        sam: Mapping[str, Any] | None = None,
        restarts: Sequence[float] = (),
        decay: str = "all",
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.task = net, task
        self.optim, self.schedule, self.restarts = dict(optim), dict(schedule), tuple(restarts)
        for name, value in {"label_smoothing": label_smoothing, "l1": l1, "l2": l2}.items():
            if value < 0:
                raise UserError(f"{name} {value} must not be negative")
        if label_smoothing > 1:
            raise UserError(f"label_smoothing {label_smoothing} must be in 0..1")
        self.label_smoothing, self.l1, self.l2 = label_smoothing, l1, l2
        self.decay, self.compile_net = decay, compile
        self.compiled: tuple[nn.Module, nn.Module] | None = None  # a tuple, so that it is no part of the state_dict
        self.ascent = call("optim.sam", self.build_ascent, **(sam or {}))
        self.masked: list[tuple[Tensor, Tensor]] = []
        self.regressors = nn.ModuleDict()  # of the features of a teacher: trained, and no part of the network
        self.train_loss = Sums(2, mean)
        self.sums = nn.ModuleDict(
            {
                f"{split}_{name}": Sums(task.size, partial(metric_of, task, name))
                for split in ("train", "val", "test")
                for name in self.logged(split)
            }
        )

    def build_ascent(self, rho: float = 0.0, adaptive: bool = False, bn_second_pass: str = "freeze") -> Ascent | None:
        self.second_pass = pick("optim.sam.bn_second_pass", SECOND_PASS, bn_second_pass)
        return Ascent(rho, adaptive) if rho else None

    def logged(self, split: str) -> list[str]:
        """Metrics that come from the task's sums: in training all but the loss, which is logged as it is trained on."""
        return [name for name in self.task.metrics if (split, name) != ("train", "loss")]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.fast if self.compile_net and self.training else self.net)(*args, **kwargs)

    @property
    def fast(self) -> Callable[..., Any]:
        """The compiled network, with the same parameters; made anew when the network becomes another one (Shrink)."""
        if self.compiled is None or self.compiled[0] is not self.net:
            self.compiled = self.net, torch.compile(self.net)
        return self.compiled[1]

    def on_fit_start(self) -> None:
        """UserError for strategies and precisions under which SAM would be silently off or wrong."""
        if self.ascent is None:
            return
        strategy = type(self.trainer.strategy)
        if issubclass(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            raise UserError(f"SAM needs whole weights, which {strategy.__name__} does not have; use strategy 'ddp'")
        if self.trainer.precision.endswith("-true") and not self.trainer.precision.startswith(("32", "64")):
            raise UserError(
                f"SAM's step is lost in weights of precision {self.trainer.precision!r}; use 'bf16-mixed' or '32-true'"
            )

    def on_train_start(self) -> None:
        self.masked = masks(self.net)

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        for weight, kept in self.masked:
            weight.mul_(kept)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.ascent is None:
            return self.objective(batch)
        # Both passes draw the same dropout, because SAM compares one loss at two points.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            loss = self.objective(batch)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # Gradients of fp16 vanish without their scale; the step uses their direction alone.
        with sound_backward(self.net):
            self.ascent.climb_(loss if scaler is None else scaler.scale(loss), self.net.parameters())
        with self.second_pass(self.net):
            return self.objective(batch, log=False)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with sound_backward(self.net):
            super().backward(loss, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A network that was smaller when the checkpoint was written (callbacks.Shrink) becomes as small again."""
        own = named_tensors(self.net)
        found = {name.removeprefix("net."): tensor for name, tensor in checkpoint["state_dict"].items()}
        changed = {name: t for name, t in found.items() if name in own and t.shape != own[name].shape}
        if changed:
            self.net = resized(self.net, changed, checkpoint.get("numbers"))
        if "chain" in checkpoint:  # also for a test of it, where no Shrink is
            went_through_(self.net, steps_of(checkpoint["chain"]))

    def on_after_backward(self) -> None:
        if self.ascent is not None:
            self.ascent.restore_()

    def objective(self, batch: Any, log: bool = True) -> Tensor:
        """The training loss with its penalties."""
        output = self.output(batch)
        loss = self.task.loss(output, batch, label_smoothing=self.label_smoothing)
        if log:
            self.measure(output, batch, "train", loss)
        parameters = list(self.net.parameters())
        if self.l1:
            loss = loss + self.l1 * torch.stack([p.abs().sum() for p in parameters]).sum()
        if self.l2:
            loss = loss + self.l2 / 2 * torch.stack([p.square().sum() for p in parameters]).sum()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.measure(self.output(batch), batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.measure(self.output(batch), batch, "test")

    def output(self, batch: Any) -> Any:
        args, kwargs = call_arguments(self.task.inputs(batch))
        return self(*args, **kwargs)

    @torch.no_grad()
    def measure(self, output: Any, batch: Any, split: str, loss: Tensor | None = None) -> None:
        """Add a batch to the sums that the epoch logs. loss: () the training loss, logged beside them"""
        totals = self.task.totals(output, batch)
        if loss is not None:
            self.train_loss.update(torch.stack([totals[0], totals[0] * loss]))
            self.log(f"{split}/loss", self.train_loss, on_step=False, on_epoch=True)
        for name in self.logged(split):
            sums = self.sums[f"{split}_{name}"]
            sums.update(totals)
            shown = split != "train" and name == self.task.metrics[0]
            self.log(f"{split}/{name}", sums, prog_bar=shown, on_step=False, on_epoch=True)

    def build_optimizer(self) -> Optimizer:
        groups = decayed(self.net, self.decay)
        if self.regressors:
            groups = [*(groups if isinstance(groups[0], dict) else [{"params": groups}])]
            groups.append({"params": list(self.regressors.parameters())})
        return build_optimizer(groups, **self.optim)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.build_optimizer()
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(optimizer, steps, self.schedule, self.restarts)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
