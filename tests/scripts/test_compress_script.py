"""Trained networks that people bring: the same accuracy as where they were trained, smaller files, bad ones named."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from composing import CONFIGS, TINY, composed
from safetensors.torch import save_file

from pipeline.cells import read_record
from pipeline.compression.checkpoint import load_compressed
from pipeline.data.module import PictureData
from pipeline.evaluate import evaluate
from pipeline.models import build_model
from pipeline.models.checkpoint import load_into, read_state, settings_in
from pipeline.results import read
from pipeline.tables import UserError
from scripts.compress import expanded, run
from scripts.train import run as train

DIGITS = ["data=digits", "model=resnet18", "model.width=4", "data.test_size=50", "compression.repair_size=64"]
FEW = ["compression.ratios=[0.5]", "compression.methods=[fold,l1]"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A cell of our own, trained for one epoch."""
    runs = tmp_path_factory.mktemp("trained")
    return train(
        composed("experiment=quickstart", *DIGITS[2:4], "trainer.max_epochs=1", *TINY[3:], f"paths.runs={runs}")
    )


def compress(checkpoint: Path, runs: Path, *overrides: str) -> Path:
    return run(composed_compress(f"checkpoint={checkpoint}", *DIGITS, *FEW, f"paths.runs={runs}", *overrides))


def composed_compress(*overrides: str) -> dict:
    return composed(*expanded(list(overrides)), script="compress")


def test_a_checkpoint_of_ours_keeps_its_accuracy_and_gets_smaller(trained, tmp_path, capsys):
    folder = compress(trained / "last.ckpt", tmp_path, "compression.save=true")
    shown = capsys.readouterr().out
    assert "Dense accuracy" in shown
    assert str(folder) in shown.splitlines()[-1]
    ours = read(trained / "rows.parquet").filter(split="test")
    found = read(folder / "rows.parquet")
    assert set(found["status"]) == {"ok"}
    same = ["method", "ratio", "stage", "params", "macs", "n"]
    assert (
        found.filter(pl.col("stage") == "raw").select(same).equals(ours.filter(pl.col("stage") == "raw").select(same))
    )
    raw = found.filter(stage="raw")["loss"].to_list()
    assert raw == pytest.approx(ours.filter(stage="raw")["loss"].to_list(), rel=1e-4)

    net = build_model("resnet18", classes=10, channels=1, width=4)
    smaller, manifest = load_compressed(folder / "compressed" / "fold-r0.5-repaired.safetensors", net)
    assert manifest["about"]["checkpoint"] == "last.ckpt"
    data = PictureData("digits", test_size=50)
    data.setup()
    row = found.filter(method="fold", stage="repaired")
    metrics = evaluate(smaller, [data.test_data.__getitems__(range(50))])
    assert metrics.loss == pytest.approx(row["loss"].item(), rel=1e-4)


@pytest.mark.parametrize("form", ["plain", "data parallel", "compiled", "nested", "safetensors", "of 2017"])
def test_every_form_of_file_loads_the_same_weights(form, trained, tmp_path):
    weights = {
        name.removeprefix("net."): tensor
        for name, tensor in read_state(trained / "last.ckpt").items()
        if "net." in name
    }
    path = tmp_path / "net.pt"
    if form == "safetensors":
        path = tmp_path / "net.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    elif form == "of 2017":
        torch.save({name: t for name, t in weights.items() if "num_batches_tracked" not in name}, path)
        weights = {name: 0 * t if "num_batches_tracked" in name else t for name, t in weights.items()}
    elif form == "nested":
        torch.save({"epoch": 3, "model": {"module": weights}, "optimizer": {"state": {}}}, path)
    else:
        prefix = {"plain": "", "data parallel": "module.", "compiled": "_orig_mod.module."}[form]
        torch.save({prefix + name: tensor for name, tensor in weights.items()}, path)
    net = build_model("resnet18", classes=10, channels=1, width=4)
    load_into(net, read_state(path), path)
    torch.testing.assert_close(dict(net.state_dict()), weights, rtol=0, atol=0)


class Anything:
    """A pickle of this runs code."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "is damaged or no checkpoint|holds more than weights"),
        ({"weights": Anything()}, r"holds more than weights, and loading it would run code.*state_dict\(\)"),
        ({"epoch": 3}, "holds no weights: it has epoch"),
        ({"conv.weight": torch.zeros(2)}, "is no ResNet: of its .* lacks .* choose the architecture with model="),
        ({**build_model("resnet18", 10, 1, width=4).state_dict(), "aux.weight": torch.zeros(2)}, "it has aux.weight"),
        ("width", r"is another ResNet: conv1.weight is \(8, 1, 3, 3\), not \(4, 1, 3, 3\)"),
    ],
    ids=["bytes", "code", "no weights", "another network", "one tensor more", "another width"],
)
def test_what_is_no_checkpoint_gets_one_clear_line(content, message, tmp_path):
    path = tmp_path / "net.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        wide = content == "width"
        torch.save(build_model("resnet18", 10, 1, width=8).state_dict() if wide else content, path)
    with pytest.raises(UserError, match=message) as caught:
        compress(path, tmp_path / "runs")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists(), "nothing was started"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint /nowhere/net\.pt"):
        compress(Path("/nowhere/net.pt"), tmp_path)
    with pytest.raises(SystemExit, match="no file matches"):
        expanded(["checkpoints=/nowhere/**/*.pt"])


def test_the_studys_file_names_say_the_recipe():
    name = "x/2025-06-07_17-27-38_dataset=cifar10_opt=adam_lr=0.1_batch_size=128_sam=False_rand_aug=True.pth"
    assert settings_in(name) == {
        "dataset": "cifar10", "opt": "adam", "lr": "0.1", "batch_size": "128", "sam": "False", "rand_aug": "True"
    }  # fmt: skip
    assert settings_in("resnet20-12fca82f.th") == {}


def test_a_folder_of_checkpoints(trained, tmp_path):
    """Many files in one command: one is broken, one is done before, names with signs that Hydra reads."""
    state = read_state(trained / "last.ckpt")
    (tmp_path / "nets").mkdir()
    for name in ("a_lr=0.1_wd=0.0.pt", "b_lr=0.2_wd=0.0.pt"):
        torch.save({**state, "net.linear.bias": torch.randn(10)}, tmp_path / "nets" / name)
    (tmp_path / "nets" / "broken.pt").write_bytes(b"half a file")
    command = [sys.executable, "-m", "scripts.compress", f"checkpoints={tmp_path / 'nets'}/**/*.pt", *DIGITS, *FEW]
    done = subprocess.run([*command, f"paths.runs={tmp_path / 'runs'}"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "2 of 3 done, 1 failed" in done.stdout, done.stdout + done.stderr
    assert "broken.pt" in done.stdout.split("failed: ")[-1]
    records = [read_record(folder) for folder in sorted((tmp_path / "runs").glob("compress-*"))]
    assert sorted(record["config"]["named"].get("lr", "") for record in records) == ["", "0.1", "0.2"]
    again = subprocess.run([*command, f"paths.runs={tmp_path / 'runs'}"], capture_output=True, text=True, timeout=240)
    assert "2 of 3 done (2 before)" in again.stdout


def test_every_config_of_compress_is_whole():
    config = composed_compress("checkpoint=x.pt")
    assert set(config) >= {"model", "data", "compression", "paths", "seed", "device"}
    assert (CONFIGS / "compress.yaml").exists()
