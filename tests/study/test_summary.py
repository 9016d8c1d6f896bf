"""Gap, win rate and headline against numbers made by hand."""

import math

import polars as pl
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from pipeline import results
from pipeline.data import DATASETS
from pipeline.results import DENSE, Row, with_facts
from pipeline.study.pictures import SPREAD, chance, middle_halves, plot_curves, plot_groups
from pipeline.study.summary import dense_value, duels, foretold, gaps, headlines, last_measurement, parameters_left
from pipeline.study.terminal import print_table, result_table
from pipeline.tables import UserError


def table(rows: list[Row]) -> pl.DataFrame:
    """The rows as a table of an older file, whose facts come from the labels."""
    return with_facts(results.table(rows))


def row(cell="a", method="fold", ratio=0.5, acc=0.5, stage="raw", split="val", epoch=1, **more) -> Row:
    fixed = {"model": "m", "data": "d", "seed": 0, "step": 1, "n": 8, "params": 100 if method == DENSE else 25}
    return Row(cell, method=method, ratio=ratio, acc=acc, stage=stage, split=split, epoch=epoch, **{**fixed, **more})


def cell(name: str, fold: float | None, l1: float | None, l2: float | None, **more) -> list[Row]:
    accuracies = {"fold": fold, "l1": l1, "l2": l2}
    return [
        row(name, m, acc=a, status="ok" if a is not None else "failed", reason="" if a is not None else "why", **more)
        for m, a in accuracies.items()
    ]


def shown(found) -> list[str]:
    console = Console(width=120, highlight=False)
    with console.capture() as capture:
        console.print(found)
    return [" ".join(line.replace("│", " ").split()) for line in capture.get().splitlines()]


def test_cells_of_other_parts_have_gaps_of_their_own():
    """Every cell decides by itself which of its rows compare, not the first cell for all."""
    rows = [
        row(name, method, acc=acc, kind=kind, calibration="none", sizes="uniform", scope=scope)
        for name, scope in {"a": "hidden,residual", "b": "hidden"}.items()
        for method, kind, acc in (("fold", "fold", 0.5), ("l1", "prune", 0.25))
    ]
    other = row("b", "wide", acc=0.9, kind="fold", calibration="none", sizes="uniform", scope="hidden,residual")
    assert duels(table([*rows, other])).rows() == [
        ("a", "raw", 0.5, 0.5, 0.25, 0.25),
        ("b", "raw", 0.5, 0.5, 0.25, 0.25),
    ]


def test_parameters_left_are_those_of_the_one_compression_that_all_have():
    rows = [row(method=DENSE, ratio=0.0), row(), row(stage="l1@0.5 > repair", params=5)]
    assert parameters_left(table(rows)) == {0.5: 0.25}


def test_the_last_measurement_is_of_each_cell():
    rows = [
        row("a", epoch=1),
        row("a", epoch=2),
        row("a", epoch=2, split="test"),
        row("b", epoch=1),
        row("b", epoch=7),
        row("c", epoch=3, split="test"),
        row("c", epoch=4, split="test"),
    ]
    last = last_measurement(table(rows))
    assert last.select("cell", "split", "epoch").rows() == [("a", "test", 2), ("b", "val", 7), ("c", "test", 4)]
    assert last_measurement(table([])).is_empty()


def test_rows_of_before_are_given_what_their_labels_say():
    """Reading fills the columns in; a label that is no spelling tells its kind by how it begins."""
    kinds = {
        "fold": "fold", "fold-writers": "fold", "mix+data": "mix", "l1": "prune", "unfold": "prune", "random": "prune",
        "random_fold": "fold", "random_mask": "mask", "n_m-8": "mask", "lamp": "mask", "auto": "auto", DENSE: "dense",
    }  # fmt: skip
    assert dict(table([row(method=method) for method in kinds]).select("method", "kind").iter_rows()) == kinds
    columns = ["calibration", "sizes", "scope", "statistics", "metric"]
    said = {
        ("mix+data+macs", "raw"): ("data", "macs", "hidden,residual", "data", "acc"),
        ("l1+grail", "raw"): ("data", "uniform", "hidden,residual", "none", "acc"),
        ("l1+grail", "repaired"): ("data", "uniform", "hidden,residual", "data", "acc"),
        ("fold+ar", "raw"): ("none", "uniform", "hidden,residual", "weights", "acc"),
        ("l1+filters", "norm_tuned"): ("none", "uniform", "filters", "data", "acc"),
        ("my own", "raw"): ("none", "uniform", None, "none", "acc"),
    }
    found = table([row(method=method, stage=stage) for method, stage in said])
    assert [tuple(line) for line in found.select(columns).rows()] == list(said.values())


