"""Pruning gives the networks of Torch-Pruning (Fang et al. 2023, arXiv:2301.12900), an independent implementation."""

import copy
import warnings

import pytest
import torch
from toy_nets import picture, randomise_, relative_error, vgg

from pipeline.compression import channel_groups, compress
from pipeline.compression.choose.methods import keep_largest
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.merge.modules import apply
from pipeline.models import build_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tp = pytest.importorskip("torch_pruning")


def quietly(function, *args, **options):
    """Call the function without the warnings that the peer raises about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def peer(model, example, p, ignored):
    """The model pruned by half by the Lp norm of the first weight of each group, and what `first` was."""
    model = copy.deepcopy(model)
    convolutions = [torch.nn.modules.conv._ConvNd, torch.nn.Linear]
    importance = tp.importance.MagnitudeImportance(
        p=p, group_reduction="first", normalizer=None, target_types=convolutions
    )
    pruner = quietly(
        tp.pruner.MagnitudePruner, model, example, importance, pruning_ratio=0.5, global_pruning=False,
        ignored_layers=[model.get_submodule(ignored)],
    )  # fmt: skip
    names = {module: name for name, module in model.named_modules()}
    roots = {names[group[0].dep.target.module] for group in pruner.DG.get_all_groups([model.get_submodule(ignored)])}
    quietly(pruner.step)
    return model.eval(), roots


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_pruning_is_that_of_the_peer(p):
    """On a chain every group has one weight that writes it, so there is no choice of the first."""
    model, example = randomise_(vgg()), picture()
    theirs, _ = peer(model, example, p, "11")
    ours = compress(model, example, f"l{p}", 0.5).model
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    with torch.no_grad():
        assert relative_error(theirs(example), ours(example)) < 1e-6


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
@pytest.mark.parametrize("p", [1, 2])
def test_residual_networks_are_those_of_the_peer(name, p):
    """Several weights write a residual stream, and the test scores by the one that the peer scores by.

    Our l1 and l2 take the first in the order of the network, the peer another (in ResNet18 the shortcut's), which no
    option of it changes.
    """
    model, example = randomise_(build_model(name, 10, 3, width=8)), picture()
    theirs, roots = peer(model, example, p, "linear")
    groups, projections = channel_groups(model, example), []
    for group in groups:
        (first,) = (w for w in group.writes if w.tensor.removesuffix(".weight") in roots)
        scores = GroupWeights(group, model.state_dict()).rows(first).abs().pow(p).sum(1)
        projections.append(keep_largest(scores, [group.size // 2])[group.size // 2])
    assert len(groups) == len(roots)
    ours = apply(model, groups, projections)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    with torch.no_grad():
        assert relative_error(theirs(example), ours(example)) < 1e-6


def test_groups_are_those_of_the_peer():
    """Our groups are written by the same layers as the peer's."""
    model, example = randomise_(build_model("resnet18", 10, 3, width=8)), picture()
    names = {module: name for name, module in model.named_modules()}
    graph = quietly(tp.DependencyGraph().build_dependency, model, example)
    theirs = {
        frozenset(names[d.target.module] for d, _ in group if "out" in d.handler.__name__ and d.target.module in names)
        for group in graph.get_all_groups(ignored_layers=[model.linear])
    }
    ours = {frozenset(w.tensor.rpartition(".")[0] for w in g.writes) for g in channel_groups(model, example)}
    assert ours == theirs
