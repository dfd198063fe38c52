"""Switches on a turn that say whether a training learns it, in the spellings of the trainers."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from gradsift.data.marks.words import TRUTH

# True, or a number other than 0: the turn is learned.
SWITCHES = frozenset(
    (
        "weight",
        "train",
        "loss",
        "loss_weight",
        "loss_mask",
        "loss_scale",
        "trainable",
        "training",
    )
)
# The same the other way round: True, or a number other than 0: the turn is not learned.
REVERSED = frozenset({"mask_loss"})
# Words of a key that may be a switch that nobody has told us of.
_LIKELY = re.compile(
    r"(?:^|_)(?:finetune|grad|gradient|ignored?|label|learn|learnable|learned|loss|mask(?:ed)?|skip"
    r"|supervised?|supervision|train|trainable|trained|training|unlearn|weights?)(?:_|$)"
)


class Unreadable(ValueError):
    """A switch whose value is neither a number nor true or false."""


@functools.cache
def spelled(key: str) -> str:
    """A key in small letters with underscores: `lossWeight` and `Loss-Weight` are `loss_weight`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[-\s]", "_", key.strip()).lower().replace("__", "_")


def is_switch(key: str) -> bool:
    """Whether a key is read as a switch, under whichever spelling."""
    return spelled(key) in SWITCHES or spelled(key) in REVERSED


def learned(extra: Mapping[str, Any]) -> bool:
    """Whether no switch among the further fields of an assistant turn says that it is not learned.

    Raises:
        Unreadable: a switch has a value that says neither.
    """
    for key, value in extra.items():
        if is_switch(key):
            on = _number(key, value)
            if on is not None and bool(on) is (spelled(key) in REVERSED):
                return False
    return True


def _number(key: str, value: Any) -> float | None:
    """The value of a switch; None where the turn does not say."""
    if isinstance(value, str):
        word = value.strip().lower()
        if not word:
            return None
        value = TRUTH.get(word, word)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise Unreadable(
            f"its {key!r} is {str(value)[:40]!r}, which is neither a number nor true or false"
        ) from None
    if number < 0:
        raise Unreadable(f"its {key!r} is {value}: a turn cannot be unlearned")
    # what tables have for a missing number
    return None if math.isnan(number) else number


def remarks(extra: Mapping[str, Any]) -> list[str]:
    """What should be said of the further fields of an assistant turn: switches that are read in
    another way than their owner may think, and keys that look like switches and are not read.
    """
    found = []
    for key, value in extra.items():
        name = spelled(key)
        if name in REVERSED:
            found.append(f"{key!r} in an assistant turn, read as: true = the turn is not learned")
        elif name in SWITCHES:
            number = _number(key, value)
            if number is not None and number not in (0, 1):
                found.append(
                    f"{key!r} other than 0 and 1 in an assistant turn, read as 1: turns are learned"
                    " in full or not at all"
                )
        elif _LIKELY.search(name):
            known = ", ".join(sorted(SWITCHES))
            found.append(
                f"{key!r} in an assistant turn, which is not read; if it says what is learned, use"
                f" one of: {known}"
            )
    return found
