"""Adam rows without momentum: `[gradients] adam_momentum = false`, from the warm-up's own second
moments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradsift.commands.preflight import Inputs
from gradsift.commands.session import opened
from gradsift.config import GradientSettings
from gradsift.model.checkpoints import read_adam_state
from gradsift.model.layers import tracked_modules
from gradsift.stages.pipeline import Pipeline
from gradsift.stages.rows import gradients, recipe
from gradsift.store.artifact import Artifact
from tests.conftest import SETTINGS
from tests.gradients.one_by_one import one_by_one

FORMS: Any = pytest.mark.parametrize("form", ["paper", "released"])


def common(run: Path, pool: Path, model: Path, **gradients: Any) -> dict[str, Any]:
    settings = {**SETTINGS, "gradients": {**SETTINGS["gradients"], **gradients}}
    return {"pool": pool, "model": str(model), "run": run, "settings": settings}


def naive(pipeline: Pipeline, checkpoint: int, form: str, rows: range) -> torch.Tensor:
    """Projected rows, each by autograd alone: g / sqrt(b2 v + (1 - b2) g^2), entry by entry."""
    at = pipeline.checkpoints()[checkpoint]
    model, state, encoded = pipeline.model_at(at), read_adam_state(at), pipeline.encoded("pool")
    tracked, b2 = tracked_modules(model), state.betas[1]
    weights: dict[str, Any] = {name: module.weight for name, module in tracked.items()}
    grads, _ = one_by_one(model, [encoded[i] for i in rows], list(weights.values()))
    bound = pipeline.projection.bind(
        {name: tuple(weight.shape) for name, weight in weights.items()}
    )
    found = bound.start(len(rows))
    for k, name in enumerate(weights):
        g = torch.stack([row[k] for row in grads]).double()
        second = b2 * state.v[f"{name}.weight"].double() + (1 - b2) * g * g
        corrected = second / (1 - b2 ** (state.step + 1))
        direction = (
            g / (second + state.eps).sqrt()
            if form == "released"
            else g / (corrected.sqrt() + state.eps)
        )
        bound.add(found, name, direction.float())
    return torch.nn.functional.normalize(bound.finish(found), dim=1)


@FORMS
def test_stored_rows_are_the_plain_loops(
    form: Any, pool_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    given = common(tmp_path / "run", pool_file, model_folder, adam_form=form, adam_momentum=False)
    with opened(Inputs(**given)) as pipeline:
        rows = gradients(pipeline, "pool", 1, "adam")
        wanted = naive(pipeline, 1, form, range(12))
        made = Artifact.load(rows.path)
    assert made is not None and made.recipe["config"]["adam_momentum"] is False
    assert torch.nn.functional.cosine_similarity(rows[0:12].float(), wanted).min() > 0.9999


@pytest.mark.slow
def test_rows_without_momentum_share_less_and_runs_before_the_choice_are_read_as_before(
    pool_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    cosines = {}
    for momentum in (True, False):
        with opened(
            Inputs(
                **common(tmp_path / f"{momentum}", pool_file, model_folder, adam_momentum=momentum)
            )
        ) as pipeline:
            artifact = Artifact.load(gradients(pipeline, "pool", 2, "adam").path)
            assert artifact is not None
            cosines[momentum] = artifact.manifest["extra"]["mean_pairwise_cosine"]
            plain = recipe(pipeline, "pool", 2, "none")
        assert not any(name.startswith("adam_") for name in plain.config)
    assert cosines[False] < cosines[True]
    assert "adam_momentum" not in GradientSettings().canonical()
    assert GradientSettings(adam_momentum=False).canonical()["adam_momentum"] is False
