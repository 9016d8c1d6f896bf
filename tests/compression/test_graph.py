"""The tracer: groups that it finds, and channels that it freezes."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_nets import Net, between, fold_error, frozen_reason, picture, randomise_, uneven_projections

from pipeline.compression import channel_groups, compress
from pipeline.compression.merge.modules import apply
from pipeline.tables import UserError


@torch.library.custom_op("toy::relu", mutates_args=())
def foreign_relu(x: torch.Tensor) -> torch.Tensor:
    """An operation with the name of a known one, which mixes channels."""
    return x.flip(1).clamp(min=0).cumsum(1)


@foreign_relu.register_fake
def _(x):
    return torch.empty_like(x)


def response_norm(net, x):
    """ConvNeXt-V2's: divided by a mean over channels, which merging equal ones would change."""
    size = x.norm(dim=(2, 3), keepdim=True)
    return x * size / size.mean(1, keepdim=True)


def write_in_place(net, x):
    y = torch.zeros_like(x)
    y[:, :4] = x[:, 4:]
    return y


FREEZES = {
    "cumsum": (lambda n, x: x.cumsum(1), {}),
    "softmax": (lambda n, x: x.softmax(1), {}),
    "sort": (lambda n, x: x.sort(1).values, {}),
    "toy::relu": (lambda n, x: foreign_relu(x), {}),
    "global response norm": (response_norm, {}),
    "grid_sampler": (lambda n, x: F.grid_sample(x, x[:, :2].movedim(1, -1), align_corners=False), {}),
    "max": (lambda n, x: x + x.max(1, keepdim=True).values, {}),
    "std": (lambda n, x: x / x.std(1, keepdim=True), {}),
    "layer_norm": (lambda n, x: n.norm(x.movedim(1, -1)).movedim(-1, 1), {"norm": nn.LayerNorm(8)}),
    "rms_norm": (lambda n, x: n.norm(x.movedim(1, -1)).movedim(-1, 1), {"norm": nn.RMSNorm(8)}),
    "einsum": (lambda n, x: torch.einsum("bchw,cd->bdhw", x, n.mix), {"mix": nn.Parameter(torch.randn(8, 8))}),
    "slice": (lambda n, x: x[:, :4].repeat(1, 2, 1, 1), {}),
    "pad after chunk": (lambda n, x: F.pad(operator.mul(*x.chunk(2, 1)), (0, 0, 0, 0, 0, 4)), {}),
    "unbind": (lambda n, x: torch.stack(x.unbind(1)[::-1], 1), {}),
    "roll": (lambda n, x: x.roll(3, 1), {}),
    "split": (lambda n, x: torch.cat(x.split([3, 5], 1)[::-1], 1), {}),
    "pad": (lambda n, x: F.pad(x[:, 1:], (0, 0, 0, 0, 0, 1)), {}),
    "mean": (lambda n, x: x - x.mean(1, keepdim=True), {}),
    "sum": (lambda n, x: x + x.sum([]), {}),
    "copy": (write_in_place, {}),
    "computed": (lambda n, x: F.conv2d(x, n.mix * 2), {"mix": nn.Parameter(torch.randn(8, 8, 1, 1))}),
    "constant": (lambda n, x: x * torch.arange(8.0, dtype=x.dtype).view(8, 1, 1), {}),
    "counts": (lambda n, x: x * n.mask.view(8, 1, 1), {"mask": torch.arange(8)}),
    "several axes": (lambda n, x: x + n.table, {"table": nn.Parameter(torch.randn(8, 4, 4))}),
    "literal": (lambda n, x: x.reshape(-1, 8, 16).relu().view(len(x), 8, 4, 4), {}),
    "literal batch": (lambda n, x: x.reshape(-1, 4 * 8, 4).relu().reshape(-1, 8, 4, 4), {}),
    "shuffle": (lambda n, x: F.channel_shuffle(x, 2), {}),
}


@pytest.mark.parametrize("name", FREEZES)
def test_what_is_not_known_freezes(name):
    step, parts = FREEZES[name]
    model = randomise_(between(step, **parts)).double()
    example = picture().double()
    groups = channel_groups(model, example)
    assert "conv1" in [g.name for g in groups]  # the rest of the network is as compressible as before
    reason = frozen_reason(groups, "conv2.weight")
    if name not in ("several axes",):  # there conv2 is rightly coupled to the table's first axis
        assert "conv2" not in [g.name for g in groups]
        assert reason
    if "_" in name or name in ("cumsum", "softmax", "sort", "toy::relu", "slice", "roll", "split"):
        assert name in reason
    smaller, report = compress(model, example, "fold", 0.5)
    assert [g.name for g in report.groups] == [g.name for g in groups]
    assert all(str(f) in str(report) for f in groups.frozen)
    assert smaller(example).shape == (2, 4)
    assert fold_error(model, example, groups, seed=3) < 1e-5


