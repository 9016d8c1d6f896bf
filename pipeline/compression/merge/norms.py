"""How merged channels share the norm behind them: one affine map per channel, and variances from the weights."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.compression.group import ChannelGroup
from pipeline.compression.merge.projection import Projection, merge


class MergedNorms(NamedTuple):
    """Norms of merged channels, and the weights before them, by the names of their tensors.

    values: (k,), new values. factors: (C,) float64, by which the rows of a weight are multiplied before they are added
    up: its new rows.
    """

    values: dict[str, Tensor]
    factors: dict[str, Tensor]


def merge_norms(group: ChannelGroup, projection: Projection, tensors: Mapping[str, Tensor]) -> MergedNorms:
    """New values of each norm, and the sums that make the weight before it.

    A weight and its norm are one affine map per channel, y = s w x + t with s = gain / sigma. The smaller layer
    computes the cluster mean of these maps. It is written with the mean variance, the mean shift and the mean |gain|,
    so that re-estimated statistics give the outputs the spread that they had before. (The study's code averages weight,
    gain, shift, mean and variance each by itself, which is another map as soon as the gains differ.)
    """
    new = MergedNorms({}, {})
    rows = partial(_written_rows, group, tensors)

    def take(name: str) -> Tensor | None:
        """(C,) float64: variances span many orders of magnitude, and these vectors are small beside the weights."""
        found = rows(name)
        return None if found is None else found.double()

    def means(*vectors: Tensor) -> Sequence[Tensor]:
        """The cluster means of each vector (C,), all at once."""
        return merge(torch.stack(vectors, 1), projection, "mean").T.contiguous().unbind()

    def keep_singles(name: str, plain: Tensor, merged: Tensor) -> None:
        new.values[name] = torch.where((projection.counts == 1).to(plain.device), plain, merged)

    for norm in group.norms:
        if norm.weight is None or norm.bias is None or norm.mean is None or norm.var is None:
            continue
        gain, shift, center, var = take(norm.weight), take(norm.bias), take(norm.mean), take(norm.var)
        if gain is None or shift is None or center is None or var is None:
            continue
        sigma = (var + norm.eps).sqrt()
        s = gain / sigma
        t = shift - center * s
        bias = take(norm.writer_bias) if norm.writer_bias else None
        more = () if bias is None else (bias, s * bias + t)
        m_gain, m_size, m_shift, m_center, m_var, m_s, m_t, *of_bias = means(
            gain, gain.abs(), shift, center, var, s, t, *more
        )
        new_sigma = (m_var + norm.eps).sqrt()
        if norm.writer is None or rows(norm.writer) is None or (norm.writer_bias and bias is None):
            keep_singles(norm.weight, m_gain, m_s * new_sigma)
            keep_singles(norm.bias, m_shift, m_t + m_center * m_s)
            continue
        new_gain = m_size * torch.where(m_gain < 0, -1.0, 1.0)
        new_s = new_gain / new_sigma
        dead = new_gain.abs() < 1e-12  # the norm puts out its shift alone, so any weight will do
        safe = torch.where(dead, 1.0, new_s)
        # The new weight is the mean of s w, divided by the new scale.
        labels = projection.labels.to(s.device)
        of_own = labels.clamp(min=0)
        counts = projection.counts.to(s.device)[of_own]
        plain = (counts == 1) | dead[of_own]
        new.factors[norm.writer] = torch.where(plain, 1.0, s / safe[of_own]) / counts
        offset = of_bias[1] - new_s * of_bias[0] if of_bias else m_t
        keep_singles(norm.weight, m_gain, new_gain)
        keep_singles(norm.mean, m_center, torch.where(dead, m_center, (m_shift - offset) / safe))
    return new


def _written_rows(group: ChannelGroup, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The row of a tensor that writes each channel, (C, ...); None where a channel is not exactly one row."""
    axis = next((a for a in group.writes if a.tensor == name), None)
    if axis is None or axis.axis != 0 or axis.index.shape[1] != 1:
        return None
    if axis.is_plain and len(axis.index) == len(tensors[name]):
        return tensors[name]
    return tensors[name].index_select(0, axis.index[:, 0].to(tensors[name].device))


def repaired_variances(
    group: ChannelGroup, projection: Projection, tensors: Mapping[str, Tensor], norm_scale: bool
) -> dict[str, Tensor]:
    """New running variances, (k,) by name, of merged channels: Fold-AR, the approximate repair of arXiv:2502.10216.

    The mean of N channels of variance 1 and mean correlation E has the variance (1 + (N - 1) E) / N = 1 / beta². A norm
    that divides by this variance in place of the mean variance scales its output by beta, about its shift. E is read
    off the weights before the norm, or, where the norm has none of its own (a residual stream), off all weights that
    write the group: with cosines for correlations 1 / beta² is the squared length of the mean of their rows, each of
    length 1.

    1 / beta² is kept between 1 / N and 1, so 1 <= beta <= √N: rows that cancel would have beta without bound (the paper
    has no bound), and correlations of weights below 0 are not those of channels on real inputs, which are far from
    white.
    """
    new: dict[str, Tensor] = {}
    rows = partial(_written_rows, group, tensors)
    weights = [a.tensor for a in group.writes if tensors[a.tensor].dim() > 1]
    for norm in group.norms:
        var = rows(norm.var) if norm.var else None
        writing = [found for name in ([norm.writer] if norm.writer else weights) if (found := rows(name)) is not None]
        if var is None or not writing:
            continue
        unit = F.normalize(torch.cat([w.double().flatten(1) for w in writing], 1), dim=1)
        if norm.writer and norm.weight and norm_scale:  # then the outputs of the norm are averaged
            gain = rows(norm.weight)
            unit = unit if gain is None else unit * torch.where(gain < 0, -1.0, 1.0)[:, None]
        counts = projection.counts.to(var.device)
        shrunk = merge(unit, projection, "mean").square().sum(1)
        alive = merge(unit.abs().amax(1), projection, "mean") > 0  # rows of zeros are duplicates: nothing changes
        shrunk = torch.where(alive, shrunk.clamp(max=1).maximum(1 / counts), 1)
        mean = merge(var.double(), projection, "mean")
        new[str(norm.var)] = torch.where(counts > 1, ((mean + norm.eps) * shrunk - norm.eps).clamp(min=0), mean)
    return new
