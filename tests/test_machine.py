import os
import subprocess
import sys

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
