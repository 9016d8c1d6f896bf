"""Attention: what a score sums up, what a head is, and torch's own layer with fewer or narrower heads."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_nets import Net, frozen_reason, randomise_, relative_error

from pipeline.compression import Projection, channel_groups, compress
from pipeline.compression.merge.attention import NarrowMultiheadAttention
from pipeline.compression.merge.modules import apply
from pipeline.tables import UserError

HEADS, WIDTH, STREAM = 4, 6, 10


class Attention(nn.Module):
    """Attention as people write it. form: which operations, and where the scale comes from."""

    def __init__(self, form, query_heads=HEADS):
        super().__init__()
        self.form, self.num_heads, self.head_dim, self.scale = form, query_heads, WIDTH, WIDTH**-0.5
        self.q = nn.Linear(STREAM, query_heads * WIDTH)
        self.k, self.v = (nn.Linear(STREAM, HEADS * WIDTH) for _ in range(2))
        self.out = nn.Linear(query_heads * WIDTH, STREAM)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3) for y in (self.q(x), self.k(x), self.v(x)))
        if self.form == "rotary":
            angle = torch.outer(torch.arange(x.shape[1]), torch.arange(1.0, self.head_dim + 1)).to(x)
            q, k = q * angle.cos() + q.roll(1, -1) * angle.sin(), k * angle.cos() + k.roll(1, -1) * angle.sin()
        if k.shape[1] != self.num_heads:
            k, v = (y.repeat_interleave(self.num_heads // y.shape[1], 1) for y in (k, v))
        if self.form == "scaled_dot_product":
            mixed = F.scaled_dot_product_attention(q, k, v)
        elif self.form == "constant scale":
            mixed = (q @ k.mT * self.scale).softmax(-1) @ v
        else:
            mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.out(mixed.transpose(-2, -3).flatten(-2))


FORMS = ["scaled_dot_product", "constant scale", "scale of the width"]


def network(form="scaled_dot_product", query_heads=HEADS):
    net = nn.Sequential(nn.Linear(5, STREAM), nn.LayerNorm(STREAM), Attention(form, query_heads), nn.Linear(STREAM, 3))
    return randomise_(net).double(), torch.randn(2, 7, 5, dtype=torch.float64)


@pytest.mark.parametrize("query_heads", [HEADS, 2 * HEADS], ids=["", "grouped queries"])
@pytest.mark.parametrize("form", FORMS)
def test_width_merges_what_queries_and_keys_have_alike(form, query_heads):
    """Keys are copies of each other, so their queries add up, at the temperature that the scores had before."""
    net, x = network(form, query_heads)
    groups = channel_groups(net, x, ["width"])
    assert len(groups) == 2 * HEADS
    assert {g.size for g in groups} == {WIDTH}
    assert {g.part for g in groups} == {"width"}
    assert len(groups.ties) == 1
    labels = Projection(torch.tensor([0, 0, 1, 0, 2, 2]))
    with torch.no_grad():
        for layer in (net[2].k, net[2].v):
            for tensor in (layer.weight, layer.bias):
                rows = tensor.unflatten(0, (HEADS, WIDTH))
                rows[:] = rows[:, [0, 0, 2, 0, 4, 4]]
        smaller = apply(net, groups, [labels] * len(groups))
        assert relative_error(net(x), smaller(x)) < 1e-9
    assert smaller[2].head_dim == 3
    assert tuple(smaller[2].q.weight.shape) == (query_heads * 3, STREAM)
    assert smaller[2].scale == pytest.approx(3**-0.5 if form == "scaled_dot_product" else net[2].scale)


@pytest.mark.parametrize("form", [*FORMS, "rotary"])
@pytest.mark.parametrize("query_heads", [HEADS, 2 * HEADS], ids=["", "grouped queries"])
def test_whole_heads(form, query_heads):
    net, x = network(form, query_heads)
    groups = channel_groups(net, x, ["head"])
    assert [(g.size, g.part) for g in groups] == [(HEADS, "head")]
    with torch.no_grad():
        for layer in (net[2].q, net[2].k, net[2].v):
            for tensor in (layer.weight, layer.bias):
                heads = tensor.unflatten(0, (HEADS, -1))
                heads[1] = heads[3]
        smaller = apply(net, groups, [Projection(torch.tensor([0, 1, 2, 1]))])
        assert relative_error(net(x), smaller(x)) < 1e-9
        net[2].out.weight.unflatten(1, (HEADS, -1))[:, 0] = 0  # nothing reads the first head
        pruned = apply(net, groups, [Projection(torch.tensor([-1, 0, 1, 2]))])
        assert relative_error(net(x), pruned(x)) < 1e-9
    assert smaller[2].num_heads == query_heads * 3 // HEADS


def test_rotary_positions_freeze_the_width_of_queries_and_keys():
    net, x = network("rotary")
    groups = channel_groups(net, x, ["width"])
    assert not len(groups)
    assert "meets what differs" in frozen_reason(groups, "2.k.weight")


def test_parts():
    net, x = network()
    assert [g.name for g in channel_groups(net, x)] == ["2.out"]
    with pytest.raises(UserError, match="'width' or 'head', not both"):
        channel_groups(net, x, ["width", "head"])
    with pytest.raises(UserError, match=r"unknown part 'heads'.*did you mean 'head'"):
        channel_groups(net, x, ["heads"])
    smaller, report = compress(net, x, "fold", 0.5, parts=["width"])
    assert dict(report.numbers) == {"2.head_dim": 3, "2.scale": pytest.approx(3**-0.5)}
    assert "6 -> 3" in str(report)
    assert f"mean of {2 * HEADS} groups" in str(report)
    assert smaller(x).shape == (2, 7, 3)


def test_a_layer_of_transformers_in_inference():
    """The fused path of torch's layer knows no narrow heads, and must neither be traced nor taken."""
    net = nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Linear(8, 3))
    net, x = randomise_(net).double().eval(), torch.randn(2, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        smaller, report = compress(net, x, "l2", 0.5, parts=["hidden", "width"])
        assert {g.after for g in report.groups} == {2, 6}
        assert type(smaller[1].self_attn) is NarrowMultiheadAttention
        inference = smaller(x)
    assert relative_error(smaller(x).detach(), inference) < 1e-9  # the fused path is off where gradients are needed


MASK = torch.ones(7, 7, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", ["nothing", "mask", "float mask", "padding", "both", "masks of heads", "single"])
def test_narrow_attention_is_torchs_attention(given, batch_first, need_weights):
    """Both layers run at full width, the only one that torch's takes."""
    whole = nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
    narrow = copy.deepcopy(whole)
    narrow.__class__ = NarrowMultiheadAttention
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    options = {
        "mask": {"attn_mask": MASK},
        "float mask": {"attn_mask": torch.randn(7, 7, dtype=torch.float64)},
        "padding": {"key_padding_mask": PADDING},
        "both": {"attn_mask": MASK, "key_padding_mask": PADDING},
        "masks of heads": {"attn_mask": torch.randn(4, 7, 7, dtype=torch.float64)},
    }.get(given, {})
    x = x[0] if given == "single" else x if batch_first else x.transpose(0, 1)
    for average in (True, False):
        expected, found = (
            m(x, x.flip(-1), x, need_weights=need_weights, average_attn_weights=average, **options)
            for m in (whole, narrow)
        )
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])


