"""README and the guide are true: every command is parsed and, in the slow tests, run; code, links and paths hold."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from pipeline.models import build_model
from pipeline.tables import UserError, pick
from scripts import cli
from scripts.arguments import SWEEPS, checked, groups
from scripts.chain import chains_in, quoted_chains
from scripts.compress import completed, expanded
from scripts.config import Config, resolved

ROOT = Path(__file__).parents[1]
TOLD = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
LINKED = [ROOT / "CHANGELOG.md", *TOLD, *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Settings that make a command small; they stand in for what the command says of them.
TINY = {
    "trainer.max_epochs": "1",
    "+trainer.limit_train_batches": "2",
    "+trainer.limit_val_batches": "1",
    "trainer.enable_progress_bar": "false",
    "trainer.accelerator": "cpu",
    "compression.repair_size": "8",
    "compression.ratios": "[0.5]",
    "wandb.mode": "disabled",
}
MODELS = {"width": "4"}  # of networks that have a width
SMALL = {"train": TINY, "compress": {"compression.repair_size": "8", "profile.seconds": "0.01", "ratios": "[0.5]"}}
# Commands that the slow tests run, by a part of their text, and settings that make them small beside those of SMALL.
RUN: dict[str, dict[str, str]] = {
    "experiment=quickstart": {"model.width": "4", "data.test_size": "20"},
    "experiment=fold_distil_quantize": {"model.width": "4", "data.test_size": "20"},
    "shrink.steps=10": {
        "data.root": "cifar10.npz", "model.width": "4", "trainer.max_epochs": "2", "shrink.after": "0",
        "shrink.steps": "2", "shrink.every_n_epochs": "1",
    },
    "shrink.steps=20": {
        "data.root": "cifar10.npz", "model.width": "4", "shrink.steps": "2", "shrink.every_n_batches": "1",
    },
    "experiment=cifar10_resnet18 shrink": {"data.root": "cifar10.npz", "model.width": "4", "shrink.after": "0"},
    "experiment=cifar10_resnet18": {"data.root": "cifar10.npz", "model.width": "4"},
    "data=folder": {"data.batch_size": "2", "data.val_fraction": "0.5", "paths.runs": "runs"},
    "checkpoint=resnet20.th": {},
    "checkpoint=net.pt": {"model.width": "4"},
    "checkpoint=distilled.ckpt": {"model.width": "4"},
    "checkpoints='nets": {"model.width": "4", "data.root": "cifar10.npz", "launcher": "local"},
    "experiment=llama_tiny": {
        "model.hidden": "16", "model.ffn": "24", "model.layers": "2", "model.heads": "4", "model.kv_heads": "2",
        "data.context": "16", "data.test_size": "8", "data.eval_batch_size": "4", "data.cache": "cache",
        "+trainer.limit_train_batches": "2", "compression.methods": "[fold,l1]",
    },
    "foldability report --compare": {},
    "foldability report": {},
    "foldability dashboard --runs runs --print": {},
    "foldability certify": {},
    "foldability features": {},
    "foldability train --help": {},
    "eval ": {},
}  # fmt: skip
# Exit codes of commands that may end with others than 0: of weights that nobody trained, a pruning may have the smaller
# parameter error in some group, which certify says with 1.
ENDS = {"certify": {0, 1}}
# Commands that are parsed and composed, and not run, by a part of their text: why.
LEFT = {
    "make ": "the CI runs make test and make check; make run trains the quickstart, which is run above",
    "pip install": "installs packages",
    "wandb sweep": "needs a server",
    "foldability dashboard --runs runs --save": "needs a login; tests/study/test_dashboard.py has a server",
    "sweep=": "hundreds of cells; tests/scripts/test_sweep.py runs their configs on small data",
    "data.root=stories.txt": "tests/scripts/test_language_scripts.py trains on a text file",
    "checkpoint=SmolLM2": "needs its weights; tests/scripts/test_language_scripts.py compresses a small folder",
    "source .venv": "activates an environment",
}


def blocks(page: Path, *languages: str) -> list[tuple[str, bool]]:
    """(text, whether it is marked as runnable) of the blocks of code in these languages."""
    found = re.findall(
        rf"(<!-- runnable -->\n)?```(?:{'|'.join(languages)})\n(.*?)^```$", page.read_text(), re.S | re.M
    )
    return [(text, bool(mark)) for mark, text in found]


def commands() -> list[str]:
    """All commands of the pages, each once, without comments."""
    lines = [
        re.sub(r"\s+#\s.*$", "", line).strip()
        for page in TOLD
        for text, _ in blocks(page, "sh", "bash")
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


COMMANDS = commands()


def small_of(command: str) -> dict[str, str] | None:
    """What makes a command small; None where it is not run."""
    plain = re.sub(r"\s+", " ", command)
    if any(part in plain for part in LEFT):
        return None
    return next((small for part, small in RUN.items() if part in plain), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the files that the commands name, all of them small."""
    root = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    shapes = {"train": 200, "test": 20}  # a validation part of every class
    arrays = {f"x_{part}": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for part, n in shapes.items()}
    np.savez(root / "cifar10.npz", **arrays, **{f"y_{part}": np.arange(n) % 10 for part, n in shapes.items()})
    for part in ("train", "test"):
        for name in ("rose", "tulip"):
            (root / "flowers" / part / name).mkdir(parents=True)
            for i in range(4):
                picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
                picture.save(root / "flowers" / part / name / f"{i}.png")
    (root / "benchmarks").symlink_to(ROOT / "benchmarks")
    torch.manual_seed(0)
    (root / "nets" / "a").mkdir(parents=True)
    weights = build_model("resnet18", classes=10, channels=3, width=4).state_dict()
    for file in ("net.pt", "nets/a/net.pt"):
        torch.save(weights, root / file)
    torch.save(build_model("resnet18", classes=10, channels=3).state_dict(), root / "large.pt")
    torch.save({"state_dict": {f"student.{name}": tensor for name, tensor in weights.items()}}, root / "distilled.ckpt")
    torch.save(build_model("resnet20", classes=10, channels=3).state_dict(), root / "resnet20.th")
    return root


