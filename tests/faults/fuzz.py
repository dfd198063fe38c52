"""Reads damaged copies of valid files, one after the other: `python -m tests.faults.fuzz KIND FIRST
COUNT FOLDER`.

Copy number k is the same in every process. Each must come to an error of gradsift or to a pool
whose counts add up; the number of the one being read stands in FOLDER/at, so that a crash can be
told from its number. Ends with 1, and a traceback, at the first that does not.
"""

from __future__ import annotations

import gzip
import random
import sys
from pathlib import Path

import pyarrow as pa
import zstandard

from gradsift.data.pool import read_pool
from gradsift.data.write import write_subset
from gradsift.errors import GradsiftError
from tests.faults.corpus.tables import arrow, in_list, parquet

ROWS = [
    {
        "id": f"r{i}",
        "prompt": f"question {i} " * (i % 5 + 1),
        "completion": "é" * (i % 7 + 1),
        "n": [i, None],
    }
    for i in range(40)
]
CHATS = in_list(pa.table({"text": [f"answer {i}" for i in range(40)]}))
TEXT = b"".join(
    b'{"id": "%d", "prompt": "q\\u00e9 %d", "completion": "a\\n%d", "x": [1, {"y": null}]}\n'
    % (i, i, i)
    for i in range(40)
)
ARRAY = b"[\n  " + b",\n  ".join(TEXT.splitlines()) + b"\n]\n"
KINDS: dict[str, tuple[str, bytes]] = {
    "jsonl": (".jsonl", TEXT),
    "json": (".json", ARRAY),
    "gz": (".jsonl.gz", gzip.compress(TEXT, mtime=0)),
    "zst": (".jsonl.zst", zstandard.compress(TEXT)),
    "parquet": (".parquet", parquet(pa.Table.from_pylist(ROWS), compression="none")),
    "snappy": (".parquet", parquet(CHATS)),
    "arrow": (".arrow", arrow(pa.Table.from_pylist(ROWS))),
    "chats": (".arrow", arrow(CHATS)),
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to four things done to the bytes: flip a bit, set a few bytes, cut, drop, repeat or move
    a stretch.
    """
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        at, size = rng.randrange(len(out)), rng.choice((1, 2, 4, 8, 40))
        stretch = bytes(out[at : at + size])
        what = rng.randrange(7)
        if what == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            out[at : at + size] = rng.choice(
                (b"\0", b"\xff", b"\x80", b'"', b"\\", b"[", b"]", b"\n", b"\x7f")
            ) * len(stretch)
        elif what == 2:
            del out[at:]
        elif what == 3:
            del out[at : at + size]
        elif what == 4:
            out[at:at] = stretch * rng.choice((1, 2, 50))
        elif what == 5:
            out[at : at + size] = rng.randbytes(len(stretch))
        else:
            to = rng.randrange(len(out))
            out[to : to + len(stretch)] = stretch
    return bytes(out)


def check_read(path: Path) -> bool:
    """Whether the file is read; then what is read adds up, and written out it is read as the same
    again.
    """
    try:
        pool = read_pool([path], max_bad_rows=1000)
        messages = [example.messages for example in pool]
    except GradsiftError as error:
        if not (error.what and error.remedy and error.where):
            raise
        return False
    bad = sum(count for key, count in pool.funnel.items() if key.startswith("quarantined:"))
    assert pool.funnel["read"] == len(pool) + bad == len(messages) + bad
    assert len(set(pool.ids)) == len(pool) > 0
    assert len(pool.dropped) - bad in (0, 1)
    copy = path.with_name("copy.jsonl")
    write_subset(pool, range(len(pool)), copy)
    again = read_pool([copy], format=next(iter(pool.formats.values())))
    assert [example.messages for example in again] == messages
    return True


def main(kind: str, first: int, count: int, folder: Path) -> None:
    suffix, data = KINDS[kind]
    path, good = folder / f"p{suffix}", 0
    for number in range(first, first + count):
        (folder / "at").write_text(f"{kind} {number}")
        path.write_bytes(damaged(data, random.Random(f"{kind} {number}")))
        good += check_read(path)
    print(f"{kind}: {good} of {count} read, the others refused")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
