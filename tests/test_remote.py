"""Pools and results on other storages, through fsspec's memory and local file systems."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from gradsift.errors import ResourceError, UserError
from gradsift.pool import read_pool
from gradsift.remote import fetched, is_url, sent

ROWS = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in range(5)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/pool.jsonl", TEXT)
    yield system
    system.store.clear()


def test_names_that_are_urls() -> None:
    assert is_url("s3://b/x") and is_url("memory://x")
    assert not any(is_url(name) for name in ("pool.jsonl", "hf:owner/name", "a=b.jsonl", "C:\\x", "/x//y", "a=s3://b/x"))


def test_a_pool_is_read_from_another_storage_as_from_the_disk(tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_bytes(TEXT)
    near, far = read_pool(tmp_path / "pool.jsonl"), read_pool("memory://bucket/pool.jsonl")
    assert (far.digest, list(far.ids), list(far.groups)) == (near.digest, list(near.ids), list(near.groups))
    assert list(read_pool("web=memory://bucket/pool.jsonl").groups) == ["web"] * 5
    local = read_pool(f"file://{tmp_path}/pool.jsonl")
    assert local.digest == near.digest and fetched(f"file://{tmp_path}/pool.jsonl") == tmp_path / "pool.jsonl"


def test_it_is_fetched_once_until_it_changes(memory: Any) -> None:
    first = fetched("memory://bucket/pool.jsonl")
    assert first.name == "pool.jsonl" and first.read_bytes() == TEXT
    when = first.stat().st_mtime_ns
    assert fetched("memory://bucket/pool.jsonl") == first and first.stat().st_mtime_ns == when
    memory.pipe("/bucket/pool.jsonl", TEXT[: len(TEXT) // 5])
    assert fetched("memory://bucket/pool.jsonl").read_bytes() == TEXT[: len(TEXT) // 5]
    assert not [path for path in first.parents[1].rglob("*") if path.name.startswith(".tmp-")]


def test_what_is_chosen_is_sent_there(tmp_path: Path, memory: Any) -> None:
    (tmp_path / "chosen.jsonl").write_bytes(TEXT)
    sent(tmp_path / "chosen.jsonl", "memory://results/a/chosen.jsonl")
    assert memory.cat("/results/a/chosen.jsonl") == TEXT
    sent(tmp_path / "chosen.jsonl", f"file://{tmp_path}/new/chosen.jsonl")
    assert (tmp_path / "new" / "chosen.jsonl").read_bytes() == TEXT


def test_what_cannot_be_had_says_why(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_pool("memory://bucket/none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        fetched("memory://bucket")
    with pytest.raises(UserError, match=r"no storage of this kind is known|needs another package"):
        fetched("nonsense://bucket/x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(memory), "info", refuse)
    with pytest.raises(ResourceError, match=r"refused \(PermissionError: Access Denied\)"):
        fetched("memory://bucket/pool.jsonl")


def test_a_copy_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chosen.jsonl").write_bytes(TEXT)
    there = tmp_path / "out" / "chosen.jsonl"
    there.parent.mkdir()
    there.write_bytes(b"earlier\n")

    def full(source: Any, target: Any, length: int = 0) -> None:
        target.write(source.read(10))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gradsift.remote.shutil.copyfileobj", full)
    with pytest.raises(ResourceError, match=f"{len(TEXT):,} bytes needed"):
        sent(tmp_path / "chosen.jsonl", f"file://{there}")
    assert there.read_bytes() == b"earlier\n" and [path.name for path in there.parent.iterdir()] == ["chosen.jsonl"]
