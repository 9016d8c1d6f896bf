"""MASKS: single weights set to zero, by magnitude or N:M, through torch.nn.utils.prune.

    mask(layers, ratio, seed, **options)

adds a mask of prune to every one of `layers`. Shapes stay as they are: nothing is traced, no channel groups are needed,
and ordinary hardware is no faster for it. `ratio` is the fraction of the *weights* of linear layers and convolutions
that goes, where METHODS count channels. Biases, norms and embeddings are left alone, and so is a weight that an
embedding holds too. Adding a mask is one function here and one row in MASKS.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from pipeline.compression.choose.layers import LayerWeight, layer_weights, own_ratios
from pipeline.compression.merge.modules import named_tensors
from pipeline.tables import UserError, call, pick


class Layer(nn.Module):
    """A stand-in for one layer, which holds its weight and takes its mask.

    The layer itself is not used, as prune takes no weights in channels-last and would untie a tied weight.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, kind: LayerWeight) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self.kind = kind


Mask = Callable[..., None]


def magnitude(layers: Sequence[Layer], ratio: float, seed: int) -> None:
    """Zero the weights of least |w| in the whole network (Han et al. 2015, arXiv:1506.02626)."""
    _globally(layers, ratio, [layer.weight for layer in layers])


def layer_magnitude(layers: Sequence[Layer], ratio: float, seed: int) -> None:
    """Zero the weights of least |w| of every layer, in each the same fraction."""
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount=ratio)


def lamp(layers: Sequence[Layer], ratio: float, seed: int) -> None:
    """Layer-adaptive magnitude (Lee et al. 2021, arXiv:2010.07611): w² over the sum of all w'² >= w² of its layer.

    The largest weight of every layer has the score 1, the others at most 1/2, so every layer keeps one.
    """
    _globally(layers, ratio, [_lamp_scores(layer.weight) for layer in layers])


def _lamp_scores(weight: Tensor) -> Tensor:
    squares, order = weight.double().square().flatten().sort(stable=True)
    from_here_on = squares.flip(0).cumsum(0).flip(0)
    scores = squares / from_here_on.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.empty_like(scores).index_copy_(0, order, scores).view_as(weight)


def random_mask(layers: Sequence[Layer], ratio: float, seed: int) -> None:
    """Zero weights drawn by `seed`, in the whole network."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device) for layer in layers]
    _globally(layers, ratio, scores)


def _globally(layers: Sequence[Layer], ratio: float, scores: Sequence[Tensor]) -> None:
    """Zero the weights of the least |score| in the whole network."""
    named = [(layer, "weight") for layer in layers]
    by_name = dict(zip(named, scores, strict=True))
    prune.global_unstructured(named, prune.L1Unstructured, importance_scores=by_name, amount=ratio)


def n_of_m(layers: Sequence[Layer], ratio: float, seed: int, *, m: int = 4) -> None:
    """Keep the n of largest |w| of every m consecutive inputs of an output (2:4: Mishra et al. 2021, arXiv:2104.08378).

    n is m (1 - ratio), rounded and at least 1: with m = 4 a ratio of 0.5 is 2:4, 0.3 is 3:4, and 0.1 is 4:4, which
    removes nothing. Inputs of a convolution are its input channels, at each place of its kernel. Fewer than m inputs
    left over at the end also keep n of them, as though zeros followed (as in NVIDIA's ASP); a depthwise convolution
    loses nothing. The report counts the weights that were really removed. Raises UserError for m < 1.
    """
    if m < 1:
        raise UserError(f"m {m} must be at least 1 weight")
    n = max(1, round(m * (1 - ratio)))
    for layer in layers:
        KeepNOfM.apply(layer, "weight", n, m, layer.kind)


class KeepNOfM(prune.BasePruningMethod):
    """Keep the n largest of every m consecutive inputs: a pruning method of torch.nn.utils.prune."""

    PRUNING_TYPE = "global"  # compute_mask sees the whole weight

    def __init__(self, n: int, m: int, kind: LayerWeight) -> None:
        self.n, self.m, self.kind = n, m, kind

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        # A transposed convolution has its inputs in front, group by group: (groups, inputs, outputs, ...).
        groups, dim = (self.kind.groups, 1) if self.kind.inputs == 0 else (1, 2)
        sizes = t.unflatten(0, (groups, -1)).abs().movedim(dim, -1)
        of_m = F.pad(sizes, (0, -sizes.shape[-1] % self.m), value=-1.0).unflatten(-1, (-1, self.m))
        kept = torch.zeros_like(of_m).scatter_(-1, of_m.topk(self.n, -1).indices, 1.0)
        mask = kept.flatten(-2)[..., : sizes.shape[-1]].movedim(-1, dim).flatten(0, 1)
        return default_mask * mask


MASKS: dict[str, Mask] = {
    "magnitude": magnitude,
    "layer_magnitude": layer_magnitude,
    "lamp": lamp,
    "random_mask": random_mask,
    "n_m": n_of_m,
}


@torch.no_grad()
def masks_of(
    model: nn.Module, method: str, ratio: float, seed: int = 0, own: Mapping[str, float] | None = None, **options
) -> dict[str, Tensor]:
    """{weight: bool of its shape, False where it is to be zero}, tied weights under the first of their names.

    own: ratios of some weights alone (see `own_ratios`); weights of one ratio are compared with one another.
    Raises UserError for an unknown mask, an option that the mask does not have, and a network with nothing to mask.
    """
    layers = maskable(model)
    ratios = own_ratios(list(layers), ratio, own or {})
    for of in sorted(set(ratios.values())):
        call(
            f"{method!r}, a mask of single weights,",
            pick("mask", MASKS, method),
            [layer for name, layer in layers.items() if ratios[name] == of],
            float(of),
            seed,
            **options,
        )
    return {name: layer.get_buffer("weight_mask").bool() for name, layer in layers.items()}


def maskable(model: nn.Module) -> dict[str, Layer]:
    """{weight: what masks know of it}, tied weights under the first of their names, without those of embeddings.

    Raises UserError where the network has none.
    """
    tensors = named_tensors(model)
    seen = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    layers = {}
    for name, kind in layer_weights(model).items():
        if id(tensors[name]) not in seen:
            seen.add(id(tensors[name]))
            layers[name] = Layer(tensors[name], kind)
    if not layers:
        raise UserError(f"{type(model).__name__} has no linear layer or convolution of its own weights to mask")
    return layers
