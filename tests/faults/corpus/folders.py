"""Hostile places: folders, links, pipes, names; and folders that say where their files are."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.faults.corpus import LINE, SENTINEL, Reads, Refused, add
from tests.faults.corpus.tables import TEXTS, arrow


def saved(
    folder: Path, state: Any, *, name: str = "saved", splits: Any = None, table: bytes = b""
) -> Path:
    """A folder as `datasets` saves one; texts are written as they are."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    for file, value in (("state.json", state), ("dataset_dict.json", splits)):
        if value is not None:
            (place / file).write_text(value if isinstance(value, str) else json.dumps(value))
    (place / "data.arrow").write_bytes(table or arrow(TEXTS))
    return place


def state(*names: Any) -> dict[str, Any]:
    return {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None}


def outside(folder: Path) -> Path:
    """A saved folder that a name in another one must not reach."""
    saved(folder, state("data.arrow"), name="outside")
    return folder


def scripted(folder: Path) -> Path:
    """A folder with a loading script, as old hub data sets had."""
    place = folder / "scripted"
    place.mkdir()
    code = f"import os\nos.mkdir({str(folder / SENTINEL)!r})\n"
    for name in ("scripted.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (place / name).write_text(code)
    return place


def linked(folder: Path, target: str) -> Path:
    (folder / "real.jsonl").write_bytes(LINE)
    (folder / "p.jsonl").symlink_to(target)
    return folder / "p.jsonl"


def named(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(LINE)
    return folder / name


def listened(folder: Path) -> str:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("p.jsonl")  # by its short name: a socket's path is limited to 108 bytes
    return "p.jsonl"


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "p.jsonl")
    return folder / "p.jsonl"


def two_schemas(folder: Path) -> Path:
    (saved(folder, state("data.arrow", "other.arrow")) / "other.arrow").write_bytes(
        arrow(pa.table({"text": [1, 2]}))
    )
    return folder / "saved"


BROKEN = Refused("DataError", "was not saved by `datasets`|is damaged")
OUTSIDE = Refused("DataError", "points outside")

add("folder: plain", lambda f: f, Refused("UserError", "not one that `datasets` saved"))
add("folder: saved", lambda f: saved(f, state("data.arrow")), Reads(3))
add("folder: state is no JSON", lambda f: saved(f, "{"), BROKEN)
add("folder: state is a list", lambda f: saved(f, []), BROKEN)
add("folder: state names no files", lambda f: saved(f, {}), BROKEN)
add(
    "folder: state names an empty list",
    lambda f: saved(f, state()),
    Refused("DataError", "holds no|is damaged"),
)
add("folder: a file name that is a number", lambda f: saved(f, state(5)), BROKEN)
add(
    "folder: a file name that leads out",
    lambda f: saved(outside(f), state("../outside/data.arrow")),
    OUTSIDE,
)
add("folder: an absolute file name", lambda f: saved(f, state("/etc/passwd")), OUTSIDE)
add(
    "folder: a file that is not there",
    lambda f: saved(f, state("gone.arrow")),
    Refused("DataError", "not a readable Arrow"),
)
add("folder: deep JSON", lambda f: saved(f, "[" * 100_000), BROKEN)
add(
    "folder: splits that lead out",
    lambda f: saved(outside(f), None, splits={"splits": ["../outside"]}),
    OUTSIDE,
)
add("folder: splits that are no list", lambda f: saved(f, None, splits={"splits": 3}), BROKEN)
add("folder: splits that are no JSON", lambda f: saved(f, None, splits="{"), BROKEN)
add("folder: no splits", lambda f: saved(f, None, splits={"splits": []}), BROKEN)
add(
    "folder: files of two schemas",
    two_schemas,
    Refused("DataError", "different schemas|is damaged"),
)
add("folder: a loading script", scripted, Refused("UserError", "not one that `datasets` saved"))
add(
    "hf: a folder with a loading script",
    lambda f: f"hf:{scripted(f)}",
    Refused("UserError", "cannot be loaded"),
)
add(
    "hf: a folder that leads out",
    lambda f: f"hf:{saved(outside(f), None, splits={'splits': ['../outside']})}",
    OUTSIDE,
)
add("hf: nothing", lambda f: "hf:", Refused("UserError", "names nothing"))
add("link to a file", lambda f: linked(f, "real.jsonl"), Reads(1))
add("link to nothing", lambda f: linked(f, "gone"), Refused("UserError", "no such file"))
add(
    "link to itself",
    lambda f: linked(f, "p.jsonl"),
    Refused("ResourceError|UserError", "links|no such file"),
)
add("pipe", fifo, Refused("UserError", "a pipe"))
add("socket", listened, Refused("UserError", "a pipe"))
add("device", lambda f: "/dev/zero", Refused("UserError", "a pipe or a device"))
add("a name with NUL", lambda f: f"{f}/a\0b.jsonl", Refused("UserError", "names nothing"))
add(
    "a name of 5,000 letters",
    lambda f: f"{f}/{'x' * 5000}.jsonl",
    Refused("UserError|ResourceError", "too long|no such file"),
)
add("an empty name", lambda f: "", Refused("UserError", "not one that|names nothing"))
add("a name with a newline and an escape", lambda f: named(f, "a\n\x1b[31m.jsonl"), Reads(1))
add("a name in Unicode", lambda f: named(f, "p\u00e9\u202e\U0001f600.jsonl"), Reads(1))
add("a name that is not UTF-8", lambda f: named(f, os.fsdecode(b"p\xff.jsonl")), Reads(1))
