"""The command `foldability`: one word, then what `python -m scripts.<word>` takes.

foldability train experiment=quickstart
foldability compress --help
"""

import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.tables import UserError, pick
from scripts.arguments import FOLDER, composed, groups, keys, refuse


class Command(NamedTuple):
    """config: the primary config of a command whose arguments are settings; "": the command has its own parser."""

    what: str
    config: str = ""
    examples: tuple[str, ...] = ()


COMMANDS = {
    "train": Command(
        "Train a network, and measure after every epoch what compression leaves of it.",
        "train",
        (
            "experiment=quickstart",
            "model=resnet18 data=cifar10 optim=adam optim.lr=0.001 trainer.max_epochs=50",
            "-m data=cifar10 optim.lr=0.1,0.01 optim.sam.rho=0,0.05 launcher=joblib",
            "sweep=resnet18_adam_cifar10 launcher=slurm",
            "experiment=llama_tiny data=text data.root=texts.parquet",
        ),
    ),
    "compress": Command(
        "Compress checkpoints that are there, and measure, time, keep and export what is left.",
        "compress",
        (
            "checkpoint=net.pt model=resnet18 data=cifar10 data.root=data",
            "checkpoint=net.pt methods=[mix+data,fold,l1] ratios=[0.3,0.5] stages=[raw,repaired] save=true",
            "checkpoints='nets/**/*.pt' model=resnet18 data=cifar10 launcher=joblib",
            "model=timm model.architecture=resnet50.a1_in1k model.pretrained=true data=imagenet data.root=imagenet",
            "checkpoint=SmolLM2-135M model=language_model data=text data.root=texts.parquet methods=[obs+self+params]",
        ),
    ),
    "report": Command("Say what a sweep found, on the terminal and as a page."),
    "features": Command("Describe the trained networks of a sweep by numbers that need no data, for its report."),
    "dashboard": Command("Build the workspace and the report of Weights & Biases."),
    "certify": Command("Check what a compressed file says about itself."),
}
HELP = ("-h", "--help")
GROUPS_OF = {"compress": ("model", "data", "task", "launcher")}  # others have all groups


def main(arguments: list[str] | None = None) -> Any:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in HELP:
        return print(overview())
    if arguments[0] in ("-V", "--version"):
        return print(f"foldability {version('foldability')}")
    if arguments[0] == "completion":
        return print(completion())
    try:
        command = pick("command", COMMANDS, arguments[0])
    except UserError as error:
        refuse(error)
    name, *rest = arguments
    sys.argv = [f"foldability {name}", *rest]
    if command.config and set(HELP) & set(rest):
        return print(page(name))
    module = import_module(f"scripts.{name}")
    start: Callable[..., Any] = module.start if command.config else module.main
    return start(rest) if command.config else start()


def overview() -> str:
    lines = [f"  foldability {name:10}{command.what}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Train networks that still work after they are made smaller.",
            "",
            *lines,
            "",
            "foldability COMMAND --help has the examples and the settings of a command.",
            'eval "$(foldability completion)" completes them in bash, and in zsh after bashcompinit.',
        ]
    )


def page(name: str) -> str:
    """What a command does, examples, the rows of its groups, and every setting with its default and its comment."""
    command = COMMANDS[name]
    lines = [command.what, "", "Examples", *(f"  foldability {name} {example}" for example in command.examples)]
    lines += ["", "Groups: GROUP=ROW chooses a row, GROUP.SETTING=VALUE changes a setting of it"]
    of = {group: rows for group, rows in groups().items() if group in GROUPS_OF.get(name, groups())}
    for group, rows in of.items():
        lines += [f"  {group}", *(f"    {row:32}{about(file)}".rstrip() for row, file in rows.items())]
    lines += ["", "Settings with their defaults; a list is written [a,b]"]
    for group, row in defaults(command.config).items():
        lines += [f"  # {group}={row}", f"  {group}:", *(f"    {line}" for line in settings(groups()[group][row]))]
    for file in ("base", command.config):
        lines += [f"  {line}" for line in settings(FOLDER / f"{file}.yaml")]
    return "\n".join(lines)


def completion() -> str:
    """A script for bash: the words of each command stand in it, so that pressing Tab starts no Python."""
    cases = [
        f'    {name}) words="{" ".join(words(command.config))}" ;;'
        for name, command in COMMANDS.items()
        if command.config
    ]
    return "\n".join(
        [
            "_foldability() {",
            f'  local words="{" ".join(COMMANDS)}"',
            '  [ "$COMP_CWORD" -gt 1 ] && case "${COMP_WORDS[1]}" in',
            *cases,
            '    *) words="" ;;',
            "  esac",
            '  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))',
            "}",
            "COMP_WORDBREAKS=${COMP_WORDBREAKS//=}",
            "complete -o nospace -o default -F _foldability foldability",
        ]
    )


def words(config: str) -> list[str]:
    """All arguments of a command: rows of groups, and settings with their equals sign."""
    rows = [f"{group}={row}" for group, of in groups().items() for row in of]
    return [*rows, *(f"{key}=" for key in keys(composed(config, ())) if not key.startswith("hydra"))]


def about(file: Path) -> str:
    """The first comment of a config that is no command line and no directive."""
    comments = (line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#"))
    return next((c for c in comments if not c.startswith(("@package", "python -m"))), "")


def defaults(config: str) -> dict[str, str]:
    """{group: its row} that the primary config chooses."""
    text = (FOLDER / f"{config}.yaml").read_text()
    found = dict(re.findall(r"^  - (\w+): (\w+)$", text, re.M))
    return {group: row for group, row in found.items() if row in groups().get(group, {})}


def settings(file: Path) -> Iterator[str]:
    """The lines of a config without its defaults and what is Hydra's own."""
    skipping = False
    for line in file.read_text().splitlines():
        if re.match(r"\S", line):
            skipping = line.startswith(("defaults:", "hydra:", "#", "name: "))
        if line.strip() and not skipping:
            yield line


if __name__ == "__main__":
    main()
