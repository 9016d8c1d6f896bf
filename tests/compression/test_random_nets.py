"""In random networks the tracer finds groups that are right, or it freezes channels: it is never wrong."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from random_nets import CLEAR, CLOUDED, TOKENS, RandomNet, RandomTokenNet
from toy_nets import picture, randomise_, vgg

from benchmarks.coverage import EXACT, WITH_HEADS, WITH_WIDTH, fold_error, prune_error
from pipeline.compression import ChannelGroups, channel_groups, compress
from pipeline.compression.group import DEFAULT_PARTS
from pipeline.compression.trace import graph

PARTS = (DEFAULT_PARTS, WITH_WIDTH, WITH_HEADS)


def of_pictures(seed, steps=(*CLEAR, *CLOUDED)):
    example = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return RandomNet(seed, steps).double().eval(), example


def of_tokens(seed):
    ids = torch.randint(11, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    return RandomTokenNet(seed).double().eval(), ids


def checked(model, example, seed):
    """The parts of the groups found, after folding and pruning them by other draws than the tracer's own."""
    groups = channel_groups(model, example[: 1 + seed % 2], random.Random(seed).choice(PARTS))
    for draw in range(seed, seed + 2) if len(groups) else ():
        assert fold_error(random_weights(model, draw), example, groups, draw) < EXACT / 10, (seed, groups)
        error, _ = prune_error(random_weights(model, draw), example, groups, draw)
        assert error < EXACT / 10, (seed, groups)
    if len(groups):  # all groups at once, as they are compressed
        smaller, _ = compress(model, example, "l2", 0.5, groups=groups)
        assert smaller(example).shape == model(example).shape
    return {group.part for group in groups}


def random_weights(model, seed):
    """Random weights; for every other seed with gains of both signs and zero."""
    return randomise_(model, seed, negative_gains=seed % 2 == 1)


@pytest.mark.parametrize("seeds", [range(i, i + 7) for i in (0, 7, 14)], ids=str)
def test_of_pictures(seeds):
    found = [checked(*of_pictures(seed), seed) for seed in seeds]
    assert sum("hidden" in parts for parts in found) >= 0.8 * len(found)


@pytest.mark.parametrize("seeds", [range(i, i + 7) for i in (0, 7, 14)], ids=str)
def test_of_tokens(seeds):
    found = [checked(*of_tokens(seed), seed) for seed in seeds]
    assert sum(map(bool, found)) >= 0.5 * len(found)


@pytest.mark.parametrize("seeds", [range(100, 108)], ids=str)
def test_the_trace_is_right_by_itself_where_no_size_hides_in_python_numbers(seeds, monkeypatch):
    monkeypatch.setattr(graph, "verified", lambda model, args, kwargs, traced: traced)
    found = [checked(*of_pictures(seed, CLEAR), seed) for seed in seeds]
    assert sum(map(bool, found)) >= 0.8 * len(found)


@pytest.mark.parametrize("role", ["writes", "reads"])
def test_a_wrong_trace_would_be_noticed(role):
    """In one layer that reads or writes a group, the trace has the channels in another order."""
    model, example = vgg().double(), picture().double()
    right = channel_groups(model, example)
    first, *others = getattr(right[0], role)
    wrong = replace(right[0], **{role: (replace(first, index=first.index.roll(1, 0)), *others)})
    groups = ChannelGroups((wrong, *right.groups[1:]))
    assert fold_error(random_weights(model, 0), example, groups, 0) > 100 * EXACT
    assert prune_error(random_weights(model, 0), example, groups, 0)[0] > 100 * EXACT


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(i, i + 50) for i in range(1000, 1250, 50)], ids=str)
def test_many_of_pictures(seeds):
    for seed in seeds:
        checked(*of_pictures(seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(i, i + 50) for i in range(1000, 1250, 50)], ids=str)
def test_many_of_tokens(seeds):
    found = Counter(part for seed in seeds for part in checked(*of_tokens(seed), seed))
    assert found["width"] >= 3  # of some 17 networks that are asked for their widths
    assert found["head"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(i, i + 50) for i in range(2000, 2150, 50)], ids=str)
def test_many_without_the_check(seeds, monkeypatch):
    monkeypatch.setattr(graph, "verified", lambda model, args, kwargs, traced: traced)
    for seed in seeds:
        checked(*of_pictures(seed, CLEAR), seed)
