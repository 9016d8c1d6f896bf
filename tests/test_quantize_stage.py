"""The stage that quantizes weights: what it leaves alone, what may follow it, and what a repair behind it does."""

import pytest
import stage_nets
import torch
from torch import nn

from pipeline.compression.calibrate.repair import statistics
from pipeline.compression.quantize.network import grids_of, on_grids, sites
from pipeline.stages import Followed, State, Supplies, parse_chain, parse_tail, spell_chain
from pipeline.tables import UserError
from pipeline.tasks import Classification

PICTURES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(4, (64,), generator=torch.Generator().manual_seed(0))
BATCHES = list(zip(PICTURES.split(32), LABELS.split(32), strict=True))


def net() -> nn.Module:
    return stage_nets.net(PICTURES)


def after(chain: str, dense: nn.Module | None = None) -> nn.Module:
    """The network behind a chain."""
    dense = net() if dense is None else dense
    supplies = Supplies(dense, PICTURES[:1], Classification("multiclass", "logits", classes=4), BATCHES)
    with torch.no_grad():
        return Followed(State(dense), supplies).state(parse_chain(chain)).model


def test_first_and_last_layer_have_their_own_bits():
    bits = {name: grid.bits for name, grid in grids_of(after("quantize(bits=3)")).items()}
    assert bits == {"0.weight": 8, "3.weight": 3, "8.weight": 8}
    bits = {name: grid.bits for name, grid in grids_of(after("quantize(bits=3,ends=3)")).items()}
    assert set(bits.values()) == {3}
    floats = after("quantize(bits=3,ends=32)")
    assert set(grids_of(floats)) == {"3.weight"}
    assert torch.equal(floats[0].weight, net()[0].weight)


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "gptq,calibrate=synthetic"])
def test_after_a_repair_weights_are_on_their_grids_bit_for_bit(rounding):
    raw = after(f"quantize(bits=3,rounding={rounding})")
    repaired = after(f"quantize(bits=3,rounding={rounding}) > repair > tune_norms")
    assert set(on_grids(repaired)) == set(sites(repaired)) == set(on_grids(raw))
    for name in sites(raw):
        assert torch.equal(raw.get_parameter(name), repaired.get_parameter(name))
    assert not torch.equal(raw[1].running_var, repaired[1].running_var)


def test_a_repair_brings_statistics_back_to_those_before_the_quantization():
    """Of the whole network, and of one that was folded and repaired before."""
    for before in ("", "fold@0.3 > repair > "):
        start = after(before.removesuffix(" > ")) if before else net()
        repaired = after(f"{before}quantize(bits=2) > repair")
        found = statistics(repaired, PICTURES.split(32))
        wanted = statistics(start, PICTURES.split(32))
        for name, trained in start.state_dict().items():
            if "running" in name:
                # As far from what the pictures say as the network was before.
                ratio = (repaired.state_dict()[name] - found[name]).norm() / (trained - wanted[name]).norm()
                assert 0.5 < ratio < 2, name


def test_gptq_beats_rounding_to_the_nearest_on_the_pictures():
    dense, errors = net(), {}
    for rounding in ("nearest", "gptq"):
        small = after(f"quantize(bits=2,ends=2,rounding={rounding})", dense)
        with torch.no_grad():
            errors[rounding] = float((small(PICTURES) - dense(PICTURES)).square().sum())
    assert errors["gptq"] < 0.5 * errors["nearest"]


def test_spellings_come_back_and_default_options_are_left_out():
    said = "fold@0.3 > quantize(bits=4,per=group,group=32,rounding=gptq) > repair"
    assert spell_chain(parse_chain(said)) == said
    assert spell_chain(parse_chain("quantize(bits=8,ends=8)")) == "quantize"
    assert parse_tail("quantize")[0].needs == frozenset()
    assert parse_tail("quantize(rounding=gptq)")[0].needs == {"calibration"}
    assert parse_tail("quantize(rounding=gptq,calibrate=synthetic)")[0].needs == frozenset()


@pytest.mark.parametrize("stage", ["fold@0.5", "lamp@0.5", "tune", "distil", "quantize(bits=2)"])
def test_what_would_leave_the_grid_cannot_follow(stage):
    with pytest.raises(UserError, match=r"cannot follow quantize\(bits=4\): the weights lie on the grid"):
        parse_chain(f"quantize(bits=4) > {stage}")


def test_wrong_options_are_refused_before_any_work():
    for said, why in (
        ("quantize(bits=9)", "bits 9 must be a whole number from 2 to 8"),
        ("quantize(ends=16)", "bits 16 must be"),
        ("quantize(bits=few)", "bits must be a number"),
        ("quantize(rounding=up)", "unknown rounding 'up'.*gptq, nearest"),
        ("quantize(calibrate=noise)", "unknown calibrate 'noise'"),
        ("quantize(rang=mse)", "no option 'rang'"),
    ):
        with pytest.raises(UserError, match=why):
            parse_chain(said)
    assert parse_tail("quantize")[0].reason_against(nn.ReLU()).startswith("no convolution")


def test_layers_that_gptq_does_not_know_are_told_of():
    grouped = net()
    grouped[3] = nn.Conv2d(8, 8, 3, groups=8)
    with pytest.warns(RuntimeWarning, match=r"quantize: 1 weights \(3\.weight, \.\.\.\) are rounded to the nearest"):
        after("quantize(rounding=gptq)", grouped)
