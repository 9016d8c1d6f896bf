import polars as pl
import pytest

from pipeline.results import Row, table
from pipeline.study.dashboard import families, report, sections, spans_decades, workspaces
from pipeline.study.logged import curve_numbers, epoch_numbers, method_tables
from pipeline.study.sweep import Sweep
from pipeline.tables import UserError

pytest.importorskip("wandb_workspaces")
# wandb-workspaces 0.4.13 warns about its own code when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")

KINDS = {"dense": "dense", "fold": "fold"}
ABOUT = {"data": "digits", "seed": 0, "step": 1, "calibration": "none", "sizes": "uniform", "statistics": "none"}


def rows_of(cell: str, model: str = "toy", metric: str = "acc", methods: tuple = ("fold", "l1", "l2"), epochs: int = 1):
    """Rows of one cell, where fold leaves .7 of .9 at ratio .5, l1 .5 and l2 .4."""
    values = {"fold": 0.7, "l1": 0.5, "l2": 0.4}

    def row(method, ratio, stage, value, epoch, split):
        about = {**ABOUT, "kind": KINDS.get(method, "prune"), "metric": metric, metric: value}
        return Row(cell, model, epoch=epoch, method=method, ratio=ratio, stage=stage, split=split, **about)

    def measured(epoch, split):
        yield row("dense", 0.0, "raw", 0.9, epoch, split)
        for method in methods:
            for stage in ("raw", "repaired"):
                yield row(method, 0.5, stage, values[method], epoch, split)

    on_the_way = [r for epoch in range(1, epochs + 1) for r in measured(epoch, "val")]
    return [*on_the_way, *measured(epochs, "test")]


def sweep_of(*cells: tuple[list[Row], dict]) -> Sweep:
    lines = [
        {"cell": rows[0].cell, "state": "done", "reason": "", "seconds": 1.0, "model.name": rows[0].model, **told}
        for rows, told in cells
    ]
    return Sweep(pl.DataFrame(lines), table([row for rows, _ in cells for row in rows]))


def two(**told) -> Sweep:
    """Two cells of one model that differ in their learning rate, seed and folder."""
    first = {"optim.lr": 0.1, "seed": 0, "data.root": "/a", "compression.round_to": 1}
    second = {"optim.lr": 0.001, "seed": 1, "data.root": "/b", "compression.round_to": 8}
    return sweep_of((rows_of("a", **told), first), (rows_of("b", **told), second))


def names(panels: list, kind: str, field: str) -> list:
    return [getattr(panel, field) for panel in panels if type(panel).__name__ == kind]


def test_every_curve_of_every_method_and_stage_has_a_panel() -> None:
    (family,) = families(two())
    drawn = {name for y in names(sections(family)["What is left, over the ratio"], "LinePlot", "y") for name in y}
    assert drawn == {f"curve_test/{m}/acc_{s}" for m in ("fold", "l1", "l2") for s in ("raw", "repaired")}
    by_recipe = names(sections(family)["Each method"], "LinePlot", "groupby")
    assert by_recipe == ["Group"] * 6, "seeds of one recipe are one line"


def test_the_settings_are_those_that_differ_and_say_how_a_run_was_trained() -> None:
    (family,) = families(two())
    assert dict(family.settings) == {"optim.lr": True}
    (columns,) = names(sections(family)["Settings"], "ParallelCoordinatesPlot", "columns")
    assert [column._to_model().accessor for column in columns] == [
        "config:optim.value.lr",
        "summary:compress_test/dense/acc",
        "summary:foldability_test/folding_repaired",
        "summary:foldability_test/gap_repaired",
    ]


def test_a_section_that_the_runs_have_nothing_for_is_left_out() -> None:
    alike = sweep_of((rows_of("a", methods=("l1",), epochs=0), {"seed": 0}))
    (family,) = families(alike)
    assert list(sections(family)) == ["What is left, over the ratio", "Each method", "Side by side"]
    assert family.goal == "foldability_test/l1_repaired"
    (family,) = families(two(epochs=2))
    assert "While training" in sections(family)