def test_rows_that_say_what_they_are_keep_it():
    mine = row(method="lamp", kind="fold", calibration="none", sizes="uniform", statistics="none", metric="acc")
    assert table([mine, row(method="l1")])["kind"].to_list() == ["fold", "prune"]
    assert duels(table([mine, row(method="l1", acc=0.4)])).select("fold", "prune").rows() == [(0.5, 0.4)]


def test_a_metric_that_falls_is_read_the_other_way_round():
    facts = {"calibration": "none", "sizes": "uniform", "statistics": "none", "metric": "loss"}
    rows = results.table(
        [
            row(method=DENSE, ratio=0.0, loss=1.0, kind="dense", metric="loss"),
            row(method="fold", loss=1.5, kind="fold", **facts),
            row(method="l1", loss=2.0, kind="prune", **facts),
            row(method="l2", loss=1.75, kind="prune", **facts),
        ]
    )
    assert duels(rows).select("fold", "prune", "gap").rows() == [(1.5, 1.75, 0.25)]
    lines = shown(result_table(rows, duel=True))
    assert "fold 1.500" in lines
    assert "gap, points +0.250" in lines
    assert headlines(rows).select("dense", "gap").rows() == [(1.0, 0.25)]


def test_two_metrics_are_not_shown_in_one_table():
    rows = results.table([row(kind="fold", metric="acc"), row(kind="fold", metric="miou", miou=0.5)])
    with pytest.raises(UserError, match="these rows measure acc and miou; show them apart, with --where"):
        result_table(rows)


def test_gap_and_win_rate_against_a_hand_computation():
    rows = table([*cell("a", 0.7, 0.5, 0.6), *cell("b", 0.4, 0.6, 0.1), *cell("c", 0.9, 0.3, 0.4)])
    # gaps .1, -.2, .5: mean .4 / 3, standard deviation sqrt((.1 - m)^2 + (-.2 - m)^2 + (.5 - m)^2) / sqrt(2)
    mean = 0.4 / 3
    deviation = math.sqrt(sum((g - mean) ** 2 for g in (0.1, -0.2, 0.5)) / 2)
    line = gaps(rows).row(0, named=True)
    assert line["n"] == 3
    assert line["gap"] == pytest.approx(mean)
    assert line["wins"] == pytest.approx(2 / 3)
    assert line["margin"] == pytest.approx(4.302653 * deviation / math.sqrt(3), rel=1e-6)  # t at .975, 2 degrees


def test_seeds_of_a_recipe_are_one_in_the_interval_of_the_gap():
    rows = [*cell("a", 0.7, 0.5, 0.6), *cell("b", 0.4, 0.6, 0.1), *cell("c", 0.9, 0.3, 0.4), *cell("d", 0.6, 0.5, 0.1)]
    recipes = pl.DataFrame({"cell": ["a", "b", "c", "d"], "recipe": ["x", "x", "y", "z"]})
    line = gaps(table(rows), recipes).row(0, named=True)  # gaps .1 and -.2 are one recipe's
    assert (line["n"], line["wins"]) == (3, pytest.approx(2 / 3))
    assert line["gap"] == pytest.approx((-0.05 + 0.5 + 0.1) / 3)


def test_what_failed_is_in_no_mean_and_two_cells_have_no_interval():
    rows = [*cell("a", 0.7, 0.5, None), *cell("b", None, 0.5, 0.2), *cell("c", math.nan, 0.5, 0.2)]
    rows += [*cell("d", 0.5, None, None), *cell("e", 0.5, 0.5, 0.1)]
    found = gaps(table(rows)).row(0, named=True)
    assert (found["n"], found["wins"], found["margin"]) == (2, 0.5, None)  # a tie is no win
    assert found["gap"] == pytest.approx(0.1)
    assert duels(table(rows)).filter(pl.col("cell") == "d")["gap"].to_list() == [None]


def test_the_headline_is_repaired_at_the_ratio_nearest_a_half():
    rows = [row("a", DENSE, 0.0, 0.95), row("a", DENSE, 0.0, 0.9, epoch=3)]
    for stage, lift in (("raw", 0.0), ("repaired", 0.1)):
        for ratio in (0.2, 0.4, 0.6, 0.9):
            rows += cell("a", 0.5 + lift - ratio / 10, 0.3, 0.2, stage=stage, ratio=ratio, epoch=3)
    rows += [*cell("b", 0.3, 0.1, 0.2, ratio=0.8), row("c", DENSE, 0.0, None, status="failed")]
    found = headlines(table(rows))
    assert found.columns == ["cell", "split", "epoch", "dense", "stage", "ratio", "fold", "prune", "gap"]
    assert found.rows() == [
        ("a", "val", 3, 0.9, "repaired", 0.4, *map(pytest.approx, (0.56, 0.3, 0.26))),
        ("b", "val", 1, None, "raw", 0.8, 0.3, 0.2, pytest.approx(0.1)),
        ("c", "val", 1, *[None] * 6),
    ]


