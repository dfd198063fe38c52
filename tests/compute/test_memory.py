"""Memory that runs out over batches of rows: what every pass of a run makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from gradsift.commands.preflight import Inputs
from gradsift.commands.score import score
from gradsift.commands.select.select import select
from gradsift.commands.session import opened
from gradsift.compute.memory import Halving
from gradsift.errors import DataError, OutOfMemory
from gradsift.model.finetune import heldout_loss
from gradsift.model.load import load_model
from gradsift.types import Signal
from tests.conftest import SETTINGS, rows, write_rows

LONG, MOST = 20, 40  # the place of the row that never fits, and the most padded tokens that do


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, pool, target = tmp_path_factory.mktemp("files"), rows(40), rows(8, seed=9)
    for items, place in ((pool, LONG), (target, 3)):
        items[place]["messages"][0]["content"] = "abcd" * 9
    return write_rows(folder / "pool.jsonl", pool), write_rows(folder / "dev.jsonl", target)


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Outside training a forward pass over more than MOST padded tokens runs out of memory; the
    sizes that were tried.
    """
    forward, tried = LlamaForCausalLM.forward, []

    def limited(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        tried.append(input_ids.numel())
        if not self.training and tried[-1] > MOST:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", limited)
    return tried


def given(files: tuple[Path, Path], model: Path, run: Path) -> dict[str, Any]:
    tuning = {"mode": "full", "epochs": 1, "batch_size": 4}
    settings = {
        **SETTINGS,
        "gradients": {**SETTINGS["gradients"], "token_budget": 1024},
        "tuning": tuning,
    }
    return {
        "pool": files[0],
        "target": files[1],
        "model": str(model),
        "run": run,
        "settings": settings,
    }


SIGNALS = {
    "embeddings": Signal("embeddings"),
    "loss": Signal("loss"),
    "ifd": Signal("ifd"),
    "tuned": Signal("tuned"),
    "rows": Signal("rows"),
    "ekfac": Signal("influence", backend="ekfac"),
    "less": Signal("influence", backend="less"),
}


@pytest.mark.slow
def test_every_signal_leaves_out_the_row_that_never_fits_and_says_so(
    files: tuple[Path, Path], model_folder: Path, tmp_path: Path, scarce: list[int]
) -> None:
    others = [i for i in range(40) if i != LONG]
    with opened(Inputs(**given(files, model_folder, tmp_path / "run"))) as pipeline:
        for name, signal in SIGNALS.items():
            signals, kept = pipeline.signals(frozenset({signal}))
            assert kept.tolist() == others, name
            value = signals[signal]
            assert bool(torch.as_tensor(value[0:39]).isfinite().all()), name
            if name == "ekfac":
                assert value.shape == (39, 7)
                assert len(signals.target_groups) == 7
    run = tmp_path / "run"
    assert max(scarce) > MOST
    for stage in ("embeddings", "loss", "ifd", "tuned", "gradients", "influence"):
        made = [json.loads(path.read_bytes()) for path in run.glob(f"{stage}-*/manifest.json")]
        ours = [
            manifest
            for manifest in made
            if manifest["counts"]["rows"] == 40 and "quarantined" in manifest["counts"]
        ]
        assert ours, stage
        assert all(
            manifest["counts"]["quarantined"] == {"out of memory": 1} for manifest in ours
        ), stage
        assert any(
            manifest["extra"].get("batch_halvings", {}).get("times", 0) > 0 for manifest in ours
        ), stage
    (fitted,) = (json.loads(path.read_bytes()) for path in run.glob("curvature-*/manifest.json"))
    assert fitted["counts"]["rows"] == 39
    assert fitted["extra"]["batch_halvings"]["times"] > 0


@pytest.mark.slow
def test_a_selection_and_scores_go_on_without_it(
    files: tuple[Path, Path], model_folder: Path, tmp_path: Path, scarce: list[int]
) -> None:
    options = given(files, model_folder, tmp_path / "run")
    assert (
        LONG
        not in select(
            "perplexity", budget="100%", allow_short=True, **{**options, "target": ()}
        ).indices
    )
    assert len(select("contrast", budget="100%", allow_short=True, **options)) == 39
    found = score("ekfac", **options)
    assert (found.rows, found.usable, len(found.columns)) == (40, 39, 7)
    assert found.left_out == ["r003"]


def test_where_too_many_rows_do_not_fit_the_stage_stops(
    files: tuple[Path, Path],
    model_folder: Path,
    tmp_path: Path,
    scarce: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.compute.test_memory.MOST", 30)
    with (
        opened(Inputs(**given(files, model_folder, tmp_path / "run"))) as pipeline,
        pytest.raises(DataError, match=r"have no usable loss .* out of memory"),
    ):
        pipeline.signals(frozenset({Signal("loss")}))


def test_held_out_losses_are_of_all_rows_or_none(model_folder: Path, scarce: list[int]) -> None:
    short, long = ({"input_ids": [5] * size, "labels": [5] * size} for size in (20, MOST + 1))
    model = load_model(str(model_folder))
    assert heldout_loss(model, [short] * 5).tokens.tolist() == [19] * 5
    with pytest.raises(OutOfMemory, match="test row 1 does not fit"):
        heldout_loss(model, [short, long])


def test_what_fits_is_learned_once() -> None:
    halving, lengths, tried = Halving(), np.full(64, 10), []

    def work(batch: np.ndarray) -> list[int]:
        tried.append(len(batch))
        if len(batch) > 8:
            raise MemoryError
        return batch.tolist()

    for _ in range(2):  # one object may serve several passes
        made = [
            m
            for _, m, _ in halving.run([np.arange(32), np.arange(32, 64)], lengths, work)
            if m is not None
        ]
        assert sorted(i for m in made for i in m) == list(range(64))
    assert tried == [32, 16] + [8] * 16
    assert halving.failed == set()
    assert halving.count == 12
