"""W&B loggers that never ask for a key and whose failures never end a run."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from pipeline.cells import ADDRESS
from pipeline.metrics import METRICS
from pipeline.study.logged import RATIO, ROWS_TABLE, curve_numbers, method_tables
from pipeline.tables import UserError, first_line

WANDB_MODES = ("auto", "online", "offline", "disabled")
KEPT = "compressed"  # folder of a run that holds its smaller networks; also their type in W&B


@dataclass(frozen=True)
class Label:
    """How people find a run in W&B.

    name: shown in place of the run's id; group: shared by the runs that differ in their seed alone; tags: to filter by;
    notes: one line, what the run is
    """

    name: str
    group: str | None = None
    job_type: str | None = None
    tags: tuple[str, ...] = ()
    notes: str = ""


class GuardedWandbLogger(WandbLogger):
    """A WandbLogger whose failures (server gone, disk full) become one warning: the run's folder has the rows, too.

    upload: a folder that becomes an artifact of the run when the run ends; None: none does
    """

    def __init__(self, upload: Path | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.upload, self._defined = upload, set[str]()
        self._wandb_init.pop("anonymous", None)  # Lightning always passes this option on, and W&B warns that it is gone

    def _guarded(self, method: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:
            if not getattr(self, "_has_warned", False):
                self._has_warned = True
                text = f"W&B did not take what was logged ({first_line(error)}); training goes on"
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._guarded(self._define, metrics)
        self._guarded(super().log_metrics, metrics, step)

    @rank_zero_only
    def _define(self, names: Iterable[str]) -> None:
        """Tell W&B the axis and the summary of names that are new, each by itself.

        Where several patterns match a name, and Lightning defines "*", wandb 0.31 takes any of them by chance.
        """
        for name in set(names) - self._defined:
            self._defined.add(name)
            if options := definition(name):
                self.experiment.define_metric(name, **options)

    def log_hyperparams(self, params: Any) -> None:
        self._guarded(super().log_hyperparams, params)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        self._guarded(super().log_table, *args, **kwargs)

    def log_rows(self, rows: pl.DataFrame, split: str) -> None:
        """Log a table of all rows, and of this split ("val" or "test") a table a method and curves over the ratio."""
        own = rows.filter(pl.col("split").str.replace("/.*", "") == split)
        tables = {ROWS_TABLE: rows, **method_tables(own)}
        for name, table in tables.items():
            self.log_table(name, columns=table.columns, data=[list(row) for row in table.iter_rows()])
        for numbers in curve_numbers(own):
            self.log_metrics(numbers)

    def finalize(self, status: str) -> None:
        self._guarded(super().finalize, status)

    def finish(self) -> None:
        if self.upload is not None and any(self.upload.rglob("*.safetensors")):
            self._guarded(self._upload)
        self._guarded(self.experiment.finish)

    @rank_zero_only
    def _upload(self) -> None:
        artifact = wandb.Artifact(f"{self.experiment.id}-{KEPT}", type=KEPT)
        artifact.add_dir(str(self.upload))
        self.experiment.log_artifact(artifact)


def wandb_logger(
    folder: Path,
    run: str,
    config: Mapping[str, Any],
    label: Label,
    mode: str = "auto",
    project: str = "foldability",
    entity: str | None = None,
    artifacts: bool = False,
) -> WandbLogger | None:
    """A logger into `folder`. run: the id of the W&B run, so that a resumed run goes on where it was.

    mode: online, offline, disabled, or auto: online for those who are logged in, else offline
    entity: account or team; None: the user's default. artifacts: upload the smaller networks that the run keeps

    Raises UserError where mode is "online" and there is no login or no server: an explicit wish does not fall back.
    """
    chosen = mode
    if mode == "auto":
        chosen = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    if chosen == "disabled":
        return None
    check_login(mode)
    settings = wandb.Settings(silent=True, console="off", mode=chosen, init_timeout=30)
    make = {"save_dir": folder, "config": dict(config), "settings": settings, "upload": folder / KEPT}
    make |= {"name": label.name, "tags": list(label.tags), "notes": label.notes, "job_type": label.job_type}
    if not artifacts:
        make["upload"] = None
    if "WANDB_SWEEP_ID" not in os.environ:  # an agent of a W&B sweep sets id and project of its runs itself
        make |= {"project": project, "entity": entity, "id": run, "group": label.group, "resume": "allow"}
    logger = GuardedWandbLogger(**make)
    try:
        _ = logger.experiment  # starts the run
    except Exception as error:
        if mode == "online":
            text = f"W&B cannot be reached ({first_line(error)}); wandb.mode=auto would log offline"
            raise UserError(text) from error
        text = f"W&B cannot be reached ({first_line(error)}); this run logs offline"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        settings.mode = "offline"
        logger = GuardedWandbLogger(**make)
        _ = logger.experiment
    if logger.experiment.offline is False:  # an offline run has no address, and on other processes there is no run
        (folder / ADDRESS).write_text(f"{logger.experiment.url}\n")
    return logger


def definition(name: str) -> dict[str, Any]:
    """Options of W&B's define_metric for a number: curves run over the ratio, what an epoch measured over epochs.

    A curve has no summary, which would be its value at the largest ratio. What the trainer itself validates also keeps
    its best value, as val/acc.max beside val/acc.last. W&B keeps the last value of everything else under its plain
    name, which a monitor or a W&B sweep can give: foldability/fold_raw.
    """
    first, _, last = name.partition("/")
    part = first.partition("_")[0]
    if part == "curve":
        own = name == f"{first}/{RATIO}"
        axis = {"hidden": True} if own else {"step_metric": f"{first}/{RATIO}", "step_sync": False}
        return {**axis, "summary": "none"}
    if first == "val" and last in METRICS:
        return {"step_metric": "epoch", "summary": "max,last" if METRICS[last].higher_is_better else "min,last"}
    return {"step_metric": "epoch"} if part in ("compress", "foldability") else {}


def logged_in() -> bool:
    """Is there a key for W&B, of `wandb login` or in WANDB_API_KEY? Nobody is asked, no server is called."""
    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise UserError(f"{first_line(error)}; run `wandb login`, or log nowhere with wandb.mode=disabled") from error


def check_login(mode: str) -> None:
    """UserError where `mode` is "online" and nobody is logged in."""
    if mode == "online" and not logged_in():
        raise UserError(
            "wandb.mode=online needs a login, and there is none; run `wandb login` or set WANDB_API_KEY, or take "
            "wandb.mode=auto, which logs offline without one"
        )


def close(loggers: Iterable[Logger]) -> None:
    """End W&B runs, which Lightning leaves open, so that the next run of this process gets one of its own."""
    for logger in loggers:
        if isinstance(logger, GuardedWandbLogger):
            logger.finish()
