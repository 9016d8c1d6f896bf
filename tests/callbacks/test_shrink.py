"""The network is made smaller while it trains, and training goes on as it should."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from callbacks import CompressionCallback, Shrink
from callbacks.pacing import Pacing
from pipeline.compression import Projection, channel_groups, compress
from pipeline.compression.checkpoint import load_compressed
from pipeline.compression.merge.modules import named_tensors, resized
from pipeline.compression.merge.tensors import compressed_tensors
from pipeline.compression.plan import history
from pipeline.data.text.order import ResumableLoader, Shuffle
from pipeline.tables import UserError
from pipeline.tasks import Classification
from pipeline.training import Training

sys.path.insert(0, str(Path(__file__).parent))
from test_compression_callback import TRAIN, VAL, fit, trainer_for

OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "adam": {"name": "adam", "lr": 0.01},
}


def network(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3),
    )  # fmt: skip


def task(optim: str = "sgd", **options) -> Training:
    return Training(
        network(),
        Classification("multiclass", classes=3),
        **{"optim": OPTIMIZERS[optim], "schedule": {"name": "constant"}, **options},
    )


def run(folder: Path, module, callbacks: list, epochs: int, ckpt_path: Path | None = None, **options):
    """Train without shuffling, so that a loop by hand sees the same batches."""
    trainer = trainer_for(folder, callbacks, epochs, **options)
    trainer.fit(module, DataLoader(TRAIN, 16), DataLoader(VAL, 32), ckpt_path=ckpt_path, weights_only=True)
    return trainer


class Until(Callback):
    """Stops after so many epochs of a run that was meant to be longer."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def shapes(net: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in net.state_dict().values()]


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("method", ["l1", "fold"])
def test_training_goes_on_as_by_hand(tmp_path, method, optim):
    module = task(optim)
    run(tmp_path, module, [Shrink(method, 0.5, after=1)], epochs=2)

    net = network()
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optim]
    options = {key: value for key, value in OPTIMIZERS[optim].items() if key != "name"}

    def epoch(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net.train()
        for inputs, labels in DataLoader(TRAIN, 16):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs), labels).backward()
            optimizer.step()

    optimizer = kind(net.parameters(), **options)
    epoch(net, optimizer)
    example = VAL[0][0][None]
    smaller, report = compress(net.eval(), example, method, 0.5)
    projections = [Projection(group.labels) for group in report.groups]
    after = kind(smaller.parameters(), **options)
    states = {name: optimizer.state[p] for name, p in net.named_parameters()}
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        if key in next(iter(states.values())):
            full = {**named_tensors(net), **{name: state[key] for name, state in states.items()}}
            small = {**full, **compressed_tensors(full, channel_groups(net, example), projections, norm_scale=False)}
            for name, p in smaller.named_parameters():
                after.state[p][key] = small[name].detach().clone()
    for name, p in smaller.named_parameters():
        if "step" in states[name]:
            after.state[p]["step"] = states[name]["step"].clone()
    epoch(smaller, after)
    for name, tensor in smaller.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], tensor, msg=name)


def test_kept_channels_keep_their_momentum(tmp_path):
    seen = {}

    class Spy(Shrink):
        def on_train_epoch_start(self, trainer, pl_module):
            momenta = [trainer.optimizers[0].state[p] for p in pl_module.net.parameters()]
            before = [state["momentum_buffer"].clone() for state in momenta if state]
            super().on_train_epoch_start(trainer, pl_module)
            if before and history(pl_module.net):
                state = trainer.optimizers[0].state
                seen["after"] = [state[p]["momentum_buffer"].clone() for p in pl_module.net.parameters()]
                seen["before"] = before

    module = task()
    run(tmp_path, module, [Spy("l1", 0.5, after=1)], epochs=2)
    labels = next(iter(history(module.net)[0].about["groups"].values()))["labels"]
    kept = (torch.tensor(labels) >= 0).nonzero().flatten()
    assert len(kept) == 4
    # the momentum at the step, before the epoch that moved it on
    assert torch.equal(seen["after"][0], seen["before"][0][kept])
    assert len(seen["after"]) == len(list(network().parameters()))


