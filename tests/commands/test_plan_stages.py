"""The stages that a plan lists are those that the selection makes, for every method under every
constraint.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gradsift
from gradsift import methods
from gradsift.commands import budget as budgets
from gradsift.commands.plan.plan import plan, stage_recipes
from gradsift.commands.preflight import Inputs
from gradsift.commands.select.select import limits_of, select_in
from gradsift.commands.session import opened
from gradsift.compute.progress import silent
from gradsift.stages.pipeline import Pipeline
from gradsift.stages.recipe import Recipe
from gradsift.store.run import Run
from tests.conftest import SETTINGS, rows, write_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)
WORDS = "the grey geese fly over the old mill in the late evening light of autumn"
# name -> (constraints as a user gives them, budget)
CONSTRAINTS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "25%"),
    "near": ({"near": 0.9}, "25%"),
    "near by embeddings": ({"near": 0.9, "near_by": "embeddings"}, "25%"),
    "decontaminate": ({"decontaminate": ["exam.jsonl"]}, "25%"),
    "per group": ({"per_group": ["back=2:50%"]}, "25%"),
    "tokens": ({}, "300-tokens"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pool.jsonl with 40 rows, one of which overlaps exam.jsonl; dev.jsonl with 8 target rows."""
    made = tmp_path_factory.mktemp("stages")
    pool = rows(40)
    pool[4]["messages"][0]["content"] = WORDS
    write_rows(made / "pool.jsonl", pool)
    write_rows(made / "dev.jsonl", rows(8, seed=9))
    write_rows(made / "exam.jsonl", [{"id": "e", "messages": pool[4]["messages"]}])
    return made


def constraint(name: str, folder: Path) -> tuple[dict[str, Any], str]:
    given, budget = CONSTRAINTS[name]
    return {
        key: [folder / file for file in value] if key == "decontaminate" else value
        for key, value in given.items()
    }, budget


def inputs(folder: Path, model: Path, method: str) -> dict[str, Any]:
    target = [] if methods.load(method).target == "none" else [folder / "dev.jsonl"]
    return {
        "pool": folder / "pool.jsonl",
        "target": target,
        "model": str(model),
        "settings": SETTINGS,
        "pool_group": "kind",
    }


@pytest.fixture(scope="module")
def pipelines(folder: Path, model_folder: Path) -> Iterator[dict[bool, Pipeline]]:
    """Of a run that is never made: with a target (True) and without."""
    shared = {"model": str(model_folder), "settings": SETTINGS, "pool_group": "kind"}
    pool, target = folder / "pool.jsonl", folder / "dev.jsonl"
    with (
        opened(Inputs(folder / "never", pool, target, **shared), keep=False) as targeted,
        opened(Inputs(folder / "never", pool, **shared), keep=False) as plain,
    ):
        yield {True: targeted, False: plain}


class Asked(Exception):
    """A selection asked for this artifact."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.stage)
        self.recipe = recipe


def selected(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, *arguments: Any) -> Recipe:
    """The recipe of the selection that `select_in` makes with these arguments, as it asks for it;
    nothing is computed.
    """

    def make(recipe: Recipe, fill: Any) -> Any:
        raise Asked(recipe)

    monkeypatch.setattr(pipeline, "make", make)
    with pytest.raises(Asked) as asked:
        select_in(pipeline, *arguments)
    monkeypatch.undo()
    return asked.value.recipe


@pytest.mark.parametrize("method", sorted(methods.METHODS))
def test_a_plan_lists_what_the_selection_makes(
    monkeypatch: pytest.MonkeyPatch, pipelines: dict[bool, Pipeline], folder: Path, method: str
) -> None:
    selector = methods.make(method)
    listed: dict[str, list[Recipe]] = {}
    for targeted in {"required": [True], "optional": [True, False], "none": [False]}[
        selector.target
    ]:
        pipeline = pipelines[targeted]
        for name in CONSTRAINTS:
            given, budget = constraint(name, folder)
            limits, wanted = limits_of(given, pipeline.config, silent()), budgets.parse(budget)
            *stages, selection = listed[name] = stage_recipes(
                pipeline, method, selector, wanted, limits, 3
            )
            asked = selected(monkeypatch, pipeline, method, selector, wanted, limits, 3)
            assert (asked.stage, asked.digest) == ("select", selection.digest)
            assert [
                f"{key.partition('-')[2]} {digest}" for key, digest in sorted(asked.inputs.items())
            ] == [f"{stage.stage} {stage.digest}" for stage in stages]
        check_differences(listed, "target" in pipeline.sides)
    assert not (folder / "never").exists()


def check_differences(listed: dict[str, list[Recipe]], targeted: bool) -> None:
    """Each constraint makes another selection; those that read a signal bring its stages, the
    others none.
    """
    assert len({recipes[-1].digest for recipes in listed.values()}) == len(listed)
    stages = {
        name: {recipe.digest: recipe.stage for recipe in recipes[:-1]}
        for name, recipes in listed.items()
    }
    assert [recipe.stage for recipe in listed["none"]].count("encode") == 1 + targeted
    for name in ("decontaminate", "per group", "tokens"):
        assert stages[name] == stages["none"]
    assert stages["none"].items() <= stages["near"].items() & stages["near by embeddings"].items()
    assert {"warmup", "gradients"} <= set(stages["near"].values())
    assert "embeddings" in stages["near by embeddings"].values()


def complete(run: Path) -> set[str]:
    return (
        {artifact.path.name for artifact in Run(run).artifacts() if artifact.complete}
        if run.exists()
        else set()
    )


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "run"


# Six methods, each under another constraint.
DRAWN = list(
    zip(
        random.Random(18).sample(sorted(methods.METHODS), len(CONSTRAINTS)),
        CONSTRAINTS,
        strict=True,
    )
)


@pytest.mark.parametrize(("method", "name"), DRAWN)
def test_a_selection_makes_what_the_plan_listed(
    shared_run: Path, folder: Path, model_folder: Path, method: str, name: str
) -> None:
    given, budget = constraint(name, folder)
    arguments = inputs(folder, model_folder, method) | {
        "budget": budget,
        "constraints": given,
        "run": shared_run,
        "seed": 3,
    }
    before = complete(shared_run)
    planned = plan(method, **arguments)
    assert complete(shared_run) == before
    gradsift.select(method, **arguments)
    after = complete(shared_run)
    folders = {
        f"{stage.stage}-{method}-{stage.digest}"
        if stage.stage == "select"
        else f"{stage.stage}-{stage.digest}": stage.reused
        for stage in planned.stages
    }
    assert after - before == {name for name, reused in folders.items() if not reused}
    assert {name for name, reused in folders.items() if reused} <= before
    again = plan(method, **arguments)
    assert all(stage.reused for stage in again.stages) and (again.bytes, again.seconds) == (0, 0)
