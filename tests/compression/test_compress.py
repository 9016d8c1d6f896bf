"""compress(): what it promises about the model it takes and the model it gives."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_nets import NETS, duplicated, mobile, picture, randomise_, relative_error, tied, vgg

from pipeline.compression import ChannelGroups, channel_groups, compress
from pipeline.compression.budget import channels_left
from pipeline.compression.checks import check_finite
from pipeline.compression.sizes.count import macs
from pipeline.models import build_model
from pipeline.tables import UserError

METHODS = ["fold", "l1", "l2", "random"]


@pytest.mark.parametrize(
    ("name", "method"),
    [("resnet18", "fold"), ("vit", "fold"), ("tied", "l2"), *(("mobile", method) for method in METHODS)],
)
def test_ratio_0_is_the_identity(name, method):
    build, example = NETS[name]
    model = randomise_(build())
    smaller, report = compress(model, example, method, 0.0)
    assert all(torch.equal(t, smaller.state_dict()[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(example), smaller(example))
    assert report.error == 0
    assert (report.params_before, report.macs_before) == (report.params_after, report.macs_after)


@pytest.mark.parametrize(("method", "training"), [("fold", True), ("fold", False), ("l2", True), ("random", True)])
def test_input_model_is_untouched(method, training):
    model = randomise_(mobile())
    model.train(training)
    model.norm.eval()  # modes may differ inside
    model.head.weight.requires_grad_(False)
    calls = []
    hooks = [model.register_forward_hook(lambda *_: None), model.depthwise.register_forward_pre_hook(lambda *_: None)]
    before = {n: (t, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state(), np.random.get_state()[1].copy()
    compress(model, picture(), method, 0.5)
    assert torch.equal(random[0], torch.get_rng_state())
    assert (random[1] == np.random.get_state()[1]).all()
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
        assert tensor.requires_grad == before[name][0].requires_grad
    assert not model.head.weight.requires_grad
    assert model.head.weight.grad is None
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (model, model.depthwise)] == [1, 1]
    assert not calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["resnet18", "vit", "vgg", "mobile", "transposed", "embedded"])
def test_smaller_model_is_an_ordinary_module(name):
    build, example = NETS[name]
    model = randomise_(build()).train()
    smaller, report = compress(model, example, "fold", 0.5)
    assert type(smaller) is type(model)
    assert all(m.training for m in smaller.modules())
    assert report.params_after == sum(p.numel() for p in smaller.parameters()) < report.params_before
    again = copy.deepcopy(smaller)
    again.load_state_dict(smaller.state_dict(), strict=True)
    smaller.eval(), again.eval()
    assert torch.equal(smaller(example), again(example))
    again.train()
    optimizer = torch.optim.SGD(again.parameters(), 0.1)
    again(example).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in again.parameters())
    optimizer.step()
    assert not torch.equal(smaller(example), again.eval()(example))
    assert all(p.is_leaf and p.is_contiguous() for p in smaller.parameters())


def test_layers_know_their_sizes():
    smaller = compress(randomise_(mobile()), picture(), "l2", 0.5).model
    assert (smaller.expand.out_channels, smaller.depthwise.in_channels, smaller.depthwise.groups) == (6, 6, 6)
    assert smaller.norm.num_features == smaller.down.in_channels == 6
    assert (smaller.wide.in_channels, smaller.wide.out_channels, smaller.wide.groups) == (6, 12, 6)
    assert smaller.head.in_features == 12
    smaller = compress(randomise_(NETS["transposed"][0]()), picture(), "l2", 0.5).model
    assert (smaller[3].in_channels, smaller[3].out_channels) == (4, 5)
    smaller = compress(randomise_(NETS["embedded"][0]()), NETS["embedded"][1], "l2", 0.5).model
    assert (smaller[0].embedding_dim, smaller[1].in_features, smaller[1].out_features) == (4, 4, 6)


def test_smaller_model_can_be_compressed_again():
    model = randomise_(mobile())
    once = compress(model, picture(), "l2", 0.5).model
    twice, report = compress(once, picture(), "l2", 0.5)
    assert twice.depthwise.groups == 3
    assert [g.before for g in report.groups] == [6, 3]
    assert twice(picture()).shape == (2, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, example, _, _ = duplicated("mobile", torch.float32)
    half = copy.deepcopy(model).to(dtype)
    smaller, report = compress(half, example.to(dtype), "fold", 0.5, features="writers")
    assert {p.dtype for p in smaller.parameters()} == {dtype}
    assert report.params_after < report.params_before
    with torch.no_grad():
        assert relative_error(model(example), smaller(example.to(dtype)).float()) < 0.05


def test_tied_weights_stay_tied():
    model = randomise_(tied())
    smaller = compress(model, NETS["tied"][1], "fold", 0.5).model
    assert smaller[3].weight is smaller[1].weight
    assert smaller[8].weight is smaller[0].weight
    assert smaller[5].out_features < model[5].out_features


def test_requires_grad_is_kept():
    model = vgg()
    model[0].weight.requires_grad_(False)
    smaller = compress(model, picture(), "l1", 0.5).model
    assert not smaller[0].weight.requires_grad
    assert smaller[0].bias.requires_grad


@pytest.mark.parametrize(("bad", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_weights_that_are_not_finite(bad, kind):
    model = vgg()
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0] = bad
    with pytest.raises(UserError, match=rf"4\.weight holds {kind}"):
        compress(model, picture())


def test_large_weights_whose_sum_overflows_are_finite():
    check_finite({"weight": torch.full((4,), 3e38)})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"method": "fodl"},
            r"unknown method 'fodl' \(did you mean 'fold'\?\); choose from: auto, bn_scale, fisher, fold",
        ),
        ({"ratio": 1.0}, "ratio 1.0 is out of range"),
        ({"ratio": -0.1}, "ratio -0.1 is out of range"),
        ({"ratio": [0.5, float("nan")]}, "ratio nan is out of range"),
        ({"refined": True}, "method 'fold' has no option 'refined'; it takes: .*refine"),
        ({"method": "l2", "refine": True}, "method 'l2' has no option 'refine'"),
        ({"method": "l2", "score": "last"}, "unknown score 'last'"),
        ({"features": "all"}, "unknown features 'all'"),
        ({"scale": "all"}, "unknown scale 'all'"),
    ],
)
def test_errors(arguments, match):
    with pytest.raises(UserError, match=match):
        compress(vgg(), picture(), **arguments)


def test_sequence_of_ratios_is_the_same_as_each():
    model = randomise_(vgg())
    for ratio, many in zip((0.2, 0.7), compress(model, picture(), "fold", (0.2, 0.7)), strict=True):
        one = compress(model, picture(), "fold", ratio)
        assert one.report == many.report
        assert all(torch.equal(t, many.model.state_dict()[n]) for n, t in one.model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_order_of_groups_does_not_matter(trained, method):
    example = torch.randn(1, 3, 8, 8)
    groups = channel_groups(trained, example)
    backwards = ChannelGroups(groups.groups[::-1], groups.frozen)
    first = compress(trained, example, method, 0.5, groups=groups).model.state_dict()
    second = compress(trained, example, method, 0.5, groups=backwards).model.state_dict()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("method", ["fold", "l1", "l2"])
def test_order_of_channels_does_not_matter(trained, method):
    example = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    model = copy.deepcopy(trained).double()
    groups = channel_groups(model, example)
    other = copy.deepcopy(model)
    tensors = other.state_dict()
    generator = torch.Generator().manual_seed(1)
    for group in groups:
        order = torch.randperm(group.size, generator=generator)
        for axis in (*group.writes, *group.reads):
            t = tensors[axis.tensor]
            moved = t.index_select(axis.axis, axis.index[order].reshape(-1))
            t.index_copy_(axis.axis, axis.index.reshape(-1), moved)
    with torch.no_grad():
        assert relative_error(model(example), other(example)) < 1e-12
        a, b = (compress(m, example, method, 0.5, groups=groups).model(example) for m in (model, other))
        assert relative_error(a, b) < 1e-5


def test_report_counts():
    model = vgg()  # 3 -> 8 -> 6 -> (4 pixels) 24 -> 12 -> 5
    smaller, report = compress(model, picture(batch=1), "l2", 0.5)

    def params(a, b, c):
        return (27 * a + a) + 2 * a + (9 * a * b + b) + (4 * b * c + c) + (5 * c + 5)

    def multiplications(a, b, c):
        return 64 * 27 * a + 16 * 9 * a * b + 4 * b * c + 5 * c

    assert (report.params_before, report.params_after) == (params(8, 6, 12), params(4, 3, 6))
    assert (report.macs_before, report.macs_after) == (multiplications(8, 6, 12), multiplications(4, 3, 6))
    assert sum(p.numel() for p in smaller.parameters()) == report.params_after
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(report.groups) + len(report.frozen)
    for group, line in zip(report.groups, lines[2:], strict=False):
        assert line.startswith(group.name)
        assert f"{group.before} -> {group.after}" in " ".join(line.split())
    assert f"{report.params_after:,}" in lines[0]
    assert 0 < report.error < 1


def test_fold_loses_less_than_pruning(trained, train_data):
    """Folding keeps closer to the trained network's answers than random pruning, without repair."""
    pictures = torch.cat([x for x, _ in train_data])
    with torch.no_grad():
        expected = F.softmax(trained(pictures), 1)
        lost = {
            m: float((F.softmax(compress(trained, pictures[:1], m, 0.25).model(pictures), 1) - expected).abs().sum())
            for m in ("fold", "random")
        }
    assert lost["fold"] < lost["random"]


