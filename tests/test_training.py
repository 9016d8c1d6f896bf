"""The numbers that Training logs are those of evaluate, for every task; state dicts hold the network alone."""

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipeline.evaluate import metrics_of
from pipeline.tables import UserError
from pipeline.tasks import Classification
from pipeline.training import Training

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
g = torch.Generator().manual_seed(0)
INPUTS = torch.randn(21, 1, 6, 6, generator=g)
LABELS, SETS, PLACES = (torch.randint(k, s, generator=g) for k, s in ((3, (21,)), (2, (21, 3)), (3, (21, 6, 6))))
MIXED = torch.rand(21, 3, generator=g).softmax(1)
OPTIONS = {"optim": {"name": "sgd", "lr": 0.1}, "schedule": {"name": "constant"}}
HEAD = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
TASKS = {
    "multiclass": (HEAD, Classification("multiclass", classes=3), LABELS, LABELS),
    "mixed in training": (HEAD, Classification("multiclass", classes=3), MIXED, LABELS),
    "multilabel": (HEAD, Classification("multilabel", "logits", classes=3), SETS, SETS),
    "dense": (nn.Conv2d(1, 3, 3, padding=1), Classification("dense", classes=3), PLACES, PLACES),
}


class Record(Callback):
    """Keeps the loss and the size of every training batch."""

    def __init__(self) -> None:
        self.losses: list[tuple[float, int]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append((outputs["loss"].item(), len(batch[0])))


def fit(module: Training, train, val, folder, *callbacks) -> Trainer:
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
    lightning.seed_everything(0, verbose=False)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=2,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        **quiet,
    )
    trainer.fit(module, DataLoader(TensorDataset(INPUTS, train), 8), DataLoader(TensorDataset(INPUTS, val), 8))
    return trainer


@pytest.mark.parametrize("kind", TASKS)
def test_logs_what_evaluate_sums(kind, tmp_path):
    net, task, train, val = TASKS[kind]
    module, record = Training(net, task, **OPTIONS, label_smoothing=0.1), Record()
    trainer = fit(module, train, val, tmp_path, record)
    logged = trainer.callback_metrics
    assert set(logged) == {f"{split}/{name}" for split in ("train", "val") for name in task.metrics}
    for name, value in metrics_of(net, task, [(INPUTS, val)]).items():
        assert logged[f"val/{name}"].item() == pytest.approx(value, abs=1e-6), name
    last = record.losses[-3:]
    assert [n for _, n in last] == [8, 8, 5]
    mean = sum(loss * n for loss, n in last) / 21
    assert logged["train/loss"].item() == pytest.approx(mean, rel=1e-5), (
        "the smoothed loss, a sample as much as another"
    )
    tested = trainer.test(module, DataLoader(TensorDataset(INPUTS, val), 4), verbose=False)[0]
    assert set(tested) == {f"test/{name}" for name in task.metrics}


def test_state_dicts_hold_the_network_alone():
    module = Training(HEAD, Classification("multiclass", classes=3), **OPTIONS)
    assert list(module.state_dict()) == [f"net.{name}" for name in HEAD.state_dict()]


def test_inputs_are_what_the_task_says():
    class Named(nn.Module):
        def forward(self, a, b):
            return a * b

    batch = {"a": torch.ones(4, 3), "b": torch.full((4, 3), 2.0), "labels": torch.zeros(4, dtype=torch.int64)}
    module = Training(Named(), Classification("multiclass", classes=3), **OPTIONS)
    loss = module.task.loss(module.output(batch), batch)
    assert loss.item() == pytest.approx(F.cross_entropy(batch["a"] * 2, batch["labels"]).item())


def test_a_task_that_is_not_known_yet_is_refused():
    with pytest.raises(UserError, match="say kind=, one of: multiclass"):
        Training(HEAD, Classification(), **OPTIONS)


def test_a_compiled_network_trains_and_the_plain_one_is_measured(tmp_path, monkeypatch):
    calls = []

    def compiled(net):
        def run(*args, **kwargs):
            calls.append(net.training)
            return net(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    weights = []
    for compile in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        module = Training(net, Classification("multiclass", classes=3), **OPTIONS, compile=compile)
        fit(module, LABELS, LABELS, tmp_path)
        weights.append(module.state_dict())
    assert calls == [True] * 6, "three batches in each of two epochs"
    assert list(weights[0]) == list(weights[1])
    torch.testing.assert_close(*weights)
    module.net = nn.Sequential(*module.net)
    assert module.fast is not module.net
    module.train()
    module(INPUTS)
    assert module.compiled[0] is module.net, "a network that was made smaller is compiled anew"
