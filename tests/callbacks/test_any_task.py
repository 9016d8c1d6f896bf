"""The callback in other people's trainers, with their loaders, labels and outputs. A wrong number is refused.

Each case once gave a wrong number or none: 100 samples instead of 20, accuracies of 560% and 4,791%, rows that all
failed, a traceback.
"""

from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    random_split,
)
from torchmetrics.classification import (
    BinaryAccuracy,
    MulticlassAccuracy,
    MulticlassJaccardIndex,
    MultilabelExactMatch,
)

from callbacks import CompressionCallback
from pipeline.tables import UserError
from pipeline.tasks import Classification

pytestmark = [pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(100, 2, 6, 6, generator=GENERATOR)
CLASSES = torch.randint(3, (100,), generator=GENERATOR)
MAPS = torch.randint(3, (100, 6, 6), generator=GENERATOR)
D = TensorDataset(X, CLASSES)


def net(outputs: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs),
    )  # fmt: skip


def pixels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))


class Wrapped(nn.Module):
    """Returns its logits inside another object."""

    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = net(), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


class Mine(LightningModule):
    """A user's module: the callback must give the dense network the number that the module's validation logs."""

    def __init__(self, net, metric, loss=nn.functional.cross_entropy, squeeze=False):
        super().__init__()
        self.net, self.metric, self.loss, self.squeeze = net, metric, loss, squeeze
        self.n = 0

    def outputs(self, x):
        found = self.net(x)
        found = found if isinstance(found, torch.Tensor) else found.logits if hasattr(found, "logits") else found["out"]
        return found.squeeze(1) if self.squeeze else found

    def training_step(self, batch, batch_idx):
        return self.loss(self.outputs(batch[0]), batch[1])

    def on_validation_epoch_start(self):
        self.n = 0

    def validation_step(self, batch, batch_idx):
        self.n += len(batch[0])
        found = self.outputs(batch[0])
        # torchmetrics takes a batch of logits that all lie in 0..1 for probabilities.
        self.metric(found.sigmoid() if self.squeeze else found, batch[1])
        self.log("mine", self.metric, on_step=False, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def fit(tmp_path, module, train, val, epochs=1, **options):
    lightning.seed_everything(1, verbose=False)
    measured = CompressionCallback(
        **{"methods": ["fold", "l1"], "ratios": [0.5], "repair_data": D, "repair_size": 32, **options}
    )
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=epochs, accelerator="cpu", callbacks=[measured], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, train, val)
    return measured, trainer


def is_the_trainers(measured, trainer, metric="acc") -> None:
    """Every row is there, and the dense one is the number of the module's own validation."""
    rows = measured.rows
    assert set(rows["status"]) == {"ok"}, set(rows["reason"])
    dense = rows.row(0, named=True)
    assert dense["method"] == "dense"
    assert dense["metric"] == metric
    assert dense["n"] == trainer.lightning_module.n
    assert dense[metric] == pytest.approx(float(trainer.callback_metrics["mine"]), abs=1e-6)
    assert all(0 <= value <= 1 for value in rows[metric])
    assert float(trainer.callback_metrics[f"compress/dense/{metric}"]) == pytest.approx(dense[metric])
    assert f"compress/fold/r0.5/{metric}_repaired" in trainer.callback_metrics


def micro(classes: int = 3) -> MulticlassAccuracy:
    return MulticlassAccuracy(classes, average="micro")


def test_a_sampler_says_what_is_looked_at(tmp_path):
    val = DataLoader(D, 10, sampler=SubsetRandomSampler(range(80, 100)))
    measured, trainer = fit(tmp_path, Mine(net(), micro()), DataLoader(D, 10), val)
    is_the_trainers(measured, trainer)
    assert set(measured.rows["n"]) == {20}


