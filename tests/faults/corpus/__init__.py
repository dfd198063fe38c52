"""Hostile inputs, made in code, and what each must come to: CORPUS, name -> (builder, expected).

A builder makes its file in an empty folder and returns what a user would name. Anything that runs
code of an input makes a folder SENTINEL.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SENTINEL = "something-ran"
GOOD = b'{"text": "good"}'
LINE = GOOD + b"\n"


@dataclass(frozen=True)
class Reads:
    """The rows that are read, the (line, code) of every row that is quarantined, and ids where they
    matter.
    """

    rows: int
    dropped: tuple[tuple[int, str], ...] = ()
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """The class of the error, and words of it (both patterns)."""

    error: str
    words: str


class Ran:
    """What a pickle does that is loaded: it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / SENTINEL)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


Builder = Callable[[Path], "str | Path"]
CORPUS: dict[str, tuple[Builder, Reads | Refused]] = {}


def add(
    name: str, build: Builder | bytes, expected: Reads | Refused, suffix: str = ".jsonl"
) -> None:
    """Puts a case into CORPUS; bytes stand for a file `p` + suffix that holds them."""
    assert name not in CORPUS, name
    CORPUS[name] = (_file(build, f"p{suffix}") if isinstance(build, bytes) else build, expected)


def _file(data: bytes, name: str) -> Builder:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return build


def between(row: bytes) -> bytes:
    """A row between two good ones."""
    return LINE + row + b"\n" + LINE


def bad(code: str) -> Reads:
    """What `between` comes to: the second row quarantined."""
    return Reads(2, ((2, code),))


def row(**fields: Any) -> bytes:
    return json.dumps({"text": "x", **fields}).encode()


def chat(*turns: Any, **more: Any) -> bytes:
    return json.dumps({"messages": list(turns), **more}).encode()


NO_ROWS = Refused("DataError", "holds no rows")

from tests.faults.corpus import files, folders, tables, text  # noqa: E402, F401  (they fill CORPUS)
