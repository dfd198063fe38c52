"""The same map over the same shards on Ray: several processes, several GPUs, several machines.

One actor is one worker: it builds its model once and keeps it from stage to stage. The driver hands every worker one shard at a time, takes
the result over the object store and lets the caller write it, so no worker needs the run's folder, and the object store never holds more than
one shard's input and one result per worker. Which worker does a shard, and in which order they end, changes no byte of any result.

A worker that dies, alone or with its machine, or that hangs is replaced, and its shard is done again elsewhere. An error of the work itself
is the caller's: it comes through with its own type and remedy.

Ray passes Python objects between its own processes by pickle, so a Ray cluster is to be reachable by those alone who may run code on it.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.metadata
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradsift import machine
from gradsift.config import Config
from gradsift.errors import Interrupted, MismatchError, ResourceError, UserError
from gradsift.execute import Executor, Serial, interruptible, stop_here

T = TypeVar("T")
TRIES = 3  # workers that may be lost over one shard, and in a row before any has begun to work
START = 600.0  # seconds in which the first worker must find a place
_POLL = 0.2  # seconds between looks at clocks and signals
_MISSING = 'Install it: pip install "gradsift[ray]".'


class Ray:
    """Executor over Ray actors. Results are those of Serial, byte for byte, where the workers' machines are as the driver's.

    threads: of every worker, the run's own. workers: how many; 0 = as many as the cluster has room for. address: of a running cluster
    ("HOST:PORT", or "auto"); None = one of this machine's own, for as long as this process lives. gpus: that every worker gets, whole.
    shard_timeout: seconds after which a worker that has not finished a shard (or loading its model) is taken to hang. note: told of every
    worker that was lost. expect: what workers must have in common with the driver, as `fingerprint` tells it.

    Raises UserError when ray is not installed; ResourceError when there is no cluster or no room, or the workers keep dying;
    MismatchError for a worker whose machine would make other numbers.
    """

    remote = True

    def __init__(
        self,
        *,
        threads: int,
        workers: int = 0,
        address: str | None = None,
        gpus: int = 0,
        shard_timeout: float = 3600.0,
        note: Callable[[str], None] | None = None,
        expect: Mapping[str, str] | None = None,
    ) -> None:
        self.threads, self.gpus, self.address, self.shard_timeout = threads, gpus, address, shard_timeout
        self.expect = dict(fingerprint(threads, cpu=not gpus) if expect is None else expect)
        self._note = note or (lambda _: None)
        self._wanted = workers
        self._slots: list[_Slot] = []
        self._ray: Any = None

    def map(
        self, make_worker: Callable[[], Callable[[Any], T]], shards: Sequence[int], part: Callable[[int], Any] | None = None
    ) -> Iterator[tuple[int, T]]:
        """As Executor.map. After SIGINT or SIGTERM the shards in hand are finished and yielded, no other begun."""
        if not len(shards):
            return
        with interruptible():
            self._connect()
            try:
                yield from _Round(self, self._ray.put(make_worker), shards, part or (lambda shard: shard)).run()
            finally:
                for slot in self._slots:
                    slot.rest()

    def spread(self, function: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
        """function(item) of every item, in order: what the rules take as their `map`."""
        given, waiting, following = list(items), {}, 0
        for place, value in self.map(lambda: function, range(len(given)), given.__getitem__):
            waiting[place] = value
            while following in waiting:
                yield waiting.pop(following)
                following += 1

    def room(self) -> int:
        """Workers that the machines now in the cluster have room for."""
        found = 0
        for node in self._ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                most = [int(has.get("CPU", 0) // self._cpus)]
                found += min(most + ([int(has.get("GPU", 0) // self.gpus)] if self.gpus else []))
        return found

    @property
    def _cpus(self) -> int:
        return 1 if self.gpus else self.threads

    def _connect(self) -> None:
        if self._ray is None:
            self._ray = _join(self.address)
            _plain_tensors()
        if not self._slots:
            room = self.room()
            if not room and not self._wanted:
                raise ResourceError(
                    f"no machine of the Ray cluster has room for a worker of {self._cpus} CPUs and {self.gpus} GPUs",
                    remedy="Lower --threads or --gpus-per-worker, or start `ray start` with more.",
                )
            if self._wanted > room:
                self._note(f"{self._wanted} workers asked for, room for {room} now: the others begin when there is more")
            self._slots = [_Slot(self, number) for number in range(self._wanted or room)]

    def close(self) -> None:
        """Lets the workers go. The next `map` starts others."""
        for slot in self._slots:
            slot.end()
        self._slots = []


def executor_of(config: Config, threads: int, note: Callable[[str], None] | None = None) -> Executor:
    """The executor that the settings name, for workers of `threads` threads."""
    wanted = config.machine
    if wanted.executor == "serial":
        return Serial()
    return Ray(
        threads=threads,
        workers=wanted.workers,
        address=wanted.address,
        gpus=0 if config.model.device == "cpu" else wanted.gpus_per_worker,
        shard_timeout=wanted.shard_timeout,
        note=note,
    )


def fingerprint(threads: int, *, cpu: bool) -> dict[str, str]:
    """What must be the same on two machines for the same bytes: versions, threads and, for work on the CPU, its kind."""
    found = {name: importlib.metadata.version(name) for name in ("gradsift", "torch", "transformers", "peft")}
    return found | {"threads": str(threads)} | ({"machine": machine.cpu_kind()} if cpu else {})


def mapping(executor: Any) -> Callable[..., Any]:
    """The `map` for rules: over the executor's workers where it has some, the built-in one elsewhere. The bytes are the same."""
    return _Spread(executor) if getattr(executor, "remote", False) else builtins.map


