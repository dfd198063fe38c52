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
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gradsift.compute.executor import Executor, Serial
from gradsift.compute.ray_workers import POLL, START, Round, Slot, fingerprint, full, join, plain_tensors
from gradsift.compute.stopping import interruptible, stop_here
from gradsift.config import Config
from gradsift.errors import ResourceError
from gradsift.store.atomic import TEMP, write_atomic

T = TypeVar("T")


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
        self.slots: list[Slot] = []
        self._ray: Any = None
        self.gpu = ""

    def map(
        self, make_worker: Callable[[], Callable[[Any], T]], shards: Sequence[int], part: Callable[[int], Any] | None = None
    ) -> Iterator[tuple[int, T]]:
        """As Executor.map. After SIGINT or SIGTERM the shards in hand are finished and yielded, no other begun."""
        if not len(shards):
            return
        with interruptible():
            self.connect()
            try:
                yield from Round(self, self.put(make_worker), shards, part or (lambda shard: shard)).run()
            finally:
                for slot in self.slots:
                    slot.rest()

    def put(self, thing: Any) -> Any:
        """A reference to `thing` in the cluster's object store. Raises ResourceError where it is full."""
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

    def blind(self, folder: Path) -> str | None:
        """Which machine with room for workers cannot read a folder of this one, and why; None where all can: a shared file system.

        Each is asked for a file that is written for that: a folder of the same name elsewhere does not hold it, and no cache of a network file
        system can have an old answer. Raises ResourceError where this process may not write there, Interrupted.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        self._join()
        path, nonce = folder / f"{TEMP}seen-{secrets.token_hex(8)}", secrets.token_hex(16)
        write_atomic(path, nonce.encode())
        try:
            look = self._ray.remote(num_cpus=0, max_retries=0)(_read)
            asked = {
                look.options(scheduling_strategy=On(node, soft=False)).remote(str(path)): name for node, name, room in self._nodes() if room
            }
            with interruptible():
                for ref, name in asked.items():
                    found = self._answer(ref)
                    if isinstance(found, self._ray.exceptions.TaskUnschedulableError | self._ray.exceptions.NodeDiedError):
                        continue  # it has left since: what it would read matters to nobody
                    if found != nonce:
                        return f"{name}: {found if isinstance(found, Exception) else 'another folder has that name there'}"
        finally:
            path.unlink(missing_ok=True)
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
                most = [int(has.get("CPU", 0) // self._cpus)] + ([int(has.get("GPU", 0) // self.gpus)] if self.gpus else [])
                found.append((node["NodeID"], f"{node['NodeManagerHostname']} (node {node['NodeID'][:12]})", min(most)))
        return found

    def _join(self) -> None:
        if self._ray is None:
            self._ray = join(self.address)
            plain_tensors()

    @property
    def _cpus(self) -> int:
        return 1 if self.gpus else self.threads

    def connect(self) -> None:
        """Joins the cluster and makes the slots of workers, once."""
        if not self.slots:
            room = self.room()
            if not room and not self._wanted:
                raise ResourceError(
                    f"no machine of the Ray cluster has room for a worker of {self._cpus} CPUs and {self.gpus} GPUs",
                    remedy="Lower --threads or --gpus-per-worker, or start `ray start` with more.",
                )
            if self._wanted > room:
                self._note(f"{self._wanted} workers asked for, room for {room} now: the others begin when there is more")
            self.slots = [Slot(self, number) for number in range(self._wanted or room)]

    def close(self) -> None:
        """As Executor.close."""
        for slot in self.slots:
            slot.end()
        self.slots = []


_SHARE = "to spread them too, put the run on a file system that every machine has under the same path"


def _read(path: str) -> str | OSError:
    """In a task on another machine: a small file, or why not."""
    try:
        return Path(path).read_text()
    except OSError as error:
        return OSError(error.strerror)


def executor_of(config: Config, threads: int, note: Callable[[str], None] | None = None) -> Executor:
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


def mapping(executor: Executor, folder: Path) -> Callable[..., Any]:
    """The `map` for rules over rows stored in `folder`: over the executor's workers where it has some and they can read that folder, the
    built-in one elsewhere. The bytes are the same."""
    return _Spread(executor, folder) if isinstance(executor, Ray) else builtins.map


class _Spread:
    """`Ray.spread` as an attribute of an object that is itself sent to workers: there it is the built-in map."""

    def __init__(self, executor: Ray, folder: Path) -> None:
        self._executor, self._folder = executor, folder.absolute()
        self._seen: bool | None = None

    def __call__(self, function: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
        given = list(items)
        if len(given) < 2:
            return builtins.map(function, given)
        if self._seen is None:
            blind = self._executor.blind(self._folder)
            self._seen = blind is None
            if blind is not None:
                self._executor._note(
                    f"workers cannot read {self._folder} on {blind}. Clustering and matching stay in this process; {_SHARE}"
                )
        return self._executor.spread(function, given) if self._seen else builtins.map(function, given)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (builtins, "map")