PASSES = {
    "two of one": lambda n, x: x + x,
    "numbers": lambda n, x: (1 - x) / 2 + 2**x,
    "aliases": lambda n, x: torch.multiply(torch.absolute(x).clip(max=3), 2).swapaxes(1, 2).moveaxis(1, 2),
    "in place": lambda n, x: x.relu_().mul_(2).add_(x.sigmoid()),
    "max pool": lambda n, x: F.adaptive_max_pool2d(F.max_pool2d(x, 1), 4),
    "dtype": lambda n, x: x.float().to(x.dtype),
    "type of another": lambda n, x: x.type_as(n.head.weight),
    "gate": lambda n, x: x * torch.sigmoid(x.amax((2, 3), keepdim=True)),
    "interleave": lambda n, x: torch.stack([x, x.flip(1)], 2).flatten(1, 2)[:, ::2],
    "glu": lambda n, x: F.glu(torch.cat([x, x], 1), 1),
    "halves": lambda n, x: operator.mul(*torch.cat([x, x], 1).chunk(2, 1)),
    "flatten": lambda n, x: x.flatten(2).transpose(1, 2).reshape(len(x), 4, 4, -1).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_is_known_passes(name):
    model, example = randomise_(between(PASSES[name])).double(), picture().double()
    groups = channel_groups(model, example)
    assert [g.name for g in groups] == ["conv1", "conv2", "conv3"]
    assert fold_error(model, example, groups) < 1e-5


def test_a_network_that_stays_in_float32_is_checked_in_float32():
    model = Net(lambda n, x: n.b(F.relu(n.a(x.float()))), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    assert [g.name for g in channel_groups(randomise_(model), torch.randn(4, 6))] == ["a"]


def test_a_check_without_finite_numbers_freezes():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    model.append(Net(lambda n, x: x.sqrt()))
    groups = channel_groups(model, torch.randn(4, 6))
    assert not len(groups)
    assert "NaN or Inf" in frozen_reason(groups, "0.weight")


def test_buffers():
    """A persistent buffer is compressed along; a buffer that no checkpoint holds freezes its channels."""
    model = Net(
        lambda n, x: n.c(n.b(n.a(x) * n.kept) * n.lost),
        a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3), kept=torch.rand(8),
    )  # fmt: skip
    model.register_buffer("lost", torch.rand(8), persistent=False)
    groups = channel_groups(randomise_(model), torch.randn(4, 6))
    assert [g.name for g in groups] == ["a"]
    assert "kept" in {w.tensor for w in groups[0].writes}


def test_state_that_is_no_tensor():
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return "words"

        def set_extra_state(self, state):
            pass

    model, x = randomise_(nn.Sequential(Stateful(6, 8), nn.ReLU(), nn.Linear(8, 3))), torch.randn(4, 6)
    groups = channel_groups(model, x)
    assert apply(model, groups, uneven_projections(groups))(x).shape == (4, 3)


def test_several_inputs():
    model = Net(lambda n, x, y: n.c(n.a(x) + n.b(y)), a=nn.Linear(3, 8), b=nn.Linear(4, 8), c=nn.Linear(8, 2))
    randomise_(model).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    groups = channel_groups(model, (x, y))
    assert [(g.name, g.size) for g in groups] == [("a", 8)]
    assert fold_error(model, (x, y), groups) < 1e-6


def test_groups_are_of_the_architecture_and_not_of_the_weights():
    first, second = (channel_groups(randomise_(between(PASSES["gate"]), seed), picture()) for seed in (0, 1))
    assert [g.name for g in first] == [g.name for g in second]
    for a, b in zip(first, second, strict=True):
        assert a == b
        assert all(torch.equal(x.index, y.index) for x, y in zip(a.writes, b.writes, strict=True))
    zero = between(PASSES["gate"])
    with torch.no_grad():
        for p in zero.parameters():
            p.zero_()
    assert list(channel_groups(zero, picture())) == list(first)


def test_tracing_leaves_no_trace():
    model = randomise_(between(PASSES["gate"], norm=nn.BatchNorm2d(3))).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    channel_groups(model, picture())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_data_dependent_control_flow_is_the_users():
    model = Net(lambda n, x: n.a(x) if x.sum() > 0 else n.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"torch\.export cannot trace Net: .*control flow") as caught:
        channel_groups(model, torch.randn(2, 4))
    assert "\n" not in str(caught.value)


def test_nothing_to_compress():
    with pytest.raises(UserError, match=r"Linear has no channels that can be compressed \(.*output"):
        compress(nn.Linear(4, 4), torch.randn(2, 4))
