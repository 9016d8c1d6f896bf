"""Two sweeps beside each other: which networks are matched, what is told of them, and what is refused."""

import math
from itertools import product
from statistics import fmean, stdev

import polars as pl
import pytest

from pipeline.cells import write_record
from pipeline.results import DENSE, ROWS, Row, RowStore, table
from pipeline.study.claims import FEWEST
from pipeline.study.compare import compare, leading, load_side, sentence
from pipeline.study.sweep import Sweep
from pipeline.study.terminal import comparison_table
from pipeline.tables import UserError
from tests.study.test_summary import shown

NAMES = ("here", "there")
T2, T7 = 4.302653, 2.364624  # Student's t at .975, 2 and 7 degrees of freedom


def rows_of(cell, fold, *, metric="acc", methods=("fold", "l1"), ratios=(0.5,), stages=("raw",), **more):
    """The rows of a cell: uncompressed .9, or 10 as a perplexity; a pruning leaves .1 less than folding."""
    about = {"model": "m", "data": "d", "seed": 0, "epoch": 1, "step": 1, "split": "test", "n": 8, "task": "t", **more}
    dense = 0.9 if metric == "acc" else 10.0
    found = [Row(cell, method=DENSE, ratio=0.0, stage="raw", kind="dense", metric=metric, **{metric: dense}, **about)]
    for method, ratio, stage in product(methods, ratios, stages):
        kind = "fold" if method == "fold" else "prune"
        facts = {"kind": kind, "calibration": "none", "sizes": "uniform", "statistics": "none", "metric": metric}
        value = {metric: fold - 0.1 * (kind == "prune")}
        found.append(Row(cell, method=method, ratio=ratio, stage=stage, **value, **facts, **about))
    return found


def sweep(cells, **more) -> Sweep:
    """A sweep from (settings, what folding leaves) of each cell."""
    lines, rows = [], []
    for number, (settings, fold) in enumerate(cells):
        own = {"cell": f"c-{number}", "state": "done", "reason": "", "seconds": 1.0, "seed": 0, "name": "x"} | settings
        lines.append(own)
        rows += rows_of(own["cell"], fold, **{**more, "seed": own["seed"]})
    return Sweep(pl.DataFrame(lines, infer_schema_length=None), table(rows))


def grid(rho, values, **settings):
    """A cell for each value, at another learning rate each."""
    return [({"optim.lr": 0.1 * 2**i, "optim.sam.rho": rho, **settings}, value) for i, value in enumerate(values)]


def only(found, method="fold"):
    return found.table.filter(pl.col("method") == method).row(0, named=True)


def test_the_difference_is_over_pairs_of_recipes_with_its_interval():
    a, b = (0.5, 0.4, 0.6), (0.55, 0.43, 0.67)
    found = compare([sweep(grid(0.0, a)), sweep(grid(0.1, b))], NAMES)
    line, each = only(found), [100 * (y - x) for x, y in zip(a, b, strict=True)]
    assert (found.unit, line["n"]) == ("recipe", 3)
    assert (line["a"], line["b"]) == (pytest.approx(50), pytest.approx(55))
    assert line["difference"] == pytest.approx(fmean(each))
    assert line["half"] == pytest.approx(T2 * stdev(each) / math.sqrt(3), rel=1e-6)
    assert found.differing == {"rho": (("0",), ("0.1",))}
    assert (found.cells, found.alone) == ((3, 3), (0, 0))


def test_from_b_to_a_is_the_same_with_the_other_sign():
    one, other = sweep(grid(0.0, (0.5, 0.4, 0.6))), sweep(grid(0.1, (0.55, 0.43, 0.67)))
    there, back = compare([one, other], NAMES).table, compare([other, one], NAMES).table
    assert there["difference"].to_list() == pytest.approx([-d for d in back["difference"]])
    assert there["half"].to_list() == pytest.approx(back["half"].to_list())


def test_fewer_than_three_pairs_have_n_and_no_interval():
    found = compare([sweep(grid(0.0, (0.5, 0.4))), sweep(grid(0.1, (0.6, 0.6)))], NAMES)
    assert (only(found)["n"], only(found)["half"]) == (2, None)
    told = sentence(found)
    assert "n too small for a word on the accuracy that fold leaves at half of the channels, raw: +15.0 points" in told
    assert "2 pairs of recipes; uncompressed +0.0; 8 pairs are the fewest" in told


