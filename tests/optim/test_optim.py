"""Every optimizer trains and resumes bit for bit; every schedule has the values that it promises, at any size."""

import io
import sys

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from pipeline.optim import OPTIMIZERS, SCHEDULES, build_optimizer, build_schedule, decayed, timm_optimizers
from pipeline.tables import UserError

EVERY = sorted(timm_optimizers() | OPTIMIZERS)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    )


def train_(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(6, 3, 4, 4, generator=generator)
        labels = torch.randint(5, (6,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_trains_and_resumes_exactly(name):
    def begun():
        net = network()
        return net, build_optimizer(net.parameters(), name, lr=1e-3, weight_decay=1e-2)

    straight, optimizer = begun()
    train_(straight, optimizer, range(5))
    for before, after in zip(network().parameters(), straight.parameters(), strict=True):
        assert after.isfinite().all()
        assert not torch.equal(before, after)

    stopped, optimizer = begun()
    train_(stopped, optimizer, range(3))
    state = through_a_file({"net": stopped.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, optimizer = begun()
    resumed.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    train_(resumed, optimizer, range(3, 5))
    for expected, found in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("name", EVERY)
def test_no_optimizer_drops_an_unknown_option(name):
    with pytest.raises(UserError, match=rf"optimizer '{name}' has no option 'mometum'; it takes: .*weight_decay"):
        build_optimizer(network().parameters(), name, lr=0.1, mometum=0.9)


def test_the_own_rows_win_over_those_of_timm():
    assert not build_optimizer(network().parameters(), "sgd", lr=0.1).defaults["nesterov"]  # timm's sgd is nesterov
    assert build_optimizer(network().parameters(), "rmsprop", lr=0.1).defaults["alpha"] == 0.99  # timm: 0.9


def test_timm_rows_have_the_defaults_of_timm():
    assert build_optimizer(network().parameters(), "nesterov", lr=0.1).defaults["momentum"] == 0.9
    assert build_optimizer(network().parameters(), "cadamw", lr=0.1).defaults["caution"]
    lion = build_optimizer(network().parameters(), "lion", lr=1e-4, betas=[0.95, 0.98])  # a YAML list
    assert (lion.defaults["lr"], lion.defaults["betas"]) == (1e-4, [0.95, 0.98])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sdg", {}, r"unknown optimizer 'sdg' \(did you mean .*\); choose from: .*adam, .*lion, .*sgd"),
        ("fusedadam", {}, "unknown optimizer 'fusedadam'"),  # needs apex
        ("adahessian", {}, "unknown optimizer 'adahessian'"),  # needs backward(create_graph=True)
        ("sgd", {"momentum": "much"}, "optimizer 'sgd': momentum must be a number, got 'much'"),
        ("lion", {"betas": [2, 3]}, "optimizer 'lion': Invalid beta"),
        ("sgd", {"lr": -1.0}, "optimizer 'sgd': Invalid learning rate"),
    ],
)
def test_optimizer_errors(name, options, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(network().parameters(), name, **{"lr": 0.1, **options})


def test_an_own_row_does_not_wait_for_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it would raise
    build_optimizer(network().parameters(), "sgd", lr=0.1)
    with pytest.raises(ImportError):
        timm_optimizers()


def rates(steps: int, upto: int | None = None, lr: float = 1.0, **schedule) -> list[float]:
    """The learning rate of every optimizer step, up to step `upto` where it is given."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = build_schedule(optimizer, steps, schedule)
    found = []
    for _ in range(upto or steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ({"name": "constant"}, {0: 1.0, 50: 1.0, 99: 1.0}),
        ({"name": "cosine"}, {0: 1.0, 50: 0.5, 99: 0.00025, 100: 0.0}),
        ({"name": "cosine", "end": 0.1}, {0: 1.0, 50: 0.55, 99: 0.10022, 100: 0.1}),
        ({"name": "cosine", "warmup": 0.2}, {0: 0.05, 9: 0.5, 19: 1.0, 20: 1.0, 60: 0.5, 100: 0.0}),
        ({"name": "warmup_cosine"}, {0: 0.2, 4: 1.0, 5: 1.0, 100: 0.0}),
        ({"name": "warmup_cosine", "end": 0.1, "warmup": 0.1}, {0: 0.1, 9: 1.0, 55: 0.55, 100: 0.1}),
        ({"name": "one_cycle"}, {0: 0.04, 29: 1.0, 64: 0.5, 99: 4e-6, 100: 4e-6}),
        ({"name": "cyclic"}, {0: 0.025, 19: 0.5, 39: 1.0, 69: 0.5, 98: 1 / 60, 99: 0.0, 100: 0.0}),
        ({"name": "cyclic", "low": 0.1, "up": 0.5}, {0: 0.118, 49: 1.0, 74: 0.55, 99: 0.1, 100: 0.1}),
        ({"name": "cyclic", "cycles": 2}, {19: 1.0, 49: 0.0, 50: 0.05, 69: 1.0, 99: 0.0, 100: 0.0}),
        ({"name": "cyclic", "up": 0}, {0: 0.99, 49: 0.5, 99: 0.0}),
        ({"name": "cyclic", "up": 1}, {0: 0.01, 49: 0.5, 99: 1.0, 100: 1.0}),
    ],
)
def test_schedules_at_start_peak_and_end(schedule, values):
    found = rates(100, 103, **schedule)
    assert {step: found[step] for step in values} == pytest.approx(values, rel=2e-2, abs=1e-9)
    assert found[100:] == [found[100]] * 3, "past the end nothing changes"
    assert max(found) <= 1.0
    assert min(found) >= 0.0


def theirs(scheduler_class, *args, **options) -> list[float]:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = scheduler_class(optimizer, *args, **options)
    found = []
    for step in range(70):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 69:
            scheduler.step()
    return found


def test_closed_forms_have_the_values_of_torch():
    assert rates(70, lr=0.3, name="cosine") == pytest.approx(theirs(CosineAnnealingLR, 70))
    assert rates(70, lr=0.3, name="cosine", end=0.1) == pytest.approx(theirs(CosineAnnealingLR, 70, 0.03))
    one_cycle = theirs(OneCycleLR, 0.3, total_steps=70, cycle_momentum=False)
    assert rates(70, lr=0.3, name="one_cycle") == pytest.approx(one_cycle)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_of_any_length_peaks_near_the_optimizers_rate(name, steps):
    found = rates(steps, steps + 2, name=name)
    assert all(0 <= rate <= 1 for rate in found)
    assert max(found) > (0.99 if steps == 1000 else 0.4) or (name, steps) == ("cyclic", 1)  # whose one step is the end


@pytest.mark.parametrize("name", SCHEDULES)
def test_groups_keep_the_ratio_of_their_rates(name):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.02)]
    optimizer = SGD(groups)
    scheduler = build_schedule(optimizer, 20, {"name": name, **({"end": 0.1} if "cosine" in name else {})})
    for _ in range(20):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == pytest.approx(5 * second)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("stop", [1, 7, 20, 22])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_resumes_exactly(name, stop):
    def begun():
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.9)
        return optimizer, build_schedule(optimizer, 20, {"name": name})

    def walk(optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            yield optimizer.param_groups[0]["lr"], scheduler.get_last_lr()

    straight = list(walk(*begun(), 25))
    optimizer, scheduler = begun()
    list(walk(optimizer, scheduler, stop))
    state = through_a_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    optimizer, scheduler = begun()
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    assert list(walk(optimizer, scheduler, 25 - stop)) == straight[stop:]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "cosin"}, r"unknown schedule 'cosin' \(did you mean 'cosine'\?\); choose from: constant, cosine"),
        ({"name": "cosine", "wramup": 0.1}, "schedule 'cosine' has no option 'wramup'; it takes: end, warmup"),
        ({"name": "constant", "end": 0.1}, "schedule 'constant' has no option 'end'; it takes: none"),
        ({"name": "cosine", "warmup": 1.5}, r"warmup 1\.5 must be in 0 <= f < 1"),
        ({"name": "warmup_cosine", "warmup": 1}, r"warmup 1 must be in 0 <= f < 1"),
        ({"name": "one_cycle", "warmup": -0.1}, r"warmup -0\.1 must be in 0 <= f < 1"),
        ({"name": "cosine", "end": -0.1}, r"end -0\.1 must be in 0 <= f <= 1"),
        ({"name": "cosine", "end": float("nan")}, r"end nan must be in 0 <= f <= 1"),
        ({"name": "cosine", "warmup_steps": 1.5}, r"warmup_steps 1\.5 must be a whole number of at least 0"),
        ({"name": "cosine", "warmup": 0.1, "warmup_steps": 5}, r"warmup 0\.1 and warmup_steps 5 .*choose one"),
        ({"name": "cyclic", "up": 1.1}, r"up 1\.1 must be in 0 <= f <= 1"),
        ({"name": "cyclic", "low": -1}, r"low -1 must be in 0 <= f <= 1"),
        ({"name": "cyclic", "cycles": 0}, "cycles 0 must be a whole number of at least 1"),
        ({"name": "cyclic", "cycles": 1.5}, r"cycles 1\.5 must be a whole number of at least 1"),
        ({"name": "cyclic", "cycles": float("inf")}, "cycles inf must be a whole number of at least 1"),
        ({"name": "cyclic", "cycles": "two"}, "schedule 'cyclic': cycles must be a number, got 'two'"),
    ],
)
def test_schedule_errors(schedule, message):
    with pytest.raises(UserError, match=message):
        build_schedule(SGD([nn.Parameter(torch.zeros(1))], lr=0.1), 10, schedule)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_schedule_that_starts_anew_is_two_of_them(name):
    def rates(steps, restarts=()):
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler = build_schedule(optimizer, steps, {"name": name}, restarts)
        found = []
        for _ in range(steps):
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return found

    assert rates(20, [0.4]) == pytest.approx(rates(8) + rates(12))
    assert rates(20, [0.0, 0.5]) == pytest.approx(rates(10) * 2)


def test_warmup_in_steps_is_that_share_of_the_training():
    def rates(**options):
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = build_schedule(optimizer, 40, {"name": "cosine", "end": 0.1, **options})
        found = []
        for _ in range(41):
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return found

    assert rates(warmup_steps=10) == pytest.approx(rates(warmup=0.25))
    assert max(rates(warmup_steps=10)) == rates(warmup_steps=10)[10] == 1.0
    assert rates(warmup_steps=10)[-1] == pytest.approx(0.1)
    assert rates(warmup_steps=80)[39] == 0.5, "a short trial of a long training's schedule rises to its end"
    assert rates(warmup_steps=40)[-1] == pytest.approx(1.0)


def test_weight_decay_may_be_for_matrices_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(5, 3), nn.LayerNorm(3)
            self.conv, self.out, self.last = nn.Conv1d(1, 2, 2), nn.Linear(3, 4), nn.Linear(3, 5, bias=False)
            self.last.weight = self.embed.weight  # tied

    net = Net()
    names = {id(p): name for name, p in net.named_parameters()}
    optimizer = build_optimizer(decayed(net, "matrices"), "adamw", 0.1, weight_decay=0.3)
    groups = {group["weight_decay"]: sorted(names[id(p)] for p in group["params"]) for group in optimizer.param_groups}
    assert groups[0.3] == ["conv.weight", "out.weight"]
    assert groups[0.0] == sorted({*names.values()} - {"conv.weight", "out.weight"})
    assert decayed(net) == list(net.parameters())
    with pytest.raises(UserError, match=r"unknown decay 'matrix'.*choose from: all, matrices"):
        decayed(net, "matrix")
