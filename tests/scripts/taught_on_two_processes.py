"""Learn from a teacher's answers and features on two gloo processes. Run by test_taught.py.

Every step must be that of the mean of both processes' gradients, as one process would compute it by hand.
"""

import copy
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import scripts.teachers
from pipeline.tasks import Classification
from pipeline.training import Training

DATA = TensorDataset(torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4)
PROCESSES, BATCH, LR, SEED = 2, 4, 0.05, 0
DISTIL = {"teacher": "wise", "labels": 0.5, "features": 2.0, "layers": ["0", "2"]}
CONFIG = {"distil": DISTIL, "shrink": {"method": None}, "compile": False}


def network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def taught() -> Training:
    options = {"optim": {"name": "sgd", "lr": LR, "momentum": 0}, "schedule": {"name": "constant"}}
    module = Training(network(5, 1), Classification("multiclass", classes=4), **options)
    return scripts.teachers.learning(module, CONFIG, SimpleNamespace(example=DATA.tensors[0][:1]))


def by_hand(module: Training) -> dict[str, torch.Tensor]:
    """The weights after an epoch of SGD, each step on the mean of the gradients of both processes' batches.

    The samples of each are those that Lightning's sampler gives it, which shuffles whatever the loader says.
    """
    trained = [*module.net.parameters(), *module.regressors.parameters()]
    pictures, labels = DATA.tensors
    orders = [list(DistributedSampler(DATA, PROCESSES, rank, shuffle=True, seed=SEED)) for rank in range(PROCESSES)]
    for start in range(0, len(DATA) // PROCESSES, BATCH):
        shares = [order[start : start + BATCH] for order in orders]
        losses = [module.task.loss(module.net(pictures[rows]), (pictures[rows], labels[rows])) for rows in shares]
        grads = torch.autograd.grad(sum(losses) / PROCESSES, trained)
        with torch.no_grad():
            for p, grad in zip(trained, grads, strict=True):
                p -= LR * grad
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


class Compare(Callback):
    def __init__(self, expected: dict[str, torch.Tensor]) -> None:
        self.expected = expected

    def on_train_end(self, trainer, module):
        for name, p in module.named_parameters():
            both = trainer.strategy.all_gather(p.detach())
            assert torch.equal(both[0], both[1]), f"{name} drifted apart"
            torch.testing.assert_close(p.detach(), self.expected[name], msg=lambda text, name=name: f"{name}: {text}")


def main() -> None:
    warnings.simplefilter("ignore")
    wise = network(8, 0)
    before = copy.deepcopy(wise.state_dict())
    scripts.teachers.teacher = lambda *_: wise.eval()
    seed_everything(SEED, verbose=False)
    expected = by_hand(taught())
    seed_everything(SEED, verbose=False)
    module = taught()
    starts = {name: r.weight.detach().clone() for name, r in module.regressors.items()}
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        **quiet,
        accelerator="cpu",
        devices=PROCESSES,
        strategy=strategy,
        max_epochs=1,
        callbacks=[Compare(expected)],
        default_root_dir=Path(sys.argv[1]),
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(DATA, BATCH), DataLoader(DATA, BATCH))
    assert {tuple(r.weight.shape) for r in module.regressors.values()} == {(8, 5)}
    assert all((r.weight - starts[name]).abs().max() > 1e-3 for name, r in module.regressors.items())
    assert all(torch.equal(t, before[name]) for name, t in wise.state_dict().items())
    print("one lesson")


if __name__ == "__main__":
    main()
