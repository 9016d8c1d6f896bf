"""Find the coupled channel groups of any network from its torch.export graph.

Every parameter axis is given one integer id per position. The network is then run symbolically on these ids: each
activation is an integer tensor of its true shape that says, element by element, which channel it carries (0: none).
Operations that only move data (view, permute, cat, flatten, ...) are executed as they are on the ids; element-wise
operations with two operands unite the ids that meet; convolutions and linear layers consume a channel axis and produce
another. In attention, keys write channels that queries read. Channels that an operation without a rule (rules.py)
touches are frozen: a network can come out less compressible than it is, never wrong. A final check on duplicated
channels (verify.py) freezes groups whose coupling the trace cannot see.

Where several channels can only go together (an attention head, a group of a grouped convolution), a second run gives
all of them one id.

Source: DepGraph (Fang et al. 2023, arXiv:2301.12900), where coupling is a property of the graph.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pipeline.compression.copies import bare_copy
from pipeline.compression.group import DEFAULT_PARTS, PARTS, ChannelGroups
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.trace.collect import collect
from pipeline.compression.trace.tracer import Tracer
from pipeline.compression.trace.verify import plain_attention, verified
from pipeline.example import Example, call_arguments
from pipeline.tables import UserError, first_line, pick


def channel_groups(model: nn.Module, example: Example, parts: Sequence[str] = DEFAULT_PARTS) -> ChannelGroups:
    """Trace `model` once on `example` and return its coupled channel groups.

    parts: those of PARTS to compress: hidden channels between two layers, residual streams (where their norms allow it
        exactly), the width of attention heads or whole heads.
    example: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments; only shapes
        matter and a batch of one is enough.

    The names in the result are those of `model.state_dict()`, so the groups stay valid for every checkpoint of the same
    architecture. The model is left as it is.

    Raises UserError for unknown or contradicting parts, and where torch.export cannot trace the model.
    """
    for part in parts:
        pick("part", dict.fromkeys(PARTS), part)
    if {"width", "head"} <= set(parts):
        raise UserError("parts can hold 'width' or 'head', not both: compress twice to shrink heads and drop some")
    args, kwargs = call_arguments(example)
    # A copy, as export needs eval mode and its pass must not run hooks or change buffers of the live model.
    twin = bare_copy(model).eval()
    try:
        with torch.no_grad(), plain_attention():
            program = torch.export.export(twin, args, kwargs)
    except Exception as error:
        raise UserError(
            f"torch.export cannot trace {type(model).__name__}: {first_line(error)} "
            "(make its forward free of data-dependent control flow, or compress a submodule)"
        ) from error
    try:
        return verified(twin, args, kwargs, _traced(program, twin, parts))
    finally:  # an exported program has reference cycles, which keep these tensors until a later garbage collection
        for tensor in named_tensors(twin).values():
            tensor.data = tensor.new_empty(0)


def _traced(program: torch.export.ExportedProgram, twin: nn.Module, parts: Sequence[str]) -> ChannelGroups:
    """The groups and the frozen channels of the graph, before the check of verify.py."""
    first = Tracer(program, twin)
    first.run()
    instead = first.whole_blocks(parts)
    if instead is None:
        return collect(first, parts)
    second = Tracer(program, twin, instead)
    second.blocks = [(torch.from_numpy(instead[rows]), part) for rows, part in first.blocks]
    second.run()
    blocks = np.flatnonzero(instead != np.arange(len(instead)))
    of_blocks = collect(second, parts, of=instead[blocks])
    covered = np.isin(second.component[instead], second.component[instead[blocks]])
    singles = collect(first, parts, but=np.flatnonzero(covered))
    return ChannelGroups(singles.groups + of_blocks.groups, singles.frozen + of_blocks.frozen)
