"""Weights put on grids of few bits, before BatchNorm is folded: the network stays an ordinary module."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from pipeline.compression.calibrate.batches import batches_of
from pipeline.compression.quantize.grids import Scheme
from pipeline.compression.quantize.network import in_order, quantize_, sites
from pipeline.compression.recipe import Calibration
from pipeline.stages.stage import CALIBRATION, Seen, State, Supplies, Terms, spelled
from pipeline.tables import pick

FLOAT = 32  # bits that leave the first and the last layer as they are
# How weights are rounded, and where the pictures for it come from; nearest looks at none.
ROUNDINGS = {"nearest": False, "gptq": True}
CALIBRATIONS = {"data": frozenset({"calibration"}), "synthetic": frozenset[str]()}


@dataclass(frozen=True)
class Quantize:
    """Weights of convolutions, linear layers, embeddings and attention on grids of `bits` bits (see grids.py).

    per, group: channel: a scale for each output; group: for `group` inputs of one; tensor: one for a weight
    grid: affine or symmetric; range: mse (least squares) or minmax
    rounding: nearest, or gptq (see rounding.py), which looks at pictures: calibrate=data or synthetic
    ends: bits of the first and the last layer that the forward calls; FLOAT leaves them as they are

    The ends take 8 bits: a ResNet-20 at 3 bits, repaired, gains 0.8 points by it (at 2 bits 6) for under 1% of its
    bytes (2,000 training pictures, see benchmarks/quantize.py).
    Norms and biases stay as they are. The network remembers its grids, so that files hold the codes.
    """

    bits: int = 8
    per: str = "channel"
    group: int = 64
    grid: str = "affine"
    range: str = "mse"
    rounding: str = "nearest"
    calibrate: str = "data"
    ends: int = 8

    terms = Terms(leaves="grid", before="begins")

    def __post_init__(self) -> None:
        pick("rounding", ROUNDINGS, self.rounding)
        pick("calibrate", CALIBRATIONS, self.calibrate)
        self.scheme(self.bits)
        if self.ends != FLOAT:
            self.scheme(self.ends)

    def __str__(self) -> str:
        return spelled("quantize", self)

    @property
    def needs(self) -> frozenset[str]:
        return CALIBRATIONS[self.calibrate] if ROUNDINGS[self.rounding] else frozenset()

    @property
    def facts(self) -> MappingProxyType[str, str]:
        return MappingProxyType({"calibration": self.calibrate} if ROUNDINGS[self.rounding] else {})

    @property
    def version(self) -> int | None:
        """1 saw 128 synthetic pictures."""
        return 2 if self.facts.get("calibration") == "synthetic" else None

    def scheme(self, bits: int) -> Scheme:
        """The grids of this stage with so many bits. UserError for an option that is not there."""
        return Scheme(bits, self.per, self.group, self.grid, self.range)

    def reason_against(self, model: nn.Module) -> str:
        return "" if sites(model) else "no convolution, linear layer or embedding has a weight"

    def seen(self, supplies: Supplies) -> Seen:
        return Seen(min(CALIBRATION, supplies.samples) if self.needs else 0)

    def run(self, state: State, supplies: Supplies) -> State:
        model = state.model
        begun = state.begun()
        pictures: Any = supplies.pictures(Calibration(self.calibrate)) if ROUNDINGS[self.rounding] else None
        _, rest = quantize_(model, self.schemes(model, supplies), None if pictures is None else batches_of(pictures))
        if pictures is not None and rest:
            warnings.warn(_told(rest), RuntimeWarning, stacklevel=2)
        return begun

    def schemes(self, model: nn.Module, supplies: Supplies) -> dict[str, Scheme]:
        """{weight: its scheme}"""
        found = sites(model)
        order = in_order(model, found, supplies.example)
        ends = {order[0], order[-1]} if order else set()
        bits = {name: self.ends if name in ends else self.bits for name in found}
        return {name: self.scheme(of) for name, of in bits.items() if of != FLOAT}


def _told(rest: Sequence[str]) -> str:
    return (
        f"quantize: {len(rest)} weights ({rest[0]}, ...) are rounded to the nearest: gptq knows linear layers and "
        "convolutions without groups that the forward calls once"
    )
