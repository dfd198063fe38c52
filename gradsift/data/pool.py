"""Pools and target sets: rows read from any container and format, with stable ids; what cannot be
used is quarantined by file and line.

A pool keeps offsets, ids, groups and hashes, and reads a row again when it is asked for.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, overload

import numpy as np
import xxhash

from gradsift.data.files import Text, open_source
from gradsift.data.formats import Fields, convert
from gradsift.data.limits import EXPANSION, MAX_ROW_BYTES
from gradsift.data.reader import NO_GROUP, Progress, Reader, too_many, unique_ids
from gradsift.data.records import Columns, Dropped, canonical
from gradsift.data.remote import is_url
from gradsift.data.sources import absent, check_names, choice, expanded
from gradsift.errors import DataError
from gradsift.redaction import redacted
from gradsift.types import Example, counted

if TYPE_CHECKING:
    from gradsift.data.tables import Table


class Pool(Sequence[Example]):
    """Usable rows in file order, read lazily. Made by `read_pool`; also what a target set is: a
    role, not a type.

    ids, groups: lists of n. funnel: counts (read, blank, quarantined:CODE..., duplicates, usable).
    dropped: the quarantine. formats: file -> format. warnings: one-line texts for people.
    arguments: keywords with which `read_pool` reads the same sources again.
    """

    def __init__(
        self,
        columns: Columns,
        files: list[Text | Table],
        names: list[str],
        formats: list[str],
        fields: list[Fields],
    ) -> None:
        self.files, self.names = files, names
        self._columns, self._formats, self._fields = columns, formats, fields
        self.ids: list[str] = columns.ids
        self.groups: list[str] = columns.groups
        self.funnel: dict[str, int] = {"read": len(columns.ids), "usable": len(columns.ids)}
        self.dropped: list[Dropped] = []
        self.warnings: list[str] = []
        self.arguments: dict[str, Any] = {}

    @property
    def formats(self) -> dict[str, str]:
        return dict(zip(self.names, self._formats, strict=True))

    def read_as(self) -> list[str]:
        """The format of every file, in a line each; of many files in one group, in one line."""
        lines: dict[str, None] = {}
        files = list(zip(self.names, self._formats, strict=True))
        beside = Counter((str(Path(name).parent), format) for name, format in files)
        for name, format in files:
            place = str(Path(name).parent), format
            many = beside[place] > 3
            lines[
                f"{place[0]} ({beside[place]} files): {format}" if many else f"{name}: {format}"
            ] = None
        return list(lines)

    @property
    def mappings(self) -> dict[str, dict[str, str]]:
        """File -> our field -> its own, where the names differ."""
        return {name: fields.mapping for name, fields in zip(self.names, self._fields, strict=True)}

    @functools.cached_property
    def digest(self) -> str:
        """xxh3-128 hex over formats, mappings, bytes, groups and ids of the rows, in order."""
        hasher = xxhash.xxh3_128(self._columns.row_hash.tobytes())
        kinds = [
            format + (json.dumps(fields.mapping, sort_keys=True) if fields.mapping else "")
            for format, fields in zip(self._formats, self._fields, strict=True)
        ]
        for i, (id, group) in enumerate(zip(self.ids, self.groups, strict=True)):
            kind = kinds[self._columns.file[i]]
            hasher.update(f"{len(id)}:{id}{len(group)}:{group}{kind}".encode())
        return hasher.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Pool: ...
    def __getitem__(self, index: int | slice) -> Example | Pool:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        row = range(len(self))[index]
        file = self._columns.file[row]
        content = convert(self.record(row), self._formats[file], self._fields[file])
        return Example(
            self.ids[row], content.messages, self.groups[row], content.tools, content.tokens
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[row] for row in range(len(self)))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a pool holds open files; send pool.arguments and read it there: read_pool(**arguments)"
        )

    def take(self, indices: Sequence[int] | np.ndarray) -> Pool:
        """The rows at `indices`, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        taken = Pool(self._columns.take(rows), self.files, self.names, self._formats, self._fields)
        taken.arguments = self.arguments
        taken.funnel = (
            {**self.funnel, "taken": len(rows)} if len(rows) != len(self) else dict(self.funnel)
        )
        taken.dropped, taken.warnings = self.dropped, self.warnings
        return taken

    def regrouped(self, indices: Sequence[int] | np.ndarray, groups: Sequence[str]) -> Pool:
        """The rows at `indices` in other `groups`, of the files that they are from alone: rows of a
        pool that stand in for a target.
        """
        columns = self._columns.take(np.asarray(indices, dtype=np.int64))
        used, columns.file = np.unique(columns.file, return_inverse=True)
        columns.groups = list(groups)
        kept = [int(i) for i in used]
        files, names = [self.files[i] for i in kept], [self.names[i] for i in kept]
        formats, fields = [self._formats[i] for i in kept], [self._fields[i] for i in kept]
        return Pool(columns, files, names, formats, fields)

    def source(self, row: int) -> tuple[Text | Table, int, int]:
        """(container, start, end): where row `row` lies."""
        columns = self._columns
        return self.files[columns.file[row]], int(columns.start[row]), int(columns.end[row])

    def raw(self, row: int) -> bytes:
        """The row's bytes as they stand in the file, without the newline; for a table row, its
        canonical JSON.
        """
        file, start, end = self.source(row)
        data = file.read(start, end)
        return data if isinstance(data, bytes) else canonical(data)

    def record(self, row: int) -> dict[str, Any]:
        """The row as a dict, all fields of the file."""
        file, start, end = self.source(row)
        if isinstance(file, Text):
            return file.parse(file.read(start, end))
        return file.read(start, end)

    def place(self, row: int) -> str:
        """file:line of the row."""
        return f"{self.names[self._columns.file[row]]}:{self._columns.line[row]}"

    def empty_files(self) -> list[str]:
        """Names of the files that no row is from."""
        filled = set(self._columns.file.tolist())
        return [name for number, name in enumerate(self.names) if number not in filled]

    def exact_duplicates(self) -> dict[int, int]:
        """Row -> the first row with the same messages and tools, for every row but the first of its
        kind.
        """
        keys = self._columns.content_hash.view(np.dtype((np.void, 16))).ravel()
        _, first, kind = np.unique(keys, return_index=True, return_inverse=True)
        return {row: int(first[k]) for row, k in enumerate(kind.ravel()) if first[k] != row}


