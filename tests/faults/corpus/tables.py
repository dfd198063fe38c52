"""Hostile tables: parquet and Arrow files that are damaged, lie about themselves, or hold what no
row should.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from tests.faults.corpus import NO_ROWS, Reads, Refused, add, bad


def parquet(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def arrow(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_file(out, table.schema, **options) as writer:
        writer.write_table(table)
    return out.getvalue()


TEXTS = pa.table({"text": ["a", "b", "c"]})
PARQUET, ARROW = parquet(TEXTS), arrow(TEXTS)
NO_PARQUET, NO_ARROW = (
    Refused("DataError", "not a readable parquet"),
    Refused("DataError", "not a readable Arrow"),
)


def deep(levels: int) -> pa.Array:
    value: pa.Array = pa.array([1, 2])
    for _ in range(levels):
        value = pa.StructArray.from_arrays([value], ["a"])
    return value


def with_bytes(values: list[bytes]) -> pa.Table:
    """A text column whose bytes are not all UTF-8."""
    array = pa.array(values, pa.binary())
    return pa.table({"text": pa.StringArray.from_buffers(len(array), *array.buffers()[1:])})


def forged(table: pa.Table, *offsets: int) -> bytes:
    """An Arrow file of TEXTS, or of them in turns, with other offsets of the last text column."""
    data, real = arrow(table), struct.pack("<4i", 0, 1, 2, 3)
    at = data.rindex(real)
    return data[:at] + struct.pack("<4i", *offsets) + data[at + len(real) :]


def in_list(table: pa.Table) -> pa.Table:
    """Its text column, as the contents of turns."""
    texts = table["text"].chunk(0)
    turns = pa.StructArray.from_arrays(
        [pa.array(["assistant"] * len(texts)), texts], ["role", "content"]
    )
    return pa.table(
        {"messages": pa.ListArray.from_arrays(pa.array(range(len(texts) + 1), pa.int32()), turns)}
    )


SECRET = {
    b"ARROW:extension:name": b"arrow.py_extension_type",
    b"ARROW:extension:metadata": b"cos\nmkdir\n(S'something-ran'\ntR.",
}
EXTENSION = pa.schema([pa.field("text", pa.string()), pa.field("x", pa.int64(), metadata=SECRET)])
TWICE = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
INNER_TWICE = pa.table(
    {"text": ["a"], "s": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["k", "k"])}
)
FAR = pa.table({"text": ["a", "b"], "when": pa.array([0, 2**62], pa.timestamp("us"))})
MARS = pa.table({"text": ["a"], "when": pa.array([0], pa.timestamp("us", "Mars/Phobos"))})
ODD = pa.table(
    {
        "text": ["a", "b"],
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        "when": pa.array([1, 2], pa.timestamp("ns", "UTC")),
        "blob": pa.array([b"\xff", None]),
        "half": pa.array([float("nan"), 1.0], pa.float32()),
        "none": pa.nulls(2),
    }
)
for name, data, found in [
    ("parquet", PARQUET, Reads(3)),
    ("parquet: odd types", parquet(ODD), Reads(2)),
    ("parquet: magic alone", b"PAR1", NO_PARQUET),
    ("parquet: wrong magic", b"PAR2" + PARQUET[4:-4] + b"PAR2", NO_PARQUET),
    ("parquet: without its footer", PARQUET[: len(PARQUET) // 2], NO_PARQUET),
    (
        "parquet: a footer longer than the file",
        PARQUET[:-8] + struct.pack("<I", 0x7FFFFFFF) + b"PAR1",
        NO_PARQUET,
    ),
    (
        "parquet: a footer of garbage",
        PARQUET[:40] + b"\xff" * (len(PARQUET) - 48) + PARQUET[-8:],
        NO_PARQUET,
    ),
    ("parquet: a damaged page", PARQUET[:4] + b"\xff" * 40 + PARQUET[44:], NO_PARQUET),
    ("parquet: empty file", b"", NO_PARQUET),
    ("parquet: no rows", parquet(TEXTS.slice(0, 0)), NO_ROWS),
    ("parquet: no columns", parquet(pa.table({})), NO_ROWS),
    ("parquet: a column twice", parquet(TWICE), Refused("DataError", "two columns")),
    (
        "parquet: a text that is no UTF-8",
        parquet(with_bytes([b"a", b"\xff", b"c"])),
        bad("not-utf8"),
    ),
    ("parquet: NUL in a text", parquet(pa.table({"text": ["a", "b\0", "c"]})), bad("nul")),
    ("parquet: 60 levels", parquet(pa.table({"text": ["a", "b"], "d": deep(60)})), Reads(2)),
    ("parquet: 500 levels", parquet(pa.table({"text": ["a", "b"], "d": deep(500)})), NO_PARQUET),
    ("parquet: a time beyond the calendar", parquet(FAR), Reads(1, ((2, "wrong-type"),))),
    (
        "parquet: a pickled extension type",
        parquet(pa.table([["a"], [1]], schema=EXTENSION)),
        Reads(1),
    ),
    ("parquet: a bomb", lambda f: _parquet_bomb(f), Refused("ResourceError", "expands beyond")),
    ("arrow", ARROW, Reads(3)),
    ("arrow: odd types", arrow(ODD), Reads(2)),
    ("arrow: cut", ARROW[: len(ARROW) // 2], NO_ARROW),
    ("arrow: magic alone", b"ARROW1", NO_ARROW),
    ("arrow: empty file", b"", NO_ARROW),
    ("arrow: garbage", b"ARROW1\0\0" + b"\xff" * 500, NO_ARROW),
    ("arrow: offsets that run away", forged(TEXTS, 0, 1, 2_000_000_000, 3), NO_ARROW),
    ("arrow: offsets that go back", forged(TEXTS, 0, 3, 1, 3), NO_ARROW),
    ("arrow: negative offsets", forged(TEXTS, -5, 1, 2, 3), NO_ARROW),
    (
        "arrow: offsets that run away, deep",
        forged(in_list(TEXTS), 0, 1, 2_000_000_000, 3),
        NO_ARROW,
    ),
    ("arrow: a text that is no UTF-8", arrow(with_bytes([b"a", b"\xff", b"c"])), bad("not-utf8")),
    (
        "arrow: a text that is no UTF-8, deep",
        arrow(in_list(with_bytes([b"a", b"\xff", b"c"]))),
        bad("not-utf8"),
    ),
    ("arrow: a word that is not in its dictionary", lambda f: _no_such_word(f), NO_ARROW),
    ("arrow: a field twice in a struct", arrow(INNER_TWICE), Refused("DataError", "wrong-type")),
    ("arrow: a time beyond the calendar", arrow(FAR), Reads(1, ((2, "wrong-type"),))),
    ("arrow: a time of no place", arrow(MARS), Refused("DataError", "wrong-type")),
    ("arrow: a bomb", lambda f: _arrow_bomb(f), Refused("ResourceError", "expands beyond")),
]:
    add(name, data, found, ".parquet" if name.startswith("parquet") else ".arrow")


def _parquet_bomb(folder: Path) -> Path:
    """One text of 100 kB, named a million times by a dictionary: 100 GB from a small file."""
    words = pa.DictionaryArray.from_arrays(
        pa.array([0] * 1_000_000, pa.int32()), pa.array(["x" * 100_000])
    )
    pq.write_table(pa.table({"text": words}), folder / "p.parquet", store_schema=False)
    return folder / "p.parquet"


def _arrow_bomb(folder: Path) -> Path:
    batch = pa.table({"text": ["x" * (1 << 22)]})
    with pa.ipc.new_file(
        str(folder / "p.arrow"), batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        for _ in range(400):
            writer.write_table(batch)
    return folder / "p.arrow"


def _no_such_word(folder: Path) -> Path:
    data = arrow(
        pa.table(
            {
                "text": pa.DictionaryArray.from_arrays(
                    pa.array([0, 1, 1], pa.int32()), pa.array(["a", "b"])
                )
            }
        )
    )
    at = data.rindex(struct.pack("<3i", 0, 1, 1))
    (folder / "p.arrow").write_bytes(data[:at] + struct.pack("<3i", 0, 7000, 1) + data[at + 12 :])
    return folder / "p.arrow"
