"""Cells and sweeps: a cell is named by its settings, runs once, and resumes; a failure costs one cell."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import torch
from composing import CONFIGS, TINY, composed, grid, options
from lightning import LightningModule, Trainer
from omegaconf import OmegaConf

from callbacks import CompressionCallback
from pipeline.cells import Busy, flat, held, read_record
from pipeline.evaluate import metrics_of as measure
from pipeline.results import KEY, read
from pipeline.tables import UserError
from pipeline.tasks import Classification
from pipeline.training import Training
from scripts.build_data import build_data
from scripts.build_training import build_task
from scripts.naming import cell_of
from scripts.sweep import check_launcher, duration, line
from scripts.train import run

QUICK = ["experiment=quickstart", "model.width=4", "data.train_size=200", "data.test_size=50", *TINY[2:]]
RECIPES = {
    "adam with sam": [
        "optim=adam",
        "optim.sam.rho=0.05",
        "optim.schedule.name=cyclic",
        "~optim.schedule.warmup",
        "optim.l1=1e-5",
    ],
    "everything else": [
        "optim.ema=0.9",
        "data.mixup=0.2",
        "data.cutmix=1.0",
        "data.augment=[crop,rand_augment]",
        "trainer.accumulate_grad_batches=2",
        "trainer.gradient_clip_val=1.0",
        "label_smoothing=0.1",
    ],
    "workers": ["data.workers=2", "optim.ema=0.9", "optim=rmsprop"],
}


def rows_in(folder: Path) -> pl.DataFrame:
    return read(folder / "rows.parquet").drop("seconds", "version")


def same_results(first: Path, second: Path) -> None:
    """The same rows in the same order, and the same weights, bit for bit."""
    rows = [rows_in(folder) for folder in (first, second)]
    assert rows[0].equals(rows[1])
    states = [torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (first, second)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


class Crash(RuntimeError):
    pass


@pytest.mark.parametrize("when", ["in the third epoch", "before the test"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_cut_off_cell_goes_on_bit_for_bit(recipe, when, tmp_path, monkeypatch):
    def config(name: str) -> dict:
        return composed(*QUICK, "trainer.max_epochs=4", *RECIPES[recipe], f"paths.runs={tmp_path / name}")

    def crash(self, *args, **kwargs):
        if when == "before the test" or (isinstance(self, LightningModule) and self.current_epoch == 2):
            raise Crash("power cut")
        return step(self, *args, **kwargs)

    step = Training.training_step
    with monkeypatch.context() as patch:
        if when == "before the test":
            patch.setattr(Trainer, "test", crash)
        else:
            patch.setattr(Training, "training_step", crash)
        with pytest.raises(Crash):
            run(config("cut"))
    (folder,) = (tmp_path / "cut").glob("quickstart-*")
    assert read_record(folder)["state"] == "failed"
    assert read_record(folder)["reason"] == "Crash: power cut"
    assert read(folder / "rows.parquet")["epoch"].max() == (2 if "epoch" in when else 4)
    assert run(config("cut")) == folder
    assert read_record(folder)["state"] == "done"
    same_results(folder, run(config("whole")))
    assert len(list((folder / "metrics").iterdir())) == 2, "the metrics of the first part were lost"


def test_the_averaged_weights_are_what_is_measured_and_kept(tmp_path):
    config = composed(*QUICK, "trainer.max_epochs=3", "optim.ema=0.99", f"paths.runs={tmp_path}")
    folder = run(config)
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    data = build_data(config)
    rows = read(folder / "rows.parquet").filter(method="dense").sort("epoch", "split")
    for split, pictures in (("test", data.test_data), ("val", data.val_data)):
        (measured,) = rows.filter(epoch=3, split=split)["loss"]
        losses = {}
        for name in ("state_dict", "current_model_state"):
            task = build_task(config, data)
            task.load_state_dict(saved[name])
            batches = [pictures.__getitems__(range(len(pictures)))]
            losses[name] = measure(task.net, Classification("multiclass"), batches)["loss"]
        assert measured == pytest.approx(losses["state_dict"], rel=1e-4), split
        assert measured != pytest.approx(losses["current_model_state"], rel=1e-2), split


def test_a_finished_cell_is_shown_and_not_run_again(tmp_path, capsys, monkeypatch):
    config = composed(*QUICK, "trainer.max_epochs=1", f"paths.runs={tmp_path}")
    folder = run(config)
    table = capsys.readouterr().out.split("Dense accuracy")[1]
    monkeypatch.setattr(Trainer, "fit", None)
    start = time.perf_counter()
    assert run(config, sweeping=True) == folder
    assert time.perf_counter() - start < 0.3
    assert capsys.readouterr().out == ""
    run(config)
    shown = capsys.readouterr().out
    assert "is done already" in shown
    assert shown.split("Dense accuracy")[1] == table


def test_a_cell_is_run_by_one_process_at_a_time(tmp_path):
    config = composed(*QUICK, "trainer.max_epochs=1", f"paths.runs={tmp_path}")
    folder = tmp_path / cell_of(config)
    with held(folder), pytest.raises(Busy, match="is being run by another process"):
        run(config, sweeping=True)
    assert read_record(folder) is None, "the record of the other process was overwritten"


def test_a_damaged_checkpoint_costs_time_and_nothing_else(tmp_path, monkeypatch):
    config = composed(*QUICK, "trainer.max_epochs=1", f"paths.runs={tmp_path / 'a'}")
    with monkeypatch.context() as patch:
        patch.setattr(CompressionCallback, "on_test_epoch_end", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(config)
    checkpoint = tmp_path / "a" / cell_of(config) / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.warns(RuntimeWarning, match="last.ckpt is damaged .*; the cell starts anew"):
        folder = run(config)
    same_results(folder, run(composed(*QUICK, "trainer.max_epochs=1", f"paths.runs={tmp_path / 'b'}")))


def test_where_a_cell_runs_is_no_part_of_what_it_is(tmp_path):
    plain = composed("data=cifar10")
    for elsewhere in (
        ["data.root=/mnt/pictures"],
        ["data.workers=8", "data.download=false"],
        ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"],
        ["wandb.mode=disabled", f"paths.runs={tmp_path}"],
        ["optim.lr=1e-1"],
        ["launcher=local", "hydra.sweeper.max_batch_size=3"],
    ):
        assert cell_of(composed("data=cifar10", *elsewhere)) == cell_of(plain), elsewhere
    for other in (["seed=1"], ["optim.lr=0.2"], ["trainer.precision=bf16-mixed"], ["data.augment=[]"]):
        assert cell_of(composed("data=cifar10", *other)) != cell_of(plain), other
    folders = [
        cell_of(composed("data=folder", f"data.root={root}")) for root in ("/a/flowers", "/b/flowers", "/a/cars")
    ]
    assert folders[0] == folders[1] != folders[2], "the folder says which pictures they are"
    assert cell_of(composed("optim.lr=1")) == cell_of(composed("optim.lr=1.0"))


@pytest.mark.parametrize(
    ("sweep", "cells"),
    {
        "resnet18_adam_cifar10": 216,
        "resnet18_sgd_cifar10": 576,
        "preact_resnet18_cifar10": 48,
        "simple_vit_cifar10": 198,
        "vit_b32_imagenet": 36,
        "narrow_resnet18_adam_cifar10": 16,
        "narrow_resnet18_sgd_cifar10": 16,
        "accuracy_resnets_cifar10": 24,
        "accuracy_vit_cifar10": 12,
        "tuned_cifar10": 8,
        "llama_60m_c4": 18,
        "llama_130m_c4": 18,
        "llama_small": 4,
        "seeds_adam_cifar10": 16,
        "seeds_sam_l1_cifar10": 16,
        "trained_cifar10": 2,
    }.items(),
)
def test_presets_have_the_cells_of_the_study(sweep, cells):
    overrides = grid(sweep)
    assert len(overrides) == len(set(map(tuple, overrides))) == cells
    root = [] if "c4" in sweep else ["data.root=x"]
    names = {cell_of(composed(f"sweep={sweep}", *root, *cell)) for cell in overrides[:: max(1, cells // 8)]}
    assert len(names) == len(overrides[:: max(1, cells // 8)])


def test_every_preset_is_counted():
    counted = test_presets_have_the_cells_of_the_study.pytestmark[0].args[1]
    assert sorted(options("sweep")) == sorted(sweep for sweep, _ in counted)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.precision=bf16-true", "optim.sam.rho=0.1"],
            "SAM's step is lost in weights of precision 'bf16-true'",
        ),
        (["optim.sam.rho=-1"], r"sam\.rho -1 must be positive"),
        (["+optim.sam.radius=1"], "optim.sam has no option 'radius'"),
        (["optim.ema=2"], r"optim\.ema 2 must be in 0 < decay < 1"),
        (["optim.l1=-1"], "l1 -1 must not be negative"),
        (["optim.ema=abc"], "optim: ema must be a number, got 'abc'"),
        (["seed=abc"], "seed abc must be a whole number of at least 0"),
        (["name=a/b"], "name 'a/b' becomes a folder's name"),
        (["trainer.max_epochs=-1"], r"trainer\.max_epochs -1 must be a whole number of at least 1"),
        (["trainer.accumulate_grad_batches=0"], r"accumulate_grad_batches 0 must be a whole number of at least 1"),
        (["trainer.accelerator=abacus"], "trainer: .*abacus"),
        (["wandb.mode=maybe"], "unknown wandb.mode 'maybe'.*offline"),
        (["data.workers=-1"], "workers -1 must be at least 0"),
        (["compression.methods=fold"], r"methods must be a list, such as \[fold\], got 'fold'"),
        (["compression.ratios=0.5"], r"ratios must be a list, such as \[0\.5\]"),
        (["label_smoothing=2"], r"label_smoothing 2 must be in 0\.\.1"),
        (["+trainer.callbacks=[]"], r"trainer\.callbacks is set by the script"),
        (["+trainer.logger=true"], r"trainer\.logger is set by the script"),
        (["data.augment=[crop,flop]"], "unknown augmentation.*'flop'.*flip"),
        (["data.mixup=-1"], "mixup -1"),
        (["optim=timm", "optim.lr=1"], r"optim\.name is not set"),
        (["optim.schedule.name=cosine", "+optim.schedule.ends=1"], "schedule 'cosine' has no option 'ends'"),
    ],
)
def test_bad_recipes_get_one_clear_line(overrides, message, tmp_path):
    names = {text.split("=")[0] for text in overrides}
    quick = [text for text in QUICK if text.split("=")[0] not in names]
    with pytest.raises(UserError, match=message) as caught:
        run(composed(*quick, *overrides, f"paths.runs={tmp_path}"))
    assert "\n" not in str(caught.value)


def test_the_wandb_sweep_calls_the_same_script():
    search = OmegaConf.to_container(OmegaConf.load(CONFIGS / "wandb_sweep.yaml"), resolve=False)
    module = search["command"][search["command"].index("-m") + 1]
    assert Path(importlib.util.find_spec(module).origin).samefile(CONFIGS.parent / search["program"])
    fixed = [word for word in search["command"] if "=" in word]
    for end in (0, -1):
        choice = {name: p["values"][end] if "values" in p else p["max"] for name, p in search["parameters"].items()}
        config = composed(*fixed, *(f"{name}={value}" for name, value in choice.items()))
        assert {name: flat(config)[name] for name in ("optim.lr", "optim.sam.rho")} == {
            name: choice[name] for name in ("optim.lr", "optim.sam.rho")
        }
        assert isinstance(config["data"]["augment"], list)
    stage = search["metric"]["name"].removeprefix("foldability/fold_")
    assert stage in config["compression"]["stages"]
    assert search["early_terminate"]["min_iter"] >= config["compression"]["every_n_epochs"]


@pytest.mark.parametrize("any_plugin", [True, False])
def test_a_launcher_that_is_missing_says_how_to_get_it(monkeypatch, any_plugin):
    def find(name: str) -> None:
        if not any_plugin:
            raise ModuleNotFoundError("No module named 'hydra_plugins'")

    monkeypatch.setattr("importlib.util.find_spec", find)
    with pytest.raises(UserError, match=r"launcher 'ray' is not installed; pip install 'foldability\[ray\]'"):
        check_launcher(["scripts.train", "sweep=x", "launcher=ray"])
    check_launcher(["scripts.train", "launcher=local"])


def test_the_progress_line():
    def job(state: str, seconds: float = 0.0, skipped: bool = False) -> dict:
        return {"state": state, "seconds": seconds, "skipped": skipped}

    jobs = dict(enumerate([job("done", 60), job("done", 120), job("running"), job("running"), job("failed")]))
    # 5 left and 2 half done, 90 s each, two at a time
    assert line(jobs, 10) == "2 of 10 done, 2 running, 1 failed, 5 left; about 4 min 30 s to go"
    assert line({0: job("done", 60, skipped=True)}, 2) == "1 of 2 done (1 before), 1 left"
    assert [duration(seconds) for seconds in (5, 75, 7300)] == ["5 s", "1 min 15 s", "2 h 1 min"]


def sweep(runs: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "scripts.train", "-m", *QUICK, *overrides, f"paths.runs={runs}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)


def whole_sweep(runs: Path, *overrides: str, status: int = 0) -> str:
    """Run a sweep to its end; returns its output."""
    process = sweep(runs, *overrides)
    shown, _ = process.communicate(timeout=900)
    assert process.returncode == status, shown
    return shown


def test_a_failing_cell_does_not_stop_the_others(tmp_path):
    overrides = ["trainer.max_epochs=1", "optim.lr=0.1,-1,0.2"]
    shown = whole_sweep(tmp_path, *overrides, status=1)
    assert "Traceback" not in shown
    assert shown.startswith("3 cells; their folders are in")
    assert "2 of 3 done, 1 failed." in shown
    (reason,) = [text for text in shown.splitlines() if text.startswith("failed:")]
    assert "optimizer 'sgd': Invalid learning rate: -1" in reason
    states = {folder.name: read_record(folder)["state"] for folder in tmp_path.glob("quickstart-*")}
    assert sorted(states.values()) == ["done", "done", "failed"]
    assert all(name in shown for name in states)


def rows_of(runs: Path) -> dict[str, list[dict]]:
    files = sorted(runs.glob("quickstart-*/rows.parquet"))
    return {path.parent.name: rows_in(path.parent).to_dicts() for path in files}


GRID = [
    "trainer.max_epochs=4",
    "optim.lr=0.05,0.1,0.2",
    "optim.sam.rho=0.0,0.05",
    "seed=0,1",
]


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path):
    whole_sweep(tmp_path / "whole", *GRID)
    whole = rows_of(tmp_path / "whole")
    assert len(whole) == 12

    moments, runs, kills = random.Random(0), tmp_path / "killed", 0
    while kills < 20:
        before = newest(runs)
        process = sweep(runs, *GRID)
        while process.poll() is None and newest(runs) == before:  # until the sweep works on a cell
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 2))
        assert process.poll() is None, f"the sweep ended after {kills} kills: {process.communicate()[0]}"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        for cell, rows in rows_of(runs).items():
            keys = [tuple(row[key] for key in KEY) for row in rows]
            assert len(set(keys)) == len(keys), f"{cell} has a row twice"
            assert all(row in whole[cell] for row in rows), f"{cell} has a row that an undisturbed sweep has not"
    whole_sweep(runs, *GRID)
    assert rows_of(runs) == whole
    for cell in whole:
        same_results(runs / cell, tmp_path / "whole" / cell)
        assert json.loads((runs / cell / "cell.json").read_text())["state"] == "done"


def newest(runs: Path) -> float:
    """Time of the last write to any cell."""
    return max((path.stat().st_mtime for path in runs.glob("quickstart-*/*")), default=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "launcher"),
    [
        ("hydra_joblib_launcher", ["launcher=joblib"]),
        ("hydra_ray_launcher", ["launcher=ray"]),
        ("hydra_submitit_launcher", ["hydra/launcher=submitit_local"]),
    ],
)
def test_every_launcher_gives_the_same_rows(plugin, launcher, tmp_path):
    pytest.importorskip(f"hydra_plugins.{plugin}")
    few = ["trainer.max_epochs=1", "optim.lr=0.05,0.1", "optim.sam.rho=0.0,0.05"]
    for name, options_ in (("local", []), ("other", launcher)):
        whole_sweep(tmp_path / name, *few, *options_)
    assert len(rows_of(tmp_path / "local")) == 4
    assert rows_of(tmp_path / "local") == rows_of(tmp_path / "other")
