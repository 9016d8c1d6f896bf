"""Shows the progress of a sweep in the process that launches it: a live line, and every cell that ends or fails.

It reads the files of the cells, so it works the same whether this process, joblib, Ray or SLURM runs them.
"""

import importlib.util
import json
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from callbacks.progress import duration
from pipeline.cells import read_record
from pipeline.tables import UserError

JOB = "job.json"
LAUNCHERS = {"joblib": "hydra_joblib_launcher", "ray": "hydra_ray_launcher", "slurm": "hydra_submitit_launcher"}
PAUSE = 2.0  # seconds between two looks at the files
SILENCE = 60.0  # seconds between two lines where no terminal can rewrite one


def check_launcher(arguments: list[str]) -> None:
    """UserError, with the command that installs it, for a launcher that is missing, before Hydra looks for it."""
    for argument in arguments:
        name = argument.removeprefix("launcher=")
        plugin = LAUNCHERS.get(name)
        if argument != name and plugin and not is_installed(plugin):
            raise UserError(f"launcher {name!r} is not installed; pip install 'foldability[{name}]'")


def is_installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # no plugin at all is there
        return False


def write_job(cell: str, skipped: bool = False, reason: str = "") -> None:
    """Note in the folder of this sweep job which cell it runs, whether it was skipped, and why it failed."""
    hydra = HydraConfig.get()
    path = Path(hydra.runtime.output_dir) / JOB
    old = json.loads(path.read_text()) if path.exists() else {}
    job = {"cell": cell or old.get("cell", ""), "skipped": skipped, "reason": reason}
    job["overrides"] = list(hydra.overrides.task)
    path.write_text(json.dumps(job))


class Progress(Callback):
    """Hydra's callback of the launching process."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # launchers send the callback to their workers, where it has nothing to do

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.folder, self.runs = Path(config.hydra.sweep.dir).absolute(), Path(config.paths.runs).absolute()
        self.total, self.swept = grid(config)
        self.ended: dict[str, dict[str, Any]] = {}
        self._drawn, self._width = 0.0, 0
        # joblib replaces workers whose memory has grown, as pictures in memory make it grow; nothing is lost by that.
        warnings.filterwarnings("ignore", ".*worker stopped while some jobs.*")
        print(f"{self.total} cells; their folders are in {self.runs}", flush=True)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        jobs = self._look()
        # One line for each job: ten files with the same content are one cell, and the user needs all names.
        failed = [(job["cell"] or f"job {n}", job["reason"]) for n, job in jobs.items() if job["state"] == "failed"]
        self._say(f"{line(jobs, self.total)}.  foldability report {self.runs}")
        for cell, reason in failed:
            print(f"failed: {cell}: {reason}")
        if failed:
            print("The same command runs the failed cells again, trainings from their last epoch.", flush=True)
            sys.exit(1)

    def _watch(self) -> None:
        while not self._stop.wait(PAUSE):
            jobs = self._look()
            text = line(jobs, self.total)
            if sys.stdout.isatty():
                print(f"\r{text:<{self._width}}", end="", flush=True)
                self._width = len(text)
            elif time.monotonic() - self._drawn > SILENCE:
                print(text, flush=True)
                self._drawn = time.monotonic()

    def _look(self) -> dict[str, dict[str, Any]]:
        """{job number: cell, state, reason, seconds, overrides}; prints a line for every job that has ended."""
        jobs = dict(self.ended)
        for path in sorted(self.folder.glob(f"*/{JOB}"), key=lambda path: int(path.parent.name)):
            number = path.parent.name
            if number in jobs:
                continue
            try:
                job = json.loads(path.read_text())
                record = read_record(self.runs / job["cell"]) if job["cell"] else None
            except (ValueError, UserError):  # being written this moment
                continue
            jobs[number] = {**{"state": "running", "seconds": 0.0}, **job}
            if record is not None:
                jobs[number].update(state=record["state"], seconds=record["seconds"], reason=record["reason"])
            if job["reason"]:
                jobs[number].update(state="failed", reason=job["reason"])
            if jobs[number]["state"] in ("done", "failed"):
                self.ended[number] = jobs[number]
                if not job["skipped"]:
                    self._say(f"[{len(self.ended)}/{self.total}] {story(jobs[number], self.swept)}")
        return jobs

    def _say(self, text: str) -> None:
        """Print a line that stays, in place of the live one."""
        print(f"\r{text:<{self._width}}" if self._width else text, flush=True)
        self._width = 0


def grid(config: DictConfig) -> tuple[int, list[str]]:
    """How many jobs Hydra's sweeper will make, and the names of what differs between them."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
    last = {override.get_key_element(): override for override in overrides}
    swept = [key for key, override in last.items() if override.is_sweep_override()]
    return sum(map(len, BasicSweeper.split_arguments(overrides, None))), swept


def line(jobs: dict[str, dict[str, Any]], total: int) -> str:
    """done / running / failed / left, and the time that the rest will take at the pace so far."""
    states = Counter(job["state"] for job in jobs.values())
    skipped = sum(job["skipped"] for job in jobs.values())
    left = total - len(jobs)
    text = f"{states['done']} of {total} done" + (f" ({skipped} before)" if skipped else "")
    text += "".join(
        f", {states[state]} {state}" for state in ("running", "interrupted", "broken", "failed") if states[state]
    )
    text += f", {left} left" if left else ""
    spent = [job["seconds"] for job in jobs.values() if job["state"] == "done" and not job["skipped"]]
    if spent and (left or states["running"]):
        rest = (left + states["running"] / 2) * sum(spent) / len(spent) / max(1, states["running"])
        text += f"; about {duration(rest)} to go"
    return text


def story(job: dict[str, Any], swept: list[str]) -> str:
    what = f"done in {duration(job['seconds'])}" if job["state"] == "done" else f"failed: {job['reason']}"
    choice = [text for text in job["overrides"] if text.split("=")[0] in swept]
    return f"{job['cell']} {what}  {' '.join(choice)}"
