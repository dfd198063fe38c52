"""One row at a time: bytes to records, records to messages, and a code for everything that is wrong
with either.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.data.formats import (
    FAULTS,
    FORMATS,
    MAX_DEPTH,
    Fields,
    RowFault,
    check_strings,
    convert,
    detect,
    parse_row,
    supervised,
    vote,
)
from gradsift.types import Message

PLAIN = Fields()


def code_of(line: bytes) -> str:
    with pytest.raises(RowFault) as fault:
        parse_row(line)
    assert fault.value.fix == FAULTS[fault.value.code]
    return fault.value.code


@pytest.mark.parametrize(
    "line, code",
    [
        (b'{"a": 1', "bad-json"),
        (b'{"a": 1} {"b": 2}', "bad-json"),
        (b"{'a': 1}", "bad-json"),
        (b'{"a": "\xff"}', "not-utf8"),
        (b'{"a": "\xed\xa0\x80"}', "not-utf8"),
        (b'{"a": "x\0"}', "nul"),
        (b"\0\0\0\0", "nul"),
        (b'{"a": "x\\u0000"}', "nul"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": ["\\uDC00x"]}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'{"a": NaN}', "nan"),
        (b'{"a": [-Infinity]}', "nan"),
        (b'{"a": 1, "a": 1}', "duplicate-key"),
        (b'{"a": {"b": 1, "b": 2}}', "duplicate-key"),
        (b"[" * 100_000 + b"]" * 100_000, "too-deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too-deep"),
        (b'{"a": ' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}", "too-deep"),
        (b"[1]", "not-object"),
        (b'"text"', "not-object"),
        (b"null", "not-object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "bad-json"),
    ],
)
def test_bad_bytes_have_a_code(line: bytes, code: str) -> None:
    assert code_of(line) == code


def test_what_only_looks_bad_is_read() -> None:
    assert parse_row(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    assert parse_row(b'{"a": "\\\\u0000"}') == {"a": "\\u0000"}
    assert parse_row(b'{"a": "' + b"[" * 500 + b'"}') == {"a": "[" * 500}
    assert parse_row('{"a": "\u2028"}\r'.encode()) == {"a": "\u2028"}
    deep = b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
    assert "a" in parse_row(deep)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_record_or_a_fault(line: bytes) -> None:
    found = parsed(line)
    assert isinstance(found, dict) or found in FAULTS


def parsed(line: bytes) -> object:
    try:
        return parse_row(line)
    except RowFault as fault:
        return fault.code


LEAVES = st.none() | st.booleans() | st.integers() | st.text()


@pytest.mark.slow
@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_comes_back_as_the_standard_reader_has_it(value: object) -> None:
    assert parsed(json.dumps({"v": value}).encode()) in ({"v": value}, "nul", "surrogate")


def test_check_strings_sees_keys_and_values() -> None:
    for record in ({"a": [{"b\0": 1}]}, {"a": {"b": ["\0"]}}):
        with pytest.raises(RowFault, match="NUL"):
            check_strings(record)


def said(record: dict, format: str, fields: Fields = PLAIN) -> list[tuple[str, str, bool]]:
    return [(m.role, m.content, supervised(m)) for m in convert(record, format, fields).messages]


def test_alpaca() -> None:
    row = {
        "instruction": "Add.",
        "input": "1 1",
        "output": "2",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    assert said(row, "alpaca") == [
        ("system", "Be brief.", False),
        ("user", "Hi", False),
        ("assistant", "Hello", False),
        ("user", "Add.\n\n1 1", False),
        ("assistant", "2", True),
    ]
    for empty in ({"input": ""}, {"input": None}, {}):
        assert said({"instruction": "Add.", "output": "2", **empty}, "alpaca") == [
            ("user", "Add.", False),
            ("assistant", "2", True),
        ]


def test_sharegpt() -> None:
    row = {
        "system": "S",
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "a"},
        ],
    }
    content = convert(row, "sharegpt", PLAIN)
    assert content.tools == ({"name": "add"},)
    call = {
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    }
    assert content.messages == (
        Message("system", "S"),
        Message("user", "q"),
        Message("assistant", "", call),
        Message("tool", "2"),
        Message("assistant", "a"),
    )
    plain = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": "not json"},
        ]
    }
    assert said(plain, "sharegpt")[1] == ("assistant", "not json", True)


def test_messages() -> None:
    row = {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": "x", "weight": 0},
            {"role": "user", "content": "c", "name": "Ann"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "1", "tool_call_id": "t"},
            {"role": "assistant", "content": "y", "tool_calls": None},
        ]
    }
    assert said(row, "messages") == [
        ("user", "ab", False),
        ("assistant", "x", False),
        ("user", "c", False),
        ("assistant", "", True),
        ("tool", "1", False),
        ("assistant", "y", True),
    ]
    found = convert(row, "messages", PLAIN).messages
    assert (
        found[2].extra == {"name": "Ann"}
        and found[4].extra == {"tool_call_id": "t"}
        and found[5].extra is None
    )


def test_prompt_completion() -> None:
    assert said({"prompt": "p", "completion": " c"}, "prompt-completion") == [
        ("prompt", "p", False),
        ("completion", " c", False),
    ]
    chat = {
        "prompt": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "old"},
            {"role": "user", "content": "r"},
        ],
        "completion": [{"role": "assistant", "content": "new"}],
    }
    assert [turn[2] for turn in said(chat, "prompt-completion")] == [False, False, False, True]


def test_text_and_tokenised() -> None:
    assert said({"text": "t"}, "text") == [("text", "t", False)]
    content = convert({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, "tokenised", PLAIN)
    assert content.messages == () and content.tokens == ((1, 2, 3), (-100, 2, 3))


@pytest.mark.parametrize(
    "format, row, code",
    [
        ("messages", {"x": 1}, "missing-field"),
        ("messages", {"messages": "hi"}, "wrong-type"),
        ("messages", {"messages": []}, "no-answer"),
        ("messages", {"messages": [{"role": "user", "content": "q"}]}, "no-answer"),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": " \n"},
                ]
            },
            "no-answer",
        ),
        ("messages", {"messages": ["q"]}, "wrong-type"),
        ("messages", {"messages": [{"role": "wizard", "content": "q"}]}, "unknown-role"),
        ("messages", {"messages": [{"role": "text", "content": "q"}]}, "unknown-role"),
        ("messages", {"messages": [{"role": 3, "content": "q"}]}, "wrong-type"),
        ("messages", {"messages": [{"content": "q"}]}, "missing-field"),
        ("messages", {"messages": [{"role": "user"}]}, "missing-field"),
        ("messages", {"messages": [{"role": "user", "content": 5}]}, "wrong-type"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "not-text",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "a"}], "tools": "not json"},
            "wrong-type",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "a"}], "tools": [1]},
            "wrong-type",
        ),
        ("alpaca", {"instruction": "i"}, "missing-field"),
        ("alpaca", {"instruction": 1, "output": "o"}, "wrong-type"),
        ("alpaca", {"instruction": "i", "output": ""}, "no-answer"),
        ("alpaca", {"instruction": "i", "output": "o", "history": [["q"]]}, "wrong-type"),
        ("prompt-completion", {"prompt": "p", "completion": ""}, "no-answer"),
        (
            "prompt-completion",
            {"prompt": "p", "completion": [{"role": "assistant", "content": "a"}]},
            "wrong-type",
        ),
        ("text", {"text": " "}, "no-answer"),
        ("tokenised", {"input_ids": [1, 2], "labels": [1]}, "wrong-type"),
        ("tokenised", {"input_ids": [1, True], "labels": [1, 2]}, "wrong-type"),
        ("tokenised", {"input_ids": [1, -5], "labels": [1, 2]}, "wrong-type"),
        ("tokenised", {"input_ids": [1, 2], "labels": [1, -100]}, "no-answer"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}]}, "no-answer"),
    ],
)
def test_bad_records_have_a_code(format: str, row: dict, code: str) -> None:
    with pytest.raises(RowFault) as fault:
        convert(row, format, PLAIN)
    assert fault.value.code == code


def test_a_row_of_another_format_is_named() -> None:
    with pytest.raises(RowFault, match="looks like alpaca, but the file was read as messages"):
        convert({"instruction": "i", "output": "o"}, "messages", PLAIN)


def test_a_chat_list_is_preferred_to_the_text_made_from_it() -> None:
    row = {
        "prompt": "p",
        "completion": "c",
        "text": "t",
        "messages": [{"role": "assistant", "content": "a"}],
    }
    assert detect(row, PLAIN) == "messages"
    assert (
        detect({"prompt": "p", "messages": None, "completion": "c"}, PLAIN) == "prompt-completion"
    )
    assert detect({"q": 1}, PLAIN) is None


def test_the_vote_counts_rows() -> None:
    rows = [
        {"text": "t"},
        {"instruction": "i", "output": "o"},
        {"instruction": "i", "output": "o"},
        {"q": 1},
    ]
    assert vote(rows, PLAIN) == ("alpaca", {"alpaca": 2, "text": 1})
    assert vote([{"q": 1}], PLAIN) == (None, {})
    assert (
        vote([{"text": "t"}, {"prompt": "p", "completion": "c"}], PLAIN)[0] == "prompt-completion"
    )


def test_a_mapping_renames_fields_of_rows_and_turns() -> None:
    fields = Fields({"messages": "chat", "role": "who", "content": "says"})
    row = {
        "chat": [{"who": "user", "says": "q"}, {"who": "assistant", "says": "a", "mood": "calm"}]
    }
    assert said(row, "messages", fields) == [("user", "q", False), ("assistant", "a", True)]
    assert convert(row, "messages", fields).messages[1].extra == {"mood": "calm"}
    assert list(FORMATS) == [
        "tokenised",
        "messages",
        "sharegpt",
        "prompt-completion",
        "alpaca",
        "text",
    ]


def test_the_manual_names_every_format_and_code() -> None:
    from gradsift.data.encode import REASONS

    text = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    for name in [*FORMATS, *FAULTS, *[reason.partition(":")[0] for reason in REASONS.values()]]:
        assert f"| {name} |" in text, name


# --- calls, and what stands beside an answer


def chatting(answer: dict, **fields: Any) -> dict:
    return {"messages": [{"role": "user", "content": "q"}, answer], **fields}


def calls_of(row: dict) -> list[tuple[str, Any]]:
    extra = convert(row, "messages", PLAIN).messages[1].extra or {}
    return [
        (call["function"]["name"], call["function"].get("arguments"))
        for call in extra["tool_calls"]
    ]


OSLO = {"place": "Oslo"}


@pytest.mark.parametrize("name", ["arguments", "parameters", "args", "input"])
@pytest.mark.parametrize("key", ["tool_calls", "toolCalls", "tool_call", "function_call"])
def test_arguments_are_read_under_every_name(name: str, key: str) -> None:
    inside = {"function": {"name": "find", name: OSLO}, "id": "1"}
    for call in (
        {"name": "find", name: OSLO, "id": "1", "type": "tool_call"},
        {"name": "find", "arguments": {}, "parameters": None, name: OSLO},
        {"function": {"name": "find"}, name: OSLO},
        {"function": {"name": "find", "arguments": {}}, name: OSLO},
        inside,
    ):
        for told in (call, [call], json.dumps([call])):
            row = chatting({"role": "assistant", "content": None, key: told})
            assert calls_of(row) == [("find", OSLO)]
    said = convert(chatting({"role": "assistant", key: [inside]}), "messages", PLAIN).messages[1]
    assert said.extra == {
        "tool_calls": [{"function": {"name": "find", "arguments": OSLO}, "id": "1"}]
    }
    assert calls_of(chatting({"from": "function_call", "value": json.dumps(inside)})) == [
        ("find", OSLO)
    ]


def test_a_call_without_arguments_is_one() -> None:
    for call in ({"name": "stop"}, {"function": {"name": "stop"}, "id": "1", "type": "function"}):
        row = chatting({"role": "assistant", "content": "", "tool_calls": [call]})
        assert calls_of(row) in ([("stop", {})], [("stop", None)])


@pytest.mark.parametrize(
    "extra",
    [
        {"tool_calls": [{"name": "find", "kwargs": OSLO}]},
        {"tool_calls": [{"name": "find", "place": "Oslo"}]},
        {"tool_calls": [{"function": {"name": "find", "place": "Oslo"}}]},
        {"tool_calls": [{"function": {"name": "find"}, "payload": OSLO}]},
        {"tool_calls": [{"tool": "find", "arguments": OSLO}]},
        {"tool_calls": [{"function": "find", "arguments": OSLO}]},
        {"tool_calls": [{"function": {"arguments": OSLO}}]},
        {"tool_calls": [{"name": "find", "arguments": OSLO}, "find(Oslo)"]},
        {"tool_calls": "find(Oslo)"},
        {"function_call": "find(Oslo)"},
        {"toolCalls": ["find"]},
        {
            "tool_calls": [{"name": "find", "arguments": OSLO}],
            "function_call": {"name": "find", "arguments": {}},
        },
    ],
    ids=str,
)
def test_calls_that_cannot_be_read_cost_their_row(extra: dict) -> None:
    row = chatting({"role": "assistant", "content": "I look.", **extra})
    with pytest.raises(RowFault, match=r"turn 2.* calls") as fault:
        convert(row, "messages", PLAIN)
    assert fault.value.code == "wrong-type"
    if "function_call" not in extra:
        row = chatting({"from": "function_call", "value": "{}", **extra})
        with pytest.raises(RowFault, match=r"turn 2.* calls"):
            convert(row, "messages", PLAIN)


def test_the_same_calls_in_two_places_are_one() -> None:
    function = {"name": "find", "arguments": json.dumps(OSLO)}
    call = {"type": "function", "function": function}
    answer = {"role": "assistant", "tool_calls": [call], "function_call": {**function}}
    assert convert(chatting(answer), "messages", PLAIN).messages[1].extra == {"tool_calls": [call]}
    for empty in (None, "", [], "[]", "null"):
        answer = {"role": "assistant", "content": "a", "tool_calls": [call], "toolCalls": empty}
        assert calls_of(chatting(answer)) == [("find", json.dumps(OSLO))]
    with pytest.raises(RowFault, match="no content"):
        convert(chatting({"role": "assistant", "tool_calls": "[]"}), "messages", PLAIN)


def test_a_turn_that_calls_keeps_what_stands_beside() -> None:
    turn = {"from": "function_call", "value": json.dumps({"name": "find", "arguments": OSLO})}
    row = chatting({**turn, "reasoning_content": "Where?", "loss": True})
    assert convert(row, "messages", PLAIN).messages[1].extra == {
        "reasoning_content": "Where?",
        "loss": True,
        "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": OSLO}}],
    }
    with pytest.raises(RowFault, match="'images'"):
        convert(chatting({**turn, "images": ["a.png"]}), "messages", PLAIN)
    row = chatting({"from": "function_call", "value": "find(Oslo)", "thinking": "Where?"})
    said = convert(row, "messages", PLAIN).messages[1]
    assert (said.content, said.extra) == ("find(Oslo)", {"thinking": "Where?"})


@pytest.mark.parametrize("name", ["chosen", "completion", "response", "answer", "output"])
@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_an_answer_beside_a_chat_that_waits_for_it_costs_its_row(name: str, format: str) -> None:
    asked, context = {"from": "human", "value": "q"}, {"from": "gpt", "value": "context"}
    key = "messages" if format == "messages" else "conversations"
    for answer in ("it is", {"from": "gpt", "value": "good"}, [{"from": "gpt", "value": "good"}]):
        for turns in ([asked, context, asked], [asked, context, {"from": "tool", "value": "1"}]):
            row = {key: turns, name: answer, "rejected": None}
            with pytest.raises(RowFault, match=f"'{name}' holds the answer") as fault:
                convert(row, format, PLAIN)
            assert fault.value.code == "no-answer"
        ended = {key: [asked, context], name: answer}
        assert said(ended, format)[-1] == ("assistant", "context", True)
    for empty in (None, "", " ", [], 1):
        row = {key: [asked, context, asked], name: empty}
        assert said(row, format)[-1] == ("user", "q", False)
