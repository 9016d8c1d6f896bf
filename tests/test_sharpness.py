"""Sharpness is exact where it can be computed by hand, and leaves everything as it was."""

import copy

import pytest
import torch
from torch import nn

from pipeline.models import build_model
from pipeline.sharpness import COLUMNS, L2, LINF, Sharpness, asked_for, climbed, hessian_top, normalised, sharpness
from pipeline.tables import UserError
from pipeline.tasks import Classification

pytest.importorskip("curvlinops")
TASK = Classification("multiclass", "logits", classes=4)
BATCHES = [(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 4) for i in (0, 1)]


class Quadratic(Classification):
    """A loss that is wᵀ diag(1, 2, 3) w / 2 + w_1, whatever the batch holds."""

    def loss(self, output, batch, label_smoothing=0.0):
        return (torch.tensor([1.0, 2.0, 3.0]) * output.square()).sum() / 2 + output[0]


class Weights(nn.Module):
    def __init__(self, *values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        return self.w * 1


def measured(*values, **asked):
    return sharpness(Weights(*values), Quadratic("multiclass", "logits", classes=4), BATCHES, Sharpness(**asked))


def test_the_top_eigenvalue_is_that_of_the_hessian():
    """The Hessian of the mean over batches: two batches of one loss have the curvature of one."""
    for batches in (1, 2):
        assert measured(1.0, 1.0, 1.0, batches=batches)["hessian_top"] == pytest.approx(3, rel=1e-3)


def test_products_with_the_hessian_of_a_narrow_network_are_computed_without_onednn(monkeypatch):
    """On a CPU without AVX-512 (see pipeline.backward)."""
    monkeypatch.setattr("pipeline.backward.has_avx512", lambda: False)
    net, seen = nn.Sequential(nn.Conv2d(3, 2, 1, stride=2), nn.Flatten(), nn.Linear(32, 4)), []
    x, y = BATCHES[0]

    def loss():
        seen.append(torch.backends.mkldnn.enabled)
        return nn.functional.cross_entropy(net(x), y)

    hessian_top(net, [loss])
    assert set(seen) == {False}


def test_the_eigenvalue_of_a_network_is_that_of_its_whole_hessian():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2, bias=False), nn.Tanh(), nn.Linear(2, 4))
    x, y = BATCHES[0]
    weights = [p.detach() for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]

    def loss(*values):
        logits = torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))
        return nn.functional.cross_entropy(logits, y)

    blocks = torch.autograd.functional.hessian(loss, tuple(weights))
    rows = [
        torch.cat([block.reshape(w.numel(), -1) for block in row], 1) for w, row in zip(weights, blocks, strict=True)
    ]
    expected = torch.linalg.eigvalsh(torch.cat(rows))[-1]
    found = sharpness(net, TASK, BATCHES[:1], Sharpness(rho=None, rho_l2=None, rho_linf=None))
    assert found == {"hessian_top": pytest.approx(float(expected), rel=1e-2)}


def test_one_step_along_the_gradient_is_the_rise_by_hand():
    """At w = (1, 0, 0) the gradient is (2, 0, 0), and a step of .1 raises w²/2 + w by .1 + .105."""
    assert measured(1.0, 0.0, 0.0, rho=0.1)["sharpness_sam"] == pytest.approx(0.205, abs=1e-5)


def test_the_worst_case_is_relative_to_each_weight():
    """Within 10% of w = (1, 1, 0) each way: 1.1²/2 + 2 * 1.1²/2 + 1.1 less 2.5. A weight of zero cannot move."""
    assert measured(1.0, 1.0, 0.0, rho_linf=0.1)["sharpness_linf"] == pytest.approx(0.415, abs=1e-4)
    found = measured(1.0, 0.0, 0.0, rho_l2=0.1)["sharpness_l2"]
    assert found == pytest.approx(0.205, abs=1e-4)
    assert measured(2.0, 0.0, 0.0, rho_l2=0.1)["sharpness_l2"] == pytest.approx(0.62, abs=1e-4)


