"""Names that follow from a config: of its cell, of its recipe, of its files, and what rows call it."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.cells import flat
from pipeline.compression.checkpoint import source_of
from pipeline.data import DATASETS
from pipeline.data.module import module_of
from pipeline.models.checkpoint import weight_files
from pipeline.tables import UserError
from pipeline.tasks import USUAL
from scripts.config import Config, under, without

# Settings that are younger than cells that people have, with the values at which they change nothing: a cell's name
# leaves them out there.
AT_REST: dict[str, tuple[Any, ...]] = {
    "task.name": (None,),
    "compile": (False,),
    "optim.decay": ("all",),
    "checkpoint_prefix": (None,),
    "compression.sharpness": (None, False),
    "compression.corruptions": (None,),
    "shrink.every_n_batches": (None,),
    "shrink.pace": ("geometric",),
    "shrink.layers": (None,),
    "shrink.rewind_to": (0,),
}

# Settings that say where a cell runs and what it shows, which leaves its results alone, so its name leaves them out.
# Chains run behind a training or on a checkpoint, and their stages have names of their own.
WHERE = (
    "paths wandb device named save_every_n_steps data.root data.workers data.download data.cache trainer.accelerator "
    "trainer.enable_progress_bar trainer.enable_model_summary trainer.log_every_n_steps chain chains teachers"
).split()

# Parts of a training that are off unless their switch is set.
SWITCHES = {"shrink": "method", "distil": "teacher"}


def recipe_of(config: Config) -> str:
    """Name that the cells of one recipe share, which is their config without the seed."""
    return cell_of(without(config, "seed"))


def cell_of(config: Config) -> str:
    """Name of the run, with a hash of every setting that changes its results: those of WHERE do not."""
    where = [*WHERE, *["profile"] * ("trainer" in config)]  # a training times the networks of its chains alone
    what = {key: value for key, value in flat(config).items() if not under(key, where)}
    source = DATASETS.get(config["data"]["name"])
    usual = {**AT_REST, "task.name": (None, source and USUAL[module_of(config["data"]["name"]).kind])}
    what = {key: value for key, value in what.items() if value not in usual.get(key, ())}
    if source and source.root_names_data:
        what["data.root"] = Path(config["data"]["root"]).name
    if config["checkpoint"] is not None:
        what["checkpoint"] = file_hash(config["checkpoint"])
    for part, switch in SWITCHES.items():
        chosen = config.get(part, {}).get(switch)
        if chosen is None:  # settings of a part that is off change nothing
            what = {key: value for key, value in what.items() if not under(key, [part])}
        elif switch == "teacher":
            what[f"{part}.{switch}"] = teacher_hash(chosen, config)
    architecture = Path(str(config["model"].get("architecture", "")))
    if architecture.name and architecture.is_dir():  # a folder of Hugging Face is the same wherever it lies
        what["model.architecture"] = architecture.name
    if architecture.suffix == ".gguf" and architecture.is_file():
        what["model.architecture"] = file_hash(str(architecture))
    # 1 and 1.0 are the same learning rate
    what = {key: float(value) if isinstance(value, int) else value for key, value in what.items()}
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return f"{config['name']}-{digest[:10]}"


def file_hash(path: str) -> str:
    """SHA-256 of a checkpoint's content: of the file, or of the weight files of a folder, wherever they lie."""
    try:
        digests = [_digest(file, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(path)]
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror}); check its permissions") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def teacher_hash(name: str, config: Config) -> str:
    """What a teacher is: one of `teachers`, or the file of this name. UserError for a file that is not there."""
    told = teacher_told(name, config)
    path = told.get("checkpoint")
    return ("" if path is None else file_hash(path)) + json.dumps(told.get("model"), sort_keys=True)


def teacher_told(name: str, config: Config) -> Config:
    """{"checkpoint", "model"} of a teacher, each where it is said."""
    told = (config["teachers"] or {}).get(name, {"checkpoint": name})
    if not isinstance(told, Mapping) or not set(told) <= {"checkpoint", "model"}:
        raise UserError(f"teachers.{name} must be {{checkpoint: FILE, model: {{name: ...}}}}, got {told!r}")
    return dict(told)


@lru_cache(16)  # one cell needs it several times, and hashing a large file takes a second
def _digest(file: Path, size: int, changed: int) -> str:
    return source_of(file)["sha256"]


def row_context(config: Config, cell: str) -> dict[str, Any]:
    """The fields of a Row that the config decides."""
    model = config["model"]
    name = model.get("architecture", model["name"])
    name = Path(name).name if Path(name).exists() else name
    return {"cell": cell, "model": name, "data": config["data"]["name"], "seed": config["seed"]}