def settings(word: str, arguments: list[str]) -> Config:
    """The config that the first cell of a command runs with, here: launchers of extras may not be installed."""
    GlobalHydra.instance().clear()
    for launcher in (a.removeprefix("launcher=") for a in arguments if a.startswith("launcher=")):
        pick("launcher", groups()["launcher"], launcher)
    arguments = [a for a in arguments if not a.startswith("launcher=")]
    taken = checked(quoted_chains(arguments) if word == "train" else expanded(arguments), word)
    parsed = OverridesParser.create().parse_overrides([a for a in taken if a not in SWEEPS])
    with initialize_config_module("configs", version_base="1.3"):
        config = compose(word, overrides=list(BasicSweeper.split_arguments(parsed, None)[0][0]))
    return resolved(config if word == "train" else completed(config))


def check_foldability(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = words
    if cli.COMMANDS[name].config and not set(arguments) & set(cli.HELP):
        chains_in(settings(name, arguments))
    elif not cli.COMMANDS[name].config:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        import_module(f"scripts.{name}").arguments()


def check_make(words: list[str], _: object) -> None:
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M), words


def check_python(words: list[str], _: object) -> None:
    assert words[0] == "-m"
    assert find_spec(words[1]) is not None, words


def check_pip(words: list[str], _: object) -> None:
    extras = re.findall(r"\[(.*)\]", words[-1])
    assert words[0] == "install"
    assert set(",".join(extras).split(",")) - {""} <= set(PROJECT["optional-dependencies"]), words


def check_wandb(words: list[str], _: object) -> None:
    assert words[0] == "sweep"
    assert (ROOT / words[1]).is_file(), words


def check_eval(words: list[str], _: object) -> None:
    assert words == ["$(foldability completion)"]


CHECKS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "foldability": check_foldability,
    "make": check_make,
    "python": check_python,
    "pip": check_pip,
    "wandb": check_wandb,
    "eval": check_eval,
}


