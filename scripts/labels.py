"""How a run is called in W&B: a name and tags for people, a group for statistics, a note that says how to repeat it."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from pipeline.loggers import Label
from pipeline.study.sweep import short

CHOSEN = ("experiment", "sweep", "launcher")  # groups of configs whose choice the run's own name tells
LONGEST, LONGEST_TAG = 128, 64  # characters that W&B takes


def label_of(
    config: dict[str, Any], group: str, beside: Sequence[str], overrides: Sequence[str] | None = None
) -> Label:
    """The label of a training run.

    group: what runs share that differ in their seed alone; beside: settings that say where a run goes, which no name
    needs; overrides: of the command line, None: those of the running Hydra job, where there is one
    """
    words = job_overrides() if overrides is None else list(overrides)
    return Label(
        name=name_of(config["name"], words, beside),
        group=group,
        job_type="train",
        tags=tags_of(config),
        notes=f"{story(config)}: {shlex.join(['python', '-m', 'scripts.train', *words])}",
    )


def job_overrides() -> list[str]:
    """What the command line, or the sweep, sets for this job: ["experiment=quickstart", "optim.lr=0.1"]."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def name_of(experiment: str, overrides: Sequence[str], beside: Sequence[str]) -> str:
    """ "quickstart lr=0.1 rho=0.05": the experiment, and the settings by which the run differs from it."""
    told = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.get_key_element().lstrip("+~")
        if not any(f"{key}.".startswith(f"{name}.") for name in (*CHOSEN, *beside, "hydra", "name")):
            told[key] = re.sub(r"""["' ]""", "", str(override.get_value_element_as_str()))
    names = short(list(told))
    parts = [told[key] if key in ("model", "data", "optim") else f"{names[key]}={told[key]}" for key in told]
    return " ".join([experiment, *parts])[:LONGEST]


def tags_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Model, data and optimizer, and each part of the recipe that is on: sam, l1, l2, ema, shrink, distil, ..."""
    optim, data = config["optim"], config["data"]
    on = {
        "sam": optim["sam"]["rho"],
        **{name: optim[name] for name in ("l1", "l2", "ema")},
        "shrink": config["shrink"]["method"],
        "distil": config["distil"]["teacher"],
        **{name: data.get(name) for name in ("mixup", "cutmix")},
    }
    tags = [
        config["name"],
        model_of(config),
        data["name"],
        optim["name"],
        *(name for name, value in on.items() if value),
    ]
    return tuple(dict.fromkeys(str(tag)[:LONGEST_TAG] for tag in tags))


def model_of(config: dict[str, Any]) -> str:
    """The architecture of a library's model, else the model's name; a folder or file by its own name."""
    return Path(str(config["model"].get("architecture") or config["model"]["name"])).name


def story(config: dict[str, Any]) -> str:
    """ "resnet18 on digits, 8 epochs of sgd, seed 0; fold, l1 at 9 ratios" """
    compression, epochs = config["compression"], config["trainer"]["max_epochs"]
    trained = f"{model_of(config)} on {config['data']['name']}, {epochs} epochs of {config['optim']['name']}"
    methods = ", ".join(compression["methods"])
    return f"{trained}, seed {config['seed']}; {methods} at {len(compression['ratios'])} ratios"
