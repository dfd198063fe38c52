"""What the check of a command refuses is what the job would refuse; what the job can do, it lets
pass.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradsift.commands import preflight
from gradsift.commands.preflight import Inputs, check_selection
from gradsift.errors import BudgetError, DataError
from tests.conftest import rows

COUNT = 12
ROWS: list[dict[str, Any]] = rows(COUNT)
LINES = [json.dumps(row).encode() for row in ROWS]


def as_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


# Files of twelve rows, in none of which the line ends alone say so.
FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "lines": (
        "pool.jsonl",
        lambda path: path.write_bytes(b"".join(line + b"\n" for line in LINES)),
    ),
    "no last line end": ("pool.jsonl", lambda path: path.write_bytes(b"\n".join(LINES))),
    "an array on one line": (
        "pool.json",
        lambda path: path.write_bytes(b"[" + b", ".join(LINES) + b"]"),
    ),
    "packed": ("pool.jsonl.gz", lambda path: path.write_bytes(gzip.compress(b"\n".join(LINES)))),
    "parquet": ("pool.parquet", as_parquet),
}


def asked(pool: list[str | Path] | Path, budget: Any, **more: Any) -> Any:
    files = [pool] if isinstance(pool, Path) else pool
    inputs = Inputs(Path(files[0]).parent / "run", files, model="tiny")
    return check_selection("length", inputs, budget=budget, **more)


@pytest.mark.parametrize("kind", FILES)
def test_a_budget_of_all_rows_passes(kind: str, tmp_path: Path) -> None:
    name, write = FILES[kind]
    write(tmp_path / name)
    _, wanted = asked(tmp_path / name, COUNT)
    assert wanted.count == COUNT
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["lines", "no last line end"])
def test_one_more_than_the_lines_is_refused(kind: str, tmp_path: Path) -> None:
    name, write = FILES[kind]
    write(tmp_path / name)
    with pytest.raises(BudgetError, match="the budget is 13 rows and 12 are usable"):
        asked(tmp_path / name, COUNT + 1)
    assert asked(tmp_path / name, COUNT + 1, allow_short=True)


def test_the_lines_of_several_files_add_up(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        FILES["lines"][1](tmp_path / name)
    both: list[str | Path] = [tmp_path / "a.jsonl", f"b={tmp_path / 'b.jsonl'}"]
    assert asked(both, 2 * COUNT)
    with pytest.raises(BudgetError, match="25 rows and 24 are usable"):
        asked(both, 2 * COUNT + 1)


@pytest.mark.parametrize("kind", ["packed", "parquet", "an array on one line"])
def test_what_has_no_lines_is_left_to_the_job(kind: str, tmp_path: Path) -> None:
    name, write = FILES[kind]
    write(tmp_path / name)
    assert asked(tmp_path / name, COUNT + 1)


def test_a_large_pool_is_left_to_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FILES["lines"][1](tmp_path / "pool.jsonl")
    monkeypatch.setattr(preflight, "COUNTED", 100)
    assert asked(tmp_path / "pool.jsonl", COUNT + 1)


@pytest.mark.parametrize("budget", ["100%", "1000-tokens"])
def test_shares_and_tokens_count_no_lines(budget: str, tmp_path: Path) -> None:
    FILES["lines"][1](tmp_path / "pool.jsonl")
    assert asked(tmp_path / "pool.jsonl", budget)


def test_usable_rows_are_named_and_not_lines(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b"\n".join([*LINES, b"", b"{"]))
    with pytest.raises(DataError, match=r"1 of 13 rows cannot be used"):
        # over max_bad_rows: what reading says comes first, as ever
        asked(path, 20)
    inputs = Inputs(tmp_path / "run", path, model="tiny", settings={"pool": {"max_bad_rows": 1}})
    with pytest.raises(BudgetError, match="the budget is 20 rows and 12 are usable"):
        check_selection("length", inputs, budget=20)


def test_the_lines_of_a_text_are_counted_no_further_than_needed(tmp_path: Path) -> None:
    FILES["no last line end"][1](tmp_path / "pool.jsonl")
    [text] = preflight.check_pool([tmp_path / "pool.jsonl"])
    assert text is not None
    assert [text.most_rows(enough) for enough in (1, 11, 12, 13, 100)] == [1, 11, 12, 12, 12]
