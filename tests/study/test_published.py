import gzip
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.results import SCHEMA
from pipeline.study.effects import pairs
from pipeline.study.intervals import half_interval
from pipeline.study.lines import Lines, lines
from pipeline.study.published import FAMILIES, extras, published
from pipeline.study.sweep import Sweep, load
from pipeline.tables import UserError

HEAD = "family,log,index,checkpoint,ratio,event,value,params\n"
RESNET = "2025-06-07_17-27-38_dataset=cifar10_arch=resnet18_opt={opt}_seed=42_lr=0.05_batch_size=128_"
RESNET += "momentum={momentum}_wd=0.0005_epochs=200_l1=1e-05_l2=0.0_sam={sam}_sam_rho=0.05_"
RESNET += "rand_aug={augment}_lr_schedule={schedule}.pth"
ADAM = RESNET.format(opt="adam", momentum="0.0", sam="False", augment="True", schedule="True")
SGD = RESNET.format(opt="sgd", momentum="0.99", sam="True", augment="False", schedule="False")
CYCLIC = "2023-01-15 14:02:36.368 dataset=cifar10 model={} epochs=200 lr_max=0.4633774 model_width=64 l2_reg=0.0 "
CYCLIC += "sam_rho=0.1 batch_size=128 frac_train=1 p_label_noise=0.0 lr_schedule=cyclic augm={} randaug={} "
CYCLIC += "seed=0 epoch=200.pth"
PREACT, VIT = CYCLIC.format("resnet18", True, True), CYCLIC.format("vit_exp", False, False)


def log(family: str, name: str, checkpoint: str, *figures: tuple[float, str, str]) -> str:
    return "".join(f"{family},{name},7,{checkpoint},{ratio},{event},{value},100\n" for ratio, event, value in figures)


def three(family: str, name: str, checkpoint: str, *figures: tuple[float, str, str]) -> str:
    """The same figures in the logs of folding and of both prunings; "@" in `name` stands for the method."""
    return "".join(log(family, name.replace("@", m), checkpoint, *figures) for m in ("fold", "mag-l1", "mag-l2"))


HALF = ((0.0, "BASE", "90.00"), (0.5, "PRUNE", "40.00"), (0.5, "REPAIR", "70.00"))
FILE = (
    HEAD
    + three("resnet18", "adam-@", ADAM, *HALF, (0.5, "FD", "3.5"), (0.5, "FINETUNE_EPOCH1", "80.00"))
    + three("resnet18", "adam-@-sharpness", ADAM, *HALF, (0.5, "SHARP_1", "0.2"))
    + three("resnet18", "sgd-@-sharpness", SGD, *HALF, (0.5, "SHARP_0", "0.1"))
    + three("preactresnet18", "@", PREACT, *HALF, (0.5, "FINETUNE_EPOCH5", "85.00"))
    + three("preactresnet18", "@-zeroshot", PREACT, (0.0, "CORR", "75.0"), (0.5, "CORR", "60.0"))
    + three("vit", "@", VIT, *HALF)
    + three("clip", "@-noe", "model_12.pt", *HALF)
    + three("clip", "@-noe", "model_3.pt", *HALF)
    + three("clip", "@-zeroshot", "model_3.pt", (0.0, "BASE_CLEAN", "90.00"), (0.5, "PRUNE_CLEAN", "40.00"))
    + three("clip", "@-zeroshot", "model_3.pt", (0.5, "CORR", "20.00"))
)
LLAMA = """model,checkpoint,weight_decay,warmup_steps,max_lr,ratio,method,perplexity
60m,llama_60m-a,0.01,880,0.001,0.0,dense,32.11
60m,llama_60m-a,0.01,880,0.001,0.2,mag,54.51
60m,llama_60m-a,0.01,880,0.001,0.2,fold,47.17
130m,llama_130m-b,0.0,1100,0.005,0.0,dense,24.0
130m,llama_130m-b,0.0,1100,0.005,0.2,mag,50.0
130m,llama_130m-b,0.0,1100,0.005,0.2,fold,40.0
"""


