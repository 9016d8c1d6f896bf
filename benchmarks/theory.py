"""The theory measured: parameter errors at every rank, and functional perturbations against their Lipschitz bounds.

    python -m benchmarks.theory --data cifar10.npz --net resnet20 resnet20-12fca82f.th \\
        --net resnet32 resnet32-d509ac18.th

The networks are the CIFAR checkpoints of akamaster/pytorch_resnet_cifar10. Writes benchmarks/results/theory.parquet and
theory_pairs.parquet, and from these docs/theory.md and docs/theory.png (`--page` writes the page alone).
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.features import RESNET20_MEAN, RESNET20_STD
from pipeline.compression import Projection, channel_groups
from pipeline.compression.certify import certificates
from pipeline.compression.choose.methods import METHODS, keep_largest
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.group import ChannelGroup, ChannelGroups
from pipeline.compression.merge.modules import apply, named_tensors
from pipeline.compression.perturbation import affine, operator_norm, pair_perturbation, spread
from pipeline.data.module import PictureData
from pipeline.models import build_model
from pipeline.models.checkpoint import load_into, read_state
from pipeline.study.theory import page, plot

RESULTS = Path("benchmarks/results")
FEATURES = {"writers and readers": {}, "writers": {"features": "writers", "scale": "none"}}  # the defaults, the paper's
DRAWS = 5  # of k-means
CLUSTERINGS = ("special", "fold", "mix")


def main() -> None:
    args = arguments()
    paths = RESULTS / "theory.parquet", RESULTS / "theory_pairs.parquet"
    if not args.page:
        errors, pairs = measured(args)
        for found, path in zip((errors, pairs), paths, strict=True):
            pl.DataFrame(found).write_parquet(path)
    tables = [pl.read_parquet(path) for path in paths]
    plot(*tables, Path("docs/theory.png"))
    Path("docs/theory.md").write_text(page(*tables))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10 in any form that data=cifar10 takes")
    parser.add_argument("--net", nargs=2, action="append", default=[], metavar=("MODEL", "FILE"))
    parser.add_argument("--n", type=int, default=128, help="training pictures, without augmentation")
    parser.add_argument("--page", action="store_true", help="write the page from results that are there")
    return parser.parse_args()


def measured(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a line for every group, features and rank; a line for every group and method at half of the channels)"""
    data = PictureData("cifar10", root=args.data, download=False, mean=RESNET20_MEAN, std=RESNET20_STD)
    data.setup()
    drawn = torch.randperm(len(data.repair_data), generator=torch.Generator().manual_seed(0))[: args.n]
    pictures, _ = data.repair_data.subset(drawn).__getitems__(range(args.n))
    errors, pairs = [], []
    for name, path in args.net:
        net = build_model(name, data.num_classes, data.channels).eval()
        load_into(net, read_state(path), path)
        groups = channel_groups(net, pictures[:1])
        tensors = {key: tensor.detach() for key, tensor in named_tensors(net).items()}
        for group in groups:
            errors += errors_of(name, group, tensors)
            print(name, group.name, flush=True)
        pairs += pairs_of(name, net, groups, tensors, pictures)
    return errors, pairs


