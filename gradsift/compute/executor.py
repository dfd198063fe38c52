"""Running the shards of a stage, and stopping cleanly between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from gradsift.compute import machine
from gradsift.compute.stopping import interruptible, stop_here

T = TypeVar("T")


class Executor(Protocol):
    """Where shards are worked on. `make_worker` is called once per worker, there (it loads the
    model); the worker takes part(shard), which is called here, or the shard's number where there is
    no `part`. `remote`: workers are other processes, perhaps on other machines: they see what
    `make_worker` and `part` bring along, and nothing else. `gpu`: the kind of GPU that made the
    result yielded last, "" for a CPU.
    """

    remote: bool
    gpu: str

    def map(
        self,
        make_worker: Callable[[], Callable[[Any], T]],
        shards: Sequence[int],
        part: Callable[[int], Any] | None = None,
    ) -> Iterator[tuple[int, T]]:
        """Yields (shard, result) as they finish, in any order. Raises Interrupted after a signal,
        and whatever a worker raises.
        """
        ...

    def close(self) -> None:
        """Stops the workers; the next `map` starts new ones."""
        ...


class Serial:
    """One worker in this process, shards in the given order. `device`: where its model is."""

    remote = False

    def __init__(self, device: str = "cpu") -> None:
        self._device, self.gpu = device, ""

    def map(
        self,
        make_worker: Callable[[], Callable[[Any], T]],
        shards: Sequence[int],
        part: Callable[[int], Any] | None = None,
    ) -> Iterator[tuple[int, T]]:
        """As Executor.map. After SIGINT or SIGTERM the shard in hand is finished and yielded, no
        other begun; no shards, no worker.
        """
        if not shards:
            return
        with interruptible():
            worker = make_worker()
            self.gpu = "" if self._device == "cpu" else machine.gpu_kind([self._device])
            for shard in shards:
                stop_here()
                yield shard, worker(shard if part is None else part(shard))

    def close(self) -> None:
        """Nothing to stop."""
