"""Compression as a projection of channel groups (arXiv:2502.10216, eq. 3-5; "Cut Less, Fold More", section 3).

With M = onehot(labels), (C, k), the projector P = M (MᵀM)⁻¹ Mᵀ is orthogonal. Pruning uses every label once; folding
gives every channel a label. What writes the channels takes the cluster mean, (MᵀM)⁻¹ Mᵀ W; what reads them takes the
cluster sum, V M. So V P W = merge(V, sum) @ merge(W, mean), and exact duplicates merge without loss whatever the sizes
of their clusters. Where pictures are at hand, what reads the channels is solved anew instead (compensate.py).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.compression.attention import NarrowMultiheadAttention
from pipeline.compression.cluster import kept_energy
from pipeline.compression.copies import deep_copy
from pipeline.compression.group import Axis, ChannelGroup

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions of a weight


@dataclass(frozen=True)
class Sums:
    """Sums of entries along an axis: those that stay, in their order, and those that are added to one of them.

    stays: (k,) of entries; added: (n,) of entries; to: (n,), the place in `stays` of what each is added to.
    """

    stays: Tensor
    added: Tensor
    to: Tensor

    @classmethod
    def of(cls, into: Tensor) -> "Sums":
        """into: (size,), the entry that each entry goes into, itself where it stays; -1: dropped."""
        stays = into == torch.arange(len(into))
        added = (~stays & (into >= 0)).nonzero().squeeze(1)
        return cls(stays.nonzero().squeeze(1), added, (stays.cumsum(0) - 1)[into[added]])


@dataclass(frozen=True)
class Projection:
    """labels: (C,) int64, the new channel of each old one, -1 = dropped.

    Labels are renumbered so that new channels stand in the order of their first members.
    """

    labels: Tensor

    def __post_init__(self) -> None:
        labels = self.labels.detach().cpu().long()
        if labels.dim() != 1 or not (labels >= 0).any():
            raise ValueError(f"labels must be a (C,) tensor that keeps at least one channel, got {labels}")
        used = labels[labels >= 0]
        first = torch.full((int(used.max()) + 1,), len(labels)).scatter_reduce(
            0, used, torch.arange(len(labels))[labels >= 0], "amin"
        )
        if (first == len(labels)).any():
            raise ValueError(f"labels must use every number from 0 to {int(used.max())}")
        rank = first.argsort().argsort()
        object.__setattr__(self, "labels", torch.where(labels >= 0, rank[labels.clamp(min=0)], -1))

    @cached_property
    def counts(self) -> Tensor:
        """Cluster sizes, (k,) int64."""
        return torch.bincount(self.labels[self.labels >= 0])

    @cached_property
    def representatives(self) -> Tensor:
        """The first channel of every cluster, ascending, (k,) int64: where the new channel will stand."""
        first = torch.full((len(self.counts),), len(self.labels))
        kept = self.labels >= 0
        return first.scatter_reduce(0, self.labels[kept], torch.arange(len(self.labels))[kept], "amin")

    @cached_property
    def into(self) -> Tensor:
        """Of every channel: the representative of its cluster, -1 = dropped, (C,) int64."""
        return torch.where(self.labels >= 0, self.representatives[self.labels], -1)

    @cached_property
    def sums(self) -> Sums:
        """What merging adds up."""
        return Sums.of(self.into)

    @property
    def is_identity(self) -> bool:
        return len(self.counts) == len(self.labels)

    def onehot(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """M: (C, k)."""
        return (self.labels[:, None] == torch.arange(len(self.counts))).to(dtype)

    def matrix(self) -> Tensor:
        """The projector P = M (MᵀM)⁻¹ Mᵀ: (C, C) float64."""
        m = self.onehot()
        return m / self.counts @ m.T


def merge(tensor: Tensor, projection: Projection, reduce: str, dim: int = 0) -> Tensor:
    """Cluster means ("mean") or sums ("sum") along `dim`, of size C before and k after."""
    merged = weighted_sum(tensor, projection.sums, None, dim)
    if reduce == "mean":
        merged = merged / projection.counts.to(tensor.device).view(_along(dim, tensor))
    return merged.to(tensor.dtype)


def weighted_sum(tensor: Tensor, sums: Sums, weights: Tensor | None = None, dim: int = 0) -> Tensor:
    """The sums along `dim`, each entry times its weight.

    weights: (size,), or None for ones. Half precision comes out as float32: it would lose what a large sum adds last.
    """
    device, wide = tensor.device, _wide(tensor)

    def taken(entries: Tensor) -> Tensor:
        chosen = tensor.index_select(dim, entries.to(device)).to(wide)
        if weights is not None:
            chosen *= weights.to(device, wide)[entries.to(device)].view(_along(dim, tensor))
        return chosen

    # What stays is copied and only the others added: most clusters are single channels.
    merged = taken(sums.stays)
    return merged.index_add_(dim, sums.to.to(device), taken(sums.added)) if len(sums.added) else merged


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def reconstruction_error(gram: Tensor, projection: Projection) -> float:
    """Relative parameter error ‖W - P W‖ / ‖W‖ from the Gram matrix W Wᵀ (C, C) alone; dropped rows count whole."""
    if projection.is_identity:
        return 0.0
    total = float(gram.diagonal().double().sum())
    kept = kept_energy(gram.cpu().numpy(), projection.labels.numpy())
    return (max(total - kept, 0.0) / total) ** 0.5 if total > 0 else 0.0


def apply(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    projections: Iterable[Projection],
    norm_scale: bool = True,
    share: bool = False,
    approximate_repair: bool = False,
) -> nn.Module:
    """A smaller copy of `model`: an ordinary module whose channel groups went through their projections.

    norm_scale: merge a weight and the norm behind it as the one affine map that they are (see `_merge_norms`), rather
    than each tensor by its own mean.
    share: the tensors that do not change are the model's own, not copies.
    approximate_repair: running variances follow what merging does to the channels (see `_repaired_variances`).
    """
    groups, projections = list(groups), list(projections)
    tensors = {name: t.detach() for name, t in named_tensors(model).items()}
    new = compressed_tensors(tensors, groups, projections, norm_scale, approximate_repair=approximate_repair)
    return resized(model, new, new_numbers(model, groups, projections), share)


def new_numbers(
    model: nn.Module, groups: Iterable[ChannelGroup], projections: Iterable[Projection]
) -> dict[str, int | float]:
    """What the Python numbers that follow these groups become, by the path of the attribute.

    Raises ValueError where groups that share one number keep different fractions of their channels.
    """
    found: dict[str, int | float] = {}
    for group, projection in zip(groups, projections, strict=True):
        for number in group.numbers if not projection.is_identity else ():
            owner, _, attribute = number.path.rpartition(".")
            old = getattr(model.get_submodule(owner), attribute)
            new = old * (len(projection.counts) / group.size) ** number.power
            new = round(new) if isinstance(old, int) else new
            if found.setdefault(number.path, new) != new:
                raise ValueError(
                    f"groups that share {number.path} must keep the same number of channels: "
                    f"{group.name} makes it {new}, another {found[number.path]}"
                )
    return found


def resized(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, int | float] | None = None,
    share: bool = False,
) -> nn.Module:
    """A copy of `model` in which these tensors, by name and of other shapes than before, stand in place of its own.

    numbers: new values of sizes that modules keep as Python numbers, by the path of the attribute.
    share: the tensors that do not change are the model's own, not copies.
    """
    state = named_tensors(model)
    # deepcopy puts the new tensors in the place of the old ones, tied ones under all their names.
    memo: dict[int, Any] = {id(t): t for t in state.values()} if share else {}
    for name, given in tensors.items():
        old = state[name]
        new = laid_out_as(old, given)
        memo[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    changed = {id(memo[id(state[name])]) for name in tensors}
    smaller = deep_copy(model, memo)
    for module in smaller.modules():
        if any(id(t) in changed for t in module.parameters(recurse=False)):
            _follow_shape_(module)
    for path, value in (numbers or {}).items():
        owner, _, attribute = path.rpartition(".")
        module = smaller.get_submodule(owner)
        setattr(module, attribute, value)
        if type(module) is nn.MultiheadAttention and module.num_heads * module.head_dim != module.embed_dim:
            module.__class__ = NarrowMultiheadAttention
    return smaller


def laid_out_as(old: Tensor, new: Tensor) -> Tensor:
    """`new`, channels-last where `old` is: by the layout of its weight a convolution chooses its kernel."""
    layout = CHANNELS_LAST.get(old.dim())
    if layout is None or old.is_contiguous() or not old.is_contiguous(memory_format=layout):
        return new
    return new.contiguous(memory_format=layout)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under the names of the state_dict, which may hold more than tensors."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def compressed_tensors(
    tensors: Mapping[str, Tensor],
    groups: Iterable[ChannelGroup],
    projections: Iterable[Projection],
    norm_scale: bool = True,
    reads: bool = True,
    approximate_repair: bool = False,
) -> dict[str, Tensor]:
    """The tensors that change, by name, in their new shapes. `tensors` is not written to.

    reads: False leaves the inputs of what reads the channels as they are.
    """
    work = [(g, p) for g, p in zip(groups, projections, strict=True) if not p.is_identity]
    edits: dict[tuple[str, int], list[_Edit]] = defaultdict(list)
    for group, projection in work:
        merges = bool(projection.counts.max() > 1)
        by_norm = _merge_norms(group, projection, tensors) if norm_scale and merges else {}
        if approximate_repair and merges:
            by_norm |= _repaired_variances(group, projection, tensors, norm_scale)
        for axis in group.writes:
            edits[axis.tensor, axis.axis].append(_Edit(axis, projection, True, by_norm.get(axis.tensor)))
        temperature = (len(projection.counts) / group.size) ** group.temperature
        for axis in group.reads if reads else ():
            factor = temperature if axis.query else 1.0
            edits[axis.tensor, axis.axis].append(_Edit(axis, projection, False, factor=factor))
    edited: dict[str, Tensor] = {}
    merges_of: dict[Any, tuple[Sums, Tensor]] = {}
    # All that is written before all that is only read: a merged norm sets its weight's rows from the columns as they
    # were. Of one axis all groups at once: the heads of a layer, and keys beside queries, share a weight.
    for (name, dim), along in sorted(edits.items(), key=lambda item: not any(e.is_write for e in item[1])):
        edited[name] = _edited(edited.get(name, tensors[name]), dim, along, merges_of)
    return {name: t.contiguous() for name, t in edited.items()}


def merged_inputs(
    inputs: Tensor, reader: str, groups: Iterable[ChannelGroup], projections: Iterable[Projection]
) -> Tensor:
    """Cluster means of what a reader is given, (rows, inputs) -> (rows, inputs left)."""
    pairs = zip(groups, projections, strict=True)
    edits = [_Edit(axis, p, True) for g, p in pairs for axis in g.reads if axis.tensor == reader and not p.is_identity]
    return _edited(inputs, 1, edits, {})


@dataclass(frozen=True)
class _Edit:
    """What becomes of one group's channels along one axis of a tensor.

    values: (k, ...), in place of the cluster means
    factor: of the cluster sums
    """

    axis: Axis
    projection: Projection
    is_write: bool
    values: Tensor | None = None
    factor: float = 1.0


def _edited(tensor: Tensor, dim: int, edits: Sequence[_Edit], known: dict[Any, tuple[Sums, Tensor]]) -> Tensor:
    """The tensor with these edits along `dim`, done as one projection of all that stands there.

    known: what `_merge_of` gave, added to: a weight, its bias and the norm behind it merge alike.
    """
    size = tensor.shape[dim]
    first = edits[0]
    if first.values is not None and first.axis.is_plain and first.axis.index.shape[0] == size:
        return (
            first.values.to(tensor.device, _wide(tensor)).movedim(0, dim).to(tensor.dtype)
        )  # nothing else stands there
    key = (size, *((e.axis.index.numpy().tobytes(), id(e.projection), e.is_write, e.factor) for e in edits))
    if key not in known:
        known[key] = _merge_of(size, edits)
    sums, divisor = known[key]
    merged = weighted_sum(tensor, sums, None, dim)
    if len(divisor):
        merged /= divisor.to(tensor.device, merged.dtype).view(_along(dim, tensor))
    for edit in edits:
        if edit.values is not None:
            entries = edit.axis.index[edit.projection.representatives].reshape(-1)
            places = torch.searchsorted(sums.stays, entries)
            merged.index_copy_(dim, places.to(tensor.device), edit.values.to(merged).movedim(0, dim))
    return merged.to(tensor.dtype)


def _merge_of(size: int, edits: Sequence[_Edit]) -> tuple[Sums, Tensor]:
    """(sums, what each is divided by, or nothing where that is 1) of an axis with these edits."""
    into = torch.arange(size)  # of each position: the one whose place it shares, -1 where it is dropped
    divisor = torch.ones(size, dtype=torch.float64)
    for edit in edits:
        where, index = edit.projection.into, edit.axis.index
        first = index[edit.projection.representatives]
        into[index] = torch.where(where[:, None] >= 0, index[where], -1)
        divisor[first] = edit.projection.counts[:, None].double() if edit.is_write else 1 / edit.factor
    sums = Sums.of(into)
    divisor = divisor[sums.stays]
    return sums, divisor if (divisor != 1).any() else divisor[:0]


def _along(dim: int, tensor: Tensor) -> list[int]:
    """The shape in which a vector stands along `dim` of the tensor."""
    return [-1 if d == dim else 1 for d in range(tensor.dim())]


def _merge_norms(group: ChannelGroup, projection: Projection, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New values, (k, ...), of each norm and of the weight before it.

    A weight and its norm are one affine map per channel, y = s w x + t with s = gain / sigma. The cluster mean of these
    maps is what the smaller layer computes; written with the mean variance, the mean shift and the mean |gain|, so that
    re-estimated statistics give the outputs the spread that they had before. (The study's code averages weight, gain,
    shift, mean and variance each by itself, which is another map as soon as the gains differ.)
    """
    new: dict[str, Tensor] = {}
    rows = partial(_written_rows, group, tensors)

    def take(name: str) -> Tensor | None:
        """(C,) float64: small beside the weights, and variances span many orders of magnitude."""
        found = rows(name)
        return None if found is None else found.double()

    def means(*vectors: Tensor) -> Sequence[Tensor]:
        """Of each vector (C,) at once."""
        return merge(torch.stack(vectors, 1), projection, "mean").T.contiguous().unbind()

    def keep_singles(name: str, plain: Tensor, merged: Tensor) -> None:
        new[name] = torch.where((projection.counts == 1).to(plain.device), plain, merged)

    for norm in group.norms:
        if norm.weight is None or norm.bias is None or norm.mean is None or norm.var is None:
            continue
        gain, shift, center, var = take(norm.weight), take(norm.bias), take(norm.mean), take(norm.var)
        if gain is None or shift is None or center is None or var is None:
            continue
        sigma = (var + norm.eps).sqrt()
        s = gain / sigma
        t = shift - center * s
        weight = rows(norm.writer) if norm.writer else None
        bias = take(norm.writer_bias) if norm.writer_bias else None
        more = () if bias is None else (bias, s * bias + t)
        m_gain, m_size, m_shift, m_center, m_var, m_s, m_t, *of_bias = means(
            gain, gain.abs(), shift, center, var, s, t, *more
        )
        new_sigma = (m_var + norm.eps).sqrt()
        if norm.writer is None or weight is None or (norm.writer_bias and bias is None):
            keep_singles(norm.weight, m_gain, m_s * new_sigma)
            keep_singles(norm.bias, m_shift, m_t + m_center * m_s)
            continue
        new_gain = m_size * torch.where(m_gain < 0, -1.0, 1.0)
        new_s = new_gain / new_sigma
        dead = new_gain.abs() < 1e-12  # a norm that puts out its shift alone: any weight will do
        safe = torch.where(dead, 1.0, new_s)
        # The mean of s w, divided by the new scale, in one pass over the weight.
        labels = projection.labels.to(s.device)
        of_own = labels.clamp(min=0)
        counts = projection.counts.to(s.device)[of_own]
        plain = (counts == 1) | dead[of_own]
        new[norm.writer] = weighted_sum(weight, projection.sums, torch.where(plain, 1.0, s / safe[of_own]) / counts)
        offset = of_bias[1] - new_s * of_bias[0] if of_bias else m_t
        keep_singles(norm.weight, m_gain, new_gain)
        keep_singles(norm.mean, m_center, torch.where(dead, m_center, (m_shift - offset) / safe))
    return new


