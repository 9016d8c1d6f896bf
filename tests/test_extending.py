"""docs/extending.md is true: its diffs apply to this repository, and what they add runs and is tested for free."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
# {heading: the diff of its section}
BLOCKS = {
    section.splitlines()[0]: found[1]
    for section in PAGE.split("\n## ")
    if (found := re.search(r"^```diff\n(.*?)^```$", section, re.S | re.M))
}
# Tests over tables that a new row is in by itself.
FREE = {
    "tests/compression/test_recipe.py": "median",
    "tests/compression/test_compensate.py": "median",
    "tests/test_stages.py": "recentre",
    "tests/tasks/test_metrics.py": "top5 or r2 or mse",
    "tests/scripts/test_train.py": "data-stripes",
}
# Behind the page's own regression.
CHECKS = """
from torchmetrics.functional import accuracy, r2_score

import pipeline.tasks.regression
from pipeline.tables import UserError
from pipeline.tasks import Classification

assert pipeline.tasks.regression.__file__.startswith({root!r})
rows = measured.rows
assert set(rows["status"]) == {{"ok"}}, set(rows["reason"])
assert set(rows["n"]) == {{100}}
assert set(rows["task"]) == {{"regression"}} and set(rows["metric"]) == {{"r2"}}
with torch.no_grad():
    said = mine.net.eval()(x[1000:])
dense = rows.row(0, named=True)
assert abs(dense["r2"] - float(r2_score(said, y[1000:]))) < 1e-5
assert abs(dense["mse"] - float(nn.functional.mse_loss(said, y[1000:]))) < 1e-6
try:
    Regression().settled(said, (None, y[1000:, 0]))
except UserError as refused:
    assert "outputs (100, 2) and targets (100, 1)" in str(refused)
else:
    raise AssertionError("targets of another shape were broadcast")

scores, labels = torch.randn(50, 9), torch.randint(9, (50,))
task = Classification("multiclass", "logits", classes=9)
found = task.values(sum(task.totals(s, (None, l)) for s, l in zip(scores.split(20), labels.split(20))))
assert abs(found["top5"] - float(accuracy(scores, labels, "multiclass", num_classes=9, top_k=5))) < 1e-6
"""


def tracked() -> list[str]:
    """The files of the repository, as git lists them, with those that are new."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not in a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def copied(to: Path) -> Path:
    for name in tracked():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    return to


def apply(block: str, root: Path, *options: str) -> None:
    """Lines may have moved: git finds the place by the lines around it."""
    done = subprocess.run(
        ["git", "apply", *options],
        cwd=root,
        input=BLOCKS[block],
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"docs/extending.md: the diff of {block!r} does not apply:\n{done.stderr}"


def python(root: Path, *arguments: str, code: str | None = None) -> str:
    """Python's output in the copy, whose own modules come first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env = {**kept, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=root, input=code, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return copied(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def extended(bare):
    """The repository with all that the page adds."""
    root = shutil.copytree(bare, bare.parent / "extended")
    for block in BLOCKS:
        apply(block, root)
    return root


def test_the_page_adds_one_of_each():
    assert list(BLOCKS) == ["A method", "A stage", "A metric", "A task", "A data set"]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_diff_applies_by_itself(block, bare):
    apply(block, bare, "--check")


@pytest.mark.parametrize("block", BLOCKS)
def test_the_page_says_what_it_costs(block):
    files = BLOCKS[block].count("\n+++ ")
    lines = sum(line.startswith("+") and not line.startswith("+++ ") for line in BLOCKS[block].splitlines())
    assert f"| [{block[2:]}](#{block.lower().replace(' ', '-')}) | {files} | {lines} |" in PAGE


def test_what_it_adds_is_clean(extended):
    pytest.importorskip("ruff")
    python(extended, "-m", "ruff", "check", "--no-cache", "pipeline")
    python(extended, "-m", "ruff", "format", "--check", "--no-cache", "pipeline")


def test_one_command_uses_method_stage_metric_and_data(extended):
    shown = python(
        extended, "-m", "scripts.train", "data=stripes", "data.count=400", "model.width=4", "optim=adam",
        "trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "paths.runs=runs",
        "compression.every_n_epochs=0", "compression.methods=[fold,median]", "compression.ratios=[0.5]",
        "compression.stages=[raw,recentre,repaired]", "wandb.mode=disabled",
    )  # fmt: skip
    assert re.search(r"recentre[^a-z]+fold[^a-z]+median", shown)
    rows = pl.read_parquet(*(extended / "runs").glob("run-*/rows.parquet"))
    assert set(rows["status"]) == {"ok"}, set(rows["reason"])
    assert len(rows) == 1 + 2 * 3
    assert all(top5 >= acc for top5, acc in rows.select("top5", "acc").iter_rows())
    told = {(row["method"], row["stage"]): row for row in rows.iter_rows(named=True)}
    assert told["median", "recentre"]["chain"] == "median@0.5 > recentre"
    assert told["median", "recentre"]["statistics"] == "data"
    assert told["median", "raw"]["kind"] == "prune"
    losses = [told["fold", stage]["loss"] for stage in ("raw", "recentre", "repaired")]
    assert len(set(losses)) == 3


def test_the_callback_measures_the_new_task(extended):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M)
    shown = python(extended, "-", code=code + CHECKS.format(root=str(extended)))
    assert (
        len(re.findall(r"^(dense|fold|l2) +(raw|repaired) +100 samples: R² +0\.\d+, error 0\.\d+$", shown, re.M)) == 5
    )


def test_rows_of_tables_are_tested_for_free(extended):
    chosen = " or ".join(FREE.values())
    shown = python(extended, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--tb=short", "-k", chosen, *FREE)
    passed = re.findall(r"^PASSED (\S+)", shown, re.M)
    for file, names in FREE.items():
        for name in names.split(" or "):
            assert any(test.startswith(file) and name in test for test in passed), (file, name, passed)
