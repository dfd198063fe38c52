"""Row formats: the bytes of one row -> a checked record -> messages. Nothing here opens a file.

A row that cannot be used raises `RowFault` with one of the codes of FAULTS; the pool quarantines it
by that code.

The snippet for TRL (`commands/select/train_trl.py.j2`) reads the same formats on its own, for it
runs where gradsift is not installed: a new format is added there too.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from gradsift.data.marks import loss, tokens
from gradsift.data.marks.media import media
from gradsift.data.marks.preference import preference
from gradsift.types import Message

# of nested lists and objects in one row: templates and JSON writers recurse, so depth must be
# bounded before they see it
MAX_DEPTH = 100

# code -> how to fix. The codes are what `dropped.jsonl`, the funnel and docs/formats.md speak of.
FAULTS: dict[str, str] = {
    "bad-json": "Write the row again with a JSON library, one object a line.",
    "bad-csv": "Write the row again with a csv library, with as many cells as there are columns.",
    "not-utf8": "Convert the file to UTF-8.",
    "nul": "Remove the NUL characters: they are what is left of a damaged write.",
    "surrogate": (
        "Remove the half of a surrogate pair: it is no character and no tokenizer can read it."
    ),
    "nan": "Replace NaN and Infinity, which JSON does not have, by null or a number.",
    "duplicate-key": "Keep one of the two values: readers disagree on which one counts.",
    "too-deep": f"Flatten the row to at most {MAX_DEPTH} levels of nesting.",
    "too-long": "Split the row, or raise max_row_bytes.",
    "not-object": 'Make each row a JSON object, such as {"text": "..."}.',
    "missing-field": (
        "Add it; or, where it has another name, say so: --map instruction=question (of a target:"
        " --target-map)."
    ),
    "wrong-type": "Correct the field's type.",
    "unknown-role": "Use the roles system, user, assistant and tool.",
    "not-text": (
        "Leave out rows with pictures, films or sounds, and write other parts as text: gradsift"
        " reads text only."
    ),
    "preference": (
        "Rows that hold rejected answers are not supported yet: keep rows with the good answer"
        " alone, without the field that judges it. Of `prompt` and `chosen`, --map"
        " completion=chosen reads the chosen answers; where `chosen` is a whole chat, --map"
        " messages=chosen."
    ),
    "packed": "Give each document a row of its own: rows are scored one by one.",
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
        said = error.msg.removesuffix(" at")
        raise RowFault("bad-json", f"{said} at character {error.pos + 1} of the row") from None
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


def parse_value(text: str) -> Any:
    """The JSON value in a text. Raises RowFault."""
    try:
        value = _DECODE(text)
    except RecursionError:
        raise RowFault("too-deep", f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise RowFault("bad-json", f"a text is not the JSON that it should be ({error})") from None
    check_depth(value)
    return value


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


def _a(value: Any) -> str:
    kind = _kind(value)
    return kind if kind == "null" else f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


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
    "ai": "assistant",
    "chatbot": "assistant",
    "prompter": "user",
    "tool_response": "tool",
    "tool_call": "function_call",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
# of a turn that is a pair of question and answer: the key of each, in order of preference
_ASKED, _SAID = ("human", "user", "instruction"), ("assistant", "gpt", "bot", "output")
# keys of a turn that hold its calls, those of a call that hold its arguments, the likelier first,
# and those that are no arguments
_CALLS = frozenset({"tool_calls", "tool_call", "function_call", "function_calls"})
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_OF_A_CALL = frozenset({"name", "function", "id", "call_id", "tool_call_id", "index", "type"})
# fields beside a chat that may hold the answer to its last turn
_ANSWERS = frozenset({"chosen", "completion", "response", "answer", "output"})
_EMPTY = (None, "", [], {})
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
    "attention_mask",
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
        # what their owner has said the meaning of
        self.named = frozenset(self.mapping.values())

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
                "wrong-type", f"the field {self._of[ours]!r} is {_a(value)}, not a string"
            )
        return value

    def many(self, record: Mapping[str, Any], ours: str) -> list[Any]:
        value = self.need(record, ours)
        if not isinstance(value, list):
            raise RowFault("wrong-type", f"the field {self._of[ours]!r} is {_a(value)}, not a list")
        return value


def _text_of(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join([_part(part, where) for part in content])
    if isinstance(content, dict) and content:
        return _part(content, where)
    raise RowFault("wrong-type", f"the content of {where} is {_a(content)}, not a string")


def _part(part: Any, where: str) -> str:
    """The text of one part of a content, under whichever name the writer's API gives it."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowFault("not-text", f"{where} holds a part that is {_a(part)}")
    kind = part.get("type")
    if kind is None and isinstance(part.get("parts"), list):
        return _text_of(part["parts"], where)
    if kind in (None, "text", "input_text", "output_text"):
        for name in ("text", "value", kind, "content"):
            text = part.get(name)
            if isinstance(text, dict):
                text = text.get("value")
            if isinstance(text, str) and not media(part):
                return text
    shown = f"of the type {str(kind)[:40]!r}" if kind else f"with the fields {_names(part)}"
    raise RowFault("not-text", f"{where} holds a part {shown}, which is no text")


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(repr(str(name)[:40]) for name in list(record)[:8]) or "none"


