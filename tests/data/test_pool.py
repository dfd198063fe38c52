"""Pools: every container with every format, stable ids, quarantine by file and line, and what a
pool promises about itself.
"""

import gzip
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard

from gradsift.data.pool import Pool, read_pool
from gradsift.errors import DataError, UnknownName, UserError
from gradsift.types import Message

SHARED = Path(
    os.environ.get("GRADSIFT_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared")
)
GOOD = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'

ROWS: dict[str, list[dict]] = {
    "alpaca": [
        {"id": f"r{i}", "instruction": f"Say {i}.", "input": "", "output": f"{i} \u2028 \u00e9"}
        for i in range(7)
    ],
    "sharegpt": [
        {
            "id": f"r{i}",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": f"{i}"}],
        }
        for i in range(7)
    ],
    "messages": [
        {
            "id": f"r{i}",
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": f"{i}"},
            ],
        }
        for i in range(7)
    ],
    "prompt-completion": [{"id": f"r{i}", "prompt": "p", "completion": f"{i}"} for i in range(7)],
    "text": [{"id": f"r{i}", "text": f"t {i}"} for i in range(7)],
    "tokenised": [
        {"id": f"r{i}", "input_ids": [1, i, 3], "labels": [-100, i, 3]} for i in range(7)
    ],
}


def lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def put(folder: Path, container: str, rows: list[dict]) -> str:
    """Writes rows in a container; returns the source for read_pool."""
    path = folder / ("rows" if container == "datasets" else f"rows.{container}")
    text = (
        json.dumps(rows, ensure_ascii=False, indent=1).encode()
        if container.startswith("json.") or container == "json"
        else lines(rows)
    )
    if container.endswith(".gz"):
        path.write_bytes(gzip.compress(text))
    elif container.endswith(".zst"):
        path.write_bytes(zstandard.compress(text))
    elif container == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif container == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    elif container == "datasets":
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=2)
    else:
        path.write_bytes(text)
    return str(path)


CONTAINERS = [
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "json",
    "json.gz",
    "json.zst",
    "parquet",
    "arrow",
    "datasets",
]


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning:datasets.*", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("format", ROWS)
def test_every_format_in_every_container_says_the_same(
    tmp_path: Path, format: str, container: str
) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(lines(ROWS[format]))
    expected = read_pool([f"rows={plain}"])
    pool = read_pool([put(tmp_path, container, ROWS[format])])
    assert list(pool) == list(expected) and len(pool) == 7
    assert set(pool.formats.values()) == {format}
    assert pool.groups == ["rows"] * 7 and pool.ids == [f"r{i}" for i in range(7)]
    assert [pool.record(i)["id"] for i in range(7)] == pool.ids
    assert pool.funnel == {"read": 7, "blank": 0, "duplicates": 0, "usable": 7}


def pool_of(folder: Path, text: bytes, name: str = "p.jsonl", **options) -> Pool:
    (folder / name).write_bytes(text)
    return read_pool([folder / name], **options)


def ids_of(folder: Path, ids: list[str], **options) -> Pool:
    return pool_of(
        folder,
        b"".join(b'{"id": %s, "text": "t%d"}\n' % (id.encode(), i) for i, id in enumerate(ids)),
        **options,
    )


def test_ids_are_kept_exactly(tmp_path: Path) -> None:
    pool = ids_of(
        tmp_path, ['"1"', "2", '"007"', '" a "', "12345678901234567890123", '"\u00e9/../x"']
    )
    assert pool.ids == ["1", "2", "007", " a ", "12345678901234567890123", "\u00e9/../x"]
    assert any("mixed types" in text for text in pool.warnings)
    assert ids_of(tmp_path, ['"a"', '"b"']).warnings == []


def test_ids_that_are_no_ids_become_hashes(tmp_path: Path) -> None:
    pool = ids_of(tmp_path, ["1.5", "null", '""', "true", "[1]"])
    rows = (tmp_path / "p.jsonl").read_bytes().split(b"\n")
    assert pool.ids == [xxhash.xxh3_128_hexdigest(row) for row in rows[:5]]
    assert any(text.startswith("3 rows have an id that is neither") for text in pool.warnings)


