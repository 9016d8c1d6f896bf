"""The callback measures, logs, and leaves no trace (promises 5, 6 and 9 of the design)."""

import copy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import lightning
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks import CompressionCallback
from pipeline.evaluate import metrics_of as measure
from pipeline.results import RowStore, foldability, read
from pipeline.tables import UserError
from pipeline.tasks import Classification

HERE = Path(__file__).parent


class Plain(LightningModule):
    """A user's module that uses nothing of this project; it has dropout and BatchNorm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1),
            nn.Conv2d(width, 2 * width, 3, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    validation_step = test_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def stripes(n: int, seed: int) -> TensorDataset:
    """Pictures of three classes that a small network learns in seconds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    pictures = torch.randn(n, 1, 8, 8, generator=generator) * 0.5
    for c in range(3):
        pictures[labels == c, :, :, 2 * c : 2 * c + 2] += 2
    return TensorDataset(pictures, labels)


TRAIN, VAL, TEST = stripes(96, 0), stripes(61, 1), stripes(40, 2)


def trainer_for(folder: Path, callbacks: list, epochs: int, **options) -> Trainer:
    return Trainer(
        **{"logger": False, "enable_checkpointing": False, **options},
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def fit(folder: Path, callbacks: list, module: Plain | None = None, epochs: int = 2, **options) -> tuple:
    lightning.seed_everything(3, verbose=False)
    module = module or Plain()
    trainer = trainer_for(folder, callbacks, epochs, **options)
    trainer.fit(module, DataLoader(TRAIN, 16, shuffle=True), DataLoader(VAL, 32))
    return module, trainer


def callback(**options) -> CompressionCallback:
    return CompressionCallback(
        **{"network": "backbone", "ratios": [0.25, 0.5], "repair_data": TRAIN, "repair_size": 64, **options}
    )


def random_states() -> list:
    import random

    import numpy as np

    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bit_identical_with_and_without(tmp_path, precision):
    without, _ = fit(tmp_path, [], precision=precision)
    states = random_states()
    measured = callback(stages=["raw", "repaired", "norm_tuned"])
    module, trainer = fit(tmp_path, [measured], precision=precision)
    assert len(measured.rows) == 2 * (1 + 3 * 2 * 3)
    assert set(measured.rows["status"]) == {"ok"}
    for (name, a), b in zip(without.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert random_states() == states
    assert module.backbone[0].weight.grad is None or not module.backbone[0].weight.grad.isnan().any()
    assert trainer.global_step == 12


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bit_identical_where_sharpness_and_corruptions_are_measured(tmp_path, precision):
    pytest.importorskip("curvlinops")
    without, _ = fit(tmp_path, [], precision=precision)
    states = random_states()
    beside = {"sharpness": {"steps": 2}, "corruptions": {"names": ["contrast"], "mean": [0.5], "std": [0.5]}}
    measured = callback(methods=["fold"], ratios=[0.5], stages=["raw"], **beside)
    module, _ = fit(tmp_path, [measured], precision=precision)
    columns = ["sharpness_sam", "sharpness_l2", "sharpness_linf", "hessian_top", "corrupted"]
    assert not measured.rows.select(columns).null_count().sum_horizontal().item()
    for (name, a), b in zip(without.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert random_states() == states


def test_optimizer_modes_and_hooks_are_left_alone(tmp_path):
    class Spy(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append(copy.deepcopy((trainer.optimizers[0].state_dict(), [m.training for m in module.modules()])))

    seen: list = []
    before, after = Spy(), Spy()
    module = Plain()
    calls = []
    module.backbone[0].register_forward_hook(lambda *_: calls.append(1))  # as wandb.watch does
    fit(tmp_path, [before, callback(), after], module)
    (state, modes), (state_after, modes_after) = seen[:2]
    assert modes == modes_after
    assert str(state) == str(state_after)
    assert len(calls) == 2 * (6 + 2) + 2, "hooks of the live network ran for compressed copies"  # + sanity check


def test_rows_and_logged_numbers_agree_and_are_honest(tmp_path):
    measured = callback(methods=["fold", "l1"], rows=tmp_path / "rows.parquet")
    _, trainer = fit(tmp_path, [measured])
    rows = read(tmp_path / "rows.parquet")
    assert rows.equals(measured.rows)
    assert set(rows["split"]) == {"val"}
    assert set(rows["n"]) == {61}
    assert set(rows["epoch"]) == {1, 2}
    assert all(rows["params"] > 0)
    assert all(rows["macs"] > 0)
    last = {(r["method"], r["ratio"], r["stage"]): r for r in rows.filter(rows["epoch"] == 2).to_dicts()}
    for method in ("fold", "l1"):
        for ratio in (0.25, 0.5):
            for stage in ("raw", "repaired"):
                logged = float(trainer.callback_metrics[f"compress/{method}/r{ratio:g}/acc_{stage}"])
                assert logged == pytest.approx(last[method, ratio, stage]["acc"])
    dense = last["dense", 0.0, "raw"]["acc"]
    assert float(trainer.callback_metrics["compress/dense/acc"]) == pytest.approx(dense)
    areas = {m: foldability(dense, {r: last[m, r, "repaired"]["acc"] for r in (0.25, 0.5)}) for m in ("fold", "l1")}
    assert float(trainer.callback_metrics["foldability/fold_repaired"]) == pytest.approx(areas["fold"])
    assert float(trainer.callback_metrics["foldability/gap_repaired"]) == pytest.approx(areas["fold"] - areas["l1"])


def test_smaller_networks_are_measured_not_the_live_one(tmp_path):
    """At ratio 0 no accuracy is lost; with one channel left, a trained network loses it."""
    measured = callback(methods=["fold", "random"], ratios=[0.0, 0.95], stages=["raw"])
    fit(tmp_path, [measured], epochs=4)
    last = measured.rows.filter(measured.rows["epoch"] == 4)
    dense = last.filter(last["method"] == "dense")["acc"].item()
    accuracies = {(m, r): a for m, r, a in last.select("method", "ratio", "acc").iter_rows()}
    assert dense > 0.9
    assert accuracies["fold", 0.0] == dense
    assert accuracies["random", 0.95] < dense


def test_checkpoint_and_early_stopping_can_monitor(tmp_path):
    monitor = "compress/fold/r0.5/acc_raw"
    best = ModelCheckpoint(tmp_path, monitor=monitor, mode="max", filename="best")
    stop = EarlyStopping(monitor, mode="max", patience=1, min_delta=2.0, check_on_train_epoch_end=True)
    _, trainer = fit(tmp_path, [callback(stages=["raw"]), best, stop], epochs=5, enable_checkpointing=True)
    assert trainer.current_epoch == 2, "accuracy cannot gain 2.0, so patience 1 ends after the second epoch"
    assert best.best_model_score is not None
    assert Path(best.best_model_path).exists()


def test_every_n_epochs_and_always_the_last(tmp_path):
    measured = callback(every_n_epochs=2, methods=["l1"], stages=["raw"])
    fit(tmp_path, [measured], epochs=5)
    assert sorted(set(measured.rows["epoch"])) == [2, 4, 5]


def test_the_last_epoch_is_also_that_in_which_the_steps_end(tmp_path):
    for steps in (9, 12):
        measured = callback(every_n_epochs=5, methods=["l1"], stages=["raw"])
        fit(tmp_path, [measured], epochs=10, max_steps=steps)
        assert set(measured.rows.select("epoch", "step").rows()) == {(2, steps)}


def test_a_chain_that_the_network_cannot_go_through_is_refused_before_training(tmp_path):
    module = Plain()
    module.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(UserError, match="repair cannot be done on Sequential: no BatchNorm keeps statistics"):
        fit(tmp_path, [callback(stages=["repair > tune"])], module)
    assert module.trainer.global_step == 0


def test_test_run_measures_on_the_test_set(tmp_path):
    measured = callback(methods=["fold"], stages=["raw", "norm_tuned"])
    module, trainer = fit(tmp_path, [measured], epochs=1)
    logged = trainer.test(module, DataLoader(TEST, 16), verbose=False)[0]
    rows = measured.rows.filter(measured.rows["split"] == "test")
    assert set(rows["n"]) == {40}
    assert set(rows["status"]) == {"ok"}
    raw = rows.filter((rows["ratio"] == 0.5) & (rows["stage"] == "raw"))["acc"].item()
    assert logged["compress_test/fold/r0.5/acc_raw"] == pytest.approx(raw)


def dense(measured: CompressionCallback, split: str) -> dict:
    rows = measured.rows.filter((measured.rows["method"] == "dense") & (measured.rows["split"] == split))
    return rows.to_dicts()[-1]


def test_the_averaged_network_is_measured_and_not_the_live_one(tmp_path):
    losses: dict[str, float] = {}

    class Spy(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            losses["live"] = measure(module.backbone, Classification("multiclass"), [VAL.tensors])["loss"]
            losses["average"] = measure(
                average._average_model.module.backbone, Classification("multiclass"), [VAL.tensors]
            )["loss"]

    measured, average = callback(methods=["fold"], stages=["raw"], ratios=[0.0]), EMAWeightAveraging(decay=0.9)
    module, trainer = fit(tmp_path, [measured, average, Spy()])
    assert abs(losses["live"] - losses["average"]) > 0.01
    assert set(measured.rows["status"]) == {"ok"}
    assert dense(measured, "val")["loss"] == pytest.approx(losses["average"])
    folded = measured.rows.filter((measured.rows["method"] == "fold") & (measured.rows["epoch"] == 2))
    assert folded["loss"].item() == pytest.approx(losses["average"])

    # Lightning left the average in the module. A test run measures the weights it is given, other ones, too.
    for _ in range(2):
        trainer.test(module, DataLoader(TEST, 16), verbose=False)
        assert dense(measured, "test")["loss"] == pytest.approx(
            measure(module.backbone, Classification("multiclass"), [TEST.tensors])["loss"]
        )
        with torch.no_grad():
            module.backbone[-1].bias += torch.tensor([1.0, 0.0, -1.0])


def test_training_with_an_average_is_bit_identical_with_and_without(tmp_path):
    without, _ = fit(tmp_path, [EMAWeightAveraging(decay=0.9)])
    module, _ = fit(tmp_path, [EMAWeightAveraging(decay=0.9), callback()])
    for (name, a), b in zip(without.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_label_can_carry_options(tmp_path):
    measured = callback(methods={"l2": {}, "grouped": {"method": "l2", "score": "group"}}, stages=["raw"])
    fit(tmp_path, [measured], epochs=1)
    assert set(measured.rows["method"]) == {"dense", "l2", "grouped"}
    assert set(measured.rows["status"]) == {"ok"}


class Poison(lightning.Callback):
    """Weights become NaN in the second epoch, as when training diverges."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            with torch.no_grad():
                module.backbone[4].weight[0] = float("nan")


def test_diverged_weights_cost_rows_not_the_run(tmp_path):
    measured = callback(stages=["raw"], rows=tmp_path / "rows.parquet")
    with pytest.warns(RuntimeWarning, match="holds NaN"):
        _, trainer = fit(tmp_path, [Poison(), measured], epochs=3)
    assert trainer.current_epoch == 3
    rows = read(tmp_path / "rows.parquet")
    failed = rows.filter(rows["status"] == "failed")
    assert set(failed["epoch"]) == {2, 3}
    assert failed.filter(failed["method"] == "fold")["reason"].str.contains("holds NaN: training has diverged").all()
    assert rows.filter(rows["epoch"] == 1)["status"].to_list() == ["ok"] * 7
    assert torch.isnan(trainer.callback_metrics["compress/fold/r0.5/acc_raw"])


def test_a_failing_method_costs_its_rows_only(tmp_path, monkeypatch):
    from pipeline.compression.choose import methods

    def broken(weights, sizes):
        raise RuntimeError("no luck\nwith details")

    monkeypatch.setitem(methods.METHODS, "l1", methods.Method(broken, "prune"))
    measured = callback(methods=["l1", "l2"], stages=["raw"])
    with pytest.warns(RuntimeWarning, match="RuntimeError: no luck"):
        fit(tmp_path, [measured], epochs=1)
    status = dict(measured.rows.group_by("method").agg(measured.rows["status"].implode().alias("s")).iter_rows())
    assert set(measured.rows.filter(measured.rows["method"] == "l1")["status"]) == {"failed"}
    assert set(measured.rows.filter(measured.rows["method"] == "l2")["status"]) == {"ok"}
    assert status


def fails_on_call(work, count: int):
    """`work`, whose call number `count` (from 0) raises."""
    calls = iter(range(1000))

    def maybe(*args, **kwargs):
        if next(calls) == count:
            raise RuntimeError("no luck")
        return work(*args, **kwargs)

    return maybe


@pytest.mark.parametrize(
    ("what", "call", "failed"),
    [
        # 3 methods x 2 ratios; an error at one ratio costs its method this ratio and the later ones
        ("pipeline.compression.compress.apply", 2, [("l1", r, s) for r in (0.25, 0.5) for s in ("raw", "repaired")]),
        ("pipeline.compression.compress.apply", 3, [("l1", 0.5, "raw"), ("l1", 0.5, "repaired")]),
        ("pipeline.stages.repair.repair_", 1, [("fold", 0.5, "repaired")]),
        ("pipeline.measure.evaluate", 0, [("dense", 0.0, "raw")]),
        ("pipeline.measure.evaluate", 3, [("fold", 0.5, "raw")]),
        ("callbacks.compression.Passes", 0, "all"),
    ],
)
def test_an_error_on_one_process_leaves_it_with_the_rows_of_the_others(tmp_path, monkeypatch, what, call, failed):
    """The sums of all processes are added up by position in one collective, so entries must agree."""

    def keys() -> list[tuple]:
        return measured.rows.select("method", "ratio", "stage").rows()

    measured = callback()
    fit(tmp_path, [measured], epochs=1)
    others = keys()
    assert set(measured.rows["status"]) == {"ok"}

    module, name = what.rsplit(".", 1)
    module = import_module(module)
    monkeypatch.setattr(module, name, fails_on_call(getattr(module, name), call))
    measured = callback()
    with pytest.warns(RuntimeWarning, match="RuntimeError: no luck"):
        fit(tmp_path, [measured], epochs=1)
    assert keys() == others
    found = measured.rows.filter(measured.rows["status"] == "failed")
    assert found.select("method", "ratio", "stage").rows() == (others if failed == "all" else failed)
    assert set(found["reason"]) == {"RuntimeError: no luck"}


def test_a_stage_that_a_network_has_nothing_for_gives_no_rows(tmp_path):
    class Bare(Plain):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))

    for stages, rows in ((["raw", "repaired", "norm_tuned"], 1 + 3 * 2), (["repaired"], 1)):
        measured = callback(stages=stages)
        fit(tmp_path, [measured], Bare(), epochs=1)
        assert len(measured.rows) == rows
        assert set(measured.rows["stage"]) == {"raw"}
        assert set(measured.rows["status"]) == {"ok"}


def test_a_full_disk_keeps_rows_in_memory_and_writes_them_later(tmp_path, monkeypatch):
    measured = callback(methods=["l1"], stages=["raw"], rows=tmp_path / "rows.parquet")
    write, tries = RowStore.write, []

    def full_once(self):
        tries.append(1)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")
        write(self)

    monkeypatch.setattr(RowStore, "write", full_once)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        fit(tmp_path, [measured])
    assert set(read(tmp_path / "rows.parquet")["epoch"]) == {1, 2}


def test_resuming_replaces_rows_of_later_epochs(tmp_path):
    path = tmp_path / "rows.parquet"
    _, trainer = fit(tmp_path, [callback(methods=["l1"], stages=["raw"], rows=path)], epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    fit(tmp_path, [callback(methods=["l1"], stages=["raw"], rows=path)], epochs=3)
    resumed = callback(methods=["l1"], stages=["raw"], rows=path)
    trainer = Trainer(max_epochs=2, callbacks=[resumed], accelerator="cpu", logger=False, enable_progress_bar=False,
                      enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(Plain(), DataLoader(TRAIN, 16), DataLoader(VAL, 32), ckpt_path=tmp_path / "one.ckpt")
    rows = read(path)
    assert rows["epoch"].to_list() == [1, 1, 1, 2, 2, 2]
    assert not rows.select("epoch", "method", "ratio").is_duplicated().any()


def test_compressed_networks_are_saved_and_load_again(tmp_path):
    from pipeline.compression.checkpoint import load_compressed

    measured = callback(methods=["fold"], save_to=tmp_path / "small")
    fit(tmp_path, [measured], epochs=1)
    files = sorted(p.relative_to(tmp_path / "small").as_posix() for p in (tmp_path / "small").rglob("*.safetensors"))
    assert files == [f"epoch001/fold-r{r}-{s}.safetensors" for r in ("0.25", "0.5") for s in ("raw", "repaired")]
    for stage in ("raw", "repaired"):
        small, manifest = load_compressed(tmp_path / f"small/epoch001/fold-r0.5-{stage}.safetensors", Plain().backbone)
        row = measured.rows.filter((measured.rows["ratio"] == 0.5) & (measured.rows["stage"] == stage))
        assert manifest["params"] == sum(p.numel() for p in small.parameters()) == row["params"].item()
        pictures, labels = VAL.tensors
        accuracy = (small.eval()(pictures).argmax(1) == labels).double().mean().item()
        assert accuracy == pytest.approx(row["acc"].item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"methods": ["fodl"]},
            "unknown method 'fodl'.*did you mean 'fold'.*choose from: auto, bn_scale, fisher, fold",
        ),
        ({"ratios": [0.5, 1.0]}, r"ratio 1\.0 is out of range"),
        ({"ratios": [-0.1]}, r"ratio -0\.1 is out of range"),
        ({"stages": ["rwa"]}, "unknown stage 'rwa'.*raw"),
        ({"ratios": []}, "at least one method, one ratio and one stage"),
        ({"every_n_epochs": -1}, "every_n_epochs -1 must be at least 1, or 0 for test runs"),
        ({"methods": {"dense": {"method": "l1"}}}, "label 'dense' is taken"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, message):
    with pytest.raises(UserError, match=message):
        callback(**options)


def test_what_cannot_work_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"Plain has no network 'net'.*its modules: backbone"):
        fit(tmp_path, [CompressionCallback()])
    with pytest.raises(UserError, match="need training samples without augmentation; pass repair_data="):
        fit(tmp_path, [CompressionCallback(network="backbone")])

    class Tiny(Plain):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    with pytest.raises(UserError, match=r"no channels that can be compressed.*leaves the network"):
        fit(tmp_path, [callback()], Tiny())

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 3)

        def forward(self, x):
            return self.linear(x.flatten(1)) if x.sum() > 0 else self.linear(-x.flatten(1))

    module = Plain()
    module.backbone = Branching()
    with pytest.raises(UserError, match=r"torch\.export cannot trace Branching"):
        fit(tmp_path, [callback()], module)


def test_no_trace_on_two_processes_and_every_picture_counted_once(tmp_path):
    """Two gloo processes, started by a separate process; 61 pictures cannot be halved."""
    done = subprocess.run(
        [sys.executable, HERE / "two_processes.py", tmp_path], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-identical" in done.stdout
