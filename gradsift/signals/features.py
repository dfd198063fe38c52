"""Features that stand in the pool's own rows: numbers and lists of numbers, as the rows of a
matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.data.pool import Pool
from gradsift.errors import DataError

_REMEDY = (
    "Give every row a number (or a list of as many numbers as elsewhere) in that field, or leave"
    " the field out of features=."
)


def features(pool: Pool, fields: Sequence[str]) -> Tensor:
    """fp32 [n, d]: the fields of every pool row side by side, in the order given.

    A field of numbers becomes one column, brought to mean 0 and standard deviation 1 over the pool,
    so that no unit of measurement outweighs another. A field of lists becomes as many columns as
    they have numbers, each list brought to length 1 (a list of zeros stays): an embedding's
    directions mean something as they are. Rows are read one at a time.

    Raises DataError naming file and line for a row without the field, with something else in it, or
    with a list of another length than the first row's, and for a number that is the same in all
    rows.
    """
    widths = [_width(pool.record(0), name, pool.place(0)) for name in fields]
    starts = np.cumsum([0, *[width or 1 for width in widths]])
    found = np.empty((len(pool), int(starts[-1])), dtype=np.float32)
    for i in range(len(pool)):
        record, place = pool.record(i), pool.place(i)
        for name, width, start in zip(fields, widths, starts.tolist(), strict=False):
            found[i, start : start + (width or 1)] = _numbers(record, name, width, place)
    for name, width, start in zip(fields, widths, starts.tolist(), strict=False):
        columns = found[:, start : start + (width or 1)]
        if width is None:
            _standardise(columns, name, pool)
        else:
            norms = np.linalg.norm(columns.astype(np.float64), axis=1, keepdims=True)
            columns /= np.where(norms > 0, norms, 1)
    return torch.from_numpy(found)


def _width(record: Mapping[str, Any], name: str, place: str) -> int | None:
    """How many numbers the field's lists hold; None where it is a number."""
    value = record.get(name)
    if isinstance(value, (list, tuple)):
        if not value:
            raise DataError(f"the field {name!r} is an empty list", where=place, remedy=_REMEDY)
        return len(value)
    return None


def _numbers(record: Mapping[str, Any], name: str, width: int | None, place: str) -> list[float]:
    if record.get(name) is None:
        raise DataError(f"has no field {name!r}", where=place, remedy=_REMEDY)
    value = record[name]
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, (list, tuple)) != (width is not None) or (
        width is not None and len(values) != width
    ):
        first = "a number" if width is None else f"a list of {width}"
        here = f"a list of {len(values)}" if isinstance(value, (list, tuple)) else f"{value!r}"[:60]
        raise DataError(
            f"the field {name!r} is {here}, and {first} in the first row",
            where=place,
            remedy=_REMEDY,
        )
    for item in values:
        if isinstance(item, bool) or not isinstance(item, (int, float)) or not math.isfinite(item):
            raise DataError(
                f"the field {name!r} holds {item!r}"[:120] + ", which is not a finite number",
                where=place,
                remedy=_REMEDY,
            )
    return values


def _standardise(column: np.ndarray, name: str, pool: Pool) -> None:
    """To mean 0 and standard deviation 1 [n, 1], in place."""
    wide = column.astype(np.float64)
    deviation = wide.std()
    if not deviation > 1e-12 * np.abs(wide).max():
        raise DataError(
            f"the field {name!r} is {wide[0, 0]:g} in every row and tells none apart",
            where=pool.names[0],
            remedy=_REMEDY,
        )
    column[:] = (wide - wide.mean()) / deviation
