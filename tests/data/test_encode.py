"""What the model is shown and what it learns: token for token, for templates of the known
families.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoTokenizer, ByT5Tokenizer

from gradsift.commands.inspect import coloured
from gradsift.compute.batches import pad_batch, token_batches
from gradsift.config import EncodeSettings
from gradsift.data.encode import EncodedRows, encode, tokenizer_identity
from gradsift.data.pool import read_pool
from gradsift.errors import DataError, IntegrityError, UserError
from gradsift.types import Example, Message
from tests.data import chat_templates as chats
from tests.data.chat_templates import Turns, tokenizer

SHARED = Path(
    os.environ.get("GRADSIFT_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared")
)
TWO: Turns = [
    ("user", "What is the capital?"),
    ("assistant", "Paris."),
    ("user", "And 6 * 7?"),
    ("assistant", "42\n"),
]


def example(turns: Turns, **more: Any) -> Example:
    return Example("e", tuple(Message(role, text) for role, text in turns), "g", **more)


def learned(tok: Any, row: dict[str, list[int]]) -> str:
    """The row's text with the learned stretches in braces."""
    out, inside = "", False
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if (label != -100) != inside:
            inside = not inside
            out += "{" if inside else "}"
        out += tok.decode([token])
    return out + ("}" if inside else "")


def one(tok: Any, turns: Turns, **settings: Any) -> dict[str, list[int]]:
    rows = encode([example(turns)], tok, EncodeSettings(**settings))
    assert rows.codes[0] == 0
    return rows[0]


FAMILIES = {
    "chatml": chats.CHATML,
    "llama3": chats.LLAMA3,
    "gemma": chats.GEMMA,
    "mistral": chats.MISTRAL,
    "zephyr": chats.ZEPHYR,
}
WORDS = st.text(st.sampled_from("ab 1.\n\u00e9\u4e2d"), max_size=8).map(lambda text: f"x{text}y")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), trailing=st.booleans())
def test_masks_are_those_of_turns_written_one_by_one(
    family: str, texts: list[tuple[str, str]], trailing: bool
) -> None:
    tok = tokenizer(FAMILIES[family])
    turns = [
        turn for question, answer in texts for turn in (("user", question), ("assistant", answer))
    ]
    pieces = chats.pieces_of(FAMILIES[family], "</s>")(turns)
    text = "".join(piece for piece, _ in pieces)
    at, inside = 0, []
    for piece, is_learned in pieces:
        inside += [is_learned] * len(piece)
        at += len(piece)
    whole = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    expected = [
        token if inside[start] else -100
        for token, (start, _) in zip(whole["input_ids"], whole["offset_mapping"], strict=True)
    ]
    row = one(tok, [*turns, ("user", "and then?")] if trailing else turns)
    assert row["input_ids"] == whole["input_ids"] and row["labels"] == expected
    assert row["input_ids"] == tok.apply_chat_template(
        [{"role": r, "content": t} for r, t in turns], return_dict=False
    )


def test_every_answer_is_learned_with_its_end_of_turn() -> None:
    marked = {
        "chatml": (
            "<|im_start|>user\nWhat is the"
            " capital?<|im_end|>\n<|im_start|>assistant\n{Paris.<|im_end|>}\n<|im_start|>user\nAnd"
            " 6 * 7?<|im_end|>\n<|im_start|>assistant\n{42\n<|im_end|>}\n"
        ),
        "llama3": (
            "<s><|start_header_id|>user<|end_header_id|>\n\nWhat is the capital?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n{Paris.<|eot_id|>}"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd 6 * 7?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n{42<|eot_id|>}"
        ),
        "gemma": (
            "<s><start_of_turn>user\nWhat is the"
            " capital?<end_of_turn>\n<start_of_turn>model\n{Paris.<end_of_turn>}\n<start_of_turn>user\nAnd"
            " 6 * 7?<end_of_turn>\n<start_of_turn>model\n{42<end_of_turn>}\n"
        ),
        "mistral": (
            "<s>[INST] What is the capital? [/INST]{ Paris.</s>}[INST] And 6 * 7? [/INST]{"
            " 42\n</s>}"
        ),
        "zephyr": (
            "<|user|>\nWhat is the capital?</s>\n<|assistant|>\n{Paris.</s>}\n<|user|>\nAnd 6 *"
            " 7?</s>\n<|assistant|>\n{42\n</s>}\n"
        ),
    }
    for family, text in marked.items():
        tok = tokenizer(FAMILIES[family], adds_bos=True)
        assert learned(tok, one(tok, TWO)) == text


