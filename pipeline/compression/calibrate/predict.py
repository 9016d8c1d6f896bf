"""What a smaller network is worth, foretold without data and without labels: how far it answers as the whole one does.

Both look at synthetic pictures (see synthetic.py). That is the method "auto", which takes for every ratio the method
whose network answers most alike, and the column `fidelity` of rows.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compression.calibrate.outputs import Answers, Outputs, every_output, float_leaves
from pipeline.compression.trace.graph import Example
from pipeline.tables import UserError


def judge(
    model: nn.Module, pictures: Example | Iterable[Example], answers: Answers | None = None
) -> Callable[[nn.Module], float]:
    """A function from smaller networks to their `fidelity` to the model on these pictures.

    pictures, answers: as of outputs.Outputs; without answers the network must put out (N, classes).
    """
    whole = Outputs(model, pictures, answers or classes)
    return lambda smaller: fidelity(whole.beside(smaller))


def classes(output: Any) -> Tensor:
    """(N, classes) of a network that puts out nothing else."""
    for leaf in float_leaves(output):
        if leaf.dim() > 2:
            raise UserError(
                f"fidelity compares classes, and the network puts out {tuple(leaf.shape)}: say answers=: which part of "
                "the output are the (rows, classes) to compare"
            )
    return every_output(output)


@torch.no_grad()
def fidelity(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """How alike two networks answer, 0 ... 1: top-1 agreement times correlation.

    batches: (given, wanted), each (rows, classes), what the one and the other put out.

    Agreement is the fraction of rows on which both are largest at the same class (arXiv:2106.05945). Few rows give it
    few values, and a network that always says the same may agree by chance; the correlation of the outputs, each less
    its mean over the rows, and 0 where it is negative, tells these apart.
    """
    agreed = rows = 0
    mean = products = torch.zeros(())
    for pair in batches:
        given, wanted = (t.double() for t in pair)
        agreed += int((given.argmax(1) == wanted.argmax(1)).sum())
        both = torch.stack([given, wanted])  # (2, rows, classes)
        # Means and products of what is left of them are those of all batches so far and of this one together.
        off = both.mean(1) - mean
        left = (both - both.mean(1, keepdim=True)).flatten(1)
        weight, rows = rows * len(given) / (rows + len(given)), rows + len(given)
        products = products + left @ left.T + weight * (off @ off.T)
        mean = mean + off * (len(given) / rows)
    scale = (products[0, 0] * products[1, 1]).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return agreed / rows * float((products[0, 1] / scale).clamp(0, 1))
