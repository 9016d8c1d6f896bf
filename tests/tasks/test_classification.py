"""Every kind of classification equals torchmetrics over uneven batches, and anything else is refused."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import functional as tm

from pipeline.evaluate import evaluate, metrics_of, settle
from pipeline.tables import UserError
from pipeline.tasks import METRICS, Classification

SIZES = (5, 8, 1, 3)  # sizes of batches
N, C = sum(SIZES), 4
g = torch.Generator().manual_seed(0)
SCORES, SINGLE, MAPS = (torch.randn(*s, generator=g) for s in ((N, C), (N,), (N, C, 6, 5)))
LABELS, BITS, SETS = (torch.randint(k, s, generator=g) for k, s in ((C, (N,)), (2, (N,)), (2, (N, C))))
PLACES = torch.randint(3, (N, 6, 5), generator=g)  # no label is class 3, but some answers are
HOLES = torch.where(torch.rand(N, 6, 5, generator=g) < 0.2, 255, PLACES)
SOFT = torch.rand(N, C, generator=g).softmax(1)
HOT = F.one_hot(LABELS, C)
SOME = torch.where(torch.arange(N) % 3 == 0, -100, LABELS)
FEW = torch.where(torch.rand(N, C, generator=g) < 0.2, -1, SETS)


class Given(nn.Module):
    """Returns its input, so that tests choose the outputs."""

    def forward(self, inputs):
        return inputs


def batches(scores: Tensor, labels: Tensor) -> list:
    return list(zip(scores.split(SIZES), labels.split(SIZES), strict=True))


def found(task: Classification, scores: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics of a task settled on the first batch, with every batch checked, summed over all."""
    data = batches(scores, labels)
    settled = settle(Given(), task, data[0])
    totals = evaluate(Given(), settled, data, check=True)
    assert totals.shape == (settled.size,)
    assert totals.dtype == torch.float64
    assert settled.count(totals) == N
    values = settled.values(totals)
    assert tuple(values) == settled.metrics
    assert set(values) <= set(METRICS)
    loss = torch.stack([settled.loss(s, (s, y)) for s, y in [(scores, labels)]])
    assert values["loss"] == pytest.approx(loss.item(), abs=1e-6)
    return values


def multi(scores: Tensor, labels: Tensor, ignore: int | None = None) -> float:
    return tm.accuracy(scores, labels, "multiclass", num_classes=C, average="micro", ignore_index=ignore).item()


def sets(scores: Tensor, labels: Tensor, ignore: int | None = None) -> dict[str, float]:
    options = {"num_labels": C, "ignore_index": ignore}
    values = {"acc": tm.accuracy(scores, labels, "multilabel", average="micro", **options).item()}
    if ignore is None:
        values["exact"] = tm.exact_match(scores, labels, "multilabel", num_labels=C).item()
    return values


def dense(scores: Tensor, labels: Tensor, classes: int = C, ignore: int | None = None) -> dict[str, float]:
    options = {"num_classes": classes, "ignore_index": ignore}
    index = tm.jaccard_index(scores, labels, "multiclass", average="macro", **options).item()
    return {"miou": index, "acc": tm.accuracy(scores, labels, "multiclass", average="micro", **options).item()}


