"""Running the shards of a stage, writing them behind the work, and stopping cleanly between them."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Protocol, TypeVar

from torch import Tensor

from gradsift.compute import machine
from gradsift.compute.progress import Progress
from gradsift.errors import Interrupted
from gradsift.store.rows import RowStore

T = TypeVar("T")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_RESUME = "The same command resumes: finished shards are kept."


class Executor(Protocol):
    """Where shards are worked on. `make_worker` is called once per worker, there (it loads the model); the worker takes part(shard), which is
    called here, or the shard's number where there is no `part`. `remote`: workers are other processes, perhaps on other machines: they see
    what `make_worker` and `part` bring along, and nothing else. `gpu`: the kind of GPU that made the result yielded last, "" for a CPU.
    """

    remote: bool
    gpu: str

    def map(
        self, make_worker: Callable[[], Callable[[Any], T]], shards: Sequence[int], part: Callable[[int], Any] | None = None
    ) -> Iterator[tuple[int, T]]:
        """Yields (shard, result) as they finish, in any order. Raises Interrupted after a signal, and whatever a worker raises."""
        ...

    def close(self) -> None:
        """Lets the workers go. The next `map` makes others."""
        ...


class Serial:
    """One worker in this process, shards in the given order. `device`: where its model is."""

    remote = False

    def __init__(self, device: str = "cpu") -> None:
        self._device, self.gpu = device, ""

    def map(
        self, make_worker: Callable[[], Callable[[Any], T]], shards: Sequence[int], part: Callable[[int], Any] | None = None
    ) -> Iterator[tuple[int, T]]:
        """As Executor.map. After SIGINT or SIGTERM the shard in hand is finished and yielded, no other begun; no shards, no worker."""
        if not shards:
            return
        with interruptible():
            worker = make_worker()
            self.gpu = "" if self._device == "cpu" else machine.gpu_kind([self._device])
            for shard in shards:
                stop_here()
                yield shard, worker(shard if part is None else part(shard))

    def close(self) -> None:
        """There is nothing to let go."""


class _Stop:
    """Which signal asked to stop, if any. One per process, as signal handlers are."""

    asked: signal.Signals | None = None
    installed = False
    resume: str | None = None


@contextlib.contextmanager
def interruptible(resume: str | None = None) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM only asks to stop: `stop_here` and the end of the block then raise Interrupted (exit 130).

    A second one stops at once, wherever it strikes. `resume` is the command that the error tells to type. Nested blocks share the outermost
    one's handlers, and outside the main thread, where no handler can be set, this does nothing. A signal that was ignored (nohup) stays so.
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
    """A place where work may end without loss. Raises Interrupted when a signal has asked for it inside `interruptible`."""
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
    return Interrupted(f"stopped by {name}", remedy=f"Resume with: {_Stop.resume}" if _Stop.resume else _RESUME)


class Stopping:
    """Progress that is also a place to stop: a warm-up has no shards, and none of its work is lost that could be kept."""

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


class ShardWriter:
    """Writes shards in a thread while the next is computed: `with ShardWriter(store) as writer: writer.write(shard, rows, ...)`.

    At most `depth` shards wait, so memory is bounded. An error of the thread is raised in the caller at the next `write`, or on leaving
    the block; on leaving normally every shard handed over is on disk. Tensors handed over must not be changed afterwards.
    """

    def __init__(self, store: RowStore, depth: int = 2) -> None:
        self._store = store
        self._queue: queue.Queue[tuple[int, Tensor, dict[str, Any]] | None] = queue.Queue(maxsize=depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)

    def write(self, shard: int, rows: Tensor, *, norms: Tensor, losses: Tensor, tokens: Tensor, codes: Tensor | None = None) -> None:
        self._raise()
        self._queue.put((shard, rows, {"norms": norms, "losses": losses, "tokens": tokens, "codes": codes}))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._store.write(item[0], item[1], **item[2])
                except BaseException as error:
                    self._error = error
            del item

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> ShardWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()
