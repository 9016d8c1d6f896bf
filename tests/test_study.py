"""Gap, win rate and headline against numbers made by hand."""

import math

import polars as pl
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from pipeline.results import DENSE, Row, table
from pipeline.study import (
    dense_accuracy,
    duels,
    foretold,
    gaps,
    headlines,
    is_folding,
    is_mask,
    last_measurement,
    plot_curves,
    print_table,
    result_table,
)


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


def test_labels_that_start_with_folding_are_folding():
    labels = pl.DataFrame({"method": ["fold", "fold-writers", "l1", "unfold", "random"]})
    assert labels.select(is_folding(pl.col("method"))).to_series().to_list() == [True, True, False, False, False]


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
    assert "win rate 67% 100%" in lines
    assert "n cells 3 1" in lines
    assert "1 measurements failed: why" in lines


def test_nothing_measured_still_gives_a_table_and_a_picture(tmp_path):
    rows = table([row(method=DENSE, ratio=0.0, acc=None, status="failed", reason="why")])
    assert dense_accuracy(rows) is None
    result_table(rows, duel=True)
    plot_curves(rows, tmp_path / "empty.png", "title")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_a_panel_starts_from_the_networks_that_have_its_stage(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    both = [row("a", DENSE, 0.0, 0.9), row("b", DENSE, 0.0, 0.5), row("a"), row("b"), row("a", stage="repaired")]
    plot_curves(table(both), tmp_path / "curves.png", "title")
    starts = [panel.lines[0].get_ydata()[0] for panel in drawn[0].axes]
    dotted = [panel.lines[-1].get_label() for panel in drawn[0].axes]
    assert starts == pytest.approx([70, 90])
    assert dotted == ["dense 70.0%", "dense 90.0%"]


def test_masks_are_shown_and_not_compared():
    """Half of the weights is not half of the channels."""
    labels = pl.DataFrame({"method": ["lamp", "n_m", "n_m-8", "random", "random_mask", "l1"]})
    assert labels.select(is_mask(pl.col("method"))).to_series().to_list() == [True, True, True, False, True, False]
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
    assert 0 < found.acc < 1
    assert foretold(table([row(), row("b"), row("c")])) is None
