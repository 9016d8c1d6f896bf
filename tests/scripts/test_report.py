"""The report as users type it: states, settings, means, splits, files, and one clear line for every mistake."""

import re
import subprocess
import sys
from unittest.mock import Mock

import polars as pl
import pytest

from pipeline.cells import held, write_record
from pipeline.results import CHAIN_ROWS, DENSE, Row, RowStore
from pipeline.study.sweep import load, parsed, short, shown
from scripts.report import main


def add(runs, cell, /, state="done", fold=0.7, l1=0.5, epoch=2, split="test", reason="", measured=True, **optim):
    """A cell with two ratios, the second .1 worse, in two stages, the second .1 better."""
    folder = runs / cell
    folder.mkdir(parents=True)
    optim = {"name": "sgd", "lr": 0.1, "sam": {"rho": 0.0}, "schedule": {"name": "cosine"}, **optim}
    config = {"seed": 0, "model": {"name": "resnet18"}, "optim": optim, "data": {"augment": ["crop", "flip"]}}
    write_record(folder, {**config, "paths": {"runs": cell}, "wandb": {"mode": cell}}, state, reason, 1.0)
    if not measured:
        return folder
    fixed = {"cell": cell, "model": "m", "data": "d", "seed": 0, "step": 5, "n": 8, "epoch": epoch, "split": split}
    rows = [Row(**fixed, method=DENSE, ratio=0.0, stage="raw", acc=0.9, params=100)]
    for method, acc in (("fold", fold), ("l1", l1)):
        for ratio, loss in ((0.5, 0.0), (0.75, 0.1)):
            for stage, lift in (("raw", 0.0), ("repaired", 0.1)):
                what = {"method": method, "ratio": ratio, "stage": stage, "params": 25}
                rows.append(Row(**fixed, **what, acc=acc - loss + lift))
    store = RowStore(folder / "rows.parquet")
    store.add(rows)
    store.write()
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three done cells, one held by this process, one failed, one broken."""
    runs = tmp_path / "runs"
    add(runs, "a-1", fold=0.7, l1=0.5)
    add(runs, "b-2", fold=0.4, l1=0.5, lr=0.01)
    add(runs, "c-3", fold=0.6, l1=0.3, name="adam", lr=0.001, sam=None)
    add(runs, "e-5", "failed", fold=0.0, l1=0.0, lr=5, epoch=1, split="val", reason="loss is [nan]")
    add(runs, "f-6", "running", measured=False, lr=0.01)
    with held(add(runs, "d-4", "running", epoch=1, split="val", lr=0.3)):
        yield runs


@pytest.fixture
def report(monkeypatch, capsys):
    """The command in this process, which writes no page if not asked: its lines, single-spaced, without rules."""

    def call(*arguments, page=False):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments), *([] if page else ["--no-page"])])
        main()
        return [" ".join(re.sub("[│┃─]", " ", line).split()) for line in capsys.readouterr().out.splitlines()]

    return call


def test_the_command_shows_cells_states_and_means(runs):
    command = [sys.executable, "-m", "scripts.report", str(runs), "--cells", "--no-page"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 120
    lines = [" ".join(re.sub("[│┃─]", " ", line).split()) for line in done.stdout.splitlines()]
    assert "Cells, repaired, ratio 0.5" in lines
    assert "cell state optim lr rho epoch split dense fold prune gap" in lines
    cells = [line for line in lines if re.match(r"[a-f]-\d [a-z]", line)]
    assert cells == [
        "c-3 done adam 0.001 - 2 test 90.0 70.0 40.0 +30.0",
        "b-2 done sgd 0.01 0 2 test 90.0 50.0 60.0 -10.0",
        "a-1 done sgd 0.1 0 2 test 90.0 80.0 60.0 +20.0",
        "d-4 running sgd 0.3 0 1 val 90.0 80.0 60.0 +20.0",
        "e-5 failed sgd 5 0 1 val 90.0 10.0 10.0 +0.0",
        "f-6 broken sgd 0.01 0 - - - - - -",
    ]
    assert "e-5: loss is [nan]" in lines
    assert lines[:2] == ["m on d: 3 done, 1 running, 1 failed, 1 broken", "1 cell ended with: loss is [nan]"]
    assert lines[2].startswith("1. 3 networks of 3 recipes were measured")
    assert "Mean accuracy (%) over 3 done cells, test samples; dense 90.0%" in lines
    raw = lines[lines.index("raw (as compressed)") :]
    assert raw[1:7] == [
        "fold 56.7 46.7",
        "l1 43.3 33.3",
        "gap, points +13.3 +13.3",
        "95% interval ±51.7 ±51.7",  # 4.303 * sd(20, -10, 30) / sqrt(3)
        "win rate 67% 67%",
        "n recipes 3 3",
    ]


def test_where_keeps_the_cells_that_meet_all_conditions(runs, report):
    lines = report(runs, "--where", "optim=sgd", "--where", "optim.sam.rho=0", "--where", "lr=1e-1")
    assert lines[0] == "m on d: 1 done"
    assert report(runs, "--where", "augment=[crop, flip]") == report(runs)
    assert report(runs, "--where", "rho=null")[0] == "m on d: 1 done"


def test_cells_of_another_headline_stand_apart(runs, report, tmp_path):
    """No mean is over accuracies and IoUs."""
    store = RowStore(add(runs, "g-7") / "rows.parquet")
    store.rows = store.rows.with_columns(metric=pl.lit("miou"), miou=pl.col("acc") - 0.125, acc=pl.lit(1.0))
    store.write()
    lines = report(runs, "--cells", "--plot", tmp_path / "plot.png", "--out", tmp_path / "rows.csv")
    cells = [line for line in lines if re.match(r"([a-f]-)?\d (done|running|failed|broken) ", line)]
    assert [line.split()[0] for line in cells] == ["c-3", "b-2", "a-1", "d-4", "e-5", "f-6", "7"]
    assert cells[-1].endswith("77.5 67.5 47.5 +20.0")
    assert [line.split(",")[0] for line in lines if line.startswith("Mean")] == [
        "Mean accuracy (%) over 3 done cells",
        "Mean iou (%) over 1 done cell",
    ]
    assert "m on d, acc: 3 done, 1 running, 1 failed, 1 broken" in lines
    assert "m on d, miou: 1 done" in lines
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["plot-acc.png", "plot-miou.png"]
    assert set(pl.read_csv(tmp_path / "rows.csv")["metric"]) == {"acc", "miou"}


def test_cells_of_another_model_are_never_in_one_mean(runs, report):
    store = RowStore(add(runs, "g-7", fold=0.2) / "rows.parquet")
    store.rows = store.rows.with_columns(model=pl.lit("vit"))
    store.write()
    lines = report(runs)
    titles = [line for line in lines if re.match(r"\w+ on d: ", line)]
    assert titles == [
        "m on d: 3 done, 1 running, 1 failed, 1 broken",
        "vit on d: 1 done",
    ]
    means = [line for line in lines if line.startswith("fold ")]
    assert means == ["fold 66.7 56.7", "fold 30.0 20.0"]  # of the stage that leads, each
    assert sum(line.startswith("1. ") for line in lines) == 2


def test_a_screen_shows_the_best_and_the_worst_cells_and_asks_for_all(tmp_path, report):
    for i in range(12):
        add(tmp_path, f"run-{i:02}", fold=0.2 + i / 50, lr=0.1 * (i + 1))
    lines = report(tmp_path)
    assert "Best and worst of 12 cells run-*, test samples, repaired, ratio 0.5" in lines
    listed = [line.split()[0] for line in lines if re.match(r"\d\d 90", line)]
    assert listed == ["11", "10", "09", "08", "07", "04", "03", "02", "01", "00"]
    assert "11 90.0 52.0 60.0 -8.0 lr=1.2" in lines
    whole = report(tmp_path, "--cells")
    assert sum(bool(re.match(r"\d\d done ", line)) for line in whole) == 12


def test_many_methods_leave_the_stage_that_leads(tmp_path, report, monkeypatch):
    add(tmp_path, "a-1")
    assert {"raw (as compressed)", "repaired (statistics re-estimated)"} <= set(report(tmp_path))
    monkeypatch.setattr("scripts.report.FITS", 3)
    lines = report(tmp_path)
    assert "raw (as compressed)" not in lines
    assert "Mean accuracy (%) over 1 done cell, test samples; dense 90.0%; other stages are on the page" in lines


def test_the_page_and_the_files_beside_it(runs, report):
    lines = report(runs, page=True)
    assert lines[-1] == f"wrote {runs}/report/index.html; beside it: png, effects.csv, cells.parquet, summary.md"
    folder = runs / "report"
    assert {path.name for path in folder.iterdir()} == {
        "index.html", "png", "effects.csv", "cells.parquet", "summary.md",
    }  # fmt: skip
    assert {path.stem for path in (folder / "png").iterdir()} == {"curves", "settings", "effects", "base"}
    assert len(pl.read_parquet(folder / "cells.parquet")) == 45
    summary = (folder / "summary.md").read_text()
    assert "6 cells: 3 done, 1 running, 1 failed, 1 broken." in summary
    assert "- 1 cells: loss is [nan]" in summary
    assert "1. 3 networks of 3 recipes were measured" in summary
    assert report(runs, page=True) == lines  # its own folder is no cell


def test_a_page_from_a_file_of_rows(runs, report, tmp_path):
    report(runs, "--out", tmp_path / "rows.parquet")
    lines = report(tmp_path / "rows.parquet", page=True)
    assert lines[-1].startswith(f"wrote {tmp_path}/rows-report/index.html")
    assert lines[0] == "m on d: 3 done, 1 running, 1 failed"  # a cell without rows is not in the file


def add_chains(runs, cell, bits=(4,), model="tiny"):
    """A done cell that ran chains alone: folding, and a grid of so many bits behind it."""
    add(runs, cell, measured=False)
    fixed = {"cell": cell, "model": model, "data": "dots", "seed": 0, "epoch": 1, "step": 1, "split": "test", "n": 20}
    cost = {"params": 100, "macs": 10**6, "seconds": 1.0, "unlabelled": 7, "labelled": 0, "metric": "acc"}
    values = {"": (0.9, 400_000), "fold@0.5": (0.8, 200_000)}
    values |= {f"fold@0.5 > quantize(bits={n})": (0.1 * n, 50_000 * n) for n in bits}
    store = RowStore(runs / cell / CHAIN_ROWS)
    for chain, (acc, size) in values.items():
        store.add([Row(**fixed, **cost, method="fold", ratio=0.5, stage=chain, chain=chain, acc=acc, bytes=size)])
    store.write()


def test_chains_of_all_cells_are_shown_as_means_and_drawn(tmp_path, report):
    add_chains(tmp_path, "a-1", bits=(4, 8))
    add_chains(tmp_path, "a-2", bits=(4,))
    add_chains(tmp_path, "b-1", model="other")
    said = "\n".join(report(tmp_path, page=True))
    assert "3 cells, which ran chains alone: 3 done" in said
    assert "What every stage leaves of tiny on dots, means ± standard deviations over 2 cells, 20 test samples" in said
    assert "What every stage leaves of other on dots, 20 test samples" in said
    assert "1 stages that not all 2 cells have are left out" in said
    assert "bits=8" not in said
    assert "> fold@0.5 * 80.0 ± 0.0 200.0" in said
    folder = tmp_path / "report"
    assert (folder / "index.html").read_text().count("<h3>") == 2, "a table and a picture each"
    assert {path.name for path in (folder / "png").iterdir()} == {"pareto-tiny-on-dots.png", "pareto-other-on-dots.png"}
    assert pl.read_csv(folder / "chains.csv")["network"].unique().sort().to_list() == ["other on dots", "tiny on dots"]


def test_compare_shows_two_sweeps_beside_each_other(tmp_path, report):
    for i in range(8):
        add(tmp_path / "plain", f"p-{i}", fold=0.4 + i / 50, lr=0.1 * (i + 1))
        add(tmp_path / "sam", f"s-{i}", fold=0.5 + i / 50 + (i % 2) / 50, lr=0.1 * (i + 1), sam={"rho": 0.05})
    lines = report("--compare", tmp_path / "plain", tmp_path / "sam", page=True)
    assert lines[:4] == [
        f"A {tmp_path}/plain: 8 networks",
        f"B {tmp_path}/sam: 8 networks",
        "rho: 0 in A and 0.05 in B",
        "Accuracy (%) over 8 pairs of recipes; uncompressed 90.0 in A, 90.0 in B",
    ]
    at = lines.index("raw (as compressed)")
    assert lines[at + 1 : at + 5] == [
        "fold, A 47.0 37.0",
        "fold, B 58.0 48.0",
        "B less A +11.0 +11.0",
        "95% interval ±0.9 ±0.9",
    ]
    assert "B in place of A raises the accuracy that fold leaves at half of the channels, repaired, by 11.0 ± 0.9" in (
        " ".join(lines)
    )
    one = report("--compare", tmp_path / "plain" / "p-0", tmp_path / "sam" / "s-0" / "rows.parquet")
    assert one[0] == f"A {tmp_path}/plain/p-0: 1 network"
    assert "n too small for a word on the accuracy that fold leaves" in " ".join(one)
    kept = report("--compare", tmp_path / "plain", tmp_path / "sam", "--where", "lr=0.1")
    assert "Accuracy (%) over 1 pair of networks; uncompressed 90.0 in A, 90.0 in B" in kept


def test_by_splits_the_means_and_gives_each_a_row_of_one_picture(runs, report, tmp_path, monkeypatch):
    drawn = Mock(side_effect=lambda groups, path, title: path.touch())
    monkeypatch.setattr("scripts.report.plot_groups", drawn)
    lines = report(runs, "--by", "optim.name", "--by", "rho", "--plot", tmp_path / "plot.png")
    titles = [line.split(";")[0] for line in lines if line.startswith("Mean")]
    assert titles == [
        "Mean accuracy (%) over 1 done cell with optim=adam, rho=-, test samples",
        "Mean accuracy (%) over 2 done cells with optim=sgd, rho=0, test samples",
    ]
    assert f"wrote {tmp_path}/plot.png" in lines
    ((groups, title),) = [(call.args[0], call.kwargs["title"]) for call in drawn.call_args_list]
    assert list(groups) == ["optim=adam, rho=-", "optim=sgd, rho=0"]
    assert [rows["cell"].unique().sort().to_list() for rows in groups.values()] == [["c-3"], ["a-1", "b-2"]]
    assert title == "Mean accuracy (%)"


@pytest.mark.parametrize(("suffix", "read"), [("csv", pl.read_csv), ("parquet", pl.read_parquet)])
def test_out_joins_rows_and_settings(runs, report, tmp_path, suffix, read):
    path = tmp_path / f"all.{suffix}"
    assert f"wrote {path}" in report(runs, "--out", path, "--where", "lr=0.001")
    table = read(path)
    assert len(table) == 9
    assert set(table["optim.name"]) == {"adam"}
    assert set(table["state"]) == {"done"}
    assert table.columns.count("seed") == 1
    assert {"acc", "loss", "cell.seed", "cell.reason", "cell.seconds", "data.augment"} <= set(table.columns)


def test_a_damaged_file_does_not_hide_the_other_cells(runs, monkeypatch, capsys):
    (runs / "a-1" / "rows.parquet").write_bytes(b"PAR1 damaged PAR1")
    monkeypatch.setattr(sys, "argv", ["report", str(runs), "--no-page"])
    main()
    out, err = capsys.readouterr()
    assert re.fullmatch(r"warning: \S+a-1/rows.parquet is damaged or of another version \(.*\)\n", err)
    assert "over 2 done cells, test samples; dense 90.0%; 1 more have no rows" in out


def test_a_sweep_that_has_only_begun_is_no_error(tmp_path, report):
    add(tmp_path, "a-1", "running", measured=False)
    lines = report(tmp_path, "--cells", page=True)
    assert lines[:2] == [
        "this sweep: 1 broken",
        "1. No cell of this sweep that is done has rows yet.",
    ]
    assert "no cell that is done has rows yet" in lines
    assert "cell state epoch dense fold prune gap" in lines
    assert "No cell of this sweep that is done has rows yet." in (tmp_path / "report" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a folder of runs"),
        (["runs/a-1"], "no cells in .*a-1; give the folder"),
        (["runs", "--where", "optim.nam=sgd"], r"unknown setting 'optim.nam' \(did you mean 'optim.name'\?\)"),
        (["runs", "--where", "optim.name=lion"], "no cell has optim.name=lion; there are: adam, sgd"),
        (["runs", "--where", "optim.name"], "give SETTING=VALUE"),
        (["runs", "--where", "lr=[1"], "--where lr="),
        (["runs", "--by", "name"], "setting 'name' could be any of: model.name, optim.name, optim.schedule.name"),
        (["runs", "--out", "table.xlsx"], "unknown kind of --out '.xlsx'.*choose from: .csv, .parquet"),
        (["runs", "--out", "no/such/folder.csv"], "folder.csv cannot be written"),
        (["runs", "--plot", "picture.nothing"], "picture.nothing cannot be written"),
        ([], "no runs are named; give the folder that paths.runs named, or two with --compare A B"),
        (["--compare", "runs", "nowhere"], "nowhere is not a folder of runs"),
        (["--compare", "runs/f-6", "runs"], "no cell of runs/f-6 that is done has rows yet"),
        (
            ["--compare", "runs", "runs", "--by", "lr"],
            "takes A, B and --where, and not --by; leave that away",
        ),
        (["runs", "--compare", "runs", "runs"], "--compare takes A, B and --where, and not runs; leave that away"),
        (["runs", "--page", "runs/a-1/cell.json"], "cell.json cannot be written .*; give another --page, or --no-page"),
    ],
)
def test_bad_input_gets_one_line(runs, report, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        report(*arguments, page="--page" in arguments)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: .*{message}", line)


def test_a_record_that_ends_meanwhile_is_not_missed(tmp_path, monkeypatch):
    """The record is read before the rows, so that a cell that reads as done has all its rows."""
    add(tmp_path, "a-1", "running")
    order = []
    monkeypatch.setattr("pipeline.study.sweep.line", lambda folder: order.append("record") or {"cell": folder.name})
    monkeypatch.setattr("pipeline.results._blob", lambda path, warn: order.append("rows"))
    load(tmp_path)
    assert order == ["record", "rows"]


def time_networks(folder, dense=0.08, half=0.02, **other):
    """Write the file of speeds that a cell has after timing its networks."""
    of = {"cell": folder.name, "model": "resnet18", "data": "cifar10", "device": "cpu", "threads": 2, **other}
    lines = []
    for method, ratio, median, params in (("dense", 0.0, dense, 10_000_000), ("fold", 0.5, half, 2_500_000)):
        for size, reason in ((1, ""), (128, "out of memory" if method == "dense" else "")):
            times = {"median": float("nan") if reason else median * size, "memory": None if reason else 3_000_000}
            times["speedup"] = float("nan") if method == "dense" or size == 128 else dense / median
            sizes = {"params": params, "macs": 40 * params, "size": 4 * params}
            lines.append({**of, "method": method, "ratio": ratio, "runtime": "eager", "batch_size": size,
                          "reason": reason, **times, **sizes})  # fmt: skip
    pl.DataFrame(lines).write_parquet(folder / "speed.parquet")


def test_sizes_and_speeds_are_medians_over_the_cells_of_a_model(tmp_path, report):
    for cell, half in (("a-1", 0.02), ("b-2", 0.04), ("c-3", 0.01)):
        time_networks(add(tmp_path, cell), half=half)
    add(tmp_path, "d-4")  # a cell without timed networks
    lines = report(tmp_path)
    (title,) = [i for i, line in enumerate(lines) if line.startswith("Size and speed of resnet18 on cifar10")]
    assert "(cpu, 2 threads, median of 3 cells)" in lines[title]
    assert lines[title + 4 : title + 6] == [
        "dense 10.00 M 400 M 40.0 MB 80 ms - -",
        "0.5 2.50 M 100 M 10.0 MB 20 ms (4.0x) 2,560 ms 3 MB",
    ]
    assert "3 times of eager are missing: out of memory" in lines


def test_the_dense_time_stands_beside_a_paired_one_and_a_wide_spread_is_told(tmp_path, report):
    folder = add(tmp_path, "a-1")
    time_networks(folder)
    path = folder / "speed.parquet"
    timed = pl.read_parquet(path).filter(pl.col("batch_size") == 1)
    alone = pl.col("method") == "dense"

    def lines(doubt):
        beside = {"beside": 0.09, "doubt": doubt}
        pairs = {name: pl.when(alone).then(float("nan")).otherwise(value) for name, value in beside.items()}
        timed.with_columns(**pairs).write_parquet(path)
        return report(tmp_path)

    told = lines(0.05)
    assert any(line.endswith("20 of 90 ms (4.0x) 3 MB") for line in told)
    assert not any("warning" in line for line in told)
    (warning,) = [line for line in lines(0.25) if "warning" in line]
    assert warning == (
        "warning: 1 of 1 speedups may be off by more than 10% (the worst, eager at batch 1: 4.0x, by 25%): passes that "
        "followed each other differ; time them on an idle machine, or longer with profile.seconds="
    )


def test_a_damaged_file_of_speeds_is_named(tmp_path, monkeypatch, capsys):
    (add(tmp_path, "a-1") / "speed.parquet").write_bytes(b"PAR1 damaged PAR1")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), "--no-page"])
    main()
    assert re.fullmatch(r"warning: \S+a-1/speed.parquet is damaged \(.*\)\n", capsys.readouterr().err)


def test_the_name_that_all_cells_share_is_in_the_title(tmp_path, report):
    add(tmp_path, "my-run-1f")
    add(tmp_path, "my-run-2e")
    lines = report(tmp_path, "--cells")
    assert "Cells my-run-*, test samples, repaired, ratio 0.5" in lines
    assert "1f done 2 90.0 80.0 60.0 +20.0" in lines
    add(tmp_path, "other")
    assert "my-run-1f done 2 90.0 80.0 60.0 +20.0" in report(tmp_path, "--cells")


def test_names_are_as_short_as_they_can_be():
    names = ["optim.name", "optim.lr", "optim.schedule.name", "model.name", "seed", "data.size", "model.size"]
    assert list(short(names).values()) == ["optim", "lr", "schedule", "model", "seed", "data.size", "model.size"]


def test_values_are_read_and_shown_as_on_the_command_line():
    assert parsed("optim.lr=1e-3") == ("optim.lr", 0.001)
    assert parsed("augment=[crop,flip]") == ("augment", '["crop", "flip"]')
    assert [shown(v) for v in (None, 0.001, '["crop", "flip"]', True, "sgd")] == [
        "-",
        "0.001",
        "[crop,flip]",
        "True",
        "sgd",
    ]


def test_checkpoints_are_split_by_how_they_were_trained(tmp_path, report):
    """Training settings stand under "named."; a name means those where the measurement has a setting of that name."""
    for i, (name, augment) in enumerate([("sgd", "[]"), ("adam", "[]"), ("adam", '["crop"]')]):
        folder = add(tmp_path, f"m-{i}", fold=0.5 + i / 10)
        named = {"optim.name": name, "optim.schedule.name": "cosine", "data.augment": augment}
        write_record(folder, {"data": {"augment": "[]"}, "named": named}, "done", "", 1.0)
    means = [line for line in report(tmp_path, "--by", "optim") if line.startswith("Mean")]
    assert [re.search("over (.) done cells? with (.*?),", line).groups() for line in means] == [
        ("2", "optim=adam"),
        ("1", "optim=sgd"),
    ]
    assert sum(line.startswith("Mean") for line in report(tmp_path, "--where", "augment=[crop]", "--by", "optim")) == 1
    assert load(tmp_path).setting("schedule") == "named.optim.schedule.name"
