"""Row formats: the bytes of one row -> a checked record -> messages. Nothing here opens a file.

A row that cannot be used raises `RowFault` with one of the codes of FAULTS; the pool quarantines it
by that code.

The snippet for TRL (`commands/select/train_trl.py.j2`) reads the same formats on its own, for it
runs where gradsift is not installed: a new format is added there too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from gradsift.types import IGNORE, Message

# of nested lists and objects in one row: templates and JSON writers recurse, so depth must be
# bounded before they see it
MAX_DEPTH = 100

# code -> how to fix. The codes are what `dropped.jsonl`, the funnel and docs/formats.md speak of.
FAULTS: dict[str, str] = {
    "bad-json": "Write the row again with a JSON library, one object a line.",
    "not-utf8": "Convert the file to UTF-8.",
    "nul": "Remove the NUL characters: they are what is left of a damaged write.",
    "surrogate": (
        "Remove the half of a surrogate pair: it is no character and no tokenizer can read it."
    ),
    "nan": "Replace NaN and Infinity, which JSON does not have, by null or a number.",
    "duplicate-key": "Keep one of the two values: readers disagree on which one counts.",
    "too-deep": f"Flatten the row to at most {MAX_DEPTH} levels of nesting.",
    "too-long": "Split the row, or raise max_row_bytes.",
    "not-object": "Make each row a JSON object.",
    "missing-field": "Give the format or a mapping by hand if the detected format is wrong.",
    "wrong-type": "Correct the field's type.",
    "unknown-role": "Use the roles system, user, assistant and tool.",
    "not-text": "Remove images and audio: gradsift reads text only.",
    "no-answer": "Add an assistant turn: without one there is nothing to learn from.",
    "cut-file": "Copy or download the file again: it ends in the middle.",
}


class RowFault(Exception):
    """Why a row cannot be used. `code` is a key of FAULTS, `text` says what was found."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text = code, text

    @property
    def fix(self) -> str:
        return FAULTS[self.code]


