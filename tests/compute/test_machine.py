import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradsift.compute import machine

BOUND = (
    "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\n"
    "import torch; from gradsift.compute import machine\n"
    "print(machine.settle(0), torch.get_num_threads(), machine.settle(2))"
)

# Blocks that came by mmap of 8 MB asked for once settled: glibc's own threshold is 128 kB, ours 32
# MB.
MAPPED = (
    "import ctypes; from gradsift.compute import machine\nclass Info(ctypes.Structure): _fields_ ="
    " [(n, ctypes.c_size_t) for n in 'arena ordblks smblks hblks hblkhd usmblks'.split()]\nclass"
    " Whole(Info): _fields_ = [(n, ctypes.c_size_t) for n in 'fsmblks uordblks fordblks"
    " keepcost'.split()]\nlibc = ctypes.CDLL(None); libc.mallinfo2.restype = Whole;"
    " libc.malloc.restype = ctypes.c_void_p\nmachine.settle(1); before = libc.mallinfo2().hblks;"
    " libc.malloc(ctypes.c_size_t(8 << 20)); print(libc.mallinfo2().hblks - before)"
)


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to CPUs here"
)
def test_a_process_bound_to_one_cpu_takes_one_thread_unless_told():
    cpu = min(os.sched_getaffinity(0))
    said = subprocess.run(
        [sys.executable, "-c", BOUND, str(cpu)],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.split() == ["1", "1", "2"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc, or an old one")
@pytest.mark.parametrize(
    ("own", "mapped"),
    [
        ({}, 0),
        ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, 1),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}, 1),
        ({"MALLOC_TOP_PAD_": "0"}, 0),
    ],
)
def test_the_allocator_is_set_but_for_what_the_user_has_set(
    own: dict[str, str], mapped: int
) -> None:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    said = subprocess.run(
        [sys.executable, "-c", MAPPED],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, **own},
    ).stdout
    assert said.split() == [str(mapped)]


def test_bfloat16_is_emulated_on_cpus_without_avx512():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "flags" not in flags:
        pytest.skip("this system does not tell what its CPU can do")
    assert machine.emulates_bfloat16("cpu") == ("avx512dq" not in flags)
    assert not machine.emulates_bfloat16("cuda")
