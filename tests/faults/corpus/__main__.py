"""Builds and reads hostile inputs one by one in a process whose memory is limited: `python -m
tests.faults.corpus FOLDER [NAME...]`.

Prints {"name"} before and {"name", "outcome", "seconds"} (of the processor) after each, so that a
crash, a hang or a memory bomb is one outcome among others. The outcome is {"rows", "dropped",
"ids", "added"}, or {"error", "text", "where", "remedy"}, or {"ran"} where code of the input ran.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Of `tables`, its libraries are loaded before memory is bounded.
from gradsift.data import limits, tables  # noqa: F401
from gradsift.data.pool import read_pool
from gradsift.errors import GradsiftError
from tests.faults.corpus import CORPUS, SENTINEL

MEMORY = 1 << 30  # bytes of address space that reading any one of them may add
EXPANSION_FROM = 1 << 26  # in place of 1 GiB, so that a bomb costs a test little


def read(folder: Path, name: str) -> dict[str, Any]:
    """What reading one of them comes to. It is read as a user's pool is: every row again, and all
    rows written out as a subset.
    """
    folder.mkdir()
    os.chdir(folder)
    source = CORPUS[name][0](folder)
    before = {str(path) for path in folder.parent.rglob("*")}
    try:
        pool = read_pool([source], max_bad_rows=100)
        outcome: dict[str, Any] = {
            "rows": len(pool),
            "ids": pool.ids[:200],
            "dropped": [(row.line, row.code) for row in pool.dropped],
        }
        assert len(list(pool)) == len(pool) == pool.funnel["usable"]
        assert pool.funnel["read"] == len(pool) + sum(
            count for key, count in pool.funnel.items() if key.startswith("quarantined:")
        )
        assert len(set(pool.ids)) == len(pool)
        assert all(pool.raw(i) for i in range(len(pool)))
    except GradsiftError as error:
        outcome = {
            "error": type(error).__name__,
            "text": str(error),
            "where": error.where,
            "remedy": error.remedy,
        }
    except Exception:
        outcome = {"error": "traceback", "text": traceback.format_exc()}
    added = sorted({str(path) for path in folder.parent.rglob("*")} - before)
    return {**outcome, "added": added, "ran": any(SENTINEL in path for path in added)}


def main(root: Path, names: list[str]) -> None:
    limits.EXPANSION_FROM = EXPANSION_FROM
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for name in names or CORPUS:
        print(json.dumps({"name": name}), flush=True)
        started = time.process_time()
        outcome = read(root / str(list(CORPUS).index(name)), name)
        print(
            json.dumps(
                {"name": name, "outcome": outcome, "seconds": time.process_time() - started}
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
