"""Artifacts: complete by their manifest, of one recipe, and refused where either was changed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import xxhash

from gradsift.errors import IntegrityError, MismatchError
from gradsift.store import artifact
from gradsift.store.artifact import Artifact, file_hashes, recipe
from gradsift.store.atomic import write_atomic
from gradsift.store.canonical import recipe_digest
from gradsift.store.tensors import file_hash, folder_hash, write_tensors
from tests.store.test_atomic import some_tensors

RECIPE = recipe(
    "gradients",
    version=1,
    config={"seed": 0, "dim": 8},
    inputs={"pool": "ab"},
    identity={"model": "tiny"},
)


def made(root: Path) -> Artifact:
    found = Artifact(root, RECIPE)
    digest = write_tensors(found.file("a.safetensors"), some_tensors(), {})
    write_atomic(found.file("b.json"), b"{}")
    found.finish(
        files={"b.json": file_hash(found.file("b.json")), "a.safetensors": digest},
        counts={"rows": 4},
        stats={"seconds": 2},
    )
    return found


def test_an_artifact_is_complete_once_its_manifest_is_there(tmp_path: Path) -> None:
    found = Artifact(tmp_path, RECIPE)
    assert not found.complete
    assert found.path.name == f"gradients-{recipe_digest(RECIPE)[:12]}"
    with pytest.raises(IntegrityError, match="is not complete"):
        _ = found.content
    found = made(tmp_path)
    again = Artifact(tmp_path, RECIPE)
    assert again.complete
    assert again.content == found.content == recipe_digest(found.manifest["files"])
    assert list(again.manifest["files"]) == ["a.safetensors", "b.json"]
    assert again.manifest["files"] == file_hashes(again.path)
    assert again.stats["seconds"] == 2
    assert again.stats["wall_seconds"] >= 0
    assert Artifact.load(found.path) is not None


def test_tensors_of_an_artifact_are_those_its_manifest_names(tmp_path: Path) -> None:
    found = made(tmp_path)
    assert torch.equal(found.tensors("a.safetensors")["rows"], some_tensors()["rows"])
    write_tensors(found.file("a.safetensors"), {"rows": torch.zeros(4, 3)}, {})
    with pytest.raises(
        IntegrityError,
        match=r"a\.safetensors: is not the file that the manifest names.*gradsift verify",
    ):
        found.tensors("a.safetensors")


def test_a_manifest_holds_no_clock_and_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, clock = made(tmp_path / "one"), time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 86_400)
    second = made(tmp_path / "elsewhere" / "two")
    assert (first.path / "manifest.json").read_bytes() == (
        second.path / "manifest.json"
    ).read_bytes()
    assert str(tmp_path) not in (first.path / "manifest.json").read_text()


@pytest.mark.parametrize(
    "field",
    [
        "config",
        "counts",
        "files",
        "content",
        "digest",
        "extra",
        "inputs",
        "identity",
        "stage",
        "version",
        "seal",
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, field: str) -> None:
    path = made(tmp_path).path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[field] = {"a": "b"} if isinstance(manifest[field], dict) else "0"
    path.write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError) as caught:
        _ = Artifact(tmp_path, RECIPE).complete
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4096, b'{"schema": 1, "conf', b"[1]", b"[" * 100_000]
)
def test_a_manifest_that_is_no_json_leaves_the_artifact_resumable(
    tmp_path: Path, content: bytes
) -> None:
    found = made(tmp_path)
    (found.path / "manifest.json").write_bytes(content)
    again = Artifact(tmp_path, RECIPE)
    assert not again.complete
    again.finish(counts={"rows": 4})
    assert Artifact(tmp_path, RECIPE).content == found.content


def test_a_newer_schema_is_refused_by_name_and_an_older_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = made(tmp_path)
    monkeypatch.setattr(artifact, "SCHEMA", 2)
    assert Artifact(tmp_path, RECIPE).manifest["schema"] == 1
    monkeypatch.setattr(artifact, "SCHEMA", 0)
    with pytest.raises(
        MismatchError, match=r"written in schema 1; this gradsift reads up to 0\. Upgrade"
    ):
        Artifact(tmp_path, RECIPE)
    assert found.complete


def test_a_folder_that_holds_another_recipe_is_refused(tmp_path: Path) -> None:
    found = made(tmp_path)
    other = recipe("gradients", version=1, config={"seed": 1}, inputs={}, identity={})
    renamed = tmp_path / f"gradients-{recipe_digest(other)[:12]}"
    found.path.rename(renamed)
    with pytest.raises(IntegrityError, match="another recipe"):
        Artifact(tmp_path, other)
    with pytest.raises(IntegrityError, match=f"holds the recipe of {found.path.name}"):
        Artifact.load(renamed)


def test_an_artifact_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "run"
    root.mkdir()
    (root / f"gradients-{recipe_digest(RECIPE)[:12]}").symlink_to(outside)
    with pytest.raises(IntegrityError, match="symbolic link"):
        Artifact(root, RECIPE)
    assert not list(outside.iterdir())


def test_finish_wants_its_files_and_refuses_strange_names(tmp_path: Path) -> None:
    found = Artifact(tmp_path, RECIPE)
    with pytest.raises(IntegrityError, match=r"a\.safetensors: is missing"):
        found.finish(files={"a.safetensors": "0"}, counts={})
    with pytest.raises(IntegrityError, match="outside"):
        found.finish(files={"../x": "0"}, counts={})
    assert not found.complete
    with pytest.raises(ValueError, match="stage name"):
        recipe("../x", version=1, config={}, inputs={}, identity={})


def test_a_folder_of_the_user_may_hold_links_and_foreign_tensor_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save_file({"a": torch.zeros(3)}, blobs / "one")
    (snapshot / "model.safetensors").symlink_to(blobs / "one")
    before = folder_hash(snapshot)
    assert before == recipe_digest(
        {"model.safetensors": xxhash.xxh3_128_hexdigest((blobs / "one").read_bytes())}
    )
    save_file({"a": torch.ones(3)}, blobs / "one")
    assert folder_hash(snapshot) != before
