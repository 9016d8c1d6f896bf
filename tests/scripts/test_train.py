"""The command that users type: every config builds and runs, the results are whole, bad input gets one clear line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from composing import TINY, composed, grid, options, shrunk
from tiny_models import write_huggingface_vit, write_language_model

from pipeline.compressed import load
from pipeline.compression.plan import history
from pipeline.data import TEXTS
from pipeline.results import read
from pipeline.tables import UserError
from scripts.build_data import build_data
from scripts.build_training import build_task
from scripts.naming import cell_of
from scripts.train import run


@pytest.fixture
def roots(cifar_npz, cifar_folder, fashion, story, tmp_path):
    of_texts = {"text": story, "cache": str(tmp_path / "cache")}
    return {
        "cifar10": cifar_npz, "folder": cifar_folder, "fashion_mnist": fashion, "imagenet": cifar_folder, **of_texts
    }  # fmt: skip


# Models of other libraries, which take colour pictures. All but torchvision's (a SqueezeNet here) have norms.
LIBRARIES = "timm simple_vit open_clip clip_vit_b32 clip_vit_b32_zero_shot vit_b32 huggingface".split()


EVERY = [
    (group, name)
    for group in ("experiment", "sweep", "model", "data", "optim", "compression", "trainer")
    for name in options(group)
]


@pytest.mark.parametrize(("group", "name"), EVERY, ids=lambda value: str(value))
def test_every_config_builds_and_runs_one_batch(group, name, roots, tmp_path):
    data = [] if group in ("experiment", "data", "sweep") else ["data=digits"]
    if group == "model" and name in LIBRARIES:
        data = ["data=cifar10", "compression.stages=[raw,norm_tuned]"]
    if (group, name) == ("model", "torchvision"):
        data = ["data=cifar10", "compression.stages=[raw]"]
    if (group, name) == ("model", "huggingface"):
        data += [f"model.architecture={write_huggingface_vit(tmp_path / 'vit')}"]
    if group == "model" and name in ("language_model", "llama_60m", "llama_130m", "llama_tiny"):
        data = ["data=text", "data.root=set-below", "compression.stages=[raw]", "trainer.gradient_clip_val=1.0"]
    if (group, name) == ("model", "language_model"):
        folder = write_language_model(tmp_path / "llama", vocab_size=257)
        data += [f"model.architecture={folder}", "model.checkpointing=true"]
    if (group, name) == ("sweep", "llama_small"):
        data = ["data.root=set-below"]
    if group == "data" and name in TEXTS:
        data = ["model=llama_tiny", "compression.stages=[raw]", *["data.root=set-below"] * (name == "text")]
    if (group, name) == ("optim", "timm"):
        data += ["optim.name=lion", "optim.lr=1e-4"]
    if name in ("folder", "imagenet", "vit_b32_imagenet"):
        data = ["data.root=set-below"]
    if group == "sweep":  # the sweep's last cell, where every option is on
        data += grid(name)[-1]
    config = composed(f"{group}={name}", *data, *TINY, f"paths.runs={tmp_path / 'runs'}")
    folder = run(shrunk(config, roots))
    rows = read(folder / "rows.parquet")
    assert set(rows["status"]) == {"ok"}, set(rows["reason"])
    assert set(rows["split"]) == ({"val", "test"} if config["compression"]["every_n_epochs"] else {"test"})
    assert (folder / "curves.png").stat().st_size > 10_000
    assert (folder / "last.ckpt").exists()


def test_a_run_shows_and_keeps_everything(tmp_path, capsys):
    config = composed("experiment=quickstart", *TINY, f"paths.runs={tmp_path}")
    folder = run(shrunk(config, {}))
    shown = capsys.readouterr().out
    assert "Dense accuracy" in shown
    assert re.search(r"fold .*\d+\.\d", shown)
    assert "raw (as compressed)" in shown
    assert "repaired" in shown
    assert str(folder) in shown.splitlines()[-1]
    again = composed("experiment=quickstart", *TINY, f"paths.runs={tmp_path / 'elsewhere'}", "wandb.mode=offline")
    assert cell_of(shrunk(again, {})) == folder.name, "where a run is kept is no part of what it is"
    assert cell_of({**again, "seed": 1}) != folder.name
    weights = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert any(name.startswith("net.") for name in weights)


def test_what_training_keeps_loads_from_its_file_alone(tmp_path):
    overrides = ["compression.save=true", "compression.every_n_epochs=0", f"paths.runs={tmp_path}"]
    folder = run(shrunk(composed("experiment=quickstart", *TINY, *overrides), {}))
    rows = read(folder / "rows.parquet").filter(method="fold", stage="repaired")
    model, manifest = load(folder / "compressed/epoch001/fold-r0.5-repaired.safetensors")
    assert manifest["params"] == sum(p.numel() for p in model.parameters()) == rows["params"].item()


def test_a_network_is_made_smaller_and_tuned_from_a_checkpoint(tmp_path, capsys):
    first = run(shrunk(composed("experiment=quickstart", *TINY, f"paths.runs={tmp_path}"), {}))
    epochs = [o for o in TINY if "max_epochs" not in o] + ["trainer.max_epochs=4", "compression.every_n_epochs=0"]
    overrides = [f"checkpoint={first / 'last.ckpt'}", "shrink.method=fold", "shrink.steps=2", "shrink.every_n_epochs=2"]
    config = composed("experiment=quickstart", *epochs, *overrides, "shrink.rewind=true", f"paths.runs={tmp_path}")
    capsys.readouterr()
    folder = run(shrunk(config, {}))
    shown = capsys.readouterr().out
    model, manifest = load(folder / "compressed/fold-r0.5-tuned.safetensors")
    assert manifest["params"] == sum(p.numel() for p in model.parameters()) < manifest["params_before"] / 2
    assert [step["stage"] for step in manifest["chain"]] == ["fold", "tune", "fold", "tune"]
    assert manifest["chain"][-1] == {"stage": "tune", "epochs": 2}
    assert f"by fold at ratio 0.5: {manifest['params'] / manifest['params_before']:.0%} of its parameters" in shown
    dense = read(folder / "rows.parquet").filter(method="dense", split="test")
    assert dense["params"].item() == manifest["params"]
    # the schedule, one step an epoch, once more after the second step
    assert build_task(config, build_data(config)).restarts == (0.0, 0.5)
    other = composed("experiment=quickstart", *TINY, "shrink.ratio=0.7", f"paths.runs={tmp_path}")
    assert cell_of(shrunk(other, {})) == first.name, "what is off is no part of a cell"


def test_steps_by_batch_go_back_to_earlier_weights(tmp_path):
    epochs = [o for o in TINY if "max_epochs" not in o and "limit_train" not in o]
    epochs += ["trainer.max_epochs=2", "data.batch_size=256", "compression.every_n_epochs=0", f"paths.runs={tmp_path}"]
    steps = ["shrink.method=magnitude", "shrink.steps=3", "shrink.every_n_batches=3", "shrink.pace=cubic"]
    config = composed("experiment=quickstart", *epochs, *steps, "shrink.rewind=weights", "shrink.layers={linear:0}")
    config["model"]["width"] = 4
    data = build_data(config)
    batches = len(data.train_dataloader())
    assert build_task(config, data).restarts == (0.0, 3 / (2 * batches), 6 / (2 * batches))
    folder = run(config)
    _, manifest = load(folder / "compressed/magnitude-r0.5-tuned.safetensors")
    assert [step.get("batches") for step in manifest["chain"]] == [None, 3, None, 3, None, 2 * batches - 6]
    last = manifest["chain"][-2]["layers"]
    assert last["linear.weight"]["after"] == last["linear.weight"]["before"]
    assert last["conv1.weight"]["after"] < last["conv1.weight"]["before"]


def test_settings_of_shrink_that_are_younger_than_a_cell_leave_its_name_alone():
    config = composed("experiment=quickstart", "shrink.method=l1", "shrink.rewind=true")
    younger = ("every_n_batches", "pace", "layers", "rewind_to")
    old = {**config, "shrink": {key: value for key, value in config["shrink"].items() if key not in younger}}
    assert cell_of(config) == cell_of(old)
    for changed in ({"pace": "cubic"}, {"every_n_batches": 5}, {"layers": {"conv1": 0.1}}, {"rewind": "weights"}):
        assert cell_of({**config, "shrink": {**config["shrink"], **changed}}) != cell_of(config), changed


def test_a_compressed_file_is_trained_on_and_made_smaller_again(tmp_path, capsys):
    keep = ["compression.save=true", "compression.every_n_epochs=0", f"paths.runs={tmp_path}"]
    first = run(shrunk(composed("experiment=quickstart", *TINY, *keep), {}))
    kept = first / "compressed/epoch001/fold-r0.5-raw.safetensors"
    epochs = [o for o in TINY if "max_epochs" not in o] + ["trainer.max_epochs=2"]
    config = composed("experiment=quickstart", *epochs, *keep, f"checkpoint={kept}", "shrink.method=l1")
    assert config["name"] == "quickstart"
    smaller, before = load(kept)
    task = build_task(shrunk(config, {}), build_data(config))
    assert history(task.net) == history(smaller)
    assert all(torch.equal(t, task.net.state_dict()[name]) for name, t in smaller.state_dict().items())
    folder = run(config)
    assert "by l1 at ratio 0.5" in capsys.readouterr().out
    dense = read(folder / "rows.parquet").filter(method="dense", split="test")
    model, manifest = load(folder / "compressed/l1-r0.5-tuned.safetensors")
    assert dense["params"].item() == manifest["params"] == sum(p.numel() for p in model.parameters()) < before["params"]
    assert manifest["params_before"] == before["params_before"]
    assert [step.stage for step in history(model)] == ["fold", "l1", "tune"]
    twice, _ = load(folder / "compressed/epoch002/fold-r0.5-raw.safetensors")
    assert [step.stage for step in history(twice)] == ["fold", "l1", "tune", "fold"]


def test_the_same_config_gives_the_same_rows(tmp_path):
    first, second = (
        read(run(shrunk(composed("experiment=quickstart", *TINY, f"paths.runs={tmp_path / n}"), {})) / "rows.parquet")
        for n in ("a", "b")
    )
    assert first.drop("seconds").equals(second.drop("seconds"))


def test_the_offline_wandb_run_holds_every_logged_number(tmp_path):
    overrides = [o for o in TINY if "wandb" not in o and "max_epochs" not in o]
    config = composed("experiment=quickstart", *overrides, "trainer.max_epochs=2", "wandb.mode=offline",
                      f"paths.runs={tmp_path}")  # fmt: skip
    folder = run(shrunk(config, {}))
    (recorded,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = [json.loads(line) for line in wandb_read(recorded, "--json").splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    rows = read(folder / "rows.parquet")
    compressed = rows.filter((rows["method"] != "dense") & (rows["split"] == "val"))
    assert len(compressed) == 2 * 2 * 2  # epochs, methods, stages
    for r in compressed.to_dicts():
        name = f"compress/{r['method']}/r{r['ratio']:g}/acc_{r['stage']}"
        logged = [line[name] for line in history if name in line and line.get("epoch") == r["epoch"] - 1]
        assert logged == [pytest.approx(r["acc"])], name
    last = {name for line in history for name in line}
    assert {"foldability/fold_raw", "foldability/gap_repaired", "compress_test/fold/r0.5/acc_raw"} <= last
    summary = json.loads(wandb_read(recorded, "--summary", "--json"))["summary"]
    assert summary["compress/rows"]["nrows"] == len(rows)
    assert (
        summary["foldability/fold_raw"]
        == [v["foldability/fold_raw"] for v in history if "foldability/fold_raw" in v][-1]
    )


def wandb_read(path: Path, *flags: str) -> str:
    """The output of `wandb leet inspect` for an offline run."""
    tool = Path(sys.executable).with_name("wandb")
    done = subprocess.run([tool, "leet", "inspect", *flags, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compression.methods=[fodl]"], "unknown method 'fodl'.*choose from: auto, bn_scale, fisher, fold"),
        (["compression.ratios=[1.5]"], r"ratio 1\.5 is out of range"),
        (["model.name=resnet81"], "unknown model 'resnet81'.*resnet18"),
        (["+model.depth=3"], "model 'resnet18' has no option 'depth'; it takes: width"),
        (["data.name=mnits"], "unknown data set 'mnits'.*digits"),
        (["optim.name=sdg"], "unknown optimizer 'sdg'.*sgd"),
        (["+optim.betas=[0.9,0.99]"], "optimizer 'sgd' has no option 'betas'"),
        (["optim.schedule.name=cosin"], "unknown schedule 'cosin'.*cosine"),
        (["+trainer.max_epoch=3"], "trainer has no option 'max_epoch'"),
        (["+data.batchsize=3"], "no option 'batchsize'"),
        (["data=cifar10", "data.root=/nowhere/at/all", "data.download=false"], "/nowhere/at/all"),
        (["optim.lr=abc"], "optimizer 'sgd': lr must be a number, got 'abc'"),
        (["optim.lr=-1"], "optimizer 'sgd': Invalid learning rate: -1"),
        (["trainer.max_epochs=two"], r"trainer\.max_epochs two must be a whole number of at least 1"),
        (["shrink.method=fodl"], "unknown method 'fodl'"),
        (["shrink.method=l1", "shrink.ratio=1"], "ratio 1 is out of range"),
        (["shrink.method=l1", "shrink.after=1"], "the last of 1 steps comes after 1 epochs, and training has 1"),
        (["shrink.method=l1", "optim.ema=0.9"], "averaged weights"),
        (
            ["shrink.method=l1", "shrink.rewind=wheel"],
            "'wheel'.*choose from: false, true, weights",
        ),
        (["shrink.method=l1", "shrink.rewind=weights", "shrink.rewind_to=1"], "rewind_to 1 must be a whole number of"),
        (["shrink.method=l1", "shrink.every_n_batches=1", "shrink.after=99"], "after 99 batches, and training has 1"),
        (["checkpoint=/nowhere.pt"], "no checkpoint /nowhere.pt"),
        (["model.width=wide"], "model 'resnet18': width must be a number, got 'wide'"),
        (["data=folder"], r"data\.root is not set; give it on the command line"),
        (["model=timm", "model.architecture=vit_tinny_patch16_224"], "unknown timm model 'vit_tinny_patch16_224'"),
        (["trainer.precision=8-bit"], "trainer: Precision '8-bit' is invalid"),
        (["trainer.accelerator=tpu"], "trainer: .*torch_xla"),
        (["trainer.devices=99"], r"trainer.devices 99 are more processes than the \d+ cores there are"),
        (["+trainer.logger=false"], "trainer.logger is set by the script"),
        (["optim.ema=2"], "optim.ema 2 must be in 0 < decay < 1"),
        (["save_every_n_steps=-1"], "save_every_n_steps -1 must be at least 1"),
        (["compression.round_to=1000"], "round_to 1000 leaves all groups whole: the largest has [0-9]+ channels"),
        (["compression.ratios=[half]"], "ratio 'half' is no number"),
        (["compression.ratios=[0.5,0.50]"], "ratios has 0.5 twice; leave one out"),
        (["compression.methods=[fold,l1,fold]"], "methods has fold twice; leave one out"),
        (["compression.stages=[raw,raw]"], "stages has raw twice; leave one out"),
        (["compression.repair_size=0"], "repair_size 0 must be a whole number of at least 1 sample"),
        (["model.width=-4"], "model.width -4 must be a whole number of at least 1"),
        (["model.width=4.5"], "model.width 4.5 must be a whole number of at least 1"),
        (["data.mean=[0.5]"], "data.mean is set and data.std is not; give both, or neither"),
        (["data.std=[0.5]"], "data.std is set and data.mean is not; give both, or neither"),
        (["data.batch_size=1"], r"data.batch_size 1 gives BatchNorm \(bn1\) nothing to normalise over"),
        (["data.val_fraction=0.999"], "a part of 1436 of 1437 pictures leaves one side without all 10 classes"),
        (["data.train_size=5"], "a part of 5 of 1293 pictures leaves one side without all 10 classes"),
    ],
)
def test_bad_input_gets_one_clear_line(overrides, message, tmp_path):
    # later overrides of a test win over the tiny defaults
    names = {o.split("=")[0] for o in overrides}
    rest = [o for o in ("experiment=quickstart", *TINY) if o.split("=")[0] not in names]
    with pytest.raises(UserError, match=message) as caught:
        run(composed(*rest, *overrides, f"paths.runs={tmp_path / 'runs'}"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "refused before anything was written"


@pytest.mark.parametrize("place", ["/proc/runs", "a file", "read-only"])
def test_a_folder_that_cannot_be_written_to_is_refused(place, tmp_path):
    (tmp_path / "a file").write_text("")
    (tmp_path / "read-only").mkdir()
    (tmp_path / "read-only").chmod(0o500)
    if place == "read-only" and os.access(tmp_path / "read-only", os.W_OK):
        pytest.skip("this user may write everywhere")
    runs = place if place.startswith("/") else tmp_path / place
    with pytest.raises(UserError, match=r"paths.runs .* cannot be written to \(.*\); choose another folder"):
        run(composed("experiment=quickstart", *TINY, f"paths.runs='{runs}'"))


def test_the_command_prints_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "scripts.train", "experiment=quickstart", f"paths.runs={tmp_path}"]
    done = subprocess.run([*command, "compression.methods=[fodl]"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: unknown method 'fodl'")
    assert "Traceback" not in done.stderr
    done = subprocess.run([*command, "optim.lrr=1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "optim.lrr" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing was started"


@pytest.mark.parametrize(
    ("precision", "there", "said"), [("bf16-mixed", False, True), ("bf16-mixed", True, False), ("32", False, False)]
)
def test_slow_bfloat16_is_told(precision, there, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("scripts.build_training.has_bfloat16", lambda: there)
    tiny = ["experiment=quickstart", "model.width=4", "data.test_size=50", *TINY]
    run(composed(*tiny, f"trainer.precision={precision}", f"paths.runs={tmp_path}"))
    assert ("this CPU has no bfloat16: bf16-mixed takes" in capsys.readouterr().err) is said


def test_wandb_that_fails_costs_nothing(tmp_path, monkeypatch):
    from lightning.pytorch.loggers import WandbLogger

    def gone(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WandbLogger, "log_metrics", gone)
    overrides = [o for o in TINY if "wandb" not in o]
    config = composed("experiment=quickstart", *overrides, "wandb.mode=offline", f"paths.runs={tmp_path}")
    with pytest.warns(RuntimeWarning, match="W&B did not take what was logged.*No space left"):
        folder = run(shrunk(config, {}))
    assert set(read(folder / "rows.parquet")["status"]) == {"ok"}


@pytest.mark.slow
def test_the_quickstart_reaches_its_accuracy(tmp_path):
    folder = run(composed("experiment=quickstart", "wandb.mode=disabled", f"paths.runs={tmp_path}"))
    rows = read(folder / "rows.parquet")
    dense = rows.filter((rows["method"] == "dense") & (rows["split"] == "test"))["acc"].item()
    assert dense >= 0.95  # of 360 pictures; 97.8% and 96.7% with other numbers of threads
    assert np.isfinite(rows["acc"].to_numpy()).all()
