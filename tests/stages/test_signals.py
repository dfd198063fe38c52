"""What a method declares of its rows - their width, their modules - is what it gets, or an error
that names the setting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradsift.commands.preflight import Inputs
from gradsift.commands.session import opened
from gradsift.errors import MismatchError
from gradsift.rules.blocks import Narrow, Raw
from gradsift.types import Signal
from tests.conftest import SETTINGS


@pytest.fixture(scope="module")
def common(
    tmp_path_factory: pytest.TempPathFactory, pool_file: Path, target_file: Path, model_folder: Path
) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("signals") / "run"
    return {
        "pool": pool_file,
        "target": target_file,
        "model": str(model_folder),
        "run": run,
        "settings": SETTINGS,
    }


@pytest.mark.parametrize("checkpoints", ["last", "mean", "each"])
@pytest.mark.parametrize("side", ["pool", "target"])
def test_rows_come_in_the_declared_width(
    side: Any, checkpoints: Any, common: dict[str, Any]
) -> None:
    stored, narrow, wide = (
        Signal("rows", side=side, checkpoints=checkpoints, dim=dim) for dim in (None, 16, 400)
    )
    with opened(Inputs(**common)) as pipeline:
        signals, _ = pipeline.signals(frozenset({stored, narrow, wide}))
    for whole, part, same in zip(
        *(v if isinstance(v := signals[s], list) else [v] for s in (stored, narrow, wide)),
        strict=True,
    ):
        assert whole.shape[1] == same.shape[1] == 64 and part.shape == (whole.shape[0], 16)
        assert torch.allclose(part[3:9], whole[3:9].float() @ Narrow(whole, 16).signs)
        if checkpoints != "mean":
            assert torch.allclose(
                Raw(part)[3:9], Raw(whole)[3:9] @ Narrow(whole, 16).signs, rtol=1e-4, atol=1e-6
            )


def test_narrow_rows_keep_products_and_are_the_same_for_every_run() -> None:
    rows = torch.nn.functional.normalize(
        torch.randn(40, 900, generator=torch.Generator().manual_seed(0)), dim=1
    )
    part = Narrow(rows, 400)[0:40]
    assert (part @ part.T - rows @ rows.T).abs().max() < 6 / 400**0.5
    assert torch.equal(part, Narrow(rows, 400)[0:40])


@pytest.mark.parametrize(
    "signal",
    [Signal("rows", modules="linear"), Signal("influence", backend="cosine", modules="linear")],
)
def test_a_run_of_other_modules_is_refused_by_name(
    signal: Signal, common: dict[str, Any], tmp_path: Path
) -> None:
    with (
        opened(Inputs(**common)) as pipeline,
        pytest.raises(MismatchError, match=r"modules = 'lora'.*\[gradients\] modules = \"linear\""),
    ):
        pipeline.recipes(frozenset({signal}))
    linear = {**SETTINGS, "gradients": {**SETTINGS["gradients"], "modules": "linear"}}
    with opened(Inputs(**{**common, "run": tmp_path / "run", "settings": linear})) as pipeline:
        assert [recipe.stage for recipe in pipeline.recipes(frozenset({signal}))][-1] in (
            "gradients",
            "influence",
        )


def test_what_a_signal_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="dim=8 of loss"):
        Signal("loss", dim=8)
    with pytest.raises(ValueError, match="at least 1"):
        Signal("rows", dim=0)
    with pytest.raises(ValueError, match="modules='linear' of embeddings"):
        Signal("embeddings", modules="linear")
