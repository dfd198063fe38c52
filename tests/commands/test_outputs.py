"""The files of a selection, written from real files in every container."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradsift.commands.select.outputs import SCORES, score_table, write_outputs
from gradsift.data.pool import Pool, read_pool
from gradsift.errors import UnknownName, UserError
from gradsift.types import Subset

LINES = [
    (
        b'{"id": "007", "messages": [{"role": "user", "content": "one\xe2\x80\xa8two"}, {"role":'
        b' "assistant", "content": "1"}]}'
    ),
    b'{"messages":[{"content":"b","role":"user"},{"role":"assistant","content":"2"}],  "id": 2}',
    (
        b'{"id": "=cmd|\' /C calc\'!A0", "messages": [{"role": "user", "content": "c"}, {"role":'
        b' "assistant", "content": "3"}]}'
    ),
    b'{"id": "bad", "messages": []}',
    (
        b'{"id": "1", "messages": [{"role": "user", "content": "d"}, {"role": "assistant",'
        b' "content": "4"}]}'
    ),
    (
        b'{"id": "e", "messages": [{"role": "user", "content": "e"}, {"role": "assistant",'
        b' "content": "5"}], "extra": 1.50}'
    ),
]


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    path = tmp_path / "=1+1.jsonl"
    path.write_bytes(b"\n".join(LINES) + b"\n")
    return read_pool(path, max_bad_rows=3)


SUBSET = Subset(
    indices=np.array([4, 0, 2]),
    gains=np.array([0.5, 0.25, -0.125]),
    weights=np.array([1.0, 3.0, 2.0]),
)


def read_json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_every_file_is_written_and_named(pool: Pool, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "deep"
    written = write_outputs(folder, pool, SUBSET)
    assert sorted(path.relative_to(folder).as_posix() for path in written) == [
        *(
            "dropped.jsonl",
            "scores.parquet",
            "selected.jsonl",
            "trainers/axolotl.yml",
            "trainers/dataset_info.json",
            "trainers/train_trl.py",
        ),
        "weights.jsonl",
    ]
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(written)


def test_selected_rows_keep_their_bytes(pool: Pool, tmp_path: Path) -> None:
    write_outputs(tmp_path / "out", pool, SUBSET)
    assert (tmp_path / "out" / "selected.jsonl").read_bytes() == b"\n".join(
        [LINES[0], LINES[2], LINES[5]]
    ) + b"\n"


def test_the_same_selection_gives_the_same_bytes(pool: Pool, tmp_path: Path) -> None:
    columns = {"norm": np.arange(5.0), "why": ["a", None, "b", "c", "d"]}
    first = {
        path.name: path.read_bytes()
        for path in write_outputs(tmp_path / "a", pool, SUBSET, columns=columns)
    }
    second = {
        path.name: path.read_bytes()
        for path in write_outputs(tmp_path / "b", pool, SUBSET, columns=columns)
    }
    assert first == second


def test_scores_hold_every_pool_row(pool: Pool, tmp_path: Path) -> None:
    columns = {
        "cluster": np.array([0, -1, 1, 1, 2]),
        "score": np.array([1.0, np.nan, 2.0, -1.0, 0.0]),
        "influence": np.array([0.5, np.nan, -np.inf, 2.0, 3.0]),
        "norm": np.array([1, 2, 3, 4, 5], dtype=np.float32),
        "tokens": np.array([10, 20, 30, 40, 2**31 - 1], dtype=np.int64),
        "loss": [0.5, None, 1.5, 2.5, float("nan")],
        "picked_by": ["score", None, "draw", None, "included"],
        "why": ["nearest", None, "=1+1", "d", "e"],
        "rank": np.full(5, 99),
    }
    write_outputs(tmp_path / "out", pool, SUBSET, columns=columns)
    table = pq.read_table(tmp_path / "out" / "scores.parquet")
    assert table.schema.equals(SCORES)
    assert table.to_pydict() == {
        "id": ["007", "2", "=cmd|' /C calc'!A0", "1", "e"],
        "group": ["=1+1"] * 5,
        "selected": [True, False, True, False, True],
        "rank": [2, None, 3, None, 1],
        "gain": [0.25, None, -0.125, None, 0.5],
        "weight": [3.0, None, 2.0, None, 1.0],
        "score": [1.0, None, 2.0, -1.0, 0.0],
        "influence": [0.5, None, None, 2.0, 3.0],
        "cluster": [0, None, 1, 1, 2],
        "norm": [1.0, 2.0, 3.0, 4.0, 5.0],
        "tokens": [10, 20, 30, 40, 2**31 - 1],
        "loss": [0.5, None, 1.5, 2.5, None],
        "picked_by": ["score", None, "draw", None, "included"],
        "why": ["nearest", None, "=1+1", "d", "e"],
    }


def test_what_is_not_known_is_null(pool: Pool) -> None:
    table = score_table(pool, Subset(indices=np.array([], dtype=np.int64)), {})
    assert table.schema.equals(SCORES)
    assert [name for name in SCORES.names if table[name].null_count == 0] == [
        "id",
        "group",
        "selected",
    ]
    assert not any(table["selected"].to_pylist())


def test_a_gain_column_fills_the_rows_that_were_not_picked(pool: Pool) -> None:
    table = score_table(pool, SUBSET, {"gain": np.array([9, 0.2, 9, 0.4, 9])})
    assert table["gain"].to_pylist() == [0.25, 0.2, -0.125, 0.4, 0.5]


def test_weights_follow_the_lines_of_the_selection(pool: Pool, tmp_path: Path) -> None:
    write_outputs(tmp_path / "out", pool, SUBSET)
    weights = read_json_lines(tmp_path / "out" / "weights.jsonl")
    rows = read_json_lines(tmp_path / "out" / "selected.jsonl")
    assert weights == [
        {"id": "007", "weight": 3.0},
        {"id": "=cmd|' /C calc'!A0", "weight": 2.0},
        {"id": "e", "weight": 1.0},
    ]
    assert [weight["id"] for weight in weights] == [row["id"] for row in rows]


def test_dropped_rows_say_where_and_why(pool: Pool, tmp_path: Path) -> None:
    write_outputs(tmp_path / "out", pool, SUBSET)
    (dropped,) = read_json_lines(tmp_path / "out" / "dropped.jsonl")
    assert (Path(dropped["file"]).name, dropped["line"], dropped["id"]) == ("=1+1.jsonl", 4, "bad")
    assert dropped["reason"].startswith("no-answer")


def test_added_scores_belong_to_their_rows(pool: Pool, tmp_path: Path) -> None:
    write_outputs(tmp_path / "out", pool, SUBSET, add_scores=True)
    rows = read_json_lines(tmp_path / "out" / "selected.jsonl")
    assert [
        (row["id"], row["gradsift_rank"], row["gradsift_gain"], row["gradsift_weight"])
        for row in rows
    ] == [
        ("007", 2, 0.25, 3.0),
        ("=cmd|' /C calc'!A0", 3, -0.125, 2.0),
        ("e", 1, 0.5, 1.0),
    ]
    assert "gradsift_influence" not in rows[0]


def test_parquet_stays_parquet_with_its_schema(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            ("instruction", pa.large_string()),
            ("input", pa.string()),
            ("output", pa.string()),
            ("score", pa.float32()),
        ]
    )
    rows = {
        "instruction": ["a", "b", "c"],
        "input": ["", "x", ""],
        "output": ["1", "2", "3"],
        "score": [0.5, None, 1.5],
    }
    pq.write_table(pa.table(rows, schema=schema), tmp_path / "pool.parquet")
    found = read_pool(tmp_path / "pool.parquet")
    write_outputs(tmp_path / "out", found, Subset(indices=np.array([2, 1])))
    table = pq.read_table(tmp_path / "out" / "selected.parquet")
    assert table.schema.equals(schema)
    assert table.to_pydict() == {
        "instruction": ["b", "c"],
        "input": ["x", ""],
        "output": ["2", "3"],
        "score": [None, 1.5],
    }
    assert not (tmp_path / "out" / "weights.jsonl").exists()


def test_tables_of_two_schemas_become_lines_and_it_is_said(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["1"]}), tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"prompt": ["b"], "completion": ["2"], "n": [1]}), tmp_path / "b.parquet"
    )
    found = read_pool([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    said: list[str] = []
    write_outputs(tmp_path / "out", found, Subset(indices=np.array([0, 1])), say=said.append)
    rows = read_json_lines(tmp_path / "out" / "selected.jsonl")
    assert rows == [{"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "2", "n": 1}]
    assert len(said) == 1
    assert "2 rows" in said[0]


@pytest.mark.parametrize(
    "subset, columns, text",
    [
        (Subset(np.array([0, 5])), {}, "the row 5 of a pool of 5 rows"),
        (Subset(np.array([-1])), {}, "the row -1"),
        (Subset(np.array([1, 1])), {}, "twice"),
        (Subset(np.array([1]), gains=np.array([1.0, 2.0])), {}, "2 gains for 1 rows"),
        (Subset(np.array([1])), {"norm": [1.0]}, "'norm' has 1 values for a pool of 5 rows"),
    ],
)
def test_what_does_not_fit_the_pool_is_refused(
    pool: Pool, tmp_path: Path, subset: Subset, columns: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        write_outputs(tmp_path / "out", pool, subset, columns=columns)
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


def test_an_unknown_column_is_named_with_its_neighbour(pool: Pool) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'influence'"):
        score_table(pool, SUBSET, {"influense": np.zeros(5)})