def test_the_table_of_one_run_shows_accuracies_and_what_failed():
    rows = table([row(method=DENSE, ratio=0.0, acc=0.9), *cell("a", 0.7, 0.5, None), row(ratio=0.25, acc=0.8)])
    lines = shown(result_table(rows))
    assert "parameters left 25% 25%" in lines
    assert "fold 80.0 70.0" in lines
    assert "l1 failed 50.0" in lines
    assert not any("gap" in line for line in lines)


def test_the_table_of_several_cells_shows_gap_interval_wins_and_n(capsys):
    rows = table(
        [
            *cell("a", 0.7, 0.5, 0.6),
            *cell("b", 0.4, 0.6, 0.1),
            *cell("c", 0.9, 0.3, None),
            *cell("a", 0.2, 0.1, 0.1, ratio=0.75),
        ]
    )
    print_table(rows, "mean with [crop,flip]", duel=True)
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "mean with [crop,flip]"
    assert "fold (n 1-3) 66.7 20.0" in lines
    assert "l2 (n 1-2) 35.0 10.0" in lines
    assert "gap, points +16.7 +10.0" in lines  # .1, -.2 and .6
    assert "95% interval ±100.4 -" in lines
    assert "win rate 67% -" in lines
    assert "n recipes 3 1" in lines
    assert "1 measurements failed: why" in lines


def test_nothing_measured_still_gives_a_table_and_a_picture(tmp_path):
    rows = table([row(method=DENSE, ratio=0.0, acc=None, status="failed", reason="why")])
    assert dense_value(rows) is None
    result_table(rows, duel=True)
    plot_curves(rows, tmp_path / "empty.png", "title")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_a_panel_starts_from_the_networks_that_have_its_stage(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    both = [row("a", DENSE, 0.0, 0.9), row("b", DENSE, 0.0, 0.5), row("a"), row("b"), row("a", stage="repaired")]
    plot_curves(table(both), tmp_path / "curves.png", "title")
    starts = [panel.lines[0].get_ydata()[0] for panel in drawn[0].axes]
    assert starts == pytest.approx([70, 90])
    assert [panel.texts[0].get_text() for panel in drawn[0].axes] == ["dense 70.0%", "dense 90.0%"]
    assert [panel.get_title() for panel in drawn[0].axes] == [
        "raw (as compressed), n = 2",
        "repaired (statistics re-estimated), n = 1",
    ]


def panels_of(monkeypatch, groups, tmp_path):
    """The figure of some groups, by the titles of its panels."""
    drawn, real = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **options: (drawn.append(figure), real(figure, *args, **options))
    )
    plot_groups(groups, tmp_path / "groups.png", "title")
    return drawn[0], {panel.get_title(): panel for panel in drawn[0].axes}


def test_several_groups_are_rows_of_one_picture_with_one_legend(tmp_path, monkeypatch):
    groups = {
        "adam": table([row("a", DENSE, 0.0, 0.9), *cell("a", 0.7, 0.5, 0.6), row("a", stage="repaired")]),
        "sgd": table([row("b", DENSE, 0.0, 0.8), *cell("b", 0.4, 0.3, None), row("b", "mix", acc=0.2)]),
    }
    figure, panels = panels_of(monkeypatch, groups, tmp_path)
    assert list(panels) == [
        "adam: raw (as compressed), n = 1",
        "adam: repaired (statistics re-estimated), n = 1",
        "sgd: raw (as compressed), n = 1",
        "",  # the networks of sgd have nothing that is repaired
    ]
    assert not panels[""].axison
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["fold", "l1", "l2", "mix", "dense"]
    colors = [
        {line.get_label(): line.get_color() for line in panels[f"{name}: raw (as compressed), n = 1"].lines}
        for name in groups
    ]
    assert all(colors[0][name] == colors[1][name] for name in ("fold", "l1"))


def test_the_spread_is_the_middle_half_of_three_networks_or_more(tmp_path, monkeypatch):
    rows = [row(name, ratio=ratio, acc=acc + ratio / 10) for ratio in (0.2, 0.5)
            for name, acc in (("a", 0.1), ("b", 0.3), ("c", 0.4), ("d", 0.6))]  # fmt: skip
    rows += [row(name, "l1", acc=0.2) for name in ("a", "b")]
    shaded = middle_halves(table(rows), "raw")
    assert list(shaded) == ["fold"]
    assert shaded["fold"].select("low", "high").rows() == [
        (pytest.approx(0.27), pytest.approx(0.47)),
        (pytest.approx(0.3), pytest.approx(0.5)),
    ]
    figure, panels = panels_of(monkeypatch, {"": table(rows)}, tmp_path)
    assert list(panels) == ["raw (as compressed), n = 2 to 4"]
    assert len(panels["raw (as compressed), n = 2 to 4"].collections) == 1
    assert SPREAD in [text.get_text() for text in figure.legends[0].get_texts()]


