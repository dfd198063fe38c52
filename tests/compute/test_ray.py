# ruff: noqa: PT012 - what a signal or a lost worker stops is more than one statement
"""The map on a real Ray cluster of three nodes on this machine: the bytes of Serial, whatever dies,
hangs or is interrupted.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gradsift.cli.app import app
from gradsift.commands.compare.compare import BASE, compare
from gradsift.commands.plan.costs import StageCost
from gradsift.commands.plan.probe import Rates
from gradsift.commands.plan.ray import STARTING, spread
from gradsift.compute.executor import Executor, Serial
from gradsift.compute.ray import Ray, executor_of, mapping
from gradsift.config import Config, ModelSettings, build
from gradsift.data.pool import read_pool
from gradsift.errors import (
    ConfigError,
    DiskFull,
    Interrupted,
    MismatchError,
    ResourceError,
    UnknownName,
    UserError,
)
from gradsift.methods import make
from gradsift.model.load import model_identity
from gradsift.rules import knn
from gradsift.stages.pipeline import Pipeline
from gradsift.stages.work import ModelSource
from gradsift.store.artifact import MANIFEST
from gradsift.store.atomic import marker
from gradsift.store.rows import RowStore, RowView
from gradsift.store.run import Run
from gradsift.types import Signal, Signals, counted
from tests.conftest import SETTINGS, rows, write_rows

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
    ),
    # Ray leaves the pipes and logs of its own processes to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]
# one path, and to every process its own folder: as the disks of several machines
HERE = Path("/proc/self/cwd")
SMALL = {"num_cpus": 1, "object_store_memory": 80 << 20}


@contextlib.contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cluster's processes are started: HERE is this folder to them, and another to who is
    started elsewhere.
    """
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")  # as `join` sets it for a cluster of its own
    with standing_in(home):
        made = Cluster(initialize_head=True, head_node_args={**SMALL, "include_dashboard": False})
        for _ in range(2):
            made.add_node(**SMALL)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def two(cluster: Any) -> Iterator[Ray]:
    """Two workers that all tests share: starting one takes seconds."""
    executor = Ray(threads=1, workers=2, address=cluster.address)
    yield executor
    executor.close()


@pytest.fixture(autouse=True)
def _interrupts_arrive() -> Iterator[None]:
    inherited = signal.getsignal(signal.SIGINT)
    # a background job of a shell starts with SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


def squares() -> Callable[[int], int]:
    return lambda shard: shard**2


# --- the map


def test_every_shard_once_by_as_many_workers_as_asked_for(two: Ray) -> None:
    executor: Executor = two

    def make() -> Callable[[int], tuple[int, int, int]]:
        return lambda shard: (shard**2, os.getpid(), torch.get_num_threads())

    found = dict(executor.map(make, range(12)))
    assert {shard: value for shard, (value, _, _) in found.items()} == {k: k * k for k in range(12)}
    assert os.getpid() not in {pid for _, pid, _ in found.values()} and {
        threads for _, _, threads in found.values()
    } == {1}
    assert list(executor.map(make, [])) == []


def test_part_is_called_here_and_tensors_arrive_whole_and_aligned(two: Ray) -> None:
    here = os.getpid()
    given = {
        k: torch.arange(k * 3, dtype=dtype).reshape(3, k)
        for k, dtype in enumerate([torch.float16, torch.int8, torch.bfloat16, torch.float64])
    }

    def part(shard: int) -> tuple[int, torch.Tensor]:
        return os.getpid(), given[shard]

    def make() -> Callable[[tuple[int, torch.Tensor]], tuple[bool, int, torch.Tensor]]:
        return lambda item: (
            item[0] == here,
            item[1].data_ptr() % 64 if item[1].numel() else 0,
            item[1] + 1,
        )

    for shard, (called_here, offset, back) in two.map(make, range(4), part):
        assert called_here and offset == 0
        assert back.dtype == given[shard].dtype and torch.equal(back, given[shard] + 1)
        back += 1  # memory of its own, not of the store


