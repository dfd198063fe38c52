"""How many threads, and how they wait: chosen by load before torch is loaded, said once."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from gradsift.compute import threads
from gradsift.compute.progress import Lines, Watched
from gradsift.compute.threads import POLICY, WAITING, Load, Waiting, Watch

# ends with the test, however that ends
BUSY = (
    "import os; print(1, flush=True); parent = os.getppid()\n"
    "while os.getppid() == parent:\n for _ in range(10**6): pass"
)


class Seen(Load):
    """A load of `others` CPUs on a machine of `cpus`."""

    def __init__(self, others: float, cpus: int) -> None:
        super().__init__()
        self.cpus, self._others = cpus, others

    def others(self) -> float:
        return self._others


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*WAITING, threads.COUNT):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def busy() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        yield
        process.kill()


def test_as_many_cores_as_the_machine_has_at_most():
    assert 1 <= threads.usable_cores() <= (psutil.cpu_count(logical=False) or os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("wished", "count"),
    [("3", 3), ("5,2", 5), (" 4 ", 4), ("0", None), ("", None), ("many", None), ("-1", None)],
)
def test_the_number_of_threads_is_the_users_own(
    wished: str, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", wished)
    assert threads.default_threads() == (threads.usable_cores() if count is None else count)


def test_a_busy_process_is_seen_and_this_one_is_not(busy: None) -> None:
    load = Load()
    for _ in range(10**6):  # what this process does itself
        pass
    assert 0.2 < load.others() <= load.cpus


@pytest.mark.parametrize(
    ("others", "count", "cpus", "sleeps"),
    [
        (0.0, 2, 2, False),
        (0.1, 2, 2, False),
        (1.0, 2, 2, True),
        (2.0, 2, 2, True),
        (3.0, 4, 8, False),
        (5.0, 4, 8, True),
    ],
)
@pytest.mark.usefixtures("without_torch", "environment")
def test_threads_sleep_only_where_others_need_their_cpus(
    others: float, count: int, cpus: int, sleeps: bool
) -> None:
    chosen, own = Waiting(Seen(others, cpus)), {}
    chosen.choose(count, own)
    assert own == ({POLICY: "passive"} if sleeps else {})
    assert chosen.line is not None and chosen.line.startswith(f"{count} threads ")
    assert ("sleep" in chosen.line) is sleeps and ("spin" in chosen.line) is not sleeps
    assert chosen.explain(count) == chosen.line


@pytest.mark.usefixtures("without_torch", "environment")
def test_one_thread_waits_for_nobody() -> None:
    chosen, own = Waiting(Seen(2.0, 2)), {}
    chosen.choose(1, own)
    assert own == {} and chosen.explain(1) is None


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.usefixtures("without_torch", "environment")
def test_a_users_own_variable_stays(name: str) -> None:
    chosen, own = Waiting(Seen(1.0, 2)), {name: "7"}
    chosen.choose(2, own)
    assert own == {name: "7"} and f"{name}=7" in str(chosen.line)


@pytest.mark.usefixtures("environment")
def test_where_torch_is_loaded_nothing_is_set_and_the_remedy_is_said() -> None:
    import torch

    assert torch.__version__
    late, own = Waiting(Seen(1.0, 2)), {}
    late.choose(2, own)
    assert own == {} and "export OMP_WAIT_POLICY=passive" in str(late.explain(2))
    assert Waiting(Seen(0.0, 2)).explain(2) is None


@pytest.mark.usefixtures("environment")
def test_a_machine_that_becomes_busy_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "EVERY_SECONDS", 0.0)
    loads = iter([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    watch = Watch(2, lambda: Seen(next(loads), 2))
    said = [watch.look() for _ in range(7)]
    # one busy look alone is no reason: a build or a backup passes
    assert [k for k, text in enumerate(said) if text] == [4]
    assert "keep 1.0 of 2 CPUs busy by now" in str(said[4]) and "Ctrl-C" in str(said[4])
    assert Watch(1, lambda: Seen(2.0, 2)).look() is None
    monkeypatch.setenv(POLICY, "passive")
    sleeping = Watch(2, lambda: Seen(2.0, 2))
    assert [sleeping.look() for _ in range(3)] == [None] * 3


def test_progress_passes_on_what_the_watch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Saying:
        def look(self) -> str | None:
            return "busy"

    inner = io.StringIO()
    progress = Watched(Lines(inner), Saying())  # type: ignore[arg-type]
    progress.start(3, "rows", "work")
    progress.advance(1)
    progress.note("mine")
    progress.done()
    assert inner.getvalue().splitlines() == ["busy", "mine"]


def test_openmp_of_this_torch_knows_the_variable() -> None:
    """OMP_DISPLAY_ENV prints what the library took, when torch is loaded."""
    environment = {
        **{name: value for name, value in os.environ.items() if name not in WAITING},
        POLICY: "passive",
        "OMP_DISPLAY_ENV": "verbose",
    }
    said = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True
    ).stderr
    if "OPENMP DISPLAY ENVIRONMENT" not in said:
        pytest.skip("this torch is built without OpenMP")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in said.replace('"', "'")
