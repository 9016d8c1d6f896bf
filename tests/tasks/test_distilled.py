"""Distillation is what the papers' formulas say, and the teacher leaves no trace."""

import pytest
import torch
import torch.nn.functional as F
from stage_nets import Untouchable
from torch import nn

from pipeline.tables import UserError
from pipeline.tasks import Classification, Language
from pipeline.tasks.distilled import Distilled, decoupled, response, standardized
from pipeline.tasks.task import IGNORED

DRAW = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (3 * torch.randn(12, 5, generator=DRAW, dtype=torch.float64) for _ in range(2))
LABELS = torch.randint(5, (12,), generator=DRAW)
TASK = Classification("multiclass", "logits", classes=5)


def distilled(task=TASK, teacher=TEACHER, **options) -> Distilled:
    return Distilled(task, lambda batch: teacher, **options)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_response_is_the_kl_divergence_of_softened_answers(temperature):
    taught = F.kl_div((STUDENT / temperature).log_softmax(1), (TEACHER / temperature).softmax(1), reduction="batchmean")
    assert torch.allclose(distilled(temperature=temperature).loss(STUDENT, (None, LABELS)), temperature**2 * taught)
    assert response(TEACHER, TEACHER, temperature).abs().max() < 1e-12


@pytest.mark.parametrize("labels", [0.0, 0.1, 0.7])
def test_labels_weigh_as_much_as_is_said(labels):
    found = distilled(labels=labels).loss(STUDENT, (None, LABELS))
    taught, hard = response(STUDENT, TEACHER, 4.0).mean(), F.cross_entropy(STUDENT, LABELS)
    assert torch.allclose(found, (1 - labels) * taught + labels * hard)


def test_standardized_answers_need_not_agree_in_magnitude():
    """A student whose logits are a scaled and shifted copy of the teacher's has learned all (section 3.3)."""
    assert standardized(0.2 * TEACHER + 3, TEACHER, 2.0).abs().max() < 1e-12
    assert response(0.2 * TEACHER + 3, TEACHER, 2.0).mean() > 0.1
    assert torch.allclose(standardized(7 * STUDENT, TEACHER, 2.0), standardized(STUDENT, TEACHER, 2.0), rtol=1e-5)
    with pytest.raises(UserError, match="at least 3 classes, and there are 2: use kl"):
        standardized(STUDENT[:, :2], TEACHER[:, :2], 2.0)


def test_the_two_parts_of_the_decoupled_loss_add_up_to_the_divergence():
    """Equation 7: KL = TCKD + (1 - p of the target) NCKD."""
    found = decoupled(STUDENT, TEACHER, LABELS, 4.0)
    assert torch.allclose(16 * (found.target + (1 - found.sure) * found.others), response(STUDENT, TEACHER, 4.0))
    loss = distilled(response="dkd", beta=3.0).loss(STUDENT, (None, LABELS))
    assert torch.allclose(loss, 16 * (found.target + 3 * found.others).mean())