def _turn(turn: Any, number: int, fields: Fields) -> Message:
    """One {role, content} or {from, value} turn; any mixture of the spellings is read, since files
    mix them.
    """
    where = f"turn {number}"
    if not isinstance(turn, dict):
        raise RowFault("wrong-type", f"{where} is {_a(turn)}, not an object")
    role, content = turn.get(fields.name("role")), turn.get(fields.name("content"))
    if role is None:
        role = turn.get(fields.name("from"))
    if content is None:
        content = turn.get(fields.name("value"))
    if content is None and isinstance(turn.get("parts"), list):
        turn = dict(turn)
        content = turn.pop("parts")
    if not isinstance(role, str):
        raise RowFault("missing-field" if role is None else "wrong-type", f"{where} has no role")
    role = _role(role)
    calls: list[Any] = []
    if role == "function_call":
        role, content = "assistant", _text_of(content, where)
        if calls := _calls_told(content):
            content = ""
    if role not in ROLES:
        raise RowFault("unknown-role", f"{where} has the role {role[:40]!r}")
    extra = {
        key: value for key, value in turn.items() if value is not None and key not in fields.spoken
    }
    if extra or calls:
        extra = _with_calls(extra, calls, role, where)
        _check_extra(extra, role, where)
    if content is None:
        if not extra.get("tool_calls"):
            raise RowFault("missing-field", f"{where} has no content")
        content = ""
    return Message(
        role, content if isinstance(content, str) else _text_of(content, where), extra or None
    )


def _role(name: str) -> str:
    """The role behind what a file calls it, in capitals or not; an unknown name as it is."""
    if name in ROLES:
        return name
    small = name.strip().lower()
    role = _TAGS.get(small, small)
    return role if role in ROLES or role == "function_call" else name


def _check_extra(extra: Mapping[str, Any], role: str, where: str) -> None:
    """Raises RowFault for a picture among the further fields of a turn, and for a switch of the
    loss that cannot be read.
    """
    if held := media(extra):
        raise RowFault("not-text", f"{where} has a field {held!r} with something in it")
    if role == "assistant":
        try:
            loss.learned(extra)
        except loss.Unreadable as error:
            raise RowFault("wrong-type", f"{where}: {error}") from None


def _calls_told(text: str) -> list[Any]:
    """The calls of ShareGPT's function_call: JSON texts {"name", "arguments"}, one or several in a
    list or one a line. None where it is any other text, which stays one.
    """
    for told in (text, f"[{','.join(text.strip().splitlines())}]"):
        try:
            return [_call(call) for call in _listed(_json(told))]
        except (ValueError, RecursionError):
            continue
    return []


