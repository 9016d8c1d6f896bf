"""The front is what its definition says, lines of chains are whole, and the picture shows both."""

import random

import polars as pl
from matplotlib.figure import Figure
from rich.console import Console

from pipeline.results import Row, table
from pipeline.study.chains import chain_table, costs, front, over_cells, paths, time_table, tree
from pipeline.study.pictures import plot_pareto

CHAINS = {"": (0.9, 400), "f": (0.8, 200), "f > r": (0.88, 200), "f > r > q": (0.85, 50), "q": (0.7, 100)}


def rows() -> pl.DataFrame:
    fixed = {"cell": "c", "model": "m", "data": "d", "seed": 0, "epoch": 1, "step": 1, "ratio": 0.5, "split": "test"}
    more = {"params": 100, "macs": 5_000_000, "seconds": 1.0, "unlabelled": 7, "labelled": 0, "n": 20, "metric": "acc"}
    return table(
        [
            Row(**fixed, method="m", stage=chain, chain=chain, acc=acc, bytes=size * 1000, **more)
            for chain, (acc, size) in CHAINS.items()
        ]
    )


def times() -> pl.DataFrame:
    at = {"cell": "c", "runtime": "eager", "batch_size": 1, "speedup": 2.0, "reason": ""}
    return pl.DataFrame([{**at, "chain": chain, "median": size / 1e5} for chain, (_, size) in CHAINS.items()])


def test_the_front_is_all_that_nothing_beats():
    draw = random.Random(0)
    for upward in (True, False):
        for _ in range(50):
            points = [(draw.randint(0, 6), draw.randint(0, 6)) for _ in range(12)]
            costs, values = zip(*points, strict=True)
            sign = 1 if upward else -1

            def beats(one, other, sign=sign):
                better = one[0] <= other[0] and sign * one[1] >= sign * other[1]
                return better and one != other

            expected = {p for p in points if not any(beats(other, p) for other in points)}
            assert {points[i] for i in front(costs, values, upward)} == expected


def test_a_file_that_is_a_line_shorter_is_no_smaller_network():
    assert front([97.0, 97.1, 120.0], [0.75, 0.94, 0.96]) == [1, 2]
    assert front([97.0, 99.0], [0.75, 0.94]) == [0, 1]


def test_a_chain_is_a_line_from_the_beginning():
    assert paths(list(CHAINS)) == {"f > r > q": ["", "f", "f > r", "f > r > q"], "q": ["", "q"]}
    assert paths(["a > b", "a > b > c"]) == {"a > b > c": ["a > b", "a > b > c"]}, (
        "a network that is compressed already"
    )
    assert tree(list(CHAINS)) == [
        ("", "uncompressed"), ("f", "  f"), ("f > r", "  > r"), ("f > r > q", "  > q"), ("q", "  q")
    ]  # fmt: skip


def test_the_table_marks_the_front_and_says_what_was_seen():
    console = Console(width=140)
    with console.capture() as capture:
        console.print(chain_table(rows()))
        console.print(time_table(rows(), times()))
    shown = capture.get()
    assert [line.split()[1:4] for line in shown.splitlines() if "*" in line] == [
        ["uncompressed", "*", "│"], [">", "r", "*"], [">", "q", "*"]
    ]  # fmt: skip
    assert "0.5 ms (2.0x)" in shown
    assert "50.0" in shown


def test_a_time_is_the_whole_network_s_by_the_speedup_that_was_measured_beside_it():
    slow = times().with_columns(speedup=pl.when(pl.col("chain") != "").then(2.0))
    at = costs(over_cells(rows()), slow)["eager, batch 1, ms"]
    assert at["cost"].to_list() == [4.0, 2.0, 2.0, 2.0, 2.0]


def test_the_picture_has_a_panel_for_each_cost_and_a_line_for_each_chain(tmp_path, monkeypatch):
    kept = []
    real = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (kept.append(self), real(self, *args, **options))
    )
    plot_pareto(rows(), tmp_path / "pareto.png", times())
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    (figure,) = kept
    assert (
        [panel.get_xlabel() for panel in figure.axes]
        == ["file, kB", "eager, batch 1, ms"]
        == list(costs(over_cells(rows()), times()))
    )
    first = figure.axes[0]
    lines = [tuple(line.get_xdata()) for line in first.lines]
    assert lines[:2] == [(400.0, 200.0, 200.0, 50.0), (400.0, 100.0)]
    assert lines[-1] == (50.0, 200.0, 400.0), "the front"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["f > r > q", "q", "the front"]