@pytest.mark.parametrize("adds_bos", [True, False])
def test_there_is_one_bos_at_most(adds_bos: bool) -> None:
    tok = tokenizer(chats.LLAMA3, adds_bos=adds_bos)
    rows = encode(
        [
            example(TWO),
            example([("prompt", "a"), ("completion", " b")]),
            example([("text", "<s>a")]),
        ],
        tok,
    )
    assert [row["input_ids"].count(tok.bos_token_id) for row in rows] == [1, int(adds_bos), 1]
    doubled = "{{ bos_token }}{{ bos_token }}" + chats.LLAMA3
    row = one(tok, TWO, template=doubled)
    assert row == one(tok, TWO)


def test_a_thinking_template_that_rewrites_earlier_turns() -> None:
    tok = tokenizer(chats.THINKING)
    turns = [
        ("user", "q"),
        ("assistant", "<think>\nhm\n</think>\n\na1"),
        ("user", "r"),
        ("assistant", "a2"),
    ]
    rows = encode([example(turns)], tok)
    assert (
        learned(tok, rows[0])
        == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{a1<|im_end|>}\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n{<think>\n\n</think>\n\na2<|im_end|>}\n"
    )
    assert any("rewrites earlier turns; answers were found" in note for note in rows.notes)
    same_content = [("user", "a"), ("assistant", "a"), ("user", "a"), ("assistant", "a")]
    assert learned(tok, one(tok, same_content)).count("{a<|im_end|>}") == 1


def test_a_prompt_that_opens_what_the_answer_does_not_show() -> None:
    tok = tokenizer(chats.OPENED)
    rows = encode(
        [
            example(
                [
                    ("user", "q"),
                    ("assistant", "<think>\nhm</think>a1"),
                    ("user", "r"),
                    ("assistant", "a2"),
                ]
            )
        ],
        tok,
    )
    assert (
        learned(tok, rows[0]) == "<s><|user|>q<|assistant|>{a1</s>}<|user|>r<|assistant|>{a2</s>}"
    )


def test_generation_marks_are_used_where_prefixes_fail() -> None:
    tok = tokenizer(chats.MARKED)
    rows = encode(
        [
            example(
                [
                    ("user", "q"),
                    ("assistant", "<think>hm</think>a1"),
                    ("user", "r"),
                    ("assistant", "a2"),
                ]
            )
        ],
        tok,
    )
    assert (
        learned(tok, rows[0])
        == "<|user|>\nq</s>\n<|assistant|>\n{a1</s>}\n<|user|>\nr</s>\n<|assistant|>\n{a2</s>}\n"
    )
    assert any("generation marks" in note for note in rows.notes)


def test_a_template_that_cannot_be_followed_is_a_code_not_a_guess() -> None:
    sorted_turns = (
        "{% for m in messages | sort(attribute='content') %}{{ m.role + ': ' + m.content + '\\n'"
        " }}{% endfor %}"
    )
    good = [example([("user", "a"), ("assistant", "b")])] * 30
    rows = encode(
        [*good, example([("user", "b"), ("assistant", "z"), ("user", "c"), ("assistant", "a")])],
        tokenizer(sorted_turns),
    )
    assert rows.codes[:30].sum() == 0 and rows.reasons[int(rows.codes[30])].startswith(
        "template-rewrites"
    )
    assert (
        rows[30] == {"input_ids": [], "labels": []}
        and rows.lengths[30] == 0
        and "turn 2" in rows.details[30]
    )
    assert any("no end-of-turn token" in note for note in rows.notes)


def test_a_refusing_template_costs_only_the_row() -> None:
    tok = tokenizer(chats.GEMMA)
    rows = encode([example(TWO)] * 30 + [example([("system", "s"), *TWO])], tok)
    assert (rows.codes != 0).nonzero()[0].tolist() == [30]
    assert (
        rows.reasons[int(rows.codes[30])].startswith("template-refused")
        and "System role not supported" in rows.details[30]
    )
    with pytest.raises(
        DataError, match=r"2 of 3 rows have nothing to learn.*template-refused.*System role"
    ) as error:
        encode([example([("system", "s"), *TWO])] * 2 + [example(TWO)], tok)
    assert error.value.exit_code == 3


