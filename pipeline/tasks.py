"""The Lightning modules: what is trained, by which loss, and how it is measured."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from pipeline.optim import build_optimizer, build_schedule


class Classification(LightningModule):
    """Cross-entropy training of `net`, (B, ...) inputs to (B, classes) logits. Logs {train,val,test}/{loss,acc}.

    optim: {"name", "lr", options of the optimizer}; schedule: {"name", options}; see pipeline.optim.
    label_smoothing: of the training loss alone.
    """

    def __init__(
        self,
        net: nn.Module,
        classes: int,
        optim: Mapping[str, Any],
        schedule: Mapping[str, Any],
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.net = net
        self.optim, self.schedule, self.label_smoothing = dict(optim), dict(schedule), label_smoothing
        self.accuracies = nn.ModuleDict(
            {f"{split}_acc": MulticlassAccuracy(classes, average="micro") for split in ("train", "val", "test")}
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.step(batch, "train", self.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.step(batch, "test")

    def step(self, batch: tuple[Tensor, Tensor], split: str, label_smoothing: float = 0.0) -> Tensor:
        inputs, labels = batch
        logits = self(inputs)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        accuracy = self.accuracies[f"{split}_acc"]
        accuracy(logits, labels)
        every = {"on_step": False, "on_epoch": True, "batch_size": len(labels)}
        # Torchmetrics syncs itself; a plain number has to be told to.
        self.log(f"{split}/loss", loss, sync_dist=split != "train", **every)
        self.log(f"{split}/acc", accuracy, prog_bar=split != "train", **every)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.net.parameters(), **self.optim)
        schedule = build_schedule(optimizer, int(self.trainer.estimated_stepping_batches), self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
