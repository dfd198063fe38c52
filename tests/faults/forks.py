"""Processes that may be killed cheaply: one server imports everything once and forks a child for
each order.

`Server(module)` starts `python -m module`, whose main is `serve(work)`. Each order is a JSON line,
answered by {"pid"} of a fresh child that does work(order); after a further line, {"status",
"answer"} once the child is gone ("answer" is what work returned, null where it was killed). Until
that line the child stays at least a zombie, so its pid is safe to kill.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """The process of a module that serves."""

    def __init__(self, module: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", module]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def order(self, **order: Any) -> int:
        """Returns the pid of the child that works on it."""
        return self._say(json.dumps(order))["pid"]

    def answer(self) -> dict[str, Any]:
        """{"status", "answer"} of the child, once it has ended; status = -9 where it was killed."""
        return self._say("")

    def _say(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def serve(work: Callable[[dict[str, Any]], Any]) -> None:
    while line := sys.stdin.readline():
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(writing, json.dumps(work(json.loads(line))).encode())
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(json.dumps({"pid": pid}), flush=True)
        os.close(writing)
        sys.stdin.readline()
        _, status = os.waitpid(pid, 0)
        answer = os.read(reading, 1 << 16)
        os.close(reading)
        print(
            json.dumps(
                {
                    "status": os.waitstatus_to_exitcode(status),
                    "answer": json.loads(answer or b"null"),
                }
            ),
            flush=True,
        )
    os._exit(0)
