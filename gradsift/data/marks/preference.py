"""Rows that say which of several answers is the better one: to imitate every answer in them would
teach the bad ones too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

_REJECTED = re.compile(
    r"(?:^|_)(?:reject(?:ed)?|dispreferred|unpreferred|non_?preferred|unchosen|losing|loser|worse)"
    r"(?:_|$)"
)
_CHOSEN = re.compile(r"(?:^|_)(?:chosen|preferred|accepted|winner|winning|better)(?:_|$)")
_JUDGED = re.compile(r"^(?:label|kto_(?:tag|label)|(?:is_)?(?:desirable|chosen|preferred))$")
# two answers told apart by their last letter or number
_NUMBERED = re.compile(
    r"^(?P<stem>(?:.*_)?(?:response|answer|completion|output|generation|ref|reply|conversation|messages))_?"
    r"(?P<which>[012abjk])$"
)
_MANY = re.compile(
    r"^(?:.*_)?(?:responses|answers|completions|candidates|generations|outputs|replies)$"
)
_RATED = re.compile(r"^(?:.*_)?(?:rewards?|scores?|ranks?|rankings?|ratings?|labels|preferences?)$")
_WORDS = {"true", "false", "desirable", "undesirable", "chosen", "rejected", "good", "bad"}
# fields that make a row an example with one answer
_ANSWERED = ("messages", "conversations", "conversation", "completion", "output", "response")


@functools.lru_cache(maxsize=4096)
def _suspects(keys: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(kind, key) of the keys whose values may make a row a preference row."""
    found = []
    for key in keys:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])|[-\s]", "_", key).lower()
        for kind, pattern in (
            ("rejected", _REJECTED),
            ("judged", _JUDGED),
            ("numbered", _NUMBERED),
            ("many", _MANY),
            ("rated", _RATED),
        ):
            if pattern.search(name):
                found.append((kind, key))
    if any(key == "output" for key in keys):
        found.append(("many", "output"))
    return tuple(found)


def preference(record: Mapping[str, Any], named: Collection[str] = ()) -> str | None:
    """How a row says which answers are good and which are bad; None where it does not.

    Args:
        record: the row.
        named: fields that a mapping names: their owner has said what they hold.
    """
    suspects = [pair for pair in _suspects(tuple(map(str, record))) if pair[1] not in named]
    if not suspects:
        return None
    chosen = [key for key in record if _CHOSEN.search(str(key).lower())]
    if not any(key in named for key in chosen):
        for kind, key in suspects:
            if kind == "rejected" and _filled(record[key]):
                beside = f" beside {chosen[0]!r}" if chosen else ""
                return f"the field {key!r}{beside} holds an answer that was rejected"
    for kind, key in suspects:
        if kind == "judged" and _verdict(record[key]) and _answers(record):
            return f"the field {key!r} says whether the answer is a good one ({record[key]})"
    return _several(record, suspects, named)


def _several(
    record: Mapping[str, Any], suspects: list[tuple[str, str]], named: Collection[str]
) -> str | None:
    rated = [record[key] for kind, key in suspects if kind == "rated"]
    for kind, key in suspects:
        value = record[key]
        if kind != "many" or not isinstance(value, list) or len(value) < 2:
            continue
        if any(isinstance(marks, list) and len(marks) == len(value) for marks in rated):
            return f"the field {key!r} holds {len(value)} answers, each with a mark of its own"
        if all(isinstance(item, dict) and any(map(_RATED.match, item)) for item in value):
            return f"the field {key!r} holds {len(value)} answers, each with a mark of its own"
        if key == "output" and all(isinstance(item, str) for item in value):
            return f"the field {key!r} holds {len(value)} answers, the best one first"
    stems: dict[str, list[str]] = {}
    for kind, key in suspects:
        match = _NUMBERED.match(key.lower()) if kind == "numbered" else None
        if match and isinstance(record[key], (str, list, dict)) and record[key]:
            stems.setdefault(match["stem"], []).append(key)
    for keys in stems.values():
        if len(keys) > 1 and not any(key in named for key in keys) and not _answers(record):
            return f"the fields {keys[0]!r} and {keys[1]!r} hold two answers to one question"
    return None


def graded(record: Mapping[str, Any]) -> bool:
    """Whether a row with an answer has a `label` of 0 or 1, which may say good or bad, or a
    class.
    """
    return (
        type(record.get("label")) is int
        and record["label"] in (0, 1)
        and record.get("completion") is not None
    )


def _answers(record: Mapping[str, Any]) -> bool:
    return any(record.get(name) is not None for name in _ANSWERED)


def _filled(value: Any) -> bool:
    return isinstance(value, (str, list, dict)) and bool(
        value.strip() if isinstance(value, str) else value
    )


def _verdict(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _WORDS)
