"""What benchmarks.trained writes of a network, and that a run which is cut off goes on."""

import polars as pl
import pytest
import torch

from benchmarks import trained
from benchmarks.trained import Subject, data_of, measure, recipe_of, subjects
from pipeline.models import build_model
from pipeline.tables import UserError


@pytest.fixture
def subject(tmp_path):
    torch.manual_seed(0)
    torch.save(build_model("resnet9", 10, 3, width=4).state_dict(), tmp_path / "net.pt")
    return Subject("net", tmp_path / "net.pt", {"name": "resnet9", "width": 4}, {})


@pytest.fixture
def few(monkeypatch):
    """Few methods, at half of the channels alone."""
    monkeypatch.setattr(trained, "RECIPES", ["fold", "mix+data"])
    monkeypatch.setattr(trained, "BASELINES", {"channel pruning": trained.BASELINES["channel pruning"]})
    monkeypatch.setattr(trained, "FEWER", {})
    monkeypatch.setattr(trained, "DRAWN", ["fold+grail"])


@pytest.mark.usefixtures("few")
def test_every_line_says_what_was_seen_and_a_second_run_adds_only_what_is_missing(subject, cifar_npz, tmp_path):
    data, out = data_of(subject, cifar_npz), tmp_path / "lines.parquet"
    measure(subject, data, [], out)
    lines = pl.read_parquet(out)
    told = {
        (method, stage): (pictures, follow)
        for method, stage, pictures, follow in lines.select("method", "stage", "pictures", "statistics").iter_rows()
    }
    assert told == {
        ("fold", "raw"): ("none", "none"),
        ("fold", "repaired"): ("none", "data"),
        ("fold", "reset"): ("none", "data"),
        ("mix+data", "raw"): ("data", "data"),
        ("mix+data", "repaired"): ("data", "data"),
        ("mix+data", "reset"): ("data", "data"),
        ("channel pruning", "raw"): ("data", "none"),
        ("channel pruning", "repaired"): ("data", "data"),
    }
    assert set(lines["n"]) == {20}
    measure(subject, data, [1], out)
    more = pl.read_parquet(out)
    assert more.head(len(lines)).equals(lines)
    assert set(more.tail(2)["method"]) == {"fold+grail"}
    assert set(more.tail(2)["draw"]) == {1}


def test_recipes_are_told_by_what_differs():
    usual = {
        "optim.name": "sgd",
        "optim.weight_decay": 5e-4,
        "optim.sam.rho": 0.0,
        "optim.l1": 0.0,
        "data.augment": "[]",
    }
    assert recipe_of(usual) == "sgd"
    assert recipe_of(usual | {"optim.weight_decay": 0.0, "optim.sam.rho": 0.05}) == "sgd, no decay, SAM 0.05"
    assert recipe_of(usual | {"data.augment": '["rand_augment"]', "optim.l1": 1e-5}) == "sgd, L1 1e-05, RandAugment"
    assert recipe_of({}) == "published"


def test_a_file_needs_its_network(subject):
    with pytest.raises(UserError, match=r"net.pt does not say what network it is; give --model, such as resnet20"):
        list(subjects(subject.checkpoint, None))