def test_errors_cross_with_type_remedy_and_exit_code(two: Ray) -> None:
    raised: list[Exception] = [
        UnknownName("method", "tagco", ["tagcos"]),
        DiskFull("no space", where="/x", remedy="Free some.", needed=5, free=3),
        ZeroDivisionError("a plain one"),
    ]

    def make() -> Callable[[int], None]:
        def work(shard: int) -> None:
            raise raised[shard]

        return work

    for shard, original in enumerate(raised):
        with pytest.raises(type(original)) as caught:
            list(two.map(make, [shard]))
        assert str(caught.value) == str(original)
        assert {k: v for k, v in vars(caught.value).items() if not k.startswith("__")} == vars(
            original
        )
    assert dict(two.map(squares, range(3))) == {0: 0, 1: 1, 2: 4}


def test_a_worker_that_dies_and_one_that_hangs_are_replaced(two: Ray, tmp_path: Path) -> None:
    def make() -> Callable[[int], int]:
        def work(shard: int) -> int:
            if shard in (2, 4) and not (tmp_path / str(shard)).exists():
                (tmp_path / str(shard)).touch()
                if shard == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(600)
            return shard**2

        return work

    notes: list[str] = []
    executor = Ray(threads=1, workers=1, address=two.address, shard_timeout=15, note=notes.append)
    try:
        assert dict(executor.map(make, range(6))) == {k: k * k for k in range(6)}
    finally:
        executor.close()
    assert (
        "lost at shard 2" in notes[0]
        and "lost at shard 4 (no answer within 15 s)" in notes[1]
        and len(notes) == 2
    )


def test_a_worker_hangs_until_its_answer_is_there_whoever_takes_it_late(
    two: Ray, tmp_path: Path
) -> None:
    def make() -> Callable[[int], int]:
        def work(shard: int) -> int:
            while not (tmp_path / "go").exists():
                time.sleep(0.05)
            return shard

        return work

    executor = Ray(threads=1, workers=1, address=two.address, shard_timeout=900)
    try:
        executor.connect()
        (slot,) = executor.slots
        slot.start()
        for kind, given, hangs in (
            ("hello", (), False),
            ("build", (executor.put(make),), False),
            ("work", (7,), True),
        ):
            if kind != "hello":
                slot.ask(kind, *given)
            assert slot.task is not None and not slot.overdue()
            if not hangs:
                ray.wait([slot.task.ref])
            slot.task.since -= 10_000
            assert slot.overdue() is hangs
        (tmp_path / "go").touch()
        assert ray.get(slot.task.ref) == 7 and not slot.overdue()
    finally:
        executor.close()


def test_answers_that_waited_for_a_busy_caller_are_taken_and_no_worker_is_lost(two: Ray) -> None:
    notes, found = [], {}
    executor = Ray(threads=1, workers=2, address=two.address, shard_timeout=900, note=notes.append)
    try:
        for shard, value in executor.map(squares, range(6)):
            found[shard] = value
            for slot in executor.slots:  # as after hours in which this process did something else
                if slot.task is not None and slot.task.kind == "work":
                    ray.wait([slot.task.ref])
                    slot.task.since -= 10_000
    finally:
        executor.close()
    assert found == {k: k * k for k in range(6)} and notes == []


def test_a_shard_that_costs_three_workers_ends_the_work(two: Ray) -> None:
    def make() -> Callable[[int], int]:
        def work(shard: int) -> int:
            if shard == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return shard

        return work

    done = []
    with pytest.raises(ResourceError, match=r"shard 1 has cost 3 workers.*--shard-timeout"):
        for shard, _ in two.map(make, range(3)):
            done.append(shard)
    assert 1 not in done


def test_a_worker_that_would_make_other_numbers_is_refused(two: Ray) -> None:
    executor = Ray(threads=1, workers=1, address=two.address, expect={"torch": "0.1"})
    try:
        with pytest.raises(MismatchError, match=r"a worker has torch '.*', this process '0.1'"):
            list(executor.map(squares, [1]))
    finally:
        executor.close()


def test_a_signal_lets_the_shards_in_hand_finish_and_begins_no_other(two: Ray) -> None:
    def make() -> Callable[[int], int]:
        def work(shard: int) -> int:
            time.sleep(0.3)
            return shard

        return work

    done = []
    with pytest.raises(Interrupted, match=r"stopped by SIGINT.*resumes") as caught:
        for shard, _ in two.map(make, range(20)):
            done.append(shard)
            if len(done) == 2:
                os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.exit_code == 130 and 2 <= len(done) <= 5
    assert dict(two.map(squares, [7])) == {7: 49}


