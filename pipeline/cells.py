"""A cell of a sweep on disk: one folder that says what it runs and how far it is, safe against kills and rivals."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from filelock import FileLock, Timeout

from pipeline.tables import UserError, first_line

# interrupted: a signal stopped it; broken: begun, and its process is gone
STATES = ("done", "running", "interrupted", "failed", "broken")
RECORD = "cell.json"
LOCK = ".lock"
ADDRESS = "wandb.url"  # the run's page in W&B, one line


class Busy(UserError):
    """Another process works on this cell."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the cell for this process. The system releases it when the process dies, however it dies.

    Raises Busy where another process holds the cell. A shared file system needs a working flock (NFS 4, Lustre mounted
    with flock).
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=1)  # another process may hold it for an instant, in `is_held`
    except Timeout:
        raise Busy(f"{folder.name} is being run by another process; wait for it or choose other paths.runs") from None
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Does a process hold the cell?"""
    if not (folder / LOCK).exists():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:  # another user's file, which may not be locked: believe the record
        return True
    lock.release()
    return False


def write_record(folder: Path, config: Mapping[str, Any], state: str, reason: str = "", seconds: float = 0.0) -> None:
    """Write how far the cell is. The file is replaced whole, so that a kill never leaves half of it.

    state: "running" (which reads as "broken" once nobody holds the cell), "done", "interrupted" or "failed"
    seconds: of work so far
    """
    record = {"state": state, "reason": reason, "seconds": round(seconds, 3), "config": config}
    part = folder / f"{RECORD}.part"
    part.write_text(json.dumps(record, indent=1))
    os.replace(part, folder / RECORD)


def read_record(folder: Path) -> dict[str, Any] | None:
    """{"state", "reason", "seconds", "config"} of a cell; None where there is none. UserError when it is damaged."""
    path = os.path.join(folder, RECORD)
    try:
        with open(path, "rb") as file:
            record = json.loads(file.read())
        record = {key: record[key] for key in ("state", "reason", "seconds")} | {"config": dict(record["config"])}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); delete the folder to run the cell again") from error
    if record["state"] == "running" and not is_held(folder):
        record["state"] = "broken"
    return record


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 0.1}} -> {"optim.lr": 0.1}, the names that the command line uses. Lists become text."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        elif isinstance(value, list):
            found[f"{prefix}{key}"] = json.dumps(value)
        else:
            found[f"{prefix}{key}"] = value
    return found


def cells(runs: Path) -> list[Path]:
    """The folders of all cells under `runs`, by name."""
    try:
        with os.scandir(runs) as entries:
            return [Path(p) for p in sorted(e.path for e in entries) if os.path.exists(f"{p}/{RECORD}")]
    except OSError as error:
        raise UserError(f"{runs} is not a folder of runs ({error.strerror}); give that of paths.runs") from error


def settings(runs: Path) -> pl.DataFrame:
    """One line per cell: cell, state, reason, seconds, and a column for every setting of any cell ("optim.lr")."""
    return as_table(filter(None, map(line, cells(runs))))


def line(folder: Path) -> dict[str, Any] | None:
    """cell, state, reason, seconds and every setting of a cell; None where there is none.

    A cell whose record is damaged is "broken", and the reason says why.
    """
    try:
        record = read_record(folder)
    except UserError as error:
        return {"cell": folder.name, "state": "broken", "reason": str(error), "seconds": 0.0}
    if record is None:
        return None
    settings = flat(record.pop("config"))
    return {"cell": folder.name, **record, **settings}


def as_table(lines: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """The lines of cells as one table; a setting that a cell does not have is null."""
    lines = list(lines)
    names = dict.fromkeys(["cell", "state", "reason", "seconds", *(name for one in lines for name in one)])
    return pl.DataFrame([_column(name, [one.get(name) for one in lines]) for name in names])


_COLUMNS = {
    frozenset({bool}): pl.Boolean,
    frozenset({int}): pl.Int64,
    frozenset({float}): pl.Float64,
    frozenset({int, float}): pl.Float64,
}


def _column(name: str, values: list[Any]) -> pl.Series:
    """Numbers stay numbers; values of several kinds (precision: 32 here, 32-true there) become text."""
    kinds = frozenset(map(type, values)) - {type(None)}
    if kinds == {int, float}:
        values = [None if value is None else float(value) for value in values]
    elif len(kinds) > 1:
        values = [None if value is None else str(value) for value in values]
    return pl.Series(name, values, dtype=_COLUMNS.get(kinds, pl.String))
