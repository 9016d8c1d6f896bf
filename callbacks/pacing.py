"""When a network becomes smaller while it trains, and how far at each step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from pipeline.tables import UserError, pick

# By name: (ratio in the end, share of the steps that are done, 0 < share <= 1) -> ratio after them.
PACES: dict[str, Callable[[float, float], float]] = {
    # Every step removes the same fraction of what it finds.
    "geometric": lambda ratio, share: 1 - (1 - ratio) ** share,
    # Much at first, while there is much to spare, and little at the end; arXiv:1710.01878, eq. 1 with s_i = 0.
    "cubic": lambda ratio, share: ratio * (1 - (1 - share) ** 3),
}


@dataclass(frozen=True)
class Pacing:
    """The steps of a training in which the network becomes smaller.

    ratio: fraction of every group's channels (or of the weights) that is gone in the end, 0 < r < 1
    after: whole epochs of training before the first step
    steps: 1: one shot; pace: a row of PACES, the ratio after each of more
    every_n_epochs: epochs of tuning between two steps
    every_n_batches: batches between two steps, in place of epochs; `after` then counts batches, too
    layers: {beginning of a group's or a weight's name: its own ratio in the end, 0: it stays whole}
    """

    ratio: float = 0.5
    after: int = 0
    steps: int = 1
    every_n_epochs: int = 1
    every_n_batches: int | None = None
    pace: str = "geometric"
    layers: Mapping[str, float] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole = {"after": (self.after, 0), "steps": (self.steps, 1), "every_n_epochs": (self.every_n_epochs, 1)}
        if self.every_n_batches is not None:
            whole["every_n_batches"] = (self.every_n_batches, 1)
        for name, (value, least) in whole.items():
            if value != int(value) or value < least:
                raise UserError(f"{name} {value} must be a whole number of at least {least}")
        if self.every_n_batches is not None and self.every_n_epochs != 1:
            raise UserError(
                f"every_n_epochs {self.every_n_epochs} and every_n_batches {self.every_n_batches} say the same twice; "
                "choose one"
            )
        if not 0 < self.ratio < 1:
            raise UserError(f"ratio {self.ratio} is out of range: the fraction of channels to remove is 0 < ratio < 1")
        pick("pace", PACES, self.pace)
        if not isinstance(self.layers, Mapping | None):
            raise UserError(f"layers must be {{beginning of a layer's name: its own ratio}}, got {self.layers!r}")

    @property
    def unit(self) -> str:
        """The unit of `after` and of the places of the steps: epochs or batches."""
        return "epochs" if self.every_n_batches is None else "batches"

    @cached_property
    def ratios(self) -> dict[int, float]:
        """{epochs, or batches, before the step: fraction of the channels that is gone after it}"""
        return {place: PACES[self.pace](self.ratio, share) for place, share in self.shares.items()}

    @cached_property
    def shares(self) -> dict[int, float]:
        """{epochs, or batches, before the step: share of the steps that are done with it}"""
        every = self.every_n_epochs if self.every_n_batches is None else self.every_n_batches
        return {self.after + i * every: (i + 1) / self.steps for i in range(self.steps)}

    @cached_property
    def own(self) -> dict[str, float]:
        """`layers`; YAML reads a name such as 0 as a number."""
        return {str(name): ratio for name, ratio in (self.layers or {}).items()}

    def of_layers(self, place: int) -> dict[str, float]:
        """{beginning of a name: its own ratio after the step at this place}"""
        return {name: PACES[self.pace](ratio, self.shares[place]) for name, ratio in self.own.items()}

    def check(self, length: int) -> None:
        """UserError where the last step comes when training is over. length: epochs, or batches, of training"""
        if length <= (last := max(self.ratios)):
            raise UserError(
                f"shrink: the last of {self.steps} steps comes after {last} {self.unit}, and training has {length}; "
                f"train for more epochs, or lower steps, after or every_n_{self.unit}"
            )
