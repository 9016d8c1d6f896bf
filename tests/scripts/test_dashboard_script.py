"""The command that makes dashboards: every name in them is one that real runs logged."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from composing import TINY, composed
from wandb_server import ME, served

from pipeline.tables import UserError
from scripts.arguments import REFUSED
from scripts.arguments import composed as plan
from scripts.dashboard import arguments, planned, run
from scripts.labels import name_of, tags_of
from scripts.naming import recipe_of
from scripts.train import run as train

pytest.importorskip("wandb_workspaces")
# wandb-workspaces 0.4.13 warns about its own code when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """(server, folder): two runs that a server has, which differ in learning rate and seed."""
    folder = tmp_path_factory.mktemp("online")
    with pytest.MonkeyPatch.context() as patch, served(folder / "wandb", patch) as server:
        tiny = [word for word in TINY if not word.startswith("wandb")]
        for words in (["optim.lr=0.1", "seed=1"], ["optim.lr=0.01"]):
            to = ["wandb.mode=online", f"paths.runs={folder / 'runs'}"]
            train(composed("experiment=quickstart", *tiny, *words, *to), sweeping=True)
        yield server, folder / "runs"


def asked_for(spec: Any) -> Iterator[str]:
    """Every name of a number, a table or a setting that the panels and the list of runs give."""
    if isinstance(spec, list):
        for part in spec:
            yield from asked_for(part)
    elif isinstance(spec, dict):
        for key, value in spec.items():
            if key in ("metrics", "columnOrder"):
                yield from value
            elif key in ("xAxis", "yAxis", "accessor", "targetKey", "groupBy") and isinstance(value, str):
                yield value
            elif key == "key" and isinstance(value, dict) and value.get("val"):  # of a table
                yield value["val"]
            elif key == "key" and isinstance(value, dict) and "section" in value:  # of a filter or an order
                yield f"{value['section']}:{value['name']}"
            else:
                yield from asked_for(value)


def has(server, name: str) -> bool:
    """Does every run have this number or setting?"""
    return all(name in known(run) for run in server.runs.values())


def known(run: dict) -> set[str]:
    """The names of a run as panels give them: history as it is, the summary and the config behind their section."""

    def paths(value: Any, before: str = "") -> Iterator[str]:
        yield before
        for key, part in value.items() if isinstance(value, dict) else ():
            yield from paths(part, f"{before}.{key}" if before else key)

    config = set(paths(json.loads(run["config"])))
    names = {name for line in run["history"] for name in line}
    told = {f"summary:{name}" for name in run["summary"]} | {f"config:{name}" for name in config}
    return names | set(run["summary"]) | told | config | {"run:displayName", "run:group", "group", "_step"}


def test_every_name_in_what_is_saved_is_one_that_the_runs_logged(online, capsys) -> None:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    server, runs = online
    run(arguments(["--runs", str(runs), "--save"]))
    addresses = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines())
    (view,) = (address for name, address in addresses.items() if "resnet18" in name)
    (page,) = (address for name, address in addresses.items() if "resnet18" not in name)
    view, page = ws.Workspace.from_url(view), wr.Report.from_url(page)
    assert [section.name for section in view.sections][:3] == [
        "What is left, over the ratio",
        "Folding against pruning",
        "Settings",
    ]
    for kept in (view._to_model(), page._to_model()):
        names = set(asked_for(kept.spec.model_dump(mode="json", by_alias=True, exclude_none=True)))
        assert {"config:optim.value.lr", "curve_test/ratio", "summary:foldability_test/folding_repaired"} <= names
        assert "tables_test/fold" in names
        assert [name for name in sorted(names) if not has(server, name)] == []
    assert server.unknown == []


def test_what_is_planned_names_what_such_a_run_logs(online, capsys) -> None:
    server, _ = online
    run(arguments(["experiment=quickstart", "compression.methods=[fold,l1]", "--print"]))
    spec = json.loads(capsys.readouterr().out)
    assert [name for name in sorted(set(asked_for(spec))) if not has(server, name)] == []


def test_runs_that_differ_in_their_seed_alone_are_one_group(online) -> None:
    server, _ = online
    groups = {run["displayName"]: run["groupName"] for run in server.runs.values()}
    assert len(server.runs) == len(set(run["groupName"] for run in server.runs.values())) == 2, groups
    one, other = (composed("experiment=quickstart", f"seed={seed}") for seed in (0, 1))
    assert recipe_of(one) == recipe_of(other) != recipe_of(composed("experiment=quickstart", "optim.lr=1"))


def test_a_plan_follows_the_config() -> None:
    family = planned(
        plan(
            "train",
            (
                "compression.methods=[fold,l1,mix+data]",
                "compression.every_n_epochs=0",
            ),
        )
    )
    assert family.methods == dict.fromkeys(("raw", "repaired"), ("fold", "l1", "mix+data"))
    assert set(family.sides["raw"]) == {"fold", "prune"}
    assert family.settings["optim.lr"], "learning rates of the sweeps span decades"
    assert not family.watched
    assert planned(plan("train", ("experiment=llama_tiny",))).metric.name == "perplexity"
    assert not planned(plan("train", ("compression.methods=[l1]",))).has_gap("raw")


def test_saving_needs_a_login(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("scripts.dashboard.logged_in", lambda: False)
    with pytest.raises(SystemExit) as caught:
        run(arguments(["--save"]))
    assert caught.value.code == REFUSED == 2
    assert "--save needs a login to W&B; run `wandb login`" in capsys.readouterr().err


def test_a_project_without_runs_is_refused(online) -> None:
    with pytest.raises(UserError, match=f"W&B has no project {ME}/elsewhere yet; log a run there first"):
        run(arguments(["--save", "--project", "elsewhere"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=1", "--print"], "optim.lrr"),
        (["seed=1", "--runs", "runs", "--print"], "seed=1 is for runs that are still to come"),
        (["--runs", "/nowhere", "--print"], "/nowhere is not a folder of runs"),
    ],
)
def test_wrong_words_get_one_clear_line(words, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(arguments(words))
    assert "\n" not in str(caught.value)


def test_a_run_is_called_by_what_it_was_told() -> None:
    words = ["experiment=quickstart", "model=resnet20", "optim.lr=0.1", "+data.mixup=0.2", "data.augment=[crop, flip]"]
    beside = ["paths.runs=/somewhere", "wandb.mode=offline", "hydra.verbose=true"]
    name = name_of("quickstart", [*words, *beside], ("paths", "wandb"))
    assert name == "quickstart resnet20 lr=0.1 mixup=0.2 augment=[crop,flip]"
    assert name_of("quickstart", ["optim.sam.rho=0.05", "seed=3"], ()) == "quickstart rho=0.05 seed=3"
    assert name_of("run", [], ()) == "run"
    assert len(name_of("run", [f"model.class_names=[{'a' * 300}]"], ())) == 128


def test_tags_tell_the_parts_of_the_recipe_that_are_on() -> None:
    assert tags_of(composed("experiment=quickstart")) == ("quickstart", "resnet18", "digits", "sgd")
    config = composed("experiment=quickstart", "optim.sam.rho=0.05", "optim.l1=1e-5", "shrink.method=fold")
    assert tags_of(config)[4:] == ("sam", "l1", "shrink")


def test_the_upload_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"wandb\.artifacts=true.*keeps none; add compression\.save=true"):
        train(composed("experiment=quickstart", "wandb.artifacts=true", *TINY))


def test_a_run_that_must_be_online_is_refused_before_it_starts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.loggers.logged_in", lambda: False)
    runs = tmp_path / "runs"
    tiny = [word for word in TINY if not word.startswith("wandb")]
    with pytest.raises(UserError, match=r"wandb\.mode=online needs a login"):
        train(composed("experiment=quickstart", *tiny, "wandb.mode=online", f"paths.runs={runs}"))
    assert not Path(runs).exists()