@dataclass(frozen=True, slots=True)
class Content:
    """What a row says, whatever its format: see `types.Example` for the fields."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    tokens: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise RowFault("duplicate-key", f"the key {twice!r} stands twice in one object")
    return record


def _constant(literal: str) -> NoReturn:
    raise RowFault("nan", f"the literal {literal} is not JSON")


_DECODE = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant).decode


def parse_row(line: bytes) -> dict[str, Any]:
    """The JSON object in `line` (UTF-8, no byte order mark). Raises RowFault."""
    try:
        record = _DECODE(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowFault("not-utf8", f"byte {error.start + 1} of the row is not UTF-8") from None
    except RecursionError:
        raise RowFault("too-deep", f"nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        if b"\0" in line:
            raise RowFault("nul", "the row holds NUL bytes") from None
        raise RowFault("bad-json", f"{error.msg} at character {error.pos + 1} of the row") from None
    except ValueError as error:  # a number of thousands of digits
        raise RowFault("bad-json", str(error).split(";")[0]) from None
    if not isinstance(record, dict):
        raise RowFault("not-object", f"the row is a JSON {_kind(record)}, not an object")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH:
        check_depth(record)
    # Escapes are the only way for these two to pass the decoder, and they are rare: walk the
    # strings only where one may be.
    if b"\\u" in line and (b"\\u0000" in line or b"\\ud" in line or b"\\uD" in line):
        check_strings(record)
    return record


def check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH + 1:
            raise RowFault("too-deep", f"nested deeper than {MAX_DEPTH} levels")
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def check_strings(record: Mapping[str, Any]) -> None:
    """Raises RowFault for NUL characters and lone surrogates."""
    for text in _strings(record):
        if "\0" in text:
            raise RowFault("nul", "a text holds the NUL character")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowFault(
                "surrogate", f"a text holds the lone surrogate U+{ord(text[error.start]):04X}"
            ) from None


def _kind(value: Any) -> str:
    names = {
        dict: "object",
        list: "list",
        tuple: "list",
        str: "string",
        bool: "boolean",
        int: "number",
        float: "number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
_TAGS = {  # what ShareGPT-like files call the roles
    "human": "user",
    "user": "user",
    "system": "system",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
UNSUPERVISED: Mapping[str, Any] = {"weight": 0}
FIELD_NAMES = (
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "conversations",
    "messages",
    "tools",
    "prompt",
    "completion",
    "text",
    "input_ids",
    "labels",
    "from",
    "value",
    "role",
    "content",
)


class Fields:
    """Which field of the file holds which field of ours: identity unless a mapping says
    otherwise.
    """

    def __init__(self, mapping: Mapping[str, str] | None = None) -> None:
        self.mapping = dict(mapping or {})
        self._of = {name: self.mapping.get(name, name) for name in FIELD_NAMES}
        # fields of a turn that are not extra
        self.spoken = frozenset(self._of[name] for name in ("role", "content", "from", "value"))

    def name(self, ours: str) -> str:
        return self._of[ours]

    def get(self, record: Mapping[str, Any], ours: str) -> Any:
        return record.get(self._of[ours])

    def need(self, record: Mapping[str, Any], ours: str) -> Any:
        value = record.get(self._of[ours])
        if value is None:
            has = ", ".join(sorted(map(str, record))[:8]) or "none"
            raise RowFault(
                "missing-field", f"no field {self._of[ours]!r} (the row's fields: {has})"
            )
        return value

    def text(self, record: Mapping[str, Any], ours: str, default: str | None = None) -> str:
        value = self.need(record, ours) if default is None else self.get(record, ours)
        if value is None:
            return default or ""
        if not isinstance(value, str):
            raise RowFault(
                "wrong-type", f"the field {self._of[ours]!r} is a {_kind(value)}, not a string"
            )
        return value

    def many(self, record: Mapping[str, Any], ours: str) -> list[Any]:
        value = self.need(record, ours)
        if not isinstance(value, list):
            raise RowFault(
                "wrong-type", f"the field {self._of[ours]!r} is a {_kind(value)}, not a list"
            )
        return value


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = []
        for part in content:
            if not (
                isinstance(part, dict)
                and isinstance(part.get("text"), str)
                and part.get("type", "text") == "text"
            ):
                raise RowFault("not-text", f"{where} holds a part that is not text")
            parts.append(part["text"])
        return "".join(parts)
    raise RowFault("wrong-type", f"the content of {where} is a {_kind(content)}, not a string")


def _turn(turn: Any, number: int, fields: Fields) -> Message:
    """One {role, content} or {from, value} turn; both spellings are read in both formats, since
    files mix the names of the list.
    """
    where = f"turn {number}"
    if not isinstance(turn, dict):
        raise RowFault("wrong-type", f"{where} is a {_kind(turn)}, not an object")
    role, content = turn.get(fields.name("role")), turn.get(fields.name("content"))
    tagged = role is None
    if tagged:
        role, content = turn.get(fields.name("from")), turn.get(fields.name("value"))
        role = _TAGS.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str):
        raise RowFault("missing-field" if role is None else "wrong-type", f"{where} has no role")
    if role == "function_call":
        return _function_call(content, where)
    if role not in ROLES:
        raise RowFault("unknown-role", f"{where} has the role {role[:40]!r}")
    extra = {
        key: value for key, value in turn.items() if value is not None and key not in fields.spoken
    }
    if content is None:
        if not extra.get("tool_calls"):
            raise RowFault("missing-field", f"{where} has no content")
        content = ""
    return Message(
        role, content if isinstance(content, str) else _text_of(content, where), extra or None
    )


def _function_call(value: Any, where: str) -> Message:
    """ShareGPT's function_call: a JSON text {"name", "arguments"} becomes a tool call, any other
    text stays text.
    """
    text = _text_of(value, where)
    try:
        found = json.loads(text)
        check_depth(found)
    except (ValueError, RecursionError):
        found = None
    calls = found if isinstance(found, list) else [found]
    named = [call for call in calls if isinstance(call, dict) and isinstance(call.get("name"), str)]
    if named and len(named) == len(calls):
        functions = [
            {
                "type": "function",
                "function": {"name": call["name"], "arguments": call.get("arguments", {})},
            }
            for call in named
        ]
        return Message("assistant", "", {"tool_calls": functions})
    return Message("assistant", text)


def _turns(turns: Any, fields: Fields) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise RowFault("wrong-type", f"the turns are a {_kind(turns)}, not a list")
    return tuple([_turn(turn, number, fields) for number, turn in enumerate(turns, 1)])


def _tools(record: Mapping[str, Any], fields: Fields) -> tuple[Any, ...]:
    tools = fields.get(record, "tools")
    if tools is None or tools == "":
        return ()
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
            check_depth(tools)
        except (ValueError, RecursionError):
            raise RowFault(
                "wrong-type", f"the field {fields.name('tools')!r} is a text that is not JSON"
            ) from None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFault(
            "wrong-type", f"the field {fields.name('tools')!r} is not a list of tool descriptions"
        )
    return tuple(tools)


def _answered(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    for message in messages:
        if message.role == "assistant" and supervised(message):
            if not message.content.strip() and not (message.extra or {}).get("tool_calls"):
                continue
            return messages
    raise RowFault("no-answer", "no assistant turn with a text" if messages else "no turns")


def supervised(message: Message) -> bool:
    """Whether the turn is one to learn from: an assistant turn that does not say `weight: 0` or
    `train: false`.
    """
    extra = message.extra or {}
    return (
        message.role == "assistant"
        and extra.get("weight", 1) != 0
        and extra.get("train", True) is not False
    )


def _without_loss(message: Message) -> Message:
    return (
        Message(message.role, message.content, {**(message.extra or {}), **UNSUPERVISED})
        if message.role == "assistant"
        else message
    )


def _alpaca(record: Mapping[str, Any], fields: Fields) -> Content:
    instruction, more = fields.text(record, "instruction"), fields.text(record, "input", "")
    output, system = fields.text(record, "output"), fields.text(record, "system", "")
    messages = [Message("system", system)] if system else []
    for pair in fields.get(record, "history") or ():
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(text, str) for text in pair)
        ):
            raise RowFault(
                "wrong-type",
                f"the field {fields.name('history')!r} is not a list of [question, answer] pairs",
            )
        messages += [Message("user", pair[0]), Message("assistant", pair[1], UNSUPERVISED)]
    messages += [
        Message("user", f"{instruction}\n\n{more}" if more else instruction),
        Message("assistant", output),
    ]
    return Content(_answered(tuple(messages)))


def _sharegpt(record: Mapping[str, Any], fields: Fields) -> Content:
    messages = _turns(fields.need(record, "conversations"), fields)
    system = fields.text(record, "system", "")
    if system and not (messages and messages[0].role == "system"):
        messages = (Message("system", system), *messages)
    return Content(_answered(messages), _tools(record, fields))


def _messages(record: Mapping[str, Any], fields: Fields) -> Content:
    return Content(
        _answered(_turns(fields.need(record, "messages"), fields)), _tools(record, fields)
    )


def _prompt_completion(record: Mapping[str, Any], fields: Fields) -> Content:
    prompt, completion = fields.need(record, "prompt"), fields.need(record, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise RowFault("no-answer", "the completion is empty")
        return Content((Message("prompt", prompt), Message("completion", completion)))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowFault(
            "wrong-type", "prompt and completion must both be strings or both be lists of turns"
        )
    asked = tuple([_without_loss(message) for message in _turns(prompt, fields)])
    return Content(_answered(asked + _turns(completion, fields)), _tools(record, fields))


def _text(record: Mapping[str, Any], fields: Fields) -> Content:
    text = fields.text(record, "text")
    if not text.strip():
        raise RowFault("no-answer", "the text is empty")
    return Content((Message("text", text),))


def _tokenised(record: Mapping[str, Any], fields: Fields) -> Content:
    ids, labels = fields.many(record, "input_ids"), fields.many(record, "labels")
    for name, values, least in (("input_ids", ids, 0), ("labels", labels, IGNORE)):
        if not all(type(value) is int and (value >= 0 or value == least) for value in values):
            raise RowFault(
                "wrong-type", f"the field {fields.name(name)!r} is not a list of token ids"
            )
    if len(ids) != len(labels):
        raise RowFault("wrong-type", f"{len(ids)} input_ids but {len(labels)} labels")
    if not any(label != IGNORE for label in labels[1:]):
        raise RowFault("no-answer", "no label after the first token is supervised")
    return Content((), (), (tuple(ids), tuple(labels)))


# name -> (fields a row must have, in order of mapping; converter). The order is the order of
# preference where a row fits several formats: a chat list says more than a text rendered from it.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], Fields], Content]]] = {
    "tokenised": (("input_ids", "labels"), _tokenised),
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "prompt-completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "text": (("text",), _text),
}


def detect(record: Mapping[str, Any], fields: Fields) -> str | None:
    """The format whose required fields the row has; None when it has those of none."""
    for name, (required, _) in FORMATS.items():
        if all(fields.get(record, field) is not None for field in required):
            return name
    return None


def vote(records: Sequence[Mapping[str, Any]], fields: Fields) -> tuple[str | None, dict[str, int]]:
    """The format of most rows, and the votes. Ties go to the earlier in FORMATS. None when no row
    fits any.
    """
    votes = dict.fromkeys(FORMATS, 0)
    for record in records:
        name = detect(record, fields)
        if name is not None:
            votes[name] += 1
    best = max(votes, key=lambda name: votes[name])
    return (best if votes[best] else None), {name: count for name, count in votes.items() if count}


def convert(record: Mapping[str, Any], format: str, fields: Fields) -> Content:
    """The messages of a record. Raises RowFault."""
    _, converter = FORMATS[format]
    try:
        return converter(record, fields)
    except RowFault as fault:
        if fault.code == "missing-field" and (other := detect(record, fields)) not in (
            None,
            format,
        ):
            raise RowFault(
                fault.code,
                f"{fault.text}; it looks like {other}, but the file was read as {format}",
            ) from None
        raise