def _with_calls(extra: dict[str, Any], calls: list[Any], role: str, where: str) -> dict[str, Any]:
    """A turn's fields with its calls as `tool_calls`, whichever way the row writes them: templates
    know no `function_call`, and few know a call without its "function".

    Args:
        extra: the fields.
        calls: calls that the text of the turn is.
        role: whose turn; of what is not learned, calls that cannot be read stay as they are.
        where: which turn, for the fault.
    """
    found = {"tool_calls": calls} if calls else {}
    keys = [key for key in extra if loss.spelled(key) in _CALLS]
    for key in keys:
        try:
            told = _json(extra[key]) if isinstance(extra[key], str) else extra[key]
            if told:
                found[key] = [_call(call) for call in _listed(told)]
        except (ValueError, RecursionError) as error:
            if role != "assistant":
                return extra
            raise RowFault("wrong-type", f"{where}: {key!r} holds no calls ({error})") from None
    read = next(iter(found.values()), [])
    if any(_meant(other) != _meant(read) for other in found.values()):
        raise RowFault(
            "wrong-type", f"{where} has different calls in {' and '.join(map(repr, found))}"
        )
    if keys == ["tool_calls"] and read == extra["tool_calls"]:
        return extra
    rest = {key: value for key, value in extra.items() if key == "tool_calls" or key not in keys}
    if not found:  # a text such as "[]" says that there are none
        return {key: value for key, value in rest.items() if key != "tool_calls" or not value}
    return {**rest, "tool_calls": read}


def _json(text: str) -> Any:
    if not text.strip():
        return None
    try:
        found = json.loads(text)
    except ValueError:
        raise ValueError("a text that is not JSON") from None
    check_depth(found)
    return found


def _listed(told: Any) -> list[Any]:
    return told if isinstance(told, list) else [told]


def _meant(calls: list[Any]) -> list[tuple[str, Any]]:
    """Name and arguments of each call, to compare what is written in two places."""
    found = []
    for call in calls:
        arguments = call["function"].get("arguments")
        with contextlib.suppress(ValueError, RecursionError):  # other texts are compared as such
            arguments = _json(arguments) if isinstance(arguments, str) else arguments
        found.append((call["function"]["name"], arguments or {}))
    return found


def _call(told: Any) -> dict[str, Any]:
    """A call in the shape that templates read. Raises ValueError where it has no name, or something
    in it that is not known: what a training would learn of it is a call without it.
    """
    if not isinstance(told, dict):
        raise ValueError(f"a call that is {_a(told)}")
    function = told.get("function")
    inner = function if isinstance(function, dict) else told
    name = inner.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"a call without a name, with the fields {_names(inner)}")
    places = (inner,) if inner is told else (inner, told)
    held = [(key, part[key]) for part in places for key in _ARGUMENTS if part.get(key) is not None]
    others = [
        key
        for part in places
        for key, value in part.items()
        if key not in _OF_A_CALL and value not in _EMPTY
    ]
    if not held and others:
        raise ValueError(f"a call without arguments, with {', '.join(map(repr, others[:8]))}")
    key, arguments = next((pair for pair in held if pair[1] not in _EMPTY), (None, None))
    if inner is function:
        if key is None or inner.get("arguments") is arguments:
            return told
        spare = {key: value for key, value in told.items() if key not in _ARGUMENTS}
        kept = {key: value for key, value in inner.items() if key not in _ARGUMENTS}
        return {**spare, "function": {**kept, "arguments": arguments}}
    if key is None:
        arguments = held[0][1] if held else told.get("arguments", {})
    made = {key: told[key] for key in ("id",) if key in told}
    return {**made, "type": "function", "function": {"name": name, "arguments": arguments}}