def test_groups_of_a_convolution_go_as_a_whole():
    net = Net(
        lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x))))),
        a=nn.Conv2d(3, 12, 3, padding=1), b=nn.Conv2d(12, 24, 3, padding=1, groups=4), c=nn.Conv2d(24, 2, 1),
    )  # fmt: skip
    x = torch.randn(2, 3, 6, 6)
    groups = channel_groups(randomise_(net), x)
    assert [(g.size, [(a.tensor, a.index.shape[1]) for a in g.writes]) for g in groups] == [
        (4, [("a.weight", 3), ("a.bias", 3), ("b.weight", 6), ("b.bias", 6)])
    ]
    smaller, _ = compress(net, x, "l1", 0.5)
    assert (smaller.b.groups, smaller.b.in_channels, smaller.b.out_channels) == (2, 6, 12)


def test_queries_keep_their_cluster_sums_under_compensation():
    """One weight reads the stream along one axis and, as queries, keys along the other."""
    model = randomise_(nn.Sequential(nn.Linear(5, STREAM), Attention("scaled_dot_product"), nn.Linear(STREAM, 3)))
    x = torch.randn(20, 7, 5, generator=torch.Generator().manual_seed(0))
    options = {"parts": ["hidden", "residual", "width"]}
    plain, report = compress(model.eval(), x[:1], "fold", 0.5, **options)
    assert {len(row.labels) for row in report.groups} == {STREAM, WIDTH}
    better, _ = compress(model, x[:1], "fold", 0.5, pictures=x, **options)
    assert torch.equal(better[1].q.weight, compress(model, x[:1], "fold", 0.5, pictures=x, **options)[0][1].q.weight)
    assert better[1].q.weight.shape == plain[1].q.weight.shape
    assert not torch.equal(better[2].weight, plain[2].weight)
    with torch.no_grad():
        wanted = model(x)
        assert relative_error(wanted, better(x)) < relative_error(wanted, plain(x))
