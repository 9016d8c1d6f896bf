import math

import pytest
import torch
from torch import nn

from pipeline.compression import channel_groups, compress
from pipeline.compression.merge.projection import Projection
from pipeline.compression.trace.verify import duplicate_
from pipeline.features import RATIOS, effective_rank, features, kurtosis, perplexity
from pipeline.models import build_model
from pipeline.tables import UserError

EXAMPLE = torch.zeros(1, 8)
PICTURE = torch.zeros(1, 3, 8, 8)


def mlp(width: int = 8) -> nn.Module:
    """One hidden group of `width` channels, with orthogonal weights on both sides."""
    net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))
    for layer in (net[0], net[2]):
        nn.init.orthogonal_(layer.weight)
    return net


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet20", 10, 3).eval()


@pytest.fixture(scope="module")
def found(resnet: nn.Module) -> dict[str, float]:
    return features(resnet, PICTURE)


def test_orthogonal_weights_have_full_effective_rank_and_lose_what_folding_removes() -> None:
    of = features(mlp(), EXAMPLE)
    assert of["effective_rank"] == pytest.approx(1)
    # k clusters of orthogonal rows keep k of C parts of the energy, and so does every pruning to k channels.
    for ratio in RATIOS:
        lost = math.sqrt(1 - max(1, int(8 * (1 - ratio) + 1e-9)) / 8)
        assert of[f"height_{100 * ratio:.0f}"] == pytest.approx(lost)
        assert of[f"pruned_{100 * ratio:.0f}"] == pytest.approx(lost)


def test_channels_in_pairs_fold_to_half_without_height_and_have_half_of_the_rank() -> None:
    net = mlp(16)
    groups = channel_groups(net, EXAMPLE)
    duplicate_(net, groups, [Projection(torch.arange(16) // 2)])
    of = features(net, EXAMPLE)
    assert of["height_50"] == pytest.approx(0, abs=1e-6)
    assert of["height_30"] == pytest.approx(0, abs=1e-6)
    assert of["height_70"] > 0.1 < of["pruned_50"]
    assert of["effective_rank"] <= 0.5 + 1e-9


def test_effective_rank_counts_equal_singular_values() -> None:
    assert effective_rank(torch.diag(torch.tensor([4.0, 4.0, 4.0, 0.0]))) == pytest.approx(3)
    assert effective_rank(torch.ones(5, 5)) == pytest.approx(1)
    # Singular values 3 and 1: entropy of (3/4, 1/4).
    wanted = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([9.0, 1.0]))) == pytest.approx(wanted)
    assert perplexity([0.0, 0.0]) == 0


def test_kurtosis_is_zero_for_gaussian_entries_and_minus_two_for_two_values() -> None:
    drawn = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert kurtosis(drawn) == pytest.approx(0, abs=0.05)
    assert kurtosis(torch.tensor([1.0, -1.0, 1.0, -1.0])) == pytest.approx(-2)
    assert kurtosis(torch.ones(3)) == 0


def test_heights_are_the_errors_that_compression_reports(resnet: nn.Module, found: dict[str, float]) -> None:
    report = compress(resnet, PICTURE, "fold", 0.5).report
    for group in report.groups:
        assert found[f"height_50/{group.name}"] == pytest.approx(group.error, abs=1e-9)
        assert found[f"pruned_50/{group.name}"] == pytest.approx(group.certificate.pruned, abs=1e-9)
    heights = [value for name, value in found.items() if name.startswith("height_50/")]
    assert len(heights) == len(report.groups)
    assert found["height_50"] == pytest.approx(sum(heights) / len(heights))
    assert found["height_30"] < found["height_50"] < found["height_70"]


def test_gains_and_shifts_of_batchnorm_are_measured() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    net[1].weight.data = torch.tensor([-2.0, 2.0, 2.0, 0.1])
    net[1].bias.data = torch.tensor([1.0, -1.0, 1.0, -1.0])
    of = features(net, PICTURE)
    mean = 6.1 / 4
    assert of["scale_mean"] == pytest.approx(mean)
    assert of["scale_spread"] == pytest.approx(math.sqrt((3 * 4 + 0.01) / 4 - mean**2) / mean)
    assert of["scale_small"] == 0.25
    assert of["shift_spread"] == pytest.approx(1)


def test_shares_of_energy_add_up_to_one(found: dict[str, float]) -> None:
    shares = [value for name, value in found.items() if name.startswith("energy/")]
    assert sum(shares) == pytest.approx(1)
    assert 1 / len(shares) <= found["energy_evenness"] <= 1


def test_fidelity_falls_with_the_ratio_and_is_one_for_a_network_that_folds_without_loss(resnet: nn.Module) -> None:
    net = build_model("resnet20", 10, 3).eval()
    net.load_state_dict(resnet.state_dict())
    groups = channel_groups(net, PICTURE)
    duplicate_(net, groups, [Projection(torch.arange(group.size) // 2) for group in groups])
    of = features(net, PICTURE)
    assert of["fidelity_fold_50"] == pytest.approx(1, abs=1e-3)
    assert of["fidelity_fold_50_repaired"] == pytest.approx(1, abs=1e-3)
    assert of["fidelity_l1_50"] < of["fidelity_fold_50"]
    assert of["fidelity_fold_70"] < of["fidelity_fold_50"]


def test_a_network_without_norms_and_pictures_has_no_features_of_them() -> None:
    names = set(features(mlp(), EXAMPLE))
    assert not {name for name in names if name.startswith(("scale", "shift", "fidelity"))}
    assert {"weight_norm", "height_50", "effective_rank"} < names


def test_the_network_and_the_random_numbers_stay_as_they_were(resnet: nn.Module, found: dict[str, float]) -> None:
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    resnet.train()
    state = torch.get_rng_state()
    again = features(resnet, PICTURE)
    assert torch.equal(state, torch.get_rng_state())
    assert resnet.training
    resnet.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in resnet.state_dict().items())
    assert again == found


def test_a_network_without_channel_groups_is_refused() -> None:
    with pytest.raises(UserError, match="no channels that can be compressed"):
        features(nn.Linear(8, 2), EXAMPLE)
