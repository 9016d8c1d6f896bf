"""The page in a headless Chromium: what it draws against what Python computes, filters, safety, its three widths."""

import base64
import gzip
import math
import os
import random
import shutil
from itertools import product

import polars as pl
import pytest

from pipeline.results import Row, table
from pipeline.study.effects import effects
from pipeline.study.intervals import needed
from pipeline.study.page.columns import Places, codes, floats
from pipeline.study.page.families import families
from pipeline.study.page.files import effects_table, write_cells, write_pictures
from pipeline.study.page.foretold import data_of, drawn
from pipeline.study.page.html import packed_text, page, places_of
from pipeline.study.sweep import Sweep
from pipeline.study.sweep import joined as joined_rows
from pipeline.tables import UserError

EVIL = "<img src=x onerror='window.broken=1'></script>"
SECTIONS = ("curves", "settings", "effects", "map", "noise", "prediction", "size", "parallel", "table")


def made(metric: str = "acc", model: str = "toy", seeds: int = 2) -> Sweep:
    """A factorial of lr, momentum (with sgd alone), decay and an evil text, in two seeds, with one recipe missing.

    sam flips its sign over the optimizer. A quarter of the ratios and stages lacks pruning.
    """
    rng = random.Random(0)
    grid = product(("sgd", "adam"), (0.1, 0.01, 0.001), (0.0, 0.05), (EVIL, "b & c"), range(seeds))
    cells, rows = [], []
    for i, (optim, lr, rho, text, seed) in enumerate(list(grid)[seeds:]):
        cell = f"{model}-{i:03}"
        momentum = 0.9 if optim == "sgd" else None
        settings = {
            "optim.name": optim,
            "optim.lr": lr,
            "optim.momentum": momentum,
            "optim.rho": rho,
            "data.text": text,
        }
        cells.append({"cell": cell, "state": "done", "reason": "", "seconds": 1.0, "seed": seed, **settings})
        lift = 0.1 * (rho > 0) * (1 if optim == "sgd" else -1) + 0.02 * math.log10(lr) + 0.02 * (text == EVIL)
        rows += measured(cell, model, metric, 0.6 + lift, rng)
    return Sweep(pl.DataFrame(cells), table(rows))


def measured(cell: str, model: str, metric: str, level: float, rng: random.Random) -> list[Row]:
    context = {"model": model, "data": "digits", "seed": 0, "epoch": 1, "step": 10, "split": "test", "metric": metric}
    about = {"calibration": "none", "sizes": "uniform", "statistics": "none"}

    def row(method: str, ratio: float, stage: str, value: float) -> Row:
        kind = {"dense": "dense", "fold": "fold"}.get(method, "prune")
        value = value if metric == "acc" else 10 * math.exp(3 * (1 - value))
        size = {"params": int(1000 * (1 - ratio) ** 2), "macs": int(9000 * (1 - ratio) ** 2)}
        return Row(
            cell, **context, **about, **size, method=method, ratio=ratio, stage=stage, kind=kind, **{metric: value}
        )

    found = [row("dense", 0.0, "raw", level + 0.2 + rng.gauss(0, 0.01))]
    for method, ratio, stage in product(("fold", "l1"), (0.25, 0.5), ("raw", "repaired")):
        lost = ratio / 4 + 0.1 * (stage == "raw") + 0.05 * (method == "l1")
        if method == "fold" or rng.random() < 0.9:
            found.append(row(method, ratio, stage, level - lost + rng.gauss(0, 0.02)))
    return found


def joined(*sweeps: Sweep) -> Sweep:
    return Sweep(pl.concat(s.cells for s in sweeps), pl.concat(s.rows for s in sweeps))


def written(sweep: Sweep, folder, speeds: pl.DataFrame | None = None):
    path = folder / "index.html"
    speeds = pl.DataFrame() if speeds is None else speeds
    path.write_text(page(f"title {EVIL}", sweep, families(sweep), Places({}, {}), speeds))
    return path


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    binary = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no Chromium is found; put one on the PATH, or name it in CHROMIUM")
    options = ["--no-sandbox", "--enable-unsafe-swiftshader"]  # a software renderer for the parallel coordinates
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=options)
        yield browser
        browser.close()


