"""Exact duplicates fold without loss, in clusters of uneven size, on every architecture."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from toy_nets import NETS, Net, duplicated, frozen_reason, head, names, picture, randomise_, relative_error

from pipeline.compression import Projection, channel_groups, compress
from pipeline.compression.merge import tensors as engine
from pipeline.compression.merge.modules import apply


@pytest.mark.parametrize("norm_scale", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_duplicates_fold_without_loss(name, norm_scale):
    model, example, groups, projections = duplicated(name)
    assert len({int(n) for p in projections for n in p.counts}) > 1
    with torch.no_grad():
        smaller = apply(model, groups, projections, norm_scale)
        assert relative_error(model(example), smaller(example)) < 1e-5
    assert all(len(p.counts) < len(p.labels) for p in projections)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "conv_norms", "applied_twice", "dense"])
def test_gains_of_both_signs_and_zero(name):
    model, example, groups, projections = duplicated(name, negative_gains=True)
    gains = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.affine])
    assert (gains < 0).any()
    assert (gains == 0).any()
    assert (gains > 0).any()
    with torch.no_grad():
        assert relative_error(model(example), apply(model, groups, projections)(example)) < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "vit", "mobile"])
def test_float32(name):
    model, example, groups, projections = duplicated(name, torch.float32)
    with torch.no_grad():
        assert relative_error(model(example), apply(model, groups, projections)(example)) < 1e-4


@pytest.mark.parametrize("features", ["writers", "writers+readers"])
@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "cifar_resnet", "vit", "vgg", "transposed", "mobile"])
def test_fold_finds_the_clusters_by_itself(name, features):
    """Channels of one cluster have the same writers, and they merge without loss whatever reads them."""
    model, example, groups, _ = duplicated(name)
    smaller, report = compress(model, example, "fold", 0.5, features=features)
    assert [g.after for g in report.groups] == [max(1, g.size // 2) for g in groups]
    assert max(g.error for g in report.groups) < 1e-6
    with torch.no_grad():
        assert relative_error(model(example), smaller(example)) < 1e-5


def test_the_swap_of_mean_and_sum_would_be_noticed(monkeypatch):
    """The study's code sums the writers and averages the readers."""
    model, example, groups, projections = duplicated("vgg")
    edited = engine._edited
    monkeypatch.setattr(
        engine,
        "_edited",
        lambda t, d, edits, *rest: edited(t, d, [replace(e, is_write=not e.is_write) for e in edits], *rest),
    )
    with torch.no_grad():
        assert relative_error(model(example), apply(model, groups, projections, norm_scale=False)(example)) > 0.01


def test_pruned_channels_of_zero_weight_were_not_needed():
    model, example, groups, _ = duplicated("vgg")
    tensors = model.state_dict()
    projections = []
    for group in groups:
        labels = torch.arange(group.size)
        labels[::3] = -1
        kept = labels >= 0
        labels[kept] = torch.arange(int(kept.sum()))
        projections.append(Projection(labels))
        for read in group.reads:
            tensors[read.tensor].index_fill_(read.axis, read.index[~kept].reshape(-1), 0)
    with torch.no_grad():
        assert relative_error(model(example), apply(model, groups, projections)(example)) < 1e-9


def test_what_a_network_has_for_groups():
    """The coupling map by hand, where it is short."""
    build, example = NETS["cifar_resnet"]
    groups = channel_groups(build(), example)
    assert [(g.name, g.size) for g in groups] == [
        ("layer1.0.conv1", 16), ("layer2.0.conv1", 32), ("layer3.0.conv1", 64)
    ]  # fmt: skip
    assert "padded" in frozen_reason(groups, "layer1.0.conv2.weight")

    build, example = NETS["resnet18"]
    groups = {g.name: g for g in channel_groups(build(), example)}
    assert len(groups) == 12  # 8 in the blocks, 4 streams
    assert names(groups["layer1.0.conv1"].writes) == {
        "layer1.0.conv1.weight", *(f"layer1.0.bn1.{t}" for t in ("weight", "bias", "running_mean", "running_var"))
    }  # fmt: skip
    assert names(groups["layer1.0.conv1"].reads) == {"layer1.0.conv2.weight"}
    assert names(groups["conv1"].reads) == {
        "layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight", "layer2.0.shortcut.0.weight"
    }  # fmt: skip

    found = {name: channel_groups(NETS[name][0](), NETS[name][1]) for name in ("vit", "mobile", "tied", "shuffled")}
    assert [g.name for g in found["vit"]] == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    assert [(g.name, g.size) for g in found["mobile"]] == [("expand", 12), ("down", 6)]
    assert [(g.name, g.size) for g in found["tied"]] == [("5", 12)]
    assert "tied weight both writes and reads" in frozen_reason(found["tied"], "0.weight")
    assert [(g.name, g.size) for g in found["shuffled"]] == [("conv1", 6), ("conv2", 5), ("conv3", 7), ("conv4", 9)]

    build, example = NETS["vgg"]
    flat = channel_groups(build(), example)[1]
    assert [(a.tensor, a.axis, tuple(a.index.shape)) for a in flat.reads] == [("8.weight", 1, (6, 4))]


def test_a_norm_knows_its_writer_only_where_they_are_one_map():
    norms = {n.weight: n.writer for g in duplicated("applied_twice")[2] for n in g.norms}
    assert norms["norm1.weight"] is norms["norm2.weight"] is norms["shared.weight"] is None
    build, example = NETS["conv_norms"]
    norms = {n.weight: n for g in channel_groups(build(), example) for n in g.norms}
    assert (norms["norm1.weight"].writer, norms["norm1.weight"].writer_bias) == ("conv1.weight", "conv1.bias")
    assert norms["norm3.weight"].writer is None
    assert norms["norm3.weight"].eps == pytest.approx(0.1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("negative", [True, False])
def test_a_merged_norm_is_the_mean_of_the_affine_maps(negative, bias):
    """Without an activation between, folding is exact if the linear reader is equal for all channels of a cluster."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1))
    randomise_(net, negative_gains=negative).double()
    example = picture().double()
    groups = channel_groups(net, example)
    projection = Projection(torch.tensor([0, 1, 0, 1, 1, 2]))
    with torch.no_grad():
        net[2].weight.copy_(net[2].weight[:, projection.representatives[projection.labels]])
        assert relative_error(net(example), apply(net, groups, [projection])(example)) < 1e-9
        assert relative_error(net(example), apply(net, groups, [projection], norm_scale=False)(example)) > 1e-3


def test_one_convolution_behind_two_norms_keeps_both_maps():
    """The scale of neither norm may move into the weight, which would change the input of the other norm."""
    net = Net(
        lambda n, x: head(n, torch.cat([n.norm1(n.conv(x)), n.norm2(n.conv(x.flip(2)))], 1)),
        conv=nn.Conv2d(3, 6, 3), norm1=nn.BatchNorm2d(6), norm2=nn.BatchNorm2d(6), head=nn.Linear(12, 4),
    )  # fmt: skip
    randomise_(net).double()
    example = picture().double()
    groups = channel_groups(net, example)
    projection = Projection(torch.tensor([0, 1, 0, 1, 1, 2]))
    with torch.no_grad():
        smaller = apply(net, groups, [projection])
        assert torch.allclose(smaller.conv.weight[0], net.conv.weight[[0, 2]].mean(0))
        s1 = [(n.norm1.weight / (n.norm1.running_var + n.norm1.eps).sqrt()) for n in (net, smaller)]
        assert torch.allclose(s1[1][0], s1[0][[0, 2]].mean())
