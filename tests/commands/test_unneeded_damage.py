"""An artifact that a method does not need may be damaged: the selection goes on, says so, and
chooses the same rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gradsift
from gradsift.errors import IntegrityError
from gradsift.store.run import Run
from tests.conftest import SETTINGS


class Notes:
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def start(self, total: int, unit: str, label: str = "") -> None: ...

    def advance(self, k: int = 1) -> None: ...

    def done(self) -> None: ...

    def note(self, text: str) -> None:
        self.texts.append(text)


def damage(folder: Path) -> None:
    """One digit of the manifest, as a disk or an editor might change it."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["counts"]["rows"] = manifest["counts"].get("rows", 0) + 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_what_a_method_does_not_need_cannot_end_its_selection(
    tmp_path: Path, pool_file: Path, target_file: Path, model_folder: Path
) -> None:
    given: dict[str, Any] = {
        "pool": pool_file,
        "budget": 6,
        "run": tmp_path / "run",
        "model": str(model_folder),
        "settings": SETTINGS,
    }
    gradsift.select("less", target=target_file, **given)
    gradsift.select("random", **given)
    gradsift.select("ifd", seed=3, **given)
    run = Run(tmp_path / "run")
    (scores,) = run.artifacts("ifd")
    needed = {scores.digest, scores.recipe["inputs"]["rows"]}
    others = [artifact.path for artifact in run.artifacts() if artifact.digest not in needed]
    assert {path.name.partition("-")[0] for path in others} == {
        "encode",
        "warmup",
        "gradients",
        "influence",
        "select",
    }
    clean = gradsift.select("ifd", seed=4, **given).ids
    for number, folder in enumerate(others):
        before = (folder / "manifest.json").read_bytes()
        damage(folder)
        notes = Notes()
        chosen = gradsift.select("ifd", seed=100 + number, progress=notes, **given)
        assert chosen.ids == clean, "ifd reads no seed"
        assert [
            text
            for text in notes.texts
            if text.startswith("not needed and not read") and folder.name in text
        ]
        (folder / "manifest.json").write_bytes(before)


def test_what_it_needs_is_refused(tmp_path: Path, pool_file: Path, model_folder: Path) -> None:
    given: dict[str, Any] = {
        "pool": pool_file,
        "budget": 6,
        "run": tmp_path / "run",
        "model": str(model_folder),
        "settings": SETTINGS,
    }
    gradsift.select("ifd", **given)
    damage(Run(tmp_path / "run").artifacts("ifd")[0].path)
    with pytest.raises(IntegrityError, match="edited"):
        gradsift.select("ifd", seed=1, **given)