def test_a_conversation_may_begin_with_the_assistant() -> None:
    tok = tokenizer(chats.CHATML)
    assert (
        learned(tok, one(tok, [("assistant", "Hi"), ("user", "q"), ("assistant", "a")]))
        == "<|im_start|>assistant\n{Hi<|im_end|>}\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{a<|im_end|>}\n"
    )


def test_turns_without_weight_are_shown_and_not_learned() -> None:
    tok = tokenizer(chats.CHATML)
    told = (
        Message("user", "q"),
        Message("assistant", "old", {"weight": 0}),
        Message("user", "r"),
        Message("assistant", "new"),
    )
    row = encode([Example("e", told, "g")], tok)[0]
    assert (
        "old" in learned(tok, row)
        and learned(tok, row).count("{") == 1
        and "{new<|im_end|>}" in learned(tok, row)
    )


def test_tools_and_calls_reach_the_template() -> None:
    tok = tokenizer(chats.TOOLS)
    call = {
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    }
    told = (
        Message("user", "q"),
        Message("assistant", "", call),
        Message("tool", "2"),
        Message("assistant", "a"),
    )
    row = encode([Example("e", told, "g", tools=({"name": "add"},))], tok)[0]
    assert (
        learned(tok, row) == '<|im_start|>system\n[{"name":'
        ' "add"}]<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n'
        '{<tool_call>add {"a":'
        " 1}</tool_call><|im_end|>}\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n{a<|im_end|>}\n"
    )


def test_a_token_across_the_border_is_the_prompts() -> None:
    tok = tokenizer(None, adds_bos=True)
    rows = encode([example([("prompt", "the ans"), ("completion", "wer is 42")])], tok)
    pieces = [tok.decode([token]) for token in rows[0]["input_ids"]]
    # one token for " answer", begun by the prompt
    at = next(i for i, piece in enumerate(pieces) if "answer" in piece)
    assert rows[0]["labels"][: at + 1] == [-100] * (at + 1) and all(
        label != -100 for label in rows[0]["labels"][at + 1 :]
    )


def test_plain_rows_end_with_eos_and_use_no_template() -> None:
    tok = tokenizer(chats.CHATML, adds_bos=True)
    rows = encode(
        [
            example([("prompt", "Q: 6 * 7\nA:"), ("completion", " 42")]),
            example([("text", "all of it")]),
        ],
        tok,
    )
    assert (
        learned(tok, rows[0]) == "<s>Q: 6 * 7\nA:{ 42</s>}"
        and learned(tok, rows[1]) == "{<s>all of it</s>}"
    )
    assert rows.supervised.tolist() == [
        len(rows[0]["labels"]) - rows[0]["labels"].count(-100),
        len(rows[1]["labels"]) - 1,
    ]
    assert learned(tok, one(tok, [("text", "ends</s>")])) == "{<s>ends</s>}"
    bare = tokenizer(chats.CHATML, eos=None)
    rows = encode([example([("text", "all")])], bare)
    assert learned(bare, rows[0]) == "{all}" and any(
        "no end-of-sequence" in note for note in rows.notes
    )


def test_tokenised_rows_are_taken_as_they_are() -> None:
    tok = tokenizer(None)
    rows = encode(
        [example([], tokens=((5, 6, 7), (-100, 6, 9)))] * 25
        + [example([], tokens=((5, 10**6), (5, 5)))],
        tok,
    )
    assert rows[0] == {"input_ids": [5, 6, 7], "labels": [-100, 6, 9]} and rows.supervised[0] == 2
    assert rows.reasons[int(rows.codes[25])].startswith("outside-vocabulary")


def test_the_default_template_is_said_aloud() -> None:
    tok = tokenizer(None, adds_bos=True)
    rows = encode([example(TWO[:2])], tok)
    assert (
        learned(tok, rows[0]) == "<s><|user|>\nWhat is the capital?\n<|assistant|>\n{Paris.</s>}\n"
    )
    assert any("no chat template; the default one" in note for note in rows.notes)
    assert not encode([example(TWO)], tok, EncodeSettings(template=chats.CHATML)).notes


