"""Dies at every rename and every sync of the package, one after the other: serves orders (see
forks.py).

An order is a job of job.py, or {"call": name of a function here, "folder"}, with "record", a file.
The child kills itself, by SIGKILL, at the first point that the record does not hold, and writes it
down there before. A point is (call, "before" | "after", site): the site of a rename is the function
of the package that asked `store.atomic` or `store.tensors` for it; of syncs there is one in a file
and one in a folder, for what a dead process leaves is the same before and after either.
"""

from __future__ import annotations

import ast
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gradsift
from gradsift.commands.demo import playground
from gradsift.data import remote
from gradsift.model import tiny
from gradsift.store import atomic, tensors
from gradsift.store.run import Run
from gradsift.store.verify import Problem
from tests.faults import job
from tests.faults.forks import serve

PACKAGE = Path(gradsift.__file__).parent
DURABLE = {Path(module.__file__ or "") for module in (atomic, tensors)}
# what these offer to those who write
WRITERS = ("write_atomic", "write_tensors", "replacing", "rename", "making")
# functions that write a temporary file for others to look at, which is no work and is gone with the
# dead writers' own
PROBES = ("blind",)
CALLS = ("replace", "rename", "fsync")
SMALL = tiny.TinySettings(hidden=16, layers=1, heads=1, intermediate=16, steps=1, tokens=64)


def sites() -> set[str]:
    """Every function of the package that calls one of WRITERS itself, as "file:line function"."""
    found: set[str] = set()

    def visit(node: ast.AST, path: Path, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            line = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            function = f"{path.relative_to(PACKAGE)}:{line} {node.name}"
        called = node.func if isinstance(node, ast.Call) else None
        if getattr(called, "id", getattr(called, "attr", "")) in WRITERS and not function.endswith(
            PROBES
        ):
            found.add(function)
        for child in ast.iter_child_nodes(node):
            visit(child, path, function)

    for path in PACKAGE.rglob("*.py"):
        if path not in DURABLE:
            visit(ast.parse(path.read_text()), path, str(path.relative_to(PACKAGE)))
    return found


def elsewhere() -> list[str]:
    """Places outside DURABLE that rename or sync by themselves."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                path not in DURABLE
                and isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
            ):
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                own = {
                    "os": (*CALLS, "renames", "link", "symlink", "fdatasync", "sync"),
                    "shutil": ("move",),
                }
                if node.func.attr in own.get(owner, ("rename", "symlink_to", "hardlink_to")):
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    return found


def _site() -> str:
    """The innermost function of the package below this call that is not of DURABLE, as in
    `sites`.
    """
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if (
            path.is_relative_to(PACKAGE)
            and path not in DURABLE
            and not frame.f_code.co_name.startswith("<")
        ):
            return (
                f"{path.relative_to(PACKAGE)}:{frame.f_code.co_firstlineno} {frame.f_code.co_name}"
            )
        frame = frame.f_back
    return "elsewhere"


def _die_at_new_points(record: Path) -> None:
    struck = set(record.read_text().splitlines()) if record.exists() else set()
    log = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def point(call: str, when: str, place: str) -> None:
        line = " ".join((call, when, place))
        if line not in struck:
            os.write(log, line.encode() + b"\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if Path(sys._getframe(1).f_code.co_filename) != Path(atomic.__file__):
                # another library's, of files that are nobody's work yet
                return real(*args, **kwargs)
            place = sys._getframe(1).f_code.co_name if name == "fsync" else _site()
            point(name, "before", place)
            found = real(*args, **kwargs)
            point(name, "after", place)
            return found

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))


def work(order: dict[str, Any]) -> Any:
    _die_at_new_points(Path(order["record"]))
    if "call" not in order:
        return job.work(order)
    return globals()[order["call"]](Path(order["folder"]))


# --- what no command of the test's comes by


def make_playground(folder: Path) -> None:
    playground.write_playground(folder, rows=100, dev=8, test=8)


def make_tiny(folder: Path) -> None:
    torch.set_num_threads(1)
    tiny.tiny_model(folder, settings=SMALL)


def fetch_and_send(folder: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/pool.jsonl", b"{}\n" * 100)
    found = remote.fetched("memory://bucket/pool.jsonl", folder / "cache")
    remote.sent(found, f"file://{folder}/sent/pool.jsonl")


def mend_run_file(folder: Path) -> None:
    with Run(folder).lock():
        Run(folder).discard(Problem("", "run.json", "is damaged"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(work)
