"""Subsets out: the rows byte for byte as they were, in whatever container they came in."""

import contextlib
import csv
import gzip
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradsift.data.files import converted
from gradsift.data.pool import Pool, read_pool
from gradsift.data.write import rewrite, subset_suffix, write_subset
from gradsift.errors import DiskFull, ResourceError, UserError
from gradsift.types import Subset
from tests.data.test_pool import GOOD, ROWS, lines, put


def unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return (
        zstandard.ZstdDecompressor().stream_reader(data).read() if path.suffix == ".zst" else data
    )


def row_text(i: int, spaced: bool, return_: bool) -> bytes:
    text = json.dumps(
        {"id": i, "text": f"t {i} \u00e9"},
        ensure_ascii=i % 2 == 0,
        separators=(", ", ": ") if spaced else (",", ":"),
    )
    return text.encode() + (b"\r" if return_ else b"")


MANY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SHAPES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=8)


@MANY
@given(rows=SHAPES, ended=st.booleans(), packing=st.sampled_from(["", ".gz", ".zst"]))
def test_all_rows_of_a_jsonl_are_the_file(
    tmp_path: Path, rows: list[tuple[bool, bool]], ended: bool, packing: str
) -> None:
    text = b"\n".join(row_text(i, *shape) for i, shape in enumerate(rows)) + (
        b"\n" if ended else b""
    )
    (tmp_path / "p.jsonl").write_bytes(text)
    pool = read_pool([tmp_path / "p.jsonl"])
    out = tmp_path / f"out.jsonl{packing}"
    assert write_subset(pool, range(len(pool)), out) == []
    assert unpacked(out) == text


@MANY
@given(
    gaps=st.lists(st.sampled_from([",", ",\n", ", ", "\n  ,\r\n"]), max_size=6),
    head=st.sampled_from(["[", "[\n  ", " [ "]),
    tail=st.sampled_from(["]", "\n]\n"]),
)
def test_all_rows_of_an_array_are_the_file(
    tmp_path: Path, gaps: list[str], head: str, tail: str
) -> None:
    rows = [json.dumps({"id": i, "text": f'],[{{"{i}'}) for i in range(len(gaps) + 1)]
    text = (
        head + rows[0] + "".join(gap + row for gap, row in zip(gaps, rows[1:], strict=True)) + tail
    )
    (tmp_path / "p.json").write_text(text, newline="")
    pool = read_pool([tmp_path / "p.json"])
    write_subset(pool, range(len(pool)), tmp_path / "out.json")
    assert (tmp_path / "out.json").read_bytes() == text.encode()
    some = list(range(0, len(rows), 2))
    write_subset(pool, some, tmp_path / "some.json")
    assert json.loads((tmp_path / "some.json").read_bytes()) == [json.loads(rows[i]) for i in some]


def made(folder: Path, container: str) -> Pool:
    return read_pool([put(folder, container, ROWS["alpaca"])])


@pytest.mark.parametrize(
    "container, suffix",
    [("jsonl.gz", ".jsonl"), ("json.zst", ".json"), ("parquet", ".parquet"), ("arrow", ".arrow")],
)
def test_a_subset_reads_back_as_the_rows_chosen(
    tmp_path: Path, container: str, suffix: str
) -> None:
    pool = made(tmp_path, container)
    assert subset_suffix(pool) == suffix
    out = tmp_path / f"out{suffix}"
    assert write_subset(pool, Subset(np.array([5, 1, 3])), out) == []
    again = read_pool([f"rows={out}"])
    assert again.ids == ["r1", "r3", "r5"]
    assert [example.messages for example in again] == [pool[i].messages for i in (1, 3, 5)]
    assert [again.raw(i) for i in range(3)] == [pool.raw(i) for i in (1, 3, 5)]