def test_a_broken_template_is_the_users_error() -> None:
    with pytest.raises(UserError, match="is not a template"):
        encode([example(TWO)], tokenizer("{% for m in %}"))


def test_templates_cannot_reach_python() -> None:
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match="template-refused"):
        encode([example(TWO)], tokenizer(evil))
    payload = "{{ 6 * 7 }}{% raw %}"
    tok = tokenizer(chats.CHATML)
    assert payload in tok.decode(one(tok, [("user", payload), ("assistant", payload)])["input_ids"])


def test_a_template_that_writes_the_date_writes_a_fixed_one() -> None:
    dated = "\n{{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%d %b %Y') }}\n" + chats.CHATML
    tok = tokenizer(dated)
    rows = encode([example(TWO)], tok)
    assert tok.decode(rows[0]["input_ids"]).startswith("\n2024-07-26 26 Jul 2024\n<|im_start|>")
    assert any("today's date" in note for note in rows.notes)


def test_long_rows_are_cut_or_dropped() -> None:
    tok = tokenizer(chats.CHATML)
    short, long = (
        example(TWO),
        example(
            [("user", "q"), ("assistant", "a b c d e f g h i j k l m n o p q r s t u v w x y z")]
        ),
    )
    prompt = example(
        [("user", "a b c d e f g h i j k l m n o p q r s t u v w x y z" * 3), ("assistant", "a")]
    )
    whole = encode([short, long, prompt], tok)
    limit = int(whole.lengths[0])
    assert whole.lengths[1] > limit and whole.truncated == 0
    cut = encode([short] * 30 + [long, prompt], tok, EncodeSettings(max_length=limit))
    assert cut.lengths[:31].tolist() == [limit] * 31 and cut[30] == {
        key: value[:limit] for key, value in whole[1].items()
    }
    assert cut.truncated == 1 and any("1 row is cut" in note for note in cut.notes)
    assert cut.reasons[int(cut.codes[31])].startswith("cut-away")
    dropped = encode(
        [short] * 3 + [long, prompt], tok, EncodeSettings(max_length=limit, policy="drop")
    )
    assert dropped.codes.tolist()[:3] == [0, 0, 0] and dropped.truncated == 0
    assert [dropped.reasons[int(code)].partition(":")[0] for code in dropped.codes[3:]] == [
        "too-long"
    ] * 2
    with pytest.raises(DataError, match="cut-away"):
        encode([short, prompt], tok, EncodeSettings(max_length=limit))
    with pytest.raises(DataError, match="too-long"):
        encode([long], tok, EncodeSettings(max_length=8, policy="drop"))


def test_tokenizers_without_offsets_give_the_same_masks() -> None:
    tok = ByT5Tokenizer()
    end = "(eos_token if m.role == 'assistant' else '\\n')"
    tok.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + " + end + " }}{% endfor %}"
    )
    rows = encode(
        [
            example([*TWO[:3], ("assistant", "42.")]),
            example([("prompt", "ab"), ("completion", "cd")]),
        ],
        tok,
    )
    text = (
        "user: What is the capital?\n{assistant: Paris.</s>}user: And 6 * 7?\n{assistant: 42.</s>}"
    )
    # This template ignores add_generation_prompt, so the header of the answer belongs to what is
    # learned.
    assert learned(tok, rows[0]) == text
    assert learned(tok, rows[1]) == "ab{cd</s>}"


def test_rows_survive_a_file(tmp_path: Path) -> None:
    tok = tokenizer(chats.GEMMA)
    rows = encode(
        [example(TWO)] * 30 + [example([("system", "s"), *TWO])], tok, EncodeSettings(max_length=20)
    )
    files = rows.save(tmp_path)
    again = EncodedRows.load(tmp_path)
    assert list(files) == ["encoded.safetensors"] and again[:] == rows[:] and len(again) == 31
    for name in ("lengths", "supervised", "codes"):
        assert (
            np.array_equal(getattr(again, name), getattr(rows, name))
            and getattr(again, name).dtype == getattr(rows, name).dtype
        )
    assert (again.truncated, again.notes, again.details) == (30, rows.notes, rows.details)
    assert rows.save(tmp_path) == files
    path = tmp_path / "encoded.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        EncodedRows.load(tmp_path)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    tok = tokenizer(chats.CHATML)
    rng = np.random.default_rng(0)
    rows = [
        example([("user", "q" * int(k)), ("assistant", "a b " * int(k + 1))])
        for k in rng.integers(0, 9, 2100)
    ]
    together = encode(rows, tok)
    for i in (0, 999, 1000, 2099):
        assert together[i] == encode([rows[i]], tok)[0]


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 120))
def test_token_batches(lengths: list[int], budget: int) -> None:
    batches = token_batches(np.array(lengths, dtype=np.int32), budget)
    order = [int(i) for batch in batches for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: (-max(lengths[i], 1), i))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    assert padded(batches, lengths, budget) <= padded(greedy(lengths, budget), lengths, budget)


