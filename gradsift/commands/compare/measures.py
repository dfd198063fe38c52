"""What a trained model is judged by besides its loss: greedy answers to test rows, compared with
the reference.

Every measure is a number per test row, so that a difference has an interval over rows; the table
shows their mean.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from gradsift.types import IGNORE

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:]|\s|$)")


def same_answer(text: str, answer: str) -> bool:
    """Whether a generated text gives `answer`.

    Looked at is what follows the last `####`, else the last "answer is", else the whole text. A
    numeric answer is compared with the first number after such a mark (the last number of a text
    without one), thousands separators removed; a single letter with the option the text begins with
    ("E", "(E) sweet"); anything else word for word, case, spacing and punctuation at both ends
    ignored.
    """
    tail, marked = _after_mark(text)
    wanted = _plain(answer)
    if _NUMBER.fullmatch(wanted):
        found = _NUMBER.findall(tail)
        return bool(found) and float(found[0 if marked else -1].replace(",", "")) == float(
            wanted.replace(",", "")
        )
    if len(wanted) == 1 and wanted.isalpha():
        letter = _LETTER.match(tail.strip())
        return letter is not None and letter[1].lower() == wanted
    return _plain(tail) == wanted


def _after_mark(text: str) -> tuple[str, bool]:
    for mark in ("####", "answer is"):
        place = text.lower().rfind(mark)
        if place >= 0:
            return text[place + len(mark) :], True
    return text, False


def _plain(text: str) -> str:
    return (
        " ".join(text.casefold().split()).strip(string.punctuation.replace("-", "") + " ")
        or text.strip()
    )


def bleu(text: str, reference: str) -> float:
    import sacrebleu

    return cast(Any, sacrebleu).sentence_bleu(text, [reference]).score


def chrf(text: str, reference: str) -> float:
    import sacrebleu

    return cast(Any, sacrebleu).sentence_chrf(text, [reference]).score


def split_answer(row: Mapping[str, list[int]]) -> tuple[list[int], list[int]]:
    """(prompt ids, ids of the last supervised turn) of an encoded row; the turn is empty where
    nothing is supervised.
    """
    labels, end = row["labels"], len(row["labels"])
    while end and labels[end - 1] == IGNORE:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORE:
        start -= 1
    return row["input_ids"][:start], row["input_ids"][start:end]


@torch.no_grad()
def answers(
    model: nn.Module,
    rows: Sequence[Mapping[str, list[int]]],
    tokenizer: Any,
    *,
    new_tokens: int = 256,
    token_budget: int = 8192,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy continuations of the prompts of encoded `rows`, one text each ("" for a row without a
    prompt).

    A text ends at the tokenizer's end of sequence, at the token that ends the reference turns, or
    after `new_tokens`. At most `token_budget` tokens, prompts and answers, are held at a time, and
    batches are of similar length, so the texts do not depend on it beyond rounding. `advance(k)` is
    called after every batch of k rows. The model's mode and generation settings are left as they
    were.
    """
    prompts, turns = zip(*(split_answer(row) for row in rows), strict=True) if rows else ((), ())
    stops = {turn[-1] for turn in turns if turn and turn[-1] in tokenizer.all_special_ids} | {
        tokenizer.eos_token_id
    }
    stops |= {turn[-1] for turn in turns if turn and turn[-1] in tokenizer.added_tokens_decoder}
    order = sorted(
        (i for i in range(len(rows)) if prompts[i] and turns[i]), key=lambda i: (len(prompts[i]), i)
    )
    texts, device, training = [""] * len(rows), next(model.parameters()).device, model.training
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.eval()
    try:
        while order:
            width = len(prompts[order[0]]) + new_tokens
            part = [
                i
                for i in order[: max(1, token_budget // width)]
                if len(prompts[i]) <= 1.2 * len(prompts[order[0]]) + 16
            ]
            order = order[len(part) :]
            longest = max(len(prompts[i]) for i in part)
            ids = torch.tensor(
                [[pad] * (longest - len(prompts[i])) + list(prompts[i]) for i in part],
                device=device,
            )
            mask = torch.tensor(
                [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in part],
                device=device,
            )
            made = cast(Any, model).generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                num_beams=1,
                max_new_tokens=new_tokens,
                eos_token_id=sorted(stop for stop in stops if stop is not None) or None,
                pad_token_id=pad,
            )
            for i, line in zip(part, made[:, longest:].tolist(), strict=True):
                texts[i] = tokenizer.decode(_until(line, stops), skip_special_tokens=True).strip()
            if advance is not None:
                advance(len(part))
    finally:
        model.train(training)
    return texts


def _until(ids: list[int], stops: set[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stops:
            return ids[:place]
    return ids
