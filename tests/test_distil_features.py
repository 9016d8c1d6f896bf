"""Features as a lesson: regressors begin as the unfolding, learn beside the network, and are nowhere in its file."""

import sys
from pathlib import Path

import pytest
import torch
from chains_to_kill import ground, rows_of
from safetensors import safe_open
from stage_nets import net
from torch import nn

from pipeline.chains import NETWORK, ready
from pipeline.compression import channel_groups, compress
from pipeline.compression.group import ChannelGroups
from pipeline.entries import chains, trace
from pipeline.evaluate import output_on
from pipeline.stages import Traces, distil, parse_chain, spell_chain
from pipeline.stages.features import Hints, hinted, hints_of
from pipeline.tables import UserError
from pipeline.tasks import Classification

sys.path.insert(0, str(Path(__file__).parent / "compression"))
from toy_nets import duplicated

PICTURES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
OUTPUTS = ("1", "4", "8")  # layers of `net`


def hints(student: nn.Module, teacher: nn.Module, *layers: str, example: torch.Tensor = PICTURES) -> Hints:
    return hints_of(student, teacher, example, layers, lambda: channel_groups(teacher, example))


def loss_of(found: Hints, student: nn.Module, teacher: nn.Module, example: torch.Tensor = PICTURES) -> torch.Tensor:
    for one in (student, teacher):
        output_on(one, example)
    return found.loss()


@pytest.mark.parametrize("name", ["cifar_resnet", "vit", "vgg", "mobile"])
def test_a_network_that_was_folded_without_loss_has_no_error_of_features(name):
    dense, example, groups, _ = duplicated(name)
    smaller, _ = compress(dense, example, "fold", 0.5)
    with hinted(hints(smaller, dense, example=example)) as found:
        assert len(found.regressors) >= len(groups) / 2
        assert all(r.weight.sum(1).eq(1).all() for r in found.regressors.values()), "every channel is one of the others"
        assert loss_of(found, smaller, dense, example) < 1e-10
        for regressor in found.regressors.values():
            nn.init.normal_(regressor.weight)
        assert loss_of(found, smaller, dense, example) > 0.1


def test_two_compressions_unfold_as_one_after_the_other():
    dense, example, _, _ = duplicated("vgg")
    once, _ = compress(dense, example, "fold", 0.3)
    twice, _ = compress(once, example, "fold", 0.2)
    with hinted(hints(twice, dense, example=example)) as found:
        assert loss_of(found, twice, dense, example) < 1e-10
    with hinted(hints(twice, once, example=example)) as found:
        assert loss_of(found, twice, once, example) < 1e-10


def test_a_dropped_channel_begins_as_zero():
    dense = net(PICTURES)
    smaller, report = compress(dense, PICTURES, "l1", 0.5)
    with hinted(hints(smaller, dense)) as found:
        for group, regressor in zip(report.groups, found.regressors.values(), strict=True):
            assert regressor.weight.any(1).tolist() == (group.labels >= 0).tolist()


def test_outputs_of_named_layers_are_matched_by_the_map_that_comes_closest():
    dense = net(PICTURES)
    smaller, report = compress(dense, PICTURES, "fold", 0.5)
    with hinted(hints(smaller, dense, *OUTPUTS)) as found:
        assert list(found.regressors) == ["0", "1"], "the last layer says as many classes"
        for group, regressor in zip(report.groups, found.regressors.values(), strict=True):
            assert torch.equal(regressor.weight.argmax(1), group.labels)


