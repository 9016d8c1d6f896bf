"""The command line, checked before Hydra sees it: a mistake is answered in one line, in the words of the configs."""

import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

import configs
from pipeline.tables import UserError, first_line, pick

FOLDER = Path(configs.__file__).parent
REFUSED = 2  # exit code where nothing was done, because the input was wrong
# Settings that hold a path, whose text may hold anything; other text with signs in it is put in quotes by the user.
PATHS = ("checkpoint", "data.root", "data.cache", "data.tokenizer", "model.architecture", "paths.runs")
CHAINS = "chains"  # a setting that holds a table or a list
SWEEPS = ("-m", "--multirun")


def refuse(error: UserError) -> NoReturn:
    """End the program with the error in one line."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(REFUSED)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def checked(arguments: Sequence[str], config: str) -> list[str]:
    """The arguments of a script as Hydra takes them, paths in quotes. config: name of its primary config.

    UserError for the first argument that names no setting or no row of a group, or whose value cannot be read.
    """
    flags = [a for a in arguments if a.startswith("-")]
    several_paths = bool(set(SWEEPS) & set(flags))
    given = [a if several_paths else with_quoted_path(a) for a in arguments if not a.startswith("-")]
    overrides = [parsed(a) for a in given]
    several: dict[str, Override] = {}
    for override in overrides:
        key = override.key_or_group
        if key in several and not several[key].is_delete():
            raise UserError(f"{key} is given twice: {several[key].input_line} and {override.input_line}; keep one")
        several[key] = override
    chosen = [choice for override in overrides if (choice := choice_of(override))]
    known = composed(config, tuple(chosen))
    sweeping = bool(set(SWEEPS) & set(flags)) or any(c.startswith("sweep=") for c in chosen)
    deleted = {override.key_or_group for override in overrides if override.is_delete()}
    for override in overrides:
        if override.is_delete() or override.key_or_group not in deleted:
            check_key(override, known)
        if override.is_sweep_override() and not sweeping:
            key, _, value = (override.input_line or "").partition("=")
            raise UserError(f"{key}={value} has several values: a list is {key}=[{value}]; a sweep over them needs -m")
    # Several chains take the place of those of an experiment, with which Hydra would merge them, or would not.
    merged = OmegaConf.is_dict(known.get(CHAINS))
    replaced = {a: [f"~{CHAINS}", f"+{a}"] for a in given if merged and a.startswith(f"{CHAINS}=")}
    return [*flags, *(one for a in given for one in replaced.get(a, [a]))]


def parsed(argument: str) -> Override:
    key, equals, value = argument.partition("=")
    if not equals and not argument.startswith("~"):
        raise UserError(f"{argument!r} is no setting; write NAME=VALUE, such as optim.lr=0.1 (--help lists them)")
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        text = f"{key}={value} cannot be read ({first_line(error)})"
        raise UserError(f"{text}; put a value with such signs in quotes: {key}=\"'...'\"") from error


def with_quoted_path(argument: str) -> str:
    """The argument; the value of a setting of PATHS in quotes, so that it may hold spaces, "=" and commas."""
    key, equals, value = argument.partition("=")
    plain = not re.fullmatch(r"null|'.*'|\".*\"|[\w./-]*", value, re.ASCII)
    return f"{key}={quoted(value)}" if equals and key in PATHS and plain else argument


def quoted(text: str) -> str:
    """The text in quotes: Hydra would else read a name such as "lr=0.1,wd=0.pt" as settings."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@cache
def groups() -> dict[str, dict[str, Path]]:
    """{group: {name: its file}} of the configs."""
    folders = sorted(path for path in FOLDER.iterdir() if path.is_dir() and any(path.glob("*.yaml")))
    return {path.name: {file.stem: file for file in sorted(path.glob("*.yaml"))} for path in folders}


def choice_of(override: Override) -> str:
    """ "model=resnet18" where the override chooses a row of a group (the first of several); else ""."""
    group = override.key_or_group
    if group not in groups() or override.is_delete():
        return ""
    values = values_of(override)
    for value in values:
        if value is not None:
            pick(group, groups()[group], str(value))
    return f"{group}={'null' if values[0] is None else values[0]}"


def values_of(override: Override) -> list[Any]:
    """The value, or those of a sweep."""
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


@cache
def composed(config: str, overrides: tuple[str, ...]) -> DictConfig:
    """The config with these overrides; it is shared, so nobody may change it."""
    with initialize_config_module("configs", version_base="1.3"):
        return compose(config, overrides=list(overrides))


def check_key(override: Override, config: DictConfig) -> None:
    """UserError where there is no such setting, or where a "+" adds one that nothing reads."""
    key = override.key_or_group
    if key.split("/")[0].split(".")[0] == "hydra" or choice_of(override) or key in groups():
        return
    *parents, last = key.split(".")
    within: Any = config
    for name in parents:
        within = within.get(name) if OmegaConf.is_dict(within) and name in within else None
    there = OmegaConf.is_dict(within) and last in list(within.keys())  # also where it is not set yet
    inner = within._get_node(last) if there else None
    holds = isinstance(inner, DictConfig) and inner and key != CHAINS and not override.is_delete()
    if holds and not all(isinstance(value, dict | None) for value in values_of(override)):
        of = f"{key} holds settings of its own ({', '.join(map(str, inner))})"
        raise UserError(f"{of}, got {override.input_line}; write {key}.{next(iter(inner))}=...")
    if override.is_add() and there:
        raise UserError(f"{key} is a setting already; write {key}=..., without the plus")
    if there or override.is_force_add() or (override.is_add() and parents and OmegaConf.is_dict(within)):
        return
    names = list(keys(config))
    same_end = [name for name in names if name.endswith(f".{last}")]
    near = difflib.get_close_matches(key, names, n=1) if len(same_end) != 1 else same_end
    hint = f"did you mean {near[0]}?" if near else "--help lists them"
    more = f" (+{key}=... hands on an option that the config does not list)" if parents and within is not None else ""
    raise UserError(f"unknown setting {key!r}; {hint}{more}")


def keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """The full names of all settings."""
    for name in config:
        yield f"{prefix}{name}"
        inner = None if OmegaConf.is_missing(config, name) else config._get_node(name)
        if isinstance(inner, DictConfig) and not inner._is_none():
            yield from keys(inner, f"{prefix}{name}.")
