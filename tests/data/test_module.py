"""PictureData cuts its parts apart, and serves them to Lightning."""

import pickle

import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import RandomSampler, SequentialSampler

from pipeline.data import DATASETS
from pipeline.data.module import PictureData
from pipeline.tables import UserError


def ready(name="digits", **options):
    data = PictureData(name, **options)
    data.prepare_data()
    data.setup()
    return data


def as_set(pictures):
    return {bytes(image.numpy()) for image in pictures.images}


def test_attributes():
    data = ready()
    assert (data.channels, data.size, data.num_classes) == (1, 8, 10)
    assert data.classes == [str(digit) for digit in range(10)]
    assert data.example.shape == (1, 1, 8, 8)
    assert data.example.dtype == torch.float32
    assert torch.equal(data.example[0], data.repair_data[0][0])


def test_parts_are_disjoint_and_complete():
    data = ready(val_fraction=0.2)
    rows = torch.cat([data.train_data.rows, data.val_data.rows])
    assert torch.equal(rows.sort().values, torch.arange(1437))
    assert torch.equal(data.repair_data.rows, data.train_data.rows)
    assert not as_set(data.test_data) & (as_set(data.train_data) | as_set(data.val_data))


def test_seed_chooses_the_validation_part_but_never_the_test_part():
    first, again, other = ready(seed=1), ready(seed=1), ready(seed=2)
    assert torch.equal(first.val_data.rows, again.val_data.rows)
    assert not torch.equal(first.val_data.rows, other.val_data.rows)
    assert torch.equal(first.test_data.images, other.test_data.images)


def test_only_training_pictures_are_augmented():
    data = ready(augment=["crop"])
    assert data.train_data.augment is not None
    assert data.repair_data.augment is data.val_data.augment is data.test_data.augment is None


def test_test_size_is_the_same_part_for_every_seed():
    parts = [ready(test_size=50, seed=seed).test_data for seed in (0, 1)]
    assert torch.equal(parts[0].images, parts[1].images)
    assert torch.bincount(parts[0].labels).tolist() == [5] * 10


def test_train_size_keeps_validation_and_class_shares():
    data, small = ready(), ready(train_size=100)
    assert len(small.train_data) == len(small.repair_data) == 100
    assert torch.equal(small.val_data.rows, data.val_data.rows)
    assert set(small.train_data.rows.tolist()) < set(data.train_data.rows.tolist())
    assert small.train_data.labels.bincount().min() >= 9


def test_survives_pickling():
    """Strategies that spawn processes send the data module to them."""
    data = pickle.loads(pickle.dumps(ready(augment=["crop"], mixup=0.2, cutmix=0.2)))
    assert len(data.train_data) == 1293


def test_setup_runs_once():
    data = ready()
    train = data.train_data
    data.setup("test")
    assert data.train_data is train


def test_loaders():
    data = ready(batch_size=100, eval_batch_size=360)
    assert isinstance(data.train_dataloader().sampler, RandomSampler)
    assert isinstance(data.val_dataloader().sampler, SequentialSampler)
    ((images, labels),) = data.test_dataloader()
    assert images.shape == (360, 1, 8, 8)
    assert torch.equal(labels, data.test_data.labels)
    assert sum(len(labels) for _, labels in data.train_dataloader()) == len(data.train_data)


def test_worker_processes_serve_the_training_pictures():
    data = ready(workers=2, augment=["crop"], batch_size=500)
    loader = data.train_dataloader()
    for _ in range(2):
        assert sum(len(labels) for _, labels in loader) == len(data.train_data)


@pytest.mark.parametrize(("train_size", "dropped"), [(101, 1), (102, 0), (50, 0), (100, 0)])
def test_only_a_last_batch_of_one_is_dropped(train_size, dropped):
    loader = ready(train_size=train_size, batch_size=50).train_dataloader()
    assert sum(len(labels) for _, labels in loader) == train_size - dropped


