"""Certificates: a compression's parameter error beside the least that any pruning, and any projection, could have.

W (C, F) are the features of a group's channels, as `GroupWeights` describes them, G = W Wᵀ is their Gram matrix. Every
error is relative, ‖W - W'‖ / ‖W‖, at k of C channels:

    pruned   pruning keeps k rows of W and drops the others, so it loses least where the C - k smallest rows go:
             √(sum of the C - k smallest G_ii / tr G)
    svd      no W' of rank k is nearer to W than its truncated singular value decomposition (Eckart and Young 1936), so
             no projection of rank k loses less than √(sum of the C - k smallest eigenvalues of G / tr G)

An error up to `pruned` says that no pruning at the same rank has a smaller one. Theorem 1 of "Cut Less, Fold More" says
less of a folding: its error at rank k + 1 is at most that of every pruning at rank k. A certificate therefore also
holds `pruned_below`, which is `pruned` at k - 1 channels.

A certificate is three numbers a group, in the manifest of a compressed file. `found` computes them again from weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compression.choose.methods import METHODS
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.group import ChannelGroup
from pipeline.compression.merge.modules import apply, named_tensors
from pipeline.compression.merge.projection import Projection
from pipeline.compression.recipe import AUTO, Recipe, parse
from pipeline.tables import UserError

# Shares of a group's energy ‖W‖². Groups of more than 1,000 channels are summed up in single precision.
SLACK = 1e-7  # two errors that differ by less are equal
TOLERANCE = 1e-5  # the same number, computed on another machine, differs by less
WEIGHTS = 1e-5  # a tensor that was merged on another machine differs by less, relative to its largest entry


@dataclass(frozen=True)
class Certificate:
    """Relative parameter errors of one group at one rank k, see the module.

    pruned: the least of a pruning that keeps k channels; pruned_below: that keeps k - 1; svd: of any projection of
    rank k.
    """

    pruned: float
    pruned_below: float
    svd: float


@dataclass(frozen=True)
class Line:
    """What a file states of one group of one compression. certificate: None in a file that is older than they are."""

    name: str
    before: int
    after: int
    error: float
    labels: tuple[int, ...]
    chosen: tuple[int, ...] | None = None
    certificate: Certificate | None = None

    @property
    def holds(self) -> bool:
        """Has no pruning at the same rank a smaller parameter error?"""
        return self.certificate is not None and self.error**2 <= self.certificate.pruned**2 + SLACK

    @property
    def holds_below(self) -> bool:
        """Has no pruning with one channel less a smaller parameter error, as the theorem says of foldings?"""
        return self.certificate is not None and self.error**2 <= self.certificate.pruned_below**2 + SLACK

    @property
    def projection(self) -> Projection:
        """The projection of the labels. Raises ValueError where they are none."""
        chosen = None if self.chosen is None else torch.tensor(self.chosen)
        return Projection(torch.tensor(self.labels), chosen)


def certificates(gram: Tensor, sizes: Iterable[int]) -> dict[int, Certificate]:
    """{k: certificate} for every size k, from the Gram matrix (C, C) of a group's features.

    Its eigenvalues are computed once: 0.03 s for 512 channels and 2 s for 3,072, on one core.
    """
    double = gram.double()
    total = float(double.trace())
    norms = lost(double.diagonal(), total)
    values = lost(torch.linalg.eigvalsh(double).clamp(min=0), total)
    # The two are one number for rows that are orthogonal, up to the rounding of eigenvalues.
    return {k: Certificate(norms[k], norms[k - 1], min(values[k], norms[k])) for k in sizes}


def lost(energies: Tensor, total: float) -> list[float]:
    """Item k is √(all but the k largest of the energies (C,) / total), k = 0 ... C; 0 where the total is."""
    tails = torch.cat([torch.zeros(1, dtype=energies.dtype), energies.sort().values.cumsum(0)])
    return ((tails / total).clamp(0, 1).sqrt() if total > 0 else tails * 0).flip(0).tolist()


def as_json(certificate: Certificate | None) -> dict[str, Any]:
    """Entries of a group in a manifest: none without a certificate."""
    return {} if certificate is None else {"certificate": asdict(certificate)}


def stated(step: Mapping[str, Any]) -> list[Line]:
    """The lines of one compression in a file's chain (see `checkpoint`). UserError for entries that are no numbers."""
    lines = []
    for name, of in step["groups"].items():
        try:
            given, chosen = of.get("certificate"), of.get("chosen")
            lines.append(
                Line(
                    name,
                    int(of["before"]),
                    int(of["after"]),
                    float(of["error"]),
                    tuple(map(int, of["labels"])),
                    None if chosen is None else tuple(map(int, chosen)),
                    None if given is None else Certificate(**{key: float(value) for key, value in given.items()}),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"group {name} is not described as this version writes it ({error}); compress again"
            ) from error
    return lines


def contradictions(line: Line) -> Iterator[str]:
    """Yield each way in which a line contradicts itself or mathematics; nothing but the line is looked at."""
    try:
        kept = len(line.projection.counts)
    except (ValueError, IndexError) as error:
        yield f"its labels are no projection ({error})"
        return
    if len(line.labels) != line.before:
        yield f"it has labels for {len(line.labels)} channels of {line.before}"
    if kept != line.after:
        yield f"its labels keep {kept} channels, and it states {line.after}"
    if line.after == line.before and line.error > 0:
        yield f"all channels are kept, and it states an error of {line.error:.6g}"
    found = line.certificate
    if found is None:
        return
    ordered = {"0": 0.0, "svd": found.svd, "pruned": found.pruned, "pruned_below": found.pruned_below, "1": 1.0}
    for (low, least), (high, most) in zip(list(ordered.items())[:-1], list(ordered.items())[1:], strict=True):
        if not least**2 <= most**2 + SLACK:
            yield f"{low} {least:.6g} is above {high} {most:.6g}"
    if not found.svd**2 <= line.error**2 + SLACK:
        yield f"its error {line.error:.6g} is below {found.svd:.6g}, the least of any projection of this rank"
    # What is left of a pruning is what it says, so a pruning below the least one is none.
    if is_pruning(line) and not found.pruned**2 <= line.error**2 + SLACK:
        yield f"it is a pruning, and its error {line.error:.6g} is below the least of any, {found.pruned:.6g}"


def is_pruning(line: Line) -> bool:
    """Is every channel that is kept the only one of its cluster?"""
    kept = [label for label in line.labels if label >= 0]
    return len(kept) == len(set(kept))


def compression_recipe(step: Mapping[str, Any]) -> Recipe:
    """The compression recipe of a step of a chain. UserError for a compression that has none."""
    try:
        return parse(step["stage"])
    except UserError as error:
        raise UserError(
            f"{step['stage']!r} is no spelling of a method, so its features are not known ({error})"
        ) from error


def found(step: Mapping[str, Any], model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, Line | str | None]:
    """{group: its line, computed from the weights that were compressed}

    In place of a line, a text says how the network contradicts the file, and None that its features are activations,
    which gated channels are described by where a recipe chooses by pictures.

    step: a compression in a file's chain; model: the network that it compressed; groups: of that network.
    """
    recipe, lines = compression_recipe(step), {line.name: line for line in stated(step)}
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    told: dict[str, Line | str | None] = dict.fromkeys(lines, "the network has no such group")
    for group in groups:
        line = lines.get(group.name)
        if line is None:
            told[group.name] = "the file does not name it"
        elif group.size != line.before:
            told[group.name] = f"it has {group.size} channels, and the file states {line.before}"
        elif group.gated and looks_at_pictures(recipe):
            told[group.name] = None
        else:
            told[group.name] = computed(line, GroupWeights(group, tensors, **vars(recipe.features)))
    return told


def looks_at_pictures(recipe: Recipe) -> bool:
    """Does this recipe choose channels by activations? "auto" may."""
    looks = recipe.method not in METHODS or METHODS[recipe.method].activations
    return looks and recipe.calibration.pictures != "none"


def computed(line: Line, weights: GroupWeights) -> Line:
    """The line with error and certificate of its labels on these weights."""
    error, gram = weights.error(line.projection), weights.gram
    numbers = certificates(gram, [line.after])[line.after]
    return Line(line.name, line.before, line.after, error, line.labels, line.chosen, numbers)


def differences(line: Line, other: Line) -> Iterator[str]:
    """Yield each number of a line that `other`, the same group computed anew, does not confirm up to TOLERANCE."""
    pairs = {"error": (line.error, other.error)}
    if line.certificate is not None and other.certificate is not None:
        of = asdict(other.certificate)
        pairs |= {name: (value, of[name]) for name, value in asdict(line.certificate).items()}
    for name, (said, is_) in pairs.items():
        if not abs(said**2 - is_**2) <= TOLERANCE:
            yield f"{name} is stated as {said:.6g}, and the weights give {is_:.6g}"


def merged_tensors(
    step: Mapping[str, Any], later: Iterable[str], model: nn.Module, groups: Iterable[ChannelGroup]
) -> dict[str, Tensor] | None:
    """{name: tensor} that a file must hold if this step made it from `model`; None where other things decided on it.

    later: spellings of the stages behind it. Repair changes running statistics alone, so these are left out behind it.
    Solved readers follow from pictures, and trained weights from labels, so such files have nothing to compare.
    """
    recipe, later, groups = compression_recipe(step), list(later), list(groups)
    blind = recipe.calibration.pictures == "none" and recipe.method != AUTO
    if not blind or set(later) - {"repair"} or any(group.gated for group in groups):
        return None
    projections = [{line.name: line for line in stated(step)}[group.name].projection for group in groups]
    merging = recipe.merging
    smaller = apply(model, groups, projections, merging.norm_scale, approximate_repair=merging.approximate_repair)
    moved = ("running_mean", "running_var", "num_batches_tracked") if later else ()
    return {name: tensor for name, tensor in named_tensors(smaller).items() if not name.endswith(moved)}


def unlike(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the expected tensors that are missing, or differ by more than WEIGHTS of their largest entry."""

    def same(name: str) -> bool:
        given, tensor = tensors.get(name), expected[name].detach()
        if given is None or given.shape != tensor.shape:
            return False
        least = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        return bool(((given.double() - tensor.double()).abs() <= max(WEIGHTS, 4 * least) * largest).all())

    return [name for name in expected if not same(name)]
