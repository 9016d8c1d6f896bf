"""What a smaller network is worth, foretold without data and without labels: how far it answers as the whole one does.

Both look at synthetic pictures (see synthetic.py). That is the method "auto", which takes for every ratio the method
whose network answers most alike, and the column `fidelity` of rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.compression.allocate import outputs
from pipeline.compression.graph import Example


def judge(model: nn.Module, pictures: Example) -> Callable[[nn.Module], float]:
    """A function from smaller networks to their `fidelity` to the model on these pictures."""
    with torch.no_grad():
        whole = outputs(model, pictures)

    @torch.no_grad()
    def judged(smaller: nn.Module) -> float:
        return fidelity(outputs(smaller, pictures), whole)

    return judged


def fidelity(given: Tensor, wanted: Tensor) -> float:
    """How alike two networks answer, 0 ... 1, from their outputs (N, classes): top-1 agreement times correlation.

    Agreement is the fraction of inputs on which both are largest at the same class (arXiv:2106.05945). Few inputs give
    it few values, and a network that always says the same may agree by chance; the correlation of the outputs, each
    less its mean over the inputs, and 0 where it is negative, tells these apart.
    """
    agreement = (given.argmax(1) == wanted.argmax(1)).double().mean()
    a, b = ((t - t.mean(0)).double().flatten() for t in (given, wanted))
    correlation = (a @ b) / (a.norm() * b.norm()).clamp(min=torch.finfo(torch.float64).tiny)
    return float(agreement * correlation.clamp(0, 1))