def test_one_id_twice_gets_a_suffix_that_is_free(tmp_path: Path) -> None:
    pool = ids_of(tmp_path, ['"a"', '"a"', '"a#2"', '"a"', "1", '"1"'])
    assert pool.ids == ["a", "a#3", "a#2", "a#4", "1", "1#2"]
    assert any(text.startswith("3 rows share their id") for text in pool.warnings)
    same = pool_of(tmp_path, (GOOD + b"\n") * 3)
    first = xxhash.xxh3_128_hexdigest(GOOD)
    assert same.ids == [first, f"{first}#2", f"{first}#3"] and same.warnings == []
    assert same.exact_duplicates() == {1: 0, 2: 0} and same.funnel["duplicates"] == 2


def test_ids_do_not_depend_on_line_ends_or_containers(tmp_path: Path) -> None:
    one = pool_of(tmp_path, GOOD + b"\r\n")
    two = pool_of(tmp_path, GOOD, "q.jsonl")
    assert one.ids == two.ids


def test_groups_are_names_files_or_fields(tmp_path: Path) -> None:
    for name in ("a.b.jsonl", "c.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(GOOD) if name.endswith("gz") else GOOD)
    pool = read_pool(
        [tmp_path / "a.b.jsonl", f"code={tmp_path / 'c.jsonl.gz'}", str(tmp_path / "c.jsonl.gz")]
    )
    assert pool.groups == ["a.b", "code", "c"]
    (tmp_path / "x=y.jsonl").write_bytes(GOOD)
    assert read_pool([str(tmp_path / "x=y.jsonl")]).groups == ["x=y"]
    text = (
        b'{"text": "a", "src": "s1"}\n{"text": "b"}\n{"text": "c", "src": 3}\n{"text": "d", "src":'
        b" null}\n"
    )
    pool = pool_of(tmp_path, text, group_field="src")
    assert (
        pool.groups == ["s1", "?", "3", "?"] and [example.group for example in pool] == pool.groups
    )
    assert any("2 rows have no field 'src'" in text for text in pool.warnings)


def test_an_explicit_format_and_a_mapping_win(tmp_path: Path) -> None:
    text = (
        b'{"messages": [{"role": "assistant", "content": "a"}], "text": "t", "question": "q",'
        b' "answer": "r"}\n'
    )
    assert pool_of(tmp_path, text).formats == {str(tmp_path / "p.jsonl"): "messages"}
    assert pool_of(tmp_path, text, format="text")[0].messages == (Message("text", "t"),)
    pool = pool_of(tmp_path, text, mapping={"prompt": "question", "completion": "answer"})
    assert pool[0].messages == (Message("prompt", "q"), Message("completion", "r"))
    assert (
        pool_of(tmp_path, text, mapping={"text": "answer"}, format="text")[0].messages[0].content
        == "r"
    )
    pool = pool_of(tmp_path, text, mapping={"id": "question", "group": "answer", "text": "text"})
    assert (
        pool.ids == ["q"] and pool.groups == ["r"] and pool[0].messages == (Message("text", "t"),)
    )
    assert read_pool(**pool.arguments).digest == pool.digest
    with pytest.raises(UnknownName, match="Did you mean 'sharegpt'"):
        pool_of(tmp_path, text, format="sharegptt")
    with pytest.raises(UnknownName, match="Did you mean 'completion'"):
        pool_of(tmp_path, text, mapping={"completio": "answer"})


def test_the_first_thousand_rows_vote(tmp_path: Path) -> None:
    text = (
        b'{"text": "t"}\n' * 400
        + b'{"instruction": "i", "output": "o"}\n' * 600
        + b'{"text": "t"}\n' * 500
    )
    pool = pool_of(tmp_path, text, max_bad_rows=900)
    assert (
        set(pool.formats.values()) == {"alpaca"}
        and len(pool) == 600
        and pool.funnel["quarantined:missing-field"] == 900
    )
    assert pool.funnel["read"] == 1500
    assert "looks like text" in pool.dropped[0].reason


def test_files_of_different_formats_are_one_pool(tmp_path: Path) -> None:
    sources = []
    for format in ("alpaca", "text"):
        (tmp_path / f"{format}.jsonl").write_bytes(lines(ROWS[format]))
        sources.append(tmp_path / f"{format}.jsonl")
    pool = read_pool(sources)
    assert len(pool) == 14 and pool.groups == ["alpaca"] * 7 + ["text"] * 7
    assert pool.ids[:8] == [*[f"r{i}" for i in range(7)], "r0#2"]
    assert any("different formats" in text for text in pool.warnings)


def test_taking_rows(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, lines(ROWS["text"]))
    taken = pool.take([5, 0, 5])
    assert taken.ids == ["r5", "r0", "r5"] and taken[0] == pool[5] and taken.raw(1) == pool.raw(0)
    assert pool[1:3].ids == ["r1", "r2"] and pool[-1].id == "r6" and taken.funnel["read"] == 7
    assert list(pool.take(np.array([], dtype=int))) == []
    with pytest.raises(IndexError):
        pool[7]


def test_the_digest_is_of_rows_groups_ids_and_order(tmp_path: Path) -> None:
    text = lines(ROWS["text"])
    pool = pool_of(tmp_path, text)
    again = pool_of(tmp_path, gzip.compress(text), "p.jsonl.gz")
    assert pool.digest == again.digest and len(pool.digest) == 32
    others = [
        pool_of(tmp_path, text.replace(b"t 3", b"t 4")),
        pool_of(tmp_path, text, "q.jsonl"),
        pool_of(tmp_path, text, id_field="text"),
        pool.take([1, 0, 2, 3, 4, 5, 6]),
        pool.take(range(6)),
    ]
    assert len({pool.digest, *[other.digest for other in others]}) == 6
    assert pool.take(range(7)).digest == pool.digest


def test_a_pool_is_read_again_from_its_arguments(tmp_path: Path) -> None:
    import pickle

    pool = pool_of(tmp_path, lines(ROWS["text"]), mapping={"text": "text"}, group_field="id")
    assert read_pool(**pool.arguments).digest == pool.digest
    with pytest.raises(TypeError, match="read_pool"):
        pickle.dumps(pool)


def test_a_file_that_changes_under_the_pool_is_an_error(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, lines(ROWS["text"]))
    os.truncate(tmp_path / "p.jsonl", 10)
    with pytest.raises(DataError, match="changed while it was in use"):
        pool[6]


def test_duplicates_are_of_content_not_of_bytes(tmp_path: Path) -> None:
    rows = [
        {
            "id": 1,
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        },
        {
            "id": 2,
            "messages": [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}],
            "x": 1,
        },
        {
            "id": 3,
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "tools": [{"name": "f"}],
        },
        {
            "id": 4,
            "messages": [
                {"role": "user", "content": "q", "name": "Ann"},
                {"role": "assistant", "content": "a"},
            ],
        },
        {
            "id": 5,
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        },
    ]
    pool = pool_of(tmp_path, lines(rows))
    assert pool.exact_duplicates() == {1: 0, 4: 0}


