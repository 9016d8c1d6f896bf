"""Rows of language models: several texts in one run, several draws of calibration texts, and the table of them."""

import json

import pytest
import torch

from benchmarks.language import Rows, drawn
from benchmarks.language_page import cell, table, texts_of
from pipeline.tables import UserError

TESTS = {"c4": torch.zeros(2, 8, dtype=torch.long), "wikitext": torch.zeros(3, 8, dtype=torch.long)}


def row(plan="obs+data", ratio=0.5, draw=0, windows=32, **perplexity):
    return {"network": "n", "plan": plan, "ratio": ratio, "windows": windows, "draw": draw, "perplexity": perplexity}


def test_a_row_without_one_of_the_texts_is_made_anew_and_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{k: v for k, v in row(c4=90.0).items() if k != "draw"}, row("l2", c4=1.0)]))
    assert Rows(path, {"c4": TESTS["c4"]}).done("obs+data", 0.5, 32, 0)  # the oldest rows say no draw
    rows = Rows(path, TESTS)
    assert not rows.done("obs+data", 0.5, 32, 0)
    rows.add(row(c4=91.0, wikitext=80.0))
    assert rows.done("obs+data", 0.5, 32, 0)
    assert not rows.done("obs+data", 0.5, 32, 1)
    read = json.loads(path.read_text())
    assert [r["perplexity"] for r in read] == [{"c4": 91.0, "wikitext": 80.0}, {"c4": 1.0}]
    assert read[0]["tokens"] == {"c4": 16, "wikitext": 24}


def test_draws_share_no_window_and_too_few_are_refused():
    texts = torch.arange(10)[:, None]
    found = [drawn("data", texts, 3, i).flatten().tolist() for i in range(3)]
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(UserError, match=r"draw 3 of 3 windows needs 12 of data, and there are 10; give more text"):
        drawn("data", texts, 3, 3)


def test_a_cell_has_an_interval_from_three_draws_on():
    """Half of it is t(0.975, 2) sd / sqrt 3 = 4.3027 x 1 / 1.7321 of 89, 90 and 91."""
    assert cell([90.0]) == "90.00"
    assert cell([89.0, 91.0]) == "90.00"
    assert cell([89.0, 90.0, 91.0]) == "90.00 ± 2.48"
    assert cell([]) == ""


def test_every_text_has_a_table_of_the_rows_that_were_measured_on_it():
    dense = {**row("dense", 0.0, c4=35.0, wikitext=33.0), "tokens": {"c4": 100, "wikitext": 200}}
    rows = [row("dense", 0.0, windows=8, c4=35.0), dense, row("l2", 0.2, c4=100.0)]
    rows += [row(draw=i, c4=90.0 + i, wikitext=80.0) for i in range(3)]
    rows[0]["tokens"] = {"c4": 100}
    assert texts_of(rows) == ["c4", "wikitext"]
    assert table(rows, "c4") == [
        "### n on c4: dense 35.00, 100 tokens",
        "",
        "| method | texts | 20% gone | 50% gone |",
        "|---|---|---|---|",
        "| l2 |  | 100.00 |  |",
        "| obs+data | 3 x 32 |  | 91.00 ± 2.48 |",
    ]
    assert table(rows, "wikitext")[0] == "### n on wikitext: dense 33.00, 200 tokens"
    assert table(rows, "wikitext")[4:] == ["| obs+data | 3 x 32 | 80.00 ± 0.00 |"]
