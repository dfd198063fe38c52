"""How far selections of one pool agree: rows in common, the same at smaller sizes, and the rank
correlation of their scores.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.errors import IntegrityError, MismatchError
from gradsift.report.data import Table
from gradsift.rules.ranks import spearman
from gradsift.store.artifact import REPAIR, Artifact
from gradsift.store.run import Run
from gradsift.store.tensors import read_tensors

SHOWN = 12  # selections in a matrix


def indices(selection: Artifact) -> np.ndarray:
    """Pool rows in pick order."""
    return read_tensors(selection.path / "subset.safetensors")["indices"].numpy()


def same_pool(a: Artifact, b: Artifact) -> bool:
    """Whether both chose from the same rows, with whatever model and settings."""
    first, second = _encoding(a), _encoding(b)
    if first == second:
        return True
    read = [_rows_read(selection, digest) for selection, digest in ((a, first), (b, second))]
    return read[0] is not None and read[0] == read[1]


def _encoding(selection: Artifact) -> str:
    return next(
        (
            digest
            for name, digest in sorted(selection.recipe["inputs"].items())
            if name.endswith("-encode")
        ),
        "",
    )


def _rows_read(selection: Artifact, encoding: str) -> Any:
    """Digest of the rows behind an encoding of the same run; None where that is gone."""
    made = Artifact.load(selection.path.parent / f"encode-{encoding[:12]}")
    return None if made is None else made.recipe["inputs"].get("rows")


def overlaps(a: np.ndarray, b: np.ndarray) -> dict[int, float]:
    """j -> share of the first j picks of one that are among the first j of the other, for j = 10,
    100, ... and the smaller size.
    """
    most = min(len(a), len(b))
    if not most:
        return {}
    sizes = [10**e for e in range(1, 12) if 10**e < most] + [most]
    return {j: len(set(a[:j].tolist()) & set(b[:j].tolist())) / j for j in sizes}


def correlation(a: Artifact, b: Artifact) -> float | None:
    """Spearman of the two scores over the rows that both have scored; None where one has no scores,
    or gives all rows the same.
    """
    if not all((each.path / "scores.parquet").is_file() for each in (a, b)):
        return None
    x, y = (_scores(each.path / "scores.parquet") for each in (a, b))
    rho = spearman(x, y)
    return None if np.isnan(rho) else rho


def _scores(path: Path) -> np.ndarray:
    try:
        return pq.read_table(path, columns=["score"])["score"].to_numpy()
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(
            f"cannot be read ({str(error).splitlines()[0]})", where=path, remedy=REPAIR
        ) from None


def _comparable(selection: Artifact, current: Artifact) -> bool:
    """`same_pool`; False where damage hides what a selection was made from (`gradsift verify`
    tells).
    """
    try:
        return same_pool(selection, current)
    except (IntegrityError, MismatchError):
        return False


def matrix(run: Run, current: Artifact) -> Table | None:
    """Every pair of finished selections of the pool of `current`, itself included, oldest first;
    None where it is the only one.

    A cell is the share of the smaller selection's rows that the other has too.
    """
    others = [
        a
        for a in run.trusted()[0]
        if a.stage == "select" and a.complete and a.path != current.path and _comparable(a, current)
    ]
    picked: dict[str, set[int]] = {}
    for selection in [
        *sorted(others, key=lambda a: a.stats.get("finished", 0.0))[1 - SHOWN :],
        current,
    ]:
        with contextlib.suppress(IntegrityError):  # `gradsift verify` tells of another one's damage
            picked[f"{selection.recipe['config']['method']} {selection.digest[:6]}"] = set(
                indices(selection).tolist()
            )
    if len(picked) < 2:
        return None
    rows = [
        (
            name,
            len(x),
            *(round(len(x & y) / max(min(len(x), len(y)), 1), 3) for y in picked.values()),
        )
        for name, x in picked.items()
    ]
    return Table(
        columns=("selection", "rows", *picked),
        rows=tuple(rows),
        caption="Share of the smaller selection's rows that the other one has too.",
    )
