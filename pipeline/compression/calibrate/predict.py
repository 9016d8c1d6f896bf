"""Fidelity: how far a smaller network's outputs agree with the dense one's, to predict accuracy without labels.

Both networks run on synthetic pictures (see synthetic.py), so no data is needed. The method "auto" takes for every
ratio the method of the highest fidelity, and rows hold it in the column `fidelity`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compression.calibrate.outputs import Answers, Outputs, every_output, float_leaves
from pipeline.example import Example
from pipeline.tables import UserError

PICTURES = 128  # synthetic ones: enough to tell methods apart, where to solve readers takes more


def judge(
    model: nn.Module, pictures: Example | Iterable[Example], answers: Answers | None = None
) -> Callable[[nn.Module], float]:
    """A function from smaller networks to their `fidelity` to the model on these pictures.

    pictures, answers: as for outputs.Outputs; without answers the network must put out (N, classes).
    Raises UserError for another output.
    """
    whole = Outputs(model, pictures, answers or classes)
    return lambda smaller: fidelity(whole.beside(smaller))


def classes(output: Any) -> Tensor:
    """(N, classes) of a network that puts out nothing else. Raises UserError for outputs of more dimensions."""
    for leaf in float_leaves(output):
        if leaf.dim() > 2:
            raise UserError(
                f"fidelity compares classes, and the network puts out {tuple(leaf.shape)}: say answers=: which part of "
                "the output are the (rows, classes) to compare"
            )
    return every_output(output)


@torch.no_grad()
def fidelity(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """How far two networks agree, 0 ... 1: top-1 agreement times correlation.

    batches: (given, wanted), each (rows, classes), outputs of the one and of the other network.

    Agreement is the fraction of rows on which both are largest at the same class (arXiv:2106.05945). On few rows it
    takes few values, and a network with one constant answer may agree by chance. The correlation of the outputs, each
    less its mean over the rows, and 0 where it is negative, tells such cases apart.
    """
    agreed = rows = 0
    mean = products = torch.zeros(())
    for pair in batches:
        given, wanted = (t.double() for t in pair)
        agreed += int((given.argmax(1) == wanted.argmax(1)).sum())
        both = torch.stack([given, wanted])  # (2, rows, classes)
        # Means and centred products become those of all batches so far and this one together.
        off = both.mean(1) - mean
        left = (both - both.mean(1, keepdim=True)).flatten(1)
        weight, rows = rows * len(given) / (rows + len(given)), rows + len(given)
        products = products + left @ left.T + weight * (off @ off.T)
        mean = mean + off * (len(given) / rows)
    scale = (products[0, 0] * products[1, 1]).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return agreed / rows * float((products[0, 1] / scale).clamp(0, 1))