def written(folder: Path, text: str, name: str = "study.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def cell_of(sweep: Sweep, checkpoint: str) -> dict:
    return sweep.cells.row(by_predicate=pl.col("checkpoint") == checkpoint, named=True)


def test_file_names_become_settings_by_our_names(tmp_path: Path) -> None:
    found = published(written(tmp_path, FILE))
    adam, sgd = cell_of(found, ADAM), cell_of(found, SGD)
    assert {name: adam[f"optim.{name}"] for name in ("name", "lr", "weight_decay", "l1", "momentum", "sam.rho")} == {
        "name": "adam",
        "lr": 0.05,
        "weight_decay": 5e-4,
        "l1": 1e-5,
        "momentum": None,  # Adam has none, whatever the file name says
        "sam.rho": 0.0,  # off, although the name has a rho
    }
    assert adam["optim.schedule.name"] == "cosine"
    assert adam["data.augment"] == '["crop", "flip", "rotate", "rand_augment"]'
    assert (sgd["optim.name"], sgd["optim.momentum"], sgd["optim.sam.rho"]) == ("sgd", 0.99, 0.05)
    assert (sgd["optim.schedule.name"], sgd["data.augment"]) == ("constant", '["crop", "flip", "rotate"]')
    cyclic = cell_of(found, PREACT)
    assert (cyclic["model.name"], cyclic["optim.lr"], cyclic["optim.sam.rho"]) == ("preact_resnet18", 0.4633774, 0.1)
    assert (cyclic["optim.schedule.name"], cyclic["data.augment"]) == ("cyclic", '["crop", "flip", "rand_augment"]')
    assert cyclic["optim.name"] is None  # no file says it
    assert cell_of(found, VIT)["data.augment"] == "[]"


def test_networks_of_the_soup_are_recipes_of_their_own(tmp_path: Path) -> None:
    found = published(written(tmp_path, FILE), "clip")
    assert sorted(found.cells["soup.member"]) == [3, 12]
    assert lines(found).recipes == 2


def test_accuracies_are_fractions_in_the_columns_of_a_row(tmp_path: Path) -> None:
    found = published(written(tmp_path, FILE), "resnet18-adam").rows
    assert dict(found.schema) == SCHEMA
    values = {(row["method"], row["stage"]): row["acc"] for row in found.iter_rows(named=True)}
    assert [values["dense", "raw"], values["fold", "raw"]] == pytest.approx([0.9, 0.4])
    assert [values["l1", "repaired"], values["l2", "tuned"]] == pytest.approx([0.7, 0.8])
    assert len(values) == len(found) == 1 + 3 * 3  # the second log of the same network gives no rows
    dense = found.row(by_predicate=pl.col("method") == "dense", named=True)
    assert (dense["kind"], dense["scope"], dense["statistics"]) == ("dense", None, None)
    statistics = found.filter(pl.col("method") == "fold").select("stage", "statistics").rows()
    assert dict(statistics) == {"raw": "none", "repaired": "data", "tuned": "data"}


def test_the_repair_of_transformers_is_named_by_what_it_sees(tmp_path: Path) -> None:
    rows = published(written(tmp_path, FILE)).rows
    stages = rows.group_by("model").agg(pl.col("stage").unique().sort())
    assert dict(stages.rows()) == {
        "resnet18": ["raw", "repaired", "tuned"],
        "preact_resnet18": ["raw", "repaired", "tuned 5 epochs"],
        "simple_vit": ["norm_tuned", "raw"],
        "clip_vit_b32": ["norm_tuned", "raw"],
    }


def test_one_family_alone_has_its_cells_alone(tmp_path: Path) -> None:
    path = written(tmp_path, FILE)
    parts = {family: published(path, family) for family in FAMILIES}
    assert sum(len(part.rows) for part in parts.values()) == len(published(path).rows)
    assert all(set(part.rows["cell"]) == set(part.cells["cell"]) for part in parts.values())
    with pytest.raises(UserError, match="unknown family 'resnet'"):
        published(path, "resnet")


def test_every_figure_is_a_row_or_an_extra(tmp_path: Path) -> None:
    path = written(tmp_path, FILE)
    rows, other = published(path).rows, extras(path)
    bases = FILE.count("BASE,")
    # Each network has three BASE lines in the logs that give rows, which become one row.
    assert len(other) + len(rows.filter(pl.col("method") != "dense")) + 3 * 6 == FILE.count("\n") - 1
    assert len(other.filter(pl.col("event") == "BASE")) == bases - 3 * 6 + 3
    assert set(other["event"]) == {"BASE", "PRUNE", "REPAIR", "FD", "SHARP_0", "SHARP_1", "CORR"}


def test_extras_say_which_network_was_measured(tmp_path: Path) -> None:
    found = extras(written(tmp_path, FILE)).filter(pl.col("method") == "fold")
    stages = found.filter(pl.col("event") == "CORR").select("family", "ratio", "stage").rows()
    assert sorted(stages, key=str) == sorted(
        [("preactresnet18", 0.0, None), ("preactresnet18", 0.5, "repaired"), ("clip", 0.5, "raw")], key=str
    )
    assert found.filter(pl.col("event").str.starts_with("SHARP"))["stage"].unique().to_list() == ["repaired"]


def test_a_network_without_a_number_is_failed_and_said(tmp_path: Path) -> None:
    path = written(tmp_path, FILE + log("vit", "fold", VIT, (0.5, "FD", "nan")))
    told: list[str] = []
    found = published(path, warn=told.append)
    assert told == ["1 networks give outputs that are NaN; they count as failed"]
    assert cell_of(found, VIT)["state"] == "failed"
    assert "nan" not in str(lines(found).table["base"].to_list())


def test_a_figure_that_stands_twice_is_counted_once_and_said(tmp_path: Path) -> None:
    told: list[str] = []
    path = written(tmp_path, FILE + log("resnet18", "adam-fold", ADAM, (0.5, "PRUNE", "60.00")))
    rows = published(path, "resnet18-adam", told.append).rows
    assert told == ["1 figures stand more than once in their log; the first of each counts"]
    assert rows.filter((pl.col("method") == "fold") & (pl.col("stage") == "raw"))["acc"].to_list() == [0.4]


def test_dense_accuracies_that_disagree_are_said(tmp_path: Path) -> None:
    told: list[str] = []
    published(written(tmp_path, FILE.replace("90.00", "91.00", 1)), warn=told.append)
    assert told == ["1 networks have another dense accuracy in each log; the first one counts"]


def test_one_pruning_alone_is_no_rival_and_left_out(tmp_path: Path) -> None:
    lone = log("clip", "fold", "model_3.pt", (0.5, "FINETUNE_EPOCH1", "60.00"))
    lone += log("clip", "mag-l2", "model_3.pt", (0.5, "FINETUNE_EPOCH1", "50.00"))
    told: list[str] = []
    found = published(written(tmp_path, FILE + lone), "clip", told.append)
    assert told == ["1 figures of 1 networks have one of l1 and l2 alone and are left out"]
    at = lines(found).at("tuned", 0.5)
    assert at["fold"].to_list() == [60.0]
    assert at["gap"].to_list() == [None]


def test_a_log_or_table_that_is_not_the_studys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"log 'adam-wanda' of family 'resnet18' is not known; known: resnet18-adam"):
        published(written(tmp_path, HEAD + log("resnet18", "adam-wanda", ADAM, *HALF)))
    with pytest.raises(UserError, match=r"has the columns a, b; a CSV can be read where it holds the published study"):
        load(written(tmp_path, "a,b\n1,2\n"))
    with pytest.raises(UserError, match=r"study.csv is damaged"):
        published(written(tmp_path, FILE.replace("40.00", "forty")))
    with pytest.raises(UserError, match=r"cannot be read as CSV"):
        load(written(tmp_path, ""))


