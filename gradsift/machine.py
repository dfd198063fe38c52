"""The machine under a run: threads, the CPU allocator, peak memory, versions."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import resource
import sys

import psutil
import torch

# glibc's mallopt numbers (malloc.h) and the values that keep freed tensors in the process: on a CPU half of a small model's training
# time is page faults of memory handed back to the kernel and asked for again.
_MALLOPT = ((-4, 0), (-1, 2**31 - 1), (-2, 268_435_456))  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def settle(threads: int) -> int:
    """Set torch's threads (0 = physical cores) and, with glibc, the allocator. Returns the number of threads in force."""
    threads = threads or psutil.cpu_count(logical=False) or 1
    torch.set_num_threads(threads)
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _MALLOPT:
            mallopt(parameter, value)
    return threads


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    names = ("gradsift", "torch", "transformers", "peft", "numpy", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def cpu_kind() -> str:
    """The kind of CPU that decides which kernels run: part of the identity of trained and gradient artifacts."""
    return f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}"