def test_resnet18_of_the_study_halves_to_2_80_million():
    example = torch.zeros(1, 3, 32, 32)
    model = build_model("resnet18", 10, 3)
    smaller, report = compress(model, example, "l2", 0.5)
    assert report.params_before == 11_173_962
    assert report.params_after == sum(p.numel() for p in smaller.parameters())
    assert f"{report.params_after / 1e6:.2f}" == "2.80"
    assert macs(smaller, example) == report.macs_after < 0.27 * report.macs_before


def test_channels_last_stays_channels_last():
    """Convolutions of a network that trains channels-last are slower by a third in the other layout."""
    net = build_model("resnet18", classes=3, channels=3, width=4).to(memory_format=torch.channels_last).eval()
    smaller, _ = compress(net, torch.zeros(1, 3, 32, 32), "fold", 0.5)
    weights = {name: p for name, p in smaller.named_parameters() if p.dim() == 4}
    assert weights["layer1.0.conv1.weight"].shape[:2] == (2, 2)
    for name, weight in weights.items():
        assert weight.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize(
    ("size", "ratio", "left"), [(64, 0.5, 32), (64, 0.3, 48), (64, 0.9, 8), (20, 0.1, 16), (20, 0.0, 20), (5, 0.5, 5)]
)
def test_round_to_leaves_multiples(size, ratio, left):
    assert channels_left(size, ratio, 8) == left  # 20 is no multiple of 8, and stays where all channels stay


def test_round_to_reaches_the_network():
    build, example = NETS["resnet18"]
    _, plain = compress(build(), example, "fold", 0.3)
    smaller, report = compress(build(), example, "fold", 0.3, round_to=2)
    assert any(group.after % 2 for group in plain.groups)
    assert all(group.after % 2 == 0 for group in report.groups)
    assert smaller(example).shape == build()(example).shape
    with pytest.raises(UserError, match="round_to 0 must be a whole number of at least 1 channel"):
        compress(build(), example, "fold", 0.3, round_to=0)


def test_macs_are_of_one_sample_whatever_the_example_holds():
    model = NETS["vgg"][0]()
    one, eight = (compress(model, picture(batch), "l1", 0.5)[1] for batch in (1, 8))
    assert (one.macs_before, one.macs_after) == (eight.macs_before, eight.macs_after)
    assert one.macs_after < one.macs_before
