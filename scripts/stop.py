"""Ends a program well when it is told to stop, and its helper processes with it."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from pipeline.tables import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends


class Stopped(BaseException):
    """A signal asked the program to end. No exception of a failure, so that nothing takes it for one."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise Stopped, each once: a second one ends the program at once, as usual.

    SLURM's SIGTERM is left to Lightning, which may requeue the job.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signum, signal.SIG_DFL)
        raise Stopped(signum)

    chosen = [s for s in SIGNALS if not (s == signal.SIGTERM and "SLURM_JOB_ID" in os.environ)]
    before = {signum: signal.signal(signum, stop) for signum in chosen}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run_stoppable(main: Callable[[], Any]) -> Any:
    """`main()`; where it is stopped, one line on the terminal and the signal's exit code (143, 130)."""
    is_child = "LOCAL_RANK" in os.environ
    if is_child:
        end_with_parent()
    try:
        with stoppable():
            return main()
    except Stopped as stopped:
        if not is_child:
            print(f"\nstopped by {stopped}; the same command goes on where it was", file=sys.stderr)
        sys.exit(stopped.exit_code)


def end_with_parent() -> None:
    """Let this process, one of several that Lightning started, end when its parent does, however that ends."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def check_processes(accelerator: str, devices: Any, gpus: int) -> None:
    """UserError for more processes than this machine has cores, which would take it down, and for GPUs it has not.

    devices: how many, or the numbers of the devices, also as text ("2", "0,1"); "auto" and -1 are all there are.
    gpus: how many GPUs there are.
    """
    several = isinstance(devices, str) and "," in devices
    numbers = [n.strip() for n in devices.split(",") if n.strip()] if several else devices
    wanted = len(numbers) if isinstance(numbers, list) else numbers
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and gpus > 0)
    if accelerator in ("gpu", "cuda") and not gpus:
        raise UserError(f"trainer.accelerator {accelerator}: torch finds no GPU here; take trainer.accelerator=cpu")
    if not str(wanted).lstrip("-").isdigit() or not (on_gpu or accelerator in ("cpu", "auto")):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    there, kind = (gpus, "GPUs") if on_gpu else (cores, "cores")
    if int(wanted) > there:
        raise UserError(f"trainer.devices {wanted} are more processes than the {there} {kind} there are; take fewer")
    named = numbers if on_gpu and isinstance(numbers, list) else []
    if unknown := [n for n in named if str(n).isdigit() and int(n) >= there]:
        raise UserError(f"trainer.devices {devices}: there is no GPU {unknown[0]}; they are 0 to {there - 1}")