@pytest.mark.parametrize("lesson", ["kl", "standardized", "dkd"])
def test_a_loss_by_parts_is_that_of_the_whole_and_keeps_the_logits_alone(lesson, monkeypatch):
    """A part is computed again for its gradient, so that nothing else is kept of all rows."""

    def learned() -> tuple[torch.Tensor, torch.Tensor, int]:
        own, kept = STUDENT.clone().requires_grad_(), {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = distilled(response=lesson).loss(own, (None, LABELS))
        loss.backward()
        return loss.detach(), own.grad, sum(kept.values())

    loss, gradient, kept = learned()
    monkeypatch.setattr("pipeline.tasks.parts.PART", 20)
    by_parts = learned()
    assert torch.equal(by_parts[0], loss)
    assert torch.equal(by_parts[1], gradient)
    assert by_parts[2] <= kept
    assert by_parts[2] < 3.5 * STUDENT.nbytes  # own, the teacher's, and a copy for rows that count


def test_the_decoupled_loss_has_finite_gradients_for_sure_networks():
    sure = (STUDENT.clone().float() * 30).requires_grad_()
    distilled(teacher=TEACHER.float() * 30, response="dkd").loss(sure, (None, LABELS)).backward()
    assert sure.grad.isfinite().all()
    assert sure.grad.abs().max() > 0


def test_without_labels_none_is_looked_at():
    batch = (torch.zeros(12, 3), Untouchable())
    for loss in ("kl", "standardized"):
        assert distilled(response=loss).loss(STUDENT, batch) > 0
    with pytest.raises(UserError, match="labels are a Untouchable"):
        distilled(response="dkd").loss(STUDENT, batch)
    with pytest.raises(UserError, match="labels are a Untouchable"):
        distilled(labels=0.1).loss(STUDENT, batch)


def test_measuring_is_that_of_the_task_itself():
    batch, around = (None, LABELS), distilled()
    assert torch.equal(around.totals(STUDENT, batch), TASK.totals(STUDENT, batch))
    assert (around.name, around.metrics, around.size) == (TASK.name, TASK.metrics, TASK.size)
    assert around.values(around.totals(STUDENT, batch)) == TASK.values(TASK.totals(STUDENT, batch))


def test_padding_teaches_nothing_and_tokens_count_as_pictures_do():
    ids = torch.randint(7, (3, 6), generator=DRAW)
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[2, 1:] = 0
    said, taught = (torch.randn(3, 6, 7, generator=DRAW) for _ in range(2))
    batch = {"input_ids": ids, "attention_mask": mask}
    task = distilled(Language(), taught)
    real = mask.flatten().bool()
    expected = response(said.flatten(0, 1)[real], taught.flatten(0, 1)[real], 4.0).mean()
    assert torch.allclose(task.loss(said, batch), expected)
    said[0, 5] += 100  # padding
    assert torch.allclose(task.loss(said, batch), expected)


def test_a_target_is_the_token_behind_and_padding_has_none():
    ids = torch.randint(7, (2, 4), generator=DRAW)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = Language().targets(None, {"input_ids": ids, "attention_mask": mask}).reshape(2, 4)
    assert found.tolist() == [[*ids[0, 1:].tolist(), IGNORED], [int(ids[1, 1]), *[IGNORED] * 3]]


@pytest.mark.parametrize("kind", ["multiclass", "onehot", "dense", "multilabel"])
def test_targets_stand_in_the_order_of_the_answers(kind):
    """A network that says the labels themselves has its greatest answer at the target."""
    labels = torch.randint(3, (4, 2, 2) if kind == "dense" else (4,), generator=DRAW)
    scores = F.one_hot(labels, 3).float().movedim(-1, 1) * 9
    labels = {"onehot": scores / 9, "multilabel": scores / 9}.get(kind, labels)
    scores = scores - 4.5 if kind == "multilabel" else scores
    task = Classification(kind, "logits", classes=3)
    assert torch.equal(task.answers(scores).argmax(1), task.targets(scores, (None, labels)))


def test_labels_that_are_ignored_are_no_targets():
    task = Classification("multiclass", "logits", classes=5, ignore_index=3)
    found = task.targets(STUDENT, (None, LABELS))
    assert torch.equal(found == IGNORED, LABELS == 3)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(UserError, match="the teacher says 4 classes and the network 5; choose a teacher of the same"):
        distilled(teacher=TEACHER[:, :4]).loss(STUDENT, (None, LABELS))
    with pytest.raises(UserError, match=r"unknown loss 'kd' .*choose from: dkd, kl, standardized"):
        distilled(response="kd")


def test_the_teacher_is_part_of_no_module():
    teacher, student = nn.Linear(3, 5), nn.Linear(3, 5)
    student.task = Distilled(TASK, lambda batch: teacher(batch[0]))
    assert set(student.state_dict()) == {"weight", "bias"}
    student.task.loss(student(torch.ones(2, 3)), (torch.ones(2, 3), None)).backward()
    assert teacher.weight.grad is None
    assert student.weight.grad.abs().max() > 0