@pytest.fixture
def shown(chromium, tmp_path):
    """A page in a tab: errors and requests are kept, and refused at the end."""
    tabs = []

    def show(sweep: Sweep, width: int = 1366, **more):
        tab = chromium.new_page(viewport={"width": width, "height": 800})
        tab.wrong = []
        tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
        tab.on("console", lambda message: message.type == "error" and tab.wrong.append(message.text))
        tab.on("request", lambda request: request.url.startswith("http") and tab.wrong.append(request.url))
        tab.goto(written(sweep, tmp_path, **more).as_uri())
        tab.wait_for_selector("#shown:not(:empty)")
        tabs.append(tab)
        return tab

    yield show
    for tab in tabs:
        assert tab.wrong == []
        tab.close()


def scrolled(tab, *names: str) -> None:
    """Scroll to these sections, by default all, so that their pictures are drawn."""
    for name in names or SECTIONS:
        tab.evaluate("name => document.getElementById(name).scrollIntoView()", name)
        tab.wait_for_function("name => !dirty.has(name)", arg=name)


def traces(tab, section: str) -> list[list[dict]]:
    """The traces of each picture of a section, with arrays as lists."""
    return tab.evaluate(
        """section => [...document.querySelectorAll(`#${section} .js-plotly-plot`)].map((div) => div.data.map(
        ({ name, x, y, z, error_y, text, dimensions }) => (
        { name, x, y, z, half: error_y?.array, text, values: dimensions?.map((one) => one.values) })))""",
        section,
    )


def close(one: float | None, other: float | None) -> bool:
    return (one is None and other is None) or one == pytest.approx(other, abs=2e-3, rel=2e-4)


def points(x, y) -> list[tuple[float, float]]:
    """The points of a picture in order."""
    return sorted(zip(x, y, strict=True))


def close_to(wanted: list[tuple[float, float]]) -> list:
    return [pytest.approx(pair, rel=1e-5) for pair in wanted]


SHARED = made()


@pytest.fixture(autouse=True)
def few_trees(monkeypatch) -> None:
    """A forest takes seconds."""
    monkeypatch.setattr("pipeline.study.page.foretold.TREES", 2)


@pytest.mark.parametrize("metric", ["acc", "perplexity"])
def test_the_browser_finds_the_effects_that_python_finds(shown, metric) -> None:
    """Float32 columns, matched pairs, halves where a sign flips, intervals, Holm: all are computed a second time."""
    sweep = SHARED if metric == "acc" else made(metric)
    tab = shown(sweep)
    (family,) = families(sweep)
    for stage, ratio in product((0, 1), (0, 1, 2)):
        tab.evaluate("ratio => { state.ratio = ratio; redraw(); }", ratio)
        got = tab.evaluate("stage => view.effects(stage).map((row) => ({ ...row, over: undefined }))", stage)
        want = effects(family.found, ["repaired", "raw"][stage], [0.25, 0.5, None][ratio])
        assert len(got) == len(want) > 15
        keys = ("setting", "low", "high", "outcome", "where")
        got = {tuple(row[key] for key in keys): row for row in got}
        for row in want.iter_rows(named=True):
            own = got[tuple(row[key] for key in keys)]
            assert own["n"] == row["n"]
            assert close(own["mean"], row["effect"])
            assert close(own["half"], row["half"])
            assert close(own["p_holm"], row["p_holm"])
        assert any("optim=" in row["where"] for row in want.filter(pl.col("setting") == "rho").iter_rows(named=True))


def test_curves_are_means_over_recipes_with_their_intervals(shown) -> None:
    tab = shown(SHARED)
    (family,) = families(SHARED)
    (panel, _) = traces(tab, "curves")
    fold = next(trace for trace in panel if trace["name"] == "fold")
    methods = family.found.methods.filter((pl.col("stage") == "repaired") & (pl.col("method") == "fold"))
    recipes = methods.group_by("recipe", "ratio").agg(pl.col("value").mean())
    want = recipes.group_by("ratio").agg(pl.col("value").mean(), n=pl.len(), sd=pl.col("value").std()).sort("ratio")
    assert fold["x"] == want["ratio"].to_list()
    assert fold["y"] == pytest.approx(want["value"].to_list(), rel=1e-5)
    n, sd = want["n"][0], want["sd"][0]
    assert n == 23  # 24 recipes, one is missing
    assert fold["half"][0] == pytest.approx(2.0739 * sd / math.sqrt(n), rel=1e-4)  # t at .975, 22 degrees
    assert "23 recipes, 46 cells" in fold["text"][0]
    assert [trace["y"] for trace in panel if trace["name"] == "chance 10.0"] == [[10, 10]]  # digits have ten classes


