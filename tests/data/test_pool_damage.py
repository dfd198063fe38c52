"""Pools of damaged, hostile and foreign files: what is quarantined by line, what is refused by
name.
"""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard

from gradsift.data.pool import read_pool
from gradsift.data.write import write_dropped
from gradsift.errors import DataError, ResourceError, TooManyBadRows, UserError
from tests.data.test_pool import GOOD, ROWS, lines, pool_of


def test_bad_rows_are_quarantined_by_line_and_the_good_ones_stay_as_they_are(
    tmp_path: Path,
) -> None:
    good = [GOOD, b'{"id": 7, ' + GOOD[1:] + b"\r", GOOD.replace(b'"q"', '"\u2028\u0085"'.encode())]
    bad = [
        b"{broken",
        b"[1, 2]",
        b'{"a": NaN}',
        b"\0\0",
        b'{"messages": []}',
        b'{"messages": "x", "messages": "y"}',
        b"[" * 100_000,
        b'{"m": "\\ud800"}',
        b'{"other": 1}',
        b'{"messages": [{"role": "user", "content": "q"}]}',
        b"\xff\xfe{",
        b"3",
    ]
    text = b"\xef\xbb\xbf" + b"\n".join(
        [good[0], b"", *bad[:6], good[1], b"  \r", *bad[6:], good[2]]
    )
    pool = pool_of(tmp_path, text, max_bad_rows=12)
    assert [pool.raw(i) for i in range(3)] == good
    assert [pool.place(i).rpartition(":")[2] for i in range(3)] == ["1", "9", "17"]
    assert [row.line for row in pool.dropped] == [3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16]
    codes = ["bad-json", "not-object", "nan", "nul", "no-answer", "duplicate-key"]
    codes += ["too-deep", "surrogate", "missing-field", "no-answer", "not-utf8", "not-object"]
    assert [row.code for row in pool.dropped] == codes
    assert (
        pool.funnel["read"] == 15
        and pool.funnel["blank"] == 2
        and pool.funnel["quarantined:no-answer"] == 2
    )
    assert pool.ids[1] == "7" and pool.ids[0] == xxhash.xxh3_128_hexdigest(GOOD)
    assert pool[2].messages[0].content == "\u2028\u0085"
    write_dropped(pool, tmp_path / "dropped.jsonl")
    told = [
        json.loads(line) for line in (tmp_path / "dropped.jsonl").read_bytes().split(b"\n")[:-1]
    ]
    assert [row["line"] for row in told] == [row.line for row in pool.dropped]
    assert [row["reason"].partition(":")[0] for row in told] == codes
    assert all(row["file"] == str(tmp_path / "p.jsonl") and row["fix"] for row in told)


def test_a_row_over_the_limit_costs_no_memory_and_is_named(tmp_path: Path) -> None:
    long = GOOD.replace(b'"q"', b'"' + b"x" * 9_000_000 + b'"')
    pool = pool_of(
        tmp_path, b"\n".join([GOOD, long, GOOD, long]) + b"\n", max_row_bytes=1000, max_bad_rows=2
    )
    assert [(row.line, row.code) for row in pool.dropped] == [(2, "too-long"), (4, "too-long")]
    assert f"{len(long):,}" in pool.dropped[0].reason and [pool.raw(0), pool.raw(1)] == [GOOD, GOOD]
    assert pool.place(1).endswith(":3")
    pool = pool_of(tmp_path, GOOD + b"\n" + long, max_row_bytes=1000, max_bad_rows=1)
    assert [row.line for row in pool.dropped] == [2] and f"{len(long):,}" in pool.dropped[0].reason


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_rows_before_a_cut_survive_and_the_cut_is_told(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    rows = lines(
        [
            {
                "prompt": bytes(rng.integers(97, 123, 500, dtype=np.uint8)).decode(),
                "completion": str(i),
            }
            for i in range(500)
        ]
    )
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
    monkeypatch.setattr("gradsift.data.limits.EXPANSION_FROM", 1 << 22)
    bomb = b" " * (1 << 25)
    for name, packed in (
        ("b.jsonl.gz", gzip.compress(bomb)),
        ("b.jsonl.zst", zstandard.compress(bomb)),
    ):
        with pytest.raises(ResourceError, match="expands beyond 100 times"):
            pool_of(tmp_path, packed, name, max_expansion=100)


@pytest.mark.parametrize("limit, allowed", [(0.05, 5), (4, 4), (1.0, 99), (0, 0)])
def test_too_many_bad_rows_stop_with_the_first_of_them(
    tmp_path: Path, limit: float, allowed: int
) -> None:
    rows = [GOOD] * (100 - allowed) + [b"{x"] * allowed
    assert len(pool_of(tmp_path, b"\n".join(rows), max_bad_rows=limit)) == 100 - allowed
    if limit == 1.0:
        return
    rows[99 - allowed] = b"{x"
    with pytest.raises(TooManyBadRows, match=f"^{allowed + 1} of 100 rows") as error:
        pool_of(tmp_path, b"\n".join(rows), max_bad_rows=limit)
    assert f"p.jsonl:{100 - allowed}: bad-json" in str(error.value) and "max_bad_rows" in str(
        error.value
    )
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
    with pytest.raises(UserError, match=r"\.xls is not a kind"):
        pool_of(tmp_path, b"a,b\n", "p.xls")
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
    pool = pool_of(
        tmp_path,
        b'[{"text": "a"}, 5, "x", {"text": "]}\\"["}, {"text": 3}, [1]\n, {"text": "b"}]',
        "p.json",
        max_bad_rows=4,
    )
    assert [pool[i].messages[0].content for i in range(3)] == ["a", ']}"[', "b"]
    assert [(row.line, row.code) for row in pool.dropped] == [
        (2, "not-object"),
        (3, "not-object"),
        (5, "wrong-type"),
        (6, "not-object"),
    ]
    pool = pool_of(
        tmp_path, b'[{"text": "a"}, {"text": "b"}, {"text": "c', "p.json", max_bad_rows=1
    )
    assert len(pool) == 2 and pool.dropped[0].code == "cut-file" and pool.dropped[0].line == 3
    pool = pool_of(tmp_path, b'[{"text": "a"}, {"text": "b"}', "p.json")
    assert len(pool) == 2 and [row.code for row in pool.dropped] == ["cut-file"]
    pool = pool_of(tmp_path, b'[{"text": "a"}] {"text": "b"}', "p.json", max_bad_rows=1)
    assert len(pool) == 1 and pool.dropped[0].code == "bad-json"
    pool = pool_of(
        tmp_path,
        b'[{"text": "' + b"y" * 500 + b'"}, {"text": "b"}]',
        "p.json",
        max_bad_rows=1,
        max_row_bytes=100,
    )
    assert len(pool) == 1 and pool.dropped[0].code == "too-long"
    pool = pool_of(tmp_path, b"[1]\n" + GOOD + b"\n" + GOOD, "p.json", max_bad_rows=1)
    assert len(pool) == 2 and pool.dropped[0].line == 1
