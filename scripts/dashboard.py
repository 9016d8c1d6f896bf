"""A W&B workspace for every kind of model and a report of all, made of what the runs measured.

python -m scripts.dashboard --print                        # the panels as JSON, for the defaults of scripts.train
python -m scripts.dashboard --runs runs --save             # for the runs in this folder; needs `wandb login`
python -m scripts.dashboard experiment=llama_tiny --save   # for runs that are still to come

Words without dashes are settings of scripts.train; they say what runs will measure where no folder of runs does.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import wandb
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Transformer
from omegaconf import DictConfig, OmegaConf

import configs
from pipeline.data.module import module_of
from pipeline.loggers import logged_in
from pipeline.models import READS
from pipeline.results import SCHEMA, facts_of_label
from pipeline.study import dashboard
from pipeline.study.dashboard import Family, families, methods_and_sides, spans_decades
from pipeline.study.sweep import load
from pipeline.tables import UserError, first_line, pick
from pipeline.tasks import METRICS, TASKS, USUAL
from scripts.arguments import checked, composed, refuse, warn


def main() -> None:
    try:
        run(arguments())
    except UserError as error:
        refuse(error)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="settings of runs that are still to come")
    parser.add_argument("--runs", type=Path, help="folder that holds the cells: paths.runs of the sweep")
    parser.add_argument("--project", help="W&B project, else that of the configs")
    parser.add_argument("--entity", help="W&B account or team, else that of the login")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--print", action="store_true", help="show workspaces and report as JSON; needs no login")
    what.add_argument("--save", action="store_true", help="save them to W&B and print their addresses")
    return parser.parse_intermixed_args(words)


def run(args: argparse.Namespace) -> None:
    if args.runs is not None and args.overrides:
        raise UserError(f"{args.overrides[0]} is for runs that are still to come; leave it or --runs out")
    config = composed("train", tuple(checked(args.overrides, "train")))
    found = families(load(args.runs, tuple(SCHEMA), warn)) if args.runs is not None else [planned(config)]
    project = args.project or config.wandb.project
    if args.print:
        print(json.dumps(specs(found, project, args.entity or ""), indent=1))
    else:
        for name, address in saved(found, project, args.entity or config.wandb.entity).items():
            print(f"{name}: {address}")


def planned(config: DictConfig) -> Family:
    """The family of runs that are still to come: what a config measures, and the settings that the sweeps vary."""
    labels = list(config.compression.methods)
    facts = [
        {"cell": "", "method": label, "stage": stage, **facts_of_label(label, stage)}
        for stage in config.compression.stages
        for label in labels
    ]
    kind = module_of(config.data.name).kind
    task = pick("task", TASKS, config.task.name or USUAL[kind])(**dict.fromkeys(READS[kind], 2))
    methods, sides = methods_and_sides(pl.DataFrame(facts, schema_overrides={"scope": pl.String}))
    watched = bool(config.compression.every_n_epochs)
    return Family("", METRICS[task.metrics[0]], methods, sides, settings=swept(config), watched=watched)


def swept(config: DictConfig) -> dict[str, bool]:
    """{setting that a sweep of configs/sweep varies and that this config has: is its axis logarithmic?}"""
    values: dict[str, list[Any]] = {}
    for path in sorted((Path(configs.__file__).parent / "sweep").glob("*.yaml")):
        params = OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params") or {}
        for override in OverridesParser.create().parse_overrides([f"{name}={told}" for name, told in params.items()]):
            choices = override.sweep_iterator(Transformer.identity) if override.is_sweep_override() else []
            values.setdefault(override.get_key_element(), []).extend(choices)
    there: dict[str, list[Any]] = {}
    for name, found in values.items():
        chosen = OmegaConf.select(config, name)
        if chosen is not None:  # of a whole group, such as model, the name is what differs
            there[f"{name}.name" if OmegaConf.is_dict(chosen) else name] = found
    return {name: spans_decades(found) for name, found in there.items() if dashboard.is_axis(name)}


def specs(found: Sequence[Family], project: str, entity: str) -> dict[str, Any]:
    """Workspaces and report as W&B stores them. No server is asked, so the report's runs name no entity."""
    views = [view._to_model() for view in dashboard.workspaces(found, project, entity)]
    page = dashboard.report(found, project)._to_model()
    how = {"mode": "json", "by_alias": True, "exclude_none": True}
    return {
        "workspaces": {view.display_name: view.spec.model_dump(**how) for view in views},
        "report": {page.display_name: page.spec.model_dump(**how)},
    }


def saved(found: Sequence[Family], project: str, entity: str | None) -> dict[str, str]:
    """{name: address} of what was saved. Exits with REFUSED where nobody is logged in."""
    if not logged_in():
        refuse(UserError("--save needs a login to W&B; run `wandb login` or set WANDB_API_KEY"))
    try:
        owner = entity or wandb.Api().default_entity
        page = dashboard.report(found, project, owner)
        views = dashboard.workspaces(found, project, owner)
        page.save()  # first: it looks the project up
        return {view.name: view.save().url for view in views} | {page.title: page.url}
    except ValueError as error:
        if "not found" not in str(error):
            raise
        raise UserError(
            f"W&B has no project {owner}/{project} yet; log a run there first (wandb.mode=online, or `wandb sync`)"
        ) from error
    except wandb.errors.Error as error:
        raise UserError(f"W&B did not take the dashboard ({first_line(error)}); is {owner}/{project} yours?") from error


if __name__ == "__main__":
    main()
