"""`gradsift score`: every backend's matrix against products taken one by one, its columns, and what
a run reuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import gradsift
from gradsift.cli.app import app
from gradsift.commands import score as scoring
from gradsift.errors import Interrupted, UnknownName, UserError
from gradsift.rules.blocks import BLOCK
from gradsift.signals.backends import BACKENDS
from gradsift.store.rows import RowStore
from gradsift.store.run import Run
from gradsift.store.tensors import read_tensors, write_tensors
from tests.conftest import SETTINGS, rows, write_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)

QUICK: dict[str, Any] = {
    **SETTINGS,
    "warmup": {**SETTINGS["warmup"], "checkpoints": 2},
    "curvature": {"fit_rows": 24},
    "gradients": {**SETTINGS["gradients"], "dim": 32},
}
STORED = sorted(name for name, backend in BACKENDS.items() if backend.curvature is None)
TARGETS = [f"r{i:03d}" for i in range(20)] + ["group"]
# of the usable target rows
GROUPS = ["back" if i % 2 else "twice" for i in range(20) if i != 2] + ["back"]
CURVED = sorted(name for name, backend in BACKENDS.items() if backend.curvature is not None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(run, pool, target): one pool row has an answer cut away, and so no gradient; so has one
    target row.
    """
    folder = tmp_path_factory.mktemp("scoring")
    pool, target = rows(40), rows(20, seed=9)
    long = {"role": "user", "content": "x" * 200}
    for items, i in ((pool, 7), (target, 2)):
        items[i] = {**items[i], "messages": [long, items[i]["messages"][1]]}
    # an id that is a column's name elsewhere
    extra = {"id": "group", "kind": "back", "messages": rows(1, seed=5)[0]["messages"]}
    return (
        folder / "run",
        write_rows(folder / "pool.jsonl", pool),
        write_rows(folder / "dev.jsonl", [*target, extra]),
    )


def score(backend: str, files: tuple[Path, Path, Path], model: Path, **more: Any) -> scoring.Scores:
    settings = {**QUICK, "encode": {"max_length": 64}}
    run, pool, target = files
    return gradsift.score(
        backend,
        pool=pool,
        target=target,
        run=run,
        model=str(model),
        settings=settings,
        target_group="kind",
        **more,
    )


def matrix(found: scoring.Scores) -> np.ndarray:
    table = pq.read_table(found.path)
    assert table.column_names == ["id", "group", *found.columns]
    return np.stack([table[name].to_numpy() for name in found.columns], 1)


def stores(run: Path, found: scoring.Scores) -> tuple[list[RowStore], list[RowStore]]:
    """(pool, target) stores at the checkpoints of a matrix, found by its backend's transform and
    loss.
    """
    backend, sides = BACKENDS[found.backend], {}
    for artifact in Run(run).artifacts():
        if artifact.stage == "gradients" and artifact.complete:
            config, store = artifact.recipe["config"], RowStore.open(artifact.path)
            if config.get("loss", "cross-entropy") == backend.loss:
                sides[
                    "pool" if len(store) == 40 else "target",
                    config["transform"],
                    config["checkpoint"],
                ] = store
    last = max(c for *_, c in sides)
    used = range(last + 1) if len(found.checkpoints) > 1 else [last]
    return [sides["pool", backend.transform, c] for c in used], [
        sides["target", "none", c] for c in used
    ]


def dense(found: scoring.Scores, run: Path, groups: list[str]) -> np.ndarray:
    """The matrix from stored rows in fp64, checkpoint by checkpoint, with a dense inverse where the
    backend asks for one.
    """
    backend, total = BACKENDS[found.backend], 0.0
    for (_, weight), pool, target in zip(found.checkpoints, *stores(run, found), strict=True):
        p, q = (
            store[0 : len(store)].double().numpy() * store.scales.double().numpy()[:, None]
            for store in (pool, target)
        )
        fine = target.usable.numpy()
        q = q[fine]
        if backend.merge:
            q = np.stack([q[[g == name for g in groups]].mean(0) for name in dict.fromkeys(groups)])
        if backend.whiten:
            gram = p.T @ p
            q = q @ np.linalg.inv(gram + 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram)))
        p, q = (
            (
                rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
                if form == "unit"
                else rows
            )
            for rows, form in ((p, backend.pool), (q, backend.target))
        )
        total = total + weight * p @ q.T
    return np.asarray(total)


