"""A report reads tables, so it starts without torch, which takes 500 MB and seconds."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CODE = """
import sys
import scripts.report
from pipeline.study import published
from pipeline.study.page import papers
print("torch" in sys.modules)
"""


def test_a_report_imports_no_torch() -> None:
    found = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.stdout == "False\n", found.stderr
