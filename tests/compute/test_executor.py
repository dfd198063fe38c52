# ruff: noqa: PT012 - what a signal stops is more than one statement
"""Serial execution, stopping between shards, and writing behind the work."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from gradsift.compute.executor import Executor, Serial
from gradsift.compute.stopping import interruptible, stop_here
from gradsift.errors import Interrupted


def squares(made: list[int] | None = None, kill_at: int = -1, number: int = signal.SIGTERM):
    def make_worker():
        if made is not None:
            made.append(1)

        def work(shard: int) -> int:
            if shard == kill_at:
                os.kill(os.getpid(), number)
            return shard**2

        return work

    return make_worker


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    inherited = signal.getsignal(signal.SIGINT)
    # a background job of a shell starts with SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, inherited)
    assert after == before


def test_shards_in_order_by_one_worker() -> None:
    made: list[int] = []
    executor: Executor = Serial()
    assert list(executor.map(squares(made), [3, 1, 2])) == [(3, 9), (1, 1), (2, 4)]
    assert made == [1]
    assert list(executor.map(squares(made), [])) == []
    assert made == [1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_shard_in_hand_finish_and_begins_no_other(number: int) -> None:
    done = []
    with pytest.raises(
        Interrupted, match=f"stopped by {signal.Signals(number).name}.*resumes"
    ) as caught:
        for shard, _ in Serial().map(squares(kill_at=1, number=number), range(5)):
            done.append(shard)
    assert done == [0, 1]
    assert caught.value.exit_code == 130


def test_a_signal_during_the_last_shard_is_not_lost() -> None:
    done = []
    with pytest.raises(Interrupted):
        for shard, _ in Serial().map(squares(kill_at=4), range(5)):
            done.append(shard)
    assert done == [0, 1, 2, 3, 4]


def test_a_second_signal_stops_at_once() -> None:
    with pytest.raises(Interrupted), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        stopped = True
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        stopped = False
    assert stopped


def test_the_error_tells_the_command_that_resumes() -> None:
    with (
        pytest.raises(Interrupted, match="Resume with: gradsift select less --run r"),
        interruptible("gradsift select less --run r"),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        list(Serial().map(squares(), [1]))


def test_after_a_stop_the_next_block_begins_afresh() -> None:
    with pytest.raises(Interrupted), interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
    with interruptible():
        stop_here()
    assert list(Serial().map(squares(), [2])) == [(2, 4)]


def test_an_error_of_the_work_comes_through() -> None:
    with pytest.raises(ZeroDivisionError), interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        _ = 1 / 0


def test_signals_that_were_ignored_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            stop_here()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_it_does_nothing() -> None:
    found = []

    def work() -> None:
        with interruptible():
            found.extend(Serial().map(squares(), [1, 2]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(1, 1), (2, 4)]
