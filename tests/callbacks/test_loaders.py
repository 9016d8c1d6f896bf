"""A callback sees the same batches as Lightning's validation, to the last picture, and leaves no trace."""

import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
    random_split,
)
from torchmetrics.classification import MulticlassAccuracy

from callbacks.loaders import as_loader, calibration_batches, evaluation_batches, given_by_sampler, untouched
from pipeline.batches import Passes, first_sample, sample
from pipeline.evaluate import evaluate, settle
from pipeline.tables import UserError
from pipeline.tasks import Classification

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def pictures(n: int, seed: int = 0) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 1, 4, 4, generator=g), torch.randint(3, (n,), generator=g))


DATA, TRAIN = pictures(100, 1), pictures(24, 2)


class Plain(LightningModule):
    """A user's module with its own metrics; `seen` counts the pictures of its validation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.accuracies = nn.ModuleList(MulticlassAccuracy(3, average="micro") for _ in range(2))
        self.seen, self.pixels = [0, 0], torch.zeros(())

    def take_apart(self, batch):
        return (batch["image"], batch["labels"]) if isinstance(batch, dict) else batch

    def forward(self, image):
        return self.net(image)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_validation_epoch_start(self):
        self.seen = [0, 0]

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        inputs, labels = self.take_apart(batch)
        self.seen[dataloader_idx] += len(labels)
        self.pixels += inputs.sum()
        accuracy = self.accuracies[dataloader_idx]
        accuracy(self.net(inputs), labels)
        self.log(f"acc{dataloader_idx}", accuracy, on_epoch=True, add_dataloader_idx=False)

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class Hooked(Plain):
    """Transfer hooks that change the numbers, and augment in training alone, asking module or Trainer whether it is."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        inputs, labels = self.take_apart(batch)
        return [inputs * (0.1 + dataloader_idx), labels]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        inputs, labels = batch
        return (inputs.zero_() if self.trainer.training or self.training else inputs + 0.3), labels


class Look(lightning.Callback):
    """Counts and measures at the end of an epoch, as a callback that compresses does."""

    def __init__(self, split: str = "val", **options) -> None:
        self.split, self.options, self.found = split, options, {}

    def on_train_epoch_end(self, trainer, module):
        before = trainer.state.stage, module.training
        with isolate_rng(), torch.no_grad():
            for key, batches in evaluation_batches(trainer, module, self.split, **self.options).items():
                kept = Passes(batches)
                first = batches.first()
                task = settle(module, Classification(), first)
                totals = [evaluate(module, task, kept, check=True) for _ in range(2)]
                assert torch.equal(*totals), "passes differ"
                self.found[key] = (task.values(totals[0])["acc"], task.count(totals[0]))
        assert (trainer.state.stage, module.training) == before

    def on_test_epoch_end(self, trainer, module):
        self.on_train_epoch_end(trainer, module)


def trainer_for(folder: Path, *callbacks, **options) -> Trainer:
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
    options = {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0, **options}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **quiet, **options)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([DATA[i] for i in range(37)])


class Ready:
    """An iterable of batches that is no DataLoader."""

    def __iter__(self):
        return iter([DATA[:20], DATA[20:25]])


