"""Gradients on single pictures with labels that the network draws, and the methods that look at them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_nets import NETS, Net, head, picture, randomise_

from pipeline.compression import METHODS, channel_groups, compress
from pipeline.compression.choose import gradients
from pipeline.compression.choose.gradients import Gradients, sample_gradients
from pipeline.compression.choose.weights import GroupWeights
from pipeline.compression.merge.modules import named_tensors
from pipeline.tables import UserError


@pytest.fixture
def least_likely(monkeypatch):
    """Labels are not drawn but those of the smallest logit, so that a test knows them."""
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: p.argmin(1, keepdim=True))


def residual():
    """Two convolutions, a and c, read the stem, and the stem is added to the output of b."""

    def forward(net, x):
        x = net.stem(x)
        return head(net, F.gelu(x + net.b(F.gelu(net.a(x)))) + net.c(x))

    return Net(
        forward, stem=nn.Conv2d(3, 6, 3, padding=1), a=nn.Conv2d(6, 7, 3, padding=1), b=nn.Conv2d(7, 6, 1),
        c=nn.Conv2d(6, 6, 1), head=nn.Linear(6, 5),
    )  # fmt: skip


@pytest.mark.parametrize("build", [residual, NETS["vgg"][0], NETS["vit"][0]])
def test_gates_are_the_gradients_of_masks_on_what_readers_are_given(build, least_likely):
    model = randomise_(build()).double()
    pictures = picture(batch=5, size=16 if build is NETS["vit"][0] else 8).double()
    groups = channel_groups(model, pictures[:1])
    found = Gradients(model, groups, pictures).gates
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in found}
    assert layers
    assert all(gates.abs().max() > 1e-4 for gates in found.values())
    for i in range(5):
        gates, hooks = {}, []
        for (name, dim), layer in zip(found, layers.values(), strict=True):
            size = layer.weight.shape[dim]
            gates[name] = torch.ones(size, dtype=torch.float64, requires_grad=True)
            gate = gates[name].view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else gates[name]
            hooks.append(layer.register_forward_pre_hook(lambda _, given, gate=gate: (given[0] * gate,)))
        logits = model(pictures[i : i + 1])
        slopes = torch.autograd.grad(F.cross_entropy(logits, logits.argmin(1)), list(gates.values()))
        for slope, of_samples in zip(slopes, found.values(), strict=True):
            torch.testing.assert_close(of_samples[i].double(), slope, rtol=1e-4, atol=1e-7)
        for hook in hooks:
            hook.remove()


def test_fisher_is_the_mean_square_of_each_pictures_gradient(least_likely):
    model, pictures = randomise_(residual()), picture(batch=6)
    groups = channel_groups(model, pictures[:1])
    squares = Gradients(model, groups, pictures).squares
    expected = {name: torch.zeros_like(t) for name, t in squares.items()}
    for one in pictures.split(1):
        model.zero_grad()
        logits = model(one)
        F.cross_entropy(logits, logits.argmin(1)).backward()
        for name, total in expected.items():
            total += model.get_parameter(name).grad.square() / 6
    for name, total in expected.items():
        torch.testing.assert_close(squares[name], total, rtol=1e-4, atol=1e-9, msg=name)

    group = groups[0]
    k = group.size - 1
    weights = GroupWeights(group, named_tensors(model), gradients=Gradients(model, groups, pictures))
    # Squares of (6, ...) rows: of the stem's own weights, and of the columns of the layers that read it
    scores = [
        float(
            sum(
                (model.get_parameter(a.tensor).detach().square() * expected[a.tensor])
                .select(a.axis, int(a.index[c]))
                .sum()
                for a in (*weights.writers, *group.reads)
            )
        )
        for c in range(group.size)
    ]
    (dropped,) = (METHODS["fisher"](weights, [k])[k].labels < 0).nonzero().flatten().tolist()
    assert min(scores) > 0
    assert dropped == scores.index(min(scores))


@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_channels_that_nobody_reads_go_first(method):
    """Channels that nothing reads go first, however large their writers: Fisher sees the gradient 0 of these."""
    model = randomise_(nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 4))).eval()
    with torch.no_grad():
        model[2].weight[:, [1, 4, 7]] = 0
        model[0].weight[[1, 4, 7]] *= 100
    _, report = compress(model, torch.zeros(1, 8), method, 0.3, pictures=torch.randn(40, 8))
    assert (report.groups[0].labels < 0).nonzero().flatten().tolist() == [1, 4, 7]
    _, report = compress(model, torch.zeros(1, 8), "l2", 0.3)
    assert (report.groups[0].labels[[1, 4, 7]] >= 0).all()


def test_labels_are_drawn_from_the_softmax():
    """The mean gradient is 0 over labels that the network draws itself, and only over those."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))  # all labels are about as likely
    pictures = torch.randn(1, 3).expand(gradients.SAMPLES, 3)
    slopes = torch.stack([s["1.weight"] for s in sample_gradients(model, pictures, ["1.weight"])])
    assert len(slopes.flatten(1).unique(dim=0)) == 3  # every label comes up
    error = slopes.std(0) / len(slopes) ** 0.5
    assert (slopes.mean(0).abs() < 4 * error).all()
    again = torch.stack([s["1.weight"] for s in sample_gradients(model, pictures, ["1.weight"], seed=1)])
    assert not torch.equal(slopes, again)


def test_only_some_pictures_are_looked_at_and_only_by_methods_that_ask(monkeypatch):
    model, pictures = randomise_(residual()), picture(batch=8)
    monkeypatch.setattr(gradients, "SAMPLES", 3)
    assert len(list(sample_gradients(model, pictures, ["stem.weight"]))) == 3
    monkeypatch.setattr(gradients, "sample_gradients", lambda *_: pytest.fail("nobody asked"))
    for method in ("fold", "l2", "obs", "wanda"):
        compress(model, pictures[:1], method, 0.5, pictures=pictures)


@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_the_network_is_left_as_it_was(method):
    model = randomise_(NETS["resnet18"][0]()).train()
    model.conv1.weight.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():  # as a callback may call it
        smaller, _ = compress(model, picture(), method, 0.5, pictures=picture(batch=4))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(m.training for m in (*model.modules(), *smaller.modules()))


def test_tied_weights_have_one_gradient_under_both_names():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    (slopes,) = sample_gradients(model, torch.randn(1, 6), ["0.weight", "2.weight"])
    assert torch.equal(slopes["0.weight"], slopes["2.weight"])
    assert slopes["0.weight"].norm() > 0


def test_what_has_no_gradients_says_so():
    build, example = NETS["transposed"]
    with pytest.raises(UserError, match=r"puts out the logits \(1, classes\) of a picture, got \(1, 4, "):
        compress(randomise_(build()), example, "taylor", 0.5, pictures=example)
    with pytest.raises(UserError, match=r"method 'fisher' needs pictures .*: fisher\+synthetic or fisher\+data"):
        compress(randomise_(residual()), picture(), "fisher", 0.5)
