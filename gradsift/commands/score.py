"""The influence matrix itself, as parquet: one row per pool row, one column per target row or
group, written block by block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from gradsift.commands.preflight import Columns, Inputs, check_scores
from gradsift.commands.session import deliver, opened
from gradsift.compute.progress import Progress
from gradsift.compute.stopping import stop_here
from gradsift.rules import topk
from gradsift.rules.blocks import BLOCK
from gradsift.signals.backends import backend as backend_of
from gradsift.signals.backends import through_curvature
from gradsift.stages import curvature, influence
from gradsift.stages.pipeline import Pipeline, signal_recipe
from gradsift.stages.recipe import Recipe, Timing
from gradsift.store.artifact import Artifact
from gradsift.store.atomic import replacing, require_space
from gradsift.store.tensors import file_hash
from gradsift.types import Signal, checkpoint_weights

FILE = "scores.parquet"
# of a column's name, so that no id or group of the user's is mistaken for the columns id and group
PREFIX = "score:"
GROUP_BYTES = 64 << 20  # of numbers in a row group of the file


@dataclass(frozen=True)
class Scores:
    """A finished matrix: `path` the parquet file, `columns` the names of its score columns,
    `usable` how many pool rows have scores.

    `checkpoints`: (step, weight) of each that was summed, weights of sum 1. `left_out`: ids of
    target rows without a usable gradient.
    """

    backend: str
    folder: Path
    path: Path
    rows: int
    usable: int
    columns: list[str]
    checkpoints: list[tuple[int, float]]
    left_out: list[str]
    timings: list[Timing]

    def summary(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "rows": self.rows,
            "usable": self.usable,
            "columns": self.columns,
            "checkpoints": [{"step": step, "weight": weight} for step, weight in self.checkpoints],
            "left_out": self.left_out,
            "scores": str(self.path),
            "folder": str(self.folder),
            "stages": [vars(timing) for timing in self.timings],
        }

    def lines(self) -> list[str]:
        made = [
            f"{timing.stage} {timing.seconds:.1f} s" for timing in self.timings if not timing.reused
        ]
        reused = sum(timing.reused for timing in self.timings)
        steps = ", ".join(f"{step} ({weight:.2f})" for step, weight in self.checkpoints)
        lost = f"; {len(self.left_out):,} target rows have no gradient" if self.left_out else ""
        return [
            f"rows        {self.rows:,}, {self.usable:,} with scores",
            f"columns     {len(self.columns):,}{lost}",
            f"backend     {self.backend}, positive = training on the row helps",
            f"checkpoints {steps} (step and weight)",
            (
                "stages     "
                f" {', '.join(made) or 'nothing to make'}{f'; {reused} reused' if reused else ''}"
            ),
            f"scores      {self.path}",
        ]


def score(
    backend: str,
    *,
    pool: Sequence[str | Path] | str | Path,
    target: Sequence[str | Path] | str | Path,
    run: str | Path,
    model: str | None = None,
    out: str | Path | None = None,
    columns: Columns | None = None,
    checkpoints: Literal["mean", "last"] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    pool_group: str | None = None,
    target_group: str | None = None,
    warmup_from: str | Path | None = None,
    progress: Progress | None = None,
) -> Scores:
    """The influence of every pool row on every target row by a backend of BACKENDS, as a parquet
    file (docs/scores.md describes it).

    columns: "rows" (one float32 column per target row) or "groups" (the mean over the rows of each
    target group; what a backend that merges groups gives in any case). checkpoints: "mean" sums
    over all checkpoints with weights mean_lr, "last" takes the last one; by default "mean", except
    through the curvature, which is fitted at the last one only. Other arguments, resuming and
    errors as `gradsift.select`.
    """
    inputs = Inputs(run, pool, target, model, settings, pool_group, target_group, warmup_from)
    signal, kind = check_scores(backend, inputs, columns=columns, checkpoints=checkpoints, out=out)
    with opened(inputs, progress=progress) as pipeline:
        return _score(pipeline, signal, kind, out)


@dataclass(frozen=True)
class _Matrix:
    """Scores to be written: `blocks` of 2,048 pool rows, NaN where a row has none; `targets`: the
    target rows with a gradient (the first of each where several make one column), `groups`: theirs;
    `left_out`: target rows without a gradient.
    """

    blocks: Iterable[Tensor]
    targets: list[int]
    groups: list[str]
    left_out: list[int]


def _score(pipeline: Pipeline, signal: Signal, columns: Columns, out: str | Path | None) -> Scores:
    artifact = pipeline.make(
        scores_recipe(pipeline, signal, columns),
        lambda artifact: _fill(pipeline, signal, columns, artifact),
    )
    path = deliver(artifact, FILE, out)
    found, counts = artifact.manifest["extra"], artifact.manifest["counts"]
    return Scores(
        backend=str(signal.backend),
        folder=artifact.path,
        path=path,
        rows=counts["rows"],
        usable=counts["usable"],
        columns=[line["column"] for line in found["columns"]],
        checkpoints=[(line["step"], line["weight"]) for line in found["checkpoints"]],
        left_out=found["left_out"],
        timings=pipeline.timings,
    )


def scores_recipe(pipeline: Pipeline, signal: Signal, columns: Columns) -> Recipe:
    config = {"backend": signal.backend, "columns": columns, "checkpoints": signal.checkpoints}
    return Recipe("scores", config, {"influence": signal_recipe(pipeline, signal).digest})


def _fill(pipeline: Pipeline, signal: Signal, columns: Columns, artifact: Artifact) -> None:
    matrix, pool, wanted = (
        _matrix(pipeline, signal),
        pipeline.sides["pool"],
        pipeline.sides["target"],
    )
    names = list(dict.fromkeys(matrix.groups))
    if columns == "groups":
        about = [{"column": f"{PREFIX}{name}", "group": name} for name in names]
    else:
        about = [
            {
                "column": f"{PREFIX}{wanted.ids[i]}",
                "target": wanted.ids[i],
                "group": wanted.groups[i],
            }
            for i in matrix.targets
        ]
    merged = backend_of(str(signal.backend)).merge
    blocks = (
        _grouped(matrix.blocks, matrix.groups)
        if columns == "groups" and not merged
        else matrix.blocks
    )
    used = [pipeline.checkpoints()[c] for c in pipeline.used_checkpoints(signal)]
    weights = checkpoint_weights([checkpoint.mean_lr for checkpoint in used])
    extra = {
        "backend": signal.backend,
        "columns": about,
        "checkpoints": [
            {"step": c.step, "weight": weight} for c, weight in zip(used, weights, strict=True)
        ],
        "left_out": [wanted.ids[i] for i in matrix.left_out],
    }
    path = artifact.path / FILE
    require_space(path, len(pool) * (4 * len(about) + 32))
    usable = write_matrix(
        path, pool.ids, pool.groups, [line["column"] for line in about], blocks, extra
    )
    counts = {"rows": len(pool), "usable": usable, "columns": len(about)}
    artifact.finish(files={FILE: file_hash(path)}, counts=counts, extra=extra)


def _matrix(pipeline: Pipeline, signal: Signal) -> _Matrix:
    """Scores without the matrix: from stored rows block by block, or mapped from the file that the
    curvature stage leaves.
    """
    wanted = pipeline.sides["target"]
    if through_curvature(signal):
        made = curvature.made(pipeline, signal)
        found, lost = made.tensors("scores.safetensors"), made.manifest["extra"].get("left_out", [])
        targets, scores = found["target"].tolist(), found["scores"]
        parts = (scores[a : a + BLOCK] for a in range(0, len(scores), BLOCK))
        left_out = sorted([*np.flatnonzero(pipeline.encoded("target").codes).tolist(), *lost])
        return _Matrix(parts, targets, [wanted.groups[i] for i in targets], left_out)
    both = influence.sides(pipeline, signal)

    def blocks() -> Iterator[Tensor]:
        for k, block in enumerate(influence.blocks(pipeline, signal, both)):
            yield block.masked_fill_(
                ~both.usable[k * BLOCK : k * BLOCK + len(block), None], torch.nan
            )

    kept = both.kept.tolist()
    return _Matrix(blocks(), kept, both.groups, sorted(set(range(len(wanted))) - set(kept)))


def _grouped(blocks: Iterable[Tensor], groups: Sequence[str]) -> Iterator[Tensor]:
    """Means within each group; rows without scores stay without."""
    for block in blocks:
        missing = ~torch.isfinite(block).all(dim=1)[:, None]
        yield (
            topk.group_scores(block.masked_fill(missing, 0), groups)
            .float()
            .masked_fill(missing, torch.nan)
        )


def write_matrix(
    path: Path,
    ids: Sequence[str],
    groups: Sequence[str],
    names: Sequence[str],
    blocks: Iterable[Tensor],
    about: Mapping[str, Any],
) -> int:
    """Writes id, group and a float32 column per name, in pool order, null in all of them where a
    row has no finite scores; returns how many rows have. `about` goes into the file's metadata
    under "gradsift". Blocks [b, m] are gathered into row groups of 64 MiB.

    Raises DiskFull, ResourceError; Interrupted between blocks.
    """
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
    ]
    fields += [pa.field(name, pa.float32()) for name in names]
    schema = pa.schema(fields, metadata={"gradsift": json.dumps(about, sort_keys=True)})
    most = max(BLOCK, GROUP_BYTES // (4 * max(len(names), 1)) // BLOCK * BLOCK)
    usable, done = 0, 0
    # No dictionaries: scores hardly repeat, and a column of a thousand would each keep its own.
    with (
        replacing(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        for part in _gathered(blocks, most):
            stop_here()
            fine = torch.isfinite(part).all(dim=1)
            missing = (~fine).numpy()
            columns = [
                pa.array(column.numpy(), mask=missing)
                for column in part.masked_fill(~fine[:, None], 0).t().contiguous()
            ]
            span = slice(done, done + len(part))
            texts = [pa.array(list(values[span]), pa.string()) for values in (ids, groups)]
            writer.write_table(pa.table([*texts, *columns], schema=schema), row_group_size=most)
            usable, done = usable + int(fine.sum()), done + len(part)
    return usable


def _gathered(blocks: Iterable[Tensor], most: int) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for block in blocks:
        held.append(block)
        if sum(len(b) for b in held) >= most:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)
