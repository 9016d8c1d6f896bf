"""How channels are chosen: energies, moves between clusters, and channels that are written alike."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from torch import nn

from pipeline.compression import Projection, channel_groups
from pipeline.compression.choose.cluster import condensed, cuts, dendrogram, kept_energy, refine
from pipeline.compression.choose.weights import GroupWeights


def gram_of(channels: int, seed: int, dtype: type = np.float64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(channels, 6)) @ rng.normal(size=(6, 30)) + rng.normal(size=(channels, 30)) / 2
    rows[: channels // 4] = rows[0] * np.arange(1, channels // 4 + 1)[:, None]  # some point one way
    rows[-3:] = rows[-1]
    return (rows @ rows.T).astype(dtype)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dropped", [0, 3])
def test_kept_energy_is_the_trace_of_the_projected_gram_matrix(seed, dropped):
    gram = gram_of(40, seed)
    labels = torch.randint(12, (40,), generator=torch.Generator().manual_seed(seed)).unique(return_inverse=True)[1]
    labels[torch.isin(labels, torch.arange(dropped))] = -1
    labels[labels >= 0] -= dropped
    projection = Projection(labels)
    projector = projection.matrix().numpy()
    assert kept_energy(gram, projection.labels.numpy()) == pytest.approx(np.trace(projector @ gram), rel=1e-12)


def moved_plainly(gram: np.ndarray, labels: np.ndarray, zero: bool) -> np.ndarray:
    """Hartigan's rule as it reads: sweeps over all channels and all clusters, energies computed anew for every move."""
    labels, k = labels.copy(), labels.max() + 1
    tolerance = np.finfo(gram.dtype).eps ** 0.75 * np.diag(gram).mean()

    def error(given: np.ndarray) -> float:
        kept = np.where(given == k - 1, -1, given) if zero else given
        return np.trace(gram) - kept_energy(gram, kept)

    def best(i: int) -> tuple[float, int]:
        """(how much lower the error is after the best move of channel i, the cluster that it moves to)"""
        before, own = error(labels), labels[i]
        if (labels == own).sum() == 1 and not (zero and own == k - 1):
            return -np.inf, own
        gains = {j: before - error(np.where(np.arange(len(labels)) == i, j, labels)) for j in range(k) if j != own}
        to = max(gains, key=gains.__getitem__)
        return gains[to], to

    while True:
        found = {i: best(i)[0] for i in range(len(labels))}
        movers = [i for i in sorted(found, key=lambda i: -found[i]) if found[i] > tolerance]
        if not movers:
            return labels
        for i in movers:
            gain, to = best(i)
            if gain > tolerance:
                labels[i] = to


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("zero", [False, True])
def test_refined_clusters_are_those_of_plain_sweeps(seed, zero):
    """Later sweeps look only at clusters that changed, which must find the same moves."""
    gram = gram_of(36, seed)
    for k, labels in cuts(dendrogram(gram, "average"), [4, 9, 20]):
        shuffled = np.random.default_rng(k).permutation(labels) if k == 9 else labels  # many sweeps
        energy, found = refine(gram, shuffled, sweeps=1000, zero=zero)
        assert (found == moved_plainly(gram, shuffled, zero)).all()
        kept = np.where(found == k - 1, -1, found) if zero else found
        assert energy == pytest.approx(kept_energy(gram, kept), rel=1e-9)


@pytest.mark.parametrize("channels", [2, 127, 128, 300])
def test_distances_from_a_gram_matrix_are_those_between_the_rows(channels):
    """Also where they are made in several blocks of rows."""
    rows = np.random.default_rng(0).normal(size=(channels, 7))
    np.testing.assert_allclose(condensed(rows @ rows.T), pdist(rows), atol=1e-7)


def test_channels_are_written_alike_only_where_every_tensor_agrees():
    net = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 4, 1)).eval()
    with torch.no_grad():
        net[0].weight[7], net[0].weight[30] = net[0].weight[2], net[0].weight[2]
        net[0].bias[7], net[0].bias[30] = net[0].bias[2], net[0].bias[2]
        net[0].weight[12], net[0].bias[12] = net[0].weight[11], net[0].bias[11] + 1e-6
        net[0].weight[20:23], net[0].bias[20:23] = torch.tensor([0.0, -0.0, 0.0])[:, None, None, None], 0.0
        net[0].weight[25], net[0].bias[25] = net[0].weight[24], net[0].bias[24]
        net[0].weight[25, -1, -1, -1] += 1e-6  # one entry apart, and not the first
        net[1].running_mean[30] = 1.0
    groups = channel_groups(net, torch.zeros(1, 3, 8, 8))
    alike = GroupWeights(groups[0], {n: t.detach() for n, t in net.state_dict().items()}).written_alike()
    expected = torch.arange(40)
    expected[7], expected[20:23] = 2, 20
    assert torch.equal(alike, expected)
