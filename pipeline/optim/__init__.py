"""OPTIMIZERS and SCHEDULES by name. Options are those of the class or function in the row; unknown ones are refused."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from pipeline.tables import UserError, call, pick

# By name: a function of a network that gives the parameters, or groups of them, for an optimizer with weight decay.
DECAYS: dict[str, Callable[[nn.Module], list[Any]]] = {
    "all": lambda net: list(net.parameters()),
    "matrices": lambda net: matrices_alone(net),
}


def decayed(net: nn.Module, decay: str = "all") -> list[Any]:
    """The network's parameters for `build_optimizer`. decay: a row of DECAYS, which says what weight decay is for"""
    return pick("decay", DECAYS, decay)(net)


def matrices_alone(net: nn.Module) -> list[dict[str, Any]]:
    """Two groups: weights of layers, and without weight decay norms, biases and embeddings.

    Weight decay holds back the size of a layer's output, which a norm's scale sets anew and an embedding's rows, each
    with a gradient in few steps, only lose. A last layer that is tied to an embedding is one.
    """
    embeddings = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in net.parameters():
        parts[parameter.dim() > 1 and id(parameter) not in embeddings].append(parameter)
    groups = [{"params": parts[True]}, {"params": parts[False], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


# Every optimizer of timm can be had by its name, too: see timm_optimizers.
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


def build_optimizer(parameters: Iterable[Any], name: str, lr: float, **options: Any) -> Optimizer:
    """The optimizer called `name` at learning rate `lr`: a row of OPTIMIZERS, else timm's of that name.

    parameters: they, or groups of them (see `decayed`)
    """
    # timm takes a second or more to import, so it is imported only for a name that is not in OPTIMIZERS.
    table = OPTIMIZERS if name in OPTIMIZERS else timm_optimizers() | OPTIMIZERS
    return call(f"optimizer {name!r}", pick("optimizer", table, name), parameters, lr=lr, **options)


def timm_optimizers() -> dict[str, Callable[..., Optimizer]]:
    """timm's optimizers that work by `step()` alone (lion, lamb, muon, adopt, ...), with the defaults timm gives them.

    These are the classes themselves, because timm's factory silently drops options that an optimizer does not have.
    Left out: those of apex and bitsandbytes (packages of their own, CUDA), adahessian (wants a backward pass that keeps
    its graph) and kron (wants opt_einsum and a compiler, and its random state does not resume).
    """
    from timm import optim

    infos = {name: optim.get_optimizer_info(name) for name in optim.list_optimizers()}
    return {
        name: partial(info.opt_class, **({"momentum": 0.9} if info.has_momentum else {}), **(info.defaults or {}))
        for name, info in infos.items()
        if isinstance(info.opt_class, type) and not info.second_order and info.opt_class is not infos["kron"].opt_class
    }


# The learning rate before optimizer step `step` of `steps`, 0 <= step <= steps, as a fraction of the optimizer's own.
# All schedules are such closed forms behind one LambdaLR: groups keep the ratio of their learning rates, a resumed run
# goes on bit for bit, and a step past the last is harmless. torch's own schedules lack some of this: past the last step
# OneCycleLR raises and CosineAnnealingLR rises again, which also rounds from step to step, and ends all groups at one
# absolute value.
Factor = Callable[[int, int], float]


def constant() -> Factor:
    return lambda step, steps: 1.0


def cosine(end: float = 0.0, warmup: float = 0.0, warmup_steps: int = 0) -> Factor:
    """Half a cosine down to the fraction `end` (arXiv:1608.03983, without restarts).

    warmup: fraction of the steps over which the learning rate first rises in a line (arXiv:1706.02677)
    warmup_steps: the same as a number of steps; a training that has fewer rises to its end
    """
    check_fraction("end", end)
    check_fraction("warmup", warmup, below=True)
    if not (warmup_steps >= 0 and warmup_steps % 1 == 0):
        raise UserError(f"warmup_steps {warmup_steps} must be a whole number of at least 0")
    if warmup and warmup_steps:
        raise UserError(f"warmup {warmup} and warmup_steps {warmup_steps} say the same twice; choose one")

    def factor(step: int, steps: int) -> float:
        rise = warmup_steps or warmup * steps
        if step < rise:
            return min((step + 1) / rise, 1.0)  # no step is spent at 0
        return half_cosine(1.0, end, (step - rise) / (steps - rise or 1))

    return factor


def one_cycle(warmup: float = 0.3) -> Factor:
    """From 1/25 up over the first `warmup` fraction of the steps, then down to 1/250,000 (arXiv:1708.07120).

    The values are those of torch's OneCycleLR; the momentum stays as configured.
    """
    check_fraction("warmup", warmup, below=True)
    start, end = 1 / 25, 1 / 250_000

    def factor(step: int, steps: int) -> float:
        peak, last = warmup * steps - 1, steps - 1
        if step < peak:
            return half_cosine(start, 1.0, step / peak)
        return half_cosine(1.0, end, min((step - max(peak, 0.0)) / max(last - peak, 1.0), 1.0))

    return factor


def cyclic(up: float = 0.4, low: float = 0.0, cycles: int = 1) -> Factor:
    """Triangles (arXiv:1506.01186): in a line up from `low` over the first `up` fraction of a cycle, then down again.

    One cycle with the peak at 0.4 is how "A modern look at the relationship between sharpness and generalization"
    (arXiv:2302.07011) trained its networks. As there, a step takes the value at its end, so only the last is at `low`.
    """
    check_fraction("up", up)
    check_fraction("low", low)
    if not (cycles >= 1 and cycles % 1 == 0):
        raise UserError(f"cycles {cycles} must be a whole number of at least 1")

    def factor(step: int, steps: int) -> float:
        ends = min(step + 1, steps) * int(cycles)
        phase = ((ends - 1) % steps + 1) / steps  # 0 < phase <= 1
        height = phase / up if phase <= up else (1 - phase) / (1 - up)
        return low + (1 - low) * height

    return factor


def half_cosine(start: float, end: float, share: float) -> float:
    """From `start` to `end` as `share` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def check_fraction(name: str, value: float, below: bool = False) -> None:
    if not 0 <= value <= 1 or (below and value == 1):
        raise UserError(f"{name} {value} must be in 0 <= f {'<' if below else '<='} 1")


SCHEDULES: dict[str, Callable[..., Factor]] = {
    "constant": constant,
    "cosine": cosine,
    "cyclic": cyclic,
    "one_cycle": one_cycle,
    "warmup_cosine": partial(cosine, warmup=0.05),
}


def build_schedule(
    optimizer: Optimizer, steps: int, schedule: Mapping[str, Any], restarts: Iterable[float] = ()
) -> LRScheduler:
    """The schedule {"name": ..., its options} over `steps` optimizer steps; step it after each of them.

    restarts: fractions of the steps at which the schedule starts anew, each time over the steps up to the next restart
        (learning rate rewinding, arXiv:2003.02389)
    """
    name = schedule["name"]
    options = {key: value for key, value in schedule.items() if key != "name"}
    factor = call(f"schedule {name!r}", pick("schedule", SCHEDULES, name), **options)
    starts = sorted({0, *(round(f * steps) for f in restarts), steps})

    def of_part(step: int) -> float:
        step = min(step, steps)
        start, end = next((a, b) for a, b in pairwise(starts) if step < b or b == steps)
        return factor(step - start, end - start)

    return LambdaLR(optimizer, of_part)