def test_a_task_without_chance_has_none() -> None:
    (family,) = families(made("perplexity"))
    assert family.chance is None


def four_recipes() -> Sweep:
    """Two learning rates x SAM or none: two matched pairs for each setting."""
    few = (pl.col("optim.name") == "adam") & (pl.col("data.text") == EVIL) & (pl.col("optim.lr") < 0.05)
    cells = SHARED.cells.filter(few)
    return Sweep(cells, SHARED.rows.join(cells, on="cell", how="semi"))


def test_nothing_of_fewer_than_three_has_an_interval(shown) -> None:
    tab = shown(four_recipes())
    scrolled(tab, "effects", "settings")
    assert tab.evaluate("view.recipes(0).length") == 4
    assert set(tab.evaluate("view.effects(0).map((row) => row.n)")) == {2}
    drawn = [trace for name in ("effects", "settings") for panel in traces(tab, name) for trace in panel]
    texts = [text for trace in drawn for text in trace["text"] or []]
    assert len(texts) > 20
    assert all("n too small for an interval" in text and "±" not in text for text in texts)
    assert {half for trace in drawn for half in trace["half"] or []} == {0}
    assert "too few" not in tab.inner_text("#lead")
    assert "±" in tab.inner_text("#lead")
    assert "no setting has three matched pairs" in tab.inner_text("#noise")
    tab.evaluate("state.out[view.part.settings.findIndex((one) => one.name === 'lr')].add(0); redraw()")
    scrolled(tab, "curves", "size")
    assert tab.evaluate("view.recipes(0).length") == 2
    assert "; mean of 2 recipes (n too small for an interval)." in tab.inner_text("#lead")
    assert "±" not in tab.inner_text("#lead")
    (panel, _) = traces(tab, "curves")
    assert {half for trace in panel for half in trace["half"] or []} == {0}
    assert "correlation -, n too small" in tab.inner_text("#size")


def test_a_filter_acts_on_all_pictures_at_once(shown) -> None:
    tab = shown(SHARED)
    scrolled(tab)
    before = {name: traces(tab, name) for name in SECTIONS[:-1]}
    rows = tab.locator("#table tbody tr").count()
    tab.get_by_label("adam", exact=True).uncheck()
    scrolled(tab)
    assert "optim = sgd" in tab.locator("#shown").inner_text()
    assert "11 recipes, 22 cells" in tab.locator("#shown").inner_text()
    after = {name: traces(tab, name) for name in SECTIONS[:-1]}
    assert [name for name in before if before[name] == after[name]] == []
    assert tab.locator("#table tbody tr").count() == 22 < rows
    tab.get_by_role("button", name="Reset filters").click()
    scrolled(tab, "curves")
    assert traces(tab, "curves") == before["curves"]


def test_the_ratio_and_the_stages_are_chosen_with_the_keyboard(shown) -> None:
    tab = shown(SHARED)
    tab.locator("select[name=ratio]").focus()
    tab.keyboard.press("ArrowDown")
    assert "area under the curve" in tab.locator("#shown").inner_text()
    tab.locator("input[name=stage]").first.focus()
    tab.keyboard.press("Space")
    assert len(traces(tab, "curves")) == 1
    tab.locator("input[name=stage]").nth(1).focus()
    tab.keyboard.press("Space")
    assert tab.locator("#curves .none").inner_text() == "Choose a stage."


def test_a_picture_is_drawn_when_it_is_scrolled_to(shown) -> None:
    tab = shown(SHARED)
    assert len(traces(tab, "curves")) == 2
    assert tab.locator("#parallel .js-plotly-plot").count() == 0
    scrolled(tab, "parallel")
    assert tab.locator("#parallel .js-plotly-plot").count() == 1