def read_pool(
    sources: Sequence[str | Path] | str | Path,
    *,
    format: str = "auto",
    group_field: str | None = None,
    id_field: str = "id",
    mapping: Mapping[str, str] | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    inherited: Collection[str] = (),
    max_bad_rows: float | int = 0.05,
    max_row_bytes: int = MAX_ROW_BYTES,
    max_expansion: float = EXPANSION,
    progress: Progress | None = None,
) -> Pool:
    """Reads rows from files, folders and patterns `[NAME=]FILE`, or from
    `hf:NAME[:CONFIG][@REVISION]` with a split in brackets; docs/formats.md lists formats,
    containers and codes.

    format: a key of FORMATS, or "auto": each file's first 1,000 rows vote. mapping: our field ("id"
    and "group" too) -> their field; what names a field that a file has not is meant for the other
    files. files: NAME -> the `format` and `mapping` of that source alone. inherited: those of
    "format", "mapping" and "files" that are meant for other pools too, and hold where they fit.
    group_field: the row's field that is its group (rows without it: "?"); else NAME, by default the
    file name without its suffixes. max_bad_rows: a share (float up to 1) or a count (int) of the
    rows read that may be unusable. max_row_bytes: longer rows are quarantined. max_expansion: how
    many times its size a compressed file of more than 1 GiB unpacked may grow to.

    Raises UserError (a missing or unreadable kind of file, an unknown format or field, a field that
    no row has), DataError (no usable row), TooManyBadRows, ResourceError (disk full, expansion over
    the limit).
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    named = expanded(sources)
    check_names(named, format, mapping, files, inherited)
    id_field, group_field = (
        (mapping or {}).get("id", id_field),
        (mapping or {}).get("group", group_field),
    )
    reader = Reader(group_field, id_field, progress)
    if "mapping" not in inherited:
        reader.unseen = {theirs: ours for ours, theirs in (mapping or {}).items()}
    opened, names = [], []
    for source in named:
        opened.append(
            open_source(source.file, max_row_bytes=max_row_bytes, max_expansion=max_expansion)
        )
        names.append(redacted(source.file) if is_url(source.file) else source.file)
        asked = choice(source.group, format, mapping, files)
        reader.read(opened[-1], source.group, *asked, inherited)
    _refuse_absent(reader)
    changed = unique_ids(reader.ids, reader.named)
    pool = Pool(reader.columns(), opened, names, reader.formats, reader.fields)
    pool.dropped = reader.dropped
    pool.arguments = dict(
        sources=[str(source) for source in sources],
        format=format,
        group_field=group_field,
        id_field=id_field,
        mapping=dict(mapping) if mapping else None,
        files={name: dict(own) for name, own in files.items()} if files else None,
        inherited=list(inherited),
        max_bad_rows=max_bad_rows,
        max_row_bytes=max_row_bytes,
        max_expansion=max_expansion,
    )
    _judge(pool, reader.counts, max_bad_rows)
    pool.funnel = _funnel(pool, reader.counts)
    pool.warnings = _warnings(pool, reader, changed)
    return pool


def _refuse_absent(reader: Reader) -> None:
    """Raises UserError for a field that was named, and that no row has."""
    if not reader.seen:
        return
    for theirs, ours in reader.unseen.items():
        raise absent(theirs, f"for {ours!r}", reader.seen)
    field = reader.group_field
    alone = reader.counts["group:none"] == len(reader.ids) > 0
    if field and alone and not reader.seen[field]:
        raise absent(field, "to group by", reader.seen)


def _judge(pool: Pool, counts: Counter[str], max_bad_rows: float | int) -> None:
    read, bad = (
        counts["read"],
        sum(count for key, count in counts.items() if key.startswith("quarantined:")),
    )
    share = isinstance(max_bad_rows, float) and max_bad_rows <= 1
    if bad > (max_bad_rows * read if share else max_bad_rows):
        raise too_many(
            pool.dropped,
            read,
            (
                f"over the limit of {max_bad_rows:.0%}"
                if share
                else f"over the limit of {max_bad_rows:g}"
            ),
        )
    if not len(pool):
        where = ", ".join(pool.names)
        if pool.dropped:
            raise DataError(
                f"no usable row: {pool.dropped[0]}", where=where, remedy=pool.dropped[0].fix
            )
        raise DataError("holds no rows", where=where, remedy="Name a file with rows in it.")


def _funnel(pool: Pool, counts: Counter[str]) -> dict[str, int]:
    quarantined = {
        key: count for key, count in sorted(counts.items()) if key.startswith("quarantined:")
    }
    twice = len(pool.exact_duplicates())
    return {
        "read": counts["read"],
        "blank": counts["blank"],
        **quarantined,
        "duplicates": twice,
        "usable": len(pool),
    }


def _warnings(pool: Pool, reader: Reader, changed: int) -> list[str]:
    counts, found = reader.counts, []
    if changed:
        found.append(
            counted(changed, "row shares its id", "rows share their id")
            + " with an earlier row and"
            + (" is" if changed == 1 else " are")
            + " told apart by #2, #3, ..."
        )
    if 0 < counts["id:int"] < sum(reader.named):
        found.append(
            f"ids are of mixed types: {counts['id:int']:,} are numbers, read as their decimal text"
        )
    if counts["id:other"]:
        found.append(
            f"{counted(counts['id:other'], 'row has', 'rows have')} an id that is neither a text"
            " nor a whole number; a"
            " hash of the row stands in"
        )
    found += [
        f"{count:,} {'row has' if count == 1 else 'rows have'} {key.partition(':')[2]}"
        for key, count in counts.items()
        if key.startswith("remark:")
    ]
    if counts["group:none"]:
        found.append(
            f"{counted(counts['group:none'], 'row has', 'rows have')} no field"
            f" {reader.group_field!r}; their group is"
            f" {NO_GROUP!r}"
        )
    found += [
        f"{file.name}: {file.cut}; the rows before are used" for file in pool.files if file.cut
    ]
    found += [f"{file}: no usable row" for file in pool.empty_files()]
    if len(set(reader.formats)) > 1:
        found.append(f"the files have different formats: {'; '.join(pool.read_as()[:8])}")
    return found