class Wrapper(Dataset):
    """A data set whose attribute `dataset` holds another one, with other and more pictures."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self):
        return 30

    def __getitem__(self, i):
        return self.dataset[2 * i][0] + 1, self.dataset[2 * i][1]


class Noisy(Wrapper):
    """Draws at random when a sample is fetched: a persistent worker would draw differently after another pass."""

    def __getitem__(self, i):
        return self.dataset[i][0] + torch.randn(1), self.dataset[i][1]

    def __len__(self):
        return len(self.dataset)


def as_dicts(samples: list) -> dict:
    inputs, labels = default_collate(samples)
    return {"image": inputs, "labels": labels}


def in_pairs() -> BatchSampler:
    return BatchSampler(SubsetRandomSampler(range(50, 83)), 7, False)


LOADERS = {
    "plain": (lambda: DataLoader(DATA, 32), {}, [100]),
    "subset sampler": (lambda: DataLoader(DATA, 10, sampler=SubsetRandomSampler(range(80, 100))), {}, [20]),
    "batch sampler": (lambda: DataLoader(DATA, batch_sampler=in_pairs()), {}, [33]),
    "drop last": (lambda: DataLoader(DATA, 32, drop_last=True), {}, [96]),
    "shuffled": (lambda: DataLoader(DATA, 32, shuffle=True), {}, [100]),
    "stream": (lambda: DataLoader(Stream(), 10), {}, [37]),
    "no loader": (lambda: Ready(), {}, [25]),
    "no batches": (lambda: DataLoader(DATA, None, sampler=[slice(0, 9), slice(9, 30)]), {}, [30]),
    "dicts": (lambda: DataLoader(DATA, 32, collate_fn=as_dicts), {}, [100]),
    "wrapper": (lambda: DataLoader(Wrapper(DATA), 8), {}, [30]),
    "two loaders": (lambda: [DataLoader(DATA, 32), DataLoader(pictures(7, 3), 2)], {}, [100, 7]),
    "limit": (lambda: DataLoader(DATA, 8), {"limit_val_batches": 3}, [24]),
    "one batch": (lambda: DataLoader(DATA, 8), {"limit_val_batches": 1}, [8]),
    "share": (lambda: DataLoader(DATA, 10), {"limit_val_batches": 0.5}, [50]),
    "fast": (lambda: DataLoader(DATA, 8), {"fast_dev_run": True}, [8]),
    "workers": (lambda: DataLoader(DATA, 32, num_workers=1, persistent_workers=True), {}, [100]),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("module", [Plain, Hooked])
def test_is_what_lightning_validates(kind, module, tmp_path):
    make, options, counts = LOADERS[kind]
    lightning.seed_everything(0, verbose=False)
    net, look = module(), Look()
    trainer = trainer_for(tmp_path, look, **options)
    trainer.fit(net, DataLoader(TRAIN, 8), make())
    assert [n for _, n in look.found.values()] == counts == net.seen[: len(counts)]
    for i, (acc, _) in enumerate(look.found.values()):
        assert acc == pytest.approx(trainer.callback_metrics[f"acc{i}"].item(), abs=1e-7)
    assert list(look.found) == ["val", "val/1"][: len(counts)]


def test_the_test_set_is_looked_at_in_the_same_way(tmp_path):
    net, look = Hooked(), Look("test")
    trainer = trainer_for(tmp_path, look, limit_test_batches=2)
    (logged,) = trainer.test(net, DataLoader(DATA, 16), verbose=False)
    assert look.found == {"test": (pytest.approx(logged["acc0"], abs=1e-7), 32)}


class Normalised(LightningDataModule):
    """A data module with hooks: Lightning prefers them to those of the module."""

    def train_dataloader(self):
        return DataLoader(TRAIN, 8)

    def val_dataloader(self):
        return DataLoader(DATA, 32)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return [part.to(device) for part in batch[:2]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert not self.trainer.training or batch[0].shape[0] == 8
        return -batch[0] if self.trainer.training else (batch[0] - 1) / 5, batch[1]


@pytest.mark.parametrize("module", [Plain, Hooked])
@pytest.mark.filterwarnings("ignore:You have overridden")
def test_hooks_of_the_data_module(module, tmp_path):
    net, look = module(), Look()
    trainer = trainer_for(tmp_path, look)
    trainer.fit(net, datamodule=Normalised())
    assert look.found["val"] == (pytest.approx(trainer.callback_metrics["acc0"].item(), abs=1e-7), 100)


def test_passes_that_are_streamed_see_the_same_samples(tmp_path):
    seen = []

    class Stream(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            for batches in evaluation_batches(trainer, module, "val").values():
                for _ in range(2):
                    seen.append(torch.cat([inputs for inputs, _ in batches]))
                    torch.rand(1)
                assert torch.equal(batches.first()[0], seen[-1][:8])

    loaders = [DataLoader(DATA, 8, shuffle=True, generator=g) for g in (None, torch.Generator())]
    trainer_for(tmp_path, Stream(), limit_val_batches=2).fit(Plain(), DataLoader(TRAIN, 8), loaders)
    assert [len(inputs) for inputs in seen] == [16] * 4
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])


def test_validation_that_is_switched_off_is_looked_at_nevertheless(tmp_path):
    look = Look()
    trainer_for(tmp_path, look, limit_val_batches=0).fit(Plain(), DataLoader(TRAIN, 8), DataLoader(DATA, 32))
    assert look.found["val"][1] == 100


LOADED = DataLoader(DATA, 9, sampler=[1, 2])


@pytest.mark.parametrize(
    ("data", "n"), [(DATA, 100), (Stream(), 37), (LOADED, 2), ([DATA[:9], DATA[9:13]], 13), (Wrapper(DATA), 30)]
)
def test_eval_data_of_ones_own(data, n, tmp_path):
    look = Look(eval_data=data, batch_size=16)
    trainer_for(tmp_path, look, limit_val_batches=1).fit(Plain(), DataLoader(TRAIN, 8), DataLoader(TRAIN, 8))
    assert look.found["val"][1] == n


def test_nothing_to_look_at_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to look at; give the Trainer validation data or pass eval_data="):
        trainer_for(tmp_path, Look()).fit(Plain(), DataLoader(TRAIN, 8))
    with pytest.raises(UserError, match="no batches to look at"):
        trainer_for(tmp_path, Look(eval_data=[])).fit(Plain(), DataLoader(TRAIN, 8))


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_a_generator_that_training_shares_goes_on_as_it_was(workers, tmp_path):
    def trained(*looks) -> tuple:
        generator = torch.Generator().manual_seed(7)
        train = DataLoader(TRAIN, 8, shuffle=True, generator=generator)
        sampler = RandomSampler(DATA, generator=generator)
        val = DataLoader(Noisy(DATA), 8, sampler=sampler, generator=generator, **workers)
        lightning.seed_everything(0, verbose=False)
        net = Plain()
        trainer_for(tmp_path, *looks, max_epochs=3).fit(net, train, val)
        weights = nn.utils.parameters_to_vector(net.parameters()).detach()
        return weights, net.pixels, generator.get_state(), torch.get_rng_state()

    for alone, looked_at in zip(trained(), trained(Look()), strict=True):
        assert torch.equal(alone, looked_at)


def test_generators_of_samplers_get_their_state_back():
    made = [torch.Generator().manual_seed(i) for i in range(3)]
    inner = RandomSampler(DATA, generator=made[0])
    loader = DataLoader(DATA, batch_sampler=BatchSampler(inner, 5, False), generator=made[1])
    other = DataLoader(DATA, 5, sampler=SubsetRandomSampler(range(9), generator=made[2]))
    before = [g.get_state() for g in made]
    for each in (loader, other):
        with untouched(each):
            list(each)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(made, before, strict=True))


# --- calibration


def calibrated(tmp_path: Path, data, size: int = 20, batch_size: int = 8, module=Plain) -> list:
    """The calibration batches at the start of an epoch, where the Trainer is training."""
    found = []

    class Calibrate(lightning.Callback):
        def on_train_epoch_start(self, trainer, net):
            found.extend(calibration_batches(trainer, net, data, size, seed=3, batch_size=batch_size))

    trainer_for(tmp_path, Calibrate()).fit(module(), DataLoader(TRAIN, 8), DataLoader(DATA, 50))
    return found


def test_a_data_set_gives_the_samples_of_the_seed(tmp_path):
    drawn = sample(100, 20, 3, 8)
    assert len(drawn) == 16
    for data in (DATA, DataLoader(DATA, 3), DataLoader(DATA, 3, shuffle=True)):
        batches = calibrated(tmp_path, data)
        assert [len(labels) for _, labels in batches] == [8, 8]
        assert torch.equal(torch.cat([inputs for inputs, _ in batches]), DATA.tensors[0][drawn])


def test_subsets_and_wrappers_are_data_sets_of_their_own(tmp_path):
    part, _ = random_split(DATA, [40, 60], torch.Generator().manual_seed(1))
    for data in (part, Wrapper(DATA)):
        expected = torch.stack([data[i][0] for i in sample(len(data), 20, 3, 8)])
        assert torch.equal(torch.cat([inputs for inputs, _ in calibrated(tmp_path, data)]), expected)


def test_a_loader_gives_what_its_sampler_may_give(tmp_path):
    allowed = {tuple(DATA.tensors[0][i].flatten().tolist()) for i in range(50, 83)}
    for loader in (
        DataLoader(DATA, 4, sampler=SubsetRandomSampler(range(50, 83))),
        DataLoader(DATA, batch_sampler=in_pairs()),
        DataLoader(DATA, batch_sampler=[list(range(50, 60)), list(range(60, 83))]),
    ):
        first, again = (torch.cat([x for x, _ in calibrated(tmp_path, loader)]) for _ in range(2))
        assert torch.equal(first, again)
        assert {tuple(row) for row in first.flatten(1).tolist()} <= allowed
        assert list(given_by_sampler(loader)) == list(range(50, 83))


@pytest.mark.parametrize("data", [Stream(), DataLoader(Stream(), 8), [DATA[:8], DATA[8:10], DATA[10:18], DATA[18:26]]])
def test_what_has_no_order_gives_its_first_batches(data, tmp_path):
    batches = calibrated(tmp_path, data)
    assert [len(labels) for _, labels in batches] == [8, 8]
    assert torch.equal(batches[0][0], DATA.tensors[0][:8])


def test_calibration_goes_through_the_hooks_without_augmentation(tmp_path):
    (inputs, _), _ = calibrated(tmp_path, DATA, module=Hooked)
    assert torch.allclose(inputs, DATA.tensors[0][sample(100, 20, 3, 8)][:8] * 0.1 + 0.3)


def test_no_samples_are_refused(tmp_path):
    with pytest.raises(UserError, match="no 20 training samples to look at; fix repair_data="):
        calibrated(tmp_path, [])


# --- passes and examples


@pytest.mark.parametrize("kept", [True, False])
def test_batches_are_kept_where_they_fit_and_streamed_where_not(kept, monkeypatch):
    fetched = []

    class Source:
        def __iter__(self):
            for batch in DataLoader(DATA, 40):
                fetched.append(len(batch[0]))
                yield tuple(batch)

    size = sum(tensor.numel() * tensor.element_size() for tensor in DATA.tensors)
    monkeypatch.setattr("pipeline.batches.KEPT", size if kept else size - 1)
    passes = Passes(Source())
    next(iter(passes))  # only a finished pass finds out whether batches fit
    fetched.clear()
    for _ in range(3):
        assert torch.equal(torch.cat([labels for _, labels in passes]), DATA.tensors[1])
    assert fetched == [40, 40, 20] * (1 if kept else 3)


def test_the_first_sample_of_any_inputs():
    ids = torch.arange(12).reshape(4, 3)
    cut = first_sample({"input_ids": ids, "scale": torch.tensor(2.0), "table": torch.ones(5, 2), "flag": True})
    assert cut["input_ids"].tolist() == [[0, 1, 2]]
    assert cut["input_ids"].untyped_storage().nbytes() == 3 * 8
    assert (cut["table"].shape, cut["flag"], cut["scale"].item()) == ((5, 2), True, 2)
    assert [part.shape[0] for part in first_sample((ids, ids))] == [1, 1]


def test_a_data_set_brings_its_own_collate_function():
    data = Wrapper(DATA)
    data.collate = as_dicts
    assert set(next(iter(as_loader(data, 4)))) == {"image", "labels"}


def test_every_picture_counts_once_on_two_processes(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "loaders_on_two_processes.py", tmp_path], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every picture counted once" in done.stdout