def test_chance_is_told_where_the_classes_are_known(tmp_path, monkeypatch):
    known = table([row(method=DENSE, ratio=0.0, acc=0.9, data="digits"), row(data="digits")])
    accuracy = results.headline(known)
    assert chance(known, accuracy) == 0.1
    assert chance(table([row(data="flowers")]), accuracy) is None
    assert chance(table([row(data="digits"), row(data="flowers")]), accuracy) is None
    assert chance(known, results.METRICS["loss"]) is None
    _, panels = panels_of(monkeypatch, {"": known}, tmp_path)
    assert [text.get_text() for text in next(iter(panels.values())).texts] == ["dense 90.0%", "chance 10%"]
    told = table([row(method=DENSE, ratio=0.0, acc=0.9, data="flowers", chance=0.25), row(data="flowers", chance=0.25)])
    assert chance(told, accuracy) == 0.25
    assert chance(table([row(data="digits", chance=0.1), row(data="digits")]), accuracy) == 0.1
    assert chance(table([row(data="flowers", chance=0.25), row(data="birds", chance=0.5)]), accuracy) is None
    assert chance(table([row(data="flowers", chance=0.25), row(data="flowers")]), accuracy) is None
    _, panels = panels_of(monkeypatch, {"": told}, tmp_path)
    assert [text.get_text() for text in next(iter(panels.values())).texts] == ["dense 90.0%", "chance 25%"]


def test_the_dense_line_says_its_accuracy_inside_of_the_panel(tmp_path, monkeypatch):
    for acc, side in ((0.9, "bottom"), (0.98, "top")):
        rows = table([row(method=DENSE, ratio=0.0, acc=acc, data="digits"), row(data="digits")])
        _, panels = panels_of(monkeypatch, {"": rows}, tmp_path)
        assert next(iter(panels.values())).texts[0].get_va() == side


def test_the_classes_are_those_of_the_data_sets():
    """Every data set whose root does not say which pictures it holds has a row."""
    fixed = {name for name, source in DATASETS.items() if source.kind == "pictures" and not source.root_names_data}
    assert set(results.CLASSES) == fixed
    assert len(DATASETS["digits"].load().classes) == results.CLASSES["digits"]


def test_masks_are_shown_and_not_compared():
    """A mask's ratio counts weights, and half of the weights is not half of the channels."""
    rows = [row(method=DENSE, ratio=0.0, acc=0.9), *cell("a", 0.6, 0.5, 0.4), row(method="lamp", acc=0.8, params=50)]
    assert duels(table(rows)).select("fold", "prune").rows() == [(0.6, 0.5)]
    lines = shown(result_table(table(rows)))
    assert "parameters left 25%" in lines
    assert "parameters not masked 50%" in lines
    assert any(line.startswith("lamp 80.0") for line in lines)
    masked = shown(result_table(table([rows[0], rows[-1]])))
    assert not any(line.startswith("parameters left") for line in masked)
    assert headlines(table([rows[0], rows[-1]]))["gap"].to_list() == [None]


def test_what_was_foretold_against_what_came():
    rows = []
    for name, (fold, l1), (guess_fold, guess_l1) in [
        ("a", (0.9, 0.5), (0.8, 0.4)),  # right
        ("b", (0.6, 0.7), (0.3, 0.5)),  # right
        ("c", (0.4, 0.41), (0.2, 0.1)),  # wrong, but too near to count
        ("d", (0.3, 0.2), (0.0, 0.05)),  # wrong
    ]:
        rows += [row(name, "fold", acc=fold, fidelity=guess_fold), row(name, "l1", acc=l1, fidelity=guess_l1)]
        rows += [
            row(name, "mix+data", acc=0.99, fidelity=0.9),
            row(name, "fold", acc=0.0, fidelity=0.9, stage="repaired"),
        ]
    found = foretold(table(rows))
    assert (found.n, found.gaps, found.sure) == (12, 4, 3)
    assert found.sign == pytest.approx(2 / 3)
    assert found.gap == pytest.approx(0.8)  # ranks of the gaps 4, 1, 2, 3 and foretold 4, 1, 3, 2
    assert 0 < found.value < 1
    assert foretold(table([row(), row("b"), row("c")])) is None