def test_a_stranger_is_matched_at_layers_of_both_names():
    torch.manual_seed(0)
    other, teacher = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 8, 3)), net(PICTURES)
    with hinted(hints(other, teacher, "0:1", "2:4")) as found:
        assert {key: tuple(r.weight.shape) for key, r in found.regressors.items()} == {"0": (8, 5)}
        loss = loss_of(found, other, teacher)
        expected = []
        for mine, theirs, regressor in ((0, 1, found.regressors["0"]), (2, 4, nn.Identity())):
            said = regressor(other[: mine + 1](PICTURES).movedim(1, -1)).movedim(-1, 1)
            taught = teacher[: theirs + 1](PICTURES)
            expected.append((said - taught).square().sum() / taught.square().sum())
        torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_hooks_are_gone_afterwards_also_where_the_layers_do_not_fit():
    def hooks(model: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    dense = net(PICTURES)
    smaller, _ = compress(dense, PICTURES, "fold", 0.5)
    with hinted(hints(smaller, dense)):
        assert hooks(smaller) == hooks(dense) == 2
    assert hooks(smaller) == hooks(dense) == 0
    with pytest.raises(UserError, match="choose layers that differ in channels alone"):
        hints(smaller, dense, "0:3")
    assert hooks(smaller) == hooks(dense) == 0


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["layer9"], "the network has no layer 'layer9'"),
        (["0:bn"], "the teacher has no layer 'bn'"),
        ([], r"has not the layers of its teacher; name some of both, such as layers=\[layer1,layer2\]"),
    ],
)
def test_layers_that_are_not_there_get_one_line(layers, message):
    other = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 8, 3))
    with pytest.raises(UserError, match=message) as caught:
        hints_of(other, net(PICTURES), PICTURES, layers, lambda: ChannelGroups(()))
    assert "\n" not in str(caught.value)


def test_to_check_the_layers_of_a_stage_draws_no_random_number():
    """The check makes a regressor from one width to another, as the stage would."""
    dense = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    before = torch.get_rng_state()
    trace(chains(["fold"], [0.5], ["distil(features=1,layers=[0:2])"]), dense, PICTURES[:1], Classification(), Traces())
    assert torch.equal(torch.get_rng_state(), before)


# --- in the stage


@pytest.mark.parametrize("text", ["fold@0.5 > distil(features=1)", "fold@0.5 > repair > distil(features=2,layers=[4])"])
def test_the_file_of_a_stage_holds_the_network_alone(tmp_path, text):
    chain = parse_chain(text)
    assert spell_chain(chain) == text
    on = ground(tmp_path)
    assert [row.status for row in rows_of([text], on)] == ["ok"] * (1 + len(chain))
    with safe_open(on.folder(chain) / NETWORK, "pt") as file:
        assert set(file.keys()) == set(net(PICTURES).state_dict())
    assert not list(on.folder(chain).glob("*.pt"))


def test_features_change_what_is_learned_and_see_no_label(tmp_path):
    class Untouchable:
        def __getattr__(self, name: str):
            raise AssertionError(f"a label was asked for its {name}")

    losses = {}
    for text in ("distil", "distil(features=1)"):
        on = ground(tmp_path / text)
        on.supplies.batches = [(pictures, Untouchable()) for pictures, _ in on.supplies.batches]
        rows = rows_of([f"fold@0.5 > {text}"], on)
        assert [row.status for row in rows] == ["ok"] * 3, rows[-1].reason
        assert (rows[-1].unlabelled, rows[-1].labelled) == (64, 0)
        losses[text] = rows[-1].loss
    assert len(set(losses.values())) == 2


def test_regressors_go_on_where_a_stage_was_cut_off(tmp_path, monkeypatch):
    chain = "fold@0.5 > distil(epochs=3,features=1)"
    whole = rows_of([chain], ground(tmp_path / "whole"))
    real, calls = distil.train_epoch_, []

    def cut(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(distil, "train_epoch_", cut)
    with pytest.raises(KeyboardInterrupt):
        rows_of([chain], ground(tmp_path / "cut"))
    again = rows_of([chain], ground(tmp_path / "cut"))
    assert len(calls) == 4, "epochs that are done are not done again"
    assert again[-1].loss == whole[-1].loss


def test_features_that_cannot_be_matched_are_refused_before_the_work(tmp_path):
    for text, message in {
        "fold@0.5 > distil(features=1,layers=[nose])": "no layer 'nose'",
        "fold@0.5 > distil(features=1,layers=[0:3])": "differ in channels alone",
        "fold@0.5 > distil(features=1,teacher=other)": "has not the layers of its teacher",
    }.items():
        on = ground(tmp_path, teachers={"other": lambda: nn.Sequential(net(PICTURES)).eval()})
        with pytest.raises(UserError, match=message):
            ready([parse_chain(text)], on)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distil(features=-1)", "distil: features -1 must be a weight of at least 0"),
        ("distil(layers=[layer1])", "distil: layers are matched with a weight; give one, such as features=1"),
        ("distil(features=1,layers=layer1)", r"distil: layers must be a list, such as \[layer1\]"),
    ],
)
def test_options_that_make_no_sense_get_one_line(text, message):
    with pytest.raises(UserError, match=message):
        parse_chain(text)
