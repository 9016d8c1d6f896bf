"""Functional perturbation: how far a compressed pair of layers answers from its original, and what bounds that.

A pair is f(x) = V s(A x̂): the writer's weight and the norm behind it as one affine map A (C, F + 1) of patches x̂, which
end in a 1; an activation s with |s(a) - s(b)| <= |a - b| and s(0) = 0, such as ReLU; the reader V. Folding replaces the
rows of A by those Ã of their clusters, dropped ones by 0, while readers add up the columns of a cluster, so that the
smaller pair computes V s(Ã x̂). With Δ = A - Ã

    ‖f(x) - f̃(x)‖ <= ‖V‖ ‖Δ x̂‖ <= ‖V‖ ‖Δ‖₂ ‖x̂‖ <= ‖V‖ ‖Δ‖_F ‖x̂‖

where ‖V‖ is the operator norm and ‖x̂‖ the norm of all patches together. In the last form the parameter error ‖Δ‖_F
bounds the functional perturbation, as in "Cut Less, Fold More", section 3. Each step to the right gives up knowledge:
of the activation, of the directions that pictures take, of the singular values of Δ.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn

from pipeline.compression.merge.projection import Projection


@dataclass(frozen=True)
class Perturbation:
    """Means over pictures, each relative to the norm of f(x): the change that was measured, then the three bounds."""

    measured: float
    seen: float
    spectral: float
    frobenius: float


def affine(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """(C, F + 1): the convolution and the norm behind it, in eval mode, as one affine map of patches that end in 1."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * gain
    if conv.bias is not None:
        shift = shift + gain * conv.bias
    return torch.cat([conv.weight.flatten(1) * gain[:, None], shift[:, None]], 1).detach().double()


def spread(rows: Tensor, projection: Projection) -> Tensor:
    """(C, F) of the smaller network's rows (k, F): each channel gets its cluster's row, a dropped one gets 0."""
    at = projection.labels.to(rows.device)
    return torch.where((at >= 0)[:, None], rows[at.clamp(min=0)], 0)


def patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """(N, F + 1, places) of pictures x (N, channels, H, W): what the convolution sees at each place, and a 1.

    Raises ValueError for a convolution in groups or one that is dilated.
    """
    if conv.groups != 1 or conv.dilation != (1, 1):
        raise ValueError("patches are those of a convolution without groups and dilation")
    assert not isinstance(conv.padding, str)
    seen = F.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride)
    return torch.cat([seen, torch.ones_like(seen[:, :1])], 1)


@torch.no_grad()
def pair_perturbation(rows: Tensor, smaller: Tensor, conv: nn.Conv2d, reader: nn.Conv2d, x: Tensor) -> Perturbation:
    """The perturbation of relu and reader behind `conv`, whose affine rows become those of `smaller`.

    rows, smaller: (C, F + 1) float64, A and Ã; x: (N, channels, H, W), inputs of the convolution.
    """
    seen, delta = patches(x.double(), conv), rows - smaller
    height, width = conv(x[:1]).shape[2:]
    weight = reader.weight.double()

    def answer(a: Tensor) -> Tensor:
        hidden = F.relu(a @ seen).unflatten(2, (height, width))
        return F.conv2d(hidden, weight, None, reader.stride, reader.padding)

    whole = answer(rows)
    size, moved = (t.flatten(1).norm(dim=1) for t in (whole, whole - answer(smaller)))
    read = operator_norm(
        lambda hidden: F.conv2d(hidden, weight, None, reader.stride, reader.padding), (1, len(rows), height, width)
    )
    of_pictures = seen.flatten(1).norm(dim=1)
    spectral, frobenius = torch.linalg.matrix_norm(delta, 2), torch.linalg.matrix_norm(delta)
    bounds = read * (delta @ seen).flatten(1).norm(dim=1), read * spectral * of_pictures, read * frobenius * of_pictures
    return Perturbation(*(float((value / size).mean()) for value in (moved, *bounds)))


def operator_norm(linear: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    """Largest singular value of a linear map of float64 tensors of this shape (scipy's Lanczos iteration)."""
    start = torch.zeros(shape, dtype=torch.float64)
    with torch.enable_grad():
        answer, backward = torch.func.vjp(linear, start)[:2]
    operator = LinearOperator(
        (answer.numel(), start.numel()),
        matvec=lambda v: linear(torch.from_numpy(v).reshape(shape)).detach().flatten().numpy(),
        rmatvec=lambda v: backward(torch.from_numpy(v).reshape(answer.shape))[0].detach().flatten().numpy(),
        dtype=np.float64,
    )
    first = np.random.default_rng(0).standard_normal(min(operator.shape))
    return float(svds(operator, 1, v0=first, return_singular_vectors=False)[0])
