"""A certificate's bounds are the least errors there are, hold for every method that promises it, and find a lie."""

import itertools
import json
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch
from toy_nets import NETS, randomise_

from pipeline.compression import channel_groups, compress
from pipeline.compression.certify import (
    Certificate,
    certificates,
    contradictions,
    differences,
    found,
    merged_tensors,
    stated,
    unlike,
)
from pipeline.compression.merge.modules import named_tensors
from pipeline.compression.merge.projection import Projection, reconstruction_error
from pipeline.compression.plan import history, told
from pipeline.compression.report import step_of


def rows(channels=6, features=5, seed=0):
    return torch.randn(channels, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def traced(name):
    """(network, its example, its groups)"""
    build, example = NETS[name]
    net = randomise_(build())
    return net, example, channel_groups(net, example)


@cache
def lines_of(method, name="resnet18", **options):
    net, example, groups = traced(name)
    return stated(told([step_of(compress(net, example, method, 0.5, groups=groups, **options).report)])[0])


@pytest.mark.parametrize("k", [1, 3, 6])
def test_no_pruning_of_all_that_there_are_is_below_the_bound(k):
    w = rows()
    gram, errors = w @ w.T, []
    for kept in itertools.combinations(range(6), k):
        labels = torch.full((6,), -1)
        labels[list(kept)] = torch.arange(k)
        errors.append(reconstruction_error(gram, Projection(labels)))
    assert certificates(gram, [k])[k].pruned == pytest.approx(min(errors), abs=1e-9)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_bound_of_projections_is_that_of_the_truncated_svd(k):
    w = rows()
    u, s, v = np.linalg.svd(w.numpy(), full_matrices=False)
    nearest = (u[:, :k] * s[:k]) @ v[:k]
    expected = np.linalg.norm(w.numpy() - nearest) / np.linalg.norm(w.numpy())
    assert certificates(w @ w.T, [k])[k].svd == pytest.approx(expected, abs=1e-7)


def test_bounds_fall_with_the_rank_and_end_at_nothing():
    w = rows()
    found = certificates(w @ w.T, range(1, 7))
    for k in range(1, 6):
        assert found[k].pruned > found[k + 1].pruned == found[min(k + 2, 6)].pruned_below or k == 5
        assert found[k].svd >= found[k + 1].svd
    assert found[1].pruned_below == 1
    assert (found[6].pruned, found[6].svd) == (0, 0)


def test_a_group_of_zeros_has_nothing_to_lose():
    assert certificates(torch.zeros(3, 3), [2])[2] == Certificate(0, 0, 0)


@pytest.mark.parametrize("net", ["resnet18", "vit", "vgg"])
def test_mix_beats_every_pruning_at_the_same_rank_and_folding_with_one_channel_less(net):
    assert all(line.holds and line.holds_below for line in lines_of("mix", net))
    assert all(line.holds_below for line in lines_of("fold", net))


def test_a_pruning_that_looks_elsewhere_does_not_hold():
    lines = lines_of("random")
    assert all(line.certificate is not None for line in lines)
    assert not any(line.holds for line in lines)


def test_pruning_by_the_features_themselves_is_the_bound():
    """With the group's score and unscaled features, l2 drops the rows of least norm."""
    for line in lines_of("l2", score="group", scale="none"):
        assert line.error == pytest.approx(line.certificate.pruned, abs=1e-9)
        assert line.holds


@pytest.mark.parametrize("method", ["fold", "mix", "special", "kmeans", "l1", "random_fold"])
def test_no_method_is_below_the_bound_of_projections(method):
    for line in lines_of(method):
        assert line.certificate.svd <= line.error + 1e-9
        assert list(contradictions(line)) == []


def test_a_report_holds_no_certificate_where_none_is_asked_for():
    assert [line.certificate for line in lines_of("fold", certify=False)] == [None] * len(lines_of("fold"))


def test_certificates_are_numbers_and_take_little_room():
    net, example, groups = traced("resnet18")
    step = step_of(compress(net, example, "fold", 0.5, groups=groups).report)
    sizes = [len(json.dumps(of["certificate"])) for of in step.about["groups"].values()]
    assert max(sizes) < 120


def lie(line, **changes):
    bounds = {key: value for key, value in changes.items() if key in asdict(line.certificate)}
    rest = {key: value for key, value in changes.items() if key not in bounds}
    return replace(line, certificate=replace(line.certificate, **bounds), **rest)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"after": 3}, "its labels keep 2 channels, and it states 3"),
        ({"before": 5}, "it has labels for 4 channels of 5"),
        ({"labels": (0, 0, 2, 2)}, "its labels are no projection"),
        ({"labels": (-1,) * 4}, "its labels are no projection"),
        ({"svd": 0.99}, "svd 0.99 is above pruned"),
        ({"pruned_below": 0.0}, "is above pruned_below 0"),
        ({"pruned_below": 1.5}, "pruned_below 1.5 is above 1 1"),
        ({"error": 0.001}, "its error 0.001 is below"),
        ({"error": float("nan")}, "its error nan is below"),
        ({"labels": (0, 1, -1, -1), "svd": 0.0, "error": 0.01}, "it is a pruning, and its error 0.01 is below"),
    ],
)
def test_a_line_that_contradicts_itself_is_found(changes, why):
    line = lines_of("fold")[0]
    assert (line.before, line.after) == (4, 2)
    said = list(contradictions(lie(line, **changes)))
    assert any(why in text for text in said), said


