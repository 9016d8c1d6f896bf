"""The algebra of projections, and the theorem that folding one channel less loses no more than pruning."""

import pytest
import torch
from toy_nets import uneven_labels

from pipeline.compression import METHODS, Projection, channel_groups
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.merge.projection import merge, reconstruction_error


def random_projections(count=40):
    """Foldings, prunings and mixes of them, on tensors of random shapes: (projection, generator)."""
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        size = int(torch.randint(2, 12, (), generator=generator))
        labels = uneven_labels(size, int(torch.randint(1, size + 1, (), generator=generator)), generator)
        if seed % 3 == 1:
            labels[torch.rand(size, generator=generator) < 0.4] = -1
        elif seed % 3 == 2:
            labels = torch.where(torch.rand(size, generator=generator) < 0.5, torch.arange(size), -1)
        if not (labels >= 0).any():
            labels[0] = 0
        used = labels[labels >= 0].unique()
        yield Projection(torch.where(labels >= 0, torch.searchsorted(used, labels), -1)), generator


def test_projector():
    for projection, generator in random_projections():
        p, c = projection.matrix(), len(projection.labels)
        assert torch.allclose(p, p.T)
        assert torch.allclose(p @ p, p)
        assert p.trace() == pytest.approx(len(projection.counts))
        w = torch.randn(c, 7, generator=generator, dtype=torch.float64)
        v = torch.randn(5, c, generator=generator, dtype=torch.float64)
        assert torch.allclose(merge(v, projection, "sum", 1) @ merge(w, projection, "mean"), v @ p @ w)
        expected = ((w - p @ w).norm() / w.norm()).item()
        assert reconstruction_error(w @ w.T, projection) == pytest.approx(expected, abs=1e-7)
        dropped = projection.labels < 0
        assert not p[dropped].any()


def test_reference_order_is_another_map():
    """Summing writers and averaging readers is V P W, too, only where all clusters have one size."""
    v, w = torch.randn(2, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    uneven = Projection(torch.tensor([0, 0, 0, 1, 1]))
    swapped = (merge(v, uneven, "mean", 1) / 1) @ (merge(w, uneven, "mean"))
    assert not torch.allclose(swapped, v @ uneven.matrix() @ w)


@pytest.mark.parametrize(
    ("labels", "numbered", "representatives"),
    [
        ([1, 0, 1, 2], [0, 1, 0, 2], [0, 1, 3]),
        ([-1, 2, 0, -1, 1, 2], [-1, 0, 1, -1, 2, 0], [1, 2, 4]),
        ([0, 0, 0], [0, 0, 0], [0]),
        ([2, 1, 0], [0, 1, 2], [0, 1, 2]),
    ],
)
def test_labels_are_numbered_by_first_channel(labels, numbered, representatives):
    projection = Projection(torch.tensor(labels))
    assert projection.labels.tolist() == numbered
    assert projection.representatives.tolist() == representatives
    assert projection.counts.sum() == sum(label >= 0 for label in labels)
    assert projection.is_identity == (numbered == list(range(len(labels))))


@pytest.mark.parametrize(
    ("labels", "match"),
    [([-1, -1], "at least one"), ([0, 2, 2], "every number from 0 to 2"), ([[0, 1]], r"\(C,\)"), ([], "at least one")],
)
def test_labels_that_make_no_sense(labels, match):
    with pytest.raises(ValueError, match=match):
        Projection(torch.tensor(labels, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    ones = torch.ones(5000, 1, dtype=dtype)
    projection = Projection(torch.zeros(5000, dtype=torch.int64))
    assert merge(ones, projection, "sum").item() == torch.tensor(5000.0).to(dtype)
    assert merge(ones, projection, "mean").dtype == dtype


@pytest.mark.parametrize("features", ["writers", "writers+readers"])
@pytest.mark.parametrize("prune", ["l1", "l2", "random"])
def test_theorem(trained, features, prune):
    """Theorem 1 of "Cut Less, Fold More", for every group and every size of a trained network."""
    tensors = dict(trained.state_dict())
    better, total = 0, 0
    for group in channel_groups(trained, torch.zeros(1, 3, 8, 8)):
        weights = GroupWeights(group, tensors, features, "none", norm=False)
        sizes = range(1, group.size + 1)
        folded, pruned = METHODS["fold"](weights, sizes), METHODS[prune](weights, sizes)
        for k in sizes:
            assert len(folded[k].counts) == len(pruned[k].counts) == k
            assert (folded[k].labels >= 0).all()
        for k in sizes[:-1]:
            fold, removed = weights.error(folded[k + 1]), weights.error(pruned[k])
            assert fold <= removed * (1 + 1e-9) + 1e-7, (group.name, k)  # the error of no change is 1e-8 in float64
            better, total = better + (fold < 0.999 * removed), total + 1
    assert better > 0.9 * total


def test_special_folding_beats_the_pruning_it_stands_for(trained):
    """Any pruning, not only one by magnitude, loses no less than merging its dropped channels into one more channel."""
    group = channel_groups(trained, torch.zeros(1, 3, 8, 8))[0]
    weights = GroupWeights(group, dict(trained.state_dict()))
    for seed in range(20):
        labels = METHODS["random"](GroupWeights(group, weights.tensors, seed=seed), [2])[2].labels
        special = Projection(torch.where(labels < 0, 2, labels))
        assert weights.error(special) <= weights.error(Projection(labels))