def test_lines_stay_as_they_were_in_the_order_of_the_pool(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b"".join(row_text(i, i % 2 == 0, i % 3 == 0) + b"\n" for i in range(6))
    )
    pool = read_pool([tmp_path / "p.jsonl"])
    write_subset(pool, [4, 0], tmp_path / "a.jsonl")
    first, last = pool.raw(0) + b"\n", pool.raw(4) + b"\n"
    assert (tmp_path / "a.jsonl").read_bytes() == first + last
    assert first.endswith(b"\r\n")
    write_subset(pool.take([4, 2]), [0], tmp_path / "c.jsonl")
    assert (tmp_path / "c.jsonl").read_bytes() == last
    write_subset(pool, [], tmp_path / "d.jsonl")
    assert (tmp_path / "d.jsonl").read_bytes() == b""


def test_a_table_keeps_schema_metadata_and_values(tmp_path: Path) -> None:
    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("text", pa.large_string()),
            ("when", pa.timestamp("us")),
            ("kind", pa.dictionary(pa.int8(), pa.string())),
            pa.field("score", pa.float32(), metadata={"unit": "nats"}),
        ],
        metadata={"made": "by hand"},
    )
    rows = [
        {
            "id": i,
            "text": f"t{i}",
            "when": i,
            "kind": "ab"[i % 2],
            "score": None if i == 3 else i / 2,
        }
        for i in range(9)
    ]
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    pool = read_pool([tmp_path / "p.parquet"])
    assert pool.ids == [str(i) for i in range(9)]
    write_subset(pool, [7, 3, 0], tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.schema.equals(table.schema, check_metadata=True)
    assert found.to_pylist() == table.take([0, 3, 7]).to_pylist()
    write_subset(pool, [7, 3, 0], tmp_path / "out.arrow")
    assert (
        pa.ipc.open_file(tmp_path / "out.arrow").read_all().to_pylist()
        == table.take([0, 3, 7]).to_pylist()
    )
    write_subset(pool, [8, 2], tmp_path / "more.parquet", add={"gain": [0.5, 0.25]})
    assert pq.read_table(tmp_path / "more.parquet").select(["id", "gain"]).to_pylist() == [
        {"id": 2, "gain": 0.25},
        {"id": 8, "gain": 0.5},
    ]


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    for name, text in (("a", GOOD), ("b", GOOD + b"\n")):  # the first has no new line at its end
        (tmp_path / f"{name}.jsonl").write_bytes(text)
    pool = read_pool([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert write_subset(pool, [0, 1], tmp_path / "out.jsonl") == []
    assert (tmp_path / "out.jsonl").read_bytes() == (GOOD + b"\n") * 2
    pq.write_table(pa.Table.from_pylist(ROWS["text"]), tmp_path / "c.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS["text"][:2]), tmp_path / "d.parquet")
    tables = read_pool([tmp_path / "c.parquet", tmp_path / "d.parquet"])
    write_subset(tables, [8, 6, 0], tmp_path / "out.parquet")
    assert [row["id"] for row in pq.read_table(tmp_path / "out.parquet").to_pylist()] == [
        "r0",
        "r6",
        "r1",
    ]


def test_files_of_several_kinds_become_lines_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text":  "kept as it is"}\n')
    sources = [
        tmp_path / "a.jsonl",
        Path(put(tmp_path, "json", ROWS["text"][:2])),
        Path(put(tmp_path, "parquet", ROWS["text"][:2])),
    ]
    pool = read_pool(sources)
    assert subset_suffix(pool) == ".jsonl"
    notes = write_subset(pool, range(5), tmp_path / "out.jsonl")
    assert (
        len(notes) == 1
        and notes[0].startswith("4 rows that are no line of JSON")
        and "several kinds" in notes[0]
    )
    found = (tmp_path / "out.jsonl").read_bytes().split(b"\n")
    assert (
        found[0] == b'{"text":  "kept as it is"}'
        and found[1] == b'{"id": "r0", "text": "t 0"}'
        and len(found) == 6
    )
    with pytest.raises(UserError, match="types would change"):
        write_subset(pool, [0], tmp_path / "out.parquet")
    assert write_subset(pool, range(5), tmp_path / "out.json") == [
        notes[0].replace("4 rows", "2 rows")
    ]
    assert [row["text"] for row in json.loads((tmp_path / "out.json").read_bytes())] == [
        "kept as it is",
        "t 0",
        "t 1",
        "t 0",
        "t 1",
    ]


def test_added_columns_follow_the_picks(tmp_path: Path) -> None:
    pool = made(tmp_path, "jsonl")
    gains = np.array([3.0, np.nan, 1.0], dtype=np.float32)
    write_subset(pool, [5, 1, 3], tmp_path / "out.jsonl", add={"gain": gains, "rank": [1, 2, 3]})
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [(row["id"], row["gain"], row["rank"]) for row in found] == [
        ("r1", None, 2),
        ("r3", 1.0, 3),
        ("r5", 3.0, 1),
    ]
    assert found[0]["output"] == ROWS["alpaca"][1]["output"]
    with pytest.raises(UserError, match="2 values for 1 picks"):
        write_subset(pool, [5], tmp_path / "x.jsonl", add={"gain": [1, 2]})
    with pytest.raises(UserError, match="have a field 'output' already"):
        write_subset(pool, [5], tmp_path / "x.jsonl", add={"output": [1]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    pool = made(tmp_path, "jsonl")
    for name in ("out.jsonl.gz", "out.jsonl.zst", "out.json"):
        write_subset(pool, [1, 2], tmp_path / name)
        once = (tmp_path / name).read_bytes()
        (tmp_path / "sub").mkdir(exist_ok=True)
        write_subset(pool, [1, 2], tmp_path / "sub" / name)
        assert (tmp_path / "sub" / name).read_bytes() == once


def test_what_would_destroy_or_not_be_readable_is_refused(tmp_path: Path) -> None:
    pool = made(tmp_path, "jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    for path in (tmp_path / "rows.jsonl", tmp_path / "link.jsonl"):
        with pytest.raises(UserError, match="a file of the pool"):
            write_subset(pool, [0], path)
    for name in ("out.csv", "out", "out.parquet.gz"):
        with pytest.raises(UserError, match="names no container"):
            write_subset(pool, [0], tmp_path / name)
    with pytest.raises(ResourceError, match="cannot be written"):
        write_subset(pool, [0], tmp_path / "nowhere" / "out.jsonl")
    assert lines(ROWS["alpaca"]) == (tmp_path / "rows.jsonl").read_bytes()


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    pool = made(tmp_path, "jsonl")
    (tmp_path / "out.jsonl").write_bytes(b"before")
    with pytest.raises(IndexError):
        write_subset(pool, [0, 99], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_table_values_without_a_json_word_are_written_as_text_or_null(tmp_path: Path) -> None:
    when = pa.array([0], pa.timestamp("s"))
    table = pa.table({"text": ["t"], "x": [float("nan")], "b": [b"\x01"], "when": when})
    pq.write_table(table, tmp_path / "p.parquet")
    pool = read_pool([tmp_path / "p.parquet"])
    assert len(write_subset(pool, [0], tmp_path / "out.jsonl")) == 1
    assert (
        tmp_path / "out.jsonl"
    ).read_bytes() == b'{"text": "t", "x": null, "b": "01", "when": "1970-01-01 00:00:00"}\n'
    assert read_pool([tmp_path / "out.jsonl"])[0].messages == pool[0].messages


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A full disk, as far as one process can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    rows = lines([{"text": f"{i} " * 500} for i in range(300)])
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(rows))
    pool = read_pool([tmp_path / "p.jsonl.gz"])
    with files_no_larger_than(100_000):
        with pytest.raises(DiskFull, match="to unpack it"):
            read_pool([tmp_path / "p.jsonl.gz"])
        with pytest.raises(DiskFull, match="no space left"):
            write_subset(pool, range(300), tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl.gz"]
    with files_no_larger_than(100), pytest.raises(DiskFull):
        write_subset(pool, range(300), tmp_path / "out.jsonl.zst")
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl.gz"]


# --- the suffix decides

KINDS = ["jsonl", "json", "csv", "tsv", "parquet", "arrow"]
PLAIN = [
    {"id": f"r{i}", "prompt": f"say, \u2028 {i}", "completion": f"{i}\u00e9"} for i in range(6)
]
# what cannot be written: JSON has values that no column and no cell has
REFUSED = {
    *((came, to) for came in ("jsonl", "json") for to in ("csv", "tsv", "parquet", "arrow")),
    *((came, to) for came in ("csv", "tsv") for to in ("csv", "tsv", "parquet", "arrow")),
    *((came, to) for came in ("parquet", "arrow") for to in ("csv", "tsv")),
} - {("csv", "csv"), ("tsv", "tsv")}


def source(folder: Path, kind: str) -> str:
    if kind not in ("csv", "tsv"):
        return put(folder, kind, PLAIN)
    path = folder / f"rows.{kind}"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(PLAIN[0]), delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(PLAIN)
    return str(path)


def read_with_datasets(path: Path) -> list[dict]:
    """The rows as `datasets` reads them; packed files are unpacked as it does by their suffix."""
    datasets.disable_progress_bars()
    kind = {".jsonl": "json", ".json": "json", ".tsv": "csv"}
    suffix = path.suffixes[0]
    if suffix == ".arrow":
        return pa.ipc.open_file(path).read_all().to_pylist()
    if path.suffix == ".zst":
        plain = path.with_suffix("")
        plain.write_bytes(unpacked(path))
        path = plain
    more = {"sep": "\t"} if suffix == ".tsv" else {}
    loaded = datasets.load_dataset(
        kind.get(suffix, suffix[1:]), data_files=str(path), split="train", **more
    )
    return list(loaded)  # type: ignore[arg-type]


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning:datasets.*", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("came", KINDS)
def test_the_suffix_decides_what_is_written(
    tmp_path: Path, came: str, to: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pool = read_pool([source(tmp_path, came)])
    out = tmp_path / f"picks.{to}{packing}"
    if (packing and to in ("parquet", "arrow")) or (came, to) in REFUSED:
        with pytest.raises(UserError):
            write_subset(pool, [4, 1], out)
        assert not out.exists()
        return
    write_subset(pool, [4, 1], out)
    assert read_with_datasets(out) == [PLAIN[1], PLAIN[4]]
    assert converted([pool.files[0].kind], out) == (
        None if came == to else f"rows are converted from .{came} to .{to}"
    )
    if came == to and came not in ("parquet", "arrow"):
        for row in (1, 4):
            assert pool.raw(row) in unpacked(out)
    again = tmp_path / f"again.{to}"
    rewrite(out, again)
    assert unpacked(again) == unpacked(out)


def test_cells_stay_as_they_were(tmp_path: Path) -> None:
    text = b'\xef\xbb\xbfid,text\r\n1,"a, b"\r\n\r\n2,"c\nd"\r\n3,  e \r\n'
    (tmp_path / "p.csv").write_bytes(text)
    pool = read_pool([tmp_path / "p.csv"])
    assert subset_suffix(pool) == ".csv"
    write_subset(pool, range(3), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == text.replace(b"\r\n\r\n", b"\r\n")
    write_subset(pool, [2, 1], tmp_path / "more.csv", add={"gain": [0.5, None]})
    again = read_pool([tmp_path / "more.csv"])
    assert [again.record(row)["gain"] for row in range(2)] == ["", "0.5"]
    with pytest.raises(UserError, match="have a field 'text' already"):
        write_subset(pool, [1], tmp_path / "x.csv", add={"text": [1]})
    (tmp_path / "q.csv").write_bytes(b"text,id\nx,9\n")
    both = read_pool([tmp_path / "p.csv", tmp_path / "q.csv"])
    assert subset_suffix(both) == ".jsonl"
    with pytest.raises(UserError, match="different columns"):
        write_subset(both, [0, 3], tmp_path / "both.csv")


def test_tables_of_tools_become_lines_without_the_nulls_that_arrow_added(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in (
            {"function": {"name": "f", "arguments": {"a": 1}}},
            {"function": {"name": "g", "arguments": {"b": 2}}},
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    pool = read_pool([tmp_path / "p.parquet"])
    write_subset(pool, [0, 1], tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()] == rows
    write_subset(pool, [0, 1], tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(tmp_path / "p.parquet"))
