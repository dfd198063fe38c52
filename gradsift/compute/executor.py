"""Running the shards of a stage, writing them behind the work, and stopping cleanly between them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

from gradsift.compute import machine
from gradsift.compute.stopping import interruptible, stop_here
from gradsift.store.rows import RowStore

T = TypeVar("T")


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