def test_dragging_along_an_axis_filters_the_table(shown) -> None:
    tab = shown(SHARED)
    scrolled(tab, "parallel")
    ends = tab.evaluate(
        """async () => {
        const div = document.querySelector("#parallel .js-plotly-plot"), last = div.data[0].dimensions.length - 1;
        const values = [...div.data[0].dimensions[last].values].sort((a, b) => b - a);
        await Plotly.restyle(div, `dimensions[${last}].constraintrange`, [[values[2], values[0]]]);
        return values.length; }"""
    )
    assert ends == 23
    assert tab.locator("#table tbody tr").count() == 6  # two seeds of the best three recipes
    assert "inside of the ranges" in tab.locator("#table .note").inner_text()


@pytest.mark.parametrize("width", [390, 1366])
def test_the_page_is_no_wider_than_its_window(shown, width) -> None:
    tab = shown(SHARED, width)
    scrolled(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.locator("#filters").evaluate("(details) => details.open") == (width > 900)


def test_texts_of_the_user_are_texts(shown) -> None:
    """A setting that is a tag is shown as it is, on the page, in pictures and in the table, and never runs."""
    tab = shown(SHARED)
    scrolled(tab, "settings", "parallel")
    assert tab.evaluate("window.broken") is None
    assert tab.locator("img[src=x]").count() == 0
    assert tab.title() == f"title {EVIL}"
    assert tab.get_by_label(EVIL).count() == 1
    assert "<img src=x" in tab.locator("#table tbody").inner_text()
    assert "<img" in tab.locator("#settings").inner_text()


def test_models_are_apart_and_the_largest_is_chosen_first(shown) -> None:
    few = made(model="small", seeds=1)
    sweep = joined(few, SHARED)
    tab = shown(sweep)
    assert "Shown: toy on digits;" in tab.locator("#shown").inner_text()
    assert "46 networks" in tab.locator("#answer li").first.inner_text()
    tab.locator("select[name=part]").select_option(label="small on digits")
    assert "23 recipes, 23 cells" in tab.locator("#shown").inner_text()
    assert "23 networks" in tab.locator("#answer li").first.inner_text()
    scrolled(tab, "noise")
    assert "no recipe that is kept was run with two seeds" in tab.locator("#noise").inner_text()


def test_a_perplexity_has_a_log_axis_and_its_best_cell_is_the_lowest(shown) -> None:
    tab = shown(made("perplexity"))
    scrolled(tab, "curves")
    assert tab.evaluate("document.querySelector('#curves .js-plotly-plot').layout.yaxis.type") == "log"
    column = tab.locator("#table tbody tr td:nth-child(2)").all_inner_texts()
    values = [float(text) for text in column]
    assert values == sorted(values)
    (family,) = families(made("perplexity"))
    best = family.found.at("repaired", 0.5)["fold"].min()
    assert values[0] == pytest.approx(math.exp(best / 100), rel=1e-3)


def test_what_there_is_no_data_for_says_why(shown) -> None:
    cells = SHARED.cells.with_columns(pl.lit("running").alias("state"))
    tab = shown(Sweep(cells, SHARED.rows))
    scrolled(tab)
    reasons = [tab.locator(f"#{name} .none").all_inner_texts() for name in SECTIONS]
    assert reasons == [["No cell of toy on digits that is done has rows yet."]] * len(SECTIONS)


def test_one_cell_alone_makes_a_page(shown) -> None:
    sweep = Sweep(SHARED.cells.head(1), SHARED.rows.filter(pl.col("cell") == SHARED.cells["cell"][0]))
    tab = shown(sweep)
    scrolled(tab, "settings", "effects", "map", "noise")
    for name in ("settings", "effects", "map", "noise"):
        assert tab.locator(f"#{name} .none").count() > 0
    assert len(traces(tab, "curves")) == 2


def test_times_of_networks_stand_over_what_is_left(shown) -> None:
    speeds = pl.DataFrame(
        {"cell": ["toy-000", "toy-001"], "method": ["fold"] * 2, "ratio": [0.5] * 2, "median": [0.002, 0.004]}
    ).with_columns(runtime=pl.lit("eager"), batch_size=pl.lit(8), device=pl.lit("cpu"))
    tab = shown(SHARED, speeds=speeds)
    scrolled(tab, "size")
    (timed,) = traces(tab, "size")[-1]
    assert timed["x"] == pytest.approx([3.0])
    titles = tab.evaluate(
        "[...document.querySelectorAll('#size .js-plotly-plot')].map((d) => d.layout.xaxis.title.text)"
    )
    assert titles[-1] == "milliseconds (eager, batch 8, cpu)"


def test_the_picture_and_the_table_of_the_prediction_are_those_of_python(shown) -> None:
    tab = shown(SHARED)
    scrolled(tab, "prediction")
    (family,) = families(SHARED)
    made_of = family.prediction
    line, said = drawn(made_of)
    assert (line["features"], line["model"], line["target"]) == ("settings + base", "forest", "fold")
    (panel,) = traces(tab, "prediction")
    assert points(panel[1]["x"], panel[1]["y"]) == close_to(points(said.tolist(), made_of.cells["fold"].to_list()))
    rows = tab.locator("#prediction tbody tr").all_inner_texts()
    assert len(rows) == 2 + 2 * 3  # the mean, always fold, and two models of three sets of features
    wanted = f"{line['r2']:.2f} ({line['r2_low']:.2f} to {line['r2_high']:.2f})"
    assert wanted in next(row for row in rows if "settings and uncompressed value, forest" in row)
    assert f"{made_of.lines[0].line['n']} networks of 23 recipes" in tab.locator("#prediction .said").inner_text()


def test_too_few_recipes_are_told_how_many_are_wanted(shown) -> None:
    recipes = SHARED.cells.filter(pl.col("optim.name") == "sgd")
    tab = shown(Sweep(recipes, SHARED.rows.join(recipes.select("cell"), on="cell", how="semi")))
    scrolled(tab, "prediction")
    text = tab.locator("#prediction .none").inner_text()
    assert "11 recipes have all features; prediction needs 20: measure 9 more" in text
    assert tab.locator("#prediction tbody").count() == 0


def numbered() -> Sweep:
    """SHARED with sharpness, values on corrupted pictures, and a feature of the checkpoint."""
    rng = random.Random(1)
    rows = SHARED.rows.with_columns(
        sharpness_sam=pl.Series([rng.random() for _ in range(len(SHARED.rows))]), corrupted=pl.col("acc") * 0.7
    )
    height = pl.Series("feature.height_50", [rng.random() for _ in range(len(SHARED.cells))])
    return Sweep(SHARED.cells.with_columns(height), rows)


def test_sharpness_corruption_and_features_are_axes(shown) -> None:
    sweep = numbered()
    tab = shown(sweep)
    scrolled(tab, "size")
    across, up = (tab.locator(f"select[name=size-{key}]") for key in "xy")
    titles = across.locator("option").all_inner_texts()
    assert "height_50, uncompressed" in titles
    across.select_option(label="SAM sharpness, uncompressed")
    up.select_option(label="value on corrupted pictures, best folding")
    got = traces(tab, "size")[0][0]
    (family,) = families(sweep)
    dense = sweep.rows.filter(pl.col("method") == "dense").select("cell", "sharpness_sam")
    folded = sweep.rows.filter(
        (pl.col("method") == "fold") & (pl.col("stage") == "repaired") & (pl.col("ratio") == 0.5)
    ).select("cell", left=100 * pl.col("corrupted"))
    recipe = family.found.methods.select("cell", "recipe").unique()
    want = dense.join(folded, on="cell").join(recipe, on="cell").drop("cell").group_by("recipe").mean()
    assert points(got["x"], got["y"]) == close_to(points(want["sharpness_sam"], want["left"]))
    tab.get_by_label("adam", exact=True).uncheck()
    scrolled(tab, "size")
    assert len(traces(tab, "size")[0][0]["x"]) == 11


def test_numbers_on_networks_are_features_of_the_prediction() -> None:
    (family,) = families(numbered())
    assert set(family.numbers.columns) == {"cell", "sharpness_sam", "corrupted", "height_50"}
    assert drawn(family.prediction).line["features"] == "settings + base + extra"
    assert data_of(family.prediction) == ["SAM sharpness", "value on corrupted pictures"]
    lacking = numbered()
    lacking = Sweep(lacking.cells.with_columns(pl.lit(None, pl.Float64).alias("feature.height_50")), lacking.rows)
    assert "height_50" not in families(lacking)[0].prediction.cells.columns


def test_paper_shows_every_picture(shown) -> None:
    tab = shown(SHARED)
    tab.pdf()
    assert tab.evaluate("[...dirty].join()") == ""


def test_quantiles_and_pairs_needed_are_those_of_python(shown) -> None:
    from scipy.special import stdtrit

    tab = shown(SHARED)
    for df in (1, 2, 7, 30, 999):
        assert tab.evaluate("df => quantile(df)", df) == pytest.approx(stdtrit(df, 0.975), rel=1e-6)
    for sd in (0.1, 1.0, 4.77, 20.0):
        assert tab.evaluate("sd => needed(sd)", sd) == needed(sd)


def test_columns_take_the_smallest_type_and_keep_what_is_unknown() -> None:
    assert [codes(pl.Series([0, top]))[0] for top in (255, 256, 70_000)] == ["u1", "u2", "u4"]
    assert codes(pl.Series([], dtype=pl.UInt32)) == ("u1", "")
    assert floats(pl.Series([1.0, None])) == ("f4", "AACAPwAAwH8=")


def test_the_answer_can_be_read_without_scripts(chromium, tmp_path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(written(SHARED, tmp_path).as_uri())
    assert families(SHARED)[0].sentences[0] in tab.locator("header").inner_text()
    context.close()


def test_data_cannot_end_its_element_and_come_back_whole() -> None:
    packed = packed_text(EVIL)
    assert "<" not in packed
    assert gzip.decompress(base64.b64decode(packed)).decode() == EVIL


def test_links_are_relative_and_addresses_are_addresses(tmp_path) -> None:
    names = ["a b", "c", "d"]
    for name, address in zip(names, ("https://wandb.ai/x/y/runs/a", "javascript:alert(1)", None), strict=True):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if address:
            (tmp_path / "runs" / name / "wandb.url").write_text(f"{address}\n")
    cells = pl.DataFrame({"cell": names})
    found = places_of(Sweep(cells, table([])), tmp_path / "runs", tmp_path / "runs" / "report")
    assert found.folders == {"a b": "../a%20b", "c": "../c", "d": "../d"}
    assert found.wandb == {"a b": "https://wandb.ai/x/y/runs/a"}


def test_pictures_and_effects_of_each_family_are_written(tmp_path) -> None:
    parts = families(joined(made(seeds=1), made("perplexity", "small")))
    (tmp_path / "curves-of-before.png").touch()
    (tmp_path / "mine.png").touch()
    write_pictures(tmp_path, parts)
    names = {
        f"{picture}-{slug}"
        for picture in ("curves", "settings", "effects", "interactions", "prediction", "base")
        for slug in ("small-perplexity", "toy-acc")
    }
    assert {path.stem for path in tmp_path.iterdir()} == {*names, "mine"}
    found = effects_table(parts)
    assert set(found["family"]) == {"toy on digits, acc", "small on digits, perplexity"}
    assert set(found["ratio"]) == {0.5, None}
    assert set(found["stage"]) == {"raw", "repaired"}
    enough = {(n < 3, n < 8): said for n, said in found.select("n", "enough_for").iter_rows()}
    assert enough == {(False, True): "interval", (False, False): "sentence"}
    assert not found["half"].null_count()


def test_effects_of_two_pairs_have_no_interval_and_say_so() -> None:
    found = effects_table(families(four_recipes()))
    assert set(found["n"]) == {2}
    assert set(found["enough_for"]) == {"estimate"}
    intervals = [name for name in found.columns if name == "half" or name.endswith("_half")]
    assert len(intervals) == 6
    assert found.select(intervals).null_count().row(0) == (len(found),) * 6


def test_a_page_without_plotly_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r"pip install 'foldability\[study\]'"):
        page("title", SHARED, families(SHARED), Places({}, {}), pl.DataFrame())


def test_cells_are_written_as_they_are_joined_whatever_the_group(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.study.page.files.GROUP", 100)
    assert len(SHARED.rows) > 200
    for sweep in (SHARED, Sweep(SHARED.cells, SHARED.rows.clear())):
        write_cells(sweep, tmp_path / "cells.parquet")
        assert pl.read_parquet(tmp_path / "cells.parquet").equals(joined_rows(sweep))
