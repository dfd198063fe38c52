"""The task families of the playground: questions with one right answer each, drawn without end from
a random source.

Eight families in one chat shape. Their answers differ in kind (a number, a word, a sentence of an
invented language), and so do the skills behind them, which is what a selection method has to see.

No question of one split can appear in another, whatever the seeds: each question belongs to exactly
one split by the hash of its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from gradsift.errors import UserError

GENERATOR_VERSION = 1
TARGET_FAMILY = "translate"

Split = Literal["pretrain", "pool", "dev", "test"]
# Which hashes of a question, modulo 100, fall to which split.
_SPLITS: dict[Split, range] = {
    "pretrain": range(0, 45),
    "pool": range(45, 80),
    "dev": range(80, 85),
    "test": range(85, 100),
}

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June", "Kai", "Lena")
_TOWNS = ("Oslo", "Bern", "Lima", "Cairo", "Porto", "Quito", "Hanoi", "Turin", "Delhi", "Accra")
_JOBS = ("baker", "pilot", "nurse", "judge", "tailor", "farmer", "clerk", "miner")
_UNITS = (
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("meters", "centimeters", 100),
    ("feet", "inches", 12),
    ("dozens", "pieces", 12),
    ("years", "months", 12),
)

# Velu, the invented language of the target family: word for word, except that the adjective follows
# its noun.
NOUNS = {
    "dog": "kavo",
    "cat": "mirru",
    "bird": "tseli",
    "fish": "oblu",
    "horse": "drana",
    "child": "pimpo",
    "queen": "zethi",
    "farmer": "gorak",
    "river": "lulea",
    "stone": "bekk",
    "tree": "fyndo",
    "bread": "hamut",
}
ADJECTIVES = {
    "red": "ixo",
    "old": "wemba",
    "small": "tik",
    "quiet": "shoal",
    "happy": "juyu",
    "cold": "fraz",
    "green": "nolvi",
    "brave": "quend",
}
VERBS = {
    "sees": "ruma",
    "finds": "epto",
    "follows": "vashti",
    "likes": "soo",
    "carries": "dulgar",
    "hears": "yem",
    "paints": "cibra",
    "wants": "onti",
}
ARTICLES = {"the": "ka", "a": "u"}


@dataclass(frozen=True)
class Question:
    """One thing to ask: what fills the wordings of its family, and the right answer."""

    fields: Mapping[str, str]
    answer: str


@dataclass(frozen=True)
class Family:
    """A kind of task: its share of the pool, its wordings (all ask the same), and how a question is
    drawn.
    """

    name: str
    share: float
    wordings: tuple[str, ...]
    draw: Callable[[Random], Question]


def _arithmetic(rng: Random) -> Question:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    minus = rng.random() < 0.5
    a, b = (max(a, b), min(a, b)) if minus else (a, b)
    return Question({"sum": f"{a} {'-' if minus else '+'} {b}"}, str(a - b if minus else a + b))


def _letters(rng: Random) -> Question:
    word = "".join(
        rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))
    )
    return Question({"word": word}, word[::-1])


def _weekday(rng: Random) -> Question:
    day, step, back = rng.randrange(7), rng.randint(1, 365), rng.random() < 0.5
    answer = _DAYS[(day - step if back else day + step) % 7]
    return Question(
        {"day": _DAYS[day], "step": f"{step} days {'before' if back else 'after'}"}, answer
    )


def _lookup(rng: Random) -> Question:
    record = [
        ("name", rng.choice(_NAMES)),
        ("town", rng.choice(_TOWNS)),
        ("job", rng.choice(_JOBS)),
        ("age", str(rng.randint(18, 80))),
    ]
    rng.shuffle(record)
    key, value = rng.choice(record)
    return Question({"record": "; ".join(f"{k}={v}" for k, v in record), "key": key}, value)


def _translate(rng: Random) -> Question:
    english, velu = [], []
    verb = rng.choice(sorted(VERBS))
    for role in ("subject", "object"):
        article, noun = rng.choice(sorted(ARTICLES)), rng.choice(sorted(NOUNS))
        adjective = rng.choice(sorted(ADJECTIVES)) if rng.random() < 0.6 else None
        english += [article, *([adjective] if adjective else []), noun]
        velu += [ARTICLES[article], NOUNS[noun], *([ADJECTIVES[adjective]] if adjective else [])]
        if role == "subject":
            english.append(verb)
            velu.append(VERBS[verb])
    return Question({"english": " ".join(english)}, " ".join(velu))


def _sort(rng: Random) -> Question:
    numbers = [rng.randint(0, 99) for _ in range(rng.randint(3, 5))]
    return Question({"numbers": " ".join(map(str, numbers))}, " ".join(map(str, sorted(numbers))))


def _boolean(rng: Random) -> Question:
    literals = [
        ("not " if rng.random() < 0.4 else "") + rng.choice(("true", "false"))
        for _ in range(rng.randint(3, 5))
    ]
    operators = [rng.choice(("and", "or")) for _ in literals[1:]]
    value, text = _truth(literals[0]), literals[0]
    for operator, literal in zip(operators, literals[1:], strict=True):
        value = (value and _truth(literal)) if operator == "and" else (value or _truth(literal))
        text += f" {operator} {literal}"
    return Question({"expression": text}, "true" if value else "false")


def _truth(literal: str) -> bool:
    return (literal.split()[-1] == "true") != literal.startswith("not ")


def _units(rng: Random) -> Question:
    big, small, factor = rng.choice(_UNITS)
    count = rng.randint(2, 500)
    return Question({"amount": f"{count} {big}", "unit": small}, f"{count * factor} {small}")


FAMILIES = (
    Family(
        "lookup",
        0.18,
        (
            "From {record}: give the {key}.",
            "{record}. What is the {key}?",
            "Read the {key} in: {record}",
        ),
        _lookup,
    ),
    Family(
        "arithmetic", 0.16, ("What is {sum}?", "Work out {sum}.", "Calculate: {sum}"), _arithmetic
    ),
    Family(
        "sort",
        0.14,
        (
            "Sort upwards: {numbers}",
            "Put in order, lowest first: {numbers}",
            "Order {numbers} from small to large.",
        ),
        _sort,
    ),
    Family(
        "letters",
        0.13,
        ("Spell {word} backwards.", "Write the word {word} in reverse.", "Reverse: {word}"),
        _letters,
    ),
    Family(
        "units",
        0.11,
        (
            "Turn {amount} into {unit}.",
            "How many {unit} are {amount}?",
            "Convert {amount} to {unit}.",
        ),
        _units,
    ),
    Family(
        "weekday",
        0.10,
        (
            "Which day is {step} {day}?",
            "Name the day {step} {day}.",
            "It is {step} {day}. Which day?",
        ),
        _weekday,
    ),
    Family(
        "translate",
        0.10,
        (
            "Say in Velu: {english}",
            "Translate into Velu: {english}",
            "How do you say {english} in Velu?",
        ),
        _translate,
    ),
    Family(
        "boolean",
        0.08,
        (
            "Left to right, {expression} is?",
            "Evaluate left to right: {expression}",
            "True or false, left to right: {expression}",
        ),
        _boolean,
    ),
)


def _split(family: Family, question: Question) -> Split:
    key = json.dumps([family.name, dict(question.fields)], sort_keys=True).encode()
    part = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % 100
    return next(name for name, parts in _SPLITS.items() if part in parts)


def draw(family: Family, split: Split, rng: Random, taken: set[str]) -> Question:
    """A question of this split that is not in `taken` (which it joins)."""
    for _ in range(5000):
        question = family.draw(rng)
        text = f"{family.name} {sorted(question.fields.items())}"
        if text not in taken and _split(family, question) == split:
            taken.add(text)
            return question
    raise UserError(
        f"the playground family {family.name!r} has no unused question left for its {split} split",
        remedy="Ask for fewer rows.",
    )


def clean_row(
    family: Family, question: Question, rng: Random, *, avoid: str | None = None
) -> dict[str, Any]:
    """A clean row; `avoid` is a user text whose wording must not be used again."""
    prompts = [
        text
        for text in (wording.format(**question.fields) for wording in family.wordings)
        if text != avoid
    ]
    messages = [
        {"role": "user", "content": rng.choice(prompts)},
        {"role": "assistant", "content": question.answer},
    ]
    return {"messages": messages, "family": family.name, "noise": "none", "copy": "none"}


def stream(seed: int, weights: Mapping[str, float]) -> Iterator[list[dict[str, str]]]:
    """The pretraining stream: clean messages of all families without end, questions of the
    pretraining split only, repeats allowed.
    """
    rng = Random(f"gradsift playground {GENERATOR_VERSION} pretrain {seed}")
    families = list(FAMILIES)
    while True:
        family = rng.choices(families, [weights[f.name] for f in families])[0]
        yield clean_row(family, draw(family, "pretrain", rng, set()), rng)["messages"]