@pytest.mark.slow
def test_the_order_of_a_set_or_a_locale_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "p\u00e9.jsonl").write_bytes(lines(ROWS["alpaca"]) * 2)
    code = (
        "import sys; from gradsift.data.pool import read_pool; p = read_pool([sys.argv[1]]);"
        " print(p.digest, p.ids[-1])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    file = str(tmp_path / "p\u00e9.jsonl")
    told = subprocess.run(
        [sys.executable, "-c", code, file], env=env, check=True, capture_output=True, text=True
    ).stdout
    here = read_pool([file])
    assert told.split() == [here.digest, here.ids[-1]]


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_hub_names_go_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub" / "chats"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS["messages"]), folder / "train.parquet")
    pool = read_pool([f"hf:{folder}"])
    assert (
        len(pool) == 7
        and pool.groups[0] == "chats"
        and pool.ids[3] == "r3"
        and pool[3].messages[1].content == "3"
    )
    saved = put(tmp_path, "datasets", ROWS["messages"])
    assert list(read_pool([f"chats=hf:{saved}"])) == list(pool)
    with pytest.raises(UserError, match="cannot be loaded"):
        read_pool([f"hf:{tmp_path / 'nothing'}"])


def test_splits_of_a_saved_folder(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(ROWS["text"])
    datasets.DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk(
        tmp_path / "d"
    )
    assert len(read_pool([tmp_path / "d"])) == 7 and len(read_pool([tmp_path / "d" / "test"])) == 2
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "e")
    with pytest.raises(UserError, match="holds the splits a, b"):
        read_pool([tmp_path / "e"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the checkout")
def test_the_shared_pool() -> None:
    pool = read_pool([SHARED / "data" / "pool_mt.jsonl.gz"], group_field="source")
    assert pool.funnel["read"] == len(pool) == 20_498 and not pool.dropped
    assert all(example.messages[-1].role == "assistant" for example in pool[:200])