def errors_of(network: str, group: ChannelGroup, tensors: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Relative parameter errors at every rank from 1 to C - 1."""
    sizes = range(1, group.size)
    for label, options in FEATURES.items():
        weights = GroupWeights(group, tensors, **options)
        bounds = certificates(weights.gram, sizes)
        found = {name: errors_at(weights, METHODS[name](weights, sizes)) for name in CLUSTERINGS}
        draws = [replace(weights, seed=seed) for seed in range(DRAWS)]
        kmeans = [errors_at(weights, METHODS["kmeans"](draw, sizes)) for draw in draws]
        for k in sizes:
            yield {
                **{"network": network, "group": group.name, "channels": group.size, "features": label, "rank": k},
                "prune": bounds[k].pruned,
                **{name: of[k] for name, of in found.items()},
                "kmeans": kmeans[0][k],
                f"kmeans, best of {DRAWS}": min(of[k] for of in kmeans),
                "svd": bounds[k].svd,
            }


def errors_at(weights: GroupWeights, projections: dict[int, Projection]) -> dict[int, float]:
    return {k: weights.error(projection) for k, projection in projections.items()}


def pairs_of(
    network: str, net: nn.Module, groups: ChannelGroups, tensors: dict[str, Tensor], pictures: Tensor
) -> Iterator[dict[str, Any]]:
    """Perturbations of each pair of layers, and of the logits, when one group alone keeps half of its channels."""
    inputs, logits = inputs_of(net, groups, pictures)
    behind = rest_norms(net, pictures.shape[-1])
    for i, group in enumerate(groups):
        block = net.get_submodule(group.name.rpartition(".")[0])
        rows, k = affine(block.conv1, block.bn1), group.size // 2
        weights = GroupWeights(group, tensors)
        chosen = {
            "prune": keep_largest(weights.gram.diagonal(), [k]),
            **{name: METHODS[name](weights, [k]) for name in (*CLUSTERINGS, "kmeans")},
        }
        for method, found in chosen.items():
            smaller = apply(net, [group], [found[k]])
            one = smaller.get_submodule(group.name.rpartition(".")[0])
            moved = spread(affine(one.conv1, one.bn1), found[k])
            pair = pair_perturbation(rows, moved, block.conv1, block.conv2, inputs[group.name])
            whole, bound = chain(net, smaller, logits, pictures, rows - moved, block, inputs[group.name], behind[i])
            place = {"network": network, "group": group.name, "channels": group.size, "method": method, "rank": k}
            shift = float((rows - moved).norm() / rows.norm())
            yield {**place, "shift": shift, **asdict(pair), "logits": whole, "logits_bound": bound}


@torch.no_grad()
def inputs_of(net: nn.Module, groups: ChannelGroups, pictures: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """({group: inputs of the convolution that writes it}, logits of the pictures)"""
    found: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(group.name).register_forward_pre_hook(
            lambda _, args, name=group.name: found.__setitem__(name, args[0])
        )
        for group in groups
    ]
    logits = net(pictures)
    for hook in hooks:
        hook.remove()
    return found, logits


@torch.no_grad()
def chain(
    net: nn.Module,
    smaller: nn.Module,
    logits: Tensor,
    pictures: Tensor,
    delta: Tensor,
    block: nn.Module,
    x: Tensor,
    behind: float,
) -> tuple[float, float]:
    """(mean of ‖z - z̃‖ / ‖z‖ over pictures, z the logits; the same of its bound by a product of operator norms)

    behind: operator norm of all that comes behind the pair. delta: A - Ã of the pair, in its Frobenius norm.
    """
    moved = (logits - smaller(pictures)).norm(dim=1) / logits.norm(dim=1)
    places = F.unfold(x.double(), block.conv1.kernel_size, padding=block.conv1.padding, stride=block.conv1.stride)
    size = (places.flatten(1).square().sum(1) + places.shape[2]).sqrt()
    bound = behind * delta.norm() * size / logits.norm(dim=1)
    return float(moved.mean()), float(bound.mean())


@torch.no_grad()
def rest_norms(net: nn.Module, size: int) -> list[float]:
    """For each block, the product of operator norms from its hidden channels to the logits.

    A block passes a change on by at most 1 + ‖second layer‖ ‖first layer‖: its shortcut takes every second pixel and
    adds zeros, and ReLU is 1-Lipschitz. The mean over H x W pixels has norm 1 / √(H W).
    """
    blocks = [block for stage in (net.layer1, net.layer2, net.layer3) for block in stage]
    found, sizes = [], []
    for block in blocks:
        first = layer_norm(block.conv1, block.bn1, size)
        size //= block.conv1.stride[0]
        found.append((first, layer_norm(block.conv2, block.bn2, size)))
        sizes.append(size)
    head = float(torch.linalg.matrix_norm(net.linear.weight.double(), 2)) / size
    rest, products = head, []
    for first, second in reversed(found):
        products.append(second * rest)
        rest *= 1 + first * second
    return products[::-1]


def layer_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d, size: int) -> float:
    """Operator norm of a convolution and the norm behind it, on pictures of this size."""
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).double()
    weight = conv.weight.double() * gain[:, None, None, None]
    return operator_norm(
        lambda x: F.conv2d(x, weight, None, conv.stride, conv.padding), (1, conv.in_channels, size, size)
    )


if __name__ == "__main__":
    main()