def test_rules_get_a_map_in_order_that_is_the_builtin_one_elsewhere(
    two: Ray, tmp_path: Path
) -> None:
    over, here = mapping(two, lambda: marker(tmp_path)), os.getpid()
    assert list(over(lambda span: span[0] * 10 + span[1], [(3, 1), (1, 2), (2, 3)])) == [31, 12, 23]
    assert list(over(lambda _: over is builtins.map and os.getpid() != here, [0, 1])) == [
        True,
        True,
    ]
    assert list(over(lambda _: os.getpid(), [0])) == [here]
    assert mapping(Serial(), lambda: marker(tmp_path)) is builtins.map


def test_clusters_matches_and_neighbours_over_workers_have_the_bytes_of_one_process(
    two: Ray, tmp_path: Path
) -> None:
    given = torch.nn.functional.normalize(
        torch.randn(5000, 24, generator=torch.Generator().manual_seed(0)), dim=1
    )
    store = RowStore.create(
        tmp_path / "rows",
        recipe_digest="0" * 64,
        ids=[str(i) for i in range(5000)],
        dim=24,
        spec={},
        shard_rows=700,
    )
    for shard, where in enumerate(store.shards):
        ones = torch.ones(where.stop - where.start)
        store.write(shard, given[where], norms=ones, losses=ones, tokens=ones)
    view = RowView(store, np.arange(0, 5000, 1)[np.arange(5000) % 7 != 0])
    over = mapping(two, lambda: marker(tmp_path))
    selector = make("tagcos", {"clusters": 12, "iterations": 4})
    (signal,) = selector.needs()
    one, many = (
        selector.select(
            Signals({signal: view}, n=len(view), map=m), 200, rng=np.random.default_rng(0)
        )
        for m in (builtins.map, over)
    )
    assert (
        one.indices.tolist() == many.indices.tolist() and one.gains.tolist() == many.gains.tolist()
    )
    for exact in (True, False):
        for a, b in zip(
            knn.graph(view, 9, exact=exact), knn.graph(view, 9, exact=exact, map=over), strict=True
        ):
            assert torch.equal(a, b)


def test_ray_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserError, match=r'needs the package ray. Install it: pip install "gradsift\[ray\]"'
    ):
        list(Ray(threads=1).map(squares, [1]))


def test_settings_name_the_executor_and_no_room_is_told(two: Ray) -> None:
    config = build(
        {
            "model": {"name": "x", "device": "cpu"},
            "machine": {
                "executor": "ray",
                "address": two.address,
                "workers": 3,
                "shard_timeout": 5.0,
            },
        },
        "t",
    )
    made = executor_of(config, threads=1)
    assert isinstance(made, Ray) and (
        made.address,
        made.workers.shard_timeout,
        made.gpus,
        made.threads,
    ) == (two.address, 5.0, 0, 1)
    assert isinstance(executor_of(build({}, "t"), threads=1), Serial)
    with pytest.raises(ConfigError, match="workers"):
        build({"machine": {"workers": -1}}, "t")
    with pytest.raises(
        ResourceError, match="no machine of the Ray cluster has room for a worker of 64 CPUs"
    ):
        list(Ray(threads=64, address=two.address).map(squares, [1]))


# --- GPUs: Ray hands out what its nodes declare, so these need none


def gpus_given() -> Callable[[int], tuple[dict[str, float], tuple[str, ...], str, int]]:
    def work(_: int) -> tuple[dict[str, float], tuple[str, ...], str, int]:
        time.sleep(0.3)
        context = ray.get_runtime_context()
        place = (context.get_node_id(), *context.get_accelerator_ids()["GPU"])
        return (
            context.get_assigned_resources(),
            place,
            os.environ["CUDA_VISIBLE_DEVICES"],
            os.getpid(),
        )

    return work


