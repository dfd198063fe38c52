"""Turns as a template gets them: calls as objects or texts, reasoning under every name of it, the
system text where the template has room for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradsift.types import Message

REASONING = ("reasoning_content", "thinking", "reasoning")  # the first is what most templates read
RESULTS = ("tool", "function", "ipython")  # roles of the results of calls
_SWITCHES = ("weight", "train")  # of the loss: no business of a template


@dataclass(frozen=True, slots=True)
class Form:
    """How calls are given to a template. arguments: as the object, or as its JSON text, for
    templates that join texts. blank: the content of a turn that only calls, "" or None.
    """

    arguments: str = "object"
    blank: str | None = ""


def template_turns(messages: Sequence[Message], form: Form) -> list[dict[str, Any]]:
    """One dictionary per message, as `apply_chat_template` takes them."""
    return [_template_turn(message, form) for message in messages]


def _template_turn(message: Message, form: Form) -> dict[str, Any]:
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    for key, value in (message.extra or {}).items():
        if key == "tool_calls" and isinstance(value, (list, tuple)):
            value = [_call(call, form) for call in value]
        if key not in _SWITCHES:
            told[key] = value
    if told.get("tool_calls") and not message.content:
        told["content"] = form.blank
    # Data call it by three names and templates read one or two of them.
    thought = next((told[key] for key in REASONING if told.get(key) is not None), None)
    if thought is not None:
        told = {"thinking": thought, **told, "reasoning_content": thought}
    return told


def _call(call: Any, form: Form) -> Any:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    arguments = parsed(call["function"].get("arguments"))
    if form.arguments == "text" and arguments is not None and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if arguments is call["function"].get("arguments"):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}}


def parsed(arguments: Any) -> Any:
    """The object that a JSON text of arguments stands for; anything else as it is. Templates write
    arguments as JSON, and would quote a text once more.
    """
    if isinstance(arguments, str):
        try:
            found = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        if isinstance(found, dict):
            return found
    return arguments


def calls_in_text(message: Message) -> Message:
    """The same turn with its calls as JSON texts in the content, one a line."""
    extra = dict(message.extra or {})
    calls = extra.pop("tool_calls", None)
    if not isinstance(calls, (list, tuple)) or not calls:
        return message
    lines = [message.content] if message.content.strip() else []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else call
        if isinstance(function, Mapping):
            function = {
                "name": function.get("name"),
                "arguments": parsed(function.get("arguments", {})),
            }
        lines.append(json.dumps(function, ensure_ascii=False))
    return Message(message.role, "\n".join(lines), extra or None)


def results_as_user(message: Message) -> Message:
    """The result of a call as a user's turn, for templates that have no turn for results."""
    if message.role not in RESULTS:
        return message
    return Message("user", message.content)


def system_in_user(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same turns with the leading system texts in front of the first user turn's text."""
    count = 0
    while count < len(messages) and messages[count].role in ("system", "developer"):
        count += 1
    first = next((k for k in range(count, len(messages)) if messages[k].role == "user"), None)
    if not count or first is None:
        return tuple(messages)
    told = [message.content for message in (*messages[:count], messages[first]) if message.content]
    user = Message("user", "\n\n".join(told), messages[first].extra)
    return (*messages[count:first], user, *messages[first + 1 :])
