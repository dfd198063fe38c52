"""CPU threads: how many, and how they wait for each other.

Between two products OpenMP's threads spin, which is fastest on a quiet machine. Beside another busy
process it is ruinous: a thread that waits its turn for a CPU holds up all others, which spin
meanwhile and use up their own turns. Threads that sleep are as fast there as spinning ones are on a
quiet machine, but a third slower on a quiet one, where every sleep lets a CPU doze off
(`bench/beside.py`). OpenMP reads its variables once, when torch is loaded, so the command line
chooses before that, by the load that it sees. This file loads nothing heavy.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, MutableMapping

import psutil

COUNT, POLICY = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"
# By these a user says how threads wait: the standard's, GNU's (torch's own builds), and that of
# Intel's and LLVM's library (conda, macOS). All three libraries know the first.
WAITING = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
EVERY_SECONDS = 15.0
LEAST_SECONDS = 0.25  # the kernel counts CPU time in ticks of up to 0.01 s
# CPUs that the threads may lack before they sleep: what any machine does in passing takes less
_SPARE = 0.25


def usable_cores() -> int:
    """Physical cores, or fewer where this process is bound to some CPUs only: more threads than
    CPUs wait for each other at every product.
    """
    return min(psutil.cpu_count(logical=False) or len(_own_cpus()), len(_own_cpus()))


def default_threads() -> int:
    """OMP_NUM_THREADS where it is a number above 0 (of a list, the first), else `usable_cores`."""
    wished = os.environ.get(COUNT, "").partition(",")[0].strip()
    return int(wished) if wished.isdecimal() and int(wished) > 0 else usable_cores()


class Load:
    """What other processes take of the CPUs that this one may use, from here on."""

    def __init__(self) -> None:
        self.cpus = len(_own_cpus())
        self._began, self._busy, self._own = time.monotonic(), _busy(), _own_seconds()

    def others(self) -> float:
        """CPUs that other processes kept busy, on average since the beginning, which is at least
        LEAST_SECONDS ago: until then this waits.
        """
        time.sleep(max(0.0, self._began + LEAST_SECONDS - time.monotonic()))
        seconds = time.monotonic() - self._began
        others = (_busy() - self._busy) - (_own_seconds() - self._own)
        return min(max(others / seconds, 0.0), float(self.cpus))

    def busy(self, threads: int) -> str | None:
        """What to say where `threads` threads have to share their CPUs with other processes."""
        others = self.others()
        if others + threads <= self.cpus + _SPARE:
            return None
        return f"other processes keep {others:.1f} of {self.cpus} CPUs busy"


class Waiting:
    """How the threads of this process wait for each other, and why.

    The command line makes one before torch is loaded and calls `choose`; a library call makes one
    when it begins, and can only say what it sees.
    """

    def __init__(self, load: Load | None = None) -> None:
        self._load = load or Load()
        self.line: str | None = None  # for the log; None = nothing to say

    def choose(self, threads: int, environment: MutableMapping[str, str] = os.environ) -> None:
        """Sets OMP_WAIT_POLICY=passive where `threads` threads (0 = `default_threads`) would have
        to share their CPUs with other processes. A user's own variable stays as it is. Does nothing
        where torch is loaded: OpenMP has read its variables.
        """
        if "torch" in sys.modules:
            return
        self.line = self._told(threads or default_threads(), environment, loaded=False)

    def explain(self, threads: int) -> str | None:
        """The line for the log of a process in which torch is loaded, perhaps by others. None where
        there is nothing to say.
        """
        return self.line or self._told(threads, os.environ, loaded=True)

    def _told(
        self, threads: int, environment: MutableMapping[str, str], *, loaded: bool
    ) -> str | None:
        if threads < 2:
            return None
        own = next((name for name in WAITING if environment.get(name)), None)
        if own is not None:
            return f"{threads} threads wait for each other as {own}={environment[own]} says"
        busy = self._load.busy(threads)
        if busy is None:
            return None if loaded else f"{threads} threads spin while they wait for each other"
        if loaded:
            return (
                f"{busy}, beside which {threads} threads that spin while they wait can be 20 times"
                f" slower than threads that sleep: export {POLICY}=passive before Python starts"
            )
        environment[POLICY] = "passive"
        return f"{threads} threads sleep while they wait for each other ({POLICY}=passive): {busy}"


class Watch:
    """Asked often, says once that the machine has become busy while `threads` threads spin."""

    def __init__(self, threads: int, load: Callable[[], Load] = Load) -> None:
        self._threads, self._make, self._busy = threads, load, 0
        self._said = threads < 2 or any(os.environ.get(name) for name in WAITING)
        self._renew()

    def _renew(self) -> None:
        self._load, self._next = self._make(), time.monotonic() + EVERY_SECONDS

    def look(self) -> str | None:
        """The line for the log, once: after two looks in a row, EVERY_SECONDS apart, at which other
        processes needed the CPUs.
        """
        if self._said or time.monotonic() < self._next:
            return None
        busy = self._load.busy(self._threads)
        self._busy = 0 if busy is None else self._busy + 1
        self._renew()
        if self._busy < 2:
            return None
        self._said = True
        return (
            f"{busy} by now, beside which {self._threads} threads that spin while they wait can be"
            " 20 times slower: Ctrl-C and the same command keep what is finished and go on with"
            " threads that sleep"
        )


_observed: Waiting | None = None


def observe() -> None:
    """Begins to look at the load, for the choice of this process: the command line's first act."""
    global _observed
    _observed = Waiting()


def waiting() -> Waiting:
    """The one that `observe` began, else one that begins now."""
    return _observed or Waiting()


def _own_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _busy() -> float:
    """Seconds that the CPUs of this process were not idle; what a hypervisor took away counts as
    busy.
    """
    times = psutil.cpu_times(percpu=True)
    return sum(
        getattr(times[cpu], name, 0.0)
        for cpu in _own_cpus()
        if cpu < len(times)
        for name in ("user", "nice", "system", "irq", "softirq", "steal")
    )


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
