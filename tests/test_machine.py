import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gradsift import machine

BOUND = (
    "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\n"
    "import torch; from gradsift import machine\n"
    "print(machine.settle(0), torch.get_num_threads(), machine.settle(2))"
)


def test_as_many_threads_as_physical_cores():
    assert 1 <= machine.usable_cores() <= (psutil.cpu_count(logical=False) or os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to CPUs here")
def test_a_process_bound_to_one_cpu_takes_one_thread_unless_told():
    cpu = min(os.sched_getaffinity(0))
    said = subprocess.run([sys.executable, "-c", BOUND, str(cpu)], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["1", "1", "2"]


def test_bfloat16_is_emulated_on_cpus_without_avx512():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "flags" not in flags:
        pytest.skip("this system does not tell what its CPU can do")
    assert machine.emulates_bfloat16("cpu") == ("avx512dq" not in flags)
    assert not machine.emulates_bfloat16("cuda")
