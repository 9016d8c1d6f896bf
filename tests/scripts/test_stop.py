"""A program that is told to stop ends with its children, one line, and the exit code of the signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cells import read_record
from pipeline.tables import UserError
from scripts.stop import check_processes

SMALL = (
    "experiment=quickstart model.width=4 trainer.max_epochs=500 wandb.mode=disabled compression.every_n_epochs=0 "
    "trainer.enable_progress_bar=false"
).split()


def started(runs: Path, *more: str) -> tuple[subprocess.Popen, Path]:
    """A training that has begun, and the folder of its cell."""
    command = [sys.executable, "-m", "scripts.train", *SMALL, f"paths.runs={runs}", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        for checkpoint in runs.glob("quickstart-*/last.ckpt"):
            return process, checkpoint.parent
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no checkpoint after a minute")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_training_with_its_code_one_line_and_a_record(number, code, tmp_path):
    process, folder = started(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.strip().splitlines()[-1] == f"stopped by {number.name}; the same command goes on where it was"
    assert "Traceback" not in said
    assert read_record(folder)["state"] == "interrupted"


@pytest.mark.skipif(sys.platform != "linux" or (os.cpu_count() or 1) < 2, reason="needs Linux and two cores")
def test_children_end_with_their_parent_however_it_ends(tmp_path):
    process, _ = started(tmp_path, "trainer.devices=2", "trainer.accelerator=cpu")
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    trainers = [pid for pid in children if b"scripts.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert trainers
    process.kill()
    process.communicate()
    for _ in range(100):
        left = [pid for pid in trainers if Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid)]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"{left} outlive their parent")


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize("devices", [99, "99", list(range(99))])
def test_more_processes_than_cores_are_refused(devices):
    with pytest.raises(UserError, match=r"trainer.devices 99 are more processes than the \d+ cores there are; take"):
        check_processes("cpu", devices, gpus=8)
    with pytest.raises(UserError, match=r"trainer\.devices 99 are more processes than the 8 GPUs there are; take"):
        check_processes("auto", devices, gpus=8)
    check_processes("cpu", "auto", gpus=0)


@pytest.mark.parametrize("devices", ["0,4", [4]])
def test_a_gpu_that_is_not_there_is_refused(devices):
    with pytest.raises(UserError, match="there is no GPU 4; they are 0 to 3"):
        check_processes("gpu", devices, gpus=4)
    with pytest.raises(UserError, match=r"trainer\.accelerator gpu: torch finds no GPU here"):
        check_processes("gpu", devices, gpus=0)
    for fine in (4, "4", "0,3", "3,", [0, 3], -1, "auto", "-1"):
        check_processes("gpu", fine, gpus=4)
