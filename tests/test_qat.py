"""The stage qat: a network that learns on its grid beats one that is put on it, and lies on it bit for bit."""

import pytest
import torch
from stage_nets import TASK, Untouchable, accuracy, digits_data, digits_net
from torch import nn

from pipeline.compression.checkpoint import load_compressed, save_compressed, stored_size
from pipeline.compression.quantize.network import grids_of, on_grids, sites
from pipeline.data.module import PictureData
from pipeline.stages import Followed, State, Supplies, Training, parse_chain, spell_chain
from pipeline.stages.distil import PROGRESS
from pipeline.tables import UserError


@pytest.fixture(scope="module")
def digits() -> PictureData:
    return digits_data()


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return digits_net()


def followed(dense: nn.Module, digits: PictureData, count: int, labelled: bool = False) -> Followed:
    pictures, labels = digits.repair_data.__getitems__(range(count))
    parts = zip(pictures.split(32), labels.split(32), strict=True)
    batches = [(part, said if labelled else Untouchable()) for part, said in parts]
    return Followed(State(dense), Supplies(dense, digits.example, TASK, batches))


def after(text: str, given: Followed) -> nn.Module:
    with torch.no_grad():
        return given.state(parse_chain(text)).model


def test_an_epoch_on_the_grid_beats_rounding_without_a_label(dense, digits):
    given = followed(dense, digits, 1293)
    found = {text: accuracy(after(text, given), digits) for text in ("quantize(bits=2)", "qat(bits=2)")}
    assert found["qat(bits=2)"] > found["quantize(bits=2)"] + 0.5, found
    assert found["qat(bits=2)"] > 0.9, found


def test_labels_alone_train_it_too(dense, digits):
    given = followed(dense, digits, 1293, labelled=True)
    assert accuracy(after("qat(bits=2,labels=1)", given), digits) > 0.9


@pytest.mark.parametrize("tail", ["", " > repair"])
@pytest.mark.parametrize("options", ["bits=3", "bits=2,per=group,group=16,grid=symmetric", "bits=4,per=tensor,ends=32"])
def test_its_weights_lie_on_grids_of_the_asked_kind_and_come_back_from_the_file(dense, digits, options, tail, tmp_path):
    net = after(f"qat({options}){tail}", given := followed(dense, digits, 64))
    rounded = after(f"quantize({options})", given)
    assert list(net.state_dict()) == list(rounded.state_dict())
    assert {type(layer) for layer in net.modules()} == {type(layer) for layer in dense.modules()}
    assert set(on_grids(net)) == set(on_grids(rounded)) != set()
    for name, grid in grids_of(rounded).items():
        own = grids_of(net)[name]
        assert (own.bits, own.group, own.scale.shape) == (grid.bits, grid.group, grid.scale.shape)
    assert any(not torch.equal(net.get_parameter(name), rounded.get_parameter(name)) for name in sites(net))
    save_compressed(net, tmp_path / "net.safetensors")
    loaded, _ = load_compressed(tmp_path / "net.safetensors", dense)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in net.state_dict().items())
    assert set(on_grids(loaded)) == set(on_grids(net))
    assert stored_size(net) == stored_size(rounded)


def test_a_weight_on_a_grid_of_as_many_bits_goes_on_from_there(dense, digits):
    given = followed(dense, digits, 64)
    start = after("quantize(bits=3,rounding=gptq)", given)
    net = after("quantize(bits=3,rounding=gptq) > qat(bits=3,lr=1e-9)", given)
    for name, grid in grids_of(start).items():
        assert torch.equal(grids_of(net)[name].zero, grid.zero)
        torch.testing.assert_close(grids_of(net)[name].scale, grid.scale, rtol=1e-5, atol=0)
        torch.testing.assert_close(net.get_parameter(name), start.get_parameter(name), rtol=1e-5, atol=0)
    other = after("quantize(bits=3,rounding=gptq) > qat(bits=4,lr=1e-9)", given)
    assert {grid.bits for name, grid in grids_of(other).items()} == {4, 8}


def test_weights_that_a_mask_removed_stay_zero(dense, digits):
    given = followed(dense, digits, 64)
    masked = after("magnitude@0.5", given)
    net = after("magnitude@0.5 > qat(bits=3,lr=0.01)", given)
    removed = {name: masked.get_parameter(name) == 0 for name in sites(net)}
    assert sum(int(zero.sum()) for zero in removed.values()) > 1000
    assert not any(net.get_parameter(name)[zero].any() for name, zero in removed.items())


def test_a_stage_that_is_cut_off_ends_as_it_would_have(dense, digits, tmp_path):
    def run(epoch) -> dict[str, torch.Tensor]:
        given = followed(dense, digits, 64)
        given.supplies.training, given.supplies.folder = Training(epoch, 64, 2), tmp_path
        return after("qat(bits=2,epochs=3)", given).state_dict()

    batches = followed(dense, digits, 64).supplies.batches
    whole = run(lambda number: batches)
    (tmp_path / PROGRESS).unlink()
    seen: list[int] = []

    def cut_off(number: int):
        seen.append(number)
        if seen == [0, 1, 2]:
            raise KeyboardInterrupt
        return batches

    with pytest.raises(KeyboardInterrupt):
        run(cut_off)
    resumed = run(cut_off)
    assert seen == [0, 1, 2, 2], "epochs that are done are not done again"
    assert all(torch.equal(t, whole[name]) for name, t in resumed.items())


def test_samples_and_needs_are_those_of_the_training(dense, digits):
    supplies = followed(dense, digits, 128).supplies
    for text, seen, needs in (
        ("qat(epochs=3)", (384, 0), {"calibration"}),
        ("qat(labels=0.5)", (0, 128), {"labels"}),
        ("qat(labels=1)", (0, 128), {"labels"}),
        ("qat(loss=dkd)", (0, 128), {"labels"}),
        ("qat(on=self)", (0, 0), set()),
    ):
        (stage,) = parse_chain(text)
        assert (tuple(stage.seen(supplies)), stage.needs) == (seen, needs), text


def test_orders_that_cannot_work_are_refused_and_others_are_not():
    said = "fold@0.3 > repair > qat(bits=4) > repair > ptq"
    assert spell_chain(parse_chain(said)) == said
    with pytest.raises(UserError, match=r"tune cannot follow quantize\(bits=4\).*train on the grid with qat"):
        parse_chain("quantize(bits=4) > tune")
    with pytest.raises(UserError, match=r"fold@0\.5 cannot follow qat"):
        parse_chain("qat > fold@0.5")
    with pytest.raises(UserError, match="second repair finds nothing"):
        parse_chain("qat > repair > repair")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qat(epochs=1.5)", "qat: epochs 1.5 must be a whole number"),
        ("qat(lr=0)", "qat: lr 0 must be greater than 0"),
        ("qat(labels=2)", "qat: labels 2 must be in 0 <= labels <= 1"),
        ("qat(labels=1,loss=dkd)", "qat: teacher, loss and on are of distillation, and labels is 1"),
        ("qat(bits=1)", "bits 1 must be a whole number from 2 to 8"),
        ("qat(loss=mse)", "unknown loss 'mse'"),
        ("qat(rounding=gptq)", "no option 'rounding'"),
    ],
)
def test_options_that_make_no_sense_get_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_chain(text)
    assert "\n" not in str(caught.value)