def test_data_without_a_length(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([D[i] for i in range(37)])

    measured, trainer = fit(tmp_path, Mine(net(), micro()), DataLoader(D, 10), DataLoader(Stream(), 10))
    is_the_trainers(measured, trainer)
    assert set(measured.rows["n"]) == {37}


class Renamed(Dataset):
    """A wrapper whose attribute `dataset` holds a data set of other samples."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return self.dataset[i + 50]


@pytest.mark.parametrize(
    "data",
    [random_split(D, [80, 20], GENERATOR)[0], Renamed(D), ConcatDataset([D, D]), DataLoader(D, 10, shuffle=True)],
    ids=["random_split", "wrapper", "concatenated", "loader"],
)
def test_repair_data_may_be_any_data_set_or_loader(tmp_path, data):
    measured, trainer = fit(tmp_path, Mine(net(), micro()), DataLoader(D, 10), DataLoader(D, 10), repair_data=data)
    is_the_trainers(measured, trainer)


def test_one_logit_is_a_binary_answer(tmp_path):
    labels = (CLASSES > 0).float()
    module = Mine(net(1), BinaryAccuracy(threshold=0.5), nn.functional.binary_cross_entropy_with_logits, squeeze=True)
    data = TensorDataset(X, labels)
    task = Classification(outputs="logits")
    measured, trainer = fit(
        tmp_path, module, DataLoader(data, 10), DataLoader(data, 7), task=task, repair_data=data,
        stages=["raw", "repaired", "norm_tuned", "tuned"],
    )  # fmt: skip
    is_the_trainers(measured, trainer)


def test_maps_of_pixels_are_measured_by_their_overlap(tmp_path):
    data = TensorDataset(X, MAPS)
    module = Mine(pixels(), MulticlassJaccardIndex(3))
    measured, trainer = fit(
        tmp_path, module, DataLoader(data, 10), DataLoader(data, 7), repair_data=data, predict=True,
        methods=["fold", "l1", "auto", "taylor+data", "l1+data+macs"], stages=["raw", "repaired", "norm_tuned"],
    )  # fmt: skip
    is_the_trainers(measured, trainer, "miou")
    assert {row["miou"] != row["acc"] for row in measured.rows.to_dicts()} == {True}
    assert measured.rows["fidelity"].drop_nulls().len() == 5 * 3


def test_several_labels_a_sample(tmp_path):
    data = TensorDataset(X, torch.randint(2, (100, 3), generator=GENERATOR))
    module = Mine(
        net(), MultilabelExactMatch(3), lambda x, y: nn.functional.binary_cross_entropy_with_logits(x, 1.0 * y)
    )
    measured, trainer = fit(tmp_path, module, DataLoader(data, 10), DataLoader(data, 7), repair_data=data)
    assert set(measured.rows["status"]) == {"ok"}
    dense = measured.rows.row(0, named=True)
    assert dense["exact"] == pytest.approx(float(trainer.callback_metrics["mine"]), abs=1e-6)
    assert dense["exact"] <= dense["acc"] <= 1


@pytest.mark.parametrize("wrap", [lambda t: {"out": t}, lambda t: SimpleNamespace(logits=t)], ids=["dict", "logits"])
def test_outputs_of_other_libraries(tmp_path, wrap):
    if wrap(0) != {"out": 0}:
        transformers = pytest.importorskip("transformers")

        def wrap(t):
            return transformers.modeling_outputs.ImageClassifierOutput(logits=t)

    measured, trainer = fit(tmp_path, Mine(Wrapped(wrap), micro()), DataLoader(D, 10), DataLoader(D, 7))
    is_the_trainers(measured, trainer)


REFUSED = {
    "a tuple": (Wrapped(lambda t: (t, t)), D, "tuple of 2 parts; say where its logits are by output="),
    "regression": (net(1), TensorDataset(X, torch.randn(100, generator=GENERATOR)), "float32"),
    "labels out of range": (net(), TensorDataset(X, CLASSES + 1), "3"),
    "more labels than outputs": (net(), TensorDataset(X, torch.zeros(100, 5).long()), r"\(10, 5\)"),
    "probability or logit": (
        nn.Sequential(net(1), nn.Sigmoid()), TensorDataset(X, (CLASSES > 0).float()), "logits.*probabilities",
    ),
    "three parts": (net(), TensorDataset(X, CLASSES, CLASSES), "3 parts, not .inputs, labels.; say which is which"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_cannot_be_measured_is_refused_in_one_line_before_training(tmp_path, what):
    network, data, message = REFUSED[what]

    class Quiet(Mine):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training began")

        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(UserError, match=message) as caught:
        fit(tmp_path, Quiet(network, micro()), DataLoader(data, 10), DataLoader(data, 10))
    assert "\n" not in str(caught.value)


def test_several_validation_loaders_have_rows_and_names_of_their_own(tmp_path):
    class Two(Mine):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    loaders = [DataLoader(D, 10), DataLoader(D, 10, sampler=range(30))]
    measured, trainer = fit(tmp_path, Two(net(), micro()), DataLoader(D, 10), loaders, stages=["raw"])
    assert measured.rows.group_by("split", maintain_order=True).agg(n=measured.rows["n"].max()).height == 2
    assert dict(measured.rows.select("split", "n").iter_rows()) == {"val": 100, "val/1": 30}
    assert {"compress/fold/r0.5/acc_raw", "compress_val1/fold/r0.5/acc_raw"} <= set(trainer.callback_metrics)