def test_workers_of_gpus_get_those_they_ask_for_and_the_plan_counts_them(
    cluster: Any, two: Ray, tmp_path: Path, model_folder: Path, pool_file: Path
) -> None:
    two.close()
    nodes = [cluster.add_node(**{**SMALL, "num_cpus": 2}, num_gpus=count) for count in (2, 1)]
    made = {count: Ray(threads=4, gpus=count, address=two.address) for count in (1, 2, 3)}
    try:
        assert {count: executor.room() for count, executor in made.items()} == {1: 3, 2: 1, 3: 0}
        with pytest.raises(
            ResourceError,
            match=r"room for a worker of 1 CPUs and 3 GPUs. Lower --threads or --gpus-per-worker",
        ):
            list(made[3].map(gpus_given, [0]))
        ((_, (resources, place, shown, _)),) = list(made[2].map(gpus_given, [0]))
        assert (
            resources == {"CPU": 1.0, "GPU": 2.0}
            and place == (nodes[0].node_id, "0", "1")
            and shown == "0,1"
        )
        pool = read_pool([pool_file])
        config = build({"model": {"name": str(model_folder)}, "machine": {"threads": 1}}, "t")
        for count, workers in {1: 3, 2: 1}.items():
            pipeline = Pipeline(Run(tmp_path / "run"), config, pool, executor=made[count])
            cost = StageCost(
                "gradients", "", "", reused=False, rows=72, tokens=7200, bytes=0, seconds=60.0
            )
            found = spread(
                pipeline,
                [cost],
                Rates(
                    1,
                    1,
                    1,
                    1,
                    1,
                    peak_bytes=10,
                    used_bytes=10,
                    dim=8,
                    parameters=5,
                    hidden=4,
                    factors=2,
                    tracked=20,
                ),
            )
            assert found is not None and (found.workers, found.gpus, found.seconds) == (
                workers,
                count,
                60 / workers + STARTING,
            )
            assert f"{counted(workers, 'worker')} of {counted(count, 'GPU')}" in found.line()
        made[2].close()
        seen: dict[tuple[str, ...], int] = {}
        while len(seen) < 3:
            for _, (resources, place, shown, pid) in made[1].map(gpus_given, range(6)):
                assert resources == {"CPU": 1.0, "GPU": 1.0} and place[1:] == (shown,)
                seen[place] = pid
        assert set(seen) == {
            (nodes[0].node_id, "0"),
            (nodes[0].node_id, "1"),
            (nodes[1].node_id, "0"),
        }
        for slot in made[1].slots:  # as if each had told of another kind
            slot.gpu = f"kind {ray.get(slot.actor.work.remote(0))[-1]}"
        for _, (*_, pid) in made[1].map(gpus_given, range(6)):
            assert made[1].gpu == f"kind {pid}"
    finally:
        for executor in made.values():
            executor.close()
        for node in nodes:
            cluster.remove_node(node)


# --- the stages of a run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rows")
    target = [item for item in rows(16, seed=9) if item["kind"] == "back"]
    return write_rows(folder / "pool.jsonl", rows(40)), write_rows(folder / "dev.jsonl", target)


@pytest.fixture(scope="module")
def config(model_folder: Path) -> Config:
    settings = {**SETTINGS, "model": {"name": str(model_folder)}, "curvature": {"fit_rows": 24}}
    settings["gradients"] = {**SETTINGS["gradients"], "shard_rows": 8}
    settings["warmup"] = {**SETTINGS["warmup"], "checkpoints": 1}
    return build(settings, "test")


EVERY = (
    Signal("rows", transform="adam", checkpoints="mean"),
    Signal("rows", side="target"),
    Signal("influence", backend="ekfac"),
    Signal("embeddings"),
    Signal("loss"),
    Signal("ifd"),
)


def make_all(
    folder: Path,
    config: Config,
    files: tuple[Path, Path],
    executor: Executor,
    needs: tuple[Signal, ...] = EVERY,
) -> dict[str, bytes]:
    """{folder name: manifest} of every stage that the signals need."""
    pool, target = (read_pool([file], max_bad_rows=0) for file in files)
    run = Run(folder)
    with run.lock():
        Pipeline(run, config, pool, target, executor=executor).signals(frozenset(needs))
    return manifests(folder)


# the target is encoded first: it must have rows before anything is paid for
ADAM = ["encode", "encode", "gradients", "warmup"]


def kinds(found: dict[str, bytes]) -> list[str]:
    return sorted(name.rpartition("-")[0] for name in found)


def manifests(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob(f"*/{MANIFEST}")}


@pytest.fixture(scope="module")
def serial(
    tmp_path_factory: pytest.TempPathFactory, config: Config, files: tuple[Path, Path]
) -> dict[str, bytes]:
    return make_all(tmp_path_factory.mktemp("serial"), config, files, Serial())