def test_seeds_are_averaged_where_recipes_are_matched():
    def seeds(rho, values):
        cells = [(own | {"seed": seed}, v + 0.01 * seed) for own, v in grid(rho, values) for seed in (0, 1)]
        return sweep(cells)

    found = compare([seeds(0.0, (0.5, 0.4, 0.6)), seeds(0.1, (0.6, 0.5, 0.7))], NAMES)
    assert (found.unit, only(found)["n"], found.cells) == ("recipe", 3, (6, 6))
    assert only(found)["a"] == pytest.approx(50.5)


def test_networks_of_one_recipe_are_matched_by_their_seeds():
    def seeds(rho, values, first=0):
        return sweep([({"optim.sam.rho": rho, "seed": first + i}, v) for i, v in enumerate(values)])

    found = compare([seeds(0.0, (0.5, 0.4, 0.6)), seeds(0.1, (0.6, 0.6), first=1)], NAMES)
    assert (found.unit, only(found)["n"], found.alone) == ("network", 2, (1, 0))
    assert only(found)["a"] == pytest.approx(50)  # of the two that have a partner
    other = compare([seeds(0.0, (0.5, 0.4)), seeds(0.1, (0.6, 0.6), first=7)], NAMES)
    assert (other.unit, only(other)["n"]) == ("recipe", 1)  # no seed is in both


def test_networks_of_checkpoints_are_matched_by_their_files():
    def nets(size, values):
        cells = [({"checkpoint": f"{i}.pt", "compression.repair_size": size}, v) for i, v in enumerate(values)]
        return sweep(cells)

    found = compare([nets(128, (0.5, 0.4, 0.6)), nets(512, (0.6, 0.5, 0.7))], NAMES)
    assert (found.unit, only(found)["n"]) == ("network", 3)
    assert found.differing == {"repair_size": (("128",), ("512",))}


def test_recipes_without_a_partner_are_counted_and_left_out():
    found = compare([sweep(grid(0.0, (0.5, 0.4, 0.6))), sweep(grid(0.1, (0.6,)))], NAMES)
    assert found.alone == (2, 0)
    assert (only(found)["a"], only(found)["n"]) == (pytest.approx(50), 1)
    assert found.differing["lr"] == (("0.1", "0.2", "0.4"), ("0.1",))


def test_settings_that_change_no_row_match_nothing_and_are_not_told():
    one = sweep(grid(0.0, (0.5,), **{"paths.runs": "a", "compression.methods": "[fold]", "name": "one"}))
    other = sweep(grid(0.1, (0.6,), **{"paths.runs": "b", "compression.methods": "[fold,l1]", "name": "two"}))
    found = compare([one, other], NAMES)
    assert list(found.differing) == ["rho"]
    assert only(found)["n"] == 1


def test_only_what_both_have_is_compared():
    one = sweep(grid(0.0, (0.5,)), methods=("fold", "l1"), ratios=(0.3, 0.5), stages=("raw", "repaired"))
    other = sweep(grid(0.1, (0.6,)), methods=("l1", "l2"), ratios=(0.1 + 0.2, 0.7), stages=("raw",))
    found = compare([one, other], NAMES)
    assert found.table.select("method", "stage", "ratio").rows() == [(DENSE, "raw", 0.0), ("l1", "raw", 0.3)]
    assert leading(found)["method"] == "l1"
    lines = shown(comparison_table(found))
    assert [line for line in lines if line.startswith(("l1", "B less A"))] == [
        "l1, A 40.0",
        "l1, B 50.0",
        "B less A +10.0",
    ]


def test_an_assertion_needs_enough_pairs_and_an_interval_without_0():
    def told(n, *effects, metric="acc", level=0.4):
        values = [level + 0.01 * i for i in range(n)]
        more = [value + effects[i % len(effects)] for i, value in enumerate(values)]
        found = compare([sweep(grid(0.0, values), metric=metric), sweep(grid(0.1, more), metric=metric)], NAMES)
        return sentence(found)

    assert told(FEWEST, 0.1, 0.12).startswith(
        "B in place of A raises the accuracy that fold leaves at half of the channels, raw, by 11.0 ± 0.9 points"
    )
    assert told(FEWEST, 0.1, -0.1).startswith("From A to B there is no sure change of the accuracy")
    assert "n too small" in told(FEWEST - 1, 0.1, 0.12)
    worse = told(FEWEST, 20.0, 21.0, metric="perplexity", level=40.0)
    assert worse.startswith("B in place of A raises the perplexity that fold leaves")
    assert "which is worse" in worse


