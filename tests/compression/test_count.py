"""Parameters and MACs: every shortcut of a count gives what a run of the network counts."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy_nets import NETS, Net, picture, randomise_, torch_attention

from pipeline.compression import compress, compressions
from pipeline.compression.copies import deep_copy
from pipeline.compression.group import DEFAULT_PARTS
from pipeline.compression.sizes import count as module
from pipeline.compression.sizes.count import Counted, macs, places
from pipeline.models import build_model

RATIOS = [0.1, 0.25, 0.5, 0.75, 0.9]
WIDTH, HEAD = ("hidden", "residual", "width"), ("hidden", "residual", "head")


def run_count(model: nn.Module, example: torch.Tensor) -> int:
    """The MACs that torch counts while the network really runs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(example)
    return counter.get_total_flops() // 2


def grouped() -> nn.Module:
    """A convolution of two groups, which is not depthwise, and a layer that is called by keyword."""

    def forward(net, x):
        x = net.out(net.two(torch.relu(net.stem(x))).relu())
        return net.head(input=x.mean((2, 3)))

    return Net(
        forward, stem=nn.Conv2d(3, 8, 3), two=nn.Conv2d(8, 12, 3, groups=2), out=nn.Conv2d(12, 10, 1),
        head=nn.Linear(10, 4),
    )  # fmt: skip


def mixer() -> nn.Module:
    """Channels of one layer are the places of another, so the formula is wrong as soon as there are fewer."""

    def forward(net, x):
        x = net.stem(x).flatten(2)
        x = x + net.tokens(x)
        return net.head(torch.relu(net.channels(x.transpose(1, 2))).mean(1))

    return Net(
        forward, stem=nn.Conv2d(3, 12, 4, stride=4), tokens=nn.Linear(4, 4), channels=nn.Linear(12, 8),
        head=nn.Linear(8, 5),
    )  # fmt: skip


MORE = {
    "grouped": (grouped, picture()),
    "mixer": (mixer, picture()),
    "timm resnet": (lambda: build_model("timm", 5, 3, architecture="resnet10t"), picture(1, size=32)),
    "torchvision": (lambda: build_model("torchvision", 5, 3, architecture="mobilenet_v3_small"), picture(1, size=32)),
}


@pytest.mark.parametrize(("name", "parts"), [*((name, DEFAULT_PARTS) for name in [*NETS, *MORE]), ("vit", WIDTH)])
def test_reports_count_what_a_run_counts(name, parts):
    build, example = {**NETS, **MORE}[name]
    net, counted = build().eval(), Counted()
    assert macs(net, example, counted) == run_count(net, example)
    for smaller, report in compressions(net, example, "l1", RATIOS, parts=parts, counted=counted):
        assert report.macs_after == run_count(smaller, example) // len(example), report.ratio


@pytest.mark.parametrize("parts", [DEFAULT_PARTS, WIDTH, HEAD])
def test_attention_of_torch_counts_what_it_counted_on_shapes(parts):
    """The fast path of torch's attention fuses operations that are counted; only a real run takes it."""
    net, example = torch_attention().eval(), torch.randn(2, 5, 16)
    for smaller, report in compressions(net, example, "l1", RATIOS, parts=parts):
        assert report.macs_after == module._passed(smaller, example, "meta")[0] // len(example)


@pytest.mark.parametrize(("name", "runs"), [("resnet18", 2), ("mobile", 2), ("vit", 2), ("grouped", 2)])
def test_narrower_networks_need_no_run(name, runs, monkeypatch):
    """Only the network itself and the first smaller one, which proves the formula, are run."""
    build, example = {**NETS, **MORE}[name]
    passed, calls, net = module._passed, [], randomise_(build())
    monkeypatch.setattr(module, "_passed", lambda *given: calls.append(1) or passed(*given))
    counted = Counted()
    for method in ("fold", "l1"):
        list(compressions(net, example, method, [0.25, 0.5, 0.75], counted=counted))
    assert len(calls) == runs


