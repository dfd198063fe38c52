"""The files of a finished selection: the chosen rows as they were, a score for every row, what was
dropped, and how trainers read them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.commands.select.trainers import trainer_files
from gradsift.data.pool import Pool
from gradsift.data.records import Dropped
from gradsift.data.write import subset_suffix, write_dropped, write_subset
from gradsift.errors import UnknownName, UserError
from gradsift.store.atomic import make_folder, write_atomic
from gradsift.types import Subset

# Text is data here: Parquet has no formulas, so an id such as "=cmd|..." stays a text wherever the
# file is opened.
SCORES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("selected", pa.bool_(), nullable=False),
        pa.field("rank", pa.int32()),
        pa.field("gain", pa.float64()),
        pa.field("weight", pa.float64()),
        pa.field("score", pa.float64()),
        pa.field("influence", pa.float64()),
        pa.field("cluster", pa.int32()),
        pa.field("norm", pa.float32()),
        pa.field("tokens", pa.int32()),
        pa.field("loss", pa.float32()),
        pa.field("picked_by", pa.string()),
        pa.field("why", pa.string()),
    ]
)
# what --add-scores writes into the rows, as gradsift_NAME
ADDED = ("rank", "gain", "weight", "influence", "cluster")


def write_outputs(
    folder: Path,
    pool: Pool,
    subset: Subset,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    add_scores: bool = False,
    model: str | None = None,
    max_length: int = 1024,
    template: str | None = None,
    tool_calls: str = "template",
    system: str = "template",
    say: Callable[[str], None] | None = None,
    left_out: Sequence[Dropped] = (),
) -> list[Path]:
    """Write a selection into `folder` (made if missing) and return the files written.

    `subset.indices` are pool rows. `columns`: further columns of scores.parquet, each of length n
    over the pool (see SCORES; NaN, None and a negative cluster mean unknown); `selected` and `rank`
    always come from the subset. `model`, `max_length`, `template` (a chat template that is not
    the tokenizer's own), `tool_calls` and `system` become the defaults of the TRL script. `say` is
    told where a chosen row could not stay as it was. `left_out`: rows that were not to be chosen,
    listed in dropped.jsonl after the quarantine. Raises UserError for indices or columns that do
    not fit the pool, DiskFull and ResourceError.
    """
    folder = Path(folder)
    make_folder(folder)
    table = score_table(pool, subset, columns or {})
    selected = folder / f"selected{subset_suffix(pool)}"
    notes = write_subset(pool, subset, selected, add=_added(table, subset) if add_scores else None)
    if say:
        for note in notes:
            say(note)
    written = [selected, folder / "scores.parquet", folder / "dropped.jsonl"]
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(written[1], sink.getvalue())
    write_dropped(pool, written[2], left_out)
    if subset.weights is not None:
        written.append(folder / "weights.jsonl")
        write_atomic(written[-1], _weight_lines(pool, subset))
    trainers = folder / "trainers"
    make_folder(trainers)
    for name, text in trainer_files(
        pool,
        subset,
        selected.name,
        model=model,
        max_length=max_length,
        template=template,
        tool_calls=tool_calls,
        system=system,
    ).items():
        written.append(trainers / name)
        write_atomic(written[-1], text.encode())
    return written


def score_table(pool: Pool, subset: Subset, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """One row per pool row, in pool order, of the schema SCORES. `rank` counts from 1 in pick
    order; unknown values are null.
    """
    n, picks = len(pool), _picks(pool, subset)
    found: dict[str, Any] = {
        "id": pa.array(list(pool.ids), pa.string()),
        "group": pa.array(list(pool.groups), pa.string()),
    }
    for name, values in columns.items():
        if name not in SCORES.names:
            raise UnknownName("score column", name, SCORES.names)
        if len(values) != n:
            raise UserError(
                f"the column {name!r} has {len(values):,} values for a pool of {n:,} rows"
            )
        found.setdefault(name, values)
    selected, rank = np.zeros(n, dtype=bool), np.full(n, np.nan)
    selected[picks], rank[picks] = True, np.arange(1, len(picks) + 1)
    found |= {"selected": selected, "rank": rank}
    for name, values in (("gain", subset.gains), ("weight", subset.weights)):
        if values is not None:
            full = (
                np.full(n, np.nan)
                if name not in columns
                else np.array(columns[name], dtype=np.float64)
            )
            full[picks] = np.asarray(values, dtype=np.float64)
            found[name] = full
    return pa.table([_typed(field, found.get(field.name), n) for field in SCORES], schema=SCORES)


def _picks(pool: Pool, subset: Subset) -> np.ndarray:
    picks = np.asarray(subset.indices, dtype=np.int64)
    if len(picks) and (picks.min() < 0 or picks.max() >= len(pool)):
        raise UserError(
            f"a selection holds the row {int(picks[np.abs(picks).argmax()]):,} of a pool of"
            f" {len(pool):,} rows"
        )
    if len(np.unique(picks)) != len(picks):
        raise UserError("a selection holds a row twice")
    for name in ("gains", "weights"):
        values = getattr(subset, name)
        if values is not None and len(values) != len(picks):
            raise UserError(f"a selection has {len(values):,} {name} for {len(picks):,} rows")
    return picks


def _typed(field: pa.Field, values: Any, n: int) -> pa.Array:
    if values is None:
        return pa.nulls(n, field.type)
    if isinstance(values, pa.Array):
        return values
    if pa.types.is_string(field.type):
        return pa.array([None if value is None else str(value) for value in values], field.type)
    if pa.types.is_boolean(field.type):
        return pa.array(np.asarray(values, dtype=bool))
    numbers = np.array(
        (
            [np.nan if value is None else value for value in values]
            if isinstance(values, list)
            else values
        ),
        dtype=np.float64,
    )
    unknown = ~np.isfinite(numbers)
    if field.name == "cluster":
        unknown |= numbers < 0
    return pa.array(np.where(unknown, 0, numbers), mask=unknown).cast(field.type)


def _added(table: pa.Table, subset: Subset) -> dict[str, list[Any]]:
    picked = table.take(pa.array(np.asarray(subset.indices, dtype=np.int64)))
    return {
        f"gradsift_{name}": picked[name].to_pylist()
        for name in ADDED
        if picked[name].null_count < len(picked)
    }


def _weight_lines(pool: Pool, subset: Subset) -> bytes:
    """One line per line of the selected rows, in that order (file order, not pick order)."""
    picks, weights = _picks(pool, subset), np.asarray(subset.weights, dtype=np.float64)
    order = np.argsort(picks, kind="stable")
    lines = (
        json.dumps({"id": pool.ids[int(picks[i])], "weight": float(weights[i])}, ensure_ascii=False)
        for i in order
    )
    return "".join(line + "\n" for line in lines).encode()
