"""Trained networks that people bring keep their accuracy and get smaller files; bad ones are named."""

import multiprocessing
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest
import torch
from composing import CONFIGS, TINY, composed, composed_compress, shrunk
from safetensors.torch import save_file
from tiny_models import write_huggingface_vit

import scripts.compress
from pipeline.cells import read_record
from pipeline.compressed import load
from pipeline.compression.plan import history
from pipeline.data.cifar10 import load as load_cifar10
from pipeline.data.module import PictureData
from pipeline.entries import Entry
from pipeline.evaluate import metrics_of
from pipeline.models import build_model
from pipeline.models.checkpoint import load_into, read_state, settings_in
from pipeline.results import DENSE, read, read_speeds
from pipeline.tables import UserError
from pipeline.tasks import Classification
from scripts.build_data import build_data, data_options
from scripts.build_network import without_weights
from scripts.compress import chosen_device, expanded, is_checkpoint, run, wanted
from scripts.naming import cell_of, file_hash
from scripts.report import main as report
from scripts.train import run as train

DIGITS = ["data=digits", "model=resnet18", "model.width=4", "data.test_size=50", "compression.repair_size=64"]
FEW = ["ratios=[0.5]", "methods=[fold,l1]", "profile.seconds=0.01"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A cell of our own, trained for one epoch."""
    runs = tmp_path_factory.mktemp("trained")
    return train(
        composed("experiment=quickstart", *DIGITS[2:4], "trainer.max_epochs=1", *TINY[3:], f"paths.runs={runs}")
    )


def compress(checkpoint: Path, runs: Path, *overrides: str) -> Path:
    return run(composed_compress(f"checkpoint={checkpoint}", *DIGITS, *FEW, f"paths.runs={runs}", *overrides))


def test_a_checkpoint_of_ours_keeps_its_accuracy_and_gets_smaller(trained, tmp_path, capsys):
    folder = compress(trained / "last.ckpt", tmp_path)
    shown, beside = capsys.readouterr()
    assert re.match(r"50 pictures of 8x8, 10 classes, normalised by mean 0\.\d+ and std 0\.\d+ ", shown)
    assert re.search(r"^0 of \d+ networks measured in 00:0\d, about \? to go, fold 0\.\d now$", beside, re.M)
    assert "\r" not in beside, "a log keeps no bar"
    assert "Dense accuracy" in shown
    assert re.search(r"0\.5 .* MB .* ms \(\d+\.\dx\)", shown)
    assert str(folder) in shown.splitlines()[-1]
    ours = read(trained / "rows.parquet").filter(split="test")
    found = read(folder / "rows.parquet")
    assert set(found["status"]) == {"ok"}
    same = ["method", "ratio", "stage", "params", "macs", "n"]
    assert (
        found.filter(pl.col("stage") == "raw").select(same).equals(ours.filter(pl.col("stage") == "raw").select(same))
    )
    named = read_record(folder)["config"]["named"]
    told = read_record(trained)["config"]
    assert named["optim.lr"] == told["optim"]["lr"], "how it was trained, for the report"
    assert (named["optim.sam.rho"], named["trainer.max_epochs"], named["seed"]) == (0.0, 1, 0)
    assert not {"data.root", "shrink.ratio", "trainer.accelerator", "model.width"} & set(named)
    raw = found.filter(stage="raw")["loss"].to_list()
    assert raw == pytest.approx(ours.filter(stage="raw")["loss"].to_list(), rel=1e-4)

    kept = folder / "compressed" / "fold-r0.5-repaired.safetensors"
    assert list(kept.parent.iterdir()) == [kept], "of a single checkpoint the first method's, in their last stage"
    smaller, manifest = load(kept)
    assert manifest["source"] == {"file": "last.ckpt", "sha256": file_hash(str(trained / "last.ckpt"))}
    data = PictureData("digits", test_size=50)
    data.setup()
    pictures = manifest["about"]["pictures"]
    assert (pictures["size"], pictures["mean"], pictures["classes"]) == (8, data.test_data.mean, data.classes)
    row = found.filter(method="fold", stage="repaired")
    metrics = metrics_of(smaller, Classification("multiclass"), [data.test_data.__getitems__(range(50))])
    assert metrics["loss"] == pytest.approx(row["loss"].item(), rel=1e-4)


def test_what_is_kept_loads_in_a_fresh_process_and_elsewhere(trained, tmp_path):
    folder = compress(trained / "last.ckpt", tmp_path, "export=[onnx,program]", "methods=[l1]", "stages=[raw]")
    kept = sorted(path.name for path in (folder / "compressed").iterdir())
    assert kept == [f"l1-r0.5-raw{ending}" for ending in (".onnx", ".pt2", ".safetensors")]
    program = (
        "import sys, torch\n"
        "from pipeline.compressed import load\n"
        "model, _ = load(sys.argv[1] + '.safetensors')\n"
        "assert not any(name.startswith(('scripts', 'configs', 'hydra')) for name in sys.modules)\n"
        "x = torch.randn(3, 1, 8, 8)\n"
        "exported = torch.export.load(sys.argv[1] + '.pt2').module()\n"
        "torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(folder / "compressed" / "l1-r0.5-raw")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_kept_networks_are_written_for_openvino_or_its_extra_is_named(trained, tmp_path):
    asked = (trained / "last.ckpt", tmp_path / "runs", "export=[openvino]", "methods=[l1]", "stages=[raw]")
    if find_spec("openvino") and find_spec("nncf"):
        assert (compress(*asked) / "compressed" / "l1-r0.5-raw.openvino.zip").exists()
        return
    with pytest.raises(UserError, match=r"OpenVINO needs \w+: pip install 'foldability\[openvino\]'"):
        compress(*asked)
    assert not (tmp_path / "runs").exists()


def test_sharpness_and_corruptions_are_columns_that_a_cell_asks_for(trained, tmp_path):
    asked = ("compression.sharpness={steps:2,hessian:false}", "compression.corruptions=[contrast,jpeg]")
    folder = compress(trained / "last.ckpt", tmp_path, *asked, "methods=[l1]", "stages=[raw]")
    found = read(folder / "rows.parquet")
    assert set(found["status"]) == {"ok"}
    assert found.select("sharpness_sam", "sharpness_l2", "sharpness_linf", "corrupted").null_count().row(0) == (0,) * 4
    assert found["hessian_top"].null_count() == len(found)


def test_masked_networks_are_measured_kept_and_load_again(trained, tmp_path, capsys):
    folder = compress(trained / "last.ckpt", tmp_path, "methods=[magnitude,n_m,l1+filters]", "save=true")
    assert "parameters not masked" in capsys.readouterr().out
    found = read(folder / "rows.parquet")
    assert set(found["status"]) == {"ok"}
    data = PictureData("digits", test_size=50)
    data.setup()
    for method in ("magnitude", "n_m"):
        smaller, manifest = load(folder / "compressed" / f"{method}-r0.5-repaired.safetensors")
        zeros = sum(int((p == 0).sum()) for p in smaller.parameters() if p.dim() > 1)
        assert 0 < zeros == manifest["params_before"] - manifest["params"]
        assert manifest["groups"] == {}
        row = found.filter(method=method, stage="repaired")
        assert row["params"].item() == manifest["params"]
        metrics = metrics_of(smaller, Classification("multiclass"), [data.test_data.__getitems__(range(50))])
        assert metrics["loss"] == pytest.approx(row["loss"].item(), rel=1e-4)


def test_a_compressed_file_is_a_checkpoint_and_is_compressed_again(trained, tmp_path):
    first = compress(trained / "last.ckpt", tmp_path / "first", "methods=[fold]")
    kept = first / "compressed" / "fold-r0.5-repaired.safetensors"
    before = load(kept)[1]
    folder = compress(kept, tmp_path / "second", "methods=[l1]", "stages=[raw]")
    found = read(folder / "rows.parquet")
    assert set(found["status"]) == {"ok"}
    dense, once = found.filter(method=DENSE), read(first / "rows.parquet").filter(method="fold", stage="repaired")
    same = ["params", "macs", "acc", "n"]
    assert dense.select(same).equals(once.select(same)), "what the first command measured of it"
    model, manifest = load(folder / "compressed" / "l1-r0.5-raw.safetensors")
    assert [step.stage for step in history(model)] == ["fold", "repair", "l1"]
    assert manifest["source"] == {"file": kept.name, "sha256": file_hash(str(kept))}
    assert manifest["params"] == sum(p.numel() for p in model.parameters()) < before["params"]
    assert manifest["params_before"] == before["params_before"]
    third = compress(folder / "compressed" / "l1-r0.5-raw.safetensors", tmp_path / "third", "methods=[lamp]")
    assert [step.stage for step in history(load(next((third / "compressed").iterdir()))[0])] == [
        "fold",
        "repair",
        "l1",
        "lamp",
        "repair",
    ]


def test_a_compressed_file_of_another_model_is_refused_by_its_name(trained, tmp_path):
    kept = compress(trained / "last.ckpt", tmp_path / "first", "methods=[fold]", "stages=[raw]") / "compressed"
    kept = kept / "fold-r0.5-raw.safetensors"
    of = {
        "model=resnet20": r"is a compressed resnet18 of {'width': 4, .*}, not a resnet20; choose model=resnet18",
        "model.width=8": r"and this ResNet has .*; load it into resnet18 of {'width': 4, ",
    }
    for override, message in of.items():
        given = [o for o in DIGITS if not (o.startswith("model") and override.startswith("model="))]
        with pytest.raises(UserError, match=message) as caught:
            run(composed_compress(f"checkpoint={kept}", *given, *FEW, f"paths.runs={tmp_path / 'second'}", override))
        assert "\n" not in str(caught.value)


def test_a_tuned_stage_that_is_kept_is_no_run_that_made_its_network_smaller(trained, tmp_path, capsys):
    folder = compress(trained / "last.ckpt", tmp_path, "stages=[raw,tuned]", "profile.runtimes=[]")
    assert (folder / "compressed" / "fold-r0.5-tuned.safetensors").exists()
    shown = capsys.readouterr().out
    assert "Dense accuracy" in shown
    assert "while it trained" not in shown


def test_an_export_that_fails_costs_a_warning(trained, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such operation")

    monkeypatch.setitem(scripts.compress.EXPORTS, "program", (".pt2", broken))
    with pytest.warns(RuntimeWarning, match=r"fold at ratio 0\.5 \(repaired\) cannot be exported: .*no such operation"):
        folder = compress(trained / "last.ckpt", tmp_path, "export=[program]", "profile.runtimes=[]")
    assert set(read(folder / "rows.parquet")["status"]) == {"ok"}
    assert len(list((folder / "compressed").iterdir())) == 1
    assert not (folder / "speed.parquet").exists()


def test_each_size_is_timed_once(trained, tmp_path):
    times = ["ratios=[0.25,0.5]", "profile.batch_sizes=[1,3]"]
    speeds = read_speeds([compress(trained / "last.ckpt", tmp_path, *times) / "speed.parquet"])
    assert list(speeds.select("method", "ratio", "runtime", "batch_size").iter_rows()) == [
        (method, ratio, "eager", size)
        for method, ratio in (("dense", 0.0), ("fold", 0.25), ("fold", 0.5))
        for size in (1, 3)
    ]
    assert set(speeds["reason"]) == {""}
    assert speeds["params"].is_sorted(descending=True)
    assert (speeds["median"] > 0).all()


def test_many_are_not_timed_and_none_is_kept_unless_asked_for(trained, tmp_path):
    config = composed_compress(f"checkpoint={trained / 'last.ckpt'}", *DIGITS, *FEW, f"paths.runs={tmp_path}")
    folder = run(config, sweeping=True)
    assert sorted(path.name for path in folder.iterdir() if path.suffix) == ["cell.json", "config.yaml", "rows.parquet"]
    plan = [Entry(DENSE, 0.0, "raw")] + [Entry(m, 0.5, s) for m in ("fold", "l1") for s in ("raw", "repaired")]
    assert wanted(True, plan, sweeping=True) == set(plan[1:])
    assert wanted(None, plan, sweeping=False) == {Entry("fold", 0.5, "repaired")}
    assert wanted(None, plan[:1], sweeping=False) == set(), "the network has nothing for any of the stages"
    assert wanted(None, plan, sweeping=True) == wanted(False, plan, sweeping=False) == set()


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
    """Unpickling an object of this class runs code."""


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
    with pytest.raises(UserError, match="no file matches"):
        expanded(["checkpoints=/nowhere/**/*.pt"])


def test_the_studys_file_names_say_the_recipe():
    name = "x/2025-06-07_17-27-38_dataset=cifar10_opt=adam_lr=0.1_batch_size=128_sam=False_rand_aug=True.pth"
    assert settings_in(name) == {
        "dataset": "cifar10", "opt": "adam", "lr": "0.1", "batch_size": "128", "sam": "False", "rand_aug": "True"
    }  # fmt: skip
    assert settings_in("resnet20-12fca82f.th") == {}


def test_a_folder_of_checkpoints(trained, tmp_path, monkeypatch, capsys):
    """Many files in one command: one is broken, one was done before, and names hold signs that Hydra reads."""
    state = read_state(trained / "last.ckpt")
    (tmp_path / "nets").mkdir()
    for name in ("a_lr=0.1_wd=0.0.pt", "b_lr=0.2_wd=0.0.pt"):
        torch.save({**state, "net.linear.bias": torch.randn(10)}, tmp_path / "nets" / name)
    for name in ("broken.pt", "copied.pt"):  # same content: one cell, two files for the user to find
        (tmp_path / "nets" / name).write_bytes(b"half a file")
    command = [sys.executable, "-m", "scripts.compress", f"checkpoints={tmp_path / 'nets'}/**/*.pt", *DIGITS, *FEW]
    done = subprocess.run([*command, f"paths.runs={tmp_path / 'runs'}"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "2 of 4 done, 2 failed" in done.stdout, done.stdout + done.stderr
    for name, reason in zip(("broken.pt", "copied.pt"), done.stdout.split("\nfailed: ")[1:], strict=True):
        assert f"{name} is damaged or no checkpoint" in reason
    folders = sorted((tmp_path / "runs").glob("compress-*"))
    records = {folder: read_record(folder) for folder in folders}
    assert sorted(record["config"]["named"].get("lr", "") for record in records.values()) == ["", "0.1", "0.2"]
    (broken,) = [folder for folder, record in records.items() if record["state"] == "failed"]
    (row,) = read(broken / "rows.parquet").to_dicts()
    assert (row["status"], row["method"], row["cell"]) == ("failed", "dense", broken.name)
    assert "is damaged or no checkpoint" in row["reason"]
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "runs")])
    report()
    shown = capsys.readouterr().out
    assert "1 cell ended with: " in shown
    assert row["reason"][:40] in shown
    assert "2 done, 1 failed" in shown
    again = subprocess.run([*command, f"paths.runs={tmp_path / 'runs'}"], capture_output=True, text=True, timeout=240)
    assert "2 of 4 done (2 before)" in again.stdout


def tiny(model: str, folder: Path, *overrides: str) -> dict:
    """The config of `model` with a tiny network, on pictures of 32x32 in a folder laid out like ImageNet."""
    config = composed_compress(f"model={model}", "data=imagenet", f"data.root={folder}", *FEW[:2], *overrides)
    config["profile"]["runtimes"], config["compression"]["repair_size"] = [], 8
    return shrunk(config, {})


@pytest.mark.parametrize("model", ["vit_b32", "clip_vit_b32", "clip_vit_b32_zero_shot"])
def test_imagenets_networks_on_pictures_of_their_kind(model, cifar_folder, tmp_path):
    """Pictures are prepared as the library says, attention is compressed, norms are tuned; LayerNorm has no repair."""
    config = tiny(model, cifar_folder, "stages=[raw,repaired,norm_tuned]", f"paths.runs={tmp_path / 'runs'}")
    everything = {"method": "fold", "parts": ["hidden", "residual", "width"]}
    config["compression"]["methods"] = {"mlp": {"method": "fold"}, "all": everything}
    config["checkpoint"] = str(tmp_path / "net_lr=0.1.pt")
    built = build_model(classes=10, channels=3, **without_weights(config["model"]))
    torch.save(built.state_dict(), config["checkpoint"])
    folder = run(config)
    rows = read(folder / "rows.parquet")
    assert set(rows["status"]) == {"ok"}, set(rows["reason"])
    assert [(r["method"], r["stage"]) for r in rows.to_dicts()] == [
        ("dense", "raw"), ("mlp", "raw"), ("mlp", "norm_tuned"), ("all", "raw"), ("all", "norm_tuned")
    ]  # fmt: skip
    dense, mlp, _, most, _ = rows["params"]
    assert dense > mlp > most
    smaller, manifest = load(folder / "compressed" / "mlp-r0.5-norm_tuned.safetensors")
    assert sum(p.numel() for p in smaller.parameters()) == mlp
    mean = manifest["about"]["pictures"]["mean"]
    assert mean == pytest.approx([0.5] * 3 if model == "vit_b32" else [0.48145466, 0.4578275, 0.40821073])


def test_a_folder_of_hugging_face_is_weights_and_architecture(cifar_folder, tmp_path):
    folder = write_huggingface_vit(tmp_path / "vit", classes=10)
    config = tiny(
        "huggingface", cifar_folder, f"checkpoint={folder}", "stages=[raw]", f"paths.runs={tmp_path / 'runs'}"
    )
    rows = read(run(config) / "rows.parquet")
    assert set(rows["status"]) == {"ok"}, set(rows["reason"])
    assert set(rows["model"]) == {"vit"}
    cell = cell_of(config)
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "vit")
    same = tiny("huggingface", cifar_folder, f"checkpoint={moved}", "stages=[raw]", f"paths.runs={tmp_path / 'runs'}")
    assert cell_of(same) == cell
    assert is_checkpoint(str(moved))
    assert not is_checkpoint(str(tmp_path))


def test_a_model_with_weights_of_its_own_needs_no_checkpoint(cifar_folder, tmp_path):
    folder = write_huggingface_vit(tmp_path / "vit", classes=10)
    with pytest.raises(UserError, match=r"model 'resnet18' has no trained weights; give them as checkpoint=FILE"):
        run(composed_compress(*DIGITS, f"paths.runs={tmp_path}"))
    config = tiny("huggingface", cifar_folder, f"model.architecture={folder}", "stages=[raw]", "checkpoint=null",
                  f"paths.runs={tmp_path / 'runs'}")  # fmt: skip
    given = tiny("huggingface", cifar_folder, f"checkpoint={folder}", "stages=[raw]", f"paths.runs={tmp_path / 'runs'}")
    first, second = (read(run(c) / "rows.parquet") for c in (config, given))
    assert first["loss"].to_list() == second["loss"].to_list()


def test_pictures_are_made_ready_as_the_library_says_unless_told_otherwise(cifar_npz):
    own = [0.5, 0.4, 0.3]
    for model, overrides, mean in (
        (["model=torchvision", "model.architecture=resnet18"], [], [0.485, 0.456, 0.406]),
        (["model=torchvision", "model.architecture=resnet18"], [f"data.mean={own}", f"data.std={own}"], own),
        (["model=resnet18"], [], None),  # our own network: mean and std come from the pictures
    ):
        data = build_data(
            composed_compress(*model, "data=cifar10", f"data.root={cifar_npz}", "data.val_fraction=0.2", *overrides)
        )
        expected = mean or load_cifar10(cifar_npz).mean
        assert data.test_data.mean == pytest.approx(expected)
    grey = build_data(composed_compress("model=timm", "data=digits"))
    assert len(grey.test_data.mean) == 1, "timm fits its first layer to grey pictures, and has no mean for them"
    named = data_options(
        composed_compress("model=vit_b32", "data=imagenet", "data.root=x", "data.preprocessing=resnet50")
    )
    assert (named["usual"], named["size"]) == (None, None)


def test_short_names_and_file_names_on_the_command_line(tmp_path):
    for name in ("a.pt", "b,c=1.pt"):
        (tmp_path / name).write_bytes(b"")
    assert expanded(["methods=[fold]", "ratios=[0.5]", "data=digits", "methods", "checkpoint=null"]) == [
        "compression.methods=[fold]", "compression.ratios=[0.5]", "data=digits", "methods", "checkpoint=null"
    ]  # fmt: skip
    assert expanded([f"checkpoints={tmp_path}/*.pt"]) == ["-m", f"checkpoint='{tmp_path}/a.pt','{tmp_path}/b,c=1.pt'"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["profile.runtimes=[fast]"], "unknown runtime 'fast'.*choose from: compiled, eager, onnx"),
        (["profile.runtimes=eager"], r"profile\.runtimes must be a list, such as \[eager\]"),
        (["profile.batch_sizes=[0]"], "batch size 0 must be at least 1"),
        (["+profile.warmup=3"], "profile has no option 'warmup'"),
        (["export=[onxn]"], "unknown export 'onxn'.*choose from: huggingface, onnx, openvino, program"),
        (["export=[program]", "save=false"], r"export= writes .* that are kept, and none are kept; add save=true"),
        (["parts=[hiden]"], "unknown part 'hiden'.*choose from: head, hidden, residual, width"),
        (["parts=[width,head]"], "parts can hold 'width' or 'head', not both"),
        (["parts=hidden"], r"parts must be a list, such as \[hidden\]"),
        (["device=cuda:99"], r"device 'cuda:99' is not there"),
        (["device=gpu"], r"device 'gpu' is not there"),
        (["stages=['tune(on=self)']"], "on=self trains on texts, and the task is classification"),
        (["methods=['l1+data+size=99999']"], "size=99999 asks for more samples than repair_size="),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(overrides, message, trained, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        compress(trained / "last.ckpt", tmp_path / "runs", *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists(), "nothing was started"


def test_workers_of_joblib_take_the_gpus_in_turn(monkeypatch):
    assert chosen_device("auto") == torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, index in {"MainProcess": 0, "LokyProcess-1": 1, "LokyProcess-2": 0, "LokyProcess-13": 1}.items():
        monkeypatch.setattr(multiprocessing.current_process(), "name", name)
        assert chosen_device("auto") == torch.device("cuda", index)


def test_every_config_of_compress_is_whole():
    config = composed_compress("checkpoint=x.pt")
    assert set(config) >= {"model", "data", "compression", "paths", "seed", "device"}
    assert (CONFIGS / "compress.yaml").exists()
