"""The methods through a whole run on a small random model: stages shared, optional targets, target
rows without a signal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import gradsift
from gradsift.commands.select.select import Selection
from gradsift.errors import DataError
from gradsift.rules import topk
from gradsift.store.artifact import Artifact
from gradsift.store.rows import RowStore
from tests.conftest import SETTINGS, rows, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
    ),
]

SHORT = {**SETTINGS, "warmup": {**SETTINGS["warmup"], "checkpoints": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def target(folder: Path) -> Path:
    """25 rows of two kinds; the prompt of the fourth leaves no room for its answer."""
    items = [item for item in rows(44, seed=9) if item["kind"] == "back"] + rows(6, seed=5)[::2]
    items[3]["messages"][0]["content"] = "too long " * 20
    return write_rows(
        folder / "dev.jsonl", [{**item, "id": f"t{i}"} for i, item in enumerate(items)]
    )


@pytest.fixture(scope="module")
def select(folder: Path, pool_file: Path, model_folder: Path) -> Any:
    def chosen(method: str, **more: Any) -> Selection:
        given = {"target_group": "kind"} if "target" in more else {}
        run = folder / "run"
        return gradsift.select(
            method,
            pool=pool_file,
            model=str(model_folder),
            run=run,
            budget=9,
            settings=SHORT,
            **given,
            **more,
        )

    return chosen


def made(chosen: Selection) -> dict[str, list[bool]]:
    """Stage -> whether each of its artifacts was reused."""
    found: dict[str, list[bool]] = {}
    for timing in chosen.timings:
        found.setdefault(timing.stage, []).append(timing.reused)
    return found


def stores(folder: Path, stage: str) -> dict[int, RowStore]:
    """Complete stores of a stage, by number of rows."""
    found = [
        RowStore.open(path)
        for path in (folder / "run").glob(f"{stage}-*")
        if Artifact.load(path) is not None
    ]
    return {store.shape[0]: store for store in found}


def test_embeddings_are_made_once_and_a_target_row_without_one_is_left_out(
    select: Any, folder: Path, target: Path
) -> None:
    first = select("rds", target=target)
    assert made(first)["embeddings"] == [False, False] and "warmup" not in made(first)
    assert made(select("kcenter"))["embeddings"] == [True]
    store = stores(folder, "embeddings")
    pool, dev = store[72][0:72].float(), store[25][0:25].float()
    assert store[25].usable.tolist() == [i != 3 for i in range(25)]
    scores = pool @ dev[store[25].usable].T
    turns = topk.round_robin(scores, 9, taken="lose")
    assert sorted(turns.indices.tolist()) == sorted(first.indices.tolist())
    table = pq.read_table(first.folder / "scores.parquet").to_pydict()
    assert np.isfinite([g for g in table["gain"] if g is not None]).all()


def test_a_stopped_embedding_goes_on_where_it_was(select: Any, folder: Path) -> None:
    (path,) = {store.path for n, store in stores(folder, "embeddings").items() if n == 72}
    kept = path / "rows-00001.safetensors"
    before = kept.stat().st_mtime_ns
    (path / "manifest.json").unlink()
    (path / "rows-00000.safetensors").unlink()
    again = select("kcenter", seed=1)
    assert made(again)["embeddings"] == [False] and kept.stat().st_mtime_ns == before
    assert len(again) == 9


def test_groups_of_the_target_follow_its_usable_rows(
    select: Any, folder: Path, target: Path
) -> None:
    chosen = select("gist", target=target)
    store = RowStore.open(
        next(p for p in (folder / "run").glob("gradients-*") if RowStore.open(p).shape[0] == 25)
    )
    pool = RowStore.open(
        next(p for p in (folder / "run").glob("gradients-*") if RowStore.open(p).shape[0] == 72)
    )
    raw = (store[0:25].float() * store.scales[:, None])[store.usable].double()
    assert len(raw) == 24
    basis = torch.linalg.svd(raw, full_matrices=False).Vh
    means = torch.stack([raw[:21].mean(0), raw[21:].mean(0)]) @ basis.T
    inside = pool[0:72].double() @ basis.T
    cosine = (
        torch.nn.functional.normalize(inside, dim=1) @ torch.nn.functional.normalize(means, dim=1).T
    )
    assert sorted(chosen.indices.tolist()) == sorted(topk.top(cosine.amax(1), 9).tolist())


def test_an_optional_target_is_read_only_where_it_is_given(select: Any, target: Path) -> None:
    of_pool, of_target = select("gradmatch"), select("gradmatch", target=target)
    assert len(made(of_pool)["gradients"]) == 1 and len(made(of_target)["gradients"]) == 2
    assert (of_pool.folder / "weights.jsonl").exists()
    assert sorted(of_pool.indices.tolist()) != sorted(of_target.indices.tolist())


def test_every_targeted_method_fills_its_budget(select: Any, target: Path) -> None:
    for method in ("bids", "g2is"):
        assert len(select(method, target=target)) == 9


def test_what_a_method_cannot_choose_from_is_said_in_one_line(select: Any, folder: Path) -> None:
    one = write_rows(folder / "one.jsonl", rows(1, seed=3))
    with pytest.raises(DataError, match=r"g2is cannot choose: .*no principal direction"):
        select("g2is", target=one, options={"preset": "released"})
