"""Adam rows without momentum (`[gradients] adam_momentum = false`), and in the form that a method's
preset asks for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradsift.commands.preflight import Inputs
from gradsift.commands.session import opened
from gradsift.config import GradientSettings
from gradsift.methods import make
from gradsift.model.checkpoints import read_adam_state
from gradsift.model.layers import tracked_modules
from gradsift.stages.pipeline import Pipeline
from gradsift.stages.rows import gradients, recipe
from gradsift.store.artifact import Artifact
from gradsift.types import Signal
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


def test_a_released_preset_reads_rows_of_the_released_form(
    pool_file: Path, target_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    """Whatever the run's own form is: the rows of a run whose form is the released one."""
    forms = ("paper", "released")
    folders = {form: tmp_path / form for form in forms}
    digests = {}
    for form in forms:
        given = common(folders[form], pool_file, model_folder, adam_form=form)
        with opened(Inputs(target=target_file, **given)) as pipeline:
            for name in ("less", "tagcos", "g2is"):
                released = make(name, {"preset": "released"})
                digests[form, name] = [
                    recipe.digest for recipe in pipeline.recipes(released.needs())
                ]
                papers = make(name, {"preset": "paper"})
                digests[form, name, "paper"] = [
                    recipe.digest for recipe in pipeline.recipes(papers.needs())
                ]
            if form == "paper":
                signal = Signal("rows", transform="adam", adam_form="released")
                asked, _ = pipeline.signals(frozenset({signal}))
                plain, _ = pipeline.signals(frozenset({Signal("rows", transform="adam")}))
                rows, other = asked[signal][0:40], plain[Signal("rows", transform="adam")][0:40]
            else:
                own = Signal("rows", transform="adam")
                settled, _ = pipeline.signals(frozenset({own}))
                assert torch.equal(settled[own][0:40], rows)
                assert not torch.equal(rows, other)
    for name in ("less", "tagcos", "g2is"):
        assert digests["paper", name] == digests["released", name]
        # a preset of the paper leaves the form to the run
        assert digests["paper", name, "paper"] != digests["released", name, "paper"]


def test_only_adam_rows_have_a_form() -> None:
    with pytest.raises(ValueError, match="adam_form='released' of rows with transform='none'"):
        Signal("rows", adam_form="released")
    with pytest.raises(ValueError, match="adam_form='paper' of loss"):
        Signal("loss", adam_form="paper")
