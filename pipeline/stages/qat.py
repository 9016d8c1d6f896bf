"""Quantization-aware training: the network learns while its weights are rounded to the grids that they end on."""

from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import nn

from pipeline.compression.calibrate.repair import kept_modes
from pipeline.compression.quantize.grids import Grid, grid_of
from pipeline.compression.quantize.network import moved, on_grids, sites
from pipeline.compression.quantize.training import learning_on_grids
from pipeline.stages.distil import DENSE, Distil, said
from pipeline.stages.quantize import Quantize
from pipeline.stages.stage import Seen, State, Supplies, Terms, spelled
from pipeline.stages.tune import check_positive, check_whole, masks
from pipeline.tables import UserError


@dataclass(frozen=True)
class Qat:
    """Train all weights, those that `quantize` puts on grids rounded in every forward (see quantize/training.py).

    bits, per, group, grid, range, ends: the grids, as in `quantize`; a weight that lies on a grid of as many bits
        already, such as behind quantize(rounding=gptq), goes on from that one
    epochs, lr, temperature, teacher, loss, beta, on, size: the training, as in `distil`
    labels: the share of the loss on hard labels, 0 <= labels <= 1; at 1 there is no teacher

    Activations stay numbers: `ptq` quantizes those. Weights that a mask removed stay zero. A `repair` behind this stage
    gives BatchNorm the statistics of the weights where they ended, which those of the last steps are not.
    """

    bits: int = 8
    epochs: int = 1
    lr: float = 1e-3
    labels: float = 0.0
    temperature: float | None = None
    teacher: str = DENSE
    loss: str = "kl"
    beta: float = 8.0
    on: str = "data"
    per: str = "channel"
    group: int = 64
    grid: str = "affine"
    range: str = "mse"
    ends: int = 8
    size: int | None = None

    facts = MappingProxyType({"statistics": "data"})  # BatchNorm is in training mode
    terms = Terms(frozenset({"float", "grid"}), leaves="grid", before="begins")

    def __post_init__(self) -> None:
        check_positive("qat", epochs=self.epochs, lr=self.lr, beta=self.beta, **said(temperature=self.temperature))
        check_whole("qat", epochs=self.epochs)
        if isinstance(self.labels, str) or not 0 <= self.labels <= 1:
            raise UserError(f"qat: labels {self.labels} must be in 0 <= labels <= 1; 1 trains on labels alone")
        if self.labels == 1 and (self.teacher, self.loss, self.on) != (DENSE, "kl", "data"):
            raise UserError("qat: teacher, loss and on are of distillation, and labels is 1; leave them out")
        _ = self.learning, self.grids  # the options that are theirs are checked there

    @property
    def learning(self) -> Distil:
        """The training. With labels=1 its teacher has no part in it."""
        labels = 0.0 if self.labels == 1 else self.labels
        parts = (self.epochs, self.lr, labels, self.temperature, self.teacher, self.loss, self.beta, self.on)
        return Distil(*parts, size=self.size)

    @property
    def grids(self) -> Quantize:
        return Quantize(self.bits, self.per, self.group, self.grid, self.range, ends=self.ends)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"labels"}) if self.labels == 1 else self.learning.needs

    def __str__(self) -> str:
        return spelled("qat", self)

    def reason_against(self, model: nn.Module) -> str:
        return self.grids.reason_against(model)

    def seen(self, supplies: Supplies) -> Seen:
        seen = self.learning.seen(supplies)
        return Seen(labelled=seen.unlabelled) if self.labels == 1 else seen

    def check(self, supplies: Supplies) -> None:
        """UserError for a source or a teacher that is not there."""
        self.learning.check(supplies)

    def run(self, state: State, supplies: Supplies) -> State:
        model, begun = state.model, state.begun()
        kept = {id(weight): left for weight, left in masks(model)}
        with learning_on_grids(model, self.laid(model, supplies), kept):
            if self.labels < 1:
                self.learning.run(state, supplies)
            else:
                with kept_modes(model):
                    self.learning.learn_(model.train(), supplies.task, supplies, nn.ModuleDict())
        return replace(begun, model=model)

    def laid(self, model: nn.Module, supplies: Supplies) -> dict[str, Grid]:
        """{weight: the grid that it begins with}"""
        schemes, found, there = self.grids.schemes(model, supplies), sites(model), on_grids(model)
        return {
            name: moved(there[name][0], found[name].weight.device)
            if name in there and there[name][0].bits == scheme.bits
            else grid_of(found[name].weight, scheme, found[name].dim)
            for name, scheme in schemes.items()
        }
