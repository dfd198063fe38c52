"""Rows that no gradient can come of: told, counted, never chosen; too many of them stop the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import gradsift
from gradsift.data.encode import EncodedRows
from gradsift.errors import DataError
from gradsift.stages.checks import check_quarantine
from gradsift.store.packing import QUARANTINE
from gradsift.store.rows import RowStore
from tests.conftest import SETTINGS, rows, write_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)


def test_rows_that_teach_nothing_are_dropped_with_a_reason_and_never_chosen(
    tmp_path: Path, model_folder: Path
) -> None:
    items = rows(72)
    items[3]["messages"] = items[3]["messages"][:1]  # nobody answers
    items[10]["messages"][1]["weight"] = 0  # the answer does not count
    items[20]["messages"][0]["content"] = "q" * 500  # the answer lies beyond max_length
    pool = write_rows(tmp_path / "p.jsonl", items)
    chosen = gradsift.select(
        "tagcos",
        pool=pool,
        model=str(model_folder),
        run=tmp_path / "run",
        budget=60,
        settings=SETTINGS,
        options={"clusters": 4},
    )
    assert len(chosen) == 60
    assert not {"r003", "r010", "r020"} & set(chosen.ids)
    told = [json.loads(line) for line in (chosen.folder / "dropped.jsonl").read_text().splitlines()]
    assert {"r003", "r010"} <= {row["id"] for row in told}
    assert all(row["reason"] and row["line"] for row in told)
    scores = pq.read_table(chosen.folder / "scores.parquet").to_pylist()
    assert [row["selected"] for row in scores if row["id"] == "r020"] == [False]


@pytest.mark.parametrize("bad", [2, 20])
def test_too_many_bad_gradients_stop_the_run_and_name_the_reasons(tmp_path: Path, bad: int) -> None:
    count = 100
    ones = np.ones(count, dtype=np.int32)
    encoded = EncodedRows(ones, ones, ones, ones, np.zeros(count, dtype=np.uint8))
    ids = [str(i) for i in range(count)]
    store = RowStore.create(
        tmp_path, recipe_digest="0" * 64, ids=ids, dim=4, spec={}, shard_rows=count
    )
    values = torch.ones(count, 4)
    values[: bad // 2], values[bad // 2 : bad] = float("nan"), 0.0
    store.write(
        0, values, norms=values.norm(dim=1), losses=torch.ones(count), tokens=torch.ones(count)
    )
    assert sum(store.quarantined().values()) == bad
    assert set(store.quarantined()) <= set(QUARANTINE.values())
    if bad == 2:
        check_quarantine(store, encoded)
        return
    with pytest.raises(
        DataError, match=r"20 of 100 rows have no usable gradient \(.*10 .*10 .*\)"
    ) as error:
        check_quarantine(store, encoded)
    assert error.value.remedy
