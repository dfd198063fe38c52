"""The statistics of bench/quality.py on cases with known answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradsift.commands.compare.results import ArmResult, Comparison, Results
from gradsift.commands.compare.statistics import Measured, compare_measured
from tests.docs.pages import check_measured, tables


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "quality.py"
    spec = importlib.util.spec_from_file_location("bench_quality", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_quality"] = module
    spec.loader.exec_module(module)
    return module


def test_a_stratified_part_keeps_shares_and_order(bench: ModuleType) -> None:
    rows = [{"id": i, "source": "abc"[i % 3 if i < 30 else 0]} for i in range(60)]
    part = bench.stratified(rows, "source", 12)
    assert [row["id"] for row in part] == sorted(row["id"] for row in part)
    assert sorted(row["source"] for row in part) == ["a"] * 8 + ["b"] * 2 + ["c"] * 2
    assert part == bench.stratified(rows, "source", 12)


def test_auc_counts_pairs(bench: ModuleType) -> None:
    high, low = np.array([3.0, 1.0, np.nan, 2.0]), np.array([2.0, 0.0])
    pairs = [(h, x) for h in (3.0, 1.0, 2.0) for x in low]
    assert bench.auc(high, low) == pytest.approx(
        np.mean([float(h > x) + 0.5 * float(h == x) for h, x in pairs])
    )


def test_a_model_that_is_a_sum_of_its_rows_has_a_score_of_1(bench: ModuleType) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 5))
    members = np.stack(
        [np.isin(np.arange(40), rng.choice(40, 20, replace=False)) for _ in range(30)]
    ).astype(float)
    losses = 3 - members @ scores
    assert bench.datamodeling(scores, members, losses, draws=20)["lds"] == pytest.approx(1)
    assert bench.datamodeling(-scores, members, losses, draws=20)["lds"] == pytest.approx(-1)
    unrelated = bench.datamodeling(rng.normal(size=(40, 5)), members, losses, draws=200)
    assert unrelated["interval"][0] < 0.2
    assert unrelated["lds"] < 0.5


def test_the_recovered_gap_is_the_share_of_what_the_oracle_gains(bench: ModuleType) -> None:
    def comparison(random: float, method: float, oracle: float) -> Comparison:
        rng = np.random.default_rng(1)
        values = {
            "random": random,
            "rds": (random + method) / 2,
            "less": method,
            "oracle source=x": oracle,
        }
        values |= {"g2is": method, "g2is:preset=uncentred": method + 0.25}
        tables = {
            arm: Measured(value + rng.normal(0, 0.01, (4, 200)), np.ones(200), 3)
            for arm, value in values.items()
        }
        results = compare_measured(
            {"t": tables}, control="random", level=0.95, measure="loss", equal="steps", seed=0
        )
        return Comparison("random", 0.95, (), tuple(results))

    found = bench.over_targets(
        {"a": comparison(3, 2.5, 2), "b": comparison(4, 3, 3.2), "c": comparison(2, 1.9, 2)}
    )
    assert found["clear_oracles"] == ["a", "b"]  # in c the oracle gains nothing
    less = found["arms"]["less"]
    assert less["recovered_gap"][0] == pytest.approx((0.5 + 1.25) / 2, abs=0.01)
    assert less["recovered_gap"][1] < less["recovered_gap"][0] < less["recovered_gap"][2]
    assert less["against random"][0] == pytest.approx(-(0.5 + 1 + 0.1) / 3, abs=0.01)
    assert less["against rds"][0] == pytest.approx(-(0.5 + 1 + 0.1) / 6, abs=0.01)
    assert less["against rds"][2] < 0
    ((pair, (difference, low, high)),) = found["pairs"].items()
    assert pair == "g2is against g2is:preset=uncentred"
    assert low < difference < high < 0
    assert difference == pytest.approx(-0.25, abs=0.01)


def test_a_table_for_every_way_of_equal_training(bench: ModuleType) -> None:
    lines = (ArmResult("random", 3.0, (3.0,), 5),)
    tables = tuple(Results(t, "loss", way, lines) for way in ("steps", "tokens") for t in "ab")
    made = Comparison("random", 0.95, (), tables, cost={"training_minutes": 1.0})
    found = dict(bench.by_way("targeted", made))
    assert list(found) == ["targeted", "targeted, equal tokens"]
    assert [(t.test, t.equal) for t in found["targeted, equal tokens"].tables] == [
        ("a", "tokens"),
        ("b", "tokens"),
    ]
    assert found["targeted, equal tokens"].table("b").equal == "tokens"
    # it is that of the first way
    assert found["targeted"].cost and not found["targeted, equal tokens"].cost


def test_picks_of_a_noisy_pool_are_counted(bench: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"noise": noise, "task": task}
        for noise, task in (
            ("none", "mt_a"),
            ("none", "mt_b"),
            ("copied", "mt_a"),
            ("none", "mt_a"),
        )
    ]
    pq.write_table(pa.table({"score": [3.0, 1.0, 2.0, None]}), tmp_path / "scores.parquet")

    class Chosen:
        folder, indices = tmp_path, np.array([0, 2])

        def __len__(self) -> int:
            return 2

    found = bench.noise_found(rows, Chosen())
    assert found == {"picked": 2, "clean": 0.5, "a": 1.0, "b": 0.0, "auc copied": 0.5}


def test_a_clean_test_shares_no_text_with_the_pool(bench: ModuleType) -> None:
    row = {"id": "1", "messages": [{"content": "in"}, {"content": "out"}]}
    assert bench.texts(row) == {"1", "in", "out"}


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "generate_quality", Path(__file__).parents[2] / "docs" / "generate_quality.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_run_of_most_targets_then_seeds_and_what_it_lacks_from_others(
    generate: ModuleType,
) -> None:
    def over(targets: str, **arms: float) -> dict[str, Any]:
        entries = {arm: {"against random": [value, value, value]} for arm, value in arms.items()}
        return {"targets": list(targets), "clear_oracles": [], "arms": {**entries, "random": {}}}

    found = generate.summary(
        {
            "targeted (4,000 rows, 5 seeds, bfloat16)": {"5% over targets": over("ab", less=-9)},
            "targeted (8,000 rows, 2 seeds, bfloat16)": {
                "5% over targets": over("abc", less=-8, length=-3, perplexity=-4)
            },
            "targeted (8,000 rows, 2 seeds)": {"5% over targets": over("abc", rds=-7)},
            "targeted, equal tokens (8,000 rows, 9 seeds, bfloat16)": {
                "5% over targets": over("abc", rds=-6)
            },
            "targeted (8,000 rows, 5 seeds, bfloat16)": {
                "5% over targets": over("abc", less=-1, gdig=-2)
            },
        }
    )
    rows = [
        line.split("|")[1].strip() + line.split("|")[2]
        for line in found.splitlines()
        if line.startswith("| `")
    ]
    assert rows == [
        "`gdig` -2.000 (-2.000 to -2.000) ",
        "`less` -1.000 (-1.000 to -1.000) ",
        "`perplexity` (2 seeds) -4.000 (-4.000 to -4.000) ",
        "`length` (2 seeds) -3.000 (-3.000 to -3.000) ",
    ]
    assert "8,000 rows, 5 seeds, bfloat16" in found


def test_the_readme_shows_what_methods_without_a_target_did(generate: ModuleType) -> None:
    def table(**differences: float) -> dict[str, Any]:
        lines = [
            ArmResult(arm, 3 + d, (3 + d,), 75, d, d - 0.5, d + 0.5)
            for arm, d in differences.items()
        ]
        lines += [
            ArmResult("random", 3.0, (3.0,), 75),
            ArmResult("untrained", 4.0, (4.0,), 0, 1.0, 0.5, 1.5),
        ]
        return Comparison(
            "random", 0.95, (), (Results("mean of the tests", "loss", "steps", tuple(lines)),)
        ).summary() | {"pairs": {}}

    found = generate.summary(
        {
            "agnostic (9 rows, 2 seeds)": {"5%": table(kcenter=1)},
            "agnostic (9 rows, 5 seeds)": {"5%": table(tagcos=-1, full=-2)},
        }
    )
    assert "(9 rows, 5 seeds; 5% picked). full: rows of the whole pool" in found
    rows = [line for line in found.splitlines() if line.startswith("| `")]
    assert rows == [
        "| `full` | -2.000 (-2.500 to -1.500) |",
        "| `tagcos` | -1.000 (-1.500 to -0.500) |",
    ]


def test_every_table_has_a_title_and_its_place(generate: ModuleType) -> None:
    tables = (
        "lds (9 rows)",
        "several, equal tokens (9 rows, 2 seeds)",
        "several (9 rows, 2 seeds)",
        "several (9 rows, 5 seeds)",
    )
    heads = [
        line
        for line in generate.page({name: {} for name in tables}).splitlines()
        if line.startswith("## ")
    ][1:]
    assert heads == [
        "## Several targets at once (9 rows, 5 seeds)",
        "## Several targets at once (9 rows, 2 seeds)",
        "## Several targets at once, every training of the same number of tokens (9 rows, 2 seeds)",
        "## Linear datamodeling score of influence backends (9 rows)",
    ]
    with pytest.raises(KeyError, match="else"):
        generate.page({"else (9 rows)": {}})


def test_the_page_and_the_readme_have_the_shape_of_the_results(generate: ModuleType) -> None:
    root = Path(__file__).parents[2]
    results = json.loads((root / "bench" / "results" / "quality.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "quality.md").read_text(encoding="utf-8")
    check_measured(page, generate.page(results), "python docs/generate_quality.py")
    readme = (root / "README.md").read_text(encoding="utf-8")
    shown = readme.partition(generate.BEGIN)[2].partition(generate.END)[0]
    assert {tuple(table[0]) for table in tables(shown)} == {
        tuple(table[0]) for table in tables(generate.summary(results))
    }
    assert "| `contrast` |" in generate.summary(results)
