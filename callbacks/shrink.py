"""Make the network that is being trained smaller, at once or step by step, and train on.

    Trainer(callbacks=[Shrink("mix", ratio=0.5, after=10)])                            # one shot, then fine-tuning
    Trainer(callbacks=[Shrink("l1", ratio=0.7, after=10, steps=5, every_n_epochs=2)])  # compress, tune, repeat
    Trainer(callbacks=[Shrink("magnitude", 0.9, after=500, steps=50, every_n_batches=100, pace="cubic")])
    Trainer(callbacks=[Shrink("magnitude", 0.8, after=9, steps=4, every_n_epochs=9, rewind_to=1)])  # a lottery ticket
    Trainer(callbacks=[Shrink("random", ratio=0.5)])           # a network of that size from scratch: a control

The optimizer, its schedule, its accumulated state and SAM go on with the parameters that are left.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import Optimizer

from callbacks.loaders import Data
from callbacks.network import NetworkCallback
from callbacks.pacing import Pacing
from callbacks.rewind import check_rewind, forget_, rewound_
from pipeline.compression import ChannelGroup, Projection
from pipeline.compression.certify import Certificate
from pipeline.compression.checkpoint import save_compressed
from pipeline.compression.choose.layers import check_own, own_ratios
from pipeline.compression.choose.masks import maskable
from pipeline.compression.copies import bare_copy
from pipeline.compression.group import DEFAULT_PARTS
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.merge.tensors import compressed_tensors
from pipeline.compression.plan import Step, history, numbers, steps_of, told, went_through_
from pipeline.compression.report import GroupReport, LayerReport, Report, step_of
from pipeline.entries import chains
from pipeline.example import Example
from pipeline.stages import State, Traces, compressed
from pipeline.stages.tune import masks, show_
from pipeline.tables import UserError
from pipeline.tasks import Task

TUNE = "tune"  # name of the step, in a network's history, for the epochs of training after a compression
TUNED = "tuned"  # stage, in a saved file, of a network that was trained on after it was made smaller
REPORTS = {"groups": GroupReport, "layers": LayerReport}  # parts of the report that older checkpoints hold


NO_ACCUMULATION = (
    "shrink: a step between batches would lose gradients that are accumulated; say every_n_epochs, or "
    "accumulate_grad_batches=1"
)
NO_AVERAGES = "shrink: averaged weights (EMA) keep their old shapes; train without optim.ema"


class Shrink(NetworkCallback):
    """Compress the network itself at some epochs or batches; what follows trains the smaller one.

    method: the spelling of a method, as those of CompressionCallback; the weights of a mask then stay zero
    ratio: fraction of every group's channels (or of the weights) that is gone in the end, 0 < r < 1
    after: whole epochs of training before the first step; 0: none, for a network that is trained already, or for a
        control of the same size from scratch (methods "l1", "random")
    steps, every_n_epochs, every_n_batches, pace, layers: see `Pacing`; by default one shot
    rewind_to: after every step, weights go back to those that they were after so many epochs (batches, where steps are
        by batch), with the same channels merged or dropped, or the same weights masked, and the optimizer begins anew;
        0: to those of the start (arXiv:1803.03635), later ones are better for large networks (arXiv:1912.05671);
        None: weights stay as they are. The schedule of the learning rate is that of the module
    round_to, parts, network, task, eval_data, repair_data, repair_size, batch_size, seed: as in CompressionCallback
    save_to: file for the final network (see `pipeline.compressed.load`), None: it is in the checkpoints alone;
        architecture: what builds it at full size, as in CompressionCallback

    Kept channels keep their optimizer state (momentum, ...); the state of merged channels is merged as their weights
    are. Logs `shrink/ratio`, `shrink/params` and `shrink/macs` at each step, and `shrink/sparsity/WEIGHT` of masks. A
    run that is resumed has the sizes of its checkpoint (see `pipeline.training.Training.on_load_checkpoint`, which a
    module of your own needs, too).

    Raises UserError for steps that training does not reach, under strategies that fork or spawn processes, for a
    network of torch.compile, and beside WeightAveraging (EMA), whose average has the old shapes.
    """

    def __init__(
        self,
        method: str = "mix",
        ratio: float = 0.5,
        after: int = 0,
        steps: int = 1,
        every_n_epochs: int = 1,
        every_n_batches: int | None = None,
        pace: str = "geometric",
        layers: Mapping[str, float] | None = None,
        rewind_to: int | None = None,
        round_to: int = 1,
        parts: Sequence[str] = DEFAULT_PARTS,
        network: str = "net",
        task: Task | None = None,
        eval_data: Data | None = None,
        repair_data: Data | None = None,
        repair_size: int = 2048,
        batch_size: int | None = None,
        save_to: str | Path | None = None,
        architecture: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        tree = chains([method], [ratio], ["raw"], round_to, seed, parts)
        super().__init__(tree, task, network, eval_data, repair_data, repair_size, batch_size)
        self.pacing = Pacing(ratio, after, steps, every_n_epochs, every_n_batches, pace, layers)
        self.rewind_to = rewind_to
        check_rewind(rewind_to, self.pacing)
        self._early: dict[str, Tensor] = {}  # tensors to go back to, in the sizes that the network has now
        self.save_to, self.architecture = None if save_to is None else Path(save_to), architecture
        self._resumed = False
        self._began = 0  # how many stages the network had been through before training
        self._done = -1  # the place of the last step
        self._masked: list[tuple[Tensor, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.pacing.unit == "epochs" and trainer.max_epochs is not None and trainer.max_epochs >= 0:
            self.pacing.check(trainer.max_epochs)
        if self.pacing.unit == "batches" and trainer.accumulate_grad_batches > 1:
            raise UserError(NO_ACCUMULATION)
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise UserError("shrink: forked or spawned processes cannot give back a network of another size; use 'ddp'")
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
            raise UserError(NO_AVERAGES)
        if hasattr(self._net(pl_module), "_orig_mod"):
            raise UserError("shrink: a network of torch.compile was compiled for its old shapes; train it as it is")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse at the start any setting that would fail at a step."""
        if self.pacing.unit == "batches" and 0 <= trainer.estimated_stepping_batches < math.inf:
            self.pacing.check(int(trainer.estimated_stepping_batches))
        self._hold(self._net(pl_module))
        self.settle(trainer, pl_module, "val")

    def check(self, live: nn.Module, example: Example, traces: Traces | None = None) -> None:
        """UserError, as for every compression, and for ratios of layers that the network does not have."""
        super().check(live, example, traces)
        (recipe,) = self.chains.recipes.values()
        check_own(self.pacing.own, recipe.sizes.allocate)
        if recipe.kind == "mask":
            names = list(maskable(live))
        else:
            names = [group.name for group in self.traces.of(live, example, recipe.scope.parts)]
        own_ratios(names, self.pacing.ratio, self.pacing.own)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.pacing.unit == "epochs":
            self._at(trainer, pl_module, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.pacing.unit == "batches":
            self._at(trainer, pl_module, self._place(trainer))

    def _at(self, trainer: Trainer, pl_module: LightningModule, place: int) -> None:
        """What is to be done before the epoch, or the batch, of this number."""
        is_step = place in self.pacing.ratios and place > self._done  # a run that goes on here may have done it
        if place == self.rewind_to or is_step:
            agree_(self._net(pl_module))
        if place == self.rewind_to:
            self._early = {name: t.detach().clone() for name, t in named_tensors(self._net(pl_module)).items()}
        if is_step:
            self._step_(trainer, pl_module, place)
            self._done = place

    def _step_(self, trainer: Trainer, pl_module: LightningModule, place: int) -> None:
        net, ratio = self._net(pl_module), self.pacing.ratios[place]
        self._remember_tuning_(net, place)
        (recipe,) = self.chains.recipes.values()
        with isolate_rng(), torch.no_grad():
            still = bare_copy(net, share=True).eval()
            supplies = self.supplies(trainer, pl_module, still, "val")
            full, own = full_sizes(self._steps(net)), self.pacing.of_layers(place)
            state = next(compressed(State(still), recipe, [ratio], supplies, full, own))
        smaller, report = state.model, state.report
        for ours, theirs in zip(smaller.modules(), net.modules(), strict=True):
            ours.training = theirs.training
        for optimizer in trainer.optimizers:
            follow_(optimizer, net, smaller, report.plan.groups, report.plan.projections)
        show_left_(smaller, net, report.plan.masks)
        self._put(trainer, pl_module, smaller)
        self._hold(smaller)
        if self.rewind_to is not None:
            if not self._early:
                raise UserError("shrink: the checkpoint holds no weights to go back to; start anew, or drop rewind_to")
            self._early = rewound_(smaller, self._early, report.plan, self._masked)
            for optimizer in trainer.optimizers:
                forget_(optimizer, smaller)
        sizes = {"ratio": ratio, "params": report.params_after, "macs": report.macs_after}
        sizes |= {f"sparsity/{layer.name}": layer.sparsity for layer in report.layers}
        pl_module.log_dict({f"shrink/{name}": float(value) for name, value in sizes.items()})

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for weight, mask in self._masked:
            weight.mul_(mask)
        # At every batch, so that it is known whichever callback measures or saves the network, and when.
        self._remember_tuning_(self._net(pl_module), self._place(trainer, 1))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._resumed:
            self._began = len(history(self._net(pl_module)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net = self._net(pl_module)
        self._remember_tuning_(net, self._place(trainer))
        if self.save_to is None or not self._steps(net) or not trainer.is_global_zero:
            return
        with self.once.instead(f"{self.save_to} cannot be written"):
            about = {"epoch": trainer.current_epoch, "seed": self.chains.seed, "stage": TUNED}
            save_compressed(net, self.save_to, about, architecture=self.architecture)

    def _steps(self, net: nn.Module) -> tuple[Step, ...]:
        """The steps that the network went through in this training."""
        return history(net)[self._began :]

    def _place(self, trainer: Trainer, running: int = 0) -> int:
        """How many epochs, or batches, of the training are over. running: epochs that are under way and count"""
        if self.pacing.unit == "epochs":
            return trainer.current_epoch + running
        return trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _remember_tuning_(self, net: nn.Module, place: int) -> None:
        """Add what was trained since the last step to the network's history, as one step, also in a resumed run."""
        steps = [before for before in self.pacing.ratios if before < place]
        if not self._steps(net) or not steps:
            return
        chain = history(net)
        known = chain[:-1] if chain and chain[-1].stage == TUNE else chain
        went_through_(net, (*known, Step(TUNE, {self.pacing.unit: place - max(steps)})))

    # --- resuming

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        steps = history(self._net(pl_module))
        checkpoint["numbers"], checkpoint["chain"] = numbers(steps), told(steps)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        told = checkpoint.get("chain")
        if told is not None:
            return went_through_(self._net(pl_module), steps_of(told))
        # Older checkpoints hold one report of all steps together, in the state of this callback.
        report = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("report")
        if report:
            went_through_(self._net(pl_module), [step_of_report(report)])

    def state_dict(self) -> dict[str, Any]:
        return {"began": self._began, "done": self._done} | ({"early": self._early} if self._early else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._began, self._done, self._resumed = state_dict.get("began", 0), state_dict.get("done", -1), True
        self._early = dict(state_dict.get("early", {}))

    # --- the network

    def _hold(self, net: nn.Module) -> None:
        """Remember which weights a mask has set to zero, in this training or before, so that training keeps them so."""
        self._masked = masks(net)

    def _put(self, trainer: Trainer, pl_module: LightningModule, net: nn.Module) -> None:
        owner, _, name = self.network.rpartition(".")
        setattr(pl_module.get_submodule(owner), name, net)
        if isinstance(trainer.strategy, DDPStrategy):  # DDP's gradient buckets hold the old parameters
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()


def follow_(
    optimizer: Optimizer,
    old: nn.Module,
    new: nn.Module,
    groups: Iterable[ChannelGroup],
    projections: Sequence[Projection],
) -> None:
    """In place: the optimizer holds the parameters of `new` instead of those of `old`, and their state.

    State of a parameter's shape (momentum, second moments) goes through the projections as the parameter did: exactly
    for kept channels; for merged ones, as the mean where they are written and the sum where they are read, which makes
    the steps of Adam there smaller, not larger. A parameter with state of another shape (factored moments) loses all
    its state and starts anew; single numbers (step counts) stay.
    """
    tensors = {name: t.detach() for name, t in named_tensors(old).items()}
    names = {id(p): name for name, p in old.named_parameters()}
    parameters = dict(new.named_parameters())
    mine = {names[id(p)]: dict(state) for p, state in optimizer.state.items() if id(p) in names}
    sized = {
        name: {key for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
        for name, state in mine.items()
    }
    for name in [n for n in mine if any(mine[n][key].shape != tensors[n].shape for key in sized[n])]:
        del mine[name]
    for key in set().union(*(sized[name] for name in mine)):
        given = {name: state[key] for name, state in mine.items() if key in sized[name]}
        for name, value in compressed_tensors({**tensors, **given}, groups, projections, norm_scale=False).items():
            if name in given:
                mine[name][key] = value
    for param_group in optimizer.param_groups:
        param_group["params"] = [parameters[names[id(p)]] if id(p) in names else p for p in param_group["params"]]
    others = {p: state for p, state in optimizer.state.items() if id(p) not in names}
    optimizer.state.clear()
    optimizer.state.update({**others, **{parameters[name]: state for name, state in mine.items()}})


def show_left_(smaller: nn.Module, net: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """In place: weights of a network that was masked show what the masks leave, those of steps before included.

    net: the network before the step. kept: {weight: bool of its shape} of the step alone, which may draw anew
    """
    names = {id(p): name for name, p in net.named_parameters()}
    earlier = {names[id(weight)]: left for weight, left in masks(net)}
    for name, left in kept.items():
        show_(smaller.get_parameter(name), left & earlier[name] if name in earlier else left)


def agree_(net: nn.Module) -> None:
    """In place: every process has the first one's buffers, as DDP gives them before its next forward pass.

    BatchNorm's statistics are of a process's own pictures, and channels chosen by them would differ between processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for buffer in net.buffers():
        shared = buffer.detach().contiguous()
        torch.distributed.broadcast(shared, 0)
        buffer.copy_(shared)


def step_of_report(told: Mapping[str, Any]) -> Step:
    """The step that a report in plain values is of."""
    groups, layers = (tuple(kind(**one) for one in told[name]) for name, kind in REPORTS.items())
    groups = tuple(g if g.certificate is None else replace(g, certificate=Certificate(**g.certificate)) for g in groups)
    return step_of(Report(**{**told, "groups": groups, "layers": layers, "frozen": ()}))


def full_sizes(steps: Iterable[Step]) -> dict[str, int]:
    """{group name: channels that the group had before the first of these steps that compressed it}"""
    found: dict[str, int] = {}
    for step in steps:
        for name, group in step.about.get("groups", {}).items():
            found.setdefault(name, group["before"])
    return found