class _Spread:
    """`Ray.spread` as an attribute of an object that is itself sent to workers: there it is the built-in map."""

    def __init__(self, executor: Ray) -> None:
        self._executor = executor

    def __call__(self, function: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
        return self._executor.spread(function, items)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (builtins, "map")


def _join(address: str | None) -> Any:
    """The ray module, connected. Raises UserError, ResourceError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is to be sent anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs the package ray", remedy=_MISSING) from None
    if ray.is_initialized():
        return ray
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if here else {}
    try:
        # A cluster of our own has no dashboard; workers' prints stay in Ray's logs, for stdout is for data.
        own: dict[str, Any] = {"address": "local", "include_dashboard": False} if address is None else {"address": address}
        ray.init(**own, log_to_driver=False, logging_level="error", configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        remedy = "Start one with `ray start --head` and pass its HOST:PORT as --address." if address else "See `ray status`."
        raise ResourceError(f"cannot join the Ray cluster ({said})", where=address, remedy=remedy) from error
    finally:
        _leave_stdout_alone()
        for number, handler in before.items():  # ray.init sets its own, which would end the run in the middle of a shard
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    return ray


def _leave_stdout_alone() -> None:
    """Ray tells of lost workers on stdout, where our data goes; there is no setting for it. To stderr, as far as this Ray is built like that."""
    from ray._private import worker

    tell: Any = getattr(worker, "print_to_stdstream", None)
    if tell is not None:
        worker.print_to_stdstream = lambda data, ignore_prefix: tell({**data, "is_err": True}, ignore_prefix)


# --- tensors on the way: raw bytes, outside the pickle, and into torch's own aligned memory at the other end


def _plain_tensors() -> None:
    from ray.util import register_serializer

    register_serializer(Tensor, serializer=_flatten, deserializer=_restore)


def _flatten(tensor: Tensor) -> tuple[Any, torch.dtype, tuple[int, ...]]:
    plain = tensor.detach().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy(), plain.dtype, tuple(plain.shape)


def _restore(given: tuple[Any, torch.dtype, tuple[int, ...]]) -> Tensor:
    data, dtype, shape = given
    return torch.tensor(data, dtype=torch.uint8).view(dtype).reshape(shape)


# --- a worker, on its machine


class _Worker:
    """What runs in the actor."""

    def __init__(self, threads: int) -> None:
        machine.settle(threads)
        _plain_tensors()
        self._work: Callable[[Any], Any] | None = None

    def hello(self, threads: int, cpu: bool) -> tuple[str, dict[str, str]]:
        return socket.gethostname(), fingerprint(threads, cpu=cpu)

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


class _Slot:
    """One place for a worker: an actor, what it was last asked, and which round's work it holds."""

    def __init__(self, executor: Ray, number: int) -> None:
        self.executor, self.number, self.host = executor, number, ""
        self.actor: Any = None
        self.task: _Task | None = None
        self.built: Any = None  # the reference of the maker whose work it holds

    def start(self) -> None:
        ray, own = self.executor._ray, self.executor
        options = {"num_cpus": own._cpus, "num_gpus": own.gpus, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
        self.actor = ray.remote(**options)(_Worker).remote(own.threads)
        self.built = None
        self.ask("hello", own.threads, not own.gpus)

    def ask(self, kind: str, *given: Any, shard: int = -1, maker: Any = None) -> None:
        self.task = _Task(kind, getattr(self.actor, kind).remote(*given), time.monotonic(), shard, maker)

    def overdue(self) -> bool:
        task = self.task  # a worker that is still looking for a machine does not hang
        return task is not None and task.kind != "hello" and time.monotonic() - task.since > self.executor.shard_timeout

    def end(self) -> None:
        if self.actor is not None:
            with contextlib.suppress(Exception):  # it may be gone already, and Ray with it
                self.executor._ray.kill(self.actor, no_restart=True)
        self.actor, self.task, self.built = None, None, None

    def rest(self) -> None:
        """Between rounds: one that is still at a shard that nobody waits for any more is let go."""
        if self.task is not None and self.task.kind == "work":
            self.end()


class _Round:
    """One map: shards to do, and what has gone wrong so far."""

    def __init__(self, executor: Ray, maker: Any, shards: Sequence[int], part: Callable[[int], Any]) -> None:
        self.executor, self.maker, self.part, self.slots = executor, maker, part, executor._slots
        self.todo = deque(shards)
        self.lost: Counter[int] = Counter()
        self.stillborn = 0  # workers in a row that were lost before they did a shard
        self.alone_since = time.monotonic()
        self.stopped: Interrupted | None = None

    def run(self) -> Iterator[tuple[int, Any]]:
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
                    self._lose(slot, f"no answer within {self.executor.shard_timeout:g} s")

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
            if self.todo and slot.actor is not None and slot.task is None and slot.built is self.maker:
                shard = self.todo.popleft()
                slot.ask("work", self.part(shard), shard=shard)
        coming = sum(slot.task is not None and slot.task.kind != "work" for slot in self.slots)
        for slot in sorted(self.slots, key=lambda slot: slot.actor is None):
            if slot.task is None and slot.built is not self.maker and coming < len(self.todo):
                coming += 1
                if slot.actor is None:
                    slot.start()
                else:
                    slot.ask("build", self.maker, maker=self.maker)

    def _collect(self) -> Iterator[tuple[int, Any]]:
        waiting = {slot.task.ref: slot for slot in self.slots if slot.task is not None}
        if all(slot.task is None or slot.task.kind == "hello" for slot in self.slots):
            if time.monotonic() - self.alone_since > START:
                raise ResourceError(
                    f"no worker could be started in {START:g} s", remedy="See `ray status` for what the cluster has and who holds it."
                )
        else:
            self.alone_since = time.monotonic()
        if not waiting:
            return
        done, _ = self.executor._ray.wait(list(waiting), num_returns=1, timeout=_POLL)
        for ref in done:
            slot = waiting[ref]
            try:
                value = self.executor._ray.get(ref)
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
                yield task.shard, value

    def _check(self, slot: _Slot, host: str, found: Mapping[str, str]) -> None:
        slot.host = host
        for name, ours in self.executor.expect.items():
            if found.get(name) != ours:
                remedy = "Give every machine of the cluster the same installation (and kind of CPU)."
                raise MismatchError(f"a worker has {name} {found.get(name)!r}, this process {ours!r}", where=host, remedy=remedy)

    def _failed(self, slot: _Slot, error: Exception) -> None:
        from ray.exceptions import RayError, RayTaskError

        if isinstance(error, RayTaskError):
            cause = getattr(error, "cause", None)
            slot.task, slot.built = None, None  # the worker stays, what it held may be half of something
            raise cause if isinstance(cause, BaseException) else error
        if not isinstance(error, RayError):
            raise error
        self._lose(slot, " ".join(str(error).split())[:160])

    def _lose(self, slot: _Slot, why: str) -> None:
        task, host = slot.task, slot.host
        slot.end()
        shard = -1 if task is None or task.kind != "work" else task.shard
        where = f" on {host}" if host else ""
        if shard < 0:
            self.stillborn += 1
            if self.stillborn >= TRIES * len(self.slots):
                raise ResourceError(f"{self.stillborn} workers in a row were lost as they started; the last{where}: {why}", remedy=_REMEDY)
            self.executor._note(f"worker {slot.number}{where} was lost as it started ({why}); another takes its place")
            return
        self.lost[shard] += 1
        if self.lost[shard] >= TRIES:
            raise ResourceError(f"shard {shard} has cost {TRIES} workers; the last{where}: {why}", remedy=_REMEDY)
        self.executor._note(f"worker {slot.number}{where} was lost at shard {shard} ({why}); another does it again")
        if self.stopped is None:
            self.todo.appendleft(shard)


_REMEDY = "Raise --shard-timeout if the work is slow, give workers more memory if it is short, then run the same command: nothing is lost."
