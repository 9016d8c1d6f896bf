"""What the benchmarks share: the clock, the machine, and how results are written."""

import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

THREADS = 2


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(wall seconds, what it returns)."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def machine(*packages: str) -> dict[str, Any]:
    """What the numbers depend on besides the code. packages: whose versions matter, beside torch's."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
    }


def described(where: dict[str, Any], *packages: str) -> str:
    """A machine in words, with the versions of torch and of these packages."""
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", *packages))
    return (
        f"{where['cpu']}, {where['threads']} threads on {where['cores']} cores, load {where['load_average'][0]:.1f}; "
        f"{versions}"
    )


def write(out: Path, result: dict[str, Any], text: str) -> None:
    """Show the text, and keep it as OUT.md and what it was made of as OUT.json."""
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(rounded(result), indent=1) + "\n")
    out.with_suffix(".md").write_text(text + "\n")


def rounded(value: Any) -> Any:
    """Numbers to seven digits, through dicts and lists: the file is read by people and by git."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
