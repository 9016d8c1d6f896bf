"""Shared by the benchmarks: clocks, memory, processes, the machine, and how results are written."""

import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

THREADS = 2


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(wall seconds, result of `work()`)"""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def spent(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """(wall seconds, CPU seconds of all threads and MiB at the peak above those before; the result of `work()`)"""
    gc.collect()
    if sys.platform == "linux":  # elsewhere the peak cannot be reset, and is that of the whole process so far
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before, busy = peak_mib(), time.process_time()
    wall, result = timed(work)
    return {"wall_s": wall, "cpu_s": time.process_time() - busy, "peak_mib": peak_mib() - before}, result


def peak_mib() -> float:
    """Highest resident set so far, in MiB; inside `spent`, since it began."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the peak of the parent process, too
        return next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(function: str, *arguments: Any) -> Any:
    """Result of benchmarks.<function>, such as "large:measured", in a process of its own; all values are JSON.

    The process skips benchmarks/__init__.py, whose settings let it keep free memory.
    """
    root = Path(__file__).parent.parent
    child = f"""
import json, pkgutil, sys, types
sys.path.insert(0, {str(root)!r})
sys.modules["benchmarks"] = package = types.ModuleType("benchmarks")
package.__path__ = [{str(root / "benchmarks")!r}]
print(json.dumps(pkgutil.resolve_name("benchmarks." + sys.argv[1])(*json.loads(sys.argv[2]))))
"""
    command = [sys.executable, "-c", child, function, json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def machine(*packages: str) -> dict[str, Any]:
    """The facts that numbers depend on besides the code. packages: those whose versions matter, beside torch."""
    import torch  # here, so that what a table of results costs is measured without it

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu
        )
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


def write_below(page: Path, mark: str, title: str, lines: list[str]) -> None:
    """Replace the part of the page below the line `mark`, and keep the text that people wrote above it."""
    text = page.read_text().split(mark)[0].rstrip() if page.exists() else f"# {title}"
    page.write_text("\n".join([text, "", mark, "", *lines]) + "\n")


def line(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def write(out: Path, result: dict[str, Any], text: str) -> None:
    """Print the text, and write it to OUT.md and the result that it was made of to OUT.json."""
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
