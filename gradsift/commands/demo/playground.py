"""A world small enough to know the truth about: a generated instruction pool, its target set, and a
tiny model that half knows it.

`generate` makes the pool of `gradsift demo`: eight task families in one chat shape, with exact
duplicates, paraphrases and noise, each row labelled with what it is. The labels are for measuring
afterwards; no method reads them. `write_playground` writes the pool with a dev and a test set of
the target family. The model that half knows them is the built-in `tiny` (`gradsift.model.tiny`).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from gradsift.errors import UserError
from gradsift.model.tiny_tasks import (
    FAMILIES,
    GENERATOR_VERSION,
    TARGET_FAMILY,
    Family,
    Question,
    Split,
    clean_row,
    draw,
)
from gradsift.rules.topk import apportion
from gradsift.store.atomic import remove_leftovers, write_atomic

NOISE_SHARE = 0.20
DUPLICATE_SHARE = 0.05
PARAPHRASE_SHARE = 0.05
# share of the noise
NOISE_KINDS = {"wrong": 0.15, "misaligned": 0.30, "truncated": 0.25, "gibberish": 0.30}
SOURCES: dict[str, tuple[float, float]] = {
    "handbook": (0.36, 0.08),
    "forum": (0.40, 0.40),
    "crawl": (0.24, 0.52),
}  # share of clean, of noisy rows


def _clean_rows(
    family: Family, count: int, split: Split, rng: Random
) -> list[tuple[dict[str, Any], Question]]:
    taken: set[str] = set()
    questions = [draw(family, split, rng, taken) for _ in range(count)]
    return [(clean_row(family, question, rng), question) for question in questions]


def _spoil(row: dict[str, Any], kind: str, family: Family, answers: list[str], rng: Random) -> None:
    """Replace the row's answer by a bad one, in place, and label it. An answer too short to cut is
    replaced by another row's.
    """
    right = row["messages"][1]["content"]
    if kind == "truncated" and len(right) < 4:
        kind = "misaligned"
    bad = right
    while bad == right:
        if kind == "wrong":
            bad = family.draw(rng).answer
        elif kind == "misaligned":
            bad = rng.choice(answers)
        elif kind == "truncated":
            bad = right[: rng.randint(1, len(right) // 2)]
        else:
            bad = (
                "".join(
                    rng.choice("abcdefghijklmnopqrstuvwxyz0123456789#%&*?!   ")
                    for _ in range(rng.randint(6, 24))
                ).strip()
                or right
            )
    row["messages"][1]["content"], row["noise"] = bad, kind


def generate(seed: int = 0, rows: int = 2000) -> list[dict[str, Any]]:
    """The pool: `rows` dicts with `id`, `messages`, `source`, and the labels `family`, `noise`,
    `copy`; the same for the same seed.

    `noise`: none | wrong (a false answer of the right kind) | misaligned (another row's answer) |
    truncated | gibberish; about 20 % of the rows of every family. `copy`: none | duplicate (same
    messages as another row) | paraphrase (same question in another wording); about 5 % each.
    `source` is where the row pretends to come from; sources differ in noise, not in families.
    Raises UserError for fewer than 100 rows, or for more than a family has questions.
    """
    if rows < 100:
        raise UserError(
            f"a playground of {rows} rows is too small to hold every family",
            remedy="Ask for at least 100 rows.",
        )
    rng = Random(f"gradsift playground {GENERATOR_VERSION} pool {seed}")
    duplicates, paraphrases = round(rows * DUPLICATE_SHARE), round(rows * PARAPHRASE_SHARE)
    counts = apportion(rows - duplicates - paraphrases, [family.share for family in FAMILIES])
    clean = {
        family.name: _clean_rows(family, count, "pool", rng)
        for family, count in zip(FAMILIES, counts, strict=True)
    }
    answers = [
        row["messages"][1]["content"] for family_rows in clean.values() for row, _ in family_rows
    ]
    pool: list[dict[str, Any]] = []
    candidates: list[tuple[dict[str, Any], Family, Question]] = []
    for family in FAMILIES:
        # Paraphrases stay clean and duplicates copy anything, so the originals carry a little more
        # than the share of the whole.
        bad = apportion(
            round(len(clean[family.name]) * NOISE_SHARE / (1 - PARAPHRASE_SHARE)),
            list(NOISE_KINDS.values()),
        )
        kinds = [kind for kind, count in zip(NOISE_KINDS, bad, strict=True) for _ in range(count)]
        for position, (row, question) in enumerate(clean[family.name]):
            if position < len(kinds):
                _spoil(row, kinds[position], family, answers, rng)
            else:
                candidates.append((row, family, question))
            pool.append(row)
    copies = [_copy(row) for row in rng.sample(pool, duplicates)]
    for row, family, question in rng.sample(candidates, paraphrases):
        copies.append(
            clean_row(family, question, rng, avoid=row["messages"][0]["content"])
            | {"copy": "paraphrase"}
        )
    pool += copies
    rng.shuffle(pool)
    names = list(SOURCES)
    for index, row in enumerate(pool):
        row["source"] = rng.choices(
            names, [SOURCES[name][row["noise"] != "none"] for name in names]
        )[0]
        row["id"] = f"p{index:05d}"
    order = ("id", "messages", "source", "family", "noise", "copy")
    return [{key: row[key] for key in order} for row in pool]


def _copy(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"messages": [dict(message) for message in row["messages"]], "copy": "duplicate"}


def target_rows(split: Literal["dev", "test"], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` clean rows of the target family that are in no pool, no pretraining stream and not in
    the other split.
    """
    rng = Random(f"gradsift playground {GENERATOR_VERSION} {split} {seed}")
    family = next(family for family in FAMILIES if family.name == TARGET_FAMILY)
    return [
        {"id": f"{split}{i:04d}"} | row
        for i, (row, _) in enumerate(_clean_rows(family, count, split, rng))
    ]


@dataclass(frozen=True)
class Paths:
    """The files of a playground folder: pool.jsonl, target.jsonl (dev), test.jsonl, README.md."""

    pool: Path
    target: Path
    test: Path
    readme: Path


def write_playground(
    folder: Path, seed: int = 0, rows: int = 2000, *, dev: int = 32, test: int = 200
) -> Paths:
    """Write the pool, `dev` target rows and `test` rows of the target family to `folder`; the same
    bytes for the same arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    paths = Paths(
        folder / "pool.jsonl", folder / "target.jsonl", folder / "test.jsonl", folder / "README.md"
    )
    pool = generate(seed, rows)
    for path, items in (
        (paths.pool, pool),
        (paths.target, target_rows("dev", dev, seed)),
        (paths.test, target_rows("test", test, seed)),
    ):
        write_atomic(
            path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()
        )
    write_atomic(paths.readme, _readme(pool, seed).encode())
    return paths


def _readme(pool: list[dict[str, Any]], seed: int) -> str:
    families = Counter(row["family"] for row in pool)
    noise = Counter(row["family"] for row in pool if row["noise"] != "none")
    lines = [f"| {name} | {count} | {noise[name]} |" for name, count in families.most_common()]
    return "\n".join(
        [
            "# Playground",
            "",
            (
                f"A generated pool of {len(pool)} rows (generator version {GENERATOR_VERSION}, seed"
                f" {seed}). `target.jsonl` and `test.jsonl`"
            ),
            (
                f"are clean rows of the family `{TARGET_FAMILY}`, disjoint from the pool and from"
                " each other. The fields `family`, `noise` and"
            ),
            "`copy` are labels for measuring; no method reads them.",
            "",
            "| family | rows | of these noise |",
            "|---|---|---|",
            *lines,
            "",
        ]
    )