def test_perplexities_are_compared_by_their_ratio():
    pairs = [(20.0, 40.0), (50.0, 100.0), (30.0, 60.0)]
    sides = [sweep(grid(rho, [pair[i] for pair in pairs]), metric="perplexity") for i, rho in enumerate((0.0, 0.1))]
    found = compare(sides, NAMES)
    assert only(found)["difference"] == pytest.approx(100 * math.log(2))
    assert "B less A +100.0%" in shown(comparison_table(found))
    mean = (20 * 50 * 30) ** (1 / 3)  # geometric
    assert f"fold, A {mean:.1f}" in shown(comparison_table(found))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"metric": "loss"}, "here by accuracy and there by loss: two headlines have no difference"),
        ({"data": "digits"}, r"here \(d\) and there \(digits\) were not measured on one data set"),
        ({"split": "val"}, r"here \(test\) and there \(val\) were not measured on one split"),
        ({"task": "language"}, r"here \(t\) and there \(language\) were not measured on one task"),
        ({"methods": ("l2",)}, r"is in both: here has fold, l1 \(raw\) and there has l2 \(raw\); measure"),
        ({"stages": ("repaired",)}, "no method, stage and ratio is in both"),
        ({"methods": ()}, "there has none"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(other, message):
    with pytest.raises(UserError, match=message):
        compare([sweep(grid(0.0, (0.5,))), sweep(grid(0.1, (0.6,)), **other)], NAMES)


def test_a_side_of_two_models_is_refused():
    one = sweep(grid(0.0, (0.5, 0.6)))
    model = pl.when(pl.col("cell") == "c-1").then(pl.lit("vit")).otherwise("model")
    two = Sweep(one.cells, one.rows.with_columns(model=model))
    with pytest.raises(UserError, match="there has more than one model: m, vit; keep one with --where"):
        compare([one, two], NAMES)


def test_recipes_that_share_no_point_are_refused():
    def at(*points):
        return sweep([({"optim.lr": lr, "optim.sam.rho": rho}, 0.5) for lr, rho in points])

    with pytest.raises(UserError, match="no recipe of here is one of there in all of these: lr, rho; keep values"):
        compare([at((0.1, 0.0), (0.2, 0.1)), at((0.1, 0.1), (0.2, 0.0))], NAMES)


def test_nothing_measured_is_refused():
    empty = Sweep(sweep(grid(0.1, (0.6,))).cells, table([]))
    with pytest.raises(UserError, match="no cell of there that is done has rows yet"):
        compare([sweep(grid(0.0, (0.5,))), empty], NAMES)


def test_rows_without_settings_tell_the_model_alone(tmp_path):
    for model, value in (("resnet", 0.5), ("vit", 0.6)):
        table(rows_of("a", value, model=model)).write_parquet(tmp_path / f"{model}.parquet")
    found = compare([load_side(tmp_path / f"{model}.parquet", print) for model in ("resnet", "vit")], NAMES)
    assert found.differing == {"model": (("resnet",), ("vit",))}
    assert only(found)["difference"] == pytest.approx(10)


def test_rows_without_settings_are_not_compared_with_several_recipes(tmp_path):
    table(rows_of("a", 0.5)).write_parquet(tmp_path / "bare.parquet")
    several = sweep(grid(0.1, (0.5, 0.6)))
    with pytest.raises(UserError, match="there holds 2 networks, and a file of rows without settings tells no recipes"):
        compare([load_side(tmp_path / "bare.parquet", print), several], NAMES)


@pytest.mark.parametrize("given", ["", "a-1", f"a-1/{ROWS}"])
def test_a_side_is_a_folder_of_runs_a_run_or_its_rows(tmp_path, given):
    for cell in ("a-1", "b-2")[: 1 if given == "" else 2]:
        (tmp_path / cell).mkdir()
        write_record(tmp_path / cell, {"optim": {"lr": 0.1}}, "done")
        store = RowStore(tmp_path / cell / ROWS)
        store.add(rows_of(cell, 0.5))
        store.write()
    side = load_side(tmp_path / given, print)
    assert side.cells.select("cell", "state", "optim.lr").rows() == [("a-1", "done", 0.1)]
    assert set(side.rows["cell"]) == {"a-1"}
