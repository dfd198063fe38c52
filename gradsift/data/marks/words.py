"""Short texts that say yes, no or nothing: in tables of texts every flag and every gap is one."""

from __future__ import annotations

import re
from typing import Any

TRUTH = {
    **dict.fromkeys(("true", "yes", "on", "t", "y"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n"), False),
}
_NOTHING = {"", "none", "n/a", "na", "nan", "null", "nil", "-", "[]", "{}", "[null]", "<na>"}
# a count, a mark or a share; longer ones may be names of things
_NUMBER = re.compile(r"[-+]?\d{1,3}(?:\.\d*)?|[-+]?0?\.\d+")


def is_nothing(value: Any) -> bool:
    """Whether a text says that there is nothing, in the words of tables."""
    return isinstance(value, str) and value.strip().lower() in _NOTHING


def is_flag(value: Any) -> bool:
    """Whether a text is yes, no or a short number."""
    if not isinstance(value, str):
        return False
    word = value.strip().lower()
    return word in TRUTH or _NUMBER.fullmatch(word) is not None
