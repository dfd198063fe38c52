"""What an assistant's turn says, and whether a text holds it: its content, each call's name and
arguments, its reasoning.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gradsift.data.chat.pieces import split_thought
from gradsift.data.chat.turns import REASONING, parsed


@dataclass(slots=True)
class Lost:
    """What of a turn is not in a text. `found`: whether anything of it is."""

    content: bool = False
    reasoning: bool = False
    calls: list[str] = field(default_factory=list)
    found: bool = False


@dataclass(frozen=True, slots=True)
class _Part:
    """One text that has to be found; `call` is the index of the call it belongs to."""

    kind: Literal["content", "reasoning", "call"]
    text: str
    call: int = -1
    scalar: Any = None


def lost_of(turn: Mapping[str, Any], text: str) -> Lost:
    """Compares what `turn`, as the template got it, says with `text`.

    A part counts once: two equal calls have to stand there twice. Escapes of JSON and HTML and
    other white space are allowed, since templates write them.
    """
    parts = list(_parts(turn))
    lost, rest, missing = Lost(), text, set()
    # The longest first: a short text may stand inside a long one.
    for part in sorted(parts, key=lambda part: -len(part.text)):
        left = _without(rest, part)
        if left is None and part.kind == "content":
            # Templates put reasoning that stands in the content elsewhere, or drop it.
            thought, answer = split_thought(part.text)
            if answer != part.text and answer.strip():
                left = _without(rest, _Part("content", answer.strip()))
            if left is not None and thought:
                rest, left = left, _without(left, _Part("reasoning", thought))
                lost.reasoning |= left is None
                left = rest if left is None else left
        if left is not None:
            lost.found, rest = True, left
        elif part.kind == "reasoning":
            lost.reasoning = True
        elif part.kind == "content":
            lost.content = True
        else:
            missing.add(part.call)
    lost.calls = [_name(call) for k, call in enumerate(_calls(turn)) if k in missing]
    return lost


def holds(text: str, part: str) -> bool:
    """Whether `part` stands in `text`, in whatever escapes."""
    return not part.strip() or _without(text, _Part("content", part.strip())) is not None


def written_as_python(turn: Mapping[str, Any], text: str) -> bool:
    """Whether a call's arguments stand in the text as Python prints them: the template was written
    for arguments that are texts.
    """
    return any(
        isinstance(arguments := _function(call).get("arguments"), Mapping)
        and len(arguments) > 0
        and repr(arguments) in text
        and json.dumps(arguments, ensure_ascii=False) not in text
        for call in _calls(turn)
    )


def _calls(turn: Mapping[str, Any]) -> list[Any]:
    calls = turn.get("tool_calls")
    return list(calls) if isinstance(calls, (list, tuple)) else []


def _function(call: Any) -> Mapping[str, Any]:
    if not isinstance(call, Mapping):
        return {}
    function = call.get("function", call)
    return function if isinstance(function, Mapping) else {}


def _name(call: Any) -> str:
    return str(_function(call).get("name"))


def _parts(turn: Mapping[str, Any]) -> Iterator[_Part]:
    content = (turn.get("content") or "").strip()
    if content:
        yield _Part("content", content)
    thought = next((turn[key] for key in REASONING if turn.get(key) is not None), None)
    for text in _texts(thought):
        if text.strip():
            yield _Part("reasoning", text.strip())
    for k, call in enumerate(_calls(turn)):
        function = _function(call)
        if function.get("name"):
            yield _Part("call", str(function["name"]), k)
        arguments = parsed(function.get("arguments"))
        for leaf in _leaves(arguments):
            if isinstance(leaf, str):
                if leaf.strip():
                    yield _Part("call", leaf.strip(), k)
            else:
                yield _Part("call", json.dumps(leaf), k, leaf)


def _texts(value: Any) -> Iterator[str]:
    return (leaf for leaf in _leaves(value, keys=False) if isinstance(leaf, str))


def _leaves(value: Any, keys: bool = True) -> Iterator[Any]:
    """Keys and values at any depth. A null is as good as a field that is left out."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if item is not None:
                if keys:
                    yield str(key)
                yield from _leaves(item, keys)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item, keys)
    elif value is not None:
        yield value


def _without(text: str, part: _Part) -> str | None:
    """The text with one occurrence of the part taken out; None where it has none."""
    words = part.kind == "call"
    for form in _forms(part):
        if not words:
            at = text.find(form)
        else:  # "a" in "rain" is no argument
            before = r"(?<!\w)" if form[:1].isalnum() else ""
            after = r"(?!\w)" if form[-1:].isalnum() else ""
            found = re.search(before + re.escape(form) + after, text) if form in text else None
            at = found.start() if found else -1
        if at >= 0:
            return text[:at] + "\0" + text[at + len(form) :]
    if not words or len(part.text) > 20:  # white space within longer texts may be laid out anew
        for form in _forms(part):
            if "".join(form.split()) in "".join(text.split()):
                return text
    return None


def _forms(part: _Part) -> Iterator[str]:
    """The ways in which templates write a text."""
    text = part.text
    yield text
    if part.scalar is not None:
        yield str(part.scalar)
        return
    plain, ascii_only = json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]
    for form in (
        plain,
        ascii_only,
        html.escape(text, quote=False),
        html.escape(text),
        html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;"),
        repr(text)[1:-1],
        json.dumps(plain, ensure_ascii=False)[1:-1],
        json.dumps(ascii_only)[1:-1],
        text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    ):
        if form != text:
            yield form