@pytest.mark.parametrize("name", STORED)
def test_scores_of_stored_rows_equal_a_dense_product(
    name: str, files: tuple[Path, Path, Path], model_folder: Path
) -> None:
    found = score(name, files, model_folder)
    expected = dense(found, files[0], GROUPS)
    got = matrix(found)
    assert (
        sum(weight for _, weight in found.checkpoints) == pytest.approx(1)
        and len(found.checkpoints) == 2
    )
    assert np.isnan(got[7]).all() and found.usable == 39
    assert np.allclose(
        np.delete(got, 7, 0),
        np.delete(expected, 7, 0),
        atol=2e-5 * np.abs(expected).max() + 1e-7,
        rtol=2e-3,
    )
    assert found.left_out == ["r002"]
    if BACKENDS[name].merge:
        assert found.columns == ["score:twice", "score:back"]
    else:
        assert found.columns == [f"score:{id}" for i, id in enumerate(TARGETS) if i != 2]
        grouped = matrix(score(name, files, model_folder, columns="groups"))
        means = np.stack(
            [got[:, [g == kind for g in GROUPS]].mean(1) for kind in ("twice", "back")], 1
        )
        assert np.allclose(np.delete(grouped, 7, 0), np.delete(means, 7, 0), atol=1e-6)


@pytest.mark.parametrize("name", CURVED)
def test_scores_through_the_curvature_are_those_a_method_reads(
    name: str, files: tuple[Path, Path, Path], model_folder: Path
) -> None:
    found = score(name, files, model_folder)
    (made,) = [
        a
        for a in Run(files[0]).artifacts()
        if a.stage == "influence" and a.recipe["config"]["backend"] == name
    ]
    stored = made.tensors("scores.safetensors")
    assert np.array_equal(matrix(found), stored["scores"].numpy(), equal_nan=True)
    assert found.columns == [
        f"score:{TARGETS[i]}" for i in stored["target"].tolist()
    ] and found.left_out == ["r002"]
    assert np.isnan(matrix(found)[7]).all() and found.usable == 39


def test_the_same_call_makes_nothing_and_another_cut_reuses_the_rows(
    files: tuple[Path, Path, Path], model_folder: Path, tmp_path: Path
) -> None:
    score("dot", files, model_folder)
    again = score("dot", files, model_folder, out=tmp_path / "deep" / "m.parquet")
    assert all(timing.reused for timing in again.timings)
    assert again.path.read_bytes() == (again.folder / "scores.parquet").read_bytes()
    last = score("dot", files, model_folder, checkpoints="last")
    assert {t.stage for t in last.timings if not t.reused} == {"scores"} and last.checkpoints[0][
        1
    ] == 1.0
    about = json.loads(pq.read_schema(again.path).metadata[b"gradsift"])
    assert about["columns"][0] == {"column": "score:r000", "target": "r000", "group": "twice"}
    assert Run(files[0]).verify() == []


def test_margins_leave_the_digests_of_other_rows_alone(
    files: tuple[Path, Path, Path], model_folder: Path
) -> None:
    score("dot", files, model_folder)
    score("trak", files, model_folder)
    found = [a for a in Run(files[0]).artifacts() if a.stage == "gradients"]
    losses = [
        a.recipe["config"].get("loss") for a in found if a.recipe["config"]["transform"] == "none"
    ]
    assert sorted(losses, key=str) == [None] * 4 + ["margin"] * 4
    assert all(
        ("loss" in RowStore.open(a.path).spec) == (a.recipe["config"].get("loss") == "margin")
        for a in found
    )


