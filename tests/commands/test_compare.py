"""`gradsift compare` on a generated pool with a small model: arms, trainings, intervals, and that
nothing is trained twice.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradsift.commands.budget import parse
from gradsift.commands.compare import trials
from gradsift.commands.compare.arms import Arms
from gradsift.commands.compare.compare import BASE, compare
from gradsift.commands.compare.results import MEAN, Arm, ArmResult, Comparison, Results
from gradsift.commands.compare.statistics import Measured, compare_measured
from gradsift.commands.demo.playground import generate, target_rows
from gradsift.commands.preflight import Inputs
from gradsift.commands.session import opened
from gradsift.config import EncodeSettings, FinetuneSettings
from gradsift.data.encode import encode
from gradsift.data.pool import read_pool
from gradsift.errors import ConfigError, UnknownName, UserError
from gradsift.model.finetune import finetune, heldout_loss
from gradsift.model.load import load_tokenizer
from gradsift.model.tiny import TinySettings, tiny_model

pytestmark = pytest.mark.slow

LONG = " " + " ".join(f"word{i}" for i in range(20))
SETTINGS: dict[str, dict[str, Any]] = {
    "encode": {"max_length": 256},
    "gradients": {"dim": 64},
    "warmup": {"min_rows": 32, "batch_size": 8, "checkpoints": 1},
    "machine": {"threads": 1},
    "finetune": {"mode": "full", "lr": 2e-3, "epochs": 2, "batch_size": 8},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    settings = TinySettings(hidden=32, layers=2, heads=2, intermediate=64, steps=12, tokens=512)
    return str(tiny_model(tmp_path_factory.mktemp("cache"), settings=settings))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("data"), {}
    tests = target_rows("test", 12)
    # The last pool row repeats twenty words of a test row.
    tests[0]["messages"][-1]["content"] += LONG
    pool = [*generate(0, 100)[:70], {**tests[0], "id": "leak"}]
    other = [{**row, "answer": row["messages"][-1]["content"]} for row in generate(5, 100)[:8]]
    for name, rows in {
        "pool": pool,
        "dev": target_rows("dev", 6),
        "test": tests,
        "other": other,
    }.items():
        made[name] = folder / f"{name}.jsonl"
        made[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def run(files: dict[str, Path], model: str, where: Path, **more: Any) -> Comparison:
    given: dict[str, Any] = {
        "settings": SETTINGS,
        "test": [files["test"]],
        "controls": ["length"],
        "seeds": 2,
        "equal": ("steps",),
        **more,
    }
    return compare(
        given.pop("arms", ["gradmatch"]),
        pool=files["pool"],
        budget=10,
        run=where,
        model=model,
        **given,
    )


def test_a_comparison_trains_what_its_table_says(
    files: dict[str, Path], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(files, model, tmp_path / "run", oracle="family=translate")
    assert [arm.name for arm in found.arms] == [
        "gradmatch",
        "gradmatch (weighted)",
        "random",
        "length",
        "oracle family=translate",
        BASE,
    ]
    assert found.overlap == 1
    table = found.table()
    assert (table.test, table.measure, table.equal) == ("test", "loss", "steps")
    assert {line.steps for line in table.lines} == {3, 0}  # 2 passes over 10 rows in batches of 8
    random, length = table.line("random"), table.line("length")
    assert random.difference is None
    assert length.difference == pytest.approx(length.value - random.value)
    assert length.low is not None
    assert length.high is not None
    assert length.difference is not None
    assert length.low <= length.difference <= length.high
    assert len(random.per_seed) == 2
    assert random.per_seed[0] != random.per_seed[1]

    # The very number: the training by hand.
    pool, test = read_pool([files["pool"]]), read_pool([files["test"]])
    tokenizer, settings = load_tokenizer(model), EncodeSettings(max_length=256)
    encoded, held = encode(pool, tokenizer, settings), encode(test, tokenizer, settings)
    longest = sorted(range(len(pool) - 1), key=lambda i: (-int(encoded.supervised[i]), i))[:10]
    recipe = FinetuneSettings(**SETTINGS["finetune"], steps=3, seed=1)
    tuned = finetune(model, [encoded[i] for i in sorted(longest)], settings=recipe)
    assert length.per_seed[1] == pytest.approx(heldout_loss(tuned, held).loss, rel=1e-5)

    # The share of rows that carry the oracle's mark.
    arms, of_kind = (
        {arm.name: arm for arm in found.arms},
        [pool.record(i).get("family") == "translate" for i in range(len(pool))],
    )
    assert arms["oracle family=translate"].marked == min(1.0, sum(of_kind[:-1]) / 10)
    assert arms["length"].marked == sum(of_kind[i] for i in longest) / 10
    assert arms[BASE].marked is None
    assert "marked" in found.lines()[1] and "| marked |" in found.markdown()
    assert (
        "marked"
        not in Comparison(
            found.control,
            found.level,
            tuple(replace(arm, marked=None) for arm in found.arms),
            found.tables,
        ).markdown()
    )

    # Again: nothing is trained, and the same comes out; the reports have the panel.
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("gradsift.commands.compare.trials.finetune", refuse)
    monkeypatch.setattr("gradsift.commands.compare.compare.finetune", refuse)
    again = run(files, model, tmp_path / "run", oracle="family=translate")
    assert again.tables == found.tables
    reports = list((tmp_path / "run").glob("select-*/report.json"))
    assert any("oracle family=translate" in report.read_text() for report in reports)
    kept = json.loads(next((tmp_path / "run").glob("compare-*/comparison.json")).read_text())
    assert Comparison.read(kept).tables == found.tables


def test_a_comparison_finds_the_rows_of_the_test_family(model: str, tmp_path: Path) -> None:
    others = [
        {**row, "id": f"o{i}"}
        for i, row in enumerate(generate(0, 400))
        if row["family"] != "translate"
    ]
    sides = {"pool": [*target_rows("dev", 24), *others], "test": target_rows("test", 24)}
    paths = {name: tmp_path / f"{name}.jsonl" for name in sides}
    for name, rows in sides.items():
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"mode": "full", "epochs": 4, "batch_size": 8, "lr": 3e-3}
    more = {"oracle": "family=translate", "settings": {**SETTINGS, "finetune": training}}
    comparison = compare(
        ["length"],
        pool=paths["pool"],
        test=paths["test"],
        budget=24,
        run=tmp_path / "run",
        model=model,
        seeds=2,
        controls=[],
        equal="steps",
        **more,
    )
    right, random = (comparison.table().line(arm) for arm in ("oracle family=translate", "random"))
    assert right.steps == random.steps == 12  # 4 passes over 24 rows
    assert right.difference is not None and right.low is not None and right.high is not None
    assert right.difference == pytest.approx(right.value - random.value)
    assert right.low < right.difference < right.high < 0

    # The rows of every draw and where a choice is written come with the result, and stay out of
    # what is written down.
    arms = {arm.name: arm for arm in comparison.arms}
    assert [
        len(arms[name].draws) for name in ("length", "random", "oracle family=translate", BASE)
    ] == [1, 2, 2, 0]
    assert all(draw.tolist() == list(range(24)) for draw in arms["oracle family=translate"].draws)
    selection = arms["length"].selection
    assert (
        selection is not None
        and sorted(selection.indices.tolist()) == arms["length"].draws[0].tolist()
    )
    assert arms["oracle family=translate"].selection is None
    assert set(comparison.summary()["arms"][0]) == {
        "name",
        "kind",
        "rows",
        "tokens",
        "seconds",
        "marked",
    }


def test_several_tests_their_mean_answers_and_a_command(
    files: dict[str, Path], model: str, tmp_path: Path
) -> None:
    script = tmp_path / "score.py"
    script.write_text("import sys, os; print('log'); print(len(os.listdir(sys.argv[1])))\n")
    found = run(
        files,
        model,
        tmp_path / "run",
        arms=["length"],
        controls=[],
        test=[files["test"], files["other"]],
        equal=("steps", "tokens"),
        seeds=1,
        settings={**SETTINGS, "finetune": {**SETTINGS["finetune"], "epochs": 12}},
        measure_command=f"{sys.executable} {script} {{model}}",
    )
    assert [(t.test, t.measure, t.equal) for t in found.tables] == [
        (MEAN, "loss", "steps"),
        ("test", "loss", "steps"),
        ("other", "loss", "steps"),
        ("other", "exact", "steps"),
        ("command", "value", "steps"),
        (MEAN, "loss", "tokens"),
        ("test", "loss", "tokens"),
        ("other", "loss", "tokens"),
        ("other", "exact", "tokens"),
        ("command", "value", "tokens"),
    ]
    mean, parts = (
        found.table().line("length"),
        [found.table(t).line("length") for t in ("test", "other")],
    )
    assert mean.value == pytest.approx(np.mean([part.value for part in parts]))
    assert found.table("command", "value").line("length").value >= 4  # weights, config, tokenizer
    assert found.table("other", "exact").line(BASE).value == 0
    # Long rows take fewer steps for the same number of tokens.
    assert (
        found.table(equal="tokens").line("length").steps
        < found.table(equal="steps").line("length").steps
    )
    assert (
        found.table(equal="tokens").line("random").steps
        == found.table(equal="steps").line("random").steps
    )
    text = "\n".join(found.lines())
    assert "mean of the tests: loss (lower is better), the same optimiser steps" in text
    assert "one seed" in text


def test_equal_tokens_alone(files: dict[str, Path], model: str, tmp_path: Path) -> None:
    found = run(
        files, model, tmp_path / "run", arms=["gradmatch", "random"], equal="tokens", seeds=1
    )
    assert [arm.name for arm in found.arms].count("random") == 1  # named or not
    assert found.table().equal == "tokens"
    trials = [path.parent for path in (tmp_path / "run").glob("trial-*/recipe.json")]
    assert len(trials) == len(found.arms)
    # all but the base model
    trained = [
        path for path in trials if json.loads((path / "recipe.json").read_text())["config"]["count"]
    ]
    seconds = [json.loads((path / "stats.json").read_text())["training"] for path in trained]
    assert len(seconds) == len(found.arms) - 1
    assert found.cost["training_minutes"] == pytest.approx(np.mean(seconds) / 60, abs=1e-4)
    report = json.loads(next((tmp_path / "run").glob("select-*/report.json")).read_text())
    assert {each["name"]: each["value"] for each in report["comparison"]["results"]} == {
        line.arm: line.value for line in found.table().lines
    }


def test_the_cost_in_words() -> None:
    arms = (
        Arm("less", "method", 10, 5, 728.0),
        Arm("random", "control", 10, 5, 0.4),
        Arm(BASE, "none", 0, 0, 0.0),
    )
    lines = (ArmResult("less", 2.0, (2.0,), 5), ArmResult("random", 3.0, (3.0,), 5))
    cost = {"training_minutes": 1.0833, "training_on_everything_minutes": 19.7}
    found = Comparison("random", 0.95, arms, (Results("t", "loss", "tokens", lines),), cost=cost)
    assert found.spent() == [
        (
            "a training takes 1 min 05 s on average over the arms (equal tokens); on everything,"
            " for as many passes, about 19 min 42 s"
        ),
        "choosing took, what arms share counted for each: less 12 min 08 s",
    ]
    assert [line for line in found.lines() if line.startswith("cost")] == [
        f"cost      {text}" for text in found.spent()
    ]
    assert all(f"Cost: {text}." in found.markdown() for text in found.spent())
    assert len(replace(found, arms=arms[1:]).spent()) == 1
    assert replace(found, cost={}).spent() == []


@pytest.mark.parametrize("equal", [(), "passes", ("steps", "passes")])
def test_ways_of_equal_training_are_checked(
    files: dict[str, Path], model: str, tmp_path: Path, equal: Any
) -> None:
    with pytest.raises(UnknownName, match="way of equal training"):
        run(files, model, tmp_path / "run", equal=equal)


def test_an_oracle_of_few_rows_takes_them_all_and_random_others(
    files: dict[str, Path], model: str, tmp_path: Path
) -> None:
    with opened(
        Inputs(tmp_path / "run", pool=files["pool"], model=model, settings=SETTINGS)
    ) as pipeline:
        pool = pipeline.sides["pool"]
        marked = {row for row in range(len(pool)) if pool.record(row).get("family") == "translate"}
        arms = Arms(pipeline, parse(10), np.array([min(marked)]), [0, 1])
        few, many = (
            arms.oracle("oracle", arms.marked("family=translate"), count)
            for count in (len(marked) + 4, 3)
        )
    for seed in (0, 1):
        rows = few.rows(seed).tolist()
        assert (
            len(set(rows)) == len(marked) + 4
            and set(rows) >= marked - {min(marked)}
            and min(marked) not in rows
        )
        assert len(many.rows(seed)) == 3 and set(many.rows(seed).tolist()) < marked
    assert few.rows(0).tolist() != few.rows(1).tolist()


def test_mistakes_are_named(files: dict[str, Path], model: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="length"):
        run(files, model, tmp_path / "run", controls=["lenght"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        run(files, model, tmp_path / "run", arms=["less:fast"])
    with pytest.raises(UserError, match="less selects toward a target"):
        run(files, model, tmp_path / "run", arms=["less"])
    with pytest.raises(UserError, match="no row of the pool"):
        run(files, model, tmp_path / "run", arms=["length"], controls=[], oracle="family=nothing")
    with pytest.raises(ConfigError, match="FIELD=VALUE"):
        run(files, model, tmp_path / "run", arms=["length"], controls=[], oracle="family")
    with pytest.raises(ConfigError, match="two tests have the same name"):
        run(
            files,
            model,
            tmp_path / "run",
            arms=["length"],
            controls=[],
            test=[files["test"], f"test={files['other']}"],
        )
    with pytest.raises(ConfigError, match="level 95"):
        run(files, model, tmp_path / "run", level=95)
    with pytest.raises(UserError, match="no method was named to beat random"):
        run(files, model, tmp_path / "run", arms=["random"])


def test_length_matched_rows_are_as_long_as_the_choice(
    files: dict[str, Path], model: str, tmp_path: Path
) -> None:
    found = run(
        files, model, tmp_path / "run", arms=["length"], controls=["length-matched"], seeds=1
    )
    by = {arm.name: arm for arm in found.arms}
    matched = by["random, long as length"]
    assert matched.rows == 10
    assert matched.tokens == pytest.approx(by["length"].tokens, rel=0.1)
    assert matched.tokens > 1.3 * by["random"].tokens


def test_the_mean_of_tests_resamples_the_seeds_once() -> None:
    """Two tests with the same scores: their mean must be as uncertain as each, not less."""
    rng = np.random.default_rng(0)
    values = {
        "random": rng.normal(2, 0.3, (5, 1)) + np.zeros((5, 400)),
        "a": rng.normal(1, 0.3, (5, 1)) + np.zeros((5, 400)),
    }
    one = {arm: Measured(table, np.ones(400), 3) for arm, table in values.items()}
    tables = compare_measured(
        {"x": one, "y": one}, control="random", level=0.95, measure="loss", equal="steps", seed=0
    )
    by = {table.test: table.line("a") for table in tables}
    assert by[MEAN].difference == pytest.approx(by["x"].difference)
    width = {test: (line.high or 0) - (line.low or 0) for test, line in by.items()}
    assert width[MEAN] == pytest.approx(width["x"], rel=1e-6)
    assert width["x"] == pytest.approx(
        2 * 1.96 * np.sqrt(sum(v[:, 0].var(ddof=1) / 5 for v in values.values())), rel=0.1
    )


def test_trials_differ_by_rows_seed_and_weights() -> None:
    recipe = FinetuneSettings(steps=2)
    one = trials.Trial(np.arange(4), recipe)
    others = [
        trials.Trial(np.arange(1, 5), recipe),
        trials.Trial(np.arange(4), recipe.model_copy(update={"seed": 1})),
        trials.Trial(np.arange(4), recipe, np.ones(4)),
    ]
    assert all(one.canonical() != other.canonical() for other in others)
    assert one.canonical() == trials.Trial(np.arange(4), recipe).canonical()
    base = trials.Trial(np.zeros(0, dtype=np.int64), recipe)
    assert (
        base.canonical()
        == trials.Trial(
            np.zeros(0, dtype=np.int64), recipe.model_copy(update={"seed": 9})
        ).canonical()
    )
