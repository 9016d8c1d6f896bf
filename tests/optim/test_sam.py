"""SAM inside a training step equals SAM by hand, whatever else the training does."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks import EpochSeed
from callbacks.resume import latest_checkpoint
from pipeline.optim import build_optimizer
from pipeline.optim.sam import Ascent, frozen_statistics, perturbation
from pipeline.tables import UserError
from pipeline.tasks import Classification
from pipeline.training import Training

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
STEPS, BATCH = 20, 16
BASES = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "adam": {"name": "adam", "lr": 0.01},
    "rmsprop": {"name": "rmsprop", "lr": 1e-3, "momentum": 0.5},
}


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(96, 4),
    )


def batches(count: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(BATCH, 1, 6, 6, generator=g), torch.randint(4, (BATCH,), generator=g)) for _ in range(count)]


def loader(count: int = STEPS, shuffle: bool = False) -> DataLoader:
    inputs, labels = map(torch.cat, zip(*batches(count), strict=True))
    return DataLoader(TensorDataset(inputs, labels), BATCH, shuffle=shuffle)


def task(base: dict, sam: dict, dropout: float = 0.0, schedule: str = "cosine", **options) -> Training:
    return Training(net(dropout), Classification("multiclass", classes=4), base, {"name": schedule}, sam=sam, **options)


def trainer(**options) -> Trainer:
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
    quiet["limit_val_batches"] = 0
    return Trainer(**{"max_epochs": 1, "accelerator": "cpu", **quiet, **options})


def by_hand(
    base: dict,
    rho: float,
    adaptive: bool = False,
    clip: float | None = None,
    freeze: bool = True,
    l1: tuple[float, float] = (0.0, 0.0),
) -> nn.Module:
    """The algorithm of the paper, line by line. l1: the penalty in the first and in the second pass"""
    model = net().train()
    weights = list(model.parameters())
    optimizer = build_optimizer(weights, **base)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def loss(inputs: torch.Tensor, labels: torch.Tensor, l1: float) -> torch.Tensor:
        return F.cross_entropy(model(inputs), labels) + l1 * torch.stack([w.abs().sum() for w in weights]).sum()

    for inputs, labels in batches():
        optimizer.zero_grad()
        loss(inputs, labels, l1[0]).backward()
        scale = [w.detach().abs() if adaptive else torch.ones_like(w) for w in weights]
        norm = torch.cat([(s * w.grad).flatten() for s, w in zip(scale, weights, strict=True)]).norm()
        steps = [rho * s * s * w.grad / norm for s, w in zip(scale, weights, strict=True)]
        old = [w.detach().clone() for w in weights]
        statistics = copy.deepcopy(dict(model.named_buffers()))
        with torch.no_grad():
            for w, step in zip(weights, steps, strict=True):
                w.add_(step)
        optimizer.zero_grad()
        loss(inputs, labels, l1[1]).backward()
        with torch.no_grad():
            for w, value in zip(weights, old, strict=True):
                w.copy_(value)
            if freeze:
                for name, value in model.named_buffers():
                    value.copy_(statistics[name])
        if clip:
            nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        schedule.step()
    return model


def same(model: nn.Module, other: nn.Module, **tolerance) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), **tolerance)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_equals_sam_by_hand(base, adaptive):
    rho = 0.5 if adaptive else 0.05
    fitted = task(BASES[base], {"rho": rho, "adaptive": adaptive})
    fit = trainer()
    fit.fit(fitted, loader())
    assert fit.global_step == STEPS
    same(fitted.net, by_hand(BASES[base], rho, adaptive), rtol=0, atol=1e-6)
    plain = task(BASES[base], {})
    trainer().fit(plain, loader())
    assert (plain.net[0].weight - fitted.net[0].weight).abs().max() > 1e-4, "SAM makes no difference"


def test_equals_sam_by_hand_with_clipping_and_moving_statistics():
    fitted = task(BASES["sgd"], {"rho": 0.05, "bn_second_pass": "update"})
    trainer(gradient_clip_val=0.1).fit(fitted, loader())
    same(fitted.net, by_hand(BASES["sgd"], 0.05, clip=0.1, freeze=False), rtol=0, atol=1e-6)
    assert fitted.net[1].num_batches_tracked == 2 * STEPS


def test_the_l1_penalty_is_in_both_passes():
    """The study's code leaves it out of the second one, whose gradient makes the step: SAM then turns L1 off."""
    fitted = task(BASES["sgd"], {"rho": 0.05}, l1=0.01)
    trainer().fit(fitted, loader())
    same(fitted.net, by_hand(BASES["sgd"], 0.05, l1=(0.01, 0.01)), rtol=0, atol=1e-6)
    without = by_hand(BASES["sgd"], 0.05, l1=(0.01, 0.0))
    assert (without[0].weight - fitted.net[0].weight).abs().max() > 1e-3, "the second pass makes no difference"


def test_accumulation_takes_the_gradients_of_every_part_at_its_own_peak():
    fitted = task({"name": "sgd", "lr": 0.1}, {"rho": 0.05}, schedule="constant")
    trainer(accumulate_grad_batches=2).fit(fitted, loader(2))
    model = net().train()
    ascent = Ascent(0.05)
    total = [torch.zeros_like(w) for w in model.parameters()]
    for inputs, labels in batches(2):
        ascent.climb_(F.cross_entropy(model(inputs), labels), model.parameters())
        with frozen_statistics(model):
            grads = torch.autograd.grad(F.cross_entropy(model(inputs), labels), list(model.parameters()))
        ascent.restore_()
        total = [t + g / 2 for t, g in zip(total, grads, strict=True)]
    with torch.no_grad():
        for w, grad in zip(model.parameters(), total, strict=True):
            w.sub_(0.1 * grad)
    same(fitted.net, model, rtol=0, atol=1e-6)