def test_every_model_and_every_metric_has_a_workspace_and_a_part_of_the_report() -> None:
    texts = rows_of("c", "llama", "perplexity")
    mixed = sweep_of((rows_of("a"), {}), (rows_of("b", "vit"), {}), (texts, {}))
    found = families(mixed)
    assert [(f.model, f.metric.name) for f in found] == [("toy", "acc"), ("vit", "acc"), ("llama", "perplexity")]
    made = workspaces(found, "p")
    assert [view.runset_settings.filters for view in made] == [
        f"Config('model.value.name') = '{m}'" for m in ("toy", "vit", "llama")
    ]
    assert [view.runset_settings.order[0].ascending for view in made] == [False, False, True], "the best run is first"
    parts = [block.text for block in report(found, "p").blocks if type(block).__name__ == "H1"]
    assert parts == ["toy, accuracy", "vit, accuracy", "llama, perplexity"]


def test_a_report_is_made_without_asking_a_server(monkeypatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "Api", lambda *_, **__: pytest.fail("a server was asked"))
    spec = report(families(two()), "p")._to_model().spec.model_dump(by_alias=True, exclude_none=True)
    runsets = [run for block in spec["blocks"] for run in block.get("metadata", {}).get("runSets", [])]
    assert runsets
    assert {key["name"] for run in runsets for key in run["grouping"]} == {"group"}


def test_runs_without_rows_are_refused() -> None:
    with pytest.raises(UserError, match="no cell that is done has rows yet"):
        families(Sweep(two().cells, table([])))


def test_an_axis_is_logarithmic_only_where_numbers_above_zero_span_decades() -> None:
    assert spans_decades([0.1, 0.01])
    assert not any(map(spans_decades, ([0.1, 0.05], [0.0, 0.1], ["sgd", "adam"], [True, False], [1.0], [None, None])))


def test_a_curve_begins_at_the_dense_network_and_a_failed_row_leaves_a_hole() -> None:
    rows = table(rows_of("a")).filter(split="test")
    first, last = curve_numbers(rows)
    assert first["curve_test/ratio"] == 0.0
    assert first["curve_test/fold/acc_raw"] == first["curve_test/l1/acc_repaired"] == 0.9
    assert first["curve_test/gap/acc_raw"] == 0.0
    assert last["curve_test/ratio"] == 0.5
    assert last["curve_test/fold/acc_raw"] == 0.7
    assert last["curve_test/gap/acc_raw"] == pytest.approx(0.7 - 0.5)
    broken = rows.with_columns(acc=pl.when(pl.col("method") != "fold").then("acc"))
    assert "curve_test/fold/acc_raw" not in {name for numbers in curve_numbers(broken) for name in numbers}


def test_a_curve_is_that_of_the_last_epoch() -> None:
    early = table(rows_of("a", epochs=1)).filter(split="val").with_columns(acc=pl.lit(0.1))
    rows = pl.concat([early, table(rows_of("a", epochs=2)).filter(pl.col("epoch") == 2)])
    assert {line["curve/fold/acc_raw"] for line in curve_numbers(rows) if "curve/ratio" in line} == {0.9, 0.7}


def test_a_method_has_a_table_with_a_line_for_each_ratio() -> None:
    found = method_tables(table(rows_of("a")).filter(split="test"))
    assert list(found) == ["tables_test/fold", "tables_test/l1", "tables_test/l2"]
    lines = found["tables_test/l1"]
    assert lines.columns == ["ratio", "params", "macs", "acc_raw", "acc_repaired"]
    assert lines.select("ratio", "acc_raw", "acc_repaired").rows() == [(0.5, 0.5, 0.5)]


def test_the_best_of_each_side_and_the_gap_are_logged_beside_the_methods() -> None:
    logged = epoch_numbers([row for row in rows_of("a") if row.split == "test"])
    areas = {name: logged[f"foldability_test/{name}_raw"] for name in ("fold", "folding", "l1", "l2", "pruning", "gap")}
    expected = {"fold": 0.8, "folding": 0.8, "l1": 0.7, "l2": 0.65, "pruning": 0.7, "gap": 0.1}
    assert areas == pytest.approx(expected)
