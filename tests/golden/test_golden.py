"""What each released version of the format wrote is read today, with the same values. The folders
are never made anew (see make.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gradsift.commands.runs import diff, show
from gradsift.commands.runs import verify as verified
from gradsift.data.encode import EncodedRows
from gradsift.store.artifact import SCHEMA
from gradsift.store.rows import RowStore
from gradsift.store.run import Run
from tests.golden.make import DIM, IDS, LINES, NOT_FINITE, ZERO, raw

FOLDERS = sorted(path for path in Path(__file__).parent.glob("v*") if path.is_dir())
each_version = pytest.mark.parametrize("golden", FOLDERS, ids=lambda path: path.name)


def test_there_is_one_for_every_version() -> None:
    assert [path.name for path in FOLDERS] == [f"v{number}" for number in range(1, SCHEMA + 1)]
    assert (
        sum(
            path.stat().st_size for path in Path(__file__).parent.rglob("v*/**/*") if path.is_file()
        )
        < 200_000
    )


@each_version
def test_it_verifies_and_has_its_contents(golden: Path) -> None:
    """No file of it is written by looking at it."""
    before = {path: path.stat().st_mtime_ns for path in golden.rglob("*")}
    assert verified(golden / "run") == []
    found = {artifact.path.name: artifact.content for artifact in Run(golden / "run").artifacts()}
    assert found == json.loads((golden / "contents.json").read_bytes())
    told = show(golden / "run")
    assert [stage["stage"] for stage in told["stages"]] == [
        "encode",
        "gradients",
        "gradients",
        "influence",
        "select",
    ]
    assert all(stage["complete"] for stage in told["stages"])
    assert diff(golden / "run", golden / "run")["common"] == 3
    assert {path: path.stat().st_mtime_ns for path in golden.rglob("*")} == before


@each_version
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_rows_and_columns_are_what_was_put_in(golden: Path, dtype: str) -> None:
    (found,) = [
        a
        for a in Run(golden / "run").artifacts()
        if a.stage == "gradients" and a.recipe["config"]["store_dtype"] == dtype
    ]
    store = RowStore.open(found.path, verify=True)
    usable = [i for i in range(len(IDS)) if i not in (ZERO, NOT_FINITE)]
    assert list(store.ids) == IDS
    assert (store.shape, store.dtype, store.spec) == ((8, DIM), dtype, {"projection": "sketch"})
    assert store.usable.nonzero()[:, 0].tolist() == usable
    assert sorted(store.quarantined().values()) == [1, 1]
    expected = raw(range(len(IDS)))[usable]
    unit = expected / expected.norm(dim=1, keepdim=True)
    assert (store[0:8][usable].float() - unit).abs().max() <= (
        2**-11 if dtype == "float16" else 1 / 127 / 2 + 1e-6
    )
    assert store.scales[usable].tolist() == [13.0 * 2**i for i in usable]
    assert store.norms[usable].tolist() == [i + 0.5 for i in usable]
    assert store.losses[usable].tolist() == [i / 4 for i in usable]
    assert store.tokens[usable].tolist() == [i + 1 for i in usable]


@each_version
def test_the_other_stages_are_read_too(golden: Path) -> None:
    by_stage = {artifact.stage: artifact for artifact in Run(golden / "run").artifacts()}
    tokens = EncodedRows.load(by_stage["encode"].path)
    assert tokens[1] == {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}
    assert tokens.notes == ["by hand"]
    scores = by_stage["influence"].tensors("scores.safetensors")["scores"]
    assert torch.equal(scores, torch.arange(8.0)[:, None] / 8)
    assert by_stage["select"].tensors("subset.safetensors")["indices"].tolist() == [2, 0, 1]
    assert by_stage["select"].file("selected.jsonl").read_bytes().split(b"\n") == [*LINES, b""]
