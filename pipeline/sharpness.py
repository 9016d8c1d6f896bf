"""Sharpness: how fast the loss of a network rises when its weights move, on labelled training samples.

    sharpness_sam   L(w + rho g / ‖g‖) - L(w), g = dL/dw: one step of SAM (Foret et al. 2021, arXiv:2010.01412, eq. 2)
    sharpness_l2,   max of L(w + d) - L(w) over ‖d / |w|‖_p <= rho_p, p = 2 and infinity: adaptive worst-case sharpness
    sharpness_linf  (Andriushchenko et al. 2023, arXiv:2302.07011, section 3), found by Auto-PGD in weights (Croce and
                    Hein 2020, arXiv:2003.01690, algorithm 1), so a lower bound of the maximum
    hessian_top     the largest eigenvalue of the Hessian of L over all weights (curvlinops, scipy's Lanczos iteration)

L is the mean loss of a batch. The first three are means over batches of what one batch shows (the m-sharpness of these
papers, m samples a batch), the last is of the mean loss. The network is in evaluation mode, so BatchNorm normalises by
its running statistics; no random number is drawn, and the network itself is never touched.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pipeline.backward import sound_backward
from pipeline.compression.copies import bare_copy
from pipeline.evaluate import outputs
from pipeline.optim.sam import Ascent
from pipeline.tables import UserError, call, optional
from pipeline.tasks.task import Batch, Task

COLUMNS = ("sharpness_sam", "sharpness_l2", "sharpness_linf", "hessian_top")
MOMENTUM, PROGRESS = 0.75, 0.75  # alpha and rho of algorithm 1
Vector = Tensor  # (weights,) all weights of a network side by side


@dataclass(frozen=True)
class Sharpness:
    """What is measured. A radius of None leaves its column out.

    rho: of sharpness_sam, in units of the weights; rho_l2, rho_linf: of the adaptive ones, relative to each weight
    batches: how many batches of training samples are looked at; steps: of Auto-PGD
    hessian: whether the largest eigenvalue is computed (needs curvlinops-for-pytorch)
    normalise: divide logits by their norm about their mean, so that the scale of logits cannot make a network look
        sharp or flat (arXiv:2302.07011, section 3); False: the task's own loss
    """

    rho: float | None = 0.05
    rho_l2: float | None = 0.5
    rho_linf: float | None = 0.002
    batches: int = 1
    steps: int = 20
    hessian: bool = True
    normalise: bool = False

    def __post_init__(self) -> None:
        for name in ("rho", "rho_l2", "rho_linf"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise UserError(f"sharpness.{name} {value} must be above 0, or null to leave it out")
        for name in ("batches", "steps"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise UserError(f"sharpness.{name} {value} must be a whole number of at least 1")


def asked_for(options: Mapping[str, Any] | Sharpness | bool | None) -> Sharpness | None:
    """What is measured, from options by name; True: the defaults; None or False: nothing."""
    if options is None or options is False or isinstance(options, Sharpness):
        return options or None
    if options is True:
        return Sharpness()
    if not isinstance(options, Mapping) or not options:
        raise UserError(f"sharpness must be true, null or options, such as {{rho: 0.05, batches: 1}}, got {options!r}")
    return call("sharpness", Sharpness, **options)


def sharpness(model: nn.Module, task: Task, batches: Sequence[Batch], asked: Sharpness) -> dict[str, float]:
    """The columns that are asked for.

    batches: labelled training samples on the model's device. Raises UserError where there is none, for weights of half
    precision, in which small differences of losses are noise, and for logits that cannot be normalised.
    """
    seen = list(islice(batches, asked.batches))
    if not seen:
        raise UserError("sharpness is measured on training samples, and there are none; give repair_data=")
    # A copy, whose weights may move, in the memory format that torch flattens. The fused kernels of attention have no
    # second derivatives.
    net = bare_copy(model).eval().requires_grad_(True).to(memory_format=torch.contiguous_format)
    check_precision(net)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        losses = [loss_on(net, task, batch, asked.normalise) for batch in seen]
        found = {}
        if asked.rho is not None:
            found["sharpness_sam"] = mean([ascended(net, loss, asked.rho) for loss in losses])
        for column, rho, ball in (("sharpness_l2", asked.rho_l2, L2), ("sharpness_linf", asked.rho_linf, LINF)):
            if rho is not None:
                found[column] = mean([worst_case(net, loss, rho, ball, asked.steps) for loss in losses])
        if asked.hessian:
            with warnings.catch_warnings():
                # Forward differentiation, where torch first loads it, warns of torch's own torch.jit.script.
                warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
                # curvlinops takes products for many vectors at once, which some kernels do one by one.
                warnings.filterwarnings("ignore", ".*There is a performance drop.*", UserWarning)
                found["hessian_top"] = hessian_top(net, losses)
    return found


def check_precision(net: nn.Module) -> None:
    """Raise UserError for weights of half precision."""
    for name, weight in net.named_parameters():
        if weight.dtype in (torch.float16, torch.bfloat16):
            raise UserError(f"sharpness needs weights of single precision, and {name} is {weight.dtype}; convert it")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def loss_on(net: nn.Module, task: Task, batch: Batch, normalise: bool = False) -> Callable[[], Tensor]:
    """The mean loss of the network on a batch, () as a function of the weights that it has when it is called."""

    def loss() -> Tensor:
        output = outputs(net, task, batch)
        return task.loss(normalised(output) if normalise else output, batch)

    return loss


def normalised(output: Any) -> Tensor:
    """Logits (N, classes, ...) less their mean, divided by the norm of what is left, for each sample and place."""
    if not isinstance(output, Tensor) or output.dim() < 2:
        raise UserError(
            f"sharpness.normalise wants logits as a tensor, and the network gives a {type(output).__name__}"
        )
    centred = output - output.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-10)


def ascended(net: nn.Module, loss: Callable[[], Tensor], rho: float) -> float:
    """The rise of the loss by one step of length rho along its gradient."""
    ascent, before = Ascent(rho), loss()
    ascent.climb_(before, net.parameters())
    try:
        with torch.no_grad():
            return float(loss().double() - before.detach().double())
    finally:
        ascent.restore_()


@dataclass(frozen=True)
class Ball:
    """A ball of radius rho around 0. onto: the nearest point in it; steepest: the step of length 1 along a gradient."""

    onto: Callable[[Vector, float], Vector]
    steepest: Callable[[Vector], Vector]


L2 = Ball(
    lambda u, rho: u * (rho / u.norm().clamp(min=rho)),
    lambda g: g / g.norm().clamp(min=torch.finfo(g.dtype).tiny),
)
LINF = Ball(lambda u, rho: u.clamp(-rho, rho), torch.sign)


def worst_case(net: nn.Module, loss: Callable[[], Tensor], rho: float, ball: Ball, steps: int) -> float:
    """The largest rise of the loss found within the ball, in units u = d / |w| of each weight; d = 0 counts.

    Auto-PGD from u = 0: steps of 2 rho with momentum, halved at checkpoints where too few of them raised the loss or
    the best value stands, from the best point so far.
    """
    home = parameters_to_vector(net.parameters()).detach().clone()
    size = home.abs()

    def at(u: Vector) -> tuple[float, Vector]:
        """The loss at u, and its gradient with respect to u."""
        with torch.no_grad():
            vector_to_parameters(home + size * u, net.parameters())
        value = loss()
        with sound_backward(net):
            grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True, materialize_grads=True)
        return float(value.detach().double()), size * torch.cat([grad.reshape(-1) for grad in grads]).nan_to_num(
            0, 0, 0
        )

    try:
        return climbed(at, torch.zeros_like(home), rho, ball, steps)
    finally:
        with torch.no_grad():
            vector_to_parameters(home, net.parameters())


def climbed(at: Callable[[Vector], tuple[float, Vector]], start: Vector, rho: float, ball: Ball, steps: int) -> float:
    """By how much Auto-PGD raises a function above its value at `start`, within the ball (2003.01690, algorithm 1)."""
    first, slope = at(start)
    u, before, value = start, start, first
    best, best_u, best_slope = first, start, slope
    step, raised, halved, best_then = 2 * rho, 0, True, first
    looks = set(checkpoints(steps))
    last = 0
    for i in range(1, steps + 1):
        moved = ball.onto(u + step * ball.steepest(slope), rho)
        if i > 1:
            moved = ball.onto(u + MOMENTUM * (moved - u) + (1 - MOMENTUM) * (u - before), rho)
        u, before, old = moved, u, value
        value, slope = at(u)
        raised += value > old
        if value > best:
            best, best_u, best_slope = value, u, slope
        if i in looks:
            stuck = raised < PROGRESS * (i - last) or (not halved and best == best_then)
            halved, best_then, raised, last = stuck, best, 0, i
            if stuck:
                step, u, before, value, slope = step / 2, best_u, best_u, best, best_slope
    return best - first


def checkpoints(steps: int) -> Iterator[int]:
    """The iterations at which Auto-PGD looks back: p_0 = 0, p_1 = .22, p_j+1 = p_j + max(p_j - p_j-1 - .03, .06)."""
    before, place = 0.0, 0.22
    while place <= 1:
        yield -int(-place * steps // 1)
        before, place = place, place + max(place - before - 0.03, 0.06)


def hessian_top(net: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> float:
    """The largest eigenvalue of the Hessian of the mean of the losses, over all weights of the network."""
    from scipy.sparse.linalg import eigsh

    curvlinops = optional("sharpness.hessian", "curvlinops", "sharpness")
    # The operator asks for (inputs, labels): here these name a loss, so that it serves every task.
    data = [({"index": torch.tensor([i])}, torch.zeros(1)) for i in range(len(losses))]
    operator = curvlinops.HessianLinearOperator(
        Losses(net, losses),
        Sum(),
        [weight for weight in net.parameters() if weight.requires_grad],
        data,
        check_deterministic=False,
        num_data=len(losses),
        batch_size_fn=lambda inputs: 1,
    )
    size = operator.shape[0]
    start = torch.randn(size, generator=torch.Generator().manual_seed(0)).numpy()
    with sound_backward(net):
        top = eigsh(operator.to_scipy(), k=1, which="LA", v0=start, tol=1e-3, return_eigenvectors=False)
    return float(top[0]) / len(losses)


class Losses(nn.Module):
    """Calls one of several losses of a network by its index, (1,) int64."""

    def __init__(self, net: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> None:
        super().__init__()
        self.net, self.losses = net, losses

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.losses[int(inputs["index"])]()


class Sum(nn.Module):
    """The loss itself: what `Losses` gives. Losses of all batches are added up."""

    reduction = "sum"

    def forward(self, loss: Tensor, labels: Tensor) -> Tensor:
        return loss
