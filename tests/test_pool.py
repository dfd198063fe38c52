"""Pools: every container with every format, stable ids, quarantine by file and line, and what a pool promises about itself."""

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

from gradsift.errors import DataError, ResourceError, TooManyBadRows, UnknownName, UserError
from gradsift.pool import Pool, read_pool, write_dropped
from gradsift.types import Message

SHARED = Path(os.environ.get("GRADSIFT_SHARED", Path(__file__).resolve().parents[1] / ".." / "shared"))
GOOD = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'

ROWS: dict[str, list[dict]] = {
    "alpaca": [{"id": f"r{i}", "instruction": f"Say {i}.", "input": "", "output": f"{i} \u2028 \u00e9"} for i in range(7)],
    "sharegpt": [{"id": f"r{i}", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": f"{i}"}]} for i in range(7)],
    "messages": [
        {"id": f"r{i}", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{i}"}]} for i in range(7)
    ],
    "prompt-completion": [{"id": f"r{i}", "prompt": "p", "completion": f"{i}"} for i in range(7)],
    "text": [{"id": f"r{i}", "text": f"t {i}"} for i in range(7)],
    "tokenised": [{"id": f"r{i}", "input_ids": [1, i, 3], "labels": [-100, i, 3]} for i in range(7)],
}


def lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def put(folder: Path, container: str, rows: list[dict]) -> str:
    """Writes rows in a container; returns the source for read_pool."""
    path = folder / ("rows" if container == "datasets" else f"rows.{container}")
    text = json.dumps(rows, ensure_ascii=False, indent=1).encode() if container.startswith("json.") or container == "json" else lines(rows)
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


CONTAINERS = ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "json.zst", "parquet", "arrow", "datasets"]


@pytest.mark.filterwarnings("ignore::ResourceWarning:datasets.*", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("format", ROWS)
def test_every_format_in_every_container_says_the_same(tmp_path: Path, format: str, container: str) -> None:
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


def test_bad_rows_are_quarantined_by_line_and_the_good_ones_stay_as_they_are(tmp_path: Path) -> None:
    good = [GOOD, b'{"id": 7, ' + GOOD[1:] + b"\r", GOOD.replace(b'"q"', '"\u2028\u0085"'.encode())]
    bad = [
        b"{broken", b"[1, 2]", b'{"a": NaN}', b"\0\0", b'{"messages": []}', b'{"messages": "x", "messages": "y"}',
        b"[" * 100_000, b'{"m": "\\ud800"}', b'{"other": 1}', b'{"messages": [{"role": "user", "content": "q"}]}', b"\xff\xfe{", b"3",
    ]  # fmt: skip
    text = b"\xef\xbb\xbf" + b"\n".join([good[0], b"", *bad[:6], good[1], b"  \r", *bad[6:], good[2]])
    pool = pool_of(tmp_path, text, max_bad_rows=12)
    assert [pool.raw(i) for i in range(3)] == good
    assert [pool.place(i).rpartition(":")[2] for i in range(3)] == ["1", "9", "17"]
    assert [row.line for row in pool.dropped] == [3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16]
    codes = ["bad-json", "not-object", "nan", "nul", "no-answer", "duplicate-key"]
    codes += ["too-deep", "surrogate", "missing-field", "no-answer", "not-utf8", "not-object"]
    assert [row.code for row in pool.dropped] == codes
    assert pool.funnel["read"] == 15 and pool.funnel["blank"] == 2 and pool.funnel["quarantined:no-answer"] == 2
    assert pool.ids[1] == "7" and pool.ids[0] == xxhash.xxh3_128_hexdigest(GOOD)
    assert pool[2].messages[0].content == "\u2028\u0085"
    write_dropped(pool, tmp_path / "dropped.jsonl")
    told = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [row["line"] for row in told] == [row.line for row in pool.dropped]
    assert [row["reason"].partition(":")[0] for row in told] == codes
    assert all(row["file"] == str(tmp_path / "p.jsonl") and row["fix"] for row in told)


def test_a_row_over_the_limit_costs_no_memory_and_is_named(tmp_path: Path) -> None:
    long = GOOD.replace(b'"q"', b'"' + b"x" * 9_000_000 + b'"')
    pool = pool_of(tmp_path, b"\n".join([GOOD, long, GOOD, long]) + b"\n", max_row_bytes=1000, max_bad_rows=2)
    assert [(row.line, row.code) for row in pool.dropped] == [(2, "too-long"), (4, "too-long")]
    assert f"{len(long):,}" in pool.dropped[0].reason and [pool.raw(0), pool.raw(1)] == [GOOD, GOOD]
    assert pool.place(1).endswith(":3")
    pool = pool_of(tmp_path, GOOD + b"\n" + long, max_row_bytes=1000, max_bad_rows=1)
    assert [row.line for row in pool.dropped] == [2] and f"{len(long):,}" in pool.dropped[0].reason


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_rows_before_a_cut_survive_and_the_cut_is_told(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    rows = lines([{"prompt": bytes(rng.integers(97, 123, 500, dtype=np.uint8)).decode(), "completion": str(i)} for i in range(500)])
    packed = gzip.compress(rows) if kind == "gz" else zstandard.compress(rows)
    whole = pool_of(tmp_path, packed, f"p.jsonl.{kind}")
    assert len(whole) == 500 and not whole.warnings
    cut = pool_of(tmp_path, packed[: len(packed) * 2 // 3], f"p.jsonl.{kind}")
    assert 100 < len(cut) < 450
    assert [cut.raw(i) for i in range(len(cut))] == rows.split(b"\n")[: len(cut)]
    assert cut.dropped[-1].code == "cut-file" and cut.dropped[-1].line == len(cut) + 1
    assert any("ends in the middle" in text for text in cut.warnings)
    with pytest.raises(DataError, match="ends in the middle"):
        pool_of(tmp_path, packed[:8], f"p.jsonl.{kind}")


def test_a_damaged_checksum_is_an_error(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(lines(ROWS["text"])))
    packed[-6] ^= 1
    with pytest.raises(DataError, match="checksum"):
        pool_of(tmp_path, bytes(packed), "p.jsonl.gz")


def test_members_of_a_gzip_are_one_text(tmp_path: Path) -> None:
    text = lines(ROWS["text"])
    for name, pack in (("p.jsonl.gz", gzip.compress), ("p.jsonl.zst", zstandard.compress)):
        assert len(pool_of(tmp_path, pack(text[:100]) + pack(text[100:]), name)) == 7


def test_the_kind_of_compression_is_read_from_the_bytes(tmp_path: Path) -> None:
    assert len(pool_of(tmp_path, gzip.compress(lines(ROWS["text"])), "p.jsonl")) == 7
    with pytest.raises(DataError, match=r"not a \.gz file"):
        pool_of(tmp_path, lines(ROWS["text"]), "p.jsonl.gz")


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsift.tables.EXPANSION_FROM", 1 << 22)
    bomb = b" " * (1 << 25)
    for name, packed in (("b.jsonl.gz", gzip.compress(bomb)), ("b.jsonl.zst", zstandard.compress(bomb))):
        with pytest.raises(ResourceError, match="expands beyond 100 times"):
            pool_of(tmp_path, packed, name, max_expansion=100)


@pytest.mark.parametrize("limit, allowed", [(0.05, 5), (4, 4), (1.0, 99), (0, 0)])
def test_too_many_bad_rows_stop_with_the_first_of_them(tmp_path: Path, limit: float, allowed: int) -> None:
    rows = [GOOD] * (100 - allowed) + [b"{x"] * allowed
    assert len(pool_of(tmp_path, b"\n".join(rows), max_bad_rows=limit)) == 100 - allowed
    if limit == 1.0:
        return
    rows[99 - allowed] = b"{x"
    with pytest.raises(TooManyBadRows, match=f"^{allowed + 1} of 100 rows") as error:
        pool_of(tmp_path, b"\n".join(rows), max_bad_rows=limit)
    assert f"p.jsonl:{100 - allowed}: bad-json" in str(error.value) and "max_bad_rows" in str(error.value)
    assert error.value.exit_code == 3


def test_a_hopeless_file_is_given_up_early(tmp_path: Path) -> None:
    with pytest.raises(TooManyBadRows, match="reading stopped"):
        pool_of(tmp_path, b"{x\n" * 30_000, format="messages")


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    for text in (b"", b"\n\n", b"\xef\xbb\xbf", b"[]"):
        with pytest.raises(DataError, match="holds no rows"):
            pool_of(tmp_path, text)
    with pytest.raises(DataError, match="no usable row"):
        pool_of(tmp_path, b"{x\n", max_bad_rows=1.0)
    with pytest.raises(DataError, match=r"no known format fits its fields: 'q', 'z'") as error:
        pool_of(tmp_path, b'{"q": 1, "z": 2}\n')
    assert "mapping" in str(error.value)
    with pytest.raises(UserError, match="no pool file"):
        read_pool([])


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "pool_general.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"Did you mean .*pool_general\.jsonl") as error:
        read_pool([tmp_path / "pool_generel.jsonl"])
    assert error.value.exit_code == 2
    with pytest.raises(UserError, match="does not exist"):
        read_pool([tmp_path / "no" / "p.jsonl"])


@pytest.mark.parametrize("name", ["p.pkl", "p.pt", "p.bin", "p.pickle.gz", "p.npz"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="they can run code"):
        pool_of(tmp_path, GOOD, name)


def test_pickles_are_refused_by_content(tmp_path: Path) -> None:
    import pickle

    with pytest.raises(UserError, match="pickle or a zip"):
        pool_of(tmp_path, pickle.dumps({"a": 1}), "p.jsonl")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.csv is not a kind"):
        pool_of(tmp_path, b"a,b\n", "p.csv")
    assert len(pool_of(tmp_path, GOOD, "part-0001.bak")) == 1
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="a pipe"):
        read_pool([tmp_path / "pipe"])
    with pytest.raises(DataError, match="UTF-16"):
        pool_of(tmp_path, GOOD.decode().encode("utf-16"))
    with pytest.raises(DataError, match="one JSON object spread over lines"):
        pool_of(tmp_path, b'{\n "data": []\n}')
    with pytest.raises(DataError, match="parquet"):
        pool_of(tmp_path, b"PAR1 and no more", "p.parquet")
    with pytest.raises(UserError, match="a folder"):
        read_pool([tmp_path])


def test_a_damaged_array_keeps_what_came_before(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, b'[{"text": "a"}, 5, "x", {"text": "]}\\"["}, {"text": 3}, [1]\n, {"text": "b"}]', "p.json", max_bad_rows=4)
    assert [pool[i].messages[0].content for i in range(3)] == ["a", ']}"[', "b"]
    assert [(row.line, row.code) for row in pool.dropped] == [(2, "not-object"), (3, "not-object"), (5, "wrong-type"), (6, "not-object")]
    pool = pool_of(tmp_path, b'[{"text": "a"}, {"text": "b"}, {"text": "c', "p.json", max_bad_rows=1)
    assert len(pool) == 2 and pool.dropped[0].code == "cut-file" and pool.dropped[0].line == 3
    pool = pool_of(tmp_path, b'[{"text": "a"}, {"text": "b"}', "p.json")
    assert len(pool) == 2 and [row.code for row in pool.dropped] == ["cut-file"]
    pool = pool_of(tmp_path, b'[{"text": "a"}] {"text": "b"}', "p.json", max_bad_rows=1)
    assert len(pool) == 1 and pool.dropped[0].code == "bad-json"
    pool = pool_of(tmp_path, b'[{"text": "' + b"y" * 500 + b'"}, {"text": "b"}]', "p.json", max_bad_rows=1, max_row_bytes=100)
    assert len(pool) == 1 and pool.dropped[0].code == "too-long"
    pool = pool_of(tmp_path, b"[1]\n" + GOOD + b"\n" + GOOD, "p.json", max_bad_rows=1)
    assert len(pool) == 2 and pool.dropped[0].line == 1


def ids_of(folder: Path, ids: list[str], **options) -> Pool:
    return pool_of(folder, b"".join(b'{"id": %s, "text": "t%d"}\n' % (id.encode(), i) for i, id in enumerate(ids)), **options)


def test_ids_are_kept_exactly(tmp_path: Path) -> None:
    pool = ids_of(tmp_path, ['"1"', "2", '"007"', '" a "', "12345678901234567890123", '"\u00e9/../x"'])
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
    pool = read_pool([tmp_path / "a.b.jsonl", f"code={tmp_path / 'c.jsonl.gz'}", str(tmp_path / "c.jsonl.gz")])
    assert pool.groups == ["a.b", "code", "c"]
    (tmp_path / "x=y.jsonl").write_bytes(GOOD)
    assert read_pool([str(tmp_path / "x=y.jsonl")]).groups == ["x=y"]
    text = b'{"text": "a", "src": "s1"}\n{"text": "b"}\n{"text": "c", "src": 3}\n{"text": "d", "src": null}\n'
    pool = pool_of(tmp_path, text, group_field="src")
    assert pool.groups == ["s1", "?", "3", "?"] and [example.group for example in pool] == pool.groups
    assert any("2 rows have no field 'src'" in text for text in pool.warnings)


def test_an_explicit_format_and_a_mapping_win(tmp_path: Path) -> None:
    text = b'{"messages": [{"role": "assistant", "content": "a"}], "text": "t", "question": "q", "answer": "r"}\n'
    assert pool_of(tmp_path, text).formats == {str(tmp_path / "p.jsonl"): "messages"}
    assert pool_of(tmp_path, text, format="text")[0].messages == (Message("text", "t"),)
    pool = pool_of(tmp_path, text, mapping={"prompt": "question", "completion": "answer"})
    assert pool[0].messages == (Message("prompt", "q"), Message("completion", "r"))
    assert pool_of(tmp_path, text, mapping={"text": "answer"}, format="text")[0].messages[0].content == "r"
    pool = pool_of(tmp_path, text, mapping={"id": "question", "group": "answer", "text": "text"})
    assert pool.ids == ["q"] and pool.groups == ["r"] and pool[0].messages == (Message("text", "t"),)
    assert read_pool(**pool.arguments).digest == pool.digest
    with pytest.raises(UnknownName, match="Did you mean 'sharegpt'"):
        pool_of(tmp_path, text, format="sharegptt")
    with pytest.raises(UnknownName, match="Did you mean 'completion'"):
        pool_of(tmp_path, text, mapping={"completio": "answer"})


def test_the_first_thousand_rows_vote(tmp_path: Path) -> None:
    text = b'{"text": "t"}\n' * 400 + b'{"instruction": "i", "output": "o"}\n' * 600 + b'{"text": "t"}\n' * 500
    pool = pool_of(tmp_path, text, max_bad_rows=900)
    assert set(pool.formats.values()) == {"alpaca"} and len(pool) == 600 and pool.funnel["quarantined:missing-field"] == 900
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
        {"id": 1, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"id": 2, "messages": [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}], "x": 1},
        {"id": 3, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": [{"name": "f"}]},
        {"id": 4, "messages": [{"role": "user", "content": "q", "name": "Ann"}, {"role": "assistant", "content": "a"}]},
        {"id": 5, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    pool = pool_of(tmp_path, lines(rows))
    assert pool.exact_duplicates() == {1: 0, 4: 0} and pool.duplicate_of(4) == 0 and pool.duplicate_of(2) is None


def test_the_order_of_a_set_or_a_locale_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "p\u00e9.jsonl").write_bytes(lines(ROWS["alpaca"]) * 2)
    code = "import sys; from gradsift.pool import read_pool; p = read_pool([sys.argv[1]]); print(p.digest, p.ids[-1])"
    env = {**os.environ, "PYTHONHASHSEED": "1", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    file = str(tmp_path / "p\u00e9.jsonl")
    told = subprocess.run([sys.executable, "-c", code, file], env=env, check=True, capture_output=True, text=True).stdout
    here = read_pool([file])
    assert told.split() == [here.digest, here.ids[-1]]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_hub_names_go_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub" / "chats"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS["messages"]), folder / "train.parquet")
    pool = read_pool([f"hf:{folder}"])
    assert len(pool) == 7 and pool.groups[0] == "chats" and pool.ids[3] == "r3" and pool[3].messages[1].content == "3"
    saved = put(tmp_path, "datasets", ROWS["messages"])
    assert list(read_pool([f"chats=hf:{saved}"])) == list(pool)
    with pytest.raises(UserError, match="cannot be loaded"):
        read_pool([f"hf:{tmp_path / 'nothing'}"])


def test_splits_of_a_saved_folder(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(ROWS["text"])
    datasets.DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk(tmp_path / "d")
    assert len(read_pool([tmp_path / "d"])) == 7 and len(read_pool([tmp_path / "d" / "test"])) == 2
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "e")
    with pytest.raises(UserError, match="holds the splits a, b"):
        read_pool([tmp_path / "e"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the checkout")
def test_the_shared_pool() -> None:
    pool = read_pool([SHARED / "data" / "pool_mt.jsonl.gz"], group_field="source")
    assert pool.funnel["read"] == len(pool) == 20_498 and not pool.dropped
    assert all(example.messages[-1].role == "assistant" for example in pool[:200])
