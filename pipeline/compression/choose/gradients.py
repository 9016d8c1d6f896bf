"""Gradients of the loss by the weights, on pictures without labels.

Labels are drawn from the network's own softmax, so the mean square of a gradient is the diagonal of the Fisher
information and not of the "empirical" one, which needs true labels (Kunstner et al. 2019, arXiv:1905.12558). Samples go
one at a time: the square of a sum over samples is not the sum of squares, and only one sample's gradients need memory.

A sample may have several rows of classes, as a text has one for each token. The loss is their sum and not their mean:
given the sample each row draws its label alone, so the likelihood of all its labels is a product, whose logarithm is
the sum, and the Fisher information is that of this likelihood. A mean would also count a token of a long text for less.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.backward import sound_backward
from pipeline.compression.calibrate.batches import Batches, batches_of, cut, samples
from pipeline.compression.calibrate.outputs import Answers, float_leaves
from pipeline.compression.copies import bare_copy
from pipeline.compression.group import ChannelGroup
from pipeline.compression.merge.modules import named_tensors
from pipeline.example import Example, call_arguments
from pipeline.tables import UserError

SAMPLES = 64  # pictures that are looked at, at most, each with a backward pass of its own


@dataclass
class Gradients:
    """Gradients of a network on single pictures, computed when a method first asks for them.

    pictures: see batches.batches_of; the first SAMPLES are used. seed: for drawing the labels.
    answers: output -> its logits (rows, classes); None: the whole output, (1, classes) for a sample.

    Raises UserError where the logits have another shape.
    """

    model: nn.Module
    groups: Iterable[ChannelGroup]
    pictures: Example | Iterable[Example]
    seed: int = 0
    answers: Answers | None = None

    @cached_property
    def gates(self) -> dict[tuple[str, int], Tensor]:
        """{(weight, the axis of its inputs): (N, inputs)}, dL/dm of masks m = 1 on the inputs of every reader.

        With y = W (m x), dL/dm_c = Σ x_c dL/dx_c over all positions, which is also Σ w dL/dw over the weights of input
        c. The second form holds for readers of every kind, wherever samples and channels stand in their inputs. (For a
        weight with several uses it is the sum over them.)
        """
        reads = list(dict.fromkeys((axis.tensor, axis.axis) for group in self.groups for axis in group.reads))
        tensors = named_tensors(self.model)
        found: dict[tuple[str, int], list[Tensor]] = {read: [] for read in reads}
        for slopes in sample_gradients(self.model, self.pictures, [name for name, _ in reads], self.seed, self.answers):
            for name, dim in reads:
                product = (tensors[name].detach() * slopes[name]).movedim(dim, 0)
                found[name, dim].append(product.flatten(1).float().sum(1))
        return {read: torch.stack(of_samples).cpu() for read, of_samples in found.items()}

    @cached_property
    def squares(self) -> dict[str, Tensor]:
        """{weight: E[(dL/dw)²]} of all weights that write or read channels: the diagonal of the Fisher information."""
        tensors = named_tensors(self.model)
        names = [axis.tensor for group in self.groups for axis in (*group.writes, *group.reads)]
        names = [name for name in names if tensors[name].dim() > 1 or isinstance(tensors[name], nn.Parameter)]
        total: dict[str, Tensor] = {}
        count = 0
        for slopes in sample_gradients(self.model, self.pictures, names, self.seed, self.answers):
            count += 1
            for name, slope in slopes.items():
                square = slope.float().square()
                total[name] = total[name].add_(square) if name in total else square
        return {name: square.div_(count) for name, square in total.items()}


def sample_gradients(
    model: nn.Module,
    pictures: Example | Iterable[Example],
    names: Iterable[str],
    seed: int = 0,
    answers: Answers | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The gradients of the loss by these tensors, for each of the first SAMPLES pictures. The model is untouched.

    The loss is the cross-entropy with a label drawn from the softmax of the output, summed over the rows of `answers`.
    """
    net = bare_copy(model, share=True).eval()
    tensors = named_tensors(net)
    leaves: dict[int, Tensor] = {}  # by the id of their tensor: a tied one has several names
    named = {name: leaves.setdefault(id(tensors[name]), tensors[name].detach()) for name in dict.fromkeys(names)}
    generator = torch.Generator().manual_seed(seed)
    for leaf in leaves.values():
        leaf.requires_grad_()
    for single in islice(singles(batches_of(pictures)), SAMPLES):
        args, kwargs = call_arguments(single)
        with torch.enable_grad():
            loss = drawn_loss(functional_call(net, named, args, kwargs), answers, generator)
            with sound_backward(net):
                slopes = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        of_leaf = dict(zip(leaves, slopes, strict=True))
        yield {name: of_leaf[id(tensors[name])] for name in named}


def singles(batches: Batches) -> Iterator[Example]:
    """Each sample alone."""
    return (cut(batch, i, i + 1) for batch in batches for i in range(samples(batch)))


def drawn_loss(output: object, answers: Answers | None, draw: torch.Generator) -> Tensor:
    """() cross-entropy of a network's output on one sample with labels drawn from its own softmax, summed over rows."""
    logits = _logits(output, answers)
    label = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=draw).squeeze(1)
    return F.cross_entropy(logits, label.to(logits.device), reduction="sum")


def _logits(output: object, answers: Answers | None) -> Tensor:
    """The (rows, classes) of a network's output on one sample, float32 or wider."""
    found = float_leaves(output) if answers is None else [answers(output)]
    if len(found) != 1 or found[0].dim() != 2:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in found) or type(output).__name__
        raise UserError(
            f"gradients need a network that puts out the logits (1, classes) of a picture, got {shapes}: "
            "say answers=: which part of the output are the (rows, classes)"
        )
    return found[0].to(torch.promote_types(found[0].dtype, torch.float32))