def test_a_report_can_read_the_file_as_it_is_published(tmp_path: Path) -> None:
    path = tmp_path / "study.csv.gz"
    path.write_bytes(gzip.compress(FILE.encode()))
    found = load(path)
    assert len(found.cells) == 6
    assert found.where(["optim.name=sgd"]).cells["optim.lr"].to_list() == [0.05]


def test_perplexities_of_language_models_are_lines_in_log_points(tmp_path: Path) -> None:
    found = load(written(tmp_path, LLAMA))
    assert found.cells["model.name"].to_list() == ["llama_60m", "llama_130m"]
    assert found.cells["optim.schedule.warmup_steps"].to_list() == [880, 1100]
    at = lines(found).at("raw", 0.2)
    assert at["gap"].to_list() == pytest.approx([14.46, 22.31], abs=0.01)  # 100 log(54.51 / 47.17): folding leads
    with pytest.raises(UserError, match="language models alone"):
        published(tmp_path / "study.csv", "vit")
    with pytest.raises(UserError, match="no figures but perplexities"):
        extras(tmp_path / "study.csv")


# --- the real file: means of the study's own logs, in %, and what its pairs say


@pytest.fixture(scope="module")
def study() -> dict[str, Lines]:
    """The lines of each family. FOLDABILITY_STUDY: path of study_rows.csv.gz."""
    path = os.environ.get("FOLDABILITY_STUDY")
    if path is None:
        pytest.skip("FOLDABILITY_STUDY does not name study_rows.csv.gz")
    return {family: lines(published(path, family, warn=lambda text: None)) for family in FAMILIES}


