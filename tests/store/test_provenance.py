"""What can change the last digits of a shard is told by its file, by the manifest, and by the
result and report of a selection made of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsift
from gradsift.commands.select.select import Selection
from gradsift.compute import machine
from gradsift.compute.executor import Serial
from gradsift.gradients.capture import Capture
from gradsift.store import provenance
from gradsift.store.partial import Partial
from gradsift.store.rows import RowStore
from gradsift.store.run import Run
from gradsift.store.tensors import TensorFile, write_tensors
from tests.conftest import SETTINGS

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*:UserWarning"
)


def test_a_manifest_says_of_shards_what_they_say_of_themselves(tmp_path: Path) -> None:
    made = [
        provenance.made_on(""),
        provenance.made_on("H200"),
        provenance.made_on("A100", 2),
        provenance.made_on("H200", 1),
    ]
    for number, meta in enumerate(made):
        write_tensors(tmp_path / f"{number}.safetensors", {"x": torch.zeros(1)}, meta)
    found = provenance.summary(sorted(tmp_path.iterdir()))
    assert found == {"gpus": {"A100": 1, "H200": 2}, "batch_halvings": {"times": 3, "shards": 2}}
    assert provenance.warnings("loss-0", found) == [
        (
            "the shards of loss-0 were made on more than one kind of GPU (1 on A100, 2 on H200):"
            " equal within tolerance, not bit for bit"
        ),
        (
            "batches were halved 3 times in 2 shards of loss-0, for want of memory: equal within"
            " tolerance, not bit for bit"
        ),
    ]
    assert (
        provenance.summary([tmp_path / "0.safetensors"]) == {}
        and provenance.warnings("loss-0", {}) == []
    )
    assert provenance.warnings("loss-0", {"gpus": {"H200": 9}}) == []


def select(
    run: Path, pool: Path, target: Path, model: Path, method: str = "less", **options: Any
) -> Selection:
    settings = {
        **SETTINGS,
        "warmup": {**SETTINGS["warmup"], "checkpoints": 1},
        "curvature": {"fit_rows": 24},
    }
    targets = [target] if method == "less" else []
    return gradsift.select(
        method,
        pool=pool,
        target=targets,
        model=str(model),
        run=run,
        budget="25%",
        settings=settings,
        options=options,
    )


def extra(run: Path, stage: str) -> list[dict[str, Any]]:
    return [
        artifact.manifest["extra"] for artifact in Run(run).artifacts() if artifact.stage == stage
    ]


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches of more than 100 tokens do not fit; what was tried."""
    tried, run = [], Capture.run

    def refuse(self: Capture, rows: Any, *given: Any) -> Any:
        tried.append(sum(len(row[0]) for row in rows))
        if tried[-1] > 100 and len(rows) > 1:
            raise MemoryError
        return run(self, rows, *given)

    monkeypatch.setattr(Capture, "run", refuse)
    return tried


