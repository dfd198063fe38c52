"""What holds for any target, whichever method reads it: each of its groups has a row that can be used.

A group without one would vanish: methods see groups only through their rows, and would choose as if it had never been asked for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradsift.data.encode import EncodedRows
from gradsift.data.pool import Pool
from gradsift.errors import DataError


def check_encoded(target: Pool, encoded: EncodedRows) -> None:
    """Raises DataError, naming file and reason, for a file or a group of the target without a row that could be read and encoded."""
    for name in target.empty_files():
        dropped = next((row for row in target.dropped if row.file == name), None)
        if dropped is not None:
            raise DataError(f"no row of this target file can be used; the first: {dropped}", where=name, remedy=dropped.fix)
        raise DataError(
            "no row of this target file is used", where=name, remedy="Leave the file out, or look at it with `gradsift inspect`."
        )
    check_groups(target, torch.as_tensor(encoded.codes == 0), encoded)


def check_groups(target: Pool, usable: Tensor, encoded: EncodedRows, what: str = "gradient") -> None:
    """Raises DataError for a group of the target none of whose rows is among the `usable` [m]: it names the group, its first row's file and
    line, why that row cannot be used, and what to do. `what`: that of a row which was encoded and is not usable all the same."""
    groups = np.asarray(target.groups, dtype=object)
    named = dict.fromkeys(target.groups)
    filled = set(groups[usable.numpy()])
    empty = [name for name in named if name not in filled]
    if not empty:
        return
    rows = np.flatnonzero(groups == empty[0])
    first = int(rows[0])
    code = int(encoded.codes[first])
    reason, remedy = (
        encoded.reasons[code].split(". ", 1) if code else (f"its {what} is zero or not finite", "Look at it with `gradsift inspect`.")
    )
    others = f" (nor of {', '.join(map(repr, empty[1:]))})" if len(empty) > 1 else ""
    raise DataError(
        f"no row of the target group {empty[0]!r}{others} can be used; the first of {len(rows):,}: {encoded.details.get(first, reason)}",
        where=target.place(first),
        remedy=f"{remedy} Or leave the group out of the target.",
    )
