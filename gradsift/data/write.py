"""Subsets out: the chosen rows as they came in. Nothing here decides which rows; names never come
from rows.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import zstandard

from gradsift.data.files import Text
from gradsift.data.records import canonical, finite_numbers
from gradsift.data.tables import Table
from gradsift.errors import UserError
from gradsift.store.atomic import file_chunks, remove_leftovers, replacing
from gradsift.types import Subset

if TYPE_CHECKING:
    from gradsift.data.pool import Pool
    from gradsift.data.records import Dropped

_SUFFIX = {"lines": ".jsonl", "array": ".json", "parquet": ".parquet", "arrow": ".arrow"}


def subset_suffix(pool: Pool) -> str:
    """The suffix of the container that keeps the pool's rows as they are; .jsonl when its files are
    of several kinds.
    """
    kinds = {file.kind for file in pool.files}
    return _SUFFIX[kinds.pop()] if len(kinds) == 1 else ".jsonl"


def write_subset(
    pool: Pool,
    subset: Subset | Sequence[int] | np.ndarray,
    path: str | Path,
    *,
    add: Mapping[str, Sequence[Any]] | None = None,
) -> list[str]:
    """Writes the chosen rows to `path`, atomically, and returns what should be said about it (empty
    when the rows are as they were).

    The suffix of `path` decides: .jsonl and .json (with .gz or .zst after them: compressed) take
    the bytes of text rows as they stand in their files; .parquet and .arrow take rows of tables
    with their schema. Table rows in a .jsonl, and array rows that span lines, are written as
    canonical JSON, which is said. Rows keep the order of the pool. add: extra columns, each with
    one value per pick, in pick order (as `Subset.gains`); text rows are then written anew.

    Raises UserError (an unknown suffix, text rows into a table, a column that exists, `path` is a
    file of the pool), DiskFull, ResourceError.
    """
    path = Path(path)
    picks = np.asarray(
        subset.indices if isinstance(subset, Subset) else subset, dtype=np.int64
    ).reshape(-1)
    for name, values in (add or {}).items():
        if len(values) != len(picks):
            raise UserError(
                f"the column {name!r} has {len(values):,} values for {len(picks):,} picks",
                remedy="Give one value per pick.",
            )
    at = np.argsort(picks, kind="stable")
    rows = picks[at]
    columns = {
        name: [_value(values[i]) for i in at.tolist()] for name, values in (add or {}).items()
    }
    for name in pool.names:
        if path.exists() and os.path.exists(name) and os.path.samefile(path, name):
            raise UserError(
                "is a file of the pool", where=path, remedy="Write the subset to another file."
            )
    kind, packing = _kind(path)
    with _replacing(path, packing) as out:
        if kind in ("parquet", "arrow"):
            _write_table(pool, rows, columns, out, kind, path)
            return []
        anew = _write_text(pool, rows, columns, out, kind)
    if not anew:
        return []
    mixed = (
        " (the pool's files are of several kinds)"
        if len({file.kind for file in pool.files}) > 1
        else ""
    )
    return [
        f"{anew:,} rows that are no line of JSON in their file are written anew as one line"
        f" each{mixed}"
    ]


def write_dropped(pool: Pool, path: str | Path, also: Sequence[Dropped] = ()) -> None:
    """The quarantine, and rows a selection left out besides, as jsonl: file, line, id, reason,
    fix.
    """
    with _replacing(Path(path), _kind(Path(path))[1]) as out:
        for row in [*pool.dropped, *also]:
            told = {
                "file": row.file,
                "line": row.line,
                "id": row.id,
                "reason": row.reason,
                "fix": row.fix,
            }
            out.write(
                json.dumps(told, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
            )


def copy_file(source: Path, path: Path) -> None:
    """The bytes of a file of a run under another name, all or nothing. Raises DiskFull,
    ResourceError.
    """
    with contextlib.suppress(OSError):
        remove_leftovers(path.absolute().parent)
    with _replacing(path, "") as out:
        for chunk in file_chunks(source):
            out.write(chunk)


def _kind(path: Path) -> tuple[str, str]:
    """(container, compression) that the suffixes of a path ask for."""
    packing = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}.get(path.suffix.lower(), "")
    inner = Path(path.stem).suffix.lower() if packing else path.suffix.lower()
    kind = {
        ".jsonl": "lines",
        ".ndjson": "lines",
        ".json": "array",
        ".parquet": "parquet",
        ".arrow": "arrow",
    }.get(inner)
    if kind is None or (packing and kind in ("parquet", "arrow")):
        known = ".jsonl, .json (also with .gz or .zst), .parquet or .arrow"
        raise UserError(
            "its suffix names no container", where=path, remedy=f"End the name in {known}."
        )
    return kind, packing


def _packed(file: IO[bytes], packing: str) -> contextlib.AbstractContextManager[Any]:
    if packing == "gz":
        # no name, no time: the same rows give the same bytes
        return gzip.GzipFile("", "wb", 6, file, mtime=0)
    if packing == "zst":
        return zstandard.ZstdCompressor(level=9, write_checksum=True).stream_writer(
            file, closefd=False
        )
    return contextlib.nullcontext(file)


@contextlib.contextmanager
def _replacing(path: Path, packing: str) -> Iterator[IO[bytes]]:
    """A file that takes the name `path` when it is complete and synced, and leaves nothing when it
    is not.
    """
    with replacing(path) as file, _packed(file, packing) as out:
        yield out


def _value(value: Any) -> Any:
    return finite_numbers(value.item() if isinstance(value, np.generic) else value)


def _refuse_taken(name: str, taken: Any) -> None:
    if name in taken:
        raise UserError(
            f"the rows have a field {name!r} already",
            remedy="Choose another name for the added column.",
        )


def _write_text(
    pool: Pool, rows: np.ndarray, columns: Mapping[str, list[Any]], out: IO[bytes], kind: str
) -> int:
    """Returns how many rows were not written as they stand in their file (without counting those
    that got new columns).
    """
    anew, previous, end = 0, None, 0
    for i, row in enumerate(rows.tolist()):
        file, start, end = pool.source(row)
        data = pool.raw(row)
        if columns:
            record = pool.record(row)
            for name in columns:
                _refuse_taken(name, record)
            data = canonical({**record, **{name: values[i] for name, values in columns.items()}})
        elif isinstance(file, Table) or (kind == "lines" and b"\n" in data):
            data, anew = canonical(pool.record(row)), anew + 1
        if kind == "array":
            out.write(_between(previous, file, start) if i else _head(file))
        elif i:
            out.write(b"\n")
        out.write(data)
        previous = file
    if kind == "array":
        out.write(_tail(previous) if previous else b"[]\n")
    elif previous and not _unended(previous, end):
        out.write(b"\n")
    return anew


def _unended(file: Any, end: int) -> bool:
    """Whether a row that ends there is the last line of a file that does not end in a newline: then
    neither does the subset.
    """
    return isinstance(file, Text) and file.kind == "lines" and end == file.size


def _head(file: Any) -> bytes:
    return file.read(file.begin, file.first) if _is_array(file) else b"[\n"


def _between(previous: Any, file: Any, start: int) -> bytes:
    """The separator in front of an element: as it stands in the file where both come from one
    array, a comma and a newline elsewhere.
    """
    if _is_array(file) and previous is file and start > file.first:
        before = file.read(max(file.first, start - 4096), start)
        gap = before[len(before.rstrip(b" \t\r\n,")) :]
        if gap.count(b",") == 1:
            return gap
    return b",\n"


def _tail(file: Any) -> bytes:
    tail = file.read(file.last, file.size) if _is_array(file) else b""
    return tail if tail.strip() == b"]" else b"\n]\n"


def _is_array(file: Any) -> bool:
    return isinstance(file, Text) and file.kind == "array"


def _write_table(
    pool: Pool,
    rows: np.ndarray,
    columns: Mapping[str, list[Any]],
    out: IO[bytes],
    kind: str,
    path: Path,
) -> None:
    files = [file for file in pool.files if isinstance(file, Table)]
    if len(files) < len(pool.files):
        remedy = "Write .jsonl instead."
        raise UserError(
            "rows that are JSON text are not turned into a table: types would change",
            where=path,
            remedy=remedy,
        )
    schema = files[0].table.schema
    if not all(file.table.schema.equals(schema) for file in files):
        raise UserError(
            "the pool's tables have different schemas", where=path, remedy="Write .jsonl instead."
        )
    base = dict(zip(map(id, files), np.cumsum([0, *map(len, files)]).tolist(), strict=False))
    wanted = np.array(
        [base[id(file)] + start for file, start, _ in (pool.source(int(row)) for row in rows)],
        dtype=np.int64,
    )
    at = np.argsort(wanted, kind="stable")
    # Batch by batch: one take over a text column of more than 2 GiB overflows its 32-bit offsets.
    parts, begin = [], 0
    for batch in (batch for file in files for batch in file.table.to_batches()):
        inside = wanted[
            at[
                np.searchsorted(wanted[at], begin) : np.searchsorted(
                    wanted[at], begin + batch.num_rows
                )
            ]
        ]
        parts.append(batch.take(pa.array(inside - begin)))
        begin += batch.num_rows
    chosen = pa.Table.from_batches(parts, schema).take(pa.array(np.argsort(at, kind="stable")))
    for name, values in columns.items():
        _refuse_taken(name, chosen.column_names)
        chosen = chosen.append_column(name, pa.array(values))
    if kind == "parquet":
        pq.write_table(chosen, out)
        return
    chosen = chosen.unify_dictionaries()
    with pa.ipc.new_file(out, chosen.schema) as writer:
        writer.write_table(chosen)