def _turns(turns: Any, fields: Fields) -> tuple[Message, ...]:
    if isinstance(turns, str):
        turns = _list_in(turns)
    if not isinstance(turns, list):
        raise RowFault("wrong-type", f"the turns are {_a(turns)}, not a list")
    if any(isinstance(turn, dict) and not _has_role(turn, fields) for turn in turns):
        turns = [part for turn in turns for part in _halves(turn, fields)]
    made = [_turn(turn, number, fields) for number, turn in enumerate(turns, 1)]
    if any((message.extra or {}).get("tool_calls") for message in made):
        # The result of an old `function_call` is what is the result of a call now.
        made = [
            Message("tool", message.content, message.extra)
            if message.role == "function"
            else message
            for message in made
        ]
    return tuple(made)


def _list_in(text: str) -> Any:
    """The list that a JSON text holds, as columns of texts have it; else the text."""
    try:
        found = json.loads(text)
        check_depth(found)
    except (ValueError, RecursionError):
        raise RowFault("wrong-type", "the turns are a text that is not JSON") from None
    return found


def _has_role(turn: Mapping[str, Any], fields: Fields) -> bool:
    return turn.get(fields.name("role")) is not None or turn.get(fields.name("from")) is not None


def _halves(turn: Any, fields: Fields) -> list[Any]:
    """The two turns of a {human, assistant} pair; any other turn as it is."""
    if isinstance(turn, dict) and not _has_role(turn, fields):
        asked, said = (next((n for n in names if n in turn), None) for names in (_ASKED, _SAID))
        if asked and said:
            rest = {name: item for name, item in turn.items() if name not in (asked, said)}
            return [
                {fields.name("role"): "user", fields.name("content"): turn[asked]},
                {**rest, fields.name("role"): "assistant", fields.name("content"): turn[said]},
            ]
    return [turn]


def _tools(record: Mapping[str, Any], fields: Fields) -> tuple[Any, ...]:
    tools = fields.get(record, "tools")
    if tools is None or tools == "":
        tools = record.get("functions")  # the name of old, of which each is the function alone
        if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
            tools = [{"type": "function", "function": tool} for tool in tools]
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
    """Whether the turn is one to learn from: an assistant turn that no switch of
    `gradsift.data.marks.loss` turns off.
    """
    return message.role == "assistant" and (not message.extra or loss.learned(message.extra))


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
        if isinstance(pair, dict):
            pair = [half.get(fields.name("content")) for half in _halves(pair, fields)]
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


def _with_system(
    messages: tuple[Message, ...], record: Mapping[str, Any], fields: Fields
) -> tuple[Message, ...]:
    """The turns below the system text that the row has in a field of its own."""
    system = fields.get(record, "system")
    if not isinstance(system, str) or not system or (messages and messages[0].role == "system"):
        return messages
    return (Message("system", system), *messages)


def _check_ended(messages: tuple[Message, ...], record: Mapping[str, Any], fields: Fields) -> None:
    """Raises RowFault where the last turn waits for an answer and the row has it in another field:
    what would be learned is the turns before, which are its context.
    """
    if not messages or messages[-1].role == "assistant":
        return
    for key, value in record.items():
        if key in fields.named or loss.spelled(str(key)) not in _ANSWERS:
            continue
        if isinstance(value, (str, dict, list)) and (
            value.strip() if isinstance(value, str) else value
        ):
            raise RowFault(
                "no-answer",
                f"the last turn is the {messages[-1].role}'s, and {key!r} holds the answer to it:"
                " write it as the last turn",
            )


def _sharegpt(record: Mapping[str, Any], fields: Fields) -> Content:
    fields.text(record, "system", "")
    messages = _with_system(_turns(fields.need(record, "conversations"), fields), record, fields)
    _check_ended(messages, record, fields)
    return Content(_answered(messages), _tools(record, fields))


def _messages(record: Mapping[str, Any], fields: Fields) -> Content:
    messages = _with_system(_turns(fields.need(record, "messages"), fields), record, fields)
    _check_ended(messages, record, fields)
    return Content(_answered(messages), _tools(record, fields))


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
    try:
        ids, labels = tokens.read(
            fields.many(record, "input_ids"),
            (
                None
                if fields.get(record, "labels") is None and tokens.masks(record)
                else fields.many(record, "labels")
            ),
            fields.get(record, "attention_mask"),
            record,
        )
    except tokens.Packed as error:
        raise RowFault("packed", str(error)) from None
    except tokens.Unusable as error:
        raise RowFault(error.code, str(error)) from None
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


