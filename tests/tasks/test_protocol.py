"""A task of another kind, the next tokens of a text, fits the protocol without changes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluate import evaluate, settle
from pipeline.tasks import Task
from pipeline.tasks.task import Layout, widened


class NextToken(Task):
    """Mean loss of the token that comes next, in nats. n counts sequences."""

    name, metrics, size = "next token", ("loss",), 3
    layout = Layout(labels="input_ids", inputs=("input_ids", "attention_mask"))

    def inputs(self, batch):
        return self.layout.example(batch)

    def settled(self, output, batch):
        self.check(output, batch)
        return self

    def check(self, output, batch):
        assert self.layout.scores(output).shape[:2] == batch["input_ids"].shape

    def losses(self, output, batch) -> tuple[Tensor, Tensor]:
        logits, counts = widened(self.layout.scores(output))[:, :-1], batch["attention_mask"][:, 1:].bool()
        return F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none") * counts, counts

    def loss(self, output, batch, label_smoothing=0.0):
        losses, counts = self.losses(output, batch)
        return losses.sum() / counts.sum()

    def totals(self, output, batch):
        losses, counts = self.losses(output, batch)
        return torch.stack([torch.full((), len(losses)), counts.sum(), losses.sum()]).double()

    def values(self, totals):
        return {"loss": float(totals[2] / totals[1])}

    def count(self, totals):
        return int(totals[0])

    def answers(self, output):
        return widened(self.layout.scores(output)).flatten(0, 1)


class Bigrams(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.next = nn.Embedding(tokens, tokens)

    def forward(self, input_ids, attention_mask):
        return {"logits": self.next(input_ids)}


def test_language_fits():
    torch.manual_seed(0)
    net, mask = Bigrams(7), torch.ones(4, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    batches = [{"input_ids": torch.randint(7, (4, 9)), "attention_mask": m} for m in (mask, torch.ones_like(mask))]
    task = settle(net, NextToken(), batches[0])
    totals = evaluate(net, task, batches, check=True)
    assert task.count(totals) == 8
    assert totals[1] == 4 * 8 * 2 - 4
    assert task.answers(net(**batches[0])).shape == (36, 7)
    with torch.no_grad():
        losses = [task.loss(net(**batch), batch).item() for batch in batches]
    assert task.values(totals)["loss"] == pytest.approx((28 * losses[0] + 32 * losses[1]) / 60, rel=1e-6)
    net.next.weight.data.zero_()
    assert task.values(evaluate(net, task, batches))["loss"] == pytest.approx(math.log(7))