@pytest.mark.slow
def test_batches_that_were_halved_are_told_by_manifest_result_and_report(
    tmp_path: Path,
    pool_file: Path,
    target_file: Path,
    model_folder: Path,
    little_memory: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scarce = select(tmp_path / "scarce", pool_file, target_file, model_folder)
    assert max(little_memory) > 100
    monkeypatch.undo()
    plenty = select(tmp_path / "plenty", pool_file, target_file, model_folder)
    assert not any("batch_halvings" in found for found in extra(tmp_path / "plenty", "gradients"))
    told = [found["batch_halvings"] for found in extra(tmp_path / "scarce", "gradients")]
    assert all(1 <= found["shards"] <= found["times"] for found in told) and len(told) == 2
    said = [text for text in scarce.warnings if "batches were halved" in text]
    assert len(said) == 2 and all(
        "equal within tolerance, not bit for bit" in text for text in said
    )
    for page in ("report.md", "report.html"):
        assert "batches were halved" in (scarce.folder / page).read_text()
        assert "batches were halved" not in (plenty.folder / page).read_text()
    assert plenty.warnings == [text for text in scarce.warnings if text not in said]


@pytest.mark.slow
def test_halvings_of_scores_through_the_curvature_are_counted_too(
    tmp_path: Path,
    pool_file: Path,
    target_file: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gradsift.signals.curvature import exact

    add = exact.Scorer.add

    def refuse(self: Any, indices: Any, rows: Any) -> None:
        if len(rows) > 2:
            raise MemoryError
        add(self, indices, rows)

    monkeypatch.setattr(exact.Scorer, "add", refuse)
    found = select(tmp_path / "run", pool_file, target_file, model_folder, backend="ekfac")
    (told,) = [made["batch_halvings"] for made in extra(tmp_path / "run", "influence")]
    assert told["times"] >= told["shards"] >= 2
    assert (
        len(
            [
                text
                for text in found.warnings
                if "shards of influence-" in text and "batches were halved" in text
            ]
        )
        == 1
    )


@pytest.mark.parametrize(
    ("method", "stages"),
    [("less", {"gradients": 2}), ("ifd", {"ifd": 1}), ("rds", {"embeddings": 2})],
)
def test_shards_of_two_kinds_of_gpu_are_told_over_a_stop_in_between(
    tmp_path: Path,
    pool_file: Path,
    target_file: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    stages: dict[str, int],
) -> None:
    """Two machines without a GPU that say they have one: all else is what runs on those."""
    monkeypatch.setattr(machine, "gpu_kind", lambda devices: "A100")
    went_on = Serial.map

    def labelled(self: Serial, *given: Any) -> Iterator[tuple[int, Any]]:
        for number, made in enumerate(went_on(self, *given)):
            self.gpu = "A100"
            if number == 2:
                raise KeyboardInterrupt
            yield made

    def other(self: Serial, *given: Any) -> Iterator[tuple[int, Any]]:
        for made in went_on(self, *given):
            self.gpu = "H200"
            yield made

    def chosen() -> Selection:
        settings = {**SETTINGS, "warmup": {**SETTINGS["warmup"], "checkpoints": 1}}
        target = [] if method == "ifd" else [target_file]
        return gradsift.select(
            method,
            pool=pool_file,
            target=target,
            model=str(model_folder),
            run=tmp_path / "run",
            budget=5,
            settings=settings,
        )

    monkeypatch.setattr(Serial, "map", labelled)
    with pytest.raises(BaseException, match=r"stopped|^$"):
        chosen()
    monkeypatch.setattr(Serial, "map", other)
    found = chosen()
    told = [made["gpus"] for stage in stages for made in extra(tmp_path / "run", stage)]
    assert len(told) == sum(stages.values()) and [
        made["A100"] for made in told if "A100" in made
    ] == [2]
    assert all(made["H200"] >= 1 for made in told)
    (said,) = [text for text in found.warnings if "more than one kind of GPU" in text]
    assert (
        "2 on A100, " in said
        and said.replace("&", "&amp;") in (found.folder / "report.html").read_text()
    )


def test_a_shard_of_a_store_and_a_part_carry_it(tmp_path: Path) -> None:
    store = RowStore.create(
        tmp_path / "s", recipe_digest="0" * 64, ids=["a", "b"], dim=4, spec={}, shard_rows=1
    )
    from gradsift.store.packing import pack

    one = torch.ones(1)
    packed = pack(torch.ones(1, 4), norms=one, losses=one, tokens=one.int())
    for shard, gpu in enumerate(("", "H200")):
        store.keep(shard, packed, provenance.made_on(gpu))
    metas = []
    for path in sorted((tmp_path / "s").glob("rows-*")):
        with TensorFile(path) as file:
            metas.append(file.meta.get("gpu"))
    assert metas == [None, "H200"] and RowStore.open(tmp_path / "s", verify=True).shape == (2, 4)
    with Run(tmp_path / "run").lock():
        artifact = Run(tmp_path / "run").artifact(
            "loss", version=1, config={}, inputs={}, identity={}
        )
    parts = Partial(artifact, 2, 1)
    parts.keep(0, {"x": one}, provenance.made_on("A100"))
    parts.keep(1, {"x": one}, provenance.made_on("H200", 3))
    assert parts.missing() == [] and parts.made() == {
        "gpus": {"A100": 1, "H200": 1},
        "batch_halvings": {"times": 3, "shards": 1},
    }