def padded(batches: list[np.ndarray], lengths: list[int], budget: int) -> int:
    return sum(len(batch) * max(lengths[batch[0]], 1) + max(1, budget // 25) for batch in batches)


def greedy(lengths: list[int], budget: int) -> list[np.ndarray]:
    """As many rows as fit, again and again."""
    left, batches = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    while left:
        rows = max(1, budget // max(lengths[left[0]], 1))
        batches.append(np.array(left[:rows]))
        left = left[rows:]
    return batches


def test_short_rows_are_not_padded_to_a_long_one() -> None:
    lengths = [1000] + [100] * 10
    assert [len(batch) for batch in token_batches(lengths, 2048)] == [1, 10]
    assert sum(len(b) * 1000 for b in greedy(lengths, 2048)[:1]) == 2000


def test_pad_batch() -> None:
    ids, mask, labels = pad_batch(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}],
        pad_id=9,
    )
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert ids.dtype == mask.dtype == labels.dtype == torch.int64


def test_the_identity_tells_what_changes_tokens() -> None:
    base, settings = tokenizer(chats.CHATML), EncodeSettings()
    first = tokenizer_identity(base, settings)
    base(["a", "bb"], padding=True, truncation=True, max_length=1)
    assert (
        tokenizer_identity(base, settings)
        == first
        == tokenizer_identity(tokenizer(chats.CHATML), settings)
    )
    others = [
        tokenizer_identity(tokenizer(chats.LLAMA3), settings),
        tokenizer_identity(base, EncodeSettings(template=chats.GEMMA)),
        tokenizer_identity(tokenizer(chats.CHATML, adds_bos=True), settings),
        tokenizer_identity(tokenizer(chats.CHATML, eos="<|im_end|>"), settings),
        tokenizer_identity(tokenizer(None), settings),
    ]
    assert all(other != first for other in others) and len({repr(other) for other in others}) == 5


def test_coloured_rows_cannot_steer_a_terminal() -> None:
    tok = tokenizer(chats.CHATML)
    shown = coloured(one(tok, [("user", "[red]\x1b[31mq\x9b"), ("assistant", "a\u00e9")]), tok)
    assert (
        shown.plain
        == "<|im_start|>user\n[red]\u241b[31mq\u2421<|im_end|>\n<|im_start|>assistant\na\u00e9<|im_end|>\n"
    )
    assert [(shown.plain[span.start : span.end], str(span.style)) for span in shown.spans][-3:] == [
        ("a\u00e9", "green"),
        ("<|im_end|>", "bold green"),
        ("\n", "dim"),
    ]
    console = Console(force_terminal=True, width=80)
    with console.capture() as capture:
        console.print(shown)
    assert "\x1b[31mq" not in capture.get()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the checkout")
def test_the_shared_model_marks_the_same_tokens() -> None:
    tok = AutoTokenizer.from_pretrained(SHARED / "models" / "tiny-lm")
    pool = read_pool([SHARED / "data" / "sample.jsonl"])
    rows = encode(pool, tok, EncodeSettings(max_length=200))
    for i, row in enumerate(rows):
        chat = [{"role": m.role, "content": m.content} for m in pool[i].messages]
        told = tok.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
        expected = [
            token if keep else -100
            for token, keep in zip(told["input_ids"], told["assistant_masks"], strict=True)
        ]
        if rows.codes[i] == 0:
            assert row == {"input_ids": told["input_ids"][:200], "labels": expected[:200]}
    assert (rows.codes == 0).mean() > 0.95