def test_two_workers_make_the_bytes_of_serial(
    two: Ray, serial: dict[str, bytes], tmp_path: Path, config: Config, files: tuple[Path, Path]
) -> None:
    found = make_all(tmp_path, config, files, two)
    assert kinds(found) == [
        *(
            "curvature",
            "embeddings",
            "encode",
            "encode",
            "gradients",
            "gradients",
            "ifd",
            "influence",
            "loss",
            "mean",
            "warmup",
        )
    ]
    assert found == serial


def test_one_worker_makes_them_too(
    two: Ray, serial: dict[str, bytes], tmp_path: Path, config: Config, files: tuple[Path, Path]
) -> None:
    alone = Ray(threads=1, workers=1, address=two.address)
    found = make_all(tmp_path, config, files, alone, (Signal("rows", transform="adam"),))
    alone.close()
    assert kinds(found) == ADAM and found.items() <= serial.items()


def where() -> Callable[[int], str]:
    def work(_: int) -> str:
        time.sleep(0.5)
        return ray.get_runtime_context().get_node_id()

    return work


@dataclass
class Held:
    """Makes a worker that has the model, if it gets it."""

    source: ModelSource

    def __call__(self) -> Callable[[int], int]:
        self.source.load()
        return lambda shard: shard


def stand_everywhere(executor: Ray) -> None:
    """Workers on all four nodes before any work begins."""
    seen: set[str] = set()
    while len(seen) < 4:
        seen |= {place for _, place in executor.map(where, range(8))}


def test_a_node_lost_in_the_middle_loses_nothing(
    cluster: Any,
    two: Ray,
    serial: dict[str, bytes],
    tmp_path: Path,
    config: Config,
    files: tuple[Path, Path],
) -> None:
    two.close()
    node = cluster.add_node(**SMALL)
    notes: list[str] = []
    executor = Ray(threads=1, workers=4, address=two.address, note=notes.append)
    try:
        stand_everywhere(executor)
        done = []
        for shard, place in executor.map(where, range(16)):
            done.append(shard)
            if place == node.node_id and node in cluster.worker_nodes:
                # its worker has the next shard in hand
                cluster.remove_node(node, allow_graceful=False)
        assert sorted(done) == list(range(16))
        assert len(notes) == 1 and "was lost at shard" in notes[0]
        node, parts = cluster.add_node(**SMALL), 0
        stand_everywhere(executor)

        class Losing(Ray):
            def map(self, make_worker: Any, shards: Any, part: Any = None) -> Any:
                def given(shard: int) -> Any:
                    nonlocal parts
                    parts += 1
                    if parts == 3:
                        cluster.remove_node(node, allow_graceful=False)
                    return part(shard)

                return executor.map(make_worker, shards, given)

        found = make_all(
            tmp_path,
            config,
            files,
            Losing(threads=1, address=two.address),
            (Signal("rows", transform="adam"),),
        )
    finally:
        executor.close()
    assert parts >= 5 and node not in cluster.worker_nodes
    assert kinds(found) == ADAM and found.items() <= serial.items()