def _written_rows(group: ChannelGroup, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """What a tensor holds of each channel, (C, ...), or None where a channel is not exactly one row of it."""
    axis = next((a for a in group.writes if a.tensor == name), None)
    if axis is None or axis.axis != 0 or axis.index.shape[1] != 1:
        return None
    if axis.is_plain and len(axis.index) == len(tensors[name]):
        return tensors[name]
    return tensors[name].index_select(0, axis.index[:, 0].to(tensors[name].device))


def _repaired_variances(
    group: ChannelGroup, projection: Projection, tensors: Mapping[str, Tensor], norm_scale: bool
) -> dict[str, Tensor]:
    """New running variances, (k,) by name, of merged channels: Fold-AR, the approximate repair of arXiv:2502.10216.

    The mean of N channels of variance 1 and mean correlation E has the variance (1 + (N - 1) E) / N = 1 / beta². A norm
    that divides by this one in place of the mean variance scales what it puts out by beta, about its shift. E is read
    off the weights before the norm, or where it has none of its own (a residual stream), off all that write the group:
    with cosines for correlations 1 / beta² is the squared length of the mean of their rows, each of length 1.

    It is kept between 1 / N and 1, so 1 <= beta <= √N: rows that cancel would have beta without bound (the paper has
    none), and correlations of weights below 0 are not those of channels on real inputs, which are far from white.
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
        if norm.writer and norm.weight and norm_scale:  # what is averaged then is the output of the norm
            gain = rows(norm.weight)
            unit = unit if gain is None else unit * torch.where(gain < 0, -1.0, 1.0)[:, None]
        counts = projection.counts.to(var.device)
        shrunk = merge(unit, projection, "mean").square().sum(1)
        alive = merge(unit.abs().amax(1), projection, "mean") > 0  # rows of zeros are duplicates: nothing changes
        shrunk = torch.where(alive, shrunk.clamp(max=1).maximum(1 / counts), 1)
        mean = merge(var.double(), projection, "mean")
        new[str(norm.var)] = torch.where(counts > 1, ((mean + norm.eps) * shrunk - norm.eps).clamp(min=0), mean)
    return new


def _follow_shape_(module: nn.Module) -> None:
    """Bring the numbers that a layer states about itself in line with its weight."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return
    shape = tuple(weight.shape)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:  # only depthwise convolutions are compressed
            multiplier = module.out_channels // module.groups
            module.groups = shape[0] // multiplier
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = shape[0]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
    elif hasattr(module, "nf") and len(shape) == 2:  # Conv1D of Hugging Face's GPT-2, a linear layer transposed
        module.nf = shape[1]