def test_steps_end_at_the_size_of_one_shot(tmp_path):
    nets = {}
    for steps in (1, 3):
        module = task()
        shrink = Shrink("l1", 0.7, steps=steps, save_to=tmp_path / f"{steps}.safetensors")
        run(tmp_path, module, [shrink], epochs=3)
        nets[steps] = module.net
        loaded, manifest = load_compressed(tmp_path / f"{steps}.safetensors", network())
        loaded.eval(), module.net.eval()
        torch.testing.assert_close(loaded(VAL.tensors[0]), module.net(VAL.tensors[0]), rtol=0, atol=0)
        assert manifest["params_before"] == sum(p.numel() for p in network().parameters())
        compressions = [step for step in manifest["chain"] if "groups" in step]
        assert len(compressions) == steps
        assert [group["before"] for group in compressions[0]["groups"].values()] == [8, 16]
        assert manifest["groups"] == compressions[-1]["groups"]
    assert shapes(nets[1]) == shapes(nets[3])
    assert nets[3][0].out_channels == 2
    assert nets[3][3].out_channels == 4
    assert Pacing(0.7, 2, 3, 4).ratios == {2: 1 - 0.3 ** (1 / 3), 6: 1 - 0.3 ** (2 / 3), 10: pytest.approx(0.7)}


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_is_bit_identical(tmp_path, cut):
    """The run is cut off before, at and between the two steps."""

    def shrink() -> Shrink:
        return Shrink("fold", 0.6, after=1, steps=2, every_n_epochs=2, save_to=tmp_path / "small.safetensors")

    whole = task("adam")
    first = shrink()
    run(tmp_path, whole, [first], epochs=5)
    trainer = run(tmp_path, task("adam"), [shrink(), Until(cut)], epochs=5)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    resumed, second = task("adam"), shrink()
    run(tmp_path, resumed, [second], epochs=5, ckpt_path=tmp_path / "cut.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert history(resumed.net) == history(whole.net)
    assert [step.stage for step in history(load_compressed(tmp_path / "small.safetensors", network())[0])] == [
        "fold",
        "tune",
        "fold",
        "tune",
    ]


@pytest.mark.parametrize("first", ["shrink", "measured"])
def test_rows_say_that_the_network_was_tuned_since(tmp_path, first):
    """Whichever callback comes first."""
    shrink = Shrink("l1", 0.75, after=1, steps=2, every_n_epochs=2)
    measured = CompressionCallback(["fold"], [0.5], stages=["raw"])
    run(tmp_path, task(), [shrink, measured] if first == "shrink" else [measured, shrink], epochs=4)
    dense = measured.rows.filter(method="dense")
    once, twice = "l1@0.5 > tune", "l1@0.5 > tune > l1@0.75 > tune"
    assert dense["chain"].to_list() == ["", once, once, twice]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_checkpoint_says_what_its_network_went_through_without_this_callback(tmp_path):
    run(tmp_path, task(), [Shrink("l1", 0.5, after=1)], epochs=2).save_checkpoint(tmp_path / "small.ckpt")
    measured = CompressionCallback(["fold"], [0.5], stages=["raw"])
    trainer = trainer_for(tmp_path, [measured], 2)
    trainer.test(task(), DataLoader(VAL, 32), ckpt_path=tmp_path / "small.ckpt", weights_only=True, verbose=False)
    assert measured.rows["chain"].to_list() == ["l1@0.5 > tune", "l1@0.5 > tune > fold@0.5"]


@pytest.mark.parametrize("method", ["fold", "lamp"])
def test_a_run_that_an_older_version_began_goes_on(tmp_path, method):
    """Its checkpoint holds the report of all steps together as the state of this callback, and no chain."""

    def shrink() -> Shrink:
        return Shrink(method, 0.75, after=1, steps=2, every_n_epochs=2, save_to=tmp_path / "small.safetensors")

    whole = task()
    run(tmp_path, whole, [shrink()], epochs=4)
    trainer = run(tmp_path, task(), [shrink(), Until(2)], epochs=4)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    checkpoint = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    step = checkpoint.pop("chain")[0]
    about = {key: step[key] for key in ("method", "ratio", "numbers")} | {"frozen": [{"name": "a", "reason": "b"}]}
    for which in ("params", "macs"):
        about |= {f"{which}_before": step[f"{which}_before"], f"{which}_after": step[which]}
    about["layers"] = [{"name": name, **one} for name, one in step.get("layers", {}).items()]
    about["groups"] = [
        {"name": name, "tie": "", **one, "labels": torch.tensor(one["labels"])} for name, one in step["groups"].items()
    ]
    checkpoint["callbacks"]["Shrink"] = {"report": about}
    torch.save(checkpoint, tmp_path / "cut.ckpt")
    resumed = task()
    run(tmp_path, resumed, [shrink()], epochs=4, ckpt_path=tmp_path / "cut.ckpt")
    assert history(resumed.net) == history(whole.net)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert history(load_compressed(tmp_path / "small.safetensors", network())[0]) == history(whole.net)


def test_sam_and_the_measurement_see_the_smaller_network(tmp_path):
    module = task("adam", sam={"rho": 0.05}, schedule={"name": "cosine"}, restarts=[1 / 3])
    measured = CompressionCallback(["fold"], [0.5], repair_data=TRAIN, repair_size=64)
    trainer = run(tmp_path, module, [Shrink("mix+synthetic", 0.5, after=1), measured], epochs=3)
    dense = measured.rows.filter(measured.rows["method"] == "dense")
    assert dense["params"][1] == dense["params"][2] < dense["params"][0] / 2
    assert set(measured.rows["status"]) == {"ok"}, measured.rows["reason"]
    assert float(trainer.callback_metrics["shrink/params"]) == dense["params"][2]
    assert float(trainer.callback_metrics["val/acc"]) > 0.5


def test_masked_weights_stay_zero_also_when_resumed(tmp_path):
    class Count(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            weights = [p for p in pl_module.net.parameters() if p.dim() > 1]
            zeros.append(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))

    def shrink() -> Shrink:
        return Shrink("lamp", 0.75, after=1, steps=2)

    zeros: list[float] = []
    whole = task("adam", sam={"rho": 0.05})
    run(tmp_path, whole, [shrink(), Count()], epochs=4)
    assert zeros == pytest.approx([0, 0.5, 0.75, 0.75], abs=0.002)
    trainer = run(tmp_path, task("adam", sam={"rho": 0.05}), [shrink(), Until(3)], epochs=4)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    resumed = task("adam", sam={"rho": 0.05})
    run(tmp_path, resumed, [shrink(), Count()], epochs=4, ckpt_path=tmp_path / "cut.ckpt")
    assert zeros[-1] == zeros[-2]
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_of_somebody_elses_module(tmp_path):
    module, _ = fit(tmp_path, [Shrink("mix+data", 0.5, after=1, network="backbone", repair_data=TRAIN)])
    assert module.backbone[0].out_channels == 4
    assert module.backbone[3].training


@pytest.mark.parametrize(
    ("options", "callbacks", "message"),
    [
        ({"after": 2}, [], "the last of 1 steps comes after 2 epochs, and training has 2"),
        ({"steps": 3}, [], "the last of 3 steps comes after 2 epochs"),
        ({"method": "l1+data"}, [], "need training samples"),
        ({}, [EMAWeightAveraging(decay=0.9)], "averaged weights"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(tmp_path, options, callbacks, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, [Shrink(network="backbone", **options), *callbacks])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio 0.0 is out of range"),
        ({"ratio": 1.0}, "ratio 1.0 is out of range"),
        ({"steps": 0}, "steps 0 must be a whole number of at least 1"),
        ({"after": -1}, "after -1"),
        ({"method": "nosuch"}, "unknown method 'nosuch'"),
        ({"every_n_batches": 3, "every_n_epochs": 2}, "say the same twice; choose one"),
        ({"every_n_batches": 0}, "every_n_batches 0 must be a whole number of at least 1"),
        ({"pace": "cubik"}, r"unknown pace 'cubik' \(did you mean 'cubic'\?\)"),
        ({"rewind_to": 1}, r"rewind_to 1 must be a whole number of epochs in 0\.\.0, before the first step"),
    ],
)
def test_bad_options_get_one_clear_line(options, message):
    with pytest.raises(UserError, match=message):
        Shrink(**options)


def test_on_two_processes_both_have_the_same_smaller_network(tmp_path):
    script = Path(__file__).parent / "shrink_on_two_processes.py"
    result = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert "same on both" in result.stdout, result.stdout + result.stderr


# --- paces, steps by batch, ratios of layers, rewinding


def test_a_cubic_pace_takes_much_at_first():
    """Equation 1 of arXiv:1710.01878 with s_i = 0, at the ends of its n parts."""
    cubic, geometric = (Pacing(0.9, 10, 4, every_n_batches=25, pace=pace).ratios for pace in ("cubic", "geometric"))
    assert list(cubic) == list(geometric) == [10, 35, 60, 85]
    for ratio, i in zip(cubic.values(), (1, 2, 3, 4), strict=True):
        assert ratio == pytest.approx(0.9 + (0 - 0.9) * (1 - i / 4) ** 3)
    assert cubic[10] > geometric[10]
    assert cubic[85] == pytest.approx(geometric[85])


def test_steps_come_between_batches(tmp_path):
    """Six batches are an epoch."""

    class Widths(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.net[0].out_channels)

    seen: list[int] = []
    module = task("adam")
    shrink = Shrink("l1", 0.75, after=2, steps=3, every_n_batches=4, pace="cubic")
    run(tmp_path, module, [shrink, Widths()], epochs=2)
    assert seen == [8] * 2 + [3] * 4 + [2] * 6, "0.53, 0.72 and 0.75 of eight channels are gone"
    assert [step.about.get("batches") for step in history(module.net)] == [None, 4, None, 4, None, 2]


def train_from(folder: Path, module: Training, callbacks: list, batches: int = 0) -> Training:
    """Train for three epochs, or from a checkpoint that was written after so many batches, with a loader that goes on
    in the middle of an epoch of six."""
    loader = ResumableLoader(TRAIN, 16, sampler=Shuffle(TRAIN, num_replicas=1, rank=0))
    loader.load_state_dict({**loader.state_dict(), "epoch": batches // 6, "windows": batches % 6 * 16})
    there = {"ckpt_path": folder / "cut.ckpt", "weights_only": True} if batches else {}
    trainer_for(folder, callbacks, 3).fit(module, loader, DataLoader(VAL, 32), **there)
    return module


@pytest.mark.parametrize("method", ["fold", "lamp"])
def test_a_run_that_is_cut_off_within_an_epoch_is_bit_identical(tmp_path, method):
    """The run is cut off at a step, after eight batches, and goes on with it."""

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    def shrink() -> Shrink:
        return Shrink(method, 0.6, after=4, steps=2, every_n_batches=4, rewind_to=1)

    whole = train_from(tmp_path, task("adam"), [shrink(), Keep()])
    resumed = train_from(tmp_path, task("adam"), [shrink()], batches=8)
    assert len(history(whole.net)) == 4
    check_same(whole, resumed)


def check_same(whole: Training, resumed: Training) -> None:
    assert history(resumed.net) == history(whole.net)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("method", ["magnitude", "l1", "fold"])
@pytest.mark.parametrize("rewind_to", [0, 1])
def test_weights_go_back_and_the_optimizer_begins_anew(tmp_path, method, rewind_to):
    class Spy(Shrink):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == rewind_to:
                early.update({name: t.detach().clone() for name, t in named_tensors(pl_module.net).items()})
            super().on_train_epoch_start(trainer, pl_module)
            if trainer.current_epoch in (2, 3):
                found.append({name: t.detach().clone() for name, t in named_tensors(pl_module.net).items()})
                states.append(dict(trainer.optimizers[0].state))

    early: dict[str, torch.Tensor] = {}
    found: list[dict[str, torch.Tensor]] = []
    states: list[dict] = []
    module = task("adam")
    run(tmp_path, module, [Spy(method, 0.75, after=2, steps=2, rewind_to=rewind_to)], epochs=4)
    assert states == [{}, {}]
    expected = dict(early)
    groups = channel_groups(network().eval(), VAL[0][0][None]) if method != "magnitude" else ()
    for tensors, step in zip(found, [s for s in history(module.net) if "ratio" in s.about], strict=True):
        if method == "magnitude":
            for name in step.about["layers"]:
                assert (tensors[name] != 0).sum() == step.about["layers"][name]["after"]
                expected[name] = early[name] * (tensors[name] != 0)
        else:
            projections = [Projection(torch.tensor(step.about["groups"][g.name]["labels"])) for g in groups]
            expected = {**expected, **compressed_tensors(expected, groups, projections)}
            groups = channel_groups(small_like(expected), VAL[0][0][None])
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], msg=name)


def small_like(tensors: dict[str, torch.Tensor]) -> nn.Module:
    return resized(network().eval(), tensors)


class KeepBefore(Callback):
    """Writes a checkpoint before the batch of this number, and behind a step of Shrink that comes before it, too."""

    def __init__(self, path: Path, batches: int) -> None:
        self.path, self.batches = path, batches

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.batches:
            trainer.save_checkpoint(self.path)


def begins_at_zero() -> Training:
    """A last layer that is 0 until it learns, as that of torchvision's ViT."""
    module = task("adam")
    nn.init.zeros_(module.net[8].weight)
    return module


@pytest.mark.parametrize("method", ["layer_magnitude", "random_mask"])
@pytest.mark.parametrize("after", [0, 5])
def test_a_masked_layer_that_begins_at_zero_learns_also_when_cut_off_before_its_first_batch(tmp_path, method, after):
    def shrink() -> Shrink:
        return Shrink(method, 0.5, after=after, steps=2, every_n_batches=4, rewind_to=0)

    cut = after + 4
    whole = train_from(tmp_path, begins_at_zero(), [shrink(), KeepBefore(tmp_path / "cut.ckpt", cut)])
    resumed = train_from(tmp_path, begins_at_zero(), [shrink()], batches=cut)
    learned = whole.net[8].weight
    (last,) = (step.about["layers"]["8.weight"] for step in history(whole.net) if step.about.get("ratio") == 0.5)
    assert int((learned != 0).sum()) == last["after"] > 0
    assert (learned[learned != 0].abs() > 1e-4).all(), "every weight that is left has learned"
    check_same(whole, resumed)


def test_a_network_that_is_cut_off_between_a_step_and_its_first_batch_became_smaller_once(tmp_path):
    def shrink() -> Shrink:
        return Shrink("l1", 0.5, after=4, every_n_batches=1)

    whole = train_from(tmp_path, task("adam"), [shrink(), KeepBefore(tmp_path / "cut.ckpt", 4)])
    resumed = train_from(tmp_path, task("adam"), [shrink()], batches=4)
    assert [step.stage for step in history(whole.net)] == ["l1", "tune"]
    check_same(whole, resumed)


def test_layers_have_ratios_of_their_own_and_the_log_says_how_sparse_each_is(tmp_path):
    module = task()
    trainer = run(tmp_path, module, [Shrink("magnitude", 0.8, steps=2, layers={"0": 0.5, "8": 0})], epochs=2)
    first, last = (step.about["layers"] for step in history(module.net) if "ratio" in step.about)
    assert first["8.weight"]["after"] == first["8.weight"]["before"] == 48
    assert first["0.weight"]["after"] == pytest.approx(72 * 0.5**0.5, abs=1)
    assert last["0.weight"]["after"] == 36
    assert last["3.weight"]["after"] == pytest.approx(0.2 * 1152, abs=1)
    logged = {key: float(value) for key, value in trainer.callback_metrics.items() if "sparsity" in key}
    assert logged == {
        f"shrink/sparsity/{name}": pytest.approx(float((module.net.get_parameter(name) == 0).float().mean()))
        for name in ("0.weight", "3.weight", "8.weight")
    }
    folded = task()
    run(tmp_path, folded, [Shrink("fold", 0.5, layers={"0": 0})], epochs=1)
    assert [folded.net[0].out_channels, folded.net[3].out_channels] == [8, 8]


def test_a_mask_of_before_stays_when_the_network_is_masked_again(tmp_path):
    module = task("adam")
    module.net, _ = compress(module.net, VAL[0][0][None], "random_mask", 0.5)
    zeros = {name: p == 0 for name, p in module.net.named_parameters() if p.dim() > 1}
    run(tmp_path, module, [Shrink("layer_magnitude", 0.6, after=1)], epochs=2)
    for name, zero in zeros.items():
        assert not module.net.get_parameter(name)[zero].any(), name


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"after": 12, "every_n_batches": 1}, {}, "the last of 1 steps comes after 12 batches, and training has 12"),
        ({"every_n_batches": 1}, {"accumulate_grad_batches": 2}, "would lose gradients that are accumulated"),
        ({"layers": {"nose": 0.1}, "after": 1}, {}, "no name begins with 'nose', which has a ratio; there are "),
        ({"layers": {"nose": 0.1}, "after": 1, "method": "lamp"}, {}, "there are 0.weight, 3.weight, 8.weight"),
        ({"layers": {"0": 1.0}}, {}, r"ratio 1\.0 of '0' is out of range"),
        (
            {"layers": {"0": 0.1}, "after": 1, "method": "l1+params"},
            {},
            r"a budget \(params\) decides the sizes of all groups",
        ),
    ],
)
def test_steps_that_the_training_cannot_have_are_refused_at_the_start(tmp_path, options, trainer, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, task(), [Shrink(**options)], epochs=2, **trainer)