def test_a_network_whose_places_follow_its_widths_is_run():
    net = mixer().eval()
    counted, smaller = Counted(), mixer().eval()
    smaller.stem, smaller.channels = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 8)
    assert [macs(m, picture(), counted) for m in (net, smaller)] == [run_count(m, picture()) for m in (net, smaller)]
    smaller.stem, smaller.channels = nn.Conv2d(3, 5, 4, stride=4), nn.Linear(5, 8)
    assert macs(smaller, picture(), counted) == run_count(smaller, picture())


def test_wider_networks_and_other_inputs_are_run():
    counted = Counted()
    for width in (8, 6, 10, 7, 9, 4):
        net = build_model("resnet18", 3, 3, width=width).eval()
        for example in (picture(1), picture(2), picture(1, size=16)):
            assert macs(net, example, counted) == run_count(net, example)


def test_macs_of_a_norm_that_is_called_by_keyword_are_counted_on_shapes():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(input=self.conv(x))

    counted = Counted()
    assert macs(Keyword(), torch.zeros(1, 3, 8, 8), counted) == 6 * 6 * 4 * 27
    assert len(counted.found) == 1, "not by a real pass, which is kept for no other network"


def test_a_forward_that_looks_at_values_is_run():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x) if float(x.sum()) > 0 else x

    counted = Counted()
    assert macs(Looks(), torch.ones(2, 4), counted) == 2 * 12
    assert places(Looks(), torch.ones(2, 4)) == {"linear.weight": 2}
    assert not counted.found


def test_macs_are_counted_once_for_all_methods(monkeypatch):
    net, example, ratios = build_model("resnet18", 3, 3, width=4).eval(), torch.zeros(1, 3, 32, 32), [0.25, 0.5]
    counted = Counted()
    found = {
        method: [c.report.macs_after for c in compressions(net, example, method, ratios, counted=counted)]
        for method in ("fold", "l1", "l2")
    }
    assert (
        found["fold"]
        == found["l1"]
        == found["l2"]
        == [macs(c.model, example) for c in compress(net, example, "l1", ratios)]
    )
    assert macs(net, torch.zeros(2, 3, 32, 32), counted) == 2 * macs(net, example, counted)


def test_a_copy_shares_what_the_original_shares():
    """Tensors, modules, empty dicts and sets stay shared within the copy; original and copy share nothing."""
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net.again, net[2].weight = net[0], net[0].weight
    net.empty = net.same = OrderedDict()
    net.words, net[1].seen = {"a": [1]}, set()
    copied = deep_copy(net, {})
    assert copied.again is copied[0]
    assert copied[2].weight is copied[0].weight is not net[0].weight
    assert copied.empty is copied.same is not net.empty
    assert copied.words == net.words
    assert copied.words["a"] is not net.words["a"]
    copied[1].seen.add(1)
    copied[0].register_forward_hook(lambda *_: None)
    assert not net[1].seen
    assert not net[0]._forward_hooks
    assert not copied[1]._forward_hooks, "each module has hooks of its own"


class Counts(nn.Linear):
    """A layer that says itself how it is copied."""

    def __deepcopy__(self, memo):
        copied = Counts(self.in_features, self.out_features)
        copied.copies = getattr(self, "copies", 0) + 1
        return copied


class Forgets(nn.Linear):
    def __getstate__(self):
        return {name: value for name, value in super().__getstate__().items() if name != "cache"}


def test_modules_that_say_how_they_are_copied_are_copied_so():
    net = nn.Sequential(nn.Linear(2, 2), Counts(2, 2), nn.Sequential(Forgets(2, 2)))
    net[2][0].cache, net.others = [1], [net[0], {"last": net[2][0]}]
    copied = deep_copy(net, {})
    assert copied[1].copies == 1
    assert not hasattr(copied[2][0], "cache")
    assert copied.others[0] is copied[0]
    assert copied.others[1]["last"] is copied[2][0] is not net[2][0]
    assert [type(module) for module in copied.modules()] == [type(module) for module in net.modules()]


def test_given_copies_are_taken():
    """Tensors and modules of the memo stand in the copy, under all their names."""
    net, other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ReLU()
    net[1].weight = net[0].weight
    weight = nn.Parameter(torch.ones(2, 2))
    copied = deep_copy(nn.Sequential(net, net[0]), {id(net[0].weight): weight, id(net): other})
    assert copied[0] is other
    assert copied[1].weight is weight
    assert copied[1].bias is not net[0].bias
