"""Exact influence, constraints and the new signals through the whole job, on a random model."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gradsift.commands.select.select import Selection, select
from gradsift.compute.progress import Silent
from gradsift.config import build
from gradsift.data.encode import EncodedRows
from gradsift.data.pool import read_pool
from gradsift.errors import DataError, Interrupted, UserError
from gradsift.model.layers import tracked_modules
from gradsift.signals.curvature.exact import influence_scores
from gradsift.signals.curvature.fitted import Curvature
from gradsift.stages.pipeline import Pipeline
from gradsift.store.artifact import Artifact
from gradsift.store.run import Run
from tests.conftest import SETTINGS, rows, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("files")
    target = [row for row in rows(16, seed=9) if row["kind"] == "back"][:5]
    return write_rows(folder / "pool.jsonl", rows(40)), write_rows(folder / "dev.jsonl", target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("more") / "run"


def choose(
    method: str,
    files: tuple[Path, Path],
    folder: Path,
    model: Path,
    *,
    target: bool = False,
    **more: Any,
) -> Selection:
    given = {
        "budget": 8,
        "settings": {**SETTINGS, "curvature": {"fit_rows": 24}},
        "pool_group": "kind",
        **more,
    }
    return select(
        method,
        pool=files[0],
        target=files[1] if target else (),
        model=str(model),
        run=folder,
        **given,
    )


@pytest.fixture(scope="module")
def gdig(files: tuple[Path, Path], folder: Path, model_folder: Path) -> Selection:
    return choose("gdig", files, folder, model_folder, target=True, options={"clusters": 3})


def made(folder: Path, stage: str, **config: Any) -> Artifact:
    found = [
        a for a in Run(folder).artifacts() if a.path.name.startswith(f"{stage}-") and a.complete
    ]
    return next(
        a
        for a in found
        if all(a.manifest["config"].get(key) == value for key, value in config.items())
    )


def chosen_settings(folder: Path) -> dict[str, Any]:
    return {
        name: value
        for name, value in json.loads((folder / "settings.json").read_text()).items()
        if name != "seal"
    }


def test_stored_scores_are_the_streamed_ones_whatever_the_shards(
    gdig: Selection, files: tuple[Path, Path], folder: Path
) -> None:
    settings = chosen_settings(folder)
    config = build({**settings, "machine": {"threads": 1}}, "test")
    pipeline = Pipeline(
        Run(folder), config, *(read_pool([file], group_field="kind") for file in files)
    )
    curvature = Curvature.load(
        made(folder, "curvature", correct=True).path / "curvature.safetensors"
    )
    model = pipeline.model_at(pipeline.checkpoints()[-1])
    pool, target = pipeline.encoded("pool"), pipeline.encoded("target")
    stream = influence_scores(model, list(pool), list(target), curvature.inverse(0.1))
    wanted = torch.zeros(40, 5)
    for indices, scores in stream:
        wanted[torch.as_tensor(indices)] = scores
    stored = made(folder, "influence", backend="ekfac").tensors("scores.safetensors")
    assert torch.allclose(
        stored["scores"], wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max())
    )
    assert stored["target"].tolist() == [0, 1, 2, 3, 4]


def test_gdig_says_how_it_damped_and_whom_its_rows_help(gdig: Selection, folder: Path) -> None:
    notes, influence = (
        made(folder, "select", method="gdig").manifest["extra"]["notes"],
        made(folder, "influence", backend="ekfac"),
    )
    scores = influence.tensors("scores.safetensors")["scores"]
    helps = (scores > 0).all(dim=1)
    assert notes["helps_every_target"] == int(helps.sum())
    assert (scores[gdig.indices] > 0).float().mean(dim=1).min() >= notes["quantile"] - 1e-6
    assert influence.manifest["extra"]["damping_to_mean_eigenvalue"]["median"] == pytest.approx(0.1)
    report = (gdig.folder / "report.md").read_text()
    assert "Damping over mean eigenvalue" in report and "help every target row" in report
    assert sorted(p.name for p in influence.path.iterdir() if p.suffix == ".safetensors") == [
        "scores.safetensors"
    ]


def test_as_released_two_target_rows_make_one_column_and_an_odd_one_is_lost(
    gdig: Selection, files: tuple[Path, Path], folder: Path, model_folder: Path
) -> None:
    found = choose("gdig", files, folder, model_folder, target=True, options={"preset": "released"})
    stored = made(folder, "influence", backend="kfac-released").tensors("scores.safetensors")
    assert stored["scores"].shape == (40, 2) and stored["target"].tolist() == [0, 2]
    assert (
        found.indices.tolist()
        == np.argsort(-stored["scores"].double().mean(dim=1).numpy(), kind="stable")[:8].tolist()
    )


def test_lost_scores_are_made_again_with_the_same_bytes(
    gdig: Selection, files: tuple[Path, Path], folder: Path, model_folder: Path
) -> None:
    influence = made(folder, "influence", backend="ekfac")
    before = influence.manifest["content"]
    shutil.rmtree(influence.path)
    shutil.rmtree(gdig.folder)
    again = choose("gdig", files, folder, model_folder, target=True, options={"clusters": 3})
    assert again.indices.tolist() == gdig.indices.tolist()
    assert made(folder, "influence", backend="ekfac").manifest["content"] == before


class StopsAfter(Silent):
    """Sends the job the signal of Ctrl-C in the batch of that number of influence, so that the
    shard in hand is its last; `tokens`: what the stage had to do.
    """

    def __init__(self, batches: int) -> None:
        self.left, self.tokens, self.here = batches, 0, False

    def start(self, total: int, unit: str, label: str = "") -> None:
        self.here = label.startswith("influence")
        self.tokens = total if self.here else self.tokens

    def advance(self, k: int = 1) -> None:
        if self.here:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)


def test_a_stopped_influence_keeps_its_finished_shards(
    gdig: Selection, files: tuple[Path, Path], folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    whole = made(copy, "influence", backend="ekfac")
    shutil.rmtree(whole.path)
    shutil.rmtree(copy / gdig.folder.name)
    given: dict[str, Any] = {"target": True, "options": {"clusters": 3}}
    parts, seen, stamps = whole.path / "parts", [], []
    for finished in (["part-00000"], ["part-00000", "part-00001"]):
        seen.append(StopsAfter(1))
        with pytest.raises(Interrupted):
            choose("gdig", files, copy, model_folder, progress=seen[-1], **given)
        assert sorted(path.stem for path in parts.iterdir()) == finished
        stamps.append((parts / "part-00000.safetensors").stat())
    assert (stamps[0].st_ino, stamps[0].st_mtime_ns) == (stamps[1].st_ino, stamps[1].st_mtime_ns)
    last = StopsAfter(99)
    assert (
        choose("gdig", files, copy, model_folder, progress=last, **given).indices.tolist()
        == gdig.indices.tolist()
    )
    assert seen[0].tokens > seen[1].tokens > last.tokens > 0 and not parts.exists()
    assert made(copy, "influence", backend="ekfac").manifest["content"] == whole.manifest["content"]


def test_gdig_over_every_linear_layer(
    files: tuple[Path, Path], model_folder: Path, tmp_path: Path
) -> None:
    settings = {
        **SETTINGS,
        "gradients": {**SETTINGS["gradients"], "modules": "linear"},
        "curvature": {"fit_rows": 24},
    }
    found = choose(
        "gdig",
        files,
        tmp_path / "run",
        model_folder,
        target=True,
        options={"clusters": 3},
        settings=settings,
    )
    assert len(found) == 8
    pipeline = Pipeline(
        Run(tmp_path / "run"),
        build({**settings, "model": {"name": str(model_folder)}}, "test"),
        *(read_pool([f]) for f in files),
    )
    model = pipeline.model_at(pipeline.checkpoints()[-1])
    curvature = Curvature.load(made(tmp_path / "run", "curvature").path / "curvature.safetensors")
    assert set(curvature.names) == set(tracked_modules(model, "linear")) and any(
        "mlp" in name for name in curvature.names
    )
    stored = made(tmp_path / "run", "influence").tensors("scores.safetensors")["scores"]
    gradients = [
        whole_gradients(model, curvature.names, pipeline.encoded(side))
        for side in ("pool", "target")
    ]
    inverse = curvature.inverse(0.1)
    wanted = sum(
        p.flatten(1) @ inverse.apply_inverse(name, q).flatten(1).T
        for name, p, q in zip(curvature.names, *gradients, strict=True)
    )
    assert isinstance(wanted, torch.Tensor) and torch.allclose(
        stored, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max())
    )
    rows = next(
        a for a in Run(tmp_path / "run").artifacts() if a.path.name.startswith("gradients-")
    )
    # of all weights: the adapter's alone are far fewer
    assert rows.manifest["extra"]["coverage"]["share"] > 0.5


def whole_gradients(model: Any, names: list[str], encoded: EncodedRows) -> list[torch.Tensor]:
    """Per layer [n, out, in]: the gradient of every row's mean loss, one row at a time, by
    autograd.
    """
    modules, found = dict(model.named_modules()), []
    weights = [modules[name].weight.requires_grad_(True) for name in names]
    for row in (encoded[i] for i in range(len(encoded))):
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]))
        found.append(torch.autograd.grad(loss, weights))
    return [torch.stack(list(parts)) for parts in zip(*found, strict=True)]


def test_without_a_row_that_helps_every_target_row_there_is_no_subset_to_be_had(
    folder: Path, files: tuple[Path, Path], model_folder: Path, tmp_path: Path
) -> None:
    pairs = [
        ("zz", "#" * 20),
        ("dcba", "Z" * 15),
        ("abcdab", "0123456789" * 2),
        *(("ab", "ba" * k) for k in range(1, 4)),
    ]
    items = [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        for ask, answer in pairs
    ]
    odd = (
        files[0],
        write_rows(
            tmp_path / "odd.jsonl",
            [{"id": f"o{i}", "messages": turns} for i, turns in enumerate(items)],
        ),
    )
    with pytest.raises(
        DataError, match=r"gdig cannot choose: no row helps all 6 target rows .*fill=quantile"
    ):
        choose("gdig", odd, folder, model_folder, target=True, options={"fill": "none"})
    assert len(choose("gdig", odd, folder, model_folder, target=True)) == 8


@pytest.mark.parametrize(
    ("method", "target"), [("selffilter", False), ("dsir", True), ("bm25", True), ("ifd", False)]
)
def test_the_other_methods_run(
    method: str, target: bool, files: tuple[Path, Path], folder: Path, model_folder: Path
) -> None:
    first = choose(method, files, folder, model_folder, target=target)
    assert len(first) == 8
    assert (
        choose(method, files, folder, model_folder, target=target).indices.tolist()
        == first.indices.tolist()
    )


def test_constraints_reach_the_rows_the_report_and_the_list_of_dropped_ones(
    files: tuple[Path, Path], folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("r001\nr003\n")
    (tmp_path / "in").write_text("r002\n")
    limits = {
        "exclude_ids": tmp_path / "out",
        "include_ids": tmp_path / "in",
        "per_group": ["back=:25%"],
    }
    found = choose("random", files, folder, model_folder, constraints=limits)
    plain = choose("random", files, folder, model_folder)
    assert (
        found.folder != plain.folder
        and found.ids[0] == "r002"
        and not {"r001", "r003"} & set(found.ids)
    )
    assert sum(int(i[1:]) % 2 for i in found.ids) <= 2
    dropped = [
        json.loads(line) for line in (found.folder / "dropped.jsonl").read_text().splitlines()
    ]
    assert [(d["id"], d["line"], d["reason"].partition(":")[0]) for d in dropped] == [
        (f"r00{i}", i + 1, "excluded by id") for i in (1, 3)
    ]
    report = (found.folder / "report.md").read_text()
    assert "excluded by id: 2 rows" in report and "--include-ids" in report
    table = pq.read_table(found.folder / "scores.parquet").to_pydict()
    assert table["why"][2] == "named in --include-ids" and table["gain"][2] is None


def test_a_token_budget_pays_for_whole_rows(
    files: tuple[Path, Path], folder: Path, model_folder: Path
) -> None:
    found = choose("length", files, folder, model_folder, budget="300-tokens")
    encoded = next(
        a
        for a in Run(folder).artifacts()
        if a.path.name.startswith("encode-") and a.manifest["counts"]["rows"] == 40
    )
    lengths = EncodedRows.load(encoded.path).lengths
    assert 300 - 64 < int(lengths[found.indices].sum()) <= 300
    assert "300-tokens is met with" in (found.folder / "report.md").read_text()


def test_near_duplicates_by_embeddings(
    files: tuple[Path, Path], folder: Path, model_folder: Path
) -> None:
    found = choose(
        "random",
        files,
        folder,
        model_folder,
        budget=1,
        constraints={"near": 0.2, "near_by": "embeddings"},
    )
    assert "near duplicate" in (found.folder / "dropped.jsonl").read_text()


def test_unknown_ids_are_refused_before_anything_is_made(
    files: tuple[Path, Path], tmp_path: Path, model_folder: Path
) -> None:
    with pytest.raises(UserError, match="'nobody'"):
        choose(
            "random", files, tmp_path / "run", model_folder, constraints={"include_ids": ["nobody"]}
        )


def test_low_rank_scores_say_how_they_agree_with_whole_ones(
    files: tuple[Path, Path], model_folder: Path, tmp_path: Path
) -> None:
    settings = {
        **SETTINGS,
        "gradients": {**SETTINGS["gradients"], "modules": "linear"},
        "curvature": {"fit_rows": 24, "rank": 2, "target_batch": 2},
    }
    found = choose(
        "gdig",
        files,
        tmp_path / "run",
        model_folder,
        target=True,
        options={"clusters": 3},
        settings=settings,
    )
    said = made(tmp_path / "run", "influence").manifest["extra"]["rank_agreement"]

    # One target after the other, whole and at rank 2, over all 40 rows and 3 targets: fewer than
    # would be drawn.
    kept = build({**chosen_settings(tmp_path / "run"), "machine": {"threads": 1}}, "test")
    pipeline = Pipeline(
        Run(tmp_path / "run"), kept, *(read_pool([file], group_field="kind") for file in files)
    )
    curvature = Curvature.load(made(tmp_path / "run", "curvature").path / "curvature.safetensors")
    model = pipeline.model_at(pipeline.checkpoints()[-1])
    pool, target, correlations = (
        list(pipeline.encoded("pool")),
        list(pipeline.encoded("target")),
        [],
    )
    for members in (target[:2], target[2:4], target[4:]):
        columns = []
        for rank in (2, None):
            scores = np.zeros(len(pool))
            for i, row in enumerate(pool):
                [(_, score)] = influence_scores(
                    model,
                    [row],
                    members,
                    curvature.inverse(0.1),
                    modules="linear",
                    target_batch=2,
                    rank=rank,
                )
                scores[i] = float(score)
            columns.append(scores)
        apart = sum(
            (sorted(columns[0]).index(a) - sorted(columns[1]).index(b)) ** 2
            for a, b in zip(*columns, strict=True)
        )
        correlations.append(1 - 6 * apart / (len(pool) * (len(pool) ** 2 - 1)))
    assert min(correlations) < 0.999  # rank 2 does cost something here
    assert said == {
        "rows": 40,
        "targets": 3,
        "least": pytest.approx(min(correlations), abs=2e-3),
        "mean": pytest.approx(np.mean(correlations), abs=2e-3),
    }
    line = f"Spearman correlation of {said['mean']:.3f} (least of 3 targets: {said['least']:.3f})"
    assert line in (found.folder / "report.md").read_text()


def test_whole_scores_say_nothing_of_a_rank(gdig: Selection, folder: Path) -> None:
    assert made(folder, "influence", backend="ekfac").manifest["extra"]["rank_agreement"] is None
    assert "kept at rank" not in (gdig.folder / "report.md").read_text()