def test_what_a_backend_cannot_do_is_refused_before_anything_runs(
    files: tuple[Path, Path, Path], model_folder: Path
) -> None:
    with pytest.raises(UnknownName, match="'ekfac'"):
        score("ekfacc", files, model_folder)
    with pytest.raises(UserError, match=r"less-mean averages.*--columns groups"):
        score("less-mean", files, model_folder, columns="rows")
    with pytest.raises(UserError, match="last checkpoint alone"):
        score("kfac", files, model_folder, checkpoints="mean")
    with pytest.raises(UserError, match="none was given"):
        gradsift.score("dot", pool=files[1], target=[], run=files[0])
    with pytest.raises(UserError, match="names an input file"):
        score("dot", files, model_folder, out=files[1])


def test_a_long_matrix_is_written_in_row_groups_and_reads_back_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradsift.commands.score.GROUP_BYTES", 3 * BLOCK * 4 * 2)
    n, m = 4 * BLOCK + 5, 3
    whole = torch.randn(n, m, generator=torch.Generator().manual_seed(0))
    whole[[3, n - 1]] = torch.nan
    blocks = (whole[a : a + BLOCK] for a in range(0, n, BLOCK))
    ids, groups, names = (
        [f"é{i}" for i in range(n)],
        ["a", "b"] * (n // 2) + ["c"],
        ["score:x", "score:y", "score:z"],
    )
    path = tmp_path / "m.parquet"
    assert scoring.write_matrix(path, ids, groups, names, blocks, {"backend": "dot"}) == n - 2
    assert pq.ParquetFile(path).num_row_groups == 3
    table = pq.read_table(path)
    assert table["id"].to_pylist() == ids and table["group"].to_pylist() == groups
    got = np.stack([table[name].to_numpy() for name in names], 1)
    assert np.array_equal(got, whole.numpy(), equal_nan=True)
    assert table["score:x"].null_count == 2


def test_a_write_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    def blocks() -> Iterator[torch.Tensor]:
        yield torch.ones(BLOCK, 2)
        raise Interrupted("stopped by SIGTERM")

    with pytest.raises(Interrupted):
        scoring.write_matrix(
            tmp_path / "m.parquet",
            ["a"] * 2 * BLOCK,
            ["g"] * 2 * BLOCK,
            ["score:x", "score:y"],
            blocks(),
            {},
        )
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_summary_as_json(
    files: tuple[Path, Path, Path], model_folder: Path, tmp_path: Path
) -> None:
    score("cosine", files, model_folder)
    run, pool, target = files
    command = [
        "score",
        "--backend",
        "cosine",
        "--pool",
        str(pool),
        "--target",
        str(target),
        "--target-group",
        "kind",
        "--run",
        str(run),
    ]
    found = CliRunner().invoke(
        app,
        [
            *command,
            "--columns",
            "groups",
            "--out",
            str(tmp_path / "m.parquet"),
            "--threads",
            "1",
            "--json",
            "-q",
        ],
    )
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert (
        told["columns"] == ["score:twice", "score:back"]
        and told["usable"] == 39
        and told["left_out"] == ["r002"]
    )
    assert (
        told["scores"] == str(tmp_path / "m.parquet")
        and pq.read_table(told["scores"]).num_rows == 40
    )
    assert sum(line["weight"] for line in told["checkpoints"]) == pytest.approx(1)
    plain = CliRunner().invoke(app, [*command, "--columns", "groups", "--threads", "1", "-q"])
    assert "40, 39 with scores" in plain.stdout and "nothing to make" in plain.stdout


def test_blocks_are_joined_in_a_tensor_file_as_one(tmp_path: Path) -> None:
    parts = [torch.randn(3, 2), torch.randn(1, 2)]
    joined = write_tensors(tmp_path / "a.safetensors", {"x": parts}, {})
    assert joined == write_tensors(tmp_path / "b.safetensors", {"x": torch.cat(parts)}, {})
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["x"], torch.cat(parts))
