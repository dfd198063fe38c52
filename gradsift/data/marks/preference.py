"""Rows that say which of several answers is the better one: to imitate every answer in them would
teach the bad ones too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

from gradsift.data.marks.words import TRUTH, is_flag, is_nothing

_REJECTED = re.compile(
    r"(?:^|_)(?:reject(?:ed)?|dispreferred|unpreferred|non_?preferred|unchosen|losing|loser|worse)"
    r"(?:_|$)"
)
# who rejected, why, when: not what
_ABOUT = re.compile(
    r"_(?:by|reasons?|at|counts?|ids?|on|date|time|type|category|comments?|notes?|scores?|rate)$"
)
_ANSWER = re.compile(r"_(?:response|answer|completion|output|message|messages|text|reply)(?:_|$)")
_REFUSED = re.compile(r"^(?:(?:is|was)_)?rejected$")
_CHOSEN = re.compile(r"(?:^|_)(?:chosen|preferred|accepted|winner|winning|better)(?:_|$)")
_JUDGED = re.compile(r"^(?:label|kto_(?:tag|label)|(?:is_)?(?:desirable|chosen|preferred))$")
# what can be nothing but a judgement: a number there says yes or no
_PLAIN = re.compile(r"^(?:kto_(?:tag|label)|desirable|rejected|(?:is|was)_\w+)$")
# two answers told apart by their last letter or number
_NUMBERED = re.compile(
    r"^(?P<stem>(?:.*_)?(?:response|answer|completion|output|generation|ref|reply|conversation|messages))_?"
    r"(?P<which>[012abjk])$"
)
_MANY = re.compile(
    r"^(?:.*_)?(?:responses|answers|completions|candidates|generations|outputs|replies)$"
)
_RATED = re.compile(r"^(?:.*_)?(?:rewards?|scores?|ranks?|rankings?|ratings?|labels|preferences?)$")
_WORDS = {
    **dict.fromkeys(("true", "desirable", "chosen", "preferred"), True),
    **dict.fromkeys(("false", "undesirable", "rejected", "dispreferred"), False),
}
# words that judge in such a field, and may name a class in others
_MARKS = {
    **TRUTH,
    **dict.fromkeys(("good", "1", "1.0"), True),
    **dict.fromkeys(("bad", "0", "0.0"), False),
}
# fields that make a row an example with one answer
_ANSWERED = ("messages", "conversations", "conversation", "completion", "output", "response")


def _spelled(key: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[-\s]", "_", key).lower()


@functools.lru_cache(maxsize=4096)
def _suspects(keys: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(kind, key) of the keys whose values may make a row a preference row."""
    found = []
    for key in keys:
        name = _spelled(key)
        for kind, pattern in (
            ("rejected", _REJECTED),
            ("judged", _JUDGED),
            ("numbered", _NUMBERED),
            ("many", _MANY),
            ("rated", _RATED),
        ):
            if pattern.search(name) and not (kind == "rejected" and _ABOUT.search(name)):
                found.append((kind, key))
    if any(key == "output" for key in keys):
        found.append(("many", "output"))
    return tuple(found)


def preference(record: Mapping[str, Any], named: Collection[str] = ()) -> str | None:
    """How a row says which of its answers are bad; None where it does not.

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
            if kind == "rejected" and _holds_answer(record, key, chosen):
                beside = f" beside {chosen[0]!r}" if chosen else ""
                return f"the field {key!r}{beside} holds an answer that was rejected"
    for kind, key in suspects:
        refused = kind == "rejected" and _REFUSED.match(_spelled(key)) is not None
        judges = (kind == "judged" or refused) and _judged_answer(record)
        if judges and _verdict(key, record[key]) is refused:
            return f"the field {key!r} says that the answer is not a good one ({record[key]})"
    return _several(record, suspects, named)


def approved(record: Mapping[str, Any], named: Collection[str] = ()) -> str | None:
    """How a row says that its answer is a good one; None where it does not. Such rows can be
    learned; beside rows with bad answers they are preference rows as those are.
    """
    for kind, key in _suspects(tuple(map(str, record))):
        judges = kind == "judged" and key not in named and _judged_answer(record)
        if judges and _verdict(key, record[key]):
            return f"the field {key!r} says whether the answer is a good one ({record[key]})"
    return None


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


def graded(record: Mapping[str, Any]) -> str | None:
    """What should be said of a row with an answer beside a mark that may judge it, or name a
    class.
    """
    for kind, key in _suspects(tuple(map(str, record))):
        if kind != "judged" or not _judged_answer(record):
            continue
        if _verdict(key, record[key]) is None and _word(record[key]) in _MARKS:
            return (
                f"a {key!r} of 0 or 1, yes or no, good or bad beside an answer, which is learned"
                " either way; if it says how good the answer is, keep the good rows alone"
            )
    return None


def _answers(record: Mapping[str, Any]) -> bool:
    return any(record.get(name) is not None for name in _ANSWERED)


def _judged_answer(record: Mapping[str, Any]) -> bool:
    """Whether there is an answer that a verdict can be about."""
    return _answers(record) or isinstance(record.get("answer"), str)


def _filled(value: Any) -> bool:
    return isinstance(value, (str, list, dict)) and bool(value) and not is_nothing(value)


def _holds_answer(record: Mapping[str, Any], key: str, chosen: list[str]) -> bool:
    """Whether a field of rejected answers holds one. "No" and "5" are answers where the chosen one
    is, and flags or marks beside an answer of another field.
    """
    if not _filled(record[key]):
        return False
    if not is_flag(record[key]) or _ANSWER.search(_spelled(key)):
        return True
    texts = [record[name] for name in chosen if _filled(record[name])]
    return bool(texts) and (not _answers(record) or not all(map(is_flag, texts)))


def _verdict(key: str, value: Any) -> bool | None:
    """What a field says of the answer: good, bad, or nothing."""
    word = _word(value)
    found = _WORDS.get(word)
    if found is None and _PLAIN.match(_spelled(key)):
        found = _MARKS.get(word)
    return found


def _word(value: Any) -> str:
    return str(value).strip().lower() if isinstance(value, (str, int, float)) else ""
