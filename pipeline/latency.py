"""Measures time and memory of a network on this machine, by batch size and runtime, on a copy in eval mode."""

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.compression.checkpoint import stored_size
from pipeline.compression.copies import bare_copy
from pipeline.compression.sizes.count import macs, parameters
from pipeline.example import Example, call_arguments
from pipeline.export import ArrayRun, arrays_of, batch_of, export_onnx, need_onnx, onnx_run, quiet
from pipeline.finished import FileNetwork, FinishedNetwork, check_runtime
from pipeline.openvino_network import export_openvino, need_openvino, openvino_run
from pipeline.tables import UserError, one_line, pick
from pipeline.torchao_network import TorchaoNetwork

Run = Callable[[], Any]  # one forward pass on one batch
LEAST, MOST = 5, 1000  # timed passes


@dataclass(frozen=True)
class Profile:
    """One network under one runtime at one batch size; times in seconds, sizes in bytes.

    median, low, high: median and quartiles of the time of one pass, over `repeats` passes
    memory: at the peak of a pass (see `peak_memory`); None where the runtime hides it
    params, macs: of the network, macs for one sample; size: of its weights and buffers, which is that of its
        safetensors file without the header, where quantized weights are packed
    speedup: how many times as fast as the network that it was timed beside: the median over pairs of passes that follow
        each other, so that other load on the machine slows both; NaN where it was timed alone
    beside: median time of that network's passes in these pairs; doubt: see `doubt_of`, of the speedup
    reason: why there are no times (NaN), if there are none
    """

    runtime: str
    batch_size: int
    median: float
    low: float
    high: float
    repeats: int
    memory: int | None
    params: int
    macs: int
    size: int
    speedup: float = math.nan
    beside: float = math.nan
    doubt: float = math.nan
    reason: str = ""


def eager(network: nn.Module, example: Example) -> Callable[[Example], Run]:
    check_runtime(network, "eager")
    return called(network)


def called(network: Callable[..., Any]) -> Callable[[Example], Run]:
    def bind(inputs: Example) -> Run:
        args, kwargs = call_arguments(inputs)
        return lambda: network(*args, **kwargs)

    return bind


def compiled(network: nn.Module, example: Example) -> Callable[[Example], Run]:
    """torch.compile, for each batch size anew; all that it compiled before in this process is forgotten.

    Otherwise torch counts the networks of one class as recompilations of one forward, and after some of them it gives
    up and runs the next one eagerly.
    """
    check_runtime(network, "compiled")
    torch.compiler.reset()
    if isinstance(network, TorchaoNetwork):
        return frozen(torch.compile(network.program, dynamic=False))
    return called(torch.compile(network, dynamic=False))


def frozen(program: Callable[..., Any]) -> Callable[[Example], Run]:
    """A program whose weights are constants of what is compiled, at once, by a first pass on each batch.

    Weights in int8 would otherwise be made floats again in every pass. The option of torch.compile by the same name
    does not do: passes that pack the weights read the setting itself, and end in an operation that has no shapes.
    """
    from torch._inductor import config  # a second, which only compiled networks take

    def bind(inputs: Example) -> Run:
        run = called(program)(inputs)
        with torch.no_grad(), config.patch(freezing=True), quiet():
            run()
        return run

    return bind


class Beside(NamedTuple):
    """A runtime beside torch: it computes on the CPU, with as many threads as torch has, and hides its memory.

    need: raises UserError where a library is missing. export: writes a network's file. start: makes of it what runs.
    """

    title: str
    need: Callable[[], None]
    export: Callable[[nn.Module, Example, Path], float]
    start: Callable[[Path], ArrayRun]


BESIDE = {
    "onnx": Beside("ONNX Runtime", need_onnx, export_onnx, onnx_run),
    "openvino": Beside("OpenVINO", need_openvino, export_openvino, openvino_run),
}


def beside_torch(runtime: str, network: nn.Module, example: Example) -> Callable[[Example], Run]:
    """A row of BESIDE; a network that is its file runs as it is."""
    title, _, export, start = BESIDE[runtime]
    device = device_of(network)
    if device.type != "cpu":
        raise UserError(f"{title} is measured on the CPU, and the network is on {device}; move it to compare")
    check_runtime(network, runtime)
    if isinstance(network, FileNetwork):
        run = network.run
    else:
        with tempfile.TemporaryDirectory() as folder:
            export(network, example, Path(folder) / "network")
            run = start(Path(folder) / "network")

    def bind(inputs: Example) -> Run:
        arrays = arrays_of(call_arguments(inputs))
        return lambda: run(arrays)

    return bind


