"""W&B runs against a server of the tests' own, and what happens where there is none."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import wandb
from wandb_server import served

from pipeline.cells import ADDRESS
from pipeline.loggers import Label, check_login, close, definition, wandb_logger
from pipeline.results import Row, table
from pipeline.tables import UserError

LABEL = Label("toy lr=0.1", "toy-recipe", "train", ("toy", "sam"), "a toy: python -m scripts.train")
ABOUT = {"model": "toy", "data": "digits", "seed": 0, "step": 1, "metric": "acc", "split": "test", "stage": "raw"}
FACTS = {"calibration": "none", "sizes": "uniform", "statistics": "none"}


def rows() -> pl.DataFrame:
    def row(method: str, kind: str, ratio: float, acc: float) -> Row:
        return Row("toy-1", **ABOUT, **FACTS, epoch=1, method=method, kind=kind, ratio=ratio, acc=acc)

    return table(
        [
            row("dense", "dense", 0.0, 0.9),
            *(row("fold", "fold", ratio, 0.9 - ratio) for ratio in (0.3, 0.5)),
            *(row("l1", "prune", ratio, 0.8 - ratio) for ratio in (0.3, 0.5)),
        ]
    )


def log(folder: Path, **options) -> Path:
    """Log a small run, with a file to upload; returns its folder."""
    folder.mkdir()
    (folder / "compressed").mkdir()
    (folder / "compressed/fold-r0.5-raw.safetensors").write_bytes(b"weights")
    logger = wandb_logger(folder, "toy-1", {"optim": {"lr": 0.1}}, LABEL, **options)
    for epoch, acc in enumerate((0.5, 0.8, 0.7)):
        logger.log_metrics({"val/acc": acc, "val/loss": 1 - acc, "foldability/fold_raw": acc, "epoch": epoch}, epoch)
    logger.log_rows(rows(), "test")
    close([logger])
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    with served(tmp_path / "wandb", monkeypatch) as server:
        yield server


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """Nobody is logged in, and W&B's files are in a folder of the test's own."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    yield
    wandb.teardown()


def has_the_run(server) -> None:
    """The run arrived whole: its label, curves, summaries and tables."""
    assert server.unknown == []
    run = server.runs["toy-1"]
    assert (run["displayName"], run["groupName"], run["jobType"]) == (LABEL.name, LABEL.group, LABEL.job_type)
    assert (run["notes"], set(run["tags"])) == (LABEL.notes, set(LABEL.tags))
    curve = [line for line in run["history"] if "curve_test/ratio" in line]
    assert [line["curve_test/ratio"] for line in curve] == [0.0, 0.3, 0.5]
    assert [line["curve_test/fold/acc_raw"] for line in curve] == pytest.approx([0.9, 0.6, 0.4])
    assert not any("trainer/global_step" in line for line in curve), "the ratio is their only axis"
    summary = run["summary"]
    assert summary["val/acc"] == {"max": 0.8, "last": 0.7}
    assert summary["val/loss"] == pytest.approx({"min": 0.2, "last": 0.3})
    assert summary["foldability/fold_raw"] == 0.7
    assert not any(name.startswith("curve") for name in summary), "the value at the largest ratio sums nothing up"
    assert summary["compress/rows"]["nrows"] == len(rows())
    assert summary["tables_test/l1"]["nrows"] == 2


def test_an_online_run_arrives_whole(server, tmp_path) -> None:
    log(tmp_path / "run", mode="online")
    assert (tmp_path / "run" / ADDRESS).read_text().startswith("http")
    has_the_run(server)
    assert {sent["artifactTypeName"] for sent in server.artifacts} == {"run_table"}, "networks stay where they are"


def test_an_offline_run_that_is_synced_arrives_whole(server, tmp_path, capfd) -> None:
    folder = log(tmp_path / "run", mode="offline")
    assert "".join(capfd.readouterr()) == ""
    assert not (folder / ADDRESS).exists()
    assert not server.runs
    (recorded,) = folder.glob("wandb/offline-run-*")
    tool = Path(sys.executable).with_name("wandb")
    done = subprocess.run([tool, "sync", recorded], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    has_the_run(server)


def test_smaller_networks_are_uploaded_on_demand(server, tmp_path) -> None:
    log(tmp_path / "run", mode="online", artifacts=True)
    (sent,) = (sent for sent in server.artifacts if sent["artifactTypeName"] == "compressed")
    assert sent["artifactCollectionName"] == "toy-1-compressed"
    assert b"weights" in server.files.values()


def test_an_explicit_wish_to_be_online_is_refused_without_a_login(nobody, tmp_path) -> None:
    for mode in ("auto", "offline", "disabled"):
        check_login(mode)
    with pytest.raises(UserError, match=r"wandb\.mode=online needs a login.*WANDB_API_KEY.*wandb\.mode=auto"):
        wandb_logger(tmp_path, "toy-1", {}, LABEL, mode="online")
    assert not list(tmp_path.glob("wandb"))


def test_auto_logs_offline_without_a_login(nobody, tmp_path) -> None:
    folder = log(tmp_path / "run")
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_a_key_that_cannot_be_one_is_refused(nobody, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match=r"WANDB_API_KEY invalid.*wandb\.mode=disabled") as caught:
        check_login("online")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    {
        "val/perplexity": {"step_metric": "epoch", "summary": "min,last"},
        "val/token_acc": {"step_metric": "epoch", "summary": "max,last"},
        "compress_val1/fold/r0.5/acc_raw": {"step_metric": "epoch"},
        "curve/ratio": {"hidden": True, "summary": "none"},
        "curve_test/l1/acc_raw": {"step_metric": "curve_test/ratio", "step_sync": False, "summary": "none"},
        "train/loss": {},
    }.items(),
)
def test_what_a_number_is_told_to_be(name, options) -> None:
    assert definition(name) == options
