"""The signal "tuned" and the method that reads it: one training on the target, one pass over the
pool.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradsift import methods
from gradsift.commands.plan.plan import plan
from gradsift.commands.preflight import Inputs
from gradsift.commands.select.select import select
from gradsift.commands.session import opened
from gradsift.config import FinetuneSettings
from gradsift.errors import ConfigError, DataError, UserError
from gradsift.model.finetune import finetune
from gradsift.model.load import load_model
from gradsift.model.losses import row_losses
from gradsift.stages import tuned
from gradsift.types import Signal, Signals
from tests.conftest import SETTINGS, rows, write_rows

TUNING = {"mode": "full", "lr": 3e-3, "epochs": 8, "batch_size": 4}
LOSS, TUNED = Signal("loss"), Signal("tuned")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, target = tmp_path_factory.mktemp("files"), rows(24, seed=9)
    return write_rows(folder / "pool.jsonl", rows(40)), write_rows(folder / "dev.jsonl", target)


def given(files: tuple[Path, Path], model: Path, run: Path, **tuning: Any) -> dict[str, Any]:
    settings = {**SETTINGS, "tuning": {**TUNING, **tuning}}
    return {
        "pool": files[0],
        "target": files[1],
        "model": str(model),
        "run": run,
        "settings": settings,
        "target_group": "kind",
    }


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_it_is_the_loss_under_a_model_trained_on_each_group(
    mode: str, files: tuple[Path, Path], model_folder: Path, tmp_path: Path
) -> None:
    with opened(Inputs(**given(files, model_folder, tmp_path / "run", mode=mode))) as pipeline:
        signals, indices = pipeline.signals(frozenset({LOSS, TUNED}))
        pool, target = list(pipeline.encoded("pool")), pipeline.encoded("target")
        groups = list(pipeline.sides["target"].groups)
    assert signals[TUNED].shape == (40, 2) and indices.tolist() == list(range(40))
    plain = row_losses(load_model(str(model_folder)), pool, token_budget=1).mean
    torch.testing.assert_close(signals[LOSS].double(), plain, rtol=1e-4, atol=1e-5)
    for column, group in enumerate(dict.fromkeys(groups)):
        own = [target[i] for i, other in enumerate(groups) if other == group]
        trained = finetune(
            str(model_folder), own, settings=FinetuneSettings(**{**TUNING, "mode": mode})
        )
        torch.testing.assert_close(
            signals[TUNED][:, column].double(),
            row_losses(trained, pool, token_budget=1).mean,
            rtol=1e-4,
            atol=1e-5,
        )
        assert (signals[TUNED][:, column] - signals[LOSS]).abs().max() > 0.05


def test_rows_like_the_target_are_found(
    files: tuple[Path, Path], model_folder: Path, tmp_path: Path
) -> None:
    target = write_rows(
        tmp_path / "back.jsonl", [row for row in rows(60, seed=5) if row["kind"] == "back"]
    )
    given_ = {
        **given(files, model_folder, tmp_path / "run"),
        "target": target,
        "pool_group": "kind",
    }
    found = select("contrast", budget=10, **given_)
    kinds = [row["kind"] for row in rows(40)]
    assert sum(kinds[i] == "back" for i in found.indices) >= 9 and kinds.count("back") == 20
    again = select("contrast", budget=10, options={"per": "token"}, **given_)
    # no second training
    assert {timing.stage for timing in again.timings if not timing.reused} == {"select"}


def test_another_group_costs_one_training(
    files: tuple[Path, Path], model_folder: Path, tmp_path: Path
) -> None:
    common = given(files, model_folder, tmp_path / "run")
    assert sum(stage.stage == "tuned" for stage in plan("contrast", budget=8, **common).stages) == 2
    found = select("contrast", budget=8, **common)
    assert sum(timing.stage == "tuned" and not timing.reused for timing in found.timings) == 2
    other = {**common, "settings": {**common["settings"], "finetune": {"epochs": 1}}}
    # how subsets are judged is another matter
    assert select("contrast", budget=8, **other).indices.tolist() == found.indices.tolist()
    assert all(
        stage.reused
        for stage in plan("contrast", budget=8, **common).stages
        if stage.stage == "tuned"
    )


def test_a_stage_that_was_cut_off_goes_on(
    files: tuple[Path, Path], model_folder: Path, tmp_path: Path
) -> None:
    common = {
        **given(files, model_folder, tmp_path / "run"),
        "settings": {**SETTINGS, "tuning": TUNING, "gradients": {"shard_rows": 16}},
    }
    with opened(Inputs(**common)) as pipeline:
        whole = pipeline.signals(frozenset({TUNED}))[0][TUNED]

    class Tired(Exception):
        pass

    common["run"] = tmp_path / "other"
    with opened(Inputs(**common)) as pipeline:
        kept = pipeline.executor.map

        def one_shard(*args: Any) -> Any:
            yield next(kept(*args))
            raise Tired

        pipeline.executor.map = one_shard  # type: ignore[method-assign]
        with pytest.raises(Tired):
            pipeline.signals(frozenset({TUNED}))
    parts = sorted((tmp_path / "other").glob("tuned-*/parts/*.safetensors"))
    assert len(parts) == 1
    before = parts[0].stat().st_mtime_ns
    with opened(Inputs(**common)) as pipeline:
        kept = pipeline.executor.map
        seen: list[list[int]] = []

        def watched(make: Any, shards: Any, part: Any = None) -> Any:
            seen.append(list(shards))
            assert parts[0].exists() is False or parts[0].stat().st_mtime_ns == before
            return kept(make, shards, part)

        pipeline.executor.map = watched  # type: ignore[method-assign]
        assert torch.equal(pipeline.signals(frozenset({TUNED}))[0][TUNED], whole)
    assert seen == [[1, 2], [0, 1, 2]]  # what was left of the first group, then the second


def test_without_a_usable_target_row_it_says_so(
    files: tuple[Path, Path], model_folder: Path, tmp_path: Path
) -> None:
    silent = write_rows(
        tmp_path / "silent.jsonl",
        [{"id": "a", "messages": [{"role": "user", "content": "no answer"}]}],
    )
    common = given(files, model_folder, tmp_path / "run")
    with pytest.raises(UserError, match="target"):
        select("contrast", budget=8, **{**common, "target": ()})
    with pytest.raises(DataError):
        select("contrast", budget=8, **{**common, "target": silent, "target_group": None})


def choose(
    loss: list[float], tuned: list[list[float]], tokens: list[int], budget: int, **options: Any
) -> list[int]:
    values = {LOSS: torch.tensor(loss), TUNED: torch.tensor(tuned)}
    columns = [f"g{i}" for i in range(len(tuned[0]))]
    signals = Signals(
        values, len(loss), tokens=np.array(tokens, dtype=np.int32), target_groups=columns
    )
    return (
        methods.make("contrast", options)
        .select(signals, budget, rng=np.random.default_rng(0))
        .indices.tolist()
    )


def test_known_answers() -> None:
    # falls per token 1, .5, .2, -1; over rows of 1, 4, 16 and 2 tokens: 1, 2, 3.2, -2; over their
    # square roots: 1, 1, .8, -1.4
    case: dict[str, Any] = {
        "loss": [3.0, 2.0, 2.0, 1.0],
        "tuned": [[2.0], [1.5], [1.8], [2.0]],
        "tokens": [1, 4, 16, 2],
        "budget": 4,
    }
    assert choose(**case) == [2, 1, 0, 3]
    assert choose(**case, per="sqrt") == [0, 1, 2, 3]
    assert choose(**case, per="token") == [0, 1, 2, 3]
    assert choose(**{**case, "budget": 2}) == [2, 1]


def test_groups_take_turns_or_the_best_one_counts() -> None:
    case: dict[str, Any] = {
        "loss": [0.0] * 4,
        "tuned": [[-9.0, 0.0], [-8.0, 0.0], [-7.0, 0.0], [0.0, -1.0]],
        "tokens": [1] * 4,
        "budget": 3,
    }
    assert choose(**case) == [0, 3, 1]
    assert choose(**case, aggregate="max") == [0, 1, 2]


def test_four_bits_are_not_trained_in_full(
    files: tuple[Path, Path], model_folder: Path, tmp_path: Path
) -> None:
    common = given(files, model_folder, tmp_path / "run")
    common["settings"] = {**common["settings"], "model": {"dtype": "nf4"}}
    with (
        opened(Inputs(**common)) as pipeline,
        pytest.raises(ConfigError, match=r"cannot be trained in full.*lora"),
    ):
        tuned.recipes(pipeline, Signal("tuned"))
