"""Null targets: the same method toward rows drawn from the pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradsift
from gradsift import methods
from gradsift.commands.plan.plan import plan
from gradsift.commands.preflight import Inputs
from gradsift.commands.select.null import DRAWS, SEED, Null
from gradsift.commands.session import opened
from gradsift.errors import UserError
from gradsift.store.artifact import Artifact
from gradsift.types import Signal
from tests.conftest import SETTINGS, rows, write_rows


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("null")
    target = [row for row in rows(16, seed=9) if row["kind"] == "back"][:6]
    return {
        "pool": write_rows(folder / "pool.jsonl", rows(40)),
        "target": write_rows(folder / "dev.jsonl", target),
        "model": str(model_folder),
        "run": folder / "run",
        "settings": SETTINGS,
    }


def told(chosen: gradsift.Selection) -> dict[str, Any]:
    artifact = Artifact.load(chosen.folder)
    assert artifact is not None
    return artifact.manifest["extra"]["null"]


def test_picks_are_measured_against_the_same_rule_toward_drawn_rows(given: dict[str, Any]) -> None:
    chosen = gradsift.select("rds", budget=8, null=True, **given)
    plain = gradsift.select("rds", budget=8, **given)
    assert chosen.indices.tolist() == plain.indices.tolist() and chosen.folder != plain.folder
    found = told(chosen)
    assert len(found["draws"]) == DRAWS and found["rows"] == 6

    inputs = Inputs(**{**given, "pool": given["pool"]})
    with opened(inputs) as pipeline:
        values, kept = pipeline.signals(methods.make("rds").needs())
        embeddings = values[Signal("embeddings")][0 : len(kept)].float()
        target = values[Signal("embeddings", side="target")][0:6].float()
    rng = np.random.default_rng(SEED)

    def above(toward: torch.Tensor, free: np.ndarray, k: int) -> float:
        """Turns lost, one after the other; then how far the picks stand above all."""
        cosines = (embeddings[free] @ toward.T).numpy()
        picks: list[int] = []
        for place in range(len(free)):
            for column in (-cosines).argsort(axis=0, kind="stable").T:
                if column[place] not in picks:
                    picks.append(int(column[place]))
        score = cosines.max(axis=1).astype(np.float64)
        return float((score[picks[:k]].mean() - score.mean()) / score.std())

    assert found["target"] == pytest.approx(above(target, np.arange(len(kept)), 8), abs=1e-3)
    for value in found["draws"]:
        drawn = np.sort(rng.choice(np.arange(len(kept)), size=6, replace=False))
        free = np.setdiff1d(np.arange(len(kept)), drawn)
        assert value == pytest.approx(
            above(embeddings[drawn], free, round(8 * len(free) / len(kept))), abs=2e-3
        )
    again = gradsift.select("rds", budget=8, null=True, **given)
    assert all(timing.reused for timing in again.timings)


def test_a_target_that_the_scores_do_not_tell_from_others_is_a_warning() -> None:
    lost = Null(1.0, (0.5, 1.25), 20)
    assert not lost.above and lost.text().endswith(
        "toward 2 draws of 20 pool rows in the target's place 0.88 (0.50 to 1.25). These scores"
        " tell the target from no other: take random rows, or train longer."
    )
    seen = Null(2.0, (1.0,), 1)
    assert seen.above and seen.text() == (
        "Null target: the picks' scores stand 2.00 standard deviations above the pool's; toward"
        " 1 row drawn from the pool in the target's place 1.00."
    )


@pytest.mark.parametrize("method", ["bm25", "contrast", "bids", "g2is"])
def test_each_signal_of_a_target_has_its_null(method: str, given: dict[str, Any]) -> None:
    chosen = gradsift.select(method, budget=8, null=True, **given)
    found = told(chosen)
    assert len(found["draws"]) == (1 if method == "contrast" else DRAWS)
    assert np.isfinite([found["target"], *found["draws"]]).all()
    said = chosen.report.with_suffix(".md").read_text()
    assert any(line.startswith("null      the picks' scores stand") for line in chosen.lines())
    assert "Null target: the picks' scores stand" in said


def test_a_plan_counts_the_null_targets(given: dict[str, Any], tmp_path: Path) -> None:
    fresh = {**given, "run": tmp_path / "run"}
    with_null = plan("rds", budget=8, null=True, **fresh)
    without = plan("rds", budget=8, **fresh)
    extra = [stage for stage in with_null.stages if stage.stage == "null target"]
    assert len(extra) == 1 and extra[0].label == f"{DRAWS} x 6 pool rows" and extra[0].seconds > 0
    assert not any(stage.stage == "null target" for stage in without.stages)
    assert with_null.seconds > without.seconds - 1 and with_null.bytes > without.bytes


def test_without_a_target_there_is_no_null(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="tagcos reads none"):
        gradsift.select("tagcos", budget=8, null=True, **{**given, "target": ()})
    with pytest.raises(UserError, match="gradmatch was given none"):
        gradsift.select("gradmatch", budget=8, null=True, **{**given, "target": ()})


def test_where_every_row_is_picked_nothing_can_be_told(given: dict[str, Any]) -> None:
    chosen = gradsift.select("bm25", budget=40, null=True, **given)
    found = told(chosen)
    assert (found["target"], found["draws"], found["above"]) == (None, None, None)
    assert not any("Null target" in text for text in chosen.warnings)
    assert "Null target: nothing can be told" in chosen.report.with_suffix(".md").read_text()
    assert not Null(float("nan"), (1.0,), 3).above