# Names of other tools for the fields of a format: where more rows have these than ours. A name that
# stands beside ours in a row counts only where the others alone fit fewer rows.
ALIASES: tuple[dict[str, str], ...] = (
    {"conversations": "conversation"},
    {"messages": "contents"},
    {"instruction": "query", "output": "response"},
)
# what they call an alpaca row's input, where the file has none of ours; first the likelier
INPUTS = ("context", "query")


def detect(record: Mapping[str, Any], fields: Fields) -> str | None:
    """The format whose required fields the row has; None when it has those of none."""
    return next((name for name in FORMATS if _fits(record, name, fields)), None)


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


def settle(
    records: Sequence[Mapping[str, Any]],
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
    inherited: Collection[str] = (),
) -> tuple[str | None, Fields]:
    """How a file is read: its format, None where none fits, and which fields hold what.

    Args:
        records: its first rows.
        format: a key of FORMATS, or "auto": the rows vote.
        mapping: our field -> theirs. What names a field that no row has, where ours is there, is
            meant for another file.
        inherited: "format" where it is meant for other files too: where no row fits it, they vote.
    """
    mapping = {
        ours: theirs
        for ours, theirs in (mapping or {}).items()
        if stands(theirs, records) or not stands(ours, records)
    }
    fields = Fields(mapping)
    if format == "auto" and mapping:
        # a mapping that names all that a format needs chooses it
        format = detect(dict.fromkeys(mapping, True), Fields()) or format
    holds = "format" not in inherited or not records
    if format != "auto" and (holds or any(_fits(record, format, fields) for record in records)):
        return format, _with_input(fields, records) if format == "alpaca" else fields
    winner, votes = vote(records, fields)
    for alias in ALIASES:
        known = {ours: theirs for ours, theirs in alias.items() if stands(theirs, records)}
        alone = {
            ours: theirs
            for ours, theirs in known.items()
            if not any(_has(record, ours) and _has(record, theirs) for record in records)
        }
        for names in (alone, known):
            if not names:
                continue
            other = Fields({**names, **mapping})
            named, more = vote(records, other)
            if named and more[named] > (votes[winner] if winner else 0):
                winner, votes, fields = named, more, other
    return winner, _with_input(fields, records) if winner == "alpaca" else fields


def _has(record: Mapping[str, Any], name: str) -> bool:
    return record.get(name) is not None


def _with_input(fields: Fields, records: Sequence[Mapping[str, Any]]) -> Fields:
    """The fields of alpaca rows with their input under the name of another tool, where they have
    none under ours: without it the answers would be learned to half of the question.
    """
    if "input" in fields.mapping or any(_has(record, "input") for record in records):
        return fields
    told = set(fields.named) | {fields.name(ours) for ours in FORMATS["alpaca"][0]}
    for theirs in INPUTS:
        if theirs not in told and any(_has(record, theirs) for record in records):
            return Fields({**fields.mapping, "input": theirs})
    return fields


def _fits(record: Mapping[str, Any], format: str, fields: Fields) -> bool:
    missing = [field for field in FORMATS[format][0] if fields.get(record, field) is None]
    # of tokens a mask says as much as labels
    return not missing or (missing == ["labels"] and bool(tokens.masks(record)))


def stands(name: str, records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a row has the field, or a turn of it."""
    return any(
        name in record
        or any(
            isinstance(turn, dict) and name in turn
            for turns in record.values()
            if isinstance(turns, list)
            for turn in turns
        )
        for record in records
    )


def convert(record: Mapping[str, Any], format: str, fields: Fields) -> Content:
    """The messages of a record. Raises RowFault."""
    _, converter = FORMATS[format]
    if held := media(record, fields.named):
        raise RowFault("not-text", f"the field {held!r} has something in it")
    if judged := preference(record, fields.named):
        raise RowFault("preference", judged)
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
