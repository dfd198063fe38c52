"""Numbers of the pool's own rows as features: their scale, their faults by file and line, and
Self-Filter over them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gradsift import methods
from gradsift.commands.select.select import select
from gradsift.data.pool import read_pool
from gradsift.errors import ConfigError, DataError
from gradsift.rules import penalty
from gradsift.signals.features import features
from gradsift.store.run import Run
from tests.conftest import SETTINGS, rows, write_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)


def marked(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with a number that says their kind, loudly, a whole number, and a vector."""
    rng = np.random.default_rng(seed)
    numbers = [
        {
            "quality": 1000.0 * (i % 2) + float(rng.random()),
            "stars": int(i),
            "vector": rng.random(3).tolist(),
        }
        for i in range(count)
    ]
    return [{**row, **found} for row, found in zip(rows(count), numbers, strict=True)]


def test_numbers_are_brought_to_one_scale_and_lists_to_length_one(tmp_path: Path) -> None:
    items = marked(9)
    items[4]["vector"] = [0, 0, 0]
    found = features(
        read_pool(write_rows(tmp_path / "p.jsonl", items)), ["stars", "vector", "quality"]
    )
    assert found.shape == (9, 5) and found.dtype == torch.float32
    numbers = np.array([[item["stars"], item["quality"]] for item in items], dtype=np.float64)
    expected = (numbers - numbers.mean(0)) / numbers.std(0)
    assert np.allclose(found[:, [0, 4]], expected, atol=1e-6)
    vectors = np.array([item["vector"] for item in items], dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.allclose(found[:, 1:4], vectors / np.where(norms > 0, norms, 1), atol=1e-6)


def test_columns_of_a_parquet_pool_are_read_the_same(tmp_path: Path) -> None:
    items = marked(6)
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "p.parquet")
    names = ["quality", "stars", "vector"]
    text, table = (
        features(read_pool(path), names)
        for path in (write_rows(tmp_path / "p.jsonl", items), tmp_path / "p.parquet")
    )
    assert torch.equal(text, table)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"quality": None}, "has no field 'quality'"),
        ({"quality": "high"}, "holds 'high', which is not a finite number"),
        ({"quality": True}, "holds True, which is not a finite number"),
        ({"quality": [1.0]}, "is a list of 1, and a number in the first row"),
        ({"vector": [1.0, 2.0]}, "is a list of 2, and a list of 3 in the first row"),
        ({"vector": 4}, "is 4, and a list of 3 in the first row"),
        ({"vector": [1.0, None, 2.0]}, "holds None, which is not a finite number"),
    ],
)
def test_a_row_without_the_field_is_named_by_file_and_line(
    change: dict[str, Any], what: str, tmp_path: Path
) -> None:
    items = marked(8)
    items[5].update(change)
    path = write_rows(tmp_path / "p.jsonl", items)
    with pytest.raises(
        DataError, match=re.escape(f"{path}:6: ") + ".*" + re.escape(what)
    ) as raised:
        features(read_pool(path), ["quality", "vector"])
    assert raised.value.exit_code == 3 and "features=" in str(raised.value)


def test_a_number_that_is_the_same_everywhere_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{**row, "stars": 3} for row in marked(5)])
    with pytest.raises(DataError, match="'stars' is 3 in every row"):
        features(read_pool(path), ["stars"])


def test_the_option_names_fields_and_decides_what_is_read() -> None:
    plain, own = (
        methods.make("selffilter"),
        methods.make("selffilter", {"features": "quality, vector"}),
    )
    assert {s.name for s in plain.needs()} == {"difficulty", "embeddings"} and all(
        s.fields == () for s in plain.needs()
    )
    assert {(s.name, s.fields) for s in own.needs()} == {
        (name, ("quality", "vector")) for name in ("difficulty", "features")
    }
    with pytest.raises(ConfigError, match="names no field"):
        methods.make("selffilter", {"features": " ,"})


def test_self_filter_learns_from_and_compares_by_the_rows_own_numbers(
    tmp_path: Path, model_folder: Path
) -> None:
    path, run = write_rows(tmp_path / "pool.jsonl", marked(40)), tmp_path / "run"

    def choose(**more: Any) -> Any:
        return select(
            "selffilter",
            pool=path,
            model=str(model_folder),
            run=run,
            budget=8,
            settings=SETTINGS,
            **more,
        )

    found = choose(options={"features": "quality,vector"})
    stages = {artifact.stage: artifact for artifact in Run(run).artifacts()}
    # no pass of the model for embeddings
    assert set(stages) == {"encode", "features", "difficulty", "select"}
    assert stages["difficulty"].recipe["inputs"]["features"] == stages["features"].digest
    values = stages["difficulty"].tensors("difficulty.safetensors")["difficulty"].double()
    made = stages["features"].tensors("features.safetensors")["features"]
    assert (
        found.indices.tolist()
        == penalty.diverse(values, made, 8, neighbours=10, gamma=1.0).indices.tolist()
    )
    again = choose(options={"features": "quality,vector", "gamma": "0.5"})
    assert {t.stage for t in again.timings if not t.reused} == {"select"}
    other = choose()
    assert {t.stage for t in other.timings if not t.reused} == {
        "embeddings",
        "difficulty",
        "select",
    }
