"""What the loss of a network says about its weights, on pictures without labels.

Labels are drawn from the network's own softmax, so the mean square of a gradient is the diagonal of the Fisher
information and not of the "empirical" one, which needs true labels (Kunstner et al. 2019, arXiv:1905.12558). One sample
at a time: a square of a sum over samples is another thing, and of all gradients only one network's are in memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.compression.copies import bare_copy
from pipeline.compression.graph import Example, call_arguments
from pipeline.compression.group import ChannelGroup
from pipeline.compression.projection import named_tensors
from pipeline.tables import UserError

SAMPLES = 64  # of the pictures that are looked at, each with a backward pass of its own


@dataclass
class Gradients:
    """Gradients of a network on single pictures, computed when a method first asks for them.

    pictures: one batch of network inputs, of which the first SAMPLES are used; seed: of the labels that are drawn.
    """

    model: nn.Module
    groups: Iterable[ChannelGroup]
    pictures: Example
    seed: int = 0

    @cached_property
    def gates(self) -> dict[tuple[str, int], Tensor]:
        """{(weight, the axis of its inputs): (N, inputs)}, dL/dm of masks m = 1 on what every reader is given.

        With y = W (m x), dL/dm_c = Σ x_c dL/dx_c over all positions, which is also Σ w dL/dw over the weights of input
        c. In this form it holds for readers of every kind, wherever samples and channels stand in what they are given.
        (Of a weight with several uses it is the sum over them.)
        """
        reads = list(dict.fromkeys((axis.tensor, axis.axis) for group in self.groups for axis in group.reads))
        tensors = named_tensors(self.model)
        found: dict[tuple[str, int], list[Tensor]] = {read: [] for read in reads}
        for slopes in sample_gradients(self.model, self.pictures, [name for name, _ in reads], self.seed):
            for name, dim in reads:
                product = (tensors[name].detach() * slopes[name]).movedim(dim, 0)
                found[name, dim].append(product.flatten(1).float().sum(1))
        return {read: torch.stack(of_samples).cpu() for read, of_samples in found.items()}

    @cached_property
    def squares(self) -> dict[str, Tensor]:
        """{weight: E[(dL/dw)²]} of all that writes or reads channels: the diagonal of the Fisher information."""
        tensors = named_tensors(self.model)
        names = [axis.tensor for group in self.groups for axis in (*group.writes, *group.reads)]
        names = [name for name in names if tensors[name].dim() > 1 or isinstance(tensors[name], nn.Parameter)]
        total: dict[str, Tensor] = {}
        count = 0
        for slopes in sample_gradients(self.model, self.pictures, names, self.seed):
            count += 1
            for name, slope in slopes.items():
                square = slope.float().square()
                total[name] = total[name].add_(square) if name in total else square
        return {name: square.div_(count) for name, square in total.items()}


def sample_gradients(
    model: nn.Module, pictures: Example, names: Iterable[str], seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Of every picture, up to SAMPLES: the gradients of its loss by these tensors. The model is untouched.

    The loss is the cross-entropy with a label drawn from the softmax of the output, which must be (1, classes).
    """
    net = bare_copy(model, share=True).eval()
    tensors = named_tensors(net)
    leaves: dict[int, Tensor] = {}  # by the tensor that they stand for: a tied one has several names
    named = {name: leaves.setdefault(id(tensors[name]), tensors[name].detach()) for name in dict.fromkeys(names)}
    generator = torch.Generator().manual_seed(seed)
    for leaf in leaves.values():
        leaf.requires_grad_()
    for args, kwargs in _singles(pictures):
        with torch.enable_grad():
            logits = _logits(functional_call(net, named, args, kwargs))
            label = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator).squeeze(1)
            loss = F.cross_entropy(logits, label.to(logits.device))
            slopes = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        of_leaf = dict(zip(leaves, slopes, strict=True))
        yield {name: of_leaf[id(tensors[name])] for name in named}


def _singles(pictures: Example) -> Iterator[tuple[tuple, dict]]:
    """The arguments of a call for each of the first SAMPLES pictures alone."""
    arguments = call_arguments(pictures)
    count = next(len(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    for i in range(min(count, SAMPLES)):

        def one(value: object, i: int = i) -> object:
            batched = isinstance(value, Tensor) and value.dim() and len(value) == count
            return value[i : i + 1] if batched else value  # type: ignore[index]

        yield tree_map(one, arguments)


def _logits(output: object) -> Tensor:
    """The (1, classes) of a network's output, float32 or wider."""
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if len(found) != 1 or found[0].dim() != 2:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in found) or type(output).__name__
        raise UserError(f"gradients need a network that puts out the logits (1, classes) of a picture, got {shapes}")
    return found[0].to(torch.promote_types(found[0].dtype, torch.float32))