@pytest.mark.parametrize("ball", [L2, LINF])
def test_the_search_finds_the_maximum_on_the_edge_of_the_ball_and_stays_inside(ball):
    """The function falls at first in the direction of its maximum, which lies inside of the edge in one coordinate."""
    seen = []

    def at(u):
        seen.append(u)
        return float(u[0] - 5 * (u[1] - 0.3) ** 2), torch.tensor([1.0, -10 * (u[1] - 0.3)])

    best = climbed(at, torch.zeros(2), 1.0, ball, 40)
    first = -5 * 0.3**2
    most = {L2: 0.95436, LINF: 1.0}[ball]  # on the circle at (.954.., .3): by a fine grid, 0.9607
    grid = torch.linspace(0, torch.pi / 2, 10001)
    most = float((grid.cos() - 5 * (grid.sin() - 0.3) ** 2).max()) if ball is L2 else most
    assert best + first == pytest.approx(most, abs=5e-3)
    norm = 2 if ball is L2 else torch.inf
    assert max(float(torch.linalg.vector_norm(u, norm)) for u in seen) <= 1 + 1e-5


def test_a_larger_ball_is_never_flatter():
    torch.manual_seed(0)
    net = build_model("resnet20", 4, 3)
    found = [
        sharpness(net, TASK, BATCHES[:1], Sharpness(rho_l2=rho, steps=5, hessian=False, rho=None, rho_linf=None))
        for rho in (0.01, 0.1, 1.0)
    ]
    values = [of["sharpness_l2"] for of in found]
    assert 0 < values[0] < values[1] < values[2]


def test_the_model_its_modes_and_the_random_state_stay_as_they_are():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 4))
    net.train()
    net[0].weight.requires_grad_(False)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        first, again = (sharpness(net, TASK, BATCHES, Sharpness(steps=4)) for _ in range(2))
    assert first == again
    assert tuple(first) == COLUMNS
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert [p.requires_grad for p in net.parameters()] == [False, *[True] * 5]
    assert all(p.grad is None for p in net.parameters())


def test_the_memory_format_of_weights_and_pictures_changes_nothing():
    torch.manual_seed(0)
    net = build_model("resnet20", 4, 3)
    x, y = BATCHES[0]
    asked = Sharpness(steps=3)
    plain = sharpness(net, TASK, [(x, y)], asked)
    last = torch.channels_last
    found = sharpness(net.to(memory_format=last), TASK, [(x.contiguous(memory_format=last), y)], asked)
    assert found == pytest.approx(plain, rel=2e-2, abs=1e-5)


def test_normalised_logits_do_not_know_their_scale():
    logits = torch.randn(5, 4)
    torch.testing.assert_close(normalised(logits), normalised(7 * logits + 2))
    with pytest.raises(UserError, match="wants logits as a tensor, and the network gives a dict"):
        normalised({"logits": logits})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sharpness must be true, null or options"),
        ([0.1], "sharpness must be true, null or options"),
        ({"rho": -1.0}, "sharpness.rho -1.0 must be above 0"),
        ({"steps": 0}, "sharpness.steps 0 must be a whole number"),
        ({"roh": 0.1}, "sharpness has no option 'roh'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        asked_for(options)


def test_nothing_is_asked_for_by_null_and_the_defaults_by_true():
    assert asked_for(None) is asked_for(False) is None
    assert asked_for(True) == Sharpness()


def test_half_precision_and_no_samples_are_refused():
    with pytest.raises(UserError, match=r"needs weights of single precision, and 0\.weight is torch.bfloat16"):
        sharpness(nn.Sequential(nn.Linear(2, 2)).bfloat16(), TASK, BATCHES, Sharpness())
    with pytest.raises(UserError, match="and there are none; give repair_data="):
        sharpness(nn.Linear(2, 2), TASK, [], Sharpness())
