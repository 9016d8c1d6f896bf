"""The stage distil: a folded network learns from the one it came from, without a label; the same after a kill."""

import pytest
import torch
from stage_nets import TASK, Untouchable, accuracy, digits_data, digits_net
from torch import nn

from pipeline.compression import parse
from pipeline.data.module import PictureData
from pipeline.optim import build_optimizer
from pipeline.stages import State, Supplies, Training, compressed, distil, parse_chain
from pipeline.stages.distil import PROGRESS, Lesson
from pipeline.tables import UserError
from pipeline.tasks.language import Language


@pytest.fixture(scope="module")
def digits() -> PictureData:
    return digits_data()


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return digits_net()


def supplies(dense: nn.Module, digits: PictureData, count: int, batch: int = 64) -> Supplies:
    pictures, _ = digits.repair_data.__getitems__(range(count))
    return Supplies(dense, digits.example, TASK, [(part, Untouchable()) for part in pictures.split(batch)])


def folded(given: Supplies, ratio: float = 0.6) -> State:
    return next(compressed(State(given.dense), parse("fold"), [ratio], given))


def run(text: str, state: State, given: Supplies) -> nn.Module:
    (stage,) = parse_chain(text)
    with torch.no_grad():
        return stage.run(state.copied(), given).model


def test_an_epoch_without_labels_mends_a_folded_network(dense, digits):
    given = supplies(dense, digits, 1293, 32)
    state = folded(given, 0.5)
    before, after = accuracy(state.model, digits), accuracy(run("distil(lr=0.01)", state, given), digits)
    assert after > before + 0.4, (before, after)


def test_pictures_and_texts_are_taught_in_their_own_way_unless_the_stage_says_how(dense, digits, monkeypatch):
    rates: list[float] = []
    monkeypatch.setattr(distil, "build_optimizer", lambda p, name, lr: rates.append(lr) or build_optimizer(p, name, lr))
    given = supplies(dense, digits, 64)
    run("distil", folded(given), given)
    run("distil(lr=0.02)", folded(given), given)
    tokens = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 7))
    texts = [torch.randint(7, (4, 16))]
    language = Language().settled(tokens(texts[0]), texts[0])
    run("distil", State(tokens), Supplies(tokens, texts[0][:1], language, texts))
    assert rates == [3e-3, 0.02, 5e-4]
    assert Lesson().task(TASK, dense, None).temperature == 4
    assert Lesson().task(language, tokens, None).temperature == 1
    assert Lesson(temperature=2).task(language, tokens, None).temperature == 2


def test_the_teacher_and_the_state_of_the_process_stay_as_they_were(dense, digits):
    given = supplies(dense, digits, 128)
    state = folded(given)
    kept = {name: t.clone() for name, t in dense.state_dict().items()}
    dense.train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    learned = run("distil", state, given)
    assert torch.equal(torch.rand(1), expected), "no random number was drawn"
    assert dense.training
    dense.eval()
    assert all(torch.equal(t, kept[name]) for name, t in dense.state_dict().items())
    assert set(learned.state_dict()) == set(kept)
    assert not learned.training
    assert all(p.requires_grad and p.grad is None for p in learned.parameters())


def test_a_stage_that_is_cut_off_ends_as_it_would_have(dense, digits, tmp_path, monkeypatch):
    given = supplies(dense, digits, 128)
    state = folded(given)
    whole = run("distil(epochs=3)", state, given).state_dict()
    drawn: list[int] = []

    def epoch(number: int):
        if number == 2 and not drawn.count(2):
            drawn.append(number)
            raise KeyboardInterrupt
        drawn.append(number)
        return [given.batches[i] for i in torch.randperm(len(given.batches)).tolist()]

    given.training, given.folder = Training(epoch, 128, 2), tmp_path
    with pytest.raises(KeyboardInterrupt):
        run("distil(epochs=3)", state, given)
    assert (tmp_path / PROGRESS).exists()
    resumed = run("distil(epochs=3)", state, given).state_dict()
    assert drawn == [0, 1, 2, 2], "epochs that are done are not done again"
    assert all(torch.equal(t, whole[name]) for name, t in resumed.items())


def test_weights_that_a_mask_removed_stay_zero(dense, digits):
    given = supplies(dense, digits, 64)
    state = next(compressed(State(dense), parse("magnitude"), [0.5], given))
    learned = run("distil(lr=0.01)", state, given)
    masks = state.plan.masks
    assert masks
    for name, mask in masks.items():
        weight, before = learned.get_parameter(name), state.model.get_parameter(name)
        assert not weight[~mask].any(), name
        assert not torch.equal(weight, before), name


def test_another_teacher_is_asked_by_its_name(dense, digits):
    given = supplies(dense, digits, 64)
    state = folded(given, 0.0)
    given.teachers = {"sure": lambda: Scaled(dense)}
    assert not torch.equal(
        run("distil(teacher=sure)", state, given).linear.weight, run("distil", state, given).linear.weight
    )
    with pytest.raises(UserError, match=r"unknown teacher 'shy'.*choose from: sure"):
        run("distil(teacher=shy)", state, given)


class Scaled(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * self.net(x)


def test_samples_are_counted_as_often_as_they_are_trained_on(dense, digits):
    given = supplies(dense, digits, 128)

    def seen(text: str) -> tuple[int, int]:
        return tuple(parse_chain(text)[0].seen(given))

    assert seen("distil(epochs=3)") == (384, 0)
    assert seen("distil(labels=0.1)") == seen("distil(loss=dkd)") == (0, 128)
    assert seen("distil(on=self)") == (0, 0)
    given.training = Training(lambda epoch: [], 1000, 10)
    assert seen("distil(epochs=3)") == (3000, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distil(epochs=1.5)", "distil: epochs 1.5 must be a whole number"),
        ("distil(lr=0)", "distil: lr 0 must be greater than 0, and finite"),
        ("distil(labels=1)", "distil: labels 1 must be in 0 <= labels < 1; tune trains on labels alone"),
        ("distil(beta=2)", r"distil: beta 2 is of loss=dkd, and the loss is kl; leave it out"),
        ("distil(loss=mse)", r"unknown loss 'mse'; choose from: dkd, kl, standardized"),
        ("distil(on=disk)", r"unknown on 'disk'"),
        ("distil(size=9)", "distil: size 9 is of texts that the network writes: give on=self, too"),
        ("distil(on=self,size=1.5)", "distil: size 1.5 must be a whole number"),
        ("distil(on=self,size=0)", "distil: size 0 must be greater than 0, and finite"),
        ("distil(temperature=hot)", "temperature must be a number, got 'hot'"),
    ],
)
def test_options_that_make_no_sense_get_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_chain(text)
    assert "\n" not in str(caught.value)
