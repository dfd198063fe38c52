"""Reading sources row by row: what each row says, its id, group and hashes, and the quarantine of
those that cannot be used.
"""

from __future__ import annotations

import functools
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from gradsift.data.chat import reasoning
from gradsift.data.files import Text
from gradsift.data.formats import (
    FAULTS,
    Content,
    Fields,
    RowFault,
    check_strings,
    convert,
    stands,
)
from gradsift.data.marks import loss, tokens
from gradsift.data.marks.preference import graded
from gradsift.data.records import Columns, Dropped, Place, canonical
from gradsift.data.sources import VOTERS, settled
from gradsift.errors import TooManyBadRows
from gradsift.types import counted

if TYPE_CHECKING:
    from gradsift.data.tables import Table

NO_GROUP = "?"


class Progress(Protocol):
    def start(self, total: int, unit: str, label: str, /) -> Any: ...
    def advance(self, amount: int, /) -> Any: ...
    def done(self) -> Any: ...


def _content_hash(content: Content) -> bytes:
    parts: list[Any] = [
        part for message in content.messages for part in (message.role, message.content)
    ]
    extras = [dict(message.extra) if message.extra else None for message in content.messages]
    if content.tools or content.tokens or any(extras):
        parts.append(
            json.dumps([extras, content.tools, content.tokens], sort_keys=True, default=str)
        )
    # no text holds NUL: such rows are quarantined
    return xxhash.xxh3_128_digest("\0".join(parts).encode())


