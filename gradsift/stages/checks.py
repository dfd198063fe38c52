"""Stores of gradient rows: what share may be unusable, the weighted mean over checkpoints, the mean
cosine, some of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradsift.data.encode import EncodedRows
from gradsift.data.pool import Pool
from gradsift.errors import DataError
from gradsift.store.artifact import Artifact
from gradsift.store.packing import OUT_OF_MEMORY, QUARANTINE
from gradsift.store.rows import RowStore
from gradsift.types import counted

# share of the encoded rows whose gradient may be unusable before a stage stops
MOST_QUARANTINED = 0.05


def check_quarantine(store: RowStore, encoded: EncodedRows, what: str = "gradient") -> None:
    """Raises DataError when more than 5 % of the encoded rows have no usable gradient (or `what`
    else the store holds).

    That many are a sign that model or data are wrong.
    """
    _check(int(store.usable.sum()), encoded, what, store.quarantined(), store.path)


def check_values(
    finite: Tensor, encoded: EncodedRows, what: str, failed: Mapping[str, int], artifact: Artifact
) -> None:
    """The same for numbers that are not `finite` [n] where a row has none; `failed`: those of them
    whose reason is known.
    """
    fine = int((finite & torch.as_tensor(encoded.codes == 0)).sum())
    rest = int((encoded.codes == 0).sum()) - fine - sum(failed.values())
    _check(fine, encoded, what, {**failed, **({"not finite": rest} if rest else {})}, artifact.path)


def _check(
    usable: int, encoded: EncodedRows, what: str, reasons: Mapping[str, int], where: Path
) -> None:
    expected = int((encoded.codes == 0).sum())
    if expected - usable > max(1, MOST_QUARANTINED * expected):
        told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        remedy = (
            "Look at the model's dtype (bfloat16 or float32 instead of float16), the learning rate"
            " of the warm-up, and the rows."
        )
        if reasons.get(QUARANTINE[OUT_OF_MEMORY]):
            remedy = (
                "Encode with a smaller max_length, or use a machine with more memory. " + remedy
            )
        raise DataError(
            f"{expected - usable:,} of {counted(expected, 'row has', 'rows have')} no usable"
            f" {what} ({told})",
            where=where,
            remedy=remedy,
        )


def check_vocabulary(side: Pool, encoded: EncodedRows, tokens: int | None) -> None:
    """Raises DataError, naming the row, for an id that is none of the `tokens` that the model
    embeds (None = not known): a tokenizer with tokens that the model never got.
    """
    found = None if tokens is None else encoded.first_over(tokens)
    if found is not None:
        row, number = found
        raise DataError(
            f"has the token id {number:,}, and the model embeds {tokens:,} tokens: the tokenizer"
            " beside it has more",
            where=side.place(row),
            remedy=(
                "Give the tokenizer that the model was trained with, or save the model after"
                " model.resize_token_embeddings(len(tokenizer))."
            ),
        )


def check_encoded(target: Pool, encoded: EncodedRows) -> None:
    """Raises DataError, naming file and reason, for a file or a group of the target without a row
    that could be read and encoded.
    """
    for name in target.empty_files():
        dropped = next((row for row in target.dropped if row.file == name), None)
        if dropped is not None:
            raise DataError(
                f"no row of this target file can be used; the first: {dropped}",
                where=name,
                remedy=dropped.fix,
            )
        raise DataError(
            "no row of this target file is used",
            where=name,
            remedy="Leave the file out, or look at it with `gradsift inspect`.",
        )
    check_groups(target, torch.as_tensor(encoded.codes == 0), encoded)


def check_groups(
    target: Pool, usable: Tensor, encoded: EncodedRows, what: str = "gradient"
) -> None:
    """Raises DataError for a group of the target none of whose rows is among the `usable` [m]: it
    names the group, its first row's file and line, why that row cannot be used, and what to do.
    `what`: that of a row which was encoded and is not usable all the same.
    """
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
        encoded.reasons[code].split(". ", 1)
        if code
        else (f"its {what} is zero or not finite", "Look at it with `gradsift inspect`.")
    )
    others = f" (nor of {', '.join(map(repr, empty[1:]))})" if len(empty) > 1 else ""
    raise DataError(
        f"no row of the target group {empty[0]!r}{others} can be used; the first of {len(rows):,}:"
        f" {encoded.details.get(first, reason)}",
        where=target.place(first),
        remedy=f"{remedy} Or leave the group out of the target.",
    )
