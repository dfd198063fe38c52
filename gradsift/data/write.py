"""Subsets out: the chosen rows as they came in. Nothing here decides which rows; names never come
from rows.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
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

from gradsift.data.files import KINDS, Cells, Text, container, open_source
from gradsift.data.limits import EXPANSION
from gradsift.data.records import canonical, finite_numbers
from gradsift.data.tables import Table
from gradsift.errors import UserError
from gradsift.store.atomic import file_chunks, remove_leftovers, replacing
from gradsift.types import Subset, counted

if TYPE_CHECKING:
    from gradsift.data.pool import Pool
    from gradsift.data.records import Dropped


def subset_suffix(pool: Pool) -> str:
    """The suffix of the container that keeps the pool's rows as they are; .jsonl when its files are
    of several kinds, or their columns differ.
    """
    kinds = {file.kind for file in pool.files}
    shapes = [_columns(file) for file in pool.files]
    return KINDS[kinds.pop()] if len(kinds) == 1 and _equal(shapes) else ".jsonl"


def _columns(file: Any) -> Any:
    """What the columns of a table or of cells are; None for JSON, which has none."""
    if isinstance(file, Table):
        return file.table.schema
    return (file.columns, file.delimiter) if isinstance(file, Cells) else None


def _equal(shapes: Sequence[Any]) -> bool:
    first = shapes[0]
    return all(
        shape.equals(first) if isinstance(shape, pa.Schema) else shape == first for shape in shapes
    )


def write_subset(
    pool: Pool | _File,
    subset: Subset | Sequence[int] | np.ndarray,
    path: str | Path,
    *,
    add: Mapping[str, Sequence[Any]] | None = None,
) -> list[str]:
    """Writes the chosen rows to `path`, atomically, and returns what should be said about it (empty
    when the rows are as they were).

    The suffix of `path` decides: .jsonl and .json (with .gz or .zst after them: compressed) take
    the bytes of JSON rows as they stand in their files, .csv and .tsv those of rows of such files;
    .parquet and .arrow take rows of tables with their schema. Table rows and cells in a .jsonl, and
    array rows that span lines, are written as canonical JSON, which is said. Rows keep the order of
    the pool. add: extra columns, each with one value per pick, in pick order (as `Subset.gains`);
    text rows are then written anew.

    Raises UserError (an unknown suffix, JSON rows or cells into a table, a column that exists,
    `path` is a file of the pool), DiskFull, ResourceError.
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
    kind, packing = container(path)
    with _replacing(path, packing) as out:
        if kind in ("parquet", "arrow"):
            _write_table(pool, rows, columns, out, kind, path)
            return []
        if kind in ("csv", "tsv"):
            _write_cells(pool, rows, columns, out, kind, path)
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
        counted(
            anew,
            "row that is no line of JSON in its file is",
            "rows that are no line of JSON in their file are",
        )
        + " written anew as one line"
        f" each{mixed}"
    ]


class _File:
    """All rows of one file, as `write_subset` takes those of a pool."""

    def __init__(self, path: Path) -> None:
        # rows of any length have passed already
        file = open_source(str(path), max_row_bytes=1 << 40, max_expansion=EXPANSION)
        self.files, self.names = [file], [str(path)]
        self._places = [(place.start, place.end) for place in file.rows()]

    def __len__(self) -> int:
        return len(self._places)

    def source(self, row: int) -> tuple[Text | Table, int, int]:
        return self.files[0], *self._places[row]

    def raw(self, row: int) -> bytes:
        data = self.files[0].read(*self._places[row])
        return data if isinstance(data, bytes) else canonical(data)

    def record(self, row: int) -> dict[str, Any]:
        file, place = self.files[0], self._places[row]
        return file.parse(file.read(*place)) if isinstance(file, Text) else file.read(*place)


def rewrite(source: Path, path: Path) -> None:
    """Writes all rows of the file `source` to `path`, in the container that its suffix names.

    Raises as `write_subset`.
    """
    rows = _File(source)
    write_subset(rows, range(len(rows)), path)


def write_dropped(pool: Pool, path: str | Path, also: Sequence[Dropped] = ()) -> None:
    """The quarantine, and rows a selection left out besides, as jsonl: file, line, id, reason,
    fix.
    """
    with _replacing(Path(path), container(path)[1]) as out:
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
    pool: Pool | _File,
    rows: np.ndarray,
    columns: Mapping[str, list[Any]],
    out: IO[bytes],
    kind: str,
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
        elif isinstance(file, Table | Cells) or (kind == "lines" and b"\n" in data):
            data, anew = canonical(pool.record(row)), anew + 1
        if kind == "array":
            out.write(_between(previous, file, start) if i else _head(file))
        elif i:
            out.write(b"\n")
        out.write(data)
        previous = file
    if kind == "array":
        out.write(_tail(previous) if previous else b"[]\n")
    elif previous and (isinstance(previous, Cells) or not _unended(previous, end)):
        out.write(b"\n")
    return anew


def _write_cells(
    pool: Pool | _File,
    rows: np.ndarray,
    columns: Mapping[str, list[Any]],
    out: IO[bytes],
    kind: str,
    path: Path,
) -> None:
    """The line of names and the lines of the rows as they stand, with further cells at their
    end.
    """
    files = [file for file in pool.files if isinstance(file, Cells) and file.kind == kind]
    if len(files) < len(pool.files):
        raise UserError(
            f"its suffix names no container for other rows than .{kind} ones: types would change",
            where=path,
            remedy="Write .jsonl instead.",
        )
    if not _equal([_columns(file) for file in files]):
        raise UserError(
            "the pool's files have different columns", where=path, remedy="Write .jsonl instead."
        )
    first = files[0]
    for name in columns:
        _refuse_taken(name, first.columns)
    ending = b"\r\n" if first.read(first.begin, first.first).endswith(b"\r\n") else b"\n"
    head = first.read(0, first.first).rstrip(b"\r\n")
    out.write(head + _more(first.delimiter, list(columns)) + ending)
    end, file = 0, None
    for i, row in enumerate(rows.tolist()):
        file, _, end = pool.source(row)
        if i:
            out.write(ending)
        out.write(
            pool.raw(row) + _more(first.delimiter, [column[i] for column in columns.values()])
        )
    if file is not None and not _unended(file, end):
        out.write(ending)


def _more(delimiter: str, cells: Sequence[Any]) -> bytes:
    """Cells to be added to a line."""
    if not cells:
        return b""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="").writerow(cells)
    return (delimiter + text.getvalue()).encode()


def _unended(file: Any, end: int) -> bool:
    """Whether a row that ends there is the last line of a file that does not end in a newline: then
    neither does the subset.
    """
    return isinstance(file, Text) and file.kind != "array" and end == file.size


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
    pool: Pool | _File,
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
