"""Fidelity, which predicts the accuracy of a smaller network, and the method "auto", which chooses by it."""

import pytest
import torch
from torch import nn

from pipeline.compression import channel_groups, compress, synthesize
from pipeline.compression.calibrate.predict import fidelity, judge
from pipeline.models import build_model
from pipeline.tables import UserError

RATIOS = [0.25, 0.5]
CANDIDATES = ["random", "l2", "mix"]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet20", classes=10, channels=3).eval()


@pytest.fixture(scope="module")
def example() -> torch.Tensor:
    return torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def groups(net, example):
    return channel_groups(net, example)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_fidelity_is_agreement_times_correlation():
    wanted = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    assert fidelity([(wanted, wanted)]) == pytest.approx(1)
    assert fidelity([(3 * wanted + 2, wanted)]) == pytest.approx(1), "scale and shift change no decision"
    assert fidelity([(-wanted, wanted)]) == 0
    assert fidelity([(torch.ones(200, 5), wanted)]) == 0, "one class for all"
    noisy = wanted + torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    agreement = (noisy.argmax(1) == wanted.argmax(1)).float().mean()
    correlation = torch.corrcoef(torch.stack([(t - t.mean(0)).flatten() for t in (noisy, wanted)]))[0, 1]
    assert fidelity([(noisy, wanted)]) == pytest.approx(float(agreement * correlation), abs=1e-3)


def test_auto_is_at_every_ratio_the_candidate_of_the_greatest_fidelity(net, example, groups):
    judged = judge(net, pictures(64))
    worth = {
        (name, report.ratio): judged(smaller)
        for name in CANDIDATES
        for smaller, report in compress(net, example, name, RATIOS, groups=groups)
    }
    before = {name: t.clone() for name, t in net.state_dict().items()}
    options = {"groups": groups, "candidates": CANDIDATES, "judge_on": pictures(64)}
    for smaller, report in compress(net, example, "auto", RATIOS, **options):
        best = max(CANDIDATES, key=lambda name, ratio=report.ratio: worth[name, ratio])
        assert report.method == f"auto ({best})"
        assert judged(smaller) == pytest.approx(worth[best, report.ratio])
    assert len({worth[name, 0.5] for name in CANDIDATES}) == 3, "else this shows nothing"
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())


def test_auto_compensates_and_judges_on_the_pictures_that_it_is_given(net, example, groups):
    made = synthesize(net, example, count=32, steps=2)
    judged = judge(net, made)
    (smaller, report), *_ = compress(net, example, "auto", [0.5], groups=groups, pictures=made, candidates=CANDIDATES)
    worth = {name: judged(compress(net, example, name, 0.5, groups=groups, pictures=made).model) for name in CANDIDATES}
    assert report.method == f"auto ({max(CANDIDATES, key=worth.__getitem__)})"
    assert judged(smaller) == pytest.approx(max(worth.values()))


def test_approximate_repair_is_a_candidate(net, example, groups):
    judged = judge(net, pictures(64))
    (smaller, report), *_ = compress(
        net, example, "auto", [0.5], groups=groups, candidates=["random", "fold+ar"], judge_on=pictures(64)
    )
    alone = compress(net, example, "fold", 0.5, groups=groups, approximate_repair=True).model
    assert report.method == "auto (fold+ar)"
    assert judged(smaller) == judged(alone)


def test_an_unknown_candidate_gets_one_clear_line(net, example):
    with pytest.raises(UserError, match="unknown candidate 'fol'"):
        compress(net, example, "auto", 0.5, candidates=["fol"])
    with pytest.raises(UserError, match="unknown candidate '3'"):
        compress(net, example, "auto", 0.5, candidates=[3])
    with pytest.raises(UserError, match=r"auto decides on approximate_repair \(\+ar\) by itself"):
        compress(net, example, "auto", 0.5, approximate_repair=True)


def test_modes_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    smaller, _ = compress(model, torch.randn(2, 4), "auto", 0.5, judge_on=torch.randn(16, 4))
    assert all(module.training for module in model.modules())
    assert smaller[0].out_features == 4
