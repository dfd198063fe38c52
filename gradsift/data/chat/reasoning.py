"""Further fields of an assistant turn that look like its reasoning and are not read as that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gradsift.data.chat.turns import REASONING
from gradsift.data.marks.loss import spelled

_LIKELY = re.compile(
    r"(?:^|_)(?:analysis|chain_of_thought|cot|rationale|reasoning|scratchpad|think|thinking"
    r"|thoughts?)(?:_(?:content|text|details))?$"
)


def remarks(extra: Mapping[str, Any]) -> list[str]:
    """What should be said of fields that a template is not likely to know: the answer would be
    learned without them. Nothing, where the reasoning stands in a field that is read.
    """
    if any(extra.get(key) for key in REASONING):
        return []
    return [
        f"{key!r} in an assistant turn, which only a template that knows it reads; if it is the"
        f" turn's reasoning, call it {REASONING[0]!r}"
        for key, value in extra.items()
        if key not in REASONING
        and isinstance(value, (str, list, dict))
        and (value.strip() if isinstance(value, str) else value)
        and _LIKELY.search(spelled(key))
    ]