@pytest.mark.skipif(
    not HERE.exists(), reason="a path that leads every process elsewhere is Linux's"
)
def test_a_machine_that_has_other_files_under_the_same_path_is_named(
    cluster: Any,
    two: Ray,
    home: Path,
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two.close()
    shutil.copytree(model_folder, home / "model")
    for place in (home, tmp_path):
        (place / "run").mkdir()
    with standing_in(tmp_path):
        node = cluster.add_node(**SMALL)
    monkeypatch.chdir(home)
    notes: list[str] = []
    executor = Ray(threads=1, workers=4, address=two.address, note=notes.append)
    try:
        with marker(home) as (path, text):
            assert executor.blind(path, text) is None
            assert executor.blind(path, "another text") is not None
        with marker(HERE / "run") as (path, text):
            found = executor.blind(path, text)
        assert (
            found == f"{socket.gethostname()} (node {node.node_id[:12]}): No such file or directory"
        )
        assert (
            list(mapping(executor, lambda: marker(HERE / "run"))(lambda _: os.getpid(), [0, 1]))
            == [os.getpid()] * 2
        )
        assert notes[-1].startswith(
            f"workers cannot read {HERE / 'run'} on {socket.gethostname()} (node "
        )
        assert notes[-1].endswith(
            "put the run on a file system that every machine has under the same path"
        )
        assert not list(home.glob("run/.*")), "what was written to be looked for is taken away"
        stand_everywhere(executor)
        settings = ModelSettings(name=str(HERE / "model"))
        source = ModelSource.of(settings, model_identity(settings.name))
        with pytest.raises(
            MismatchError,
            match=(
                rf"{HERE}/model on {socket.gethostname()}: no such model folder, while the"
                r" driver.*same files"
            ),
        ):
            list(executor.map(Held(source), range(8)))
        shutil.copytree(model_folder, tmp_path / "model")
        (tmp_path / "model" / "config.json").write_bytes(
            (model_folder / "config.json").read_bytes() + b" "
        )
        with pytest.raises(
            MismatchError,
            match=(
                rf"{HERE}/model on {socket.gethostname()}: is another model here .* than at the"
                r" driver"
            ),
        ):
            list(executor.map(Held(source), range(8)))
    finally:
        executor.close()
        cluster.remove_node(node)


def test_a_comparison_over_workers_is_that_of_one_process(
    two: Ray, tmp_path: Path, model_folder: Path, files: tuple[Path, Path]
) -> None:
    two.close()
    settings = {**SETTINGS, "finetune": {"mode": "full", "lr": 1e-3, "steps": 3, "batch_size": 4}}
    contents = []
    for name, machine in {
        "serial": {},
        "ray": {"executor": "ray", "workers": 2, "address": two.address},
    }.items():
        found = compare(
            ["perplexity"],
            pool=files[0],
            test=[files[1]],
            budget=8,
            run=tmp_path / name,
            model=str(model_folder),
            controls=["length"],
            seeds=2,
            equal=["steps"],
            settings={**settings, "machine": {"threads": 1, **machine}},
        )
        assert [line.arm for line in found.table().lines] == [
            "perplexity",
            "random",
            "length",
            BASE,
        ]
        trials = {
            a.path.name: a.content for a in Run(tmp_path / name).artifacts() if a.stage == "trial"
        }
        contents.append(
            (trials, [(line.arm, line.value, line.low, line.high) for line in found.table().lines])
        )
    assert len(contents[0][0]) == 7  # three arms of two seeds, and the base model
    assert contents[0] == contents[1]


TOML = """
[encode]
max_length = 64
[warmup]
min_rows = 24
min_steps = 30
epochs = 1
batch_size = 4
checkpoints = 1
lora = { r = 2, alpha = 4 }
[gradients]
dim = 64
shard_rows = 8
token_budget = 128
"""


def test_a_driver_that_is_killed_goes_on_where_it_was(
    two: Ray, tmp_path: Path, model_folder: Path, files: tuple[Path, Path]
) -> None:
    (tmp_path / "settings.toml").write_text(TOML)
    arguments = [
        "select",
        "tagcos",
        "--pool",
        str(files[0]),
        "--model",
        str(model_folder),
        "--budget",
        "8",
        "-o",
        "clusters=3",
    ]
    arguments += ["--threads", "1", "--config", str(tmp_path / "settings.toml"), "--quiet"]
    over = [
        *arguments,
        "--run",
        str(tmp_path / "ray"),
        "--executor",
        "ray",
        "--workers",
        "1",
        "--shard-timeout",
        "300",
    ]
    over += ["--address", two.address or ""]
    two.close()
    kept: dict[Path, int] = {}
    until = time.monotonic() + 600
    while not 1 <= len(kept) < 5:
        # on a busy machine the kill may come when all shards are there: then once more, from the
        # start
        shutil.rmtree(tmp_path / "ray", ignore_errors=True)
        first = subprocess.Popen(
            [sys.executable, "-m", "gradsift.cli", *over], stderr=subprocess.PIPE
        )
        while not list((tmp_path / "ray").glob("gradients-*/rows-*.safetensors")):
            assert time.monotonic() < until and first.poll() is None, first.communicate()[
                1
            ].decode()
            time.sleep(0.005)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        kept = {
            path: path.stat().st_mtime_ns
            for path in (tmp_path / "ray").glob("gradients-*/rows-*.safetensors")
        }
    assert CliRunner().invoke(app, over, catch_exceptions=False).exit_code == 0
    assert (
        CliRunner()
        .invoke(app, [*arguments, "--run", str(tmp_path / "serial")], catch_exceptions=False)
        .exit_code
        == 0
    )
    found = manifests(tmp_path / "ray")
    assert kinds(found) == [
        "encode",
        "gradients",
        "mean",
        "select-tagcos",
        "warmup",
    ] and found == manifests(tmp_path / "serial")
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
