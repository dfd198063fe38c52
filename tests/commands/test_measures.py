"""Answers and how they are judged: known texts, and greedy decoding against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradsift.commands.compare.measures import answers, chrf, same_answer, split_answer
from gradsift.commands.compare.request import check_measures
from gradsift.commands.demo.playground import generate
from gradsift.data.encode import encode
from gradsift.errors import UnknownName
from gradsift.model.load import load_model, load_tokenizer
from gradsift.model.tiny import TinySettings, tiny_model
from gradsift.types import Example, Message


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        ("205 + 27 = 232 square feet\n#### 232", "232", True),
        ("232 of 400\n#### 231", "232", False),
        ("so 3 and 4 give 1,232.", "1232", True),
        ("12 in the end", "1", False),
        ("The answer is 10.", "10", True),
        ("The answer is 10 of 12.", "10", True),
        ("-4", "4", False),
        ("no number", "4", False),
        ("E", "E", True),
        ("(E) taste sweet", "E", True),
        ("Every fruit", "E", False),
        ("(A) monkey", "E", False),
        (" Strip  Mall. ", "strip mall", True),
        ("a strip mall", "strip mall", False),
        ("", "valid", False),
    ],
)
def test_an_answer_is_found_where_it_stands(text: str, answer: str, same: bool) -> None:
    assert same_answer(text, answer) is same


def test_measures_come_in_one_order_and_unknown_ones_are_named() -> None:
    assert check_measures(["exact", "loss"]) == ("loss", "exact")
    with pytest.raises(UnknownName, match="exact"):
        check_measures(["exakt"])


def test_chrf_is_100_for_equal_texts() -> None:
    pytest.importorskip("sacrebleu")
    assert chrf("ein Haus am See", "ein Haus am See") == pytest.approx(100)
    assert chrf("xyz", "ein Haus am See") == 0


def test_the_last_turn_is_the_answer() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, -100, 4, 5, -100]}
    assert split_answer(row) == ([1, 2, 3], [4, 5])
    assert split_answer({"input_ids": [1, 2], "labels": [-100, -100]}) == ([], [])


def test_batched_answers_are_those_of_a_plain_greedy_loop(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    settings = TinySettings(hidden=32, layers=2, heads=2, intermediate=64, steps=1, tokens=1024)
    name = str(tiny_model(tmp_path_factory.mktemp("cache"), settings=settings))
    model: Any = load_model(name)
    tokenizer: Any = load_tokenizer(name)
    with torch.no_grad():  # a model that babbles: one that has learnt little writes blanks
        generator = torch.Generator().manual_seed(0)
        for weight in (p for p in model.parameters() if p.ndim == 2):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    examples = [
        Example(str(i), tuple(Message(**m) for m in row["messages"]), "g")
        for i, row in enumerate(generate(0, 100)[:9])
    ]
    rows = list(encode(examples, tokenizer))
    rows.append({"input_ids": [5, 6], "labels": [-100, -100]})
    model.train()
    batched = answers(model, rows, tokenizer, new_tokens=12, token_budget=400)
    assert model.training
    model.eval()
    for row, text in zip(rows, batched, strict=True):
        prompt, turn = split_answer(row)
        made: list[int] = []
        while turn and len(made) < 12:
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([prompt + made])).logits[0, -1].argmax())
            if token in {tokenizer.eos_token_id, turn[-1]}:
                break
            made.append(token)
        assert text == tokenizer.decode(made, skip_special_tokens=True).strip()
    assert any(batched)
    assert batched == answers(model, rows, tokenizer, new_tokens=12, token_budget=1)
