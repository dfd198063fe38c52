"""The same map over the same shards on Ray: several processes, several GPUs, several machines.

One actor is one worker: it builds its model once and keeps it from stage to stage. The driver hands
every worker one shard at a time, takes the result over the object store and lets the caller write
it, so no worker needs the run's folder, and the object store never holds more than one shard's
input and one result per worker. Which worker does a shard, and in which order they end, changes no
byte of any result.

A worker that dies, alone or with its machine, or that hangs is replaced, and its shard is done
again elsewhere. An error of the work itself is the caller's: it comes through with its own type and
remedy.

Ray passes Python objects between its own processes by pickle, so a Ray cluster is to be reachable
by those alone who may run code on it.
"""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from gradsift.compute.executor import Executor, Serial
from gradsift.compute.ray_workers import (
    POLL,
    START,
    Round,
    Slot,
    Workers,
    fingerprint,
    full,
    join,
    plain_tensors,
)
from gradsift.compute.stopping import interruptible, stop_here
from gradsift.config import Config
from gradsift.errors import ResourceError
from gradsift.types import counted

T = TypeVar("T")


class Ray:
    """Executor over Ray actors. Results are those of Serial, byte for byte, where the workers'
    machines are as the driver's.

    threads: of every worker, the run's own. workers: how many; 0 = as many as the cluster has room
    for. address: of a running cluster ("HOST:PORT", or "auto"); None = one of this machine's own,
    for as long as this process lives. gpus: that every worker gets, whole. shard_timeout: seconds
    after which a worker that has not finished a shard (or loading its model) is taken to hang.
    note: told of every worker that was lost. expect: what workers must have in common with the
    driver, as `fingerprint` tells it.

    Raises UserError when ray is not installed; ResourceError when there is no cluster or no room,
    or the workers keep dying; MismatchError for a worker whose machine would make other numbers.
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
        self.threads, self.gpus, self.address = threads, gpus, address
        self.note = note or (lambda _: None)
        expected = fingerprint(threads, cpu=not gpus) if expect is None else expect
        self.workers = Workers(threads, gpus, shard_timeout, dict(expected), self.note)
        self._wanted = workers
        self.slots: list[Slot] = []
        self._ray: Any = None
        self.gpu = ""

    def map(
        self,
        make_worker: Callable[[], Callable[[Any], T]],
        shards: Sequence[int],
        part: Callable[[int], Any] | None = None,
    ) -> Iterator[tuple[int, T]]:
        """As Executor.map. After SIGINT or SIGTERM the shards in hand are finished and yielded, no
        other begun.
        """
        if not len(shards):
            return
        with interruptible():
            self.connect()
            try:
                for shard, value, gpu in Round(
                    self.workers, self.slots, self.put(make_worker), shards, part or int
                ).run():
                    self.gpu = gpu
                    yield shard, value
            finally:
                for slot in self.slots:
                    slot.rest()

    def put(self, thing: Any) -> Any:
        """A reference to `thing` in the cluster's object store. Raises ResourceError where it is
        full.
        """
        from ray.exceptions import ObjectStoreFullError, OutOfDiskError

        try:
            return self._ray.put(thing)
        except (ObjectStoreFullError, OutOfDiskError) as error:
            raise full(error) from error

    def spread(self, function: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
        """function(item) of every item, in order: what the rules take as their `map`."""
        given, waiting, following = list(items), {}, 0
        for place, value in self.map(lambda: function, range(len(given)), given.__getitem__):
            waiting[place] = value
            while following in waiting:
                yield waiting.pop(following)
                following += 1

    def blind(self, path: Path, text: str) -> str | None:
        """Which machine with room for workers cannot read `text` in the file `path`, and why; None
        where all can: a shared file system.

        The file is to be new and its text known to nobody: a folder of the same name elsewhere does
        not hold it, and no cache of a network file system can have an old answer. Raises
        Interrupted.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        self._join()
        look = self._ray.remote(num_cpus=0, max_retries=0)(_read)
        asked = {
            look.options(scheduling_strategy=On(node, soft=False)).remote(str(path)): name
            for node, name, room in self._nodes()
            if room
        }
        with interruptible():
            for ref, name in asked.items():
                answer = self._answer(ref)
                if isinstance(
                    answer,
                    self._ray.exceptions.TaskUnschedulableError
                    | self._ray.exceptions.NodeDiedError,
                ):
                    continue  # it has left since: what it would read matters to nobody
                if answer != text:
                    why = (
                        answer
                        if isinstance(answer, Exception)
                        else "another folder has that name there"
                    )
                    return f"{name}: {why}"
        return None

    def _answer(self, ref: Any) -> Any:
        """What a task gives, or the exception that stands for it."""
        until = time.monotonic() + START
        while not self._ray.wait([ref], timeout=POLL)[0]:
            stop_here()
            if time.monotonic() > until:
                return TimeoutError(f"no answer in {START:g} s")
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return error

    def room(self) -> int:
        """Workers that the machines now in the cluster have room for. Joins it, starts nothing."""
        self._join()
        return sum(room for _, _, room in self._nodes())

    def _nodes(self) -> list[tuple[str, str, int]]:
        """Id, name for people, and room for workers of every machine that is up."""
        found = []
        for node in self._ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                most = [int(has.get("CPU", 0) // self.workers.cpus)] + (
                    [int(has.get("GPU", 0) // self.gpus)] if self.gpus else []
                )
                found.append(
                    (
                        node["NodeID"],
                        f"{node['NodeManagerHostname']} (node {node['NodeID'][:12]})",
                        min(most),
                    )
                )
        return found

    def _join(self) -> None:
        if self._ray is None:
            self._ray = self.workers.ray = join(self.address)
            plain_tensors()

    def connect(self) -> None:
        """Joins the cluster and makes a place for each worker. Raises ResourceError where there is
        no room.
        """
        if not self.slots:
            room = self.room()
            if not room and not self._wanted:
                raise ResourceError(
                    f"no machine of the Ray cluster has room for a worker of {self.workers.cpus}"
                    f" CPUs and {counted(self.gpus, 'GPU')}",
                    remedy="Lower --threads or --gpus-per-worker, or start `ray start` with more.",
                )
            if self._wanted > room:
                self.note(
                    f"{counted(self._wanted, 'worker')} asked for, room for {room} now: the"
                    " others begin when"
                    " there is more"
                )
            self.slots = [Slot(self.workers, number) for number in range(self._wanted or room)]

    def close(self) -> None:
        """As Executor.close."""
        for slot in self.slots:
            slot.end()
        self.slots = []


_SHARE = (
    "to spread them too, put the run on a file system that every machine has under the same path"
)


def _read(path: str) -> str | OSError:
    """In a task on another machine: a small file, or why not."""
    try:
        return Path(path).read_text()
    except OSError as error:
        return OSError(error.strerror)


def executor_of(
    config: Config, threads: int, note: Callable[[str], None] | None = None
) -> Executor:
    """The executor that the settings name, for workers of `threads` threads."""
    wanted = config.machine
    if wanted.executor == "serial":
        return Serial(config.model.device)
    return Ray(
        threads=threads,
        workers=wanted.workers,
        address=wanted.address,
        gpus=0 if config.model.device == "cpu" else wanted.gpus_per_worker,
        shard_timeout=wanted.shard_timeout,
        note=note,
    )


Marker = Callable[[], AbstractContextManager[tuple[Path, str]]]


def mapping(executor: Executor, marker: Marker) -> Callable[..., Any]:
    """The `map` for rules over stored rows: over the executor's workers where it has some and they
    can read the rows' folder, the built-in one elsewhere. The bytes are the same. `marker`: puts a
    file into that folder (`store.atomic.marker`).
    """
    return _Spread(executor, marker) if isinstance(executor, Ray) else builtins.map


class _Spread:
    """`Ray.spread` as an attribute of an object that is itself sent to workers: there it is the
    built-in map.
    """

    def __init__(self, executor: Ray, marker: Marker) -> None:
        self._executor, self._marker = executor, marker
        self._shared: bool | None = None  # whether every machine reads the folder

    def __call__(self, function: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
        given = list(items)
        if len(given) < 2:
            return builtins.map(function, given)
        if self._shared is None:
            self._shared = self._look()
        return (
            self._executor.spread(function, given)
            if self._shared
            else builtins.map(function, given)
        )

    def _look(self) -> bool:
        with self._marker() as (path, text):
            blind = self._executor.blind(path.absolute(), text)
        if blind is not None:
            folder = path.absolute().parent
            self._executor.note(
                f"workers cannot read {folder} on {blind}. Clustering and matching stay in this"
                f" process; {_SHARE}"
            )
        return blind is None

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (builtins, "map")
