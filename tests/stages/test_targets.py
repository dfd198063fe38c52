"""A target group without a usable row: no method goes on as if it had not been asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gradsift
from gradsift import methods
from gradsift.commands.preflight import Inputs
from gradsift.commands.session import opened
from gradsift.errors import DataError
from gradsift.stages import rows as stored
from gradsift.stages.context import Context
from gradsift.store.rows import RowStore
from gradsift.store.run import Run
from tests.conftest import SETTINGS, rows, write_rows

TARGETED = [name for name in methods.METHODS if methods.load(name).target == "required"]


def given(run: Path, pool: Path, target: Any, model: Path) -> dict[str, Any]:
    return {"pool": pool, "target": target, "model": str(model), "run": run, "settings": SETTINGS}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 rows of three groups; the prompts of the two of "law" leave no room for an answer."""
    items = [{**item, "id": f"t{i}"} for i, item in enumerate(rows(50, seed=4))]
    for item in items[7:9]:
        item["kind"], item["messages"][0]["content"] = "law", "too long " * 20
    return write_rows(tmp_path_factory.mktemp("law") / "dev.jsonl", items)


@pytest.mark.parametrize("method", [*TARGETED, "gradmatch"])
def test_a_group_that_cannot_be_encoded_is_named_before_anything_is_spent(
    method: str, pool_file: Path, target: Path, model_folder: Path, tmp_path: Path
) -> None:
    wanted = (
        r"dev\.jsonl:8: no row of the target group 'law' can be used; the first of 2:"
        rf" .*{SETTINGS['encode']['max_length']}.* Raise max_length"
    )
    with pytest.raises(DataError, match=wanted):
        gradsift.select(
            method,
            budget=5,
            target_group="kind",
            **given(tmp_path / "run", pool_file, target, model_folder),
        )
    stages = {artifact.stage for artifact in Run(tmp_path / "run").artifacts() if artifact.complete}
    assert stages == {"encode"}


@pytest.mark.parametrize("method", TARGETED)
def test_a_file_that_cannot_be_read_is_named(
    method: str, pool_file: Path, target_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"messages": 5}\n')
    with pytest.raises(
        DataError,
        match=(
            r"bad\.jsonl: no row of this target file can be used; the first: \S*bad\.jsonl:1:"
            r" \S.*\. \S"
        ),
    ) as error:
        gradsift.select(
            method,
            budget=5,
            **given(
                tmp_path / "run", pool_file, [target_file, tmp_path / "bad.jsonl"], model_folder
            ),
        )
    assert error.value.remedy
    assert not list((tmp_path / "run").glob("warmup-*"))


@pytest.mark.parametrize("backend", ["less", "ekfac"])
def test_scores_are_refused_too(
    backend: str, pool_file: Path, target: Path, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="target group 'law'"):
        gradsift.score(
            backend, target_group="kind", **given(tmp_path / "run", pool_file, target, model_folder)
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["less", "g2is", "gist"])
def test_a_group_whose_gradients_are_unusable_is_named(
    method: str,
    pool_file: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items = [
        {**item, "kind": "law" if i == 5 else "rest"} for i, item in enumerate(rows(20, seed=4))
    ]
    common = given(
        tmp_path / "run", pool_file, write_rows(tmp_path / "dev.jsonl", items), model_folder
    )
    real = stored.gradients

    def with_a_zero_row(
        context: Context, side: str, checkpoint: int, *rest: Any, **more: Any
    ) -> RowStore:
        store = real(context, side, checkpoint, *rest, **more)
        if side == "pool":
            return store
        values = store[0:20].float()
        values[5] = 0
        copy = RowStore.create(
            tmp_path / f"copy{checkpoint}",
            recipe_digest="0" * 64,
            ids=store.ids,
            dim=64,
            spec=store.spec,
            shard_rows=20,
        )
        if copy.missing():
            copy.write(0, values, norms=store.norms, losses=store.losses, tokens=store.tokens)
        return copy

    monkeypatch.setattr(stored, "gradients", with_a_zero_row)
    with (
        opened(Inputs(**common, target_group="kind")) as pipeline,
        pytest.raises(
            DataError,
            match=r"dev\.jsonl:6: no row of the target group 'law' can be used; .*gradient is zero",
        ),
    ):
        pipeline.signals(methods.make(method).needs())


def test_a_group_that_keeps_one_row_goes_on(
    pool_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    items = [
        {**item, "kind": "law" if i in (5, 6) else "rest"}
        for i, item in enumerate(rows(40, seed=4))
    ]
    items[5]["messages"][0]["content"] = "too long " * 20
    common = given(
        tmp_path / "run", pool_file, write_rows(tmp_path / "dev.jsonl", items), model_folder
    )
    with opened(Inputs(**common, target_group="kind")) as pipeline:
        signals, _ = pipeline.signals(methods.make("rds").needs())
    assert list(signals.target_groups).count("law") == 1
