"""The order of training follows from seed and epoch, and goes on anywhere."""

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from texts import ready
from torch.utils.data import Dataset

from callbacks.loaders import twin
from pipeline.data.text.order import ResumableLoader, Shuffle
from pipeline.tables import UserError

pytestmark = [  # Lightning's remarks
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have overridden:UserWarning"),
]


class Numbers(Dataset):
    def __init__(self, size=50):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index


def loader(rank=0, world=1, workers=0, seed=0, size=50, batch=4):
    order = Shuffle(Numbers(size), world, rank, seed=seed, drop_last=True)
    return ResumableLoader(order.dataset, batch, sampler=order, drop_last=True, num_workers=workers)


def batches(made, count=None):
    found = []
    for batch in made:
        found.append(batch.tolist())
        if len(found) == count:
            break
    return found


def test_an_epoch_holds_every_index_once_in_an_order_of_its_own():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        order = Shuffle(Numbers(), 1, 0, seed=seed)
        order.set_epoch(epoch)
        orders.append(tuple(order))
        assert tuple(order) == orders[-1], "iterating changes nothing"
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_processes_share_the_batches_of_one():
    alone = batches(loader(batch=8))
    both = [batches(loader(rank, 2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*both, strict=True)] == [sorted(batch) for batch in alone]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("epoch", [0, 3])
def test_a_stopped_epoch_goes_on_with_what_was_not_seen(workers, world, epoch):
    for rank in range(world):
        first, whole, rest = (loader(rank, world, workers) for _ in range(3))
        for made in (first, whole):
            made.sampler.set_epoch(epoch)
        seen = batches(first, 3)
        rest.load_state_dict(first.state_dict())
        assert seen + batches(rest) == batches(whole)
        rest.sampler.set_epoch(epoch + 1)
        whole.sampler.set_epoch(epoch + 1)
        assert batches(rest) == batches(whole), "the next epoch starts at its start"


def test_a_copy_starts_at_the_start_and_leaves_the_place_alone():
    first, rest = loader(), loader()
    seen = batches(first, 3)
    rest.load_state_dict(first.state_dict())
    assert batches(twin(rest)) == batches(loader())
    assert seen + batches(rest) == batches(loader())


def test_a_run_of_two_processes_goes_on_with_one():
    first = [loader(rank, 2) for rank in range(2)]
    seen = [index for made in first for batch in batches(made, 3) for index in batch]
    rest = loader()
    rest.load_state_dict(first[0].state_dict())
    left = [index for batch in batches(rest) for index in batch]
    assert not set(seen) & set(left)
    assert len(seen) + len(left) == 48


def test_the_end_of_an_epoch_is_the_start_of_the_next():
    first, rest, next_one = loader(), loader(), loader()
    batches(first)
    rest.load_state_dict(first.state_dict())
    next_one.sampler.set_epoch(1)
    assert batches(rest) == batches(next_one)


@pytest.mark.parametrize("other", [{"size": 49}, {"seed": 1}])
def test_another_order_is_refused(other):
    with pytest.raises(UserError, match="the checkpoint stands in an order of 50 windows by seed 0, this run has"):
        loader(**other).load_state_dict(loader().state_dict())


class Watcher(LightningModule):
    """Keeps the ids of every training batch, in order."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch):
        self.seen.append(batch["input_ids"].tolist())
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0  # makes the training loader before states are restored
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(tmp_path, checkpoint=None, workers=0, **options):
    """Batches of three epochs, or of what a checkpoint leaves of them; every step writes a checkpoint."""
    model = Watcher()
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = ready(tmp_path, texts=TEXTS, workers=workers, batch_size=8)
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return model.seen


TEXTS = [f"{number} counts for one" for number in range(60)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [4, 7, 10])
def test_lightning_goes_on_inside_an_epoch(tmp_path, workers, steps):
    """Stopped before, at and behind the end of the first epoch of seven steps."""
    whole = fitted(tmp_path, workers=workers)
    assert len(whole) == 21
    assert whole[:7] != whole[7:14]
    assert fitted(tmp_path, tmp_path / f"step={steps}.ckpt", workers) == whole[steps:]


def test_lightning_may_overfit_a_few_batches(tmp_path):
    seen = fitted(tmp_path, overfit_batches=2)
    assert len(seen) == 6
    assert seen[:2] == seen[2:4]
