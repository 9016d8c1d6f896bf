"""The scripts that people run. Settings of the process stand here: they must come before torch starts its threads."""

import ctypes
import os

# OpenMP's threads spin by default while they wait, which takes the cores from every other job on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def keep_memory() -> None:
    """Let glibc keep freed memory. By default it returns blocks over 32 MiB at once and maps them anew for every batch,
    and evaluation in batches of 512 takes 1.9 times as long. Does nothing on other systems."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # constants of malloc.h
    for option in (trim_threshold, mmap_threshold):
        mallopt(option, 2**30)


keep_memory()
