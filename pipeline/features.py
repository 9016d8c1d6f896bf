"""Features of a checkpoint that need no data: numbers that foretell how much of it folding leaves.

Weights W (C, F) of a channel group are those by which folding describes its channels (see weights.GroupWeights). A
feature of groups is given for each of them, under "feature/group", and as their mean, under its name alone.

    weight_norm         ‖w‖ of all weight matrices and kernels together
    weight_kurtosis     m₄ / m₂² - 3 of the entries of a matrix or kernel, mean over these: 0 for Gaussian ones
    energy/group        the group's part of ‖W‖² of the writers of all groups
    energy_evenness     exp(entropy of these parts) / number of groups: 1 where all groups hold the same
    height_30 ... 70    ‖W - PW‖ / ‖W‖ where folding removes 30, 50, 70% of the channels, 0 ... 1: the height at which
                        the group's dendrogram is cut ("Cut Less, Fold More", eq. 4)
    pruned_30 ... 70    the least of these errors that pruning can have
    effective_rank      exp(entropy of s / sum of s) / C, s: singular values of W (Roy and Vetterli 2007, eq. 4)
    scale_mean          mean |gain| of a BatchNorm, mean over BatchNorms
    scale_spread        standard deviation of |gain| / its mean, mean over BatchNorms
    scale_small         share of all channels whose |gain| is below SMALL of their BatchNorm's mean: those that network
                        slimming would drop (Liu et al. 2017, arXiv:1708.06519)
    shift_spread        standard deviation of the shifts of a BatchNorm, mean over BatchNorms
    fidelity_fold_50    agreement of the folded with the dense network on synthetic pictures, 0 ... 1 (see
                        calibrate.predict); fidelity_l1_50: of the pruned one; each at 30, 50 and 70%
    fidelity_fold_50_repaired   the same, with BatchNorm statistics re-estimated on the synthetic pictures

Features of BatchNorm and repair are left out for networks without it, fidelity for inputs that are no pictures.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.compression.budget import channels_left
from pipeline.compression.calibrate.batches import batches_of
from pipeline.compression.calibrate.predict import PICTURES, judge
from pipeline.compression.calibrate.repair import reference, repair_, statistics
from pipeline.compression.calibrate.synthetic import synthesize
from pipeline.compression.certify import certificates
from pipeline.compression.checks import check_finite, check_groups
from pipeline.compression.choose.methods import METHODS
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.compress import compressions
from pipeline.compression.copies import bare_copy
from pipeline.compression.group import ChannelGroup, ChannelGroups
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.trace.graph import channel_groups
from pipeline.example import Example

RATIOS = (0.3, 0.5, 0.7)  # of channels removed
SMALL = 0.1
JUDGED = ("fold", "l1")  # methods whose fidelity is computed
Named = Iterator[tuple[str, float]]


def features(network: nn.Module, example: Example, seed: int = 0) -> dict[str, float]:
    """{feature: value}, see the module; the network is untouched.

    example: what the network is called with; a batch of one is enough. seed: of the synthetic pictures.
    Raises UserError for weights that are not finite, and for a network that cannot be traced or has no channel group.
    """
    net = bare_copy(network).eval().requires_grad_(False)
    tensors = {name: tensor.detach() for name, tensor in named_tensors(net).items()}
    check_finite(tensors)
    groups = channel_groups(net, example)
    check_groups(net, groups)
    found = dict([*of_weights(net), *of_groups(groups, tensors), *of_norms(net)])
    if isinstance(example, Tensor) and example.dim() == 4 and example.is_floating_point():
        found |= dict(fidelities(net, example, groups, seed))
    return found


def percent(ratio: float) -> str:
    """A ratio as names of features have it: "50"."""
    return f"{100 * ratio:.0f}"


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


# --- weights


def of_weights(net: nn.Module) -> Named:
    """weight_norm and weight_kurtosis."""
    weights = [weight.detach().double() for weight in net.parameters() if weight.dim() > 1]
    yield "weight_norm", math.sqrt(sum(float(weight.square().sum()) for weight in weights))
    yield "weight_kurtosis", mean(kurtosis(weight) for weight in weights)


def kurtosis(values: Tensor) -> float:
    """Excess kurtosis of all entries; 0 where they are all the same."""
    centred = values - values.mean()
    variance = float(centred.square().mean())
    return float(centred.pow(4).mean()) / variance**2 - 3 if variance > 0 else 0.0


def of_groups(groups: ChannelGroups, tensors: Mapping[str, Tensor]) -> Named:
    """Features of channel groups: each group's, then the mean over them, and energy_evenness."""
    found = {group.name: dict(of_group(group, tensors)) for group in groups}
    energies = {name: of.pop("energy") for name, of in found.items()}
    total = sum(energies.values()) or 1.0  # without any energy all parts are 0
    yield from ((f"energy/{name}", energy / total) for name, energy in energies.items())
    yield "energy_evenness", perplexity(list(energies.values())) / len(found)
    for feature in next(iter(found.values())):
        yield from ((f"{feature}/{name}", of[feature]) for name, of in found.items())
        yield feature, mean(of[feature] for of in found.values())


