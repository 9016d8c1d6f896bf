"""Count the samples that two gloo processes look at in loaders of every kind. Run by test_loaders.py."""

import sys
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SubsetRandomSampler

sys.path.insert(0, str(Path(__file__).parent))
from test_loaders import DATA, TRAIN, Hooked, in_pairs, pictures, trainer_for

from callbacks.loaders import calibration_batches, evaluation_batches

ODD = pictures(61, 4)


class Sharded(IterableDataset):
    """Each process has its own samples."""

    def __iter__(self):
        rank = torch.distributed.get_rank()
        return iter([ODD[i] for i in range(rank, 31, 2)])


class Own(DistributedSampler):
    """A sampler of the user's own."""


def loaders() -> dict[str, tuple]:
    """{name: (loader, the indices of DATA or ODD that it has)}"""
    return {
        "default": (DataLoader(ODD, 8), ODD, range(61)),
        "shuffled": (DataLoader(ODD, 8, shuffle=True), ODD, range(61)),
        "subset": (DataLoader(DATA, 10, sampler=SubsetRandomSampler(range(70, 99))), DATA, range(70, 99)),
        "batch sampler": (DataLoader(DATA, batch_sampler=in_pairs()), DATA, range(50, 83)),
        "one batch": (DataLoader(ODD, 64), ODD, range(61)),
        "stream": (DataLoader(Sharded(), 4), ODD, range(31)),
        "own": (DataLoader(ODD, 8, sampler=Own(ODD, 2, torch.distributed.get_rank(), shuffle=False)), ODD, range(61)),
    }


class Count(lightning.Callback):
    def on_train_epoch_end(self, trainer, module):
        torch.manual_seed(trainer.global_rank)  # processes need not draw alike
        with isolate_rng(), torch.no_grad():
            found = evaluation_batches(trainer, module, "val")
        kinds = loaders()
        assert list(found) == ["val", *(f"val/{i}" for i in range(1, len(kinds)))]
        for i, (batches, (name, (_, data, indices))) in enumerate(zip(found.values(), kinds.items(), strict=True)):
            parts = [part for part in batches]
            # The batches as the hooks left them; the sum of the pictures tells which ones they are.
            mine = [sum(len(y) for _, y in parts), sum(float(x.double().sum()) for x, _ in parts)]
            n, total = trainer.strategy.reduce(torch.tensor(mine, dtype=torch.float64), reduce_op="sum").tolist()
            chosen = data.tensors[0][list(indices)].double()
            assert n == len(chosen), (name, n, len(chosen))
            assert abs(total - float((chosen * (0.1 + i) + 0.3).sum())) < 1e-2, name
            if name not in ("stream", "own"):
                self.alike(trainer, batches.first()[0].double().sum())
        for data in (ODD, DataLoader(ODD, 8, sampler=SubsetRandomSampler(range(30))), DataLoader(Sharded(), 4)):
            drawn = list(calibration_batches(trainer, module, data, 16, seed=0, batch_size=4))
            assert [len(y) for _, y in drawn] == [4, 4, 4, 4]
            self.alike(trainer, torch.stack([x.double().sum() for x, _ in drawn]))

    def alike(self, trainer, value):
        gathered = trainer.strategy.all_gather(value)
        assert torch.equal(gathered[0], gathered[1]), gathered


class Module(Hooked):
    def val_dataloader(self):
        return [loader for loader, _, _ in loaders().values()]

    def validation_step(self, batch, batch_idx, dataloader_idx):
        pass


def main() -> None:
    warnings.simplefilter("ignore")
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork")
    trainer_for(Path(sys.argv[1]), Count(), strategy=strategy, devices=2).fit(Module(), DataLoader(TRAIN, 8))
    print("every picture counted once")


if __name__ == "__main__":
    main()
