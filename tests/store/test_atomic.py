"""Durable files: canonical bytes, atomic writes, tensor files that verify themselves, names that
stay inside their folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, safe_open

from gradsift.errors import DiskFull, IntegrityError, ResourceError
from gradsift.store import atomic
from gradsift.store.atomic import (
    TEMP,
    inside,
    make_folder,
    making,
    remove_leftovers,
    require_space,
    write_atomic,
)
from gradsift.store.canonical import canonical_json, recipe_digest
from gradsift.store.tensors import TensorFile, file_hash, read_tensors, write_tensors


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "rows": torch.arange(12, dtype=torch.float16).reshape(4, 3),
        "codes": torch.tensor([0, 1, 0, 2], dtype=torch.uint8),
    }


# --- canonical JSON


def test_canonical_json_has_one_spelling() -> None:
    assert (
        canonical_json({"b": [1, 2.5, None, True], "a": {"é": "\u2028"}})
        == '{"a":{"é":"\u2028"},"b":[1,2.5,null,true]}'.encode()
    )
    assert canonical_json({"x": 1, "y": 2}) == canonical_json({"y": 2, "x": 1})
    assert canonical_json((1, 2)) == canonical_json([1, 2]) == b"[1,2]"
    # sha256 of "{}"
    assert recipe_digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize(
    "value", [{1, 2}, Path("a"), b"a", {1: 2}, object(), {"a": [{"b": {3}}]}, torch.tensor(1)]
)
def test_canonical_json_refuses_what_has_no_single_spelling(value: object) -> None:
    with pytest.raises(TypeError, match=r"\$"):
        canonical_json(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_canonical_json_refuses_numbers_that_are_none(value: float) -> None:
    with pytest.raises(ValueError, match=r"\$\.a\[1\]"):
        canonical_json({"a": [0.0, value]})


@pytest.mark.slow
def test_digests_and_files_depend_on_no_hash_seed_or_locale(tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom gradsift.store.canonical import recipe_digest\nfrom"
        " gradsift.store.tensors import write_tensors\n"
        "names = {'\\xe4', 'b', '\\xc7', 'i', 'I', '\\u0131'}\n"  # iterated in hash order
        "print(recipe_digest({name: [0.1, 1e22, name.upper()] for name in names}).encode())\n"
        "write_tensors(sys.argv[1], {name: torch.arange(3) for name in names}, {name: name for name"
        " in names})\n"
    )
    found = []
    for seed, locale in (("1", "C"), ("77", "tr_TR.UTF-8")):
        path = tmp_path / f"{seed}.safetensors"
        env = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "LC_ALL": locale,
            "PYTHONUTF8": "0",
            "TZ": "Asia/Tokyo",
        }
        env["PYTHONPATH"] = str(Path(__file__).parents[2])
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], env=env, capture_output=True, check=True
        )
        found.append((done.stdout, path.read_bytes()))
    assert found[0] == found[1]


# --- tensor files


def test_a_tensor_file_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "half": torch.randn(5, 3).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "double": torch.randn(3, dtype=torch.float64),
        "flag": torch.tensor([True, False, True]),
        "small": torch.arange(7, dtype=torch.int16),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "strided": torch.arange(12).reshape(3, 4).T,
    }
    digest = write_tensors(path, tensors, {"shard": "3"})
    theirs, ours = load_file(path), read_tensors(path)
    assert theirs.keys() == ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == theirs[name].shape == tensor.shape
        assert torch.equal(ours[name], tensor)
        assert torch.equal(theirs[name], tensor)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"shard": "3", "xxh3": digest}


def test_the_digest_is_that_of_the_file_with_the_digest_zeroed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = write_tensors(path, some_tensors(), {"shard": "3"})
    data = path.read_bytes()
    assert data.count(digest.encode()) == 1
    assert (
        xxhash.xxh3_128_hexdigest(data.replace(digest.encode(), b"0" * 32))
        == digest
        == file_hash(path)
    )


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path, bad = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_tensors(path, some_tensors(), {"shard": "3", "rows": "0:4"})
    data = path.read_bytes()
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << (at % 8)
        bad.write_bytes(broken)
        with pytest.raises(IntegrityError) as caught:
            read_tensors(bad, expect={"shard": "3"})
        assert caught.value.where == str(bad)
        assert caught.value.exit_code == 5


def test_every_cut_and_any_growth_is_noticed_without_hashing(tmp_path: Path) -> None:
    path, bad = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_tensors(path, some_tensors(), {})
    data = path.read_bytes()
    for length in range(len(data)):
        bad.write_bytes(data[:length])
        with pytest.raises(IntegrityError):
            read_tensors(bad, verify=False)
    bad.write_bytes(data + b"\0")
    with pytest.raises(IntegrityError, match="bytes where its header says"):
        read_tensors(bad, verify=False)


def test_expectations_name_the_field(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, some_tensors(), {"shard": "3"})
    with pytest.raises(IntegrityError, match="its shard is '3', expected '4'"):
        read_tensors(path, expect={"shard": "4"})
    with pytest.raises(IntegrityError, match="its recipe is None"):
        read_tensors(path, expect={"recipe": "x"})


def test_no_file_a_link_a_pipe_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="is missing"):
        read_tensors(tmp_path / "none")
    write_tensors(tmp_path / "a.safetensors", some_tensors(), {})
    (tmp_path / "link").symlink_to(tmp_path / "a.safetensors")
    with pytest.raises(IntegrityError, match="symbolic link"):
        read_tensors(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IntegrityError, match="not a regular file"):
        read_tensors(tmp_path / "pipe")
    with pytest.raises(IntegrityError, match="not a regular file"):
        file_hash(tmp_path)


def test_what_is_read_may_be_written_to_without_touching_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, some_tensors(), {})
    first = read_tensors(path)
    first["rows"].zero_()
    assert torch.equal(read_tensors(path)["rows"], some_tensors()["rows"])


def test_a_file_cut_while_it_is_open_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"rows": torch.zeros(100_000)}, {})
    with TensorFile(path) as file:
        os.truncate(path, 5000)
        with pytest.raises(IntegrityError, match="cut short"):
            file.tensor("rows", 90_000)


def test_a_slice_is_the_slice_of_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    rows = torch.randn(700, 33).half()
    write_tensors(path, {"rows": rows, "x": torch.arange(700)}, {})
    with TensorFile(path) as file:
        for a, b in [(0, 700), (0, 0), (1, 2), (350, 699), (699, 700)]:
            assert torch.equal(file.tensor("rows", a, b), rows[a:b])


# --- atomic writes


def test_a_write_replaces_all_or_nothing_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ä b.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    for name in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, name, _raising(errno.EIO))
            with pytest.raises(
                ResourceError, match=r"Input/output error.*then run the same command again"
            ):
                write_atomic(path, b"newer")
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == b"new"


def _raising(number: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_tells_needed_and_free_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(atomic.os, "write", _raising(number))
    with pytest.raises(DiskFull, match="no space left: 5 bytes needed") as caught:
        write_atomic(tmp_path / "a", b"12345")
    assert caught.value.needed == 5
    assert caught.value.free is not None
    assert caught.value.free > 0
    assert caught.value.exit_code == 4
    assert not list(tmp_path.iterdir())


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DiskFull):
            write_atomic(tmp_path / "a", b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_full_file_system_keeps_what_was_there(tmp_path: Path) -> None:
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small file system takes root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        write_tensors(small / "a.safetensors", {"rows": torch.zeros(100_000)}, {})
        with pytest.raises(DiskFull) as caught:
            write_tensors(small / "a.safetensors", {"rows": torch.ones(200_000)}, {})
        assert caught.value.needed is not None
        assert caught.value.needed > 800_000
        assert [p.name for p in small.iterdir()] == ["a.safetensors"]
        assert not read_tensors(small / "a.safetensors")["rows"].any()
        with pytest.raises(DiskFull):
            require_space(small / "not" / "yet", 1 << 21)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    require_space(tmp_path / "a" / "b", 1)
    with pytest.raises(DiskFull) as caught:
        require_space(tmp_path / "a" / "b", 1 << 60)
    assert caught.value.needed == 1 << 60
    assert not list(tmp_path.iterdir())


def test_a_folder_one_may_not_write_to_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(
            ResourceError, match=r"closed/a: cannot be written: Permission denied.*--run"
        ) as caught:
            write_atomic(closed / "a", b"x")
        with pytest.raises(ResourceError, match="cannot be written"):
            make_folder(closed / "b" / "c")
    finally:
        os.seteuid(me)
    assert not isinstance(caught.value, DiskFull)


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead, alive, other = (
        tmp_path / name for name in (".gradsift-tmp-dead", ".gradsift-tmp-alive", "mine.tmp")
    )
    for path in (dead, alive, other):
        path.write_bytes(b"x")
    holder = os.open(alive, os.O_WRONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    assert remove_leftovers(tmp_path) == [dead.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == [alive.name, other.name]
    os.close(holder)
    assert remove_leftovers(tmp_path) == [alive.name]


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a/../../b", "", ".", "a//b", "a\\b", "a\0b", "link/x", "link"]
)
def test_no_name_leads_out_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(IntegrityError):
        inside(tmp_path, name)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    dead = tmp_path / f"{TEMP}dead"
    dead.mkdir()
    (dead / "half").write_bytes(b"half")
    with making(tmp_path / "made") as temp:
        (temp / "file").write_bytes(b"whole")
        # what the dead one left is gone
        assert [path.name for path in tmp_path.iterdir()] == [temp.name]
        assert remove_leftovers(tmp_path) == []  # a living one's stays
    assert (tmp_path / "made" / "file").read_bytes() == b"whole"
    with pytest.raises(FileNotFoundError), making(tmp_path / "other") as temp:
        (temp / "no folder" / "file").write_bytes(b"half")
    with making(tmp_path / "made") as temp:  # another was first
        (temp / "file").write_bytes(b"late")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "file").read_bytes() == b"whole"
    with pytest.raises(OSError, match="not empty"), making(tmp_path / "made") as temp:
        # and what lies there is something else
        (temp / "another").write_bytes(b"late")
