"""Shapes of conversations whose every text is a word of its own, so that a test can say exactly
which words are learned.

Words: s system, u user, a answer, r reasoning, f the name of a function, k and v a key and a value
of its arguments, t the result of a call, w an answer that is not to be learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"f{n}word",
            "description": "no text of a turn",
            "parameters": {"type": "object", "properties": {"p": {"type": "string"}}},
        },
    }
    for n in (1, 2)
]


def word(name: str) -> str:
    return f"{name}word"


def call(n: int = 1, form: str = "object", key: str = "abcdefghi") -> dict[str, Any]:
    arguments: Any = {word(f"k{n}"): word(f"v{n}")}
    if form == "text":
        arguments = json.dumps(arguments)
    function = {"name": word(f"f{n}"), "arguments": arguments}
    return {"id": key, "type": "function", "function": function}


def turn(role: str, said: str | None, /, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": None if said is None else word(said), **more}


def result(n: int = 1) -> dict[str, Any]:
    return turn("tool", f"t{n}", tool_call_id="abcdefghi", name=word(f"f{n}"))


S, U1, A1, U2, A2 = (
    turn("system", "s1"),
    turn("user", "u1"),
    turn("assistant", "a1"),
    turn("user", "u2"),
    turn("assistant", "a2"),
)
CALL = turn("assistant", None, tool_calls=[call()])


def thought(r: str, a: str) -> str:
    return f"<think>\n{word(r)}\n</think>\n\n{word(a)}"


def _said(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


SHAPES: Mapping[str, dict[str, Any]] = {
    "single": _said(U1, A1),
    "system": _said(S, U1, A1),
    "developer": _said(turn("developer", "s1"), U1, A1),
    "two turns": _said(U1, A1, U2, A2),
    "three turns": _said(S, U1, A1, U2, A2, turn("user", "u3"), turn("assistant", "a3")),
    "user at the end": _said(U1, A1, U2),
    "first not learned": _said(U1, turn("assistant", "w1", weight=0), U2, A2),
    "last not learned": _said(U1, A1, U2, turn("assistant", "w2", train=False)),
    "assistant first": _said(A1, U2, A2),
    "two answers": _said(U1, A1, A2),
    "two questions": _said(U1, U2, A2),
    "text in parts": _said(
        {"role": "user", "content": [{"type": "text", "text": word("u1")}]},
        {"role": "assistant", "content": [{"type": "text", "text": word("a1")}]},
    ),
    "reasoning": _said(U1, turn("assistant", "a1", reasoning_content=word("r1"))),
    "thinking": _said(U1, turn("assistant", "a1", thinking=word("r1"))),
    "reasoning, two turns": _said(
        U1,
        turn("assistant", "a1", reasoning=word("r1")),
        U2,
        turn("assistant", "a2", reasoning=word("r2")),
    ),
    "tags": _said(U1, {"role": "assistant", "content": thought("r1", "a1")}),
    "tags, two turns": _said(
        U1,
        {"role": "assistant", "content": thought("r1", "a1")},
        U2,
        {"role": "assistant", "content": thought("r2", "a2")},
    ),
    "reasoning, then none": _said(
        U1, turn("assistant", "a1", reasoning_content=word("r1")), U2, A2
    ),
    "call at the end": _said(U1, CALL, tools=TOOLS[:1]),
    "call and answer": _said(U1, CALL, result(), A1, tools=TOOLS[:1]),
    "call as text": _said(
        U1,
        turn("assistant", None, tool_calls=[call(form="text")]),
        result(),
        A1,
        tools=json.dumps(TOOLS[:1]),
    ),
    "call without tools": _said(U1, CALL, result(), A1),
    "two calls": _said(
        U1,
        turn("assistant", None, tool_calls=[call(), call(2, key="bcdefghij")]),
        result(),
        {**result(2), "tool_call_id": "bcdefghij"},
        A1,
        tools=TOOLS,
    ),
    "text beside a call": _said(
        U1, turn("assistant", "a1", tool_calls=[call()]), result(), A2, tools=TOOLS[:1]
    ),
    "reasoning and a call": _said(
        U1,
        turn("assistant", None, tool_calls=[call()], reasoning_content=word("r1")),
        result(),
        A1,
        tools=TOOLS[:1],
    ),
    "calls one after the other": _said(
        U1,
        CALL,
        result(),
        turn("assistant", None, tool_calls=[call(2, key="bcdefghij")]),
        {**result(2), "tool_call_id": "bcdefghij"},
        A1,
        tools=TOOLS,
    ),
    "call, then a turn": _said(S, U1, CALL, result(), A1, U2, A2, tools=TOOLS[:1]),
    "call not learned": _said(
        U1,
        turn("assistant", None, tool_calls=[call(3)], weight=0),
        result(),
        A1,
        tools=TOOLS[:1],
    ),
    "old function call": _said(
        U1,
        turn("assistant", None, function_call=call(form="text")["function"]),
        turn("function", "t1", name=word("f1")),
        A1,
        functions=[TOOLS[0]["function"]],
    ),
    "flat call": _said(
        U1, turn("assistant", "", tool_calls=[call()["function"]]), result(), A1, tools=TOOLS[:1]
    ),
}
SHAPES["flat call"]["messages"][1]["content"] = ""