def of_group(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Named:
    """energy (not yet a share), heights, prunings and effective_rank of one group."""
    weights = GroupWeights(group, tensors)
    yield "energy", sum(float(weights.rows(axis).square().sum()) for axis in weights.writers)
    sizes = {ratio: channels_left(group.size, ratio) for ratio in RATIOS}
    folded = METHODS["fold"](weights, sorted(set(sizes.values())))
    pruned = certificates(weights.gram, sizes.values())
    for ratio, k in sizes.items():
        yield f"height_{percent(ratio)}", weights.error(folded[k])
    for ratio, k in sizes.items():
        yield f"pruned_{percent(ratio)}", pruned[k].pruned
    yield "effective_rank", effective_rank(weights.gram) / group.size


def effective_rank(gram: Tensor) -> float:
    """exp(entropy of the singular values, as parts of their sum) of W, 1 ... C, from its Gram matrix WWᵀ (C, C)."""
    # Eigenvalues of a singular matrix are 0 up to rounding, whose square roots would count as a spectrum.
    values = torch.linalg.eigvalsh(gram.double())
    least = len(values) * torch.finfo(gram.dtype).eps * values.max()
    return perplexity(values.where(values > least, 0).sqrt().tolist())


def perplexity(sizes: Sequence[float]) -> float:
    """exp(entropy) of sizes >= 0 as parts of their sum: n where n are equal and the others 0; 0 where all are 0."""
    total = sum(sizes)
    parts = [size / total for size in sizes if size > 0]
    return math.exp(-sum(part * math.log(part) for part in parts)) if parts else 0.0


# --- BatchNorm


def of_norms(net: nn.Module) -> Named:
    """Features of the gains and shifts of all BatchNorms; none where there is no BatchNorm with gains."""
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.affine]
    if not norms:
        return
    gains = [norm.weight.detach().double().abs() for norm in norms]
    yield "scale_mean", mean(float(gain.mean()) for gain in gains)
    yield "scale_spread", mean(relative_spread(gain) for gain in gains)
    small = sum(int((gain < SMALL * gain.mean()).sum()) for gain in gains)
    yield "scale_small", small / sum(len(gain) for gain in gains)
    yield "shift_spread", mean(float(norm.bias.detach().double().std(correction=0)) for norm in norms)


def relative_spread(values: Tensor) -> float:
    """Standard deviation over mean of values >= 0; 0 where all are 0."""
    centre = float(values.mean())
    return float(values.std(correction=0)) / centre if centre > 0 else 0.0


# --- synthetic pictures


def fidelities(net: nn.Module, example: Tensor, groups: ChannelGroups, seed: int) -> Named:
    """Fidelity of each of JUDGED at RATIOS, raw and, where there is BatchNorm, repaired, on the same pictures."""
    pictures = batches_of(synthesize(net, example, PICTURES, seed=seed))
    judged, trained = judge(net, pictures), statistics(net, pictures)
    for method in JUDGED:
        smaller = compressions(net, example, method, RATIOS, groups=groups, seed=seed, certify=False)
        for ratio, made in zip(RATIOS, smaller, strict=True):
            name, plan = f"fidelity_{method}_{percent(ratio)}", made.report.plan
            yield name, judged(made.model)
            if trained:
                against = reference(net, trained, plan.groups, plan.projections, plan.joint_norms)
                repair_(made.model, pictures, against)
                yield f"{name}_repaired", judged(made.model)