@pytest.fixture(scope="module")
def folded():
    """(network at full size, groups, a folding of it as a step in JSON values, the smaller network)"""
    net, example, groups = traced("resnet18")
    smaller = compress(net, example, "fold", 0.5, groups=groups).model
    return net, groups, told(history(smaller))[0], smaller


def test_the_weights_confirm_every_number(folded):
    net, groups, step, _ = folded
    recomputed = found(step, net, groups)
    for line in stated(step):
        assert list(differences(line, recomputed[line.name])) == []


@pytest.mark.parametrize("name", ["error", "pruned", "pruned_below", "svd"])
def test_the_weights_contradict_a_number_that_was_changed(folded, name):
    net, groups, step, _ = folded
    recomputed = found(step, net, groups)
    line = stated(step)[0]
    value = getattr(line, name, None) or asdict(line.certificate)[name]
    (said,) = differences(lie(line, **{name: value * 0.99}), recomputed[line.name])
    assert said.startswith(f"{name} is stated as")


def test_other_weights_contradict_the_file(folded):
    _, groups, step, _ = folded
    other = randomise_(NETS["resnet18"][0](), seed=5).eval()
    recomputed = found(step, other, groups)
    assert all(list(differences(line, recomputed[line.name])) for line in stated(step))


def test_another_networks_groups_are_named(folded):
    step = folded[2]
    net, _, groups = traced("vgg")
    said = found(step, net, groups)
    assert {said[line.name] for line in stated(step)} == {"the network has no such group"}


def test_the_tensors_of_the_file_are_those_that_the_labels_give(folded):
    net, groups, step, smaller = folded
    expected, own = merged_tensors(step, [], net, groups), named_tensors(smaller)
    assert expected.keys() == own.keys()
    assert unlike(expected, own) == []
    changed = {**own, "conv1.weight": own["conv1.weight"] * 1.001}
    assert unlike(expected, changed) == ["conv1.weight"]
    assert unlike(expected, {name: t for name, t in own.items() if name != "conv1.weight"}) == ["conv1.weight"]


def test_only_what_labels_decide_is_compared(folded):
    net, groups, step, _ = folded
    repaired = merged_tensors(step, ["repair"], net, groups)
    assert repaired
    assert not any("running" in name for name in repaired)
    assert merged_tensors(step, ["repair", "tune"], net, groups) is None
    assert merged_tensors({**step, "stage": "fold+synthetic"}, [], net, groups) is None
