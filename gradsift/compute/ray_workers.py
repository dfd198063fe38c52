"""Keeping workers at work on Ray: joining a cluster, what runs in an actor, and who does which
shard when some die or hang.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsift.compute import machine
from gradsift.compute.stopping import stop_here
from gradsift.errors import Interrupted, MismatchError, ResourceError, UserError

TRIES = 3  # workers that may be lost over one shard, and in a row before any has begun to work
START = 600.0  # seconds in which the first worker must find a place
POLL = 0.2  # seconds between looks at clocks and signals
_MISSING = 'Install it: pip install "gradsift[ray]".'


def fingerprint(threads: int, *, cpu: bool) -> dict[str, str]:
    """What must be the same on two machines for the same bytes: versions, threads and, for work on
    the CPU, its kind.
    """
    found = {
        name: importlib.metadata.version(name)
        for name in ("gradsift", "torch", "transformers", "peft")
    }
    return found | {"threads": str(threads)} | ({"machine": machine.cpu_kind()} if cpu else {})


def join(address: str | None) -> Any:
    """The ray module, connected. Raises UserError, ResourceError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is to be sent anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's 15 would let any other program on the machine go first
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs the package ray", remedy=_MISSING) from None
    if ray.is_initialized():
        return ray
    here = threading.current_thread() is threading.main_thread()
    before = (
        {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if here
        else {}
    )
    try:
        # A cluster of our own has no dashboard; workers' prints stay in Ray's logs, for stdout is
        # for data.
        own: dict[str, Any] = (
            {"address": "local", "include_dashboard": False}
            if address is None
            else {"address": address}
        )
        ray.init(**own, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        remedy = (
            "Start one with `ray start --head` and pass its HOST:PORT as --address."
            if address
            else "See `ray status`."
        )
        raise ResourceError(
            f"cannot join the Ray cluster ({said})", where=address, remedy=remedy
        ) from error
    finally:
        _leave_stdout_alone()
        for number, handler in before.items():
            # ray.init sets its own, which would end the run in the middle of a shard
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    return ray


def _leave_stdout_alone() -> None:
    """Ray tells of lost workers on stdout, where our data goes; there is no setting for it. To
    stderr, as far as this Ray is built like that.
    """
    from ray._private import worker

    tell: Any = getattr(worker, "print_to_stdstream", None)
    if tell is not None:
        worker.print_to_stdstream = lambda data, ignore_prefix: tell(
            {**data, "is_err": True}, ignore_prefix
        )


def full(error: Exception) -> ResourceError:
    """What Ray's refusal of an object means to the user."""
    remedy = (
        "Start Ray with a larger --object-store-memory (`gradsift plan --executor ray` says how"
        " large), or take a smaller --shard-rows."
    )
    return ResourceError(
        f"Ray's object store is full ({' '.join(str(error).split())[:120]})", remedy=remedy
    )


# --- tensors on the way: raw bytes, outside the pickle; torch's own aligned memory at the end


def plain_tensors() -> None:
    from ray.util import register_serializer

    register_serializer(Tensor, serializer=_flatten, deserializer=_restore)


def _flatten(tensor: Tensor) -> tuple[Any, torch.dtype, tuple[int, ...]]:
    plain = tensor.detach().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy(), plain.dtype, tuple(plain.shape)


def _restore(given: tuple[Any, torch.dtype, tuple[int, ...]]) -> Tensor:
    data, dtype, shape = given
    return torch.tensor(data, dtype=torch.uint8).view(dtype).reshape(shape)


# --- a worker, on its machine


class Worker:
    """What runs in the actor."""

    def __init__(self, threads: int) -> None:
        machine.settle(threads)
        plain_tensors()
        self._work: Callable[[Any], Any] | None = None

    def hello(self, threads: int, cpu: bool) -> tuple[str, dict[str, str], str]:
        # Ray shows it its own GPUs alone
        gpu = "" if cpu else machine.gpu_kind(range(torch.cuda.device_count()))
        return socket.gethostname(), fingerprint(threads, cpu=cpu), gpu

    def build(self, make_worker: Callable[[], Callable[[Any], Any]]) -> None:
        self._work = None  # the last stage's goes first
        self._work = make_worker()

    def work(self, part: Any) -> Any:
        assert self._work is not None
        return self._work(part)


@dataclass
class _Task:
    kind: str  # hello, build or work
    ref: Any
    since: float
    shard: int
    maker: Any


@dataclass
class Workers:
    """What all workers of an executor have in common.

    Args:
        threads: of each worker.
        gpus: whole GPUs that each worker gets.
        shard_timeout: seconds after which a worker that has not answered hangs.
        expect: what a worker's machine must have in common with this one, as `fingerprint` gives
            it.
        note: hears of every worker that was lost.
        ray: the ray module, once it is connected.
    """

    threads: int
    gpus: int
    shard_timeout: float
    expect: Mapping[str, str]
    note: Callable[[str], None]
    ray: Any = None

    @property
    def cpus(self) -> int:
        """CPUs that a worker takes of its machine."""
        return 1 if self.gpus else self.threads


class Slot:
    """One place for a worker: an actor, what it was last asked, and which round's work it holds."""

    def __init__(self, workers: Workers, number: int) -> None:
        self.workers, self.number, self.host, self.gpu = workers, number, "", ""
        self.actor: Any = None
        self.task: _Task | None = None
        self.built: Any = None  # the reference of the maker whose work it holds

    def start(self) -> None:
        own = self.workers
        options = {
            "num_cpus": own.cpus,
            "num_gpus": own.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
        }
        self.actor = own.ray.remote(**options)(Worker).remote(own.threads)
        self.built = None
        self.ask("hello", own.threads, not own.gpus)

    def ask(self, kind: str, *given: Any, shard: int = -1, maker: Any = None) -> None:
        self.task = _Task(
            kind, getattr(self.actor, kind).remote(*given), time.monotonic(), shard, maker
        )

    def overdue(self) -> bool:
        """Whether the worker hangs: no answer for too long. One that is still looking for a machine
        does not, nor one whose answer waits for a caller who was busy himself.
        """
        task = self.task
        if (
            task is None
            or task.kind == "hello"
            or time.monotonic() - task.since <= self.workers.shard_timeout
        ):
            return False
        # it may lie on the worker's machine still
        answered, _ = self.workers.ray.wait([task.ref], timeout=0, fetch_local=False)
        return not answered

    def end(self) -> None:
        if self.actor is not None:
            with contextlib.suppress(Exception):  # it may be gone already, and Ray with it
                self.workers.ray.kill(self.actor, no_restart=True)
        self.actor, self.task, self.built = None, None, None

    def rest(self) -> None:
        """Between rounds: one that is still at a shard that nobody waits for any more is let go."""
        if self.task is not None and self.task.kind == "work":
            self.end()


class Round:
    """One map: shards to do, and what has gone wrong so far."""

    def __init__(
        self,
        workers: Workers,
        slots: Sequence[Slot],
        maker: Any,
        shards: Sequence[int],
        part: Callable[[int], Any],
    ) -> None:
        self.workers, self.maker, self.part, self.slots = workers, maker, part, slots
        self.todo = deque(shards)
        self.lost: Counter[int] = Counter()
        self.stillborn = 0  # workers in a row that were lost before they did a shard
        self.alone_since = time.monotonic()
        self.stopped: Interrupted | None = None

    def run(self) -> Iterator[tuple[int, Any, str]]:
        """Yields (shard, result, kind of GPU that made it)."""
        while True:
            self._heed()
            self._assign()
            if self.stopped is not None and not self._in_hand():
                raise self.stopped
            if not self.todo and not self._in_hand():
                return
            yield from self._collect()
            for slot in self.slots:
                if slot.overdue():
                    self._lose(slot, f"no answer within {self.workers.shard_timeout:g} s")

    def _heed(self) -> None:
        try:
            stop_here()
        except Interrupted as stop:
            self.stopped, self.todo = stop, deque()

    def _in_hand(self) -> bool:
        return any(slot.task is not None and slot.task.kind == "work" for slot in self.slots)

    def _assign(self) -> None:
        """Something to do for every idle worker, while there is; no more workers than shards."""
        for slot in self.slots:
            if (
                self.todo
                and slot.actor is not None
                and slot.task is None
                and slot.built is self.maker
            ):
                shard = self.todo.popleft()
                slot.ask("work", self.part(shard), shard=shard)
        building = sum(slot.task is not None and slot.task.kind == "build" for slot in self.slots)
        for slot in self.slots:
            if (
                slot.actor is not None
                and slot.task is None
                and slot.built is not self.maker
                and building < len(self.todo)
            ):
                building += 1
                slot.ask("build", self.maker, maker=self.maker)
        coming = building + sum(
            slot.task is not None and slot.task.kind == "hello" for slot in self.slots
        )
        for slot in self.slots:
            if slot.actor is None and coming < len(self.todo):
                coming += 1
                slot.start()

    def _collect(self) -> Iterator[tuple[int, Any, str]]:
        waiting = {slot.task.ref: slot for slot in self.slots if slot.task is not None}
        if all(slot.task is None or slot.task.kind == "hello" for slot in self.slots):
            if time.monotonic() - self.alone_since > START:
                raise ResourceError(
                    f"no worker could be started in {START:g} s",
                    remedy="See `ray status` for what the cluster has and who holds it.",
                )
        else:
            self.alone_since = time.monotonic()
        if not waiting:
            return
        done, _ = self.workers.ray.wait(list(waiting), num_returns=1, timeout=POLL)
        for ref in done:
            slot = waiting[ref]
            try:
                value = self.workers.ray.get(ref)
            except Exception as error:
                self._failed(slot, error)
                continue
            task, slot.task = slot.task, None
            assert task is not None
            if task.kind == "hello":
                self._check(slot, *value)
            elif task.kind == "build":
                slot.built = task.maker  # perhaps of the round before
            else:
                self.stillborn = 0
                self._assign()  # the worker goes on while the caller writes
                yield task.shard, value, slot.gpu

    def _check(self, slot: Slot, host: str, found: Mapping[str, str], gpu: str) -> None:
        slot.host, slot.gpu = host, gpu
        for name, ours in self.workers.expect.items():
            if found.get(name) != ours:
                remedy = (
                    "Give every machine of the cluster the same installation (and kind of CPU)."
                )
                raise MismatchError(
                    f"a worker has {name} {found.get(name)!r}, this process {ours!r}",
                    where=host,
                    remedy=remedy,
                )

    def _failed(self, slot: Slot, error: Exception) -> None:
        from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

        if isinstance(error, RayTaskError):
            cause = getattr(error, "cause", None)
            # the worker stays, what it held may be half of something
            slot.task, slot.built = None, None
            raise cause if isinstance(cause, BaseException) else error
        if not isinstance(error, RayError):
            raise error
        if isinstance(error, ObjectStoreFullError | OutOfDiskError):
            raise full(error) from error
        self._lose(slot, " ".join(str(error).split())[:160])

    def _lose(self, slot: Slot, why: str) -> None:
        task, host = slot.task, slot.host
        slot.end()
        shard = -1 if task is None or task.kind != "work" else task.shard
        where = f" on {host}" if host else ""
        if shard < 0:
            self.stillborn += 1
            if self.stillborn >= TRIES * len(self.slots):
                raise ResourceError(
                    f"{self.stillborn} workers in a row were lost as they started; the last{where}:"
                    f" {why}",
                    remedy=_REMEDY,
                )
            self.workers.note(
                f"worker {slot.number}{where} was lost as it started ({why}); another takes its"
                " place"
            )
            return
        self.lost[shard] += 1
        if self.lost[shard] >= TRIES:
            raise ResourceError(
                f"shard {shard} has cost {TRIES} workers; the last{where}: {why}", remedy=_REMEDY
            )
        self.workers.note(
            f"worker {slot.number}{where} was lost at shard {shard} ({why}); another does it again"
        )
        if self.stopped is None:
            self.todo.appendleft(shard)


_REMEDY = (
    "Raise --shard-timeout if the work is slow, give workers more memory if it is short, then run"
    " the same command: nothing is lost."
)
