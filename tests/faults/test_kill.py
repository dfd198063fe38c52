"""Killed at any instant, or failed by the disk at any call, a run completes with the digest of one
that was left alone.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gradsift.errors import DiskFull, ResourceError
from gradsift.store.rows import RowStore
from gradsift.store.run import Run
from tests.faults import filler
from tests.faults.forks import Server

pytestmark = pytest.mark.slow


class Filler(Server):
    """The process of filler.py."""

    def __init__(self) -> None:
        super().__init__("tests.faults.filler")

    def fill(self, root: Path, shards: int, *, crash_at: int = 0, pace: float = 0.0) -> int:
        return self.order(root=str(root), shards=shards, crash_at=crash_at, pace=pace)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: a killed process loses nothing the kernel has, and hundreds
    of runs are synced here.
    """
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as found:
        yield Path(found)


@pytest.fixture(scope="module")
def worker() -> Iterator[Filler]:
    filler_process = Filler()
    yield filler_process
    filler_process.close()


def finished(root: Path) -> dict[str, tuple[int, int]]:
    """(inode, mtime) of every shard that has its name."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.glob("gradients-*/rows-*")
    }


def check_whole(root: Path, content: str) -> None:
    run = Run(root)
    artifact = run.latest("gradients")
    assert artifact is not None
    assert artifact.content == content
    assert run.verify() == []
    assert not list(root.rglob(".gradsift-tmp-*"))
    store = RowStore.open(artifact.path, verify=True)
    raw = torch.cat([filler.rows_of(shard) for shard in range(len(store.shards))])
    assert torch.equal(store[:], (raw / raw.norm(dim=1, keepdim=True)).half())


def test_killed_before_any_call_that_touches_the_disk(worker: Filler, folder: Path) -> None:
    """Every instant at which the disk can differ from the one before: as many runs as there are
    calls.
    """
    content = filler.fill(folder / "reference", 2).content
    worker.fill(folder / "counted", 2)
    calls = worker.answer()["answer"]
    assert calls > 40
    for k in range(1, calls + 1):
        root = folder / f"crash-{k}"
        worker.fill(root, 2, crash_at=k)
        assert worker.answer()["status"] == -signal.SIGKILL
        before = finished(root)
        filler.fill(root, 2)
        assert before.items() <= finished(root).items(), k
        check_whole(root, content)


def test_killed_from_outside_at_random_instants(worker: Filler, folder: Path) -> None:
    shards, rng = 30, random.Random(0)
    content = filler.fill(folder / "reference", shards).content
    root, kills = folder / "run", 0
    for attempt in range(100):
        pid = worker.fill(root, shards, pace=0.01)
        time.sleep(rng.uniform(0.0, 0.03 + 0.01 * attempt))
        before = finished(root)
        os.kill(pid, signal.SIGKILL)
        status = worker.answer()["status"]
        kills += status == -signal.SIGKILL
        after = finished(root)
        assert before.items() <= after.items()
        if status == 0:
            break
    assert kills >= 2
    check_whole(root, content)


def test_sigkill_frees_the_lock(worker: Filler, folder: Path) -> None:
    root = folder / "run"
    pid = worker.fill(root, 50, pace=0.2)
    until = time.monotonic() + 240
    while not finished(root):
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    worker.answer()
    assert str(pid) in (root / ".gradsift-lock").read_text()
    with Run(root).lock():
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_call(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failing call is an error of the right kind; the same command then completes the same
    bytes.
    """
    content = filler.fill(folder / "reference", 2).content
    fail_at = [0]

    def fail(k: int, half: Any) -> None:
        if k == fail_at[0]:
            half()
            raise OSError(number, os.strerror(number))

    # a close that fails loses nothing: what it closes is synced before
    names = ("open", "write", "fsync", "replace")
    for name in names:
        monkeypatch.setattr(os, name, getattr(os, name))  # so that the wrappers are taken off again
    calls = filler.count_calls(fail, names)
    filler.fill(folder / "counted", 2)
    for k in range(1, calls[0] + 1):
        root = folder / f"fail-{k}"
        calls[0], fail_at[0] = 0, k
        with pytest.raises(DiskFull if number == errno.ENOSPC else ResourceError) as caught:
            filler.fill(root, 2)
        assert caught.value.where is not None
        assert not list(root.rglob(".gradsift-tmp-*"))
        before = finished(root)
        fail_at[0] = 0
        filler.fill(root, 2)
        assert before.items() <= finished(root).items()
        check_whole(root, content)