# (network, example of any batch size) -> (batch -> a forward pass on it)
RUNTIMES: dict[str, Callable[[nn.Module, Example], Callable[[Example], Run]]] = {
    "eager": eager,
    "compiled": compiled,
    **{name: partial(beside_torch, name) for name in BESIDE},
}


def check_timing(runtimes: Sequence[str], batch_sizes: Sequence[int]) -> None:
    """UserError for a runtime that is unknown or lacks its libraries, and for a batch size below 1."""
    for name in runtimes:
        pick("runtime", RUNTIMES, name)
        if name in BESIDE:
            BESIDE[name].need()
    if min(batch_sizes, default=1) < 1:
        raise UserError(f"batch size {min(batch_sizes)} must be at least 1")


def profile(
    model: nn.Module,
    example: Example,
    batch_sizes: Sequence[int] = (1, 128),
    runtimes: Sequence[str] = ("eager",),
    seconds: float = 2.0,
    beside: nn.Module | None = None,
) -> list[Profile]:
    """One Profile for each runtime and batch size, in this order.

    example: the model's arguments, on its device; larger batches are made of it (see `export.batch_of`).
    seconds: for the timed passes of one Profile, of which there are at least LEAST however long they take.
    beside: a network to take turns with, such as the uncompressed one.

    The model is untouched. A runtime that fails gives its reason in place of times. Errors are those of `check_timing`.
    """
    check_timing(runtimes, batch_sizes)
    networks = [bare_copy(each).eval() for each in (model, beside) if each is not None]
    network = networks[0]
    sizes = {
        "params": network.params if isinstance(network, FinishedNetwork) else parameters(network),
        "macs": network.macs if isinstance(network, FinishedNetwork) else macs(network, batch_of(example, 1)),
        "size": stored_size(network),
    }
    found = []
    for name in runtimes:
        binds: list[Callable[[Example], Run]] = []
        for batch_size in batch_sizes:
            try:
                binds = binds or [RUNTIMES[name](each, example) for each in networks]
                runs = [bind(batch_of(example, batch_size)) for bind in binds]
                times, *others = race(runs, device_of(network), seconds)
                memory = None if name in BESIDE else peak_memory(runs[0], device_of(network))
                low, median, high = statistics.quantiles(times, n=4, method="inclusive")
                pairs = {} if beside is None else paired(times, others[0])
                found.append(Profile(name, batch_size, median, low, high, len(times), memory, **sizes, **pairs))
            except Exception as error:  # no compiler, no memory, an operation that a runtime does not have
                none = (math.nan, math.nan, math.nan, 0, None)
                found.append(Profile(name, batch_size, *none, **sizes, reason=one_line(error)))
    return found


def paired(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """speedup, beside and doubt of a Profile, from the seconds of passes that took turns."""
    ratios = [other / own for own, other in zip(times, others, strict=True)]
    return {
        "speedup": statistics.median(ratios),
        "beside": statistics.median(others),
        "doubt": doubt_of(ratios),
    }


def doubt_of(values: Sequence[float]) -> float:
    """By which fraction the median of these values may be off: half of its approximate 95% interval, divided by it.

    1.57 times the distance of the quartiles over the root of n: the notch of a box plot (McGill, Tukey and Larsen,
    Variations of box plots, The American Statistician 32 (1978), section 7). values: positive, at least two
    """
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return 1.57 * (high - low) / len(values) ** 0.5 / median


@torch.no_grad()
def race(runs: Sequence[Run], device: torch.device, seconds: float) -> list[list[float]]:
    """Seconds of each pass of each run. The runs take turns, so that other load on the machine slows all of them alike.

    seconds: for all runs together, after one pass of each to warm up (and compile); at least LEAST passes of each.
    """
    for run in runs:
        with quiet():
            run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while len(times[0]) < LEAST or (time.perf_counter() < end and len(times[0]) < MOST):
        for run, spent in zip(runs, times, strict=True):
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            spent.append(time.perf_counter() - start)
    return times


@torch.no_grad()
def peak_memory(run: Run, device: torch.device) -> int:
    """Bytes that a forward pass holds at its peak beside weights and inputs: activations, outputs, scratch.

    Only memory from torch's own allocators counts: this is exact and the same every time, unlike the memory of the
    process, but it misses what a library (oneDNN, cuDNN) takes by itself.
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's library prints a greeting on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work; a CPU has finished when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_of(network: nn.Module) -> torch.device:
    return next((t.device for t in network.state_dict().values()), torch.device("cpu"))