@dataclass
class Reader:
    """Reads sources one by one into columns, quarantine and counts."""

    group_field: str | None
    id_field: str
    progress: Progress | None
    ids: list[str] = field(default_factory=list)
    named: list[bool] = field(default_factory=list)  # whether the id stood in the row
    groups: list[str] = field(default_factory=list)
    # file, line, start, end of each row
    places: array[int] = field(default_factory=lambda: array("q"))
    row_hash: bytearray = field(default_factory=bytearray)
    content_hash: bytearray = field(default_factory=bytearray)
    dropped: list[Dropped] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    # of each file
    formats: list[str] = field(default_factory=list)
    fields: list[Fields] = field(default_factory=list)
    # fields that a mapping names -> ours, until a row has them; names of the first rows
    unseen: dict[str, str] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)

    def read(
        self,
        file: Text | Table,
        group: str,
        format: str = "auto",
        mapping: Mapping[str, str] | None = None,
        inherited: Collection[str] = (),
    ) -> None:
        """All rows of one file. `format`, `mapping`, `inherited`: see `formats.settle`.

        Raises DataError when no row of it fits a format.
        """
        if self.progress:
            self.progress.start(
                len(file), "bytes" if isinstance(file, Text) else "rows", f"reading {file.name}"
            )
        before, at = self.counts["read"], 0
        rows = self._parsed(file)
        head = list(itertools.islice(rows, VOTERS))
        records = [record for _, record in head if isinstance(record, dict)]
        format, fields = settled(file.name, records, format, mapping, inherited)
        number = len(self.formats)
        self.formats.append(format)
        self.fields.append(fields)
        self.seen.update(key for record in records for key in record)
        for theirs in [theirs for theirs in self.unseen if stands(theirs, records)]:
            del self.unseen[theirs]
        for source in (head, rows):
            for place, record in source:
                self._add(file, number, place, record, group)
                if self.progress and not self.counts["read"] % VOTERS:
                    self.progress.advance(place.end - at)
                    at = place.end
        self.counts["blank"] += file.blank
        if file.cut and not (
            self.dropped
            and self.dropped[-1].file == file.name
            and self.dropped[-1].code == "cut-file"
        ):
            last = self.places[-3] if self.counts["read"] > before and self.places else 0
            self.dropped.append(
                Dropped(file.name, last + 1, None, f"cut-file: {file.cut}", FAULTS["cut-file"])
            )
        if self.progress:
            self.progress.advance(len(file) - at)
            self.progress.done()

    def _parsed(self, file: Text | Table) -> Iterator[tuple[Place, dict[str, Any] | RowFault]]:
        for place in file.rows():
            if place.fault:
                yield place, RowFault(*place.fault)
                continue
            try:
                if isinstance(file, Text):
                    yield place, file.parse(place.data)
                else:
                    check_strings(place.data)
                    yield place, place.data
            except RowFault as fault:
                yield place, fault

    def _add(self, file: Text | Table, number: int, place: Place, record: Any, group: str) -> None:
        self.counts["read"] += 1
        id = None
        try:
            if isinstance(record, RowFault):
                raise record
            id = self._id(record)
            content = convert(record, self.formats[number], self.fields[number])
        except RowFault as fault:
            self.counts[f"quarantined:{fault.code}"] += 1
            self.dropped.append(Dropped(file.name, place.line, id, str(fault), fault.fix))
            if len(self.dropped) > 10_000 and len(self.dropped) > 0.5 * self.counts["read"]:
                raise too_many(
                    self.dropped, self.counts["read"], "most rows are bad; reading stopped"
                ) from None
            return
        self._remark(record, content, self.fields[number])
        data = place.data if isinstance(file, Text) else canonical(record)
        row_hash = xxhash.xxh3_128_digest(data.rstrip(b"\r"))
        self.ids.append(row_hash.hex() if id is None else id)
        self.named.append(id is not None)
        self.groups.append(group if self.group_field is None else self._group(record))
        self.places.extend((number, place.line, place.start, place.end))
        self.row_hash += row_hash
        self.content_hash += _content_hash(content)

    def _remark(self, record: dict[str, Any], content: Content, fields: Fields) -> None:
        """Counts what should be said of a row that is used."""
        if self.unseen:
            for theirs in [theirs for theirs in self.unseen if theirs in record]:
                del self.unseen[theirs]
        found = {
            said
            for message in content.messages
            if message.extra and message.role == "assistant"
            for said in (*loss.remarks(message.extra), *reasoning.remarks(message.extra))
        }
        if said := graded(record):
            found.add(said)
        if content.tokens:
            found.update(tokens.remarks(record, fields.named))
        for said in found:
            self.counts[f"remark:{said}"] += 1

    def _id(self, record: Mapping[str, Any]) -> str | None:
        value = record.get(self.id_field)
        if isinstance(value, str) and value:
            return value
        if type(value) is int:
            self.counts["id:int"] += 1
            return str(value)
        if value is not None and value != "":
            self.counts["id:other"] += 1
        return None

    def _group(self, record: Mapping[str, Any]) -> str:
        value = record.get(self.group_field or "")
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            return self._names.setdefault(str(value), str(value))
        self.counts["group:none"] += 1
        return NO_GROUP

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        return {}  # one string object a group, not one a row

    def columns(self) -> Columns:
        file, line, start, end = np.ascontiguousarray(
            np.array(self.places, dtype=np.int64).reshape(-1, 4).T
        )
        hashes = [
            np.frombuffer(bytes(data), dtype=np.uint8).reshape(-1, 16)
            for data in (self.row_hash, self.content_hash)
        ]
        return Columns(self.ids, self.groups, file.astype(np.int32), line, start, end, *hashes)


def too_many(dropped: list[Dropped], read: int, why: str) -> TooManyBadRows:
    shown = "; ".join(str(row) for row in dropped[:3])
    fixes = " ".join(dict.fromkeys(row.fix for row in dropped[:3]))
    what = (
        f"{len(dropped):,} of {counted(read, 'row')} cannot be used ({why}):"
        f" {shown}{'; ...' if len(dropped) > 3 else ''}"
    )
    return TooManyBadRows(what, remedy=f"{fixes} Or raise max_bad_rows.")


def unique_ids(ids: list[str], named: list[bool]) -> int:
    """Tells rows with one id apart by "#2", "#3", ... in file order, in place; an id that stands in
    a row is never given to another.

    Returns how many ids that stood in rows were changed.
    """
    counts: dict[str, int] = {}
    taken: set[str] = set()
    changed = 0
    twice = [row for row, id in enumerate(ids) if id in taken or taken.add(id)]
    for row in twice:
        id = ids[row]
        number = counts.get(id, 1) + 1
        while f"{id}#{number}" in taken:
            number += 1
        counts[id] = number
        ids[row] = f"{id}#{number}"
        taken.add(ids[row])
        changed += named[row]
    return changed
