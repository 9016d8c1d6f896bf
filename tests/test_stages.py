"""Over the table of stages: each is spelled and read back, leaves what it was given alone, and is written down."""

import copy

import pytest
import stage_nets
import torch
from torch import nn

from pipeline.compression import parse
from pipeline.compression.plan import history
from pipeline.stages import STAGES, Followed, State, Supplies, compressed, needed, parse_chain, parse_tail, spell_chain
from pipeline.stages.stage import NEEDS
from pipeline.tasks import Classification

PICTURES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(4, (32,), generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    return stage_nets.net(PICTURES)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_spelled_and_read_back(name):
    (stage,) = parse_tail(name)
    assert str(stage) == name
    assert parse_chain(spell_chain((stage,))) == (stage,)
    assert needed(name) <= set(NEEDS)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_changes_a_copy_and_is_remembered(name):
    torch.manual_seed(0)
    dense = net()
    batches = list(zip(PICTURES.split(16), LABELS.split(16), strict=True))
    supplies = Supplies(dense, PICTURES[:1], Classification("multiclass", "logits", classes=4), batches)
    given = copy.deepcopy(dense.state_dict())
    raw = next(compressed(State(dense), parse("fold"), [0.5], supplies))
    before = copy.deepcopy(raw.model.state_dict())
    with torch.no_grad():
        after = Followed(raw, supplies).state(parse_tail(name))
    found = after.model.state_dict()
    assert found.keys() != before.keys() or any(not torch.equal(tensor, before[key]) for key, tensor in found.items())
    for network, kept in ((dense, given), (raw.model, before)):
        assert all(torch.equal(tensor, kept[key]) for key, tensor in network.state_dict().items())
    assert not after.model.training
    assert [str(step) for step in history(after.model)] == ["fold@0.5", name]
    assert after.seconds > raw.seconds
