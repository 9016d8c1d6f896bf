"""A log gets one line an epoch, with what compression left and the time to go."""

import re

import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks import CompressionCallback
from callbacks.progress import CompressionProgressBar, EpochLines, duration, progress
from pipeline.tasks import Classification
from pipeline.training import Training


def test_one_line_an_epoch(capsys):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optim = {"optim": {"name": "sgd", "lr": 0.1}, "schedule": {"name": "constant"}}
    task = Training(net, Classification("multiclass", classes=2), **optim)
    loader = DataLoader(TensorDataset(torch.randn(16, 1, 2, 2), torch.arange(16) % 2), 8)
    compression = CompressionCallback(methods=["fold", "l1"], ratios=[0.5], stages=["raw"])
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[compression, EpochLines(["fold", "l1"], 0.5)],
    )  # fmt: skip
    trainer.fit(task, loader, loader)
    first, second = capsys.readouterr().out.strip().splitlines()
    number = r"[0-9.]+"
    shown = rf"loss {number}, val accuracy {number}%, fold@0.5 {number}, l1@0.5 {number}; [0-9]+ s"
    assert re.fullmatch(rf"epoch 1 of 2: {shown}, about [0-9]+ s to go", first)
    assert re.fullmatch(rf"epoch 2 of 2: {shown}", second)


def test_a_terminal_gets_a_bar(monkeypatch):
    assert isinstance(progress(["fold"], 0.5), EpochLines)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert isinstance(progress(["fold"], 0.5), CompressionProgressBar)


def test_durations():
    assert [duration(seconds) for seconds in (5, 75, 7300)] == ["5 s", "1 min 15 s", "2 h 1 min"]
