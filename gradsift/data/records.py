"""Records of the readers: where a row stands, why one was dropped, and its text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from gradsift.types import Example


def text_of(example: Example) -> str:
    return "\n".join(message.content for message in example.messages)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not used. line: see `containers.Place`; reason: "code: what was found"; fix:
    what to do about it.
    """

    file: str
    line: int
    id: str | None
    reason: str
    fix: str

    @property
    def code(self) -> str:
        return self.reason.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass
class Columns:
    """What is kept of n rows. file, line, start, end: ints [n]; row_hash, content_hash: uint8 [n,
    16].
    """

    ids: list[str]
    groups: list[str]
    file: np.ndarray
    line: np.ndarray
    start: np.ndarray
    end: np.ndarray
    row_hash: np.ndarray
    content_hash: np.ndarray

    def take(self, rows: np.ndarray) -> Columns:
        ids, groups = [self.ids[i] for i in rows], [self.groups[i] for i in rows]
        arrays = (self.file, self.line, self.start, self.end, self.row_hash, self.content_hash)
        return Columns(ids, groups, *[array[rows] for array in arrays])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row was found. line: 1-based line of a jsonl file, else 1-based number of the row.
    [start, end): bytes, or a table row.

    fault: (code, text) when no row can be read there.
    """

    line: int
    start: int
    end: int
    data: Any = None  # bytes of a Text row, record of a Table row
    fault: tuple[str, str] | None = None


def canonical(record: Any) -> bytes:
    """One line of JSON for a record; values JSON has no word for are written as text, NaN and
    infinities as null.
    """
    try:
        return json.dumps(
            record, ensure_ascii=False, separators=(", ", ": "), default=_plain, allow_nan=False
        ).encode()
    except ValueError:
        return canonical(finite_numbers(record))


def finite_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, (bytes, bytearray)) else str(value)
