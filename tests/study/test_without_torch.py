"""A report reads tables, so it starts without torch, which takes 500 MB and seconds."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CODE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError(f"{name} is imported")

sys.meta_path.insert(0, Refuse())
import scripts.report
from pipeline.study.page import papers
from pipeline.study import published
"""


def test_a_report_imports_no_torch() -> None:
    found = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
