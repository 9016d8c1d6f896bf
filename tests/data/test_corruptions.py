"""Corruptions change pictures as their names say, more at higher severity, and alike every time."""

import pytest
import torch

from pipeline.data.corruptions import CORRUPTIONS, Corruptions, corrupted, corruptions
from pipeline.tables import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def pictures(n=3):
    """Smooth pictures with an edge, in 0 ... 1, as bytes hold them."""
    x, y = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    plain = torch.stack([0.2 + 0.6 * x, 0.2 + 0.6 * y, 0.3 + 0.4 * (x > 0.5)]).expand(n, -1, -1, -1)
    return (plain * 255).round() / 255


def normal(x):
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def under(name, severity, seed=0):
    """The pictures under a corruption, in 0 ... 1."""
    asked = Corruptions((name,), severity, MEAN, STD)
    ((made, labels),) = corrupted([(normal(pictures()), torch.arange(3))], asked, seed)
    assert torch.equal(labels, torch.arange(3))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return made * std + mean


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_pictures_change_more_at_the_highest_severity_and_stay_pictures(name):
    weak, strong = under(name, 1), under(name, 5)
    for made in (weak, strong):
        assert made.shape == (3, 3, 32, 32)
        assert -1e-5 <= float(made.min()) <= float(made.max()) <= 1 + 1e-5
        torch.testing.assert_close(made * 255, (made * 255).round(), atol=2e-3, rtol=0)
    distances = [float((made - pictures()).square().mean()) for made in (weak, strong)]
    assert distances[1] > distances[0] >= 0
    assert distances[1] > 1e-5


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_numbers_are_drawn_every_time_and_none_of_the_global_ones(name):
    state = torch.get_rng_state()
    assert torch.equal(under(name, 3), under(name, 3))
    assert torch.equal(state, torch.get_rng_state())
    if name in ("gaussian_noise", "shot_noise", "impulse_noise", "fog"):
        assert not torch.equal(under(name, 3), under(name, 3, seed=1))


def test_strengths_are_what_they_say():
    plain = pictures()
    noise = under("gaussian_noise", 5) - plain
    assert float(noise[:, 2].std()) == pytest.approx(0.10, rel=0.05)
    changed = (under("impulse_noise", 5) - plain).abs() > 0.01
    assert float(changed.float().mean()) == pytest.approx(0.07, rel=0.15)
    assert float((under("brightness", 3) - plain).amax(1).mean()) == pytest.approx(0.15, abs=0.01)
    flat = under("contrast", 5)
    assert float(flat[0, 0].std() / plain[0, 0].std()) == pytest.approx(0.15, rel=0.05)
    shot = under("shot_noise", 3)[:, 2, 20:] - plain[:, 2, 20:]  # 0.7 of the brightness: variance 0.7 / 100
    assert float(shot.std()) == pytest.approx((0.7 / 100) ** 0.5, rel=0.1)


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "pixelate"])
def test_blur_keeps_the_mean_and_lowers_edges(name):
    made, plain = under(name, 5), pictures()
    assert float(made.mean()) == pytest.approx(float(plain.mean()), abs=0.01)
    edges = [float(x[:, 2].diff(dim=1).abs().max()) for x in (made, plain)]
    assert edges[0] <= edges[1] + 1e-5


def test_every_batch_comes_under_each_corruption_in_the_tables_order():
    asked = Corruptions(("jpeg", "fog"), 2, MEAN, STD)
    batches = [(normal(pictures(2)), torch.zeros(2)), (normal(pictures(1)), torch.ones(1))]
    assert [len(x) for x, _ in corrupted(batches, asked)] == [2, 2, 1, 1]


def test_names_alone_and_with_options():
    assert corruptions(None) is None
    assert corruptions(["fog"]) == Corruptions(("fog",), 3)
    assert corruptions({"names": ["fog"], "severity": 5, "mean": [0.5], "std": [1.0]}).std == (1.0,)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["fogg"], r"unknown corruption 'fogg' \(did you mean 'fog'\?\)"),
        ("fog", r"corruptions must be a list, such as \[fog\]"),
        ([], "corruptions names none"),
        ({"names": ["fog"], "severity": 6}, "severity 6 must be a whole number from 1 to 5"),
        ({"names": ["fog"], "strength": 6}, "corruptions has no option 'strength'"),
    ],
)
def test_options_that_make_no_sense_are_refused(asked, message):
    with pytest.raises(UserError, match=message):
        corruptions(asked)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ({"x": 1}, {}, "corruptions are of batches"),
        ((torch.zeros(2, 5), torch.zeros(2)), {}, "corruptions are of batches"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2)), {"mean": None}, "how pictures are normalised"),
        ((torch.zeros(2, 1, 8, 8), torch.zeros(2)), {}, "must have 1 values, one for each channel"),
    ],
)
def test_batches_that_are_no_normalised_pictures_are_refused(batch, options, message):
    asked = Corruptions(**{"names": ("fog",), "mean": MEAN, "std": STD, **options})
    with pytest.raises(UserError, match=message):
        list(corrupted([batch], asked))