def test_the_pages_have_commands():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, place, monkeypatch):
    monkeypatch.chdir(place)
    program, *words = shlex.split(command)
    CHECKS[program](words, monkeypatch)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_run_or_left_for_a_reason(command):
    left = [part for part in LEFT if part in command]
    assert left or small_of(command) is not None, f"add {command!r} to RUN or to LEFT"


@pytest.mark.parametrize("part", [*RUN, *LEFT])
def test_every_row_is_of_a_command(part):
    assert any(part in re.sub(r"\s+", " ", command) for command in [*COMMANDS, "source .venv/bin/activate"])


def test_a_setting_that_is_no_more_fails():
    with pytest.raises(UserError, match=r"unknown setting 'optim.learning_rate'"):
        settings("train", ["experiment=quickstart", "optim.learning_rate=0.1"])


def made_small(command: str, small: dict[str, str]) -> list[str]:
    """The words of a command, with small settings in the place of those that it has under these names."""
    program, *words = shlex.split(command)
    if program == "eval":
        return ["completion"]
    if not cli.COMMANDS[words[0]].config or set(words) & set(cli.HELP):
        return words
    short = {name: f"compression.{name}" for name in ("ratios",)}
    given = {name: value for name, _, value in (word.partition("=") for word in words)}
    chosen = {**SMALL[words[0]], **small}
    if "chain" in given or "chains" in given:
        chosen.pop("ratios", None)
    taken = set(chosen) | {short.get(name, name) for name in chosen}
    kept = [word for word in words if word.partition("=")[0] not in taken]
    return [*kept, *(f"{name}={value}" for name, value in chosen.items())]


def ran(root: Path, words: list[str]) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", "scripts.cli", *words], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode in ENDS.get(words[0], {0}), f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def used(place) -> Path:
    """The folder, with a run and a compressed file in it."""
    ran(place, made_small("foldability train experiment=quickstart", RUN["experiment=quickstart"]))
    ran(place, made_small("foldability compress checkpoint=net.pt model=resnet18 data.root=cifar10.npz methods=[fold]",
                          {"model.width": "4", "compression.stages": "[raw]"}))  # fmt: skip
    (file,) = place.glob("runs/compress-*/compressed/fold-r0.5-raw.safetensors")
    (place / file.name).write_bytes(file.read_bytes())
    sides(place / "runs")
    return place


def sides(runs: Path) -> None:
    """The two runs that one page compares: one network without and one with SAM."""
    for name, rho in (("plain", "0"), ("sam", "0.05")):
        small = {**RUN["experiment=quickstart"], "optim.sam.rho": rho, "paths.runs": f"runs/{name}"}
        ran(runs.parent, made_small("foldability train experiment=quickstart", small))


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if small_of(command) is not None])
def test_every_command_runs(command, used):
    assert ran(used, made_small(command, small_of(command))).strip()


PYTHON = [
    (f"{page.name}-{number}", text, runnable)
    for page in TOLD
    for number, (text, runnable) in enumerate(blocks(page, "python"), 1)
]


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, text, _ in PYTHON])
def test_python_compiles_and_imports_what_there_is(name, text):
    compile(text, name, "exec")
    for module, names in re.findall(r"^from ((?:pipeline|callbacks)[\w.]*) import (.*)$", text, re.M):
        there = import_module(module)
        assert all(hasattr(there, part.strip()) for part in names.split(","))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), [(name, text) for name, text, runnable in PYTHON if runnable])
def test_runnable_python_runs(name, text, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{name}: {done.stderr}"


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in slugs(target), f"{page.name}: {link} is no heading of {target.name}"


NAMED = re.compile(r"`((?:docs|configs|tests|pipeline|callbacks|scripts|benchmarks|\.ci)/[\w./-]*)`")


@pytest.mark.parametrize("page", TOLD, ids=lambda page: page.name)
def test_every_path_that_is_named_exists(page):
    for path in NAMED.findall(prose(page)):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_site_names_every_page_of_the_guide():
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in [*(ROOT / "docs" / "guide").glob("*.md"), *(ROOT / "docs" / "reference").glob("*.md")]:
        assert f"{page.parent.name}/{page.name}" in nav
