"""Sharpness-aware minimization (SAM, arXiv:2010.01412; adaptive: ASAM, arXiv:2102.11600), two passes a batch.

Both passes happen inside a training step, and the optimizer does not know of them:

    loss = objective(batch)
    ascent.climb_(loss, net.parameters())  # weights w -> w + e, where e = rho T^2 g / |T g|, g = dloss/dw, T = 1 or |w|
    return objective(batch)     # whoever trains calls backward: the gradient at w + e
    ...
    ascent.restore_()           # after backward, before the optimizer's step

so every optimizer, schedule, clipping, gradient scaler, accumulation and checkpoint works as it does without SAM. The
alternative, an optimizer that calls a closure twice (`sam.SAM` itself), has no state to save, moves BatchNorm
statistics twice and cannot work with fp16's gradient scaler or with accumulation.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from sam.utils import compute_sam
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pipeline.tables import UserError


class Ascent:
    """Moves the weights to where, within `rho` of them, the loss is highest to first order, and back.

    rho: radius of the neighbourhood, in the norm of all weights together, > 0
    adaptive: measure each step in units of its weight's size (ASAM; wants a rho about ten times larger)
    """

    def __init__(self, rho: float, adaptive: bool = False) -> None:
        if not rho > 0:
            raise UserError(f"sam.rho {rho} must be positive, or 0 for none")
        self.rho, self.adaptive = rho, adaptive
        self._home: list[tuple[Tensor, Tensor]] = []  # weights that climb_ moved, with their old values

    def climb_(self, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        """Move the weights to where the loss, to first order, is highest. Leaves every `.grad` alone.

        parameters: the weights; those that need no gradient stay.


        Under data parallelism each process climbs by its own part of the batch (the m-sharpness of the paper), since
        no gradient is exchanged here.
        """
        assert not self._home, "restore_ comes first"
        weights = [p for p in parameters if p.requires_grad]
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        grads = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
        with torch.no_grad():
            sizes = torch._foreach_abs(weights) if self.adaptive else None
            steps = perturbation(grads if sizes is None else torch._foreach_mul(grads, sizes), self.rho)
            # The old weights are kept, because w + e - e is not w in floating point, and processes would drift apart.
            self._home = [(w, w.clone()) for w in weights]
            torch._foreach_add_(weights, steps if sizes is None else torch._foreach_mul(steps, sizes))
        # Autocast keeps half-precision copies of the weights: with stale ones the second pass would be at w again.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the weights back, bit for bit. Does nothing when they have not moved."""
        if self._home:
            weights, home = zip(*self._home, strict=True)
            torch._foreach_copy_(weights, home)
            self._home = []


def perturbation(grads: Iterable[Tensor], rho: float) -> list[Tensor]:
    """rho g / |g| over all tensors together; zeros where the gradient vanishes or is not finite.

    sam-pytorch takes this step itself, from zero, and calls back at the highest point, which is the result.
    """
    points = [torch.zeros_like(grad) for grad in grads]
    for point, grad in zip(points, grads, strict=True):
        point.grad = grad
    highest: list[Tensor] = []
    compute_sam({"params": points, "rho": rho}, lambda: highest.extend(point.nan_to_num(0, 0, 0) for point in points))
    return highest


@contextmanager
def frozen_statistics(net: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm normalises by the batch as in training, without moving its running statistics."""
    norms = [m for m in net.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
