"""Fills a run, to be killed: serves orders {"root", "shards", "crash_at": k | 0, "pace": seconds}
(see forks.py).

With crash_at = k the child kills itself, by SIGKILL, just before its k-th call that touches the
disk (open for writing, write, fsync, rename, close), a write being cut in half. The answer is the
number of such calls.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gradsift.store.artifact import Artifact
from gradsift.store.rows import RowStore
from gradsift.store.run import Run
from tests.faults.forks import serve

ROWS, DIM = 32, 64


def rows_of(shard: int) -> torch.Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(shard))


def fill(root: Path, shards: int, pace: float = 0.0) -> Artifact:
    """What a stage does: open, write what is missing, seal."""
    run = Run(root)
    with run.lock("gradsift select less"):
        artifact = run.artifact(
            "gradients", version=1, config={"shards": shards}, inputs={}, identity={}
        )
        if not artifact.complete:
            ids = [f"row-{i}" for i in range(shards * ROWS)]
            store = RowStore.create(
                artifact.path,
                recipe_digest=artifact.digest,
                ids=ids,
                dim=DIM,
                spec={},
                shard_rows=ROWS,
            )
            for shard in store.missing():
                ones = torch.ones(ROWS)
                store.write(shard, rows_of(shard), norms=ones, losses=ones, tokens=ones)
                time.sleep(pace)
            store.seal(artifact)
    return artifact


def count_calls(
    at_call: Callable[[int, Callable[[], Any]], None],
    names: Sequence[str] = ("open", "write", "fsync", "replace", "close"),
) -> list[int]:
    """Calls at_call(k, half) before the k-th disk call of this process from now on; `half` does
    half of a write, else nothing.
    """
    calls = [0]

    def wrapped(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            calls[0] += 1
            at_call(
                calls[0],
                lambda: real(args[0], args[1][: len(args[1]) // 2]) if name == "write" else None,
            )
            return real(*args, **kwargs)

        return call

    for name in names:
        setattr(os, name, wrapped(name))
    return calls


def work(order: dict[str, Any]) -> int:
    def crash(k: int, half: Callable[[], Any]) -> None:
        if k == order["crash_at"]:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    calls = count_calls(crash)
    fill(Path(order["root"]), order["shards"], order["pace"])
    return calls[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(work)
