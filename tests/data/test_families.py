"""Templates of the families x shapes of conversations: learned is exactly what the assistant says,
its calls, its reasoning and its end of turn, or the row is set aside or counted by name.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

import pytest

from gradsift.config import EncodeSettings
from gradsift.data import encode as encoding
from gradsift.data.encode import encode
from gradsift.data.formats import Fields, convert, supervised
from gradsift.types import Example
from tests.data.chat_templates import tokenizer
from tests.data.families import FAMILIES, Family
from tests.data.shapes import SHAPES

WORD = re.compile(r"[suarfkvtw]\d(?=word)")


@functools.cache
def shared_tokenizer() -> Any:
    tok = tokenizer(None)
    markers = sorted(
        {
            marker
            for family in FAMILIES.values()
            for marker in re.findall(r"<\|[^|<>' ]+\|>", family.template)
        }
    )
    tok.add_tokens(markers, special_tokens=True)
    return tok


def row_of(shape: str) -> Example:
    content = convert(SHAPES[shape], "messages", Fields())
    return Example(shape, content.messages, "g", content.tools)


def wanted(example: Example) -> Counter[str]:
    """The words that learned turns say."""
    said = [f"{m.content} {m.extra}" for m in example.messages if supervised(m)]
    return Counter(WORD.findall(" ".join(said).replace("abcdefghi", "")))


def stretches(tok: Any, row: dict[str, list[int]]) -> list[tuple[str, str]]:
    """(all the text before, the text) of each learned stretch."""
    found: list[tuple[str, str]] = []
    inside = False
    for at, label in enumerate(row["labels"]):
        if label != -100 and not inside:
            found.append((tok.decode(row["input_ids"][:at]), ""))
        if label != -100:
            before, text = found[-1]
            found[-1] = before, text + tok.decode([label])
        inside = label != -100
    return found


def outcome(name: str, shape: str) -> str:
    """ "right", "aside: the code", "counted: the names" or what is wrong."""
    family, tok, row = FAMILIES[name], shared_tokenizer(), row_of(shape)
    rows = encode([row], tok, EncodeSettings(template=family.template), strict=False)
    if rows.codes[0]:
        return "aside: " + rows.reasons[int(rows.codes[0])].partition(":")[0]
    counted = [
        key
        for key, note in encoding.NOTES.items()
        if key.endswith("lost") and any(note.partition("(the")[0] in told for told in rows.notes)
    ]
    found = stretches(tok, rows[0])
    learned = Counter(WORD.findall(" ".join(text for _, text in found)))
    faults = []
    missing, more = wanted(row) - learned, learned - wanted(row)
    if "reasoning lost" in counted:
        missing = Counter({word: n for word, n in missing.items() if word[0] != "r"})
    if missing or more:
        faults.append(f"missing {sorted(missing)}, too much {sorted(more)}")
    faults += list(edges(family, found))
    if faults:
        return "; ".join(faults)
    return "counted: " + ", ".join(counted) if counted else "right"


def edges(family: Family, found: list[tuple[str, str]]):
    for before, text in found:
        if not before.rstrip(" ").endswith(tuple(h.rstrip(" ") for h in family.header)):
            yield f"begins behind {before[-30:]!r}"
        if not text.rstrip().endswith(family.ends):
            yield f"ends with {text[-30:]!r}"
        if any(mark in text for mark in family.foreign):
            yield f"another role in {text!r}"
        if not family.again and any(
            len(h) > 4 and h in text for h in family.header if "/" not in h
        ):
            yield f"its header in {text!r}"


# family -> (cells that are right, that are set aside, whose loss is counted)
EXPECTED: dict[str, tuple[int, int, int]] = {
    "chatml": (14, 11, 5),
    "hermes": (25, 0, 5),
    "qwen2.5": (25, 0, 5),
    "qwen3": (27, 0, 3),
    "qwen3-instruct": (25, 0, 5),
    "qwen3.5-think": (27, 0, 3),
    "qwen3.5-nothink": (27, 0, 3),
    "qwen3-coder": (25, 0, 5),
    "smollm2": (14, 11, 5),
    "smollm3": (15, 11, 4),
    "minicpm": (13, 11, 6),
    "internlm": (24, 0, 6),
    "lfm2": (13, 11, 6),
    "nemotron": (30, 0, 0),
    "marked": (14, 11, 5),
    "marked-parts": (30, 0, 0),
    "llama3": (14, 11, 5),
    "llama3.1": (23, 2, 5),
    "llama3.2": (25, 0, 5),
    "llama2": (10, 16, 4),
    "mistral-v1": (11, 15, 4),
    "mistral-v3": (23, 1, 6),
    "mistral-v7": (25, 0, 5),
    "mistral-v13": (30, 0, 0),
    "phi3": (14, 11, 5),
    "phi3.5": (14, 11, 5),
    "phi4": (14, 11, 5),
    "phi4-mini": (15, 11, 4),
    "zephyr": (14, 11, 5),
    "olmo2": (14, 11, 5),
    "falcon3": (24, 0, 6),
    "granite3": (25, 0, 5),
    "granite4": (25, 0, 5),
    "seed-oss": (29, 0, 1),
    "minimax": (27, 0, 3),
    "kimi-k2": (25, 0, 5),
    "kimi-thinking": (27, 0, 3),
    "gemma1": (8, 18, 4),
    "gemma2": (12, 13, 5),
    "gemma3": (10, 16, 4),
    "functiongemma": (25, 0, 5),
    "gemma4": (25, 0, 5),
    "deepseek-v2": (14, 11, 5),
    "deepseek-v3": (24, 0, 6),
    "deepseek-r1": (22, 0, 8),
    "r1-distill": (22, 0, 8),
    "deepseek-v3.1": (22, 0, 8),
    "glm4": (24, 1, 5),
    "glm4.5": (27, 0, 3),
    "gpt-oss": (25, 2, 3),
    "command-r": (14, 11, 5),
    "command-r7b": (25, 1, 4),
    "command-a": (27, 1, 2),
    "vicuna": (14, 11, 5),
    "instruction": (14, 11, 5),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_learned_is_what_the_assistant_says(name: str) -> None:
    found = {shape: outcome(name, shape) for shape in SHAPES}
    kinds = Counter(text.partition(":")[0] for text in found.values())
    assert set(kinds) <= {"right", "aside", "counted"}, found
    assert (kinds["right"], kinds["aside"], kinds["counted"]) == EXPECTED[name], found