bce, ce = F.binary_cross_entropy_with_logits, F.cross_entropy
TWO = torch.stack([torch.zeros(N, 6, 5), MAPS[:, 0]], 1)
KEPT = FEW >= 0
KINDS = {
    "multi-class": (Classification(), SCORES, LABELS, {"acc": multi(SCORES, LABELS), "loss": ce(SCORES, LABELS)}),
    "labels (N, 1)": (Classification(), SCORES, LABELS[:, None], {"acc": multi(SCORES, LABELS)}),
    "labels int32": (Classification(), SCORES, LABELS.int(), {"acc": multi(SCORES, LABELS)}),
    "softmax": (
        Classification(),
        SCORES.softmax(1),
        LABELS,
        {"loss": ce(SCORES, LABELS), "acc": multi(SCORES, LABELS)},
    ),
    "ignored": (
        Classification(ignore_index=-100),
        SCORES,
        SOME,
        {"acc": multi(SCORES, SOME, -100), "loss": ce(SCORES, SOME)},
    ),
    "one-hot": (Classification(), SCORES, HOT, {"acc": multi(SCORES, LABELS), "loss": ce(SCORES, LABELS)}),
    "one-hot floats": (Classification(), SCORES, HOT.double(), {"acc": multi(SCORES, LABELS)}),
    "mixed": (Classification(), SCORES, SOFT, {"acc": multi(SCORES, SOFT.argmax(1)), "loss": ce(SCORES, SOFT)}),
    "binary": (
        Classification(),
        SINGLE,
        BITS,
        {"acc": tm.accuracy(SINGLE, BITS, "binary").item(), "loss": bce(SINGLE, BITS.float())},
    ),
    "binary (N, 1)": (
        Classification(),
        SINGLE[:, None],
        BITS[:, None].float(),
        {"acc": tm.accuracy(SINGLE, BITS, "binary").item()},
    ),
    "binary bool": (Classification(), SINGLE[:, None], BITS.bool(), {"loss": bce(SINGLE, BITS.float())}),
    "binary probabilities": (
        Classification(outputs="probabilities"),
        SINGLE.sigmoid(),
        BITS,
        {"acc": tm.accuracy(SINGLE, BITS, "binary").item(), "loss": bce(SINGLE, BITS.float())},
    ),
    "multi-label": (Classification(), SCORES, SETS, {**sets(SCORES, SETS), "loss": bce(SCORES, SETS.float())}),
    "multi-label floats": (Classification(), SCORES, SETS.float(), sets(SCORES, SETS)),
    "multi-label ignored": (
        Classification("multilabel", ignore_index=-1),
        SCORES,
        FEW,
        {**sets(SCORES, FEW, -1), "loss": bce(SCORES[KEPT], FEW[KEPT].float())},
    ),
    "dense": (Classification(), MAPS, PLACES, {**dense(MAPS, PLACES), "loss": ce(MAPS, PLACES)}),
    "dense (N, 1, ...)": (Classification(), MAPS, PLACES[:, None], dense(MAPS, PLACES)),
    "dense ignored": (
        Classification(ignore_index=255),
        MAPS,
        HOLES,
        {**dense(MAPS, HOLES, ignore=255), "loss": ce(MAPS, HOLES, ignore_index=255)},
    ),
    "dense ignored class": (Classification(ignore_index=0), MAPS, PLACES, dense(MAPS, PLACES, ignore=0)),
    "dense softmax": (Classification(), MAPS.softmax(1), PLACES, {**dense(MAPS, PLACES), "loss": ce(MAPS, PLACES)}),
    "dense sequence": (Classification(), MAPS.flatten(2), PLACES.flatten(1), dense(MAPS, PLACES)),
    "dense one channel": (
        Classification(),
        MAPS[:, :1],
        (PLACES[:, None] > 1).float(),
        {**dense(TWO, (PLACES > 1).long(), 2), "loss": bce(MAPS[:, 0], (PLACES > 1).float())},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_torchmetrics(kind):
    task, scores, labels, expected = KINDS[kind]
    values = found(task, scores, labels)
    for name, value in expected.items():
        assert values[name] == pytest.approx(float(value), abs=1e-6), name


CHANCES = {"multi-class": 1 / C, "one-hot": 1 / C, "mixed": 1 / C, "binary bool": 1 / 2, "multi-label": None}
CHANCES["dense"] = None


@pytest.mark.parametrize("kind", CHANCES)
def test_blind_answers_have_the_chance_that_the_task_says(kind):
    task, scores, labels, _ = KINDS[kind]
    settled = task.settled(scores, (scores, labels))
    assert settled.chance == CHANCES[kind]
    if settled.chance is not None:
        drawn = torch.randn((20_000, *scores.shape[1:]), generator=torch.Generator().manual_seed(0))
        skewed = labels[:1].expand(20_000, *labels.shape[1:])  # all of one class
        assert metrics_of(Given(), settled, [(drawn, skewed)])["acc"] == pytest.approx(settled.chance, abs=0.02)


def test_all_labels_of_a_sample_right():
    scores = torch.tensor([[1.0, -1], [1, 1], [-1, -1]])
    assert found_exact(scores, torch.tensor([[1, 0], [1, 0], [-1, 0]])) == pytest.approx(2 / 3)


def found_exact(scores: Tensor, labels: Tensor) -> float:
    return metrics_of(Given(), Classification("multilabel", "logits", ignore_index=-1), [(scores, labels)])["exact"]


SAYS = "say outputs='logits' or outputs='probabilities'"
REFUSED = {
    "maps of a classifier": (
        (N, C, 6, 5),
        LABELS,
        "outputs .5, 4, 6, 5. and labels .5,. torch.int64.*dense.*flatten",
    ),
    "pixels of one label": ((N, C), PLACES, "outputs .5, 4. and labels .5, 6, 5. .*multiclass"),
    "another size": ((N, C, 3, 3), PLACES, "resize the outputs"),
    "another number": ((N, C), SETS[:, :3], "outputs .5, 4. and labels .5, 3."),
    "one sample each": ((N, C), LABELS[:, None].expand(N, N), "cannot be compared"),
    "regression": ((N, 1), SINGLE, "labels are torch.float32 such as .* regression"),
    "regression of many": ((N, C), SCORES, "neither 0 and 1 nor rows that sum to 1"),
    "whole floats": ((N, C), LABELS.float(), "integers .labels.long"),
    "label too large": ((N, C), LABELS + 4, "label [4-7] is none of the 4 classes 0 ... 3"),
    "label too small": ((N, C), torch.full((N,), -1), "pass ignore_index=-1"),
    "binary of -1 and 1": ((N,), 2 * BITS - 1, "label -1 is none of the 2 classes"),
    "classes of one logit": ((N, 1), torch.full((N,), 3), "label 3 is none of the 2 classes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what):
    shape, labels, text = REFUSED[what]
    with pytest.raises(UserError, match=text) as error:
        found(Classification(), torch.randn(shape, generator=torch.Generator().manual_seed(3)), labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("scores", "labels"), [(SINGLE.sigmoid(), BITS), (SCORES.sigmoid(), SETS)])
def test_refuses_to_guess_the_threshold(scores, labels):
    with pytest.raises(UserError, match=SAYS):
        found(Classification(), scores, labels)
    by_zero, by_half = (found(Classification(outputs=kind), scores, labels) for kind in ("logits", "probabilities"))
    assert by_zero["acc"] == pytest.approx(labels.float().mean().item()), "every probability lies above 0"
    assert by_half["loss"] != pytest.approx(by_zero["loss"])


LATER = {
    "several of a row": ("onehot", Classification(), SCORES, HOT, SETS, "kind='multilabel'"),
    "soft rows": ("onehot", Classification(), SCORES, HOT, SOFT, "kind='mixed'"),
    "a label out of range": ("multiclass", Classification(), SCORES, LABELS, LABELS + 1, "ignore_index=4"),
    "no distribution": ("multiclass", Classification(), SCORES.softmax(1), LABELS, None, "outputs='logits'"),
    "other classes": ("multiclass", Classification(classes=5), SCORES, LABELS, LABELS, "4 classes and the task 5"),
}


@pytest.mark.parametrize("what", LATER)
def test_refuses_a_later_batch(what):
    kind, task, scores, labels, later, text = LATER[what]
    if task.classes is None:
        task = settle(Given(), task, (scores, labels))
        assert task.kind == kind
    if later is None:
        scores, later = SCORES, labels
    with pytest.raises(UserError, match=text):
        settle(Given(), task, (scores, later)).check(scores, (scores, later))


def test_takes_batches_and_outputs_apart():
    answer = ce(SCORES, LABELS).item()

    def loss(task: Classification, output, batch) -> float:
        return task.settled(output, batch).loss(output, batch).item()

    pair = (SCORES, LABELS)
    for output in ({"logits": SCORES}, {"out": SCORES, "aux": SINGLE}, SimpleNamespace(logits=SCORES, loss=None)):
        assert loss(Classification(), output, pair) == pytest.approx(answer)
    assert loss(Classification(output=1), (SINGLE, SCORES), pair) == pytest.approx(answer)
    assert loss(Classification(output="head"), {"head": SCORES}, pair) == pytest.approx(answer)
    for task, batch, inputs in (
        (Classification(), {"a": 1, "b": 2, "labels": LABELS}, {"a": 1, "b": 2}),
        (Classification(inputs="a", labels="y"), {"a": SCORES, "y": LABELS, "id": 3}, SCORES),
        (Classification(inputs=("a", "b"), labels="y"), {"a": 1, "b": 2, "c": 3, "y": LABELS}, {"a": 1, "b": 2}),
        (Classification(inputs=2, labels=0), (LABELS, 0, SCORES), SCORES),
        (Classification(inputs=(0, 2), labels=1), (SCORES, LABELS, SINGLE), (SCORES, SINGLE)),
        (Classification(), ([SCORES, SINGLE], LABELS), (SCORES, SINGLE)),
        (Classification(), ({"x": SCORES}, LABELS), {"x": SCORES}),
    ):
        taken = task.inputs(batch)
        assert type(taken) is type(inputs)
        assert taken is inputs or len(taken) == len(inputs)
        assert loss(task, SCORES, batch) == pytest.approx(answer)


APART = {
    "three parts": (Classification(), SCORES, (SCORES, LABELS, LABELS), "list|tuple of 3 parts.*inputs= and labels="),
    "no labels": (Classification(), SCORES, {"image": SCORES, "target": LABELS}, "'image', 'target'; say which by"),
    "a tensor": (Classification(), SCORES, SCORES, "a tensor of shape"),
    "wrong key": (Classification(inputs="a", labels="b"), SCORES, {"a": SCORES}, "no part 'b'"),
    "a tuple of outputs": (Classification(), (SCORES, SINGLE), (SCORES, LABELS), "a tuple of 2 parts; .* output="),
    "no such output": (Classification(output="x"), {"y": SCORES}, (SCORES, LABELS), "a dict of 'y', which has no 'x'"),
    "answers": (Classification(), LABELS, (SCORES, LABELS), "torch.int64, not scores"),
    "labels of a list": (Classification(), SCORES, (SCORES, [1, 2]), "labels are a list"),
}


@pytest.mark.parametrize("what", APART)
def test_refuses_what_it_cannot_take_apart(what):
    task, output, batch, text = APART[what]
    with pytest.raises(UserError, match=text):
        task.settled(output, batch)


def test_what_is_not_known_yet_is_said():
    with pytest.raises(UserError, match="say kind=, one of: multiclass"):
        _ = Classification().metrics
    with pytest.raises(UserError, match="unknown kind of classification 'multi'"):
        Classification("multi")


@pytest.mark.parametrize("kind", ["multi-class", "softmax", "binary", "multi-label", "dense", "dense one channel"])
def test_answers_are_logits_a_row_each(kind):
    task, scores, labels, expected = KINDS[kind]
    settled = task.settled(scores, (scores, labels))
    rows = settled.answers(scores)
    assert rows.ndim == 2
    hard = labels.long().squeeze(1) if labels.ndim == scores.ndim == 4 else labels
    assert F.cross_entropy(rows, hard.flatten()).item() == pytest.approx(float(expected["loss"]), abs=1e-6)


def test_half_precision_is_widened_and_the_mode_is_kept():
    net = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C)).bfloat16()
    net.train()
    net[1].eval()
    totals = evaluate(net, Classification("multiclass"), [(torch.randn(6, 3).bfloat16(), LABELS[:6])])
    assert totals.dtype == torch.float64
    assert (net.training, net[0].training, net[1].training) == (True, True, False)
    assert evaluate(net, Classification("multiclass"), []) is None


def test_mixed_labels_are_trained_on_where_integers_are_measured():
    task = Classification("multiclass", classes=C)
    smooth = {"label_smoothing": 0.1}
    assert torch.equal(task.loss(SCORES, (SCORES, SOFT), **smooth), ce(SCORES, SOFT, **smooth))
    assert torch.equal(task.loss(SCORES, (SCORES, LABELS), **smooth), ce(SCORES, LABELS, **smooth))


def test_a_value_is_written_as_people_read_it():
    assert METRICS["acc"].text(0.7126) == "71.3%"
    assert METRICS["loss"].text(0.41234) == "0.412 nats"
    assert METRICS["acc"].short(0.7126) == "   71.3"
