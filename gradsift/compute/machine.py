"""The machine under a run: threads, the CPU allocator, peak memory, versions."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

from gradsift.compute.threads import default_threads

# glibc's mallopt numbers (malloc.h). Freed tensors stay in the process instead of going back to the
# kernel, whose page faults can cost half of a small model's time; blocks of 32 MB and more (shards,
# wide logits) still come and go by mmap, or they would fragment the heap.
_MALLOPT = (
    ("mmap_threshold", -3, 32 << 20),
    ("trim_threshold", -1, 2**31 - 1),
    ("top_pad", -2, 64 << 20),
)


_ACCELERATORS = ("cuda", "mps", "xpu")  # in the order of preference

# oneDNN keeps compiled kernels for every shape it has met, 1,024 of them by default: batches of
# ever new lengths fill hundreds of megabytes with kernels that are hardly used again. A batch
# itself needs some thirty, layer after layer.
_KERNEL_CACHES, _KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "64"


def settle(threads: int) -> int:
    """Set torch's threads (0 = `default_threads`), the kernel caches (before the first product by
    oneDNN) and, with glibc, the allocator.

    Returns the number of threads in force. Variables that the user has set stay as they are.
    """
    _bound_kernels()
    threads = threads or default_threads()
    torch.set_num_threads(threads)
    if _glibc():
        mallopt = ctypes.CDLL(None).mallopt
        for name, parameter, value in _MALLOPT:
            if (
                f"MALLOC_{name.upper()}_" not in os.environ
                and f"glibc.malloc.{name}=" not in os.environ.get("GLIBC_TUNABLES", "")
            ):
                mallopt(parameter, value)
    return threads


def best_device() -> str:
    """The kind of device to compute on here: "cuda" where torch can use one, else "mps" or "xpu",
    else "cpu".
    """
    return next((kind for kind in _ACCELERATORS if has_device(kind)), "cpu")


def has_device(kind: str) -> bool:
    """Whether torch can compute on a device of this kind here. True for kinds that this function
    does not know: torch decides when the model is moved there.
    """
    return kind not in _ACCELERATORS or bool(_accelerator(kind).is_available())


def has_type(device: str, dtype: str) -> bool:
    """Whether `device` computes in "bfloat16" or "float16" by itself, not by way of float32.

    Args:
        device: Such as "cuda:1"; CPUs count as having neither, because most are slower in 16 bit.
        dtype: The name of the type.
    """
    kind = device.split(":")[0]
    if kind == "cpu":
        return False
    if dtype != "bfloat16":
        return dtype == "float16"
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind != "mps" or bool(torch.backends.mps.is_macos_or_newer(14, 0))


def _accelerator(kind: str) -> Any:
    """torch's module for a kind of device; MPS has its own question under `backends`."""
    return torch.backends.mps if kind == "mps" else getattr(torch, kind)


def emulates_bfloat16(device: str) -> bool:
    """Whether bfloat16 products on `device` are made of float32 ones, at a fraction of their speed:
    CPUs without AVX-512.
    """
    return (
        device == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@functools.cache
def prefers_onednn() -> bool:
    """Whether fp32 products on this CPU are faster by oneDNN than by MKL, which knows AVX-512 on
    Intel's processors alone. Told on Linux only.
    """
    with contextlib.suppress(OSError):
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
        if (
            amd
            and torch.backends.cpu.get_cpu_capability() == "AVX512"
            and torch.backends.mkl.is_available()
            and has_onednn_linear()
        ):
            _bound_kernels()
            return True
    return False


def has_onednn_linear() -> bool:
    """Whether this build of torch brings oneDNN's product of a matrix and a weight, and it is
    switched on.
    """
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _bound_kernels() -> None:
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, _KERNELS)


def peak_bytes() -> int:
    """Largest resident set of this process so far, or since `forget_peak`."""
    # Not ru_maxrss where it can be helped: on Linux a started program inherits the maximum of the
    # one that started it.
    status = Path("/proc/self/status")
    found = (
        re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        if status.exists()
        else None
    )
    if found is not None:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def used_bytes() -> int:
    """Resident set of this process now, after what it freed went back to the kernel (with
    glibc).
    """
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def _glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def forget_peak() -> None:
    """From here on `peak_bytes` starts at what is resident now, where the system can do that
    (Linux).
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    names = ("gradsift", "torch", "transformers", "peft", "numpy", "safetensors")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def gpu_kind(devices: Iterable[str | int]) -> str:
    """The kinds of GPU among `devices`, by name: "" where none is one. Two kinds may give other
    last digits for the same work.
    """
    if not torch.cuda.is_available():
        return ""
    return " + ".join(
        sorted({torch.cuda.get_device_name(device) for device in devices if str(device) != "cpu"})
    )


def cpu_kind() -> str:
    """The kind of CPU that decides which kernels run: part of the identity of trained and gradient
    artifacts.
    """
    kind = f"{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}-oneDNN" if prefers_onednn() else kind


def cache_folder() -> Path:
    """$GRADSIFT_CACHE, else $XDG_CACHE_HOME/gradsift, else ~/.cache/gradsift."""
    if os.environ.get("GRADSIFT_CACHE"):
        return Path(os.environ["GRADSIFT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gradsift"