# family, least base, stage, ratio: networks, then mean accuracies of fold, l1 and l2, mean gap and share of wins.
MEANS = {
    ("resnet18-adam", 0, "raw", 0.3): (184, 62.6, 43.4, 43.7, 14.8, 0.84),
    ("resnet18-adam", 0, "repaired", 0.1): (184, 81.2, 80.1, 81.6, -0.8, 0.61),
    ("resnet18-adam", 0, "repaired", 0.5): (184, 70.9, 59.3, 62.0, 8.3, 0.82),
    ("resnet18-adam", 0, "tuned", 0.5): (184, 76.4, 71.1, 73.4, 2.7, 0.86),
    ("resnet18-adam", 0, "tuned 5 epochs", 0.9): (184, 44.7, 42.7, 43.0, 0.9, 0.61),
    ("resnet18-sgd", 0, "raw", 0.2): (541, 59.5, 51.3, 51.9, 5.8, 0.75),
    ("resnet18-sgd", 0, "repaired", 0.7): (541, 33.6, 24.1, 23.8, 8.7, 0.90),
    ("resnet18-sgd", 94, "repaired", 0.5): (161, 64.7, 52.2, 52.1, 11.8, 0.98),
    ("preactresnet18", 0, "raw", 0.3): (50, 68.3, 21.7, 21.3, 44.9, 1.0),
    ("preactresnet18", 0, "repaired", 0.5): (50, 58.8, 32.4, 32.0, 25.8, 1.0),
    ("preactresnet18", 0, "tuned 5 epochs", 0.7): (50, 70.6, 58.5, 58.9, 11.0, 0.96),
    ("vit", 80, "raw", 0.5): (66, 81.4, 80.6, 81.1, 0.3, 0.73),
    ("vit", 80, "norm_tuned", 0.9): (66, 65.9, 58.7, 61.0, 4.9, 0.85),
    ("clip", 0, "raw", 0.2): (72, 44.9, 28.1, 39.7, 5.2, 0.99),
    ("clip", 0, "norm_tuned", 0.5): (72, 31.3, 8.8, 13.1, 18.2, 1.0),
    ("clip", 0, "tuned", 0.2): (22, 72.5, 71.8, 72.0, 0.6, 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", MEANS, ids=str)
def test_means_are_those_of_the_published_logs(study: dict[str, Lines], which: tuple) -> None:
    family, least, stage, ratio = which
    at = study[family].at(stage, ratio).filter(pl.col("base") >= least).drop_nulls("gap")
    methods = study[family].methods.filter((pl.col("stage") == stage) & (pl.col("ratio") == ratio))
    means = methods.join(at.select("cell"), on="cell", how="semi").group_by("method").agg(pl.col("value").mean())
    values = dict(means.rows())
    n, *accuracies, gap, wins = MEANS[which]
    assert len(at) == n
    assert [values[name] for name in ("fold", "l1", "l2")] == pytest.approx(accuracies, abs=0.06)
    assert at["gap"].mean() == pytest.approx(gap, abs=0.06)
    assert (at["gap"] > 0).mean() == pytest.approx(wins, abs=0.006)


LEADS = {  # repaired, half of the channels: gap, half of its 95% interval, networks
    "resnet18-adam": (8.3, 1.7, 184),
    "resnet18-sgd": (8.5, 0.6, 541),
    "preactresnet18": (25.8, 1.9, 50),
    "clip": (18.2, 0.7, 72),
    "vit": (0.0, 0.1, 161),  # those of base 50 and more
}


@pytest.mark.slow
@pytest.mark.parametrize("family", LEADS)
def test_folding_leads_by_what_was_found_before(study: dict[str, Lines], family: str) -> None:
    stage = "norm_tuned" if family in ("vit", "clip") else "repaired"
    at = study[family].at(stage, 0.5).filter(pl.col("base") >= 50)["gap"].drop_nulls()
    gap, half, n = LEADS[family]
    assert len(at) == n
    assert at.mean() == pytest.approx(gap, abs=0.06)
    assert half_interval(at.std(), n) == pytest.approx(half, abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(("l1", "effect", "half"), [(0.0, 1.3, 1.6), (1e-5, 7.6, 1.5)])
def test_sam_moves_the_gap_under_sgd_where_l1_is_on(
    study: dict[str, Lines], l1: float, effect: float, half: float
) -> None:
    found = study["resnet18-sgd"]
    table = found.at("repaired", 0.5).filter(pl.col("l1") == l1)
    gap = pairs(table, "rho", found.settings, 0.0, 0.1)["gap"]
    assert gap.mean() == pytest.approx(effect, abs=0.06)
    assert half_interval(gap.std(), len(gap)) == pytest.approx(half, abs=0.06)


@pytest.mark.slow
def test_rate_and_decay_under_adam_act_on_the_gap_together_alone(study: dict[str, Lines]) -> None:
    at = study["resnet18-adam"].at("repaired", 0.5)
    rate, decay, gap = at["lr"].log10().to_numpy(), at["weight_decay"].to_numpy(), at["gap"].to_numpy()

    def explained(*columns: np.ndarray) -> float:
        x = np.stack([np.ones(len(gap)), *columns], axis=1)
        return 1 - (gap - x @ np.linalg.lstsq(x, gap, rcond=None)[0]).var() / gap.var()

    assert explained(rate, decay, rate * decay) == pytest.approx(0.42, abs=0.01)
    assert explained(rate, decay) < 0.03
