"""Pools and results on other storages, through fsspec's memory and local file systems."""

from __future__ import annotations

import errno
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import Result
from typer.testing import CliRunner

from gradsift.cli.app import app
from gradsift.data.pool import read_pool
from gradsift.data.remote import fetched, is_url, sent
from gradsift.errors import ResourceError, UserError
from gradsift.store.atomic import TEMP
from gradsift.store.run import Run

ROWS = [
    {
        "id": f"r{i}",
        "messages": [
            {"role": "user", "content": f"q{i}"},
            {"role": "assistant", "content": f"a{i}"},
        ],
    }
    for i in range(5)
]
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
    assert not any(
        is_url(name)
        for name in ("pool.jsonl", "hf:owner/name", "a=b.jsonl", "C:\\x", "/x//y", "a=s3://b/x")
    )


def test_a_pool_is_read_from_another_storage_as_from_the_disk(tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_bytes(TEXT)
    near, far = read_pool(tmp_path / "pool.jsonl"), read_pool("memory://bucket/pool.jsonl")
    assert (far.digest, list(far.ids), list(far.groups)) == (
        near.digest,
        list(near.ids),
        list(near.groups),
    )
    assert list(read_pool("web=memory://bucket/pool.jsonl").groups) == ["web"] * 5
    local = read_pool(f"file://{tmp_path}/pool.jsonl")
    assert (
        local.digest == near.digest
        and fetched(f"file://{tmp_path}/pool.jsonl") == tmp_path / "pool.jsonl"
    )


def test_it_is_fetched_once_until_it_changes(memory: Any) -> None:
    first = fetched("memory://bucket/pool.jsonl")
    assert first.name == "pool.jsonl" and first.read_bytes() == TEXT
    when = first.stat().st_mtime_ns
    assert fetched("memory://bucket/pool.jsonl") == first and first.stat().st_mtime_ns == when
    memory.pipe("/bucket/pool.jsonl", TEXT[: len(TEXT) // 5])
    assert fetched("memory://bucket/pool.jsonl").read_bytes() == TEXT[: len(TEXT) // 5]
    assert not [path for path in first.parents[2].rglob("*") if path.name.startswith(TEMP)]


def test_what_a_killed_copy_left_goes_with_the_next(tmp_path: Path, memory: Any) -> None:
    first = fetched("memory://bucket/pool.jsonl")
    (tmp_path / "out").mkdir()
    left = [first.parent / f"{TEMP}dead", tmp_path / "out" / f"{TEMP}dead"]
    for path in left:
        path.write_bytes(b"half")
    memory.pipe("/bucket/pool.jsonl", TEXT * 2)
    sent(fetched("memory://bucket/pool.jsonl"), f"file://{tmp_path}/out/pool.jsonl")
    assert not any(path.exists() for path in left)


def test_a_storage_that_fails_while_it_is_read_is_not_taken_for_the_disk(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, size: int) -> bytes:
            raise ConnectionResetError(errno.ECONNRESET, "peer went away")

    monkeypatch.setattr(type(memory), "open", lambda *_, **__: Cut())
    with pytest.raises(ResourceError, match=r"refused .*peer went away"):
        fetched("memory://bucket/pool.jsonl")


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


def test_a_copy_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chosen.jsonl").write_bytes(TEXT)
    there = tmp_path / "out" / "chosen.jsonl"
    there.parent.mkdir()
    there.write_bytes(b"earlier\n")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gradsift.store.atomic.os.fsync", full)
    with pytest.raises(ResourceError, match=f"{len(TEXT):,} bytes needed"):
        sent(tmp_path / "chosen.jsonl", f"file://{there}")
    assert there.read_bytes() == b"earlier\n" and [
        path.name for path in there.parent.iterdir()
    ] == ["chosen.jsonl"]


SETTINGS_FILE = """
[encode]
max_length = 128
[machine]
threads = 1
"""


def select(folder: Path, model: Path, pool: str, out: str) -> Result:
    (folder / "settings.toml").write_text(SETTINGS_FILE)
    words = [
        "select",
        "length",
        "--pool",
        pool,
        "--model",
        str(model),
        "--budget",
        "40%",
        "--run",
        str(folder / "run"),
        "--out",
        out,
    ]
    return CliRunner().invoke(app, [*words, "--config", str(folder / "settings.toml")])


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.jsonl?sig=s3cret&v=1", "pool.jsonl.gz"])
def test_select_reads_a_pool_from_a_url_and_sends_what_it_chose_to_one(
    tmp_path: Path, memory: Any, model_folder: Path, name: str
) -> None:
    memory.pipe(f"/me:s3cret@bucket/{name}", gzip.compress(TEXT) if name.endswith(".gz") else TEXT)
    for place in ("near", "far"):
        (tmp_path / place).mkdir()
    (tmp_path / "near" / "pool.jsonl").write_bytes(TEXT)
    near = select(
        tmp_path / "near",
        model_folder,
        f"file://{tmp_path}/near/pool.jsonl",
        f"file://{tmp_path}/near/out/chosen.jsonl",
    )
    far = select(
        tmp_path / "far",
        model_folder,
        f"memory://me:s3cret@bucket/{name}",
        "memory://me:s3cret@results/deep/chosen.jsonl",
    )
    assert (near.exit_code, far.exit_code) == (0, 0), (near.output, far.output)
    chosen = (tmp_path / "near" / "out" / "chosen.jsonl").read_bytes()
    assert memory.cat("/me:s3cret@results/deep/chosen.jsonl") == chosen
    assert len(chosen.splitlines()) == 2 and set(chosen.splitlines()) <= set(TEXT.splitlines())
    assert contents(tmp_path / "near") == contents(tmp_path / "far")
    held = b"".join(
        path.read_bytes() for path in (tmp_path / "far" / "run").rglob("*") if path.is_file()
    )
    assert b"s3cret" not in held and "s3cret" not in far.output
    memory.pipe("/me:s3cret@results/deep/chosen.jsonl", b"")
    assert (
        select(
            tmp_path / "far",
            model_folder,
            f"memory://me:s3cret@bucket/{name}",
            "memory://me:s3cret@results/deep/chosen.jsonl",
        ).exit_code
        == 0
    )
    assert memory.cat("/me:s3cret@results/deep/chosen.jsonl") == chosen


def contents(folder: Path) -> dict[str, str]:
    return {artifact.path.name: artifact.content for artifact in Run(folder / "run").artifacts()}


def test_select_does_not_send_over_its_own_input_and_tells_what_the_storage_refused(
    tmp_path: Path, memory: Any, model_folder: Path
) -> None:
    memory.pipe("/bucket/a=b.jsonl", TEXT)
    for pool in (
        "memory://bucket/pool.jsonl",
        "memory://bucket/a=b.jsonl",
        "web=memory://bucket/pool.jsonl",
    ):
        refused = select(tmp_path, model_folder, pool, pool.removeprefix("web="))
        assert isinstance(refused.exception, UserError) and "--out names an input file" in str(
            refused.exception
        ), pool
    none = select(
        tmp_path, model_folder, "memory://bucket/none.jsonl", "memory://bucket/chosen.jsonl"
    )
    assert isinstance(
        none.exception, UserError
    ) and "memory://bucket/none.jsonl: there is no such file" in str(none.exception)
    assert memory.cat("/bucket/pool.jsonl") == TEXT and not memory.exists("/bucket/chosen.jsonl")
