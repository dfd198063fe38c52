"""A process that fills a run, to be killed: reads one JSON order a line, forks a child for each (one import for all), reports its end.

Order: {"root", "shards", "crash_at": k | 0, "pace": seconds}. With crash_at = k the child kills itself, by SIGKILL, just before its k-th
call that touches the disk (open for writing, write, fsync, rename, close), a write being cut in half.
Answers: {"pid"} at once; after a further line, {"status", "calls"} once the child is gone ("calls" only from one that ended by itself).
Until that line the child stays at least a zombie, so its pid is safe to kill.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gradsift.artifact import Artifact
from gradsift.run import Run
from gradsift.store import RowStore

ROWS, DIM = 32, 64


def rows_of(shard: int) -> torch.Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(shard))


def fill(root: Path, shards: int, pace: float = 0.0) -> Artifact:
    """What a stage does: open, write what is missing, seal."""
    run = Run(root)
    with run.lock("gradsift select less"):
        artifact = run.artifact("gradients", version=1, config={"shards": shards}, inputs={}, identity={})
        if not artifact.complete:
            ids = [f"row-{i}" for i in range(shards * ROWS)]
            store = RowStore.create(artifact.path, recipe_digest=artifact.digest, ids=ids, dim=DIM, spec={}, shard_rows=ROWS)
            for shard in store.missing():
                ones = torch.ones(ROWS)
                store.write(shard, rows_of(shard), norms=ones, losses=ones, tokens=ones)
                time.sleep(pace)
            store.seal(artifact)
    return artifact


def count_calls(
    at_call: Callable[[int, Callable[[], Any]], None], names: Sequence[str] = ("open", "write", "fsync", "replace", "close")
) -> list[int]:
    """Calls at_call(k, half) before the k-th disk call of this process from now on; `half` does half of a write, else nothing."""
    calls = [0]

    def wrapped(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            calls[0] += 1
            at_call(calls[0], lambda: real(args[0], args[1][: len(args[1]) // 2]) if name == "write" else None)
            return real(*args, **kwargs)

        return call

    for name in names:
        setattr(os, name, wrapped(name))
    return calls


def child(order: dict[str, Any], answers: int) -> None:
    def crash(k: int, half: Callable[[], Any]) -> None:
        if k == order["crash_at"]:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    calls = count_calls(crash)
    fill(Path(order["root"]), order["shards"], order["pace"])
    os.write(answers, b"%d" % calls[0])


def main() -> None:
    torch.set_num_threads(1)
    while line := sys.stdin.readline():
        order = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child(order, writing)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(json.dumps({"pid": pid}), flush=True)
        os.close(writing)
        sys.stdin.readline()
        _, status = os.waitpid(pid, 0)
        calls = os.read(reading, 100)
        os.close(reading)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "calls": int(calls or b"0")}), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
