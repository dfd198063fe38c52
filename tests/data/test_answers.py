"""What assistants say and templates leave out: found again, set aside by name, or counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradsift.config import EncodeSettings
from gradsift.data.chat.said import holds, lost_of
from gradsift.data.encode import encode
from gradsift.data.formats import Fields, convert
from gradsift.data.pool import read_pool
from gradsift.types import Example, Message
from tests.data import chat_templates as chats
from tests.data.chat_templates import tokenizer
from tests.data.families import FAMILIES
from tests.data.test_encode import learned

NASTY = {"path": 'C:\\"new"\n<dir> & Zürich', "n": 3, "deep": {"list": [True, None, "in"]}}


def calling(arguments: Any, content: str = "", name: str = "open") -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def chat(*turns: dict[str, Any], **more: Any) -> Example:
    content = convert({"messages": list(turns), **more}, "messages", Fields())
    return Example("row", content.messages, "g", content.tools)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    "text",
    [
        f"<call>open {json.dumps(NASTY, ensure_ascii=False)}</call>",
        f"open({json.dumps(NASTY, ensure_ascii=True, separators=(',', ':'))})",
        f"{json.dumps(NASTY, indent=4, sort_keys=True)} open",
        "open <arg>path</arg>C:\\&#34;new&#34;\n&lt;dir&gt; &amp; Zürich<arg>n</arg>3"
        "<arg>deep</arg>{'list': [True, None, 'in']}",
        json.dumps({"name": "open", "arguments": json.dumps(NASTY)}),
    ],
)
def test_arguments_are_found_in_every_escape(text: str) -> None:
    lost = lost_of(calling(NASTY), text)
    assert lost.found and not lost.calls
    assert lost_of(calling(json.dumps(NASTY)), text).calls == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("<call></call>", ["open"]),
        ('<call>{"path": "x"}</call>', ["open"]),
        ('<call>open {"path": "y"}</call>', ["open"]),
        ('<call>opened {"path": "x"}</call>', ["open"]),
        ('<call>open {"path": "xylophone"}</call>', ["open"]),
        ('<call>open {"path": "x"}</call>', []),
    ],
)
def test_a_lost_name_key_or_value_is_a_lost_call(text: str, missing: list[str]) -> None:
    assert lost_of(calling({"path": "x"}), text).calls == missing


def test_equal_calls_have_to_stand_there_twice() -> None:
    turn = calling({"path": "x"})
    turn["tool_calls"] = turn["tool_calls"] * 2
    once = '<call>open {"path": "x"}</call>'
    assert lost_of(turn, once).calls == ["open"] and lost_of(turn, once * 2).calls == []


def test_text_beside_a_call_and_reasoning_are_told_apart() -> None:
    turn = {**calling({"a": 1}, content="I open it."), "reasoning_content": "Open it, then."}
    lost = lost_of(turn, 'open {"a": 1}')
    assert (lost.content, lost.reasoning, lost.calls, lost.found) == (True, True, [], True)
    lost = lost_of(turn, 'Open it, then. I  open\nit. open {"a": 1}')
    assert (lost.content, lost.reasoning, lost.calls) == (False, False, [])
    inline = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    assert lost_of(inline, "yes").reasoning and not lost_of(inline, "yes").content
    assert not lost_of(inline, "<think>hm</think>yes").reasoning
    empty = {"role": "assistant", "content": "<think>\n\n</think>\n\nyes"}
    assert not lost_of(empty, "yes").reasoning and not lost_of({"content": " "}, "<end>").found
    assert holds("a &lt;b&gt;", "<b>") and not holds("a", "b")


def test_a_lost_call_is_quarantined_with_file_line_and_reason(tmp_path: Path) -> None:
    good = {"messages": [user("q"), {"role": "assistant", "content": "a"}]}
    bad = {"messages": [user("q"), calling({"city": "Oslo"}, name="weather")]}
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [good] * 30 + [bad]))
    pool = read_pool([path])
    rows = encode(pool, tokenizer(chats.CHATML))
    assert rows.funnel() == {"not encoded:answer-lost": 1}
    (dropped,) = rows.dropped(pool)
    assert (dropped.line, dropped.code) == (31, "answer-lost") and dropped.file == str(path)
    assert "the call of weather" in dropped.reason and "--tool-calls text" in dropped.fix


def test_calls_as_text_are_learned_where_the_template_knows_none() -> None:
    row = chat(
        user("q"),
        calling('{"city": "Oslo"}', content="I look.", name="weather"),
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "rain"},
    )
    tok, settings = tokenizer(chats.CHATML), EncodeSettings(tool_calls="text")
    text = learned(tok, encode([row], tok, settings)[0])
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert f"{{I look.\n{call}<|im_end|>}}" in text and "{rain<|im_end|>}" in text
    assert "<|im_start|>tool\n12<|im_end|>" in text
    # a template that has no turn for results gets them as a user's
    gemma = tokenizer(chats.GEMMA)
    rows = encode([row], gemma, settings)
    assert "<start_of_turn>user\n12<end_of_turn>" in learned(gemma, rows[0])
    assert any("no turn for the results" in note for note in rows.notes)


def test_the_system_text_may_go_to_the_first_user_turn() -> None:
    system = {"role": "system", "content": "Be brief."}
    row = chat(system, user("q"), {"role": "assistant", "content": "a"})
    tok = tokenizer(chats.GEMMA)
    rows = encode([row], tok, EncodeSettings(system="user"))
    assert (
        learned(tok, rows[0]) == "<s><start_of_turn>user\nBe brief.\n\nq<end_of_turn>\n"
        "<start_of_turn>model\n{a<end_of_turn>}\n"
    )
    refused = encode([row], tok, strict=False)
    assert "--system user" in refused.reasons[int(refused.codes[0])]


def test_what_a_template_leaves_out_is_counted_with_its_first_row() -> None:
    row = chat(
        {"role": "system", "content": "Be brief."},
        user("q"),
        {"role": "assistant", "content": "a", "reasoning": "hm"},
        tools=[{"type": "function", "function": {"name": "weather"}}],
    )
    only = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + ':\n' + m.content +"
        " eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    notes = encode([row], tokenizer(only)).notes
    for told in ("reasoning of learned turns", "the list of tools", "system texts"):
        assert any(told in note for note in notes), notes
    assert any("row 'row', turn 3" in note for note in notes if "reasoning" in note)


@pytest.mark.parametrize("family", ["chatml", "phi3", "qwen3.5-nothink", "mistral-v3", "gpt-oss"])
def test_long_conversations_are_learned_as_short_ones_are(family: str) -> None:
    turns = [Message(role, f"{role} {n}") for n in range(30) for role in ("user", "assistant")]
    long = Example("long", tuple(turns), "g")
    tok = tokenizer(FAMILIES[family].template)
    whole = encode([long], tok, EncodeSettings(max_length=8192))[0]
    text = learned(tok, whole)
    assert all(f"assistant {n}" in text for n in range(30)) and text.count("{") == 30
    cut = encode([long], tok, EncodeSettings(max_length=300))[0]
    assert cut == {key: value[:300] for key, value in whole.items()}


def test_an_answer_that_is_one_token_with_the_prompt_is_no_answer() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ' the ' if m.role == 'user' else 'ans' }}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}ans{% endif %}"
    )
    row = Example("e", (Message("user", "q: "), Message("assistant", "wer")), "g")
    rows = encode([row], tokenizer(template), strict=False)
    assert rows.reasons[int(rows.codes[0])].startswith(("answer-lost", "no-supervised"))


def test_old_calls_are_read_as_calls() -> None:
    function = {"name": "add", "arguments": '{"a": 1}'}
    old = chat(
        user("q"),
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "add", "content": "1"},
        {"role": "assistant", "content": "one"},
        functions=[{"name": "add", "parameters": {}}],
    )
    call = {"type": "function", "function": function}
    assert old.messages[1].extra == {"tool_calls": [call]} and old.messages[2].role == "tool"
    assert old.tools == ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    lines = "\n".join(json.dumps({"name": name, "arguments": {}}) for name in ("a", "b"))
    told = convert(
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": lines},
            ]
        },
        "sharegpt",
        Fields(),
    )
    calls = (told.messages[1].extra or {})["tool_calls"]
    assert [made["function"]["name"] for made in calls] == ["a", "b"]