def test_bf16_sees_the_perturbed_weights():
    nets = {}
    for rho in (0.0, 0.5):
        fitted = task(BASES["sgd"], {"rho": rho})
        trainer(precision="bf16-mixed").fit(fitted, loader(4))
        nets[rho] = fitted.net
    assert (nets[0.0][0].weight - nets[0.5][0].weight).abs().max() > 1e-3


def test_autocast_that_caches_its_copies_sees_the_perturbed_weights():
    model, (inputs, labels) = net(), batches(1)[0]
    ascent = Ascent(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        first = F.cross_entropy(model(inputs).float(), labels)
        ascent.climb_(first, model.parameters())
        second = F.cross_entropy(model(inputs).float(), labels)
    assert second > first + 0.01


def test_both_passes_draw_the_same_dropout():
    fitted = task({"name": "sgd", "lr": 0.1}, {"rho": 1e-12}, dropout=0.5, schedule="constant")
    torch.manual_seed(3)
    trainer().fit(fitted, loader(1))
    plain = task({"name": "sgd", "lr": 0.1}, {}, dropout=0.5, schedule="constant")
    torch.manual_seed(3)
    trainer().fit(plain, loader(1))
    same(fitted.net, plain.net, rtol=0, atol=1e-6)


def test_several_groups_and_unused_weights():
    torch.manual_seed(0)
    used, unused = nn.Linear(3, 2), nn.Linear(3, 2)
    ascent = Ascent(0.1)
    before = copy.deepcopy(unused.state_dict()), copy.deepcopy(used.state_dict())
    ascent.climb_(used(torch.ones(4, 3)).square().sum(), [*used.parameters(), *unused.parameters()])
    moved = torch.cat([(p - q).flatten() for p, q in zip(used.parameters(), before[1].values(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.1)
    torch.testing.assert_close(unused.state_dict(), before[0])
    ascent.restore_()
    torch.testing.assert_close(used.state_dict(), before[1], rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gradient_without_direction_moves_nothing(value):
    grads = [torch.full((2, 3), value), torch.full((4,), value)]
    assert all((step == 0).all() for step in perturbation(grads, 0.1))


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(base, tmp_path):
    def run(epochs: int, checkpoint=None) -> Training:
        fitted = task(BASES[base], {"rho": 0.05}, dropout=0.3)
        callbacks = [EpochSeed(7), *latest_checkpoint(tmp_path), StopAfter(epochs)]
        fit = trainer(max_epochs=4, enable_checkpointing=True, callbacks=callbacks)
        fit.fit(fitted, loader(5, shuffle=True), ckpt_path=checkpoint, weights_only=True)
        return fitted

    run(2)
    resumed = run(4, tmp_path / "last.ckpt")
    whole = run(4)
    same(resumed.net, whole.net, rtol=0, atol=0)
    states = [fitted.trainer.optimizers[0].state_dict() for fitted in (resumed, whole)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


class StopAfter(lightning.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize(
    ("sam", "message"),
    [
        ({"rho": -0.1}, r"sam\.rho -0\.1 must be positive"),
        ({"rho": "big"}, "optim.sam: rho must be a number"),
        ({"rho": 0.1, "bn_second_pass": "frezze"}, "unknown optim.sam.bn_second_pass 'frezze'.*freeze, update"),
        ({"rho": 0.1, "radius": 1}, "optim.sam has no option 'radius'"),
    ],
)
def test_bad_options_are_refused(sam, message):
    with pytest.raises(UserError, match=message):
        task(BASES["sgd"], sam)


def test_half_precision_weights_are_refused():
    with pytest.raises(UserError, match="lost in weights of precision 'bf16-true'; use 'bf16-mixed'"):
        trainer(precision="bf16-true").fit(task(BASES["sgd"], {"rho": 0.05}), loader())


def test_l2_in_the_loss_is_the_weight_decay_of_sgd():
    decayed = task({"name": "sgd", "lr": 0.1, "weight_decay": 0.01}, {})
    penalized = task({"name": "sgd", "lr": 0.1}, {}, l2=0.01)
    for fitted in (decayed, penalized):
        trainer().fit(fitted, loader())
    same(decayed.net, penalized.net, rtol=0, atol=1e-6)


def test_l1_pulls_weights_to_zero():
    nets = []
    for l1 in (0.0, 0.01):
        fitted = task({"name": "sgd", "lr": 0.1}, {}, l1=l1)
        trainer(max_epochs=3).fit(fitted, loader())
        nets.append(fitted.net)
    sizes = [sum(p.abs().sum() for p in model.parameters()) for model in nets]
    assert sizes[1] < 0.9 * sizes[0]


def test_fp16_with_a_gradient_scaler_equals_sam_by_hand():
    """fp16 needs a GPU, so this test uses the CPU's scaler, with weights and passes in full precision."""

    class Scaled(MixedPrecision):
        def autocast_context_manager(self):
            return nullcontext()

    fitted = task(BASES["sgd"], {"rho": 0.05})
    plugin = Scaled("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    trainer(plugins=[plugin]).fit(fitted, loader())
    same(fitted.net, by_hand(BASES["sgd"], 0.05), rtol=0, atol=1e-6)


def test_two_processes_keep_the_same_weights():
    script = Path(__file__).with_name("sam_on_two_processes.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same weights" in done.stdout
