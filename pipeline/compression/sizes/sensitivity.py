"""How much the loss rises where one group alone is made smaller, to second order, without a forward pass for each size.

A reader W that gave W x and now gives W' x' changes the loss by ½ E[(gᵀ(W x - W' x'))²], where g is the gradient of the
loss by the reader's output under labels that the network itself draws: the Gauss-Newton approximation, in which the
gradient itself has no part because its mean is 0. With g and x taken as independent, as in K-FAC (Martens and Grosse
2015, arXiv:1503.05671), this is ½ tr(F Δ) of two small matrices, F = E[g gᵀ] and the second moments Δ of the error that
solving W' by least squares leaves. An error near the whole contribution of a layer costs more than its second order
says, so it is divided by the square of the part that is kept. Layers differ by a factor of twenty and more in what a
lost channel costs, as only F says.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from pipeline.compression.calibrate.batches import Batches
from pipeline.compression.calibrate.compensate import matrix, readers
from pipeline.compression.calibrate.outputs import Answers
from pipeline.compression.choose.gradients import drawn_loss, singles
from pipeline.compression.copies import bare_copy
from pipeline.compression.group import ChannelGroup
from pipeline.compression.merge.projection import Projection
from pipeline.compression.merge.tensors import merged_inputs
from pipeline.example import call_arguments
from pipeline.tables import UserError

ROWS, SAMPLES = 4096, 256  # whose gradients are looked at, at most; each sample has a backward pass of its own
LEAST = 1e-3  # part of a layer's contribution that counts as kept, at least
RIDGE = 1e-2  # on each channel's own second moment, as where readers are solved


def output_slopes(
    model: nn.Module, groups: Iterable[ChannelGroup], batches: Batches, seed: int = 0, answers: Answers | None = None
) -> dict[str, Tensor]:
    """{weight: F (outputs, outputs)} of the readers of these groups, the mean over the rows of the first samples.

    Raises UserError where a reader is no linear layer, for F is of its outputs and not of their pixels.
    """
    net = bare_copy(model, share=True).eval()
    layers = readers(net, groups)
    odd = [name for name, layer in layers.items() if isinstance(layer, nn.modules.conv._ConvNd)]
    if odd:
        raise UserError(f"spare=loss is for linear layers, and {odd[0]} is of a convolution: choose spare=output")
    total: dict[str, Tensor] = {}
    rows = dict.fromkeys(layers, 0)
    given: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        # Behind frozen weights the first output begins the graph.
        given[name] = output if output.requires_grad else output.requires_grad_()

    handles = [layer.register_forward_hook(partial(keep, name)) for name, layer in layers.items()]
    generator = torch.Generator().manual_seed(seed)
    try:
        for single in islice(singles(batches), SAMPLES):
            if max(rows.values()) >= ROWS:
                break
            given.clear()
            args, kwargs = call_arguments(single)
            with torch.enable_grad():
                slopes = torch.autograd.grad(drawn_loss(net(*args, **kwargs), answers, generator), list(given.values()))
            for name, slope in zip(given, slopes, strict=True):
                g = slope.reshape(-1, slope.shape[-1]).float()
                total[name] = total.get(name, 0) + g.T @ g
                rows[name] += len(g)
    finally:
        for handle in handles:
            handle.remove()
    return {name: t / rows[name] for name, t in total.items()}


def loss_errors(
    groups: Sequence[ChannelGroup],
    tensors: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    slopes: Mapping[str, Tensor],
    projections: Mapping[int, Sequence[Projection]],
) -> dict[int, float]:
    """{size: rise of the loss of one sample} where these groups, and no others, are that small.

    moments: {weight: (inputs, inputs)} Σ x xᵀ of a sample; slopes: `output_slopes`; projections: {size: one for each
    group}.
    """
    found = dict.fromkeys(projections, 0.0)
    names = dict.fromkeys(axis.tensor for group in groups for axis in group.reads if axis.tensor in slopes)
    if not names:
        raise UserError(f"spare=loss sees nothing of {groups[0].name}, which only queries read: choose spare=output")
    for name in names:
        dim = next(axis.axis for group in groups for axis in group.reads if axis.tensor == name)
        weight, seen, slope = (t.double().cpu() for t in (tensors[name], moments[name], slopes[name]))
        w = matrix(weight, dim, taps=False)  # (inputs, outputs)
        whole = w @ slope
        all_of_it = max(float((whole * (seen @ w)).sum()), torch.finfo(torch.float64).tiny)
        for size, chosen in projections.items():
            if all(projection.is_identity for projection in chosen):
                continue
            half = merged_inputs(seen, name, groups, chosen)  # (inputs, left)
            left, wanted = merged_inputs(half.T, name, groups, chosen), half.T @ w
            ridge = RIDGE * left.diagonal().clamp(min=1e-6 * left.diagonal().mean())
            solved = torch.linalg.solve(left + ridge.diag(), wanted)  # (left, outputs)
            kept = float(((2 * wanted - left @ solved) * (solved @ slope)).sum())
            found[size] += max(all_of_it - kept, 0.0) / 2 / max(kept / all_of_it, LEAST) ** 2
    return found
