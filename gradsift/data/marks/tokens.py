"""Rows that arrive tokenised: which of their tokens are real, and which are learned."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gradsift.data.marks.loss import spelled
from gradsift.types import IGNORE

# 1 where a token is learned. Each stands at the token itself, not one before it.
MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "response_mask")
# Words of a key that may say what is learned.
_LIKELY = re.compile(r"(?:^|_)(?:masks?|weights?|loss)(?:_|$)")
# Where the documents of a packed row begin or end, or how long each is.
_BOUNDARIES = ("seq_lens", "seq_lengths", "seq_idx", "sequence_lengths", "cu_seqlens")
_DOCUMENTS = ("document_ids", "segment_ids", "seq_idx", "sequence_ids")


class Unusable(ValueError):
    """A row of tokens that cannot be used; `code` is a key of `formats.FAULTS`."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Packed(Unusable):
    """A row that holds several documents."""

    def __init__(self, text: str) -> None:
        super().__init__("packed", text)


def masks(record: Mapping[str, Any]) -> list[str]:
    """The fields of a row that say which tokens are learned."""
    return [name for name in MASKS if record.get(name) is not None]


def remarks(record: Mapping[str, Any], named: Collection[str] = ()) -> list[str]:
    """What should be said of a row of tokens: lists that may say what is learned and are not read.

    Args:
        record: the row.
        named: fields that a mapping names.
    """
    known = ", ".join(MASKS)
    return [
        f"{key!r} beside input_ids, which is not read; if it says what is learned, use one of:"
        f" labels, {known}"
        for key, value in record.items()
        if isinstance(value, list)
        and key not in (*MASKS, *named, "attention_mask")
        and _LIKELY.search(spelled(key))
    ]


def read(
    ids: Sequence[Any],
    labels: Sequence[Any] | None,
    attention: Any,
    record: Mapping[str, Any],
) -> tuple[list[int], list[int]]:
    """The tokens of a row and what is learned of them, without padding.

    Args:
        ids: [n].
        labels: [n], -100 = not learned; None where masks alone say what is learned.
        attention: [n], 1 = a token, 0 = padding, which may stand at both ends; None = no padding.
        record: the whole row, for the masks and for what tells a packed row.

    Raises:
        Unusable: the lists do not fit each other or are no tokens, padding stands in the middle,
            nothing is learned.
        Packed: the row holds several documents.
    """
    _check_numbers("input_ids", ids, 0)
    if labels is None:
        labels = list(ids)
    else:
        if any(type(label) is int and -1 >= label != IGNORE for label in labels):
            raise Unusable(
                "wrong-type",
                f"the labels hold {next(x for x in labels if type(x) is int and -1 >= x != IGNORE)}"
                f"; a token that is not learned has the label {IGNORE}",
            )
        _check_numbers("labels", labels, IGNORE)
    _check_length("labels", labels, ids)
    labels = _masked(ids, list(labels), record)
    start, end = _real(ids, attention)
    _refuse_packed(record, start, end, len(ids))
    kept, learned = list(ids[start:end]), labels[start:end]
    if not any(label != IGNORE for label in learned[1:]):
        raise Unusable("no-answer", "no label after the first token is supervised")
    _refuse_shifted(kept, learned)
    return kept, learned


def _check_numbers(name: str, values: Sequence[Any], least: int) -> None:
    if not all(type(value) is int and (value >= 0 or value == least) for value in values):
        raise Unusable("wrong-type", f"the field {name!r} is not a list of token ids")


def _check_length(name: str, values: Sequence[Any], ids: Sequence[Any]) -> None:
    if len(values) != len(ids):
        raise Unusable("wrong-type", f"{len(ids)} input_ids but {len(values)} {name}")


def _masked(ids: Sequence[Any], labels: list[Any], record: Mapping[str, Any]) -> list[int]:
    """The labels, without the tokens that a mask of the row leaves out."""
    for name in masks(record):
        mask = record[name]
        if not isinstance(mask, list) or not all(value in (0, 1) for value in mask):
            raise Unusable("wrong-type", f"the field {name!r} is not a list of 0 and 1")
        _check_length(name, mask, ids)
        labels = [label if on else IGNORE for label, on in zip(labels, mask, strict=True)]
    return labels


def _real(ids: Sequence[Any], attention: Any) -> tuple[int, int]:
    """Begin and end of the tokens between the padding."""
    if attention is None:
        return 0, len(ids)
    if not isinstance(attention, list) or not all(
        isinstance(value, (bool, int)) and value >= 0 for value in attention
    ):
        raise Unusable("wrong-type", "the field 'attention_mask' is not a list of whole numbers")
    _check_length("values of the attention_mask", attention, ids)
    real = [k for k, value in enumerate(attention) if value]
    if not real:
        raise Unusable("no-answer", "the attention_mask leaves out every token")
    start, end = real[0], real[-1] + 1
    if len(real) < end - start:
        hole = next(k for k in range(start, end) if not attention[k])
        raise Unusable(
            "wrong-type", f"the attention_mask leaves out token {hole + 1} between others"
        )
    if len(documents := set(attention[start:end])) > 1:
        raise Packed(f"the attention_mask counts {len(documents)} documents in the row")
    return start, end


def _refuse_packed(record: Mapping[str, Any], start: int, end: int, n: int) -> None:
    """Raises Packed where positions start again or documents are counted; Unusable for positions
    that are not one after the other: the model would be given others.
    """
    positions = record.get("position_ids")
    if positions is not None:
        if not isinstance(positions, list) or len(positions) != n:
            raise Unusable("wrong-type", f"the field 'position_ids' has not one number for {n} ids")
        for k in range(start + 1, end):
            if not isinstance(positions[k], int) or positions[k] != positions[k - 1] + 1:
                if positions[k] == 0 or positions[k] == positions[start]:
                    raise Packed(f"the position_ids start again at token {k + 1}")
                raise Unusable("wrong-type", "the position_ids do not count the tokens one by one")
    for name in _DOCUMENTS:
        found = record.get(name)
        if isinstance(found, list) and len(found) == n and len(set(found[start:end])) > 1:
            raise Packed(f"{name} names {len(set(found[start:end]))} documents in the row")
    for name in _BOUNDARIES:
        found = record.get(name)
        if isinstance(found, list) and len(found) != n:
            lengths = [number for number in found if number]
            if len(lengths) > 1:
                raise Packed(f"{name} names {len(lengths)} documents in the row")


def _refuse_shifted(ids: Sequence[int], labels: Sequence[int]) -> None:
    """Raises Unusable for labels that stand one token too early: the loss shifts them itself."""
    learned = [k for k, label in enumerate(labels[:-1]) if label != IGNORE]
    if any(labels[k] != ids[k] for k in learned) and all(labels[k] == ids[k + 1] for k in learned):
        raise Unusable(
            "wrong-type",
            "the labels are shifted by one token: each must stand at its own token, for the loss"
            " shifts them",
        )
