"""Constraints on any selection, against plain loops and cases worked out by hand."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradsift import methods
from gradsift.commands.budget import parse
from gradsift.commands.select.choose import Choice, choose
from gradsift.commands.select.constraints import Bound, Constraints, build, screen
from gradsift.commands.select.contamination import TestSets, words
from gradsift.commands.select.mix import mixed
from gradsift.data.pool import read_pool
from gradsift.errors import BudgetError, ConfigError, UnknownName, UserError
from gradsift.rules import duplicates
from gradsift.types import Example, Message, Signal, Signals, Subset

POEM = "the quick brown fox jumps over the lazy dog while seven grey geese watch from afar"


def example(text: str, name: str = "x", group: str = "g") -> Example:
    return Example(name, (Message("user", text), Message("assistant", "yes")), group)


def naive_near(rows: torch.Tensor, threshold: float, order: list[int]) -> list[int]:
    units = rows / rows.norm(dim=1, keepdim=True)
    first, kept = [-1] * len(rows), list[int]()
    for i in order:
        near = [j for j in kept if float(units[i] @ units[j]) >= threshold]
        if near:
            first[i] = near[0]
        else:
            kept.append(i)
    return first


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_near_duplicates_are_those_of_a_plain_loop(
    threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradsift.rules import blocks

    monkeypatch.setattr(blocks, "BLOCK", 16)
    rows = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    order = np.random.default_rng(0).permutation(90)
    assert duplicates.near(rows, threshold).tolist() == naive_near(rows, threshold, list(range(90)))
    assert duplicates.near(rows, threshold, order=order).tolist() == naive_near(
        rows, threshold, order.tolist()
    )


def test_equal_rows_are_duplicates_at_threshold_one_and_zero_rows_of_nothing() -> None:
    row = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    assert duplicates.near(torch.cat([row, 3 * row, torch.zeros(2, 300), row]), 1.0).tolist() == [
        -1,
        0,
        -1,
        -1,
        0,
    ]
    with pytest.raises(ValueError, match="threshold"):
        duplicates.near(row, 0)


def test_words_ignore_case_spacing_punctuation_and_width_and_split_chinese() -> None:
    assert words("Don't STOP,  well-known \uff21\uff22c") == [
        "dont",
        "stop",
        "well",
        "known",
        "abc",
    ]
    assert words("我们 是,GPT4吗") == ["我", "们", "是", "gpt4", "吗"]
    assert words("cafe\u0301 café") == ["café", "café"]


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        (f"Well: {POEM.upper().replace(' ', '  ')}!", True),
        (" ".join(POEM.split()[:13]), True),
        (" ".join(POEM.split()[:12]), False),
        (POEM.replace("lazy", "idle"), False),  # 8 and 8 words on both sides of the change
        (
            "nothing in common with it at all, though it has more than thirteen words in it too",
            False,
        ),
    ],
)
def test_thirteen_words_in_a_row_are_an_overlap(text: str, hit: bool) -> None:
    found = TestSets({"exam": [example("short one"), example(POEM)]}.items()).overlap(text)
    assert (found is not None) == hit
    if found:
        assert (found.test, found.instance, len(found.words.split())) == ("exam", 1, 13)


def test_thirteen_chinese_characters_are_an_overlap() -> None:
    tests = TestSets([("题", [example("如果一个三角形的三条边长分别是三四五那么它的面积是多少")])])
    assert tests.overlap("请问:如果一个三角形的三条边长分别是七八九") is not None
    assert tests.overlap("请问:如果一个三角形的三条") is None


def test_what_five_instances_share_is_a_template() -> None:
    tests = TestSets([("exam", [example(f"{POEM} question {i}") for i in range(5)])])
    assert tests.overlap(POEM) is None
    # 17 words before the number: five 13-grams, shared by all
    assert tests.counts[0].templates == 5
    assert tests.overlap(f"{POEM} question 3") is not None
    four = TestSets([("exam", [example(f"{POEM} question {i}") for i in range(4)])])
    assert four.overlap(POEM) is not None


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("constraints")
    for name, count in (("code", 6), ("chat", 30), ("math", 4)):
        rows = [
            {"id": f"{name}{i}", "instruction": f"{name} question {i}", "output": f"answer {i}"}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "leak.jsonl").write_text(
        json.dumps({"id": "leak0", "instruction": POEM, "output": "geese"}) + "\n"
    )
    return read_pool([folder / f"{name}.jsonl" for name in ("code", "chat", "math", "leak")])


def signals(pool: Any, rows: torch.Tensor | None = None) -> Signals:
    values = {} if rows is None else {Signal("rows"): rows}
    tokens = np.random.default_rng(0).integers(5, 60, len(pool)).astype(np.int32)
    return Signals(values, len(pool), tokens=tokens, groups=list(pool.groups))


def choice(
    pool: Any, method: str, bounds: list[str], included: list[int] | None = None, **options: Any
) -> Choice:
    taken = np.array(included or [], dtype=np.int64)
    candidates = np.setdiff1d(np.arange(len(pool)), taken)
    return Choice(
        methods.make(method, options),
        signals(pool),
        candidates,
        taken,
        build(per_group=bounds).per_group,
        3,
    )


def groups(pool: Any, subset: Subset) -> Counter[str]:
    return Counter(pool.groups[int(i)] for i in subset.indices)


def test_without_constraints_a_choice_is_the_methods_own(pool: Any) -> None:
    selector, given = methods.make("length"), signals(pool)
    plain = selector.select(given, 9, rng=np.random.default_rng(3))
    found = choice(pool, "length", []).rows(9)
    assert found.indices.tolist() == plain.indices.tolist()
    assert (
        found.gains is not None
        and plain.gains is not None
        and found.gains.tolist() == plain.gains.tolist()
    )
    assert found.notes["score"].tolist() == plain.notes["score"].tolist()


@pytest.mark.parametrize("method", ["length", "random"])
@pytest.mark.parametrize(
    "bounds",
    [
        ["chat=:4"],
        ["math=3:", "code=50%:"],
        ["chat=20%:40%", "math=10%:20%"],
        ["code=2:2", "chat=2:2"],
    ],
)
def test_shares_hold_whatever_the_method(pool: Any, method: str, bounds: list[str]) -> None:
    found = choice(pool, method, bounds)
    subset = found.rows(10) if bounds != ["code=2:2", "chat=2:2"] else found.rows(8)
    assert (
        len(set(subset.indices.tolist())) == len(subset) == (10 if bounds[0] != "code=2:2" else 8)
    )
    for group, (least, most) in found.limits(len(subset)).items():
        assert least <= groups(pool, subset)[group] <= most


def test_for_a_ranking_the_shares_cost_as_little_as_they_can(pool: Any) -> None:
    """Against every way to give seats to the groups: the sum of the chosen lengths is the largest
    possible.
    """
    tokens, names = signals(pool).tokens, np.asarray(list(pool.groups))
    assert tokens is not None
    best = 0
    for chat in range(0, 5):
        for math in range(2, 5):
            for code in range(0, 7):
                leak = 10 - chat - math - code
                if leak in (0, 1):
                    seats = {"chat": chat, "math": math, "code": code, "leak": leak}
                    best = max(
                        best,
                        sum(
                            int(np.sort(tokens[names == g])[::-1][:k].sum())
                            for g, k in seats.items()
                        ),
                    )
    subset = choice(pool, "length", ["chat=:4", "math=2:"]).rows(10)
    assert int(tokens[subset.indices].sum()) == best


def test_included_rows_come_first_and_count(pool: Any) -> None:
    found = choice(pool, "length", ["code=:3"], included=[0, 1]).rows(12)
    assert found.indices[:2].tolist() == [0, 1] and len(found) == 12
    assert groups(pool, found)["code"] <= 3
    assert (
        found.gains is not None
        and np.isnan(found.gains[:2]).all()
        and np.isfinite(found.gains[2:]).all()
    )


@pytest.mark.parametrize(
    ("bounds", "k", "what"),
    [
        (["code=7:"], 10, "can be chosen"),
        (["code=5:", "math=4:"], 8, "least"),
        (["chat=:1"], 30, "leave 12 rows"),
    ],
)
def test_shares_that_cannot_hold_are_refused(
    pool: Any, bounds: list[str], k: int, what: str
) -> None:
    with pytest.raises(BudgetError, match=what):
        choice(pool, "length", bounds).rows(k)


@pytest.mark.parametrize("method", ["length", "random"])
@pytest.mark.parametrize("total", [60, 333, 10_000])
def test_a_token_budget_is_the_longest_prefix_that_fits(pool: Any, method: str, total: int) -> None:
    made = choice(pool, method, [])
    cost = signals(pool).tokens
    assert cost is not None
    found = made.tokens(cost.astype(np.int64), total)
    ranking = made.rows(len(pool)).indices
    fits = int((np.cumsum(cost[ranking]) <= total).sum())
    assert found.indices.tolist() == ranking[:fits].tolist()


def test_token_budgets_nest_and_hold_with_shares_and_included_rows(pool: Any) -> None:
    made, cost = choice(pool, "random", ["chat=:30%"], included=[40]), signals(pool).tokens
    assert cost is not None
    subset = made.tokens(cost.astype(np.int64), 400)
    assert int(cost[subset.indices].sum()) <= 400 and subset.indices[0] == 40
    assert groups(pool, subset)["chat"] <= made.limits(len(subset))["chat"][1]
    with pytest.raises(BudgetError, match="do not pay"):
        made.tokens(cost.astype(np.int64), 3)


def test_a_budget_of_tokens_counts_the_whole_row_or_its_answer(pool: Any) -> None:
    given, lengths = signals(pool), np.full(len(pool), 100)
    everything = np.arange(len(pool))
    screened = screen(Constraints(), pool, given, everything)

    def rows(text: str) -> Subset:
        return choose(
            methods.make("random"),
            given,
            screened,
            everything,
            Constraints(),
            parse(text),
            read=50,
            lengths=lengths,
            seed=0,
        )

    assert len(rows("1k-tokens")) == 10 and len(rows("50%-tokens")) == 20
    assert int(given.tokens[rows("200-supervised-tokens").indices].sum()) <= 200  # type: ignore[index]


def test_a_screen_names_a_reason_for_every_row(pool: Any) -> None:
    rows = torch.randn(len(pool), 8, generator=torch.Generator().manual_seed(0))
    rows[7], rows[9] = rows[3], rows[3]
    limits = build(
        exclude_ids=["chat5"],
        include_ids=["chat3"],
        near=0.999,
        decontaminate={"exam.jsonl": [example(POEM)]},
        per_group=["chat=:50%"],
    )
    limits.check(pool)
    left = screen(limits, pool, signals(pool, rows), np.arange(len(pool)))
    # Row 9 is the included chat3: it is kept, rows 3 and 7 repeat it.
    assert {pool.ids[row]: code for row, (code, _) in left.reasons.items()} == {
        "chat5": "excluded by id",
        "leak0": "overlaps a test set",
        "code3": "near duplicate",
        "chat1": "near duplicate",
    }
    assert [pool.ids[i] for i in left.included] == ["chat3"]
    assert len(left.candidates) == len(pool) - 5
    assert "exam.jsonl" in left.reasons[40][1] and limits.needs() == {Signal("rows")}


def test_an_included_row_of_a_test_set_is_refused(pool: Any) -> None:
    limits = build(include_ids=["leak0"], decontaminate={"exam": [example(POEM)]})
    with pytest.raises(UserError, match="shares 13 words"):
        screen(limits, pool, signals(pool), np.arange(len(pool)))


def test_wrong_constraints_are_refused(pool: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="included and excluded"):
        build(include_ids=["a"], exclude_ids=["a"])
    with pytest.raises(UserError, match="not in the pool, such as 'zz'"):
        build(include_ids=["code1", "zz"]).check(pool)
    with pytest.raises(UnknownName, match="'code'"):
        build(per_group=["cod=1:2"]).check(pool)
    for text in ("code", "code=", "code=:", "code=5:2", "code=1.5:", "code=:101%"):
        with pytest.raises(ConfigError):
            build(per_group=[text])
    with pytest.raises(ConfigError, match="threshold"):
        build(near=1.5)
    (tmp_path / "ids").write_text("code1\n\n code2 \ncode1\n")
    assert build(include_ids=tmp_path / "ids").include == ("code1", "code2")
    assert build().canonical() == {}
    assert Bound("a", "12.5%", "40%").rows(9) == (1, 4)


@pytest.mark.parametrize("method", ["length", "random"])
@pytest.mark.parametrize("share", [0.5, 0.3, 0.999])
def test_a_mix_takes_its_share_by_score_and_draws_the_rest(
    pool: Any, method: str, share: float
) -> None:
    made = choice(pool, method, [])
    made.mix = build(mix=share).mix
    plain = choice(pool, method, [])
    for k in (1, 7, 20, len(pool)):
        found, scored = made.rows(k), int(share * k + 0.5)
        own = plain.rows(scored).indices.tolist() if scored else []
        drawn = np.flatnonzero(found.notes["drawn"] == 1).tolist()
        assert sorted(found.indices.tolist()) == sorted(own + drawn) and len(found) == k
        assert found.indices.tolist()[:scored] == own and len(drawn) == k - scored
        assert found.gains is None or np.isnan(found.gains).sum() == k - scored


def test_what_a_mix_draws_depends_on_the_seed_alone(pool: Any) -> None:
    def drawn(method: str, seed: int) -> list[int]:
        made = choice(pool, method, [], included=list(range(20)))
        made.mix, made.seed = build(mix=0.01).mix, seed
        found = made.rows(28)  # the method's share rounds to no row
        return np.flatnonzero(found.notes["drawn"] == 1).tolist()

    assert drawn("length", 1) == drawn("random", 1) != drawn("random", 2)
    counts = Counter(row for seed in range(400) for row in drawn("length", seed))
    assert set(counts) == set(range(20, len(pool)))
    assert max(counts.values()) < 2 * min(counts.values())


def test_a_mix_holds_beside_shares_included_rows_and_a_budget_of_tokens(pool: Any) -> None:
    made = choice(pool, "length", ["chat=:4", "math=2:"], included=[0, 9])
    made.mix = build(mix=0.5).mix
    found = made.rows(12)
    assert len(set(found.indices.tolist())) == 12 and {0, 9} <= set(found.indices.tolist())
    count = groups(pool, found)
    assert count["chat"] <= 4 and count["math"] >= 2
    assert (found.notes["drawn"][found.indices] == 1).sum() in range(4, 7)
    cost = signals(pool).tokens
    assert cost is not None
    paid = made.tokens(cost.astype(np.int64), 300)
    assert int(cost[paid.indices].sum()) <= 300 and (paid.notes["drawn"] == 1).any()


def test_a_share_that_rounds_to_no_row_asks_the_method_for_none() -> None:
    given = Signals({}, 9)  # without the signals of the method, which would fail
    found = mixed(methods.make("gdig"), given, 1, Fraction(3, 10), np.random.default_rng(0))
    assert len(found) == 1 and found.notes["drawn"].sum() == 1


def test_drawn_rows_weigh_as_much_as_a_pick_does_on_average() -> None:
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    selector = methods.make("gradmatch")
    given = Signals({s: rows for s in selector.needs() if s.side == "pool"}, 30)
    found = mixed(selector, given, 10, Fraction(1, 2), np.random.default_rng(0))
    own = selector.select(given, 5, rng=np.random.default_rng(0))
    assert found.weights is not None and own.weights is not None
    assert found.indices[:5].tolist() == own.indices.tolist()
    assert found.weights.tolist() == [*own.weights, *[own.weights.mean()] * 5]


def test_a_mix_is_a_share_and_enters_the_recipe() -> None:
    for wrong in (0, -0.5, 1.5, "half", "150%"):
        with pytest.raises(ConfigError, match="not a share of the budget"):
            build(mix=wrong)
    assert build(mix=1).canonical() == build().canonical() == {}
    assert build(mix=0.3).canonical() == build(mix="30 %").canonical() == {"mix": "3/10"}
