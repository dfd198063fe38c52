"""Imported first by a bench: one thread, and an allocator that keeps freed tensors.

glibc hands every large tensor back to the kernel otherwise: page faults are then up to half of what
is measured. Both are read when a process starts, so the process starts itself again where they are
not set.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