def test_evaluating_leaves_torch_random_state_alone():
    data = ready()
    before = torch.get_rng_state()
    assert len(list(data.val_dataloader())) == 1
    assert torch.equal(torch.get_rng_state(), before)


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch):
        self.log("val_loss", self.training_step(batch))

    def test_step(self, batch):
        self.log("test_loss", self.training_step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning 2.6 under torch 2.15
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero:UserWarning")  # val_fraction 0
@pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning")
@pytest.mark.parametrize("val_fraction", [0.0, 0.1])
def test_trains_under_lightning(tmp_path, val_fraction):
    data = PictureData("digits", augment=["crop"], val_fraction=val_fraction)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    model = Linear()
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == -(-len(data.train_data) // 128)
    assert trainer.test(model, datamodule=data, verbose=False)[0]["test_loss"] < 2.3


class Stage:
    """The part of a Trainer that PictureData looks at."""

    def __init__(self, training):
        self.training, self.world_size = training, 1


def training(**options):
    data = ready(**options)
    data.trainer = Stage(training=True)
    return data


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_batches_hold_pictures_and_probabilities(options):
    torch.manual_seed(0)
    data = training(**options)
    batch = next(iter(data.train_dataloader()))
    images, labels = data.on_after_batch_transfer(batch, 0)
    assert images.shape == batch[0].shape
    assert images.dtype == labels.dtype == torch.float32
    assert not torch.equal(images, batch[0])
    assert labels.shape == (128, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(128))
    assert (labels.gather(1, batch[1][:, None]) > 0).all(), "a picture's own class is in the mixture"


def test_mixup_is_the_formula_and_cutmix_pastes_pixels():
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    torch.manual_seed(0)
    mixed, shares = training(mixup=1.0).on_after_batch_transfer((images, labels), 0)
    share = shares[0, 0]
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    torch.manual_seed(0)
    mixed, shares = training(cutmix=1.0).on_after_batch_transfer((images, labels), 0)
    kept = mixed == images
    assert (kept | (mixed == images.roll(1, 0))).all()
    assert kept[0].float().mean() == shares[0, 0]


def test_both_on_is_one_of_them_per_batch():
    torch.manual_seed(0)
    data, images, labels = training(mixup=1.0, cutmix=1.0), torch.randn(6, 1, 8, 8), torch.arange(6)
    pasted = 0
    for _ in range(60):
        mixed, _ = data.on_after_batch_transfer((images, labels), 0)
        pasted += bool(((mixed == images) | (mixed == images.roll(1, 0))).all())
    assert 15 < pasted < 45


def test_nothing_is_mixed_outside_training_or_when_off():
    batch = torch.randn(6, 1, 8, 8), torch.arange(6)
    data = ready(mixup=1.0)
    assert data.on_after_batch_transfer(batch, 0) is batch  # no trainer
    data.trainer = Stage(training=False)
    before = torch.get_rng_state()
    assert data.on_after_batch_transfer(batch, 0) is batch
    assert training().on_after_batch_transfer(batch, 0) is batch
    assert torch.equal(torch.get_rng_state(), before)


class Watcher(Linear):
    """Keeps the shape of the labels in each stage."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def training_step(self, batch):
        self.seen.add(("train", tuple(batch[1].shape)))
        return super().training_step(batch)

    def validation_step(self, batch):
        self.seen.add(("sanity" if self.trainer.sanity_checking else "val", tuple(batch[1].shape)))

    def test_step(self, batch):
        self.seen.add(("test", tuple(batch[1].shape)))


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning")
def test_lightning_mixes_training_batches_alone(tmp_path):
    data = PictureData("digits", mixup=0.2, train_size=100, batch_size=50, eval_batch_size=144)
    model = Watcher()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    assert model.seen == {
        ("sanity", (144,)),
        ("train", (50, 10)),
        ("val", (144,)),
        ("test", (144,)),
        ("test", (72,)),
    }


def test_an_epoch_of_worker_processes_depends_on_the_seed_alone():
    """Draws of workers in one epoch must not decide the next epoch, because a resumed run has no such workers."""
    options = {"workers": 2, "augment": ["crop"], "batch_size": 500}

    def epoch(loader, seed):
        torch.manual_seed(seed)
        return torch.cat([images for images, _ in loader])

    loader = ready(**options).train_dataloader()
    epoch(loader, 1)
    assert torch.equal(epoch(loader, 2), epoch(ready(**options).train_dataloader(), 2))


def test_download_can_be_refused(tmp_path, monkeypatch):
    def forbid(*args, **kwargs):
        raise AssertionError("downloads")

    monkeypatch.setattr("urllib.request.urlopen", forbid)
    with pytest.raises(UserError, match="no CIFAR-10 in"):
        ready("cifar10", root=tmp_path, download=False)


def test_any_folders_are_named_by_their_root():
    assert {name for name, source in DATASETS.items() if source.root_names_data} == {"folder", "imagenet", "text"}


def test_options_reach_the_set(cifar_folder):
    assert ready("folder", root=cifar_folder, size=16, val_fraction=0.2).size == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "digit"}, r"unknown data set 'digit' \(did you mean 'digits'\?\)"),
        (
            {"augment": ["crop", "flop"]},
            r"unknown augmentation 'flop' \(did you mean 'flip'\?\); choose from: crop, flip",
        ),
        ({"augment": "crop"}, r"augment must be a list of steps, such as \[crop, flip\] or \[\] for none, got 'crop'"),
        ({"augment": None}, r"augment must be a list of steps, .*, got None"),
        ({"augment": ["crop", "flip", "crop"]}, "augment names 'crop' twice; name every step once"),
        ({"mixup": -0.1}, r"mixup -0.1 must be in 0 <= alpha <= 100: 0 for none, usually 0.2 to 1"),
        ({"cutmix": float("inf")}, r"cutmix inf must be in 0 <= alpha <= 100"),
        ({"mixup": float("nan")}, r"mixup nan must be in 0 <= alpha <= 100"),
        ({"sise": 3}, "data set 'digits' has no option 'sise'; it takes: none"),
        ({"name": "folder", "sise": 3}, "data set 'folder' has no option 'sise'; it takes: root, size"),
        ({"val_fraction": 1.0}, r"val_fraction 1.0 must be in 0 <= f < 1"),
        ({"val_fraction": -0.1}, r"val_fraction -0.1 must be in 0 <= f < 1"),
        ({"val_fraction": 0.001}, "a part of 1 of 1437 pictures leaves one side without all 10 classes"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size 0 must be at least 1"),
        ({"train_size": 2000}, r"train_size 2000 must be in 1..1293"),
        ({"test_size": 1000}, r"test_size 1000 must be in 1..360"),
        ({"train_size": 0}, r"train_size 0 must be in 1..1293"),
        ({"train_size": 5}, "a part of 5 of 1293 pictures leaves one side without all 10 classes"),
    ],
)
def test_errors_name_the_value_and_the_fix(options, message):
    with pytest.raises(UserError, match=message):
        ready(**options)
