"""Damage done to a store on disk is named; where the store is unfinished it is made anew, where it
is complete it is refused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gradsift.errors import IntegrityError
from gradsift.store.artifact import MANIFEST
from gradsift.store.rows import RowStore
from gradsift.store.run import Run
from tests.faults.filler import DIM, ROWS, fill, rows_of

SHARDS = 4
ONE, TWO = "rows-00001.safetensors", "rows-00002.safetensors"


def flip_in_payload(folder: Path) -> None:
    change(folder / ONE, lambda data: data[:-100] + bytes([data[-100] ^ 16]) + data[-99:])


def flip_in_header(folder: Path) -> None:
    change(folder / ONE, lambda data: data.replace(b'"shard":"1"', b'"shard":"3"'))


def zero_page(folder: Path) -> None:
    change(folder / ONE, lambda data: data[:2048] + b"\0" * 1024 + data[3072:])


def zero_file(folder: Path) -> None:
    change(folder / ONE, lambda data: b"\0" * len(data))


def cut(folder: Path) -> None:
    change(folder / ONE, lambda data: data[: len(data) // 2])


def empty(folder: Path) -> None:
    change(folder / ONE, lambda data: b"")


def swap(folder: Path) -> None:
    (folder / ONE).rename(folder / "aside")
    (folder / TWO).rename(folder / ONE)
    (folder / "aside").rename(folder / TWO)


def duplicate(folder: Path) -> None:
    shutil.copy(folder / TWO, folder / ONE)


def foreign(folder: Path) -> None:
    other = fill(folder.parent.parent / "other", SHARDS + 1).path
    shutil.copy(other / ONE, folder / ONE)


def link(folder: Path) -> None:
    aside = folder.parent.parent / "aside"
    shutil.move(folder / ONE, aside)
    (folder / ONE).symlink_to(aside)


def remove(folder: Path) -> None:
    (folder / ONE).unlink()


DAMAGE: dict[Callable[[Path], None], str] = {
    flip_in_payload: "not what was written",
    flip_in_header: "its shard is '3', expected '1'",
    zero_page: "not what was written",
    zero_file: "damaged",
    cut: "bytes where its header says",
    empty: "cut short",
    swap: "its shard is '2', expected '1'",
    duplicate: "its shard is '2', expected '1'",
    foreign: "its store is",
    link: "symbolic link",
    remove: "is missing",
}
damage = pytest.mark.parametrize("harm", DAMAGE, ids=lambda harm: harm.__name__)


def change(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def reopened(folder: Path) -> RowStore:
    digest = fill(folder.parent, SHARDS).digest
    return RowStore.create(
        folder,
        recipe_digest=digest,
        ids=[f"row-{i}" for i in range(SHARDS * ROWS)],
        dim=DIM,
        spec={},
        shard_rows=ROWS,
    )


@damage
def test_in_an_unfinished_store_it_is_named_and_made_anew(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    artifact = fill(tmp_path / "run", SHARDS)
    content, folder = artifact.content, artifact.path
    (artifact.path / MANIFEST).unlink()
    untouched = {
        name: (folder / name).stat()
        for name in ("rows-00000.safetensors", "rows-00003.safetensors")
    }
    harm(folder)
    ids = [f"row-{i}" for i in range(SHARDS * ROWS)]
    store = RowStore.create(
        folder, recipe_digest=artifact.digest, ids=ids, dim=DIM, spec={}, shard_rows=ROWS
    )
    assert store.missing() == ([1, 2] if harm is swap else [1])
    if harm is not remove:
        assert ONE in store.problems[0]
        assert DAMAGE[harm] in store.problems[0]
    with pytest.raises(IntegrityError):
        store[0 : SHARDS * ROWS]
    again = fill(tmp_path / "run", SHARDS)
    assert again.content == content
    for name, stat in untouched.items():
        assert ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) == (
            stat.st_ino,
            stat.st_mtime_ns,
        )
    if harm is link:
        assert (tmp_path / "aside").read_bytes() == (folder / ONE).read_bytes()
        assert not (folder / ONE).is_symlink()


@damage
def test_in_a_complete_store_it_is_refused_then_only_that_shard_is_made_anew(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    artifact = fill(tmp_path / "run", SHARDS)
    content, folder = artifact.content, artifact.path
    zero = (folder / "rows-00000.safetensors").stat()
    harm(folder)
    with pytest.raises(IntegrityError, match=ONE) as caught:
        RowStore.open(folder, verify=True)
    assert DAMAGE[harm] in str(caught.value)
    assert "gradsift verify" in str(caught.value)
    run = Run(tmp_path / "run")
    problems = run.verify()
    assert problems[0].file == ONE
    assert problems[0].artifact == folder.name
    assert len(problems) == (2 if harm is swap else 1)
    with run.lock():
        for problem in problems:
            run.discard(problem)
    assert run.verify() == []
    assert not (folder / ONE).exists()
    assert (folder / "rows-00003.safetensors").exists()
    if harm is link:
        assert (tmp_path / "aside").exists()
    assert fill(tmp_path / "run", SHARDS).content == content
    assert (folder / "rows-00000.safetensors").stat().st_mtime_ns == zero.st_mtime_ns
    assert run.verify() == []


def test_a_flipped_bit_of_an_unfinished_store_is_found_by_verify_and_by_the_next_run(
    tmp_path: Path,
) -> None:
    artifact = fill(tmp_path / "run", SHARDS)
    (artifact.path / MANIFEST).unlink()
    flip_in_payload(artifact.path)
    (artifact.path / TWO).unlink()
    run = Run(tmp_path / "run")
    assert [problem.file for problem in run.verify()] == [ONE]
    assert reopened(artifact.path).missing() == []


@pytest.mark.parametrize("name", ["store.json", "ids.safetensors"])
@pytest.mark.parametrize(
    "how",
    [lambda data: b"", lambda data: b"\0" * len(data), lambda data: data[:-3]],
    ids=["empty", "zero", "cut"],
)
def test_header_and_ids_are_covered_too(
    tmp_path: Path, name: str, how: Callable[[bytes], bytes]
) -> None:
    artifact = fill(tmp_path / "run", SHARDS)
    content = artifact.content
    change(artifact.path / name, how)
    with pytest.raises(IntegrityError, match=name):
        RowStore.open(artifact.path)
    run = Run(tmp_path / "run")
    problems = run.verify()
    assert [problem.file for problem in problems] == [name]
    run.discard(problems[0])
    assert fill(tmp_path / "run", SHARDS).content == content


def test_other_ids_with_a_valid_digest_are_refused(tmp_path: Path) -> None:
    artifact = fill(tmp_path / "run", SHARDS)
    other = fill(tmp_path / "other", SHARDS + 1)
    shutil.copy(other.path / "ids.safetensors", artifact.path / "ids.safetensors")
    with pytest.raises(IntegrityError, match=r"ids\.safetensors: its store is"):
        RowStore.open(artifact.path)


def test_a_whole_other_shard_of_the_same_store_is_not_the_one_of_the_manifest(
    tmp_path: Path,
) -> None:
    """Same recipe, same place, self-consistent, but other values: the manifest knows."""
    artifact = fill(tmp_path / "run", SHARDS)
    (artifact.path / ONE).unlink()
    ids = [f"row-{i}" for i in range(SHARDS * ROWS)]
    store = RowStore.create(
        artifact.path, recipe_digest=artifact.digest, ids=ids, dim=DIM, spec={}, shard_rows=ROWS
    )
    ones = torch.ones(ROWS)
    store.write(1, rows_of(99), norms=ones, losses=ones, tokens=ones)
    with pytest.raises(IntegrityError, match=f"{ONE} is not the shard that the manifest names"):
        RowStore.open(artifact.path)
    assert "is not the file that the manifest names" in Run(tmp_path / "run").verify()[0].what


def test_a_read_only_run_can_be_read(tmp_path: Path) -> None:
    artifact = fill(tmp_path / "run", SHARDS)
    for path in [artifact.path, *artifact.path.iterdir(), tmp_path / "run"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
        if parent.name.startswith("pytest-of"):
            break
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        run = Run(tmp_path / "run")
        found = run.latest("gradients")
        assert found is not None
        assert RowStore.open(found.path, verify=True).shape == (SHARDS * ROWS, DIM)
        assert run.verify() == []
    finally:
        os.seteuid(me)
        for path in (tmp_path / "run", artifact.path):
            path.chmod(0o755)
