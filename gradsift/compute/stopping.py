"""Signals stop a command between two shards, and the error names the command that resumes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from gradsift.compute.progress import Progress
from gradsift.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


_RESUME = "The same command resumes: finished shards are kept."


class _Stop:
    """Which signal asked to stop, if any. One per process, as signal handlers are."""

    asked: signal.Signals | None = None
    installed = False
    resume: str | None = None


@contextlib.contextmanager
def interruptible(resume: str | None = None) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM only asks to stop: `stop_here` and the end of the block
    then raise Interrupted (exit 130).

    A second one stops at once, wherever it strikes. `resume` is the command that the error tells to
    type. Nested blocks share the outermost one's handlers, and outside the main thread, where no
    handler can be set, this does nothing. A signal that was ignored (nohup) stays so.
    """
    if _Stop.installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _Stop.asked, _Stop.resume, _Stop.installed = None, resume, True
    try:
        for number in _SIGNALS:
            if before[number] != signal.SIG_IGN:
                signal.signal(number, _on_signal)
        yield
        stop_here()
    except KeyboardInterrupt:
        raise _interrupted() from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _Stop.installed, _Stop.asked, _Stop.resume = False, None, None


def stop_here() -> None:
    """A place where work may end without loss. Raises Interrupted when a signal has asked for it
    inside `interruptible`.
    """
    if _Stop.asked is not None:
        raise _interrupted()


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _Stop.asked is not None:
        raise KeyboardInterrupt
    _Stop.asked = signal.Signals(number)
    # Not print(): the handler may have struck inside one.
    with contextlib.suppress(OSError):
        os.write(2, b"\nStopping after the shard in hand; once more to stop at once.\n")


def _interrupted() -> Interrupted:
    name = (_Stop.asked or signal.SIGINT).name
    return Interrupted(
        f"stopped by {name}", remedy=f"Resume with: {_Stop.resume}" if _Stop.resume else _RESUME
    )


class Stopping:
    """Progress that is also a place to stop: a warm-up has no shards, and none of its work is lost
    that could be kept.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def start(self, total: int, unit: str, label: str = "") -> None:
        self._progress.start(total, unit, label)

    def advance(self, k: int = 1) -> None:
        self._progress.advance(k)
        stop_here()

    def note(self, text: str) -> None:
        self._progress.note(text)

    def done(self) -> None:
        self._progress.done()
