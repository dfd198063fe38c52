"""Files that are there completely or not at all, and that verify themselves: canonical JSON, atomic
writes, tensor files, free space.

Every file reaches its name by one rename of finished, synced bytes, so a reader never sees half a
file, whatever instant the writer was killed at. More than 400 lines because all that renames or
syncs stands here, and nowhere else: `tests/faults/failpoints.py` strikes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from gradsift.errors import DiskFull, IntegrityError, ResourceError

TEMP = ".gradsift-tmp-"
_LINK = "is a symbolic link; gradsift follows none inside a run"


_REMEDY = (
    "In a run: `gradsift verify RUN`, then the same command again. Elsewhere: copy the file again."
)


def damaged(what: str, path: Path) -> IntegrityError:
    return IntegrityError(what, where=path, remedy=_REMEDY)


def inside(root: Path, name: str) -> Path:
    """root / name, for a name read from a file. Raises IntegrityError when `..`, an absolute path
    or a symbolic link would leave `root`.
    """
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise IntegrityError(f"the file name {name!r} points outside its folder", where=root)
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise IntegrityError(_LINK, where=path, remedy="Replace it by the file itself.")
    return path


def require_space(path: Path, needed: int) -> None:
    """Raises DiskFull (needed, free: bytes) when less than `needed` bytes are free where `path` is,
    or will be.
    """
    free = _free_bytes(path)
    if free < needed:
        raise _disk_full(path, needed, free)


def _free_bytes(path: Path) -> int:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _disk_full(path: Path, needed: int, free: int) -> DiskFull:
    remedy = "Free some space, then run the same command again: finished work is kept."
    return DiskFull(
        f"no space left: {needed:,} bytes needed, {free:,} free",
        where=path,
        remedy=remedy,
        needed=needed,
        free=free,
    )


def resource_error(error: OSError, path: Path, needed: int = 0) -> ResourceError:
    """What a failed write of `needed` bytes to `path` means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _disk_full(path, needed, _free_bytes(path.parent))
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(
            f"cannot be written: {error.strerror}",
            where=path,
            remedy="Choose a --run folder that you may write to.",
        )
    return ResourceError(
        f"cannot be written: {error.strerror}",
        where=path,
        remedy="Check the disk, then run the same command again.",
    )


def make_folder(path: Path) -> None:
    """Makes `path` and its parents, durably. Raises ResourceError where that is not allowed."""
    try:
        if path.is_dir():
            return
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise resource_error(error, path) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`: all of it or, after a crash at any instant, none of it. Durable
    when it returns.

    Raises DiskFull (needed, free) when the disk or quota is full, ResourceError when the folder may
    not be written or the disk fails.
    """
    write_buffers(Path(path), [data])


def write_buffers(path: Path, buffers: Sequence[bytes | memoryview]) -> None:
    with replacing(path, sum(memoryview(buffer).nbytes for buffer in buffers)) as file:
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                view = view[os.write(file.fileno(), view[: 1 << 26]) :]


@contextlib.contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[IO[bytes]]:
    """A file to be written that takes the name `path` when the block ends, whole and synced; where
    the block raises, nothing is left of it.

    For what is written piece by piece, `needed` bytes in all as far as that is known. Errors as
    `write_atomic`.
    """
    temp = path.with_name(TEMP + secrets.token_hex(8))
    try:
        fd = os.open(
            temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666
        )
        try:
            try:
                # Held until the file has its name: a leftover that can be locked belongs to a dead
                # writer.
                _try_lock(fd)
                with open(fd, "wb", closefd=False) as file:
                    yield file
                os.fsync(fd)
                os.replace(temp, path)
            finally:
                os.close(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temp)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise resource_error(error, path, needed) from error


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            # some network file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


def rename(path: Path, target: Path) -> None:
    """Gives a file or a folder another name, durably. Raises OSError."""
    os.rename(path, target)
    sync_folder(target.parent)


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A new folder that takes the name `folder` when the block ends, with the files in it synced;
    where the block raises, nothing is left.

    Where another process was first, its folder stays; what dead ones have left beside it is
    deleted. Raises OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    temp, fd = _locked_folder(folder.parent)
    try:
        yield temp
        for path in temp.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.fsync(fd)
        try:
            rename(temp, folder)
        except OSError:
            if not all((folder / path.name).exists() for path in temp.iterdir()):
                raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        os.close(fd)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """A new temporary folder and a descriptor that holds its lock."""
    while True:
        temp = parent / (TEMP + secrets.token_hex(8))
        temp.mkdir()
        with contextlib.suppress(FileNotFoundError):
            # before it was locked it looked like a dead writer's, and was deleted
            fd = os.open(temp, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _try_lock(fd) and temp.is_dir():
                return temp, fd
            os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def marker(folder: Path) -> Iterator[tuple[Path, str]]:
    """A temporary file in `folder` and its text, which nobody else can know: who reads the text
    sees this very folder.

    Raises ResourceError where this process may not write there.
    """
    path, text = folder / f"{TEMP}seen-{secrets.token_hex(8)}", secrets.token_hex(16)
    write_atomic(path, text.encode())
    try:
        yield path, text
    finally:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[str]:
    """Deletes the temporary files and folders of dead writers in `folder`, and returns their names.
    Those of living writers are locked, and stay.
    """
    gone = []
    for entry in os.scandir(folder):
        if not entry.name.startswith(TEMP) or entry.is_symlink():
            continue
        with contextlib.suppress(OSError):
            fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _try_lock(fd):
                    shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
                    gone.append(entry.name)
            finally:
                os.close(fd)
    return gone


def open_plain(path: Path) -> int:
    """A descriptor of a regular file that is not a link. O_NONBLOCK: a FIFO must not hang the
    open.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        what = {errno.ENOENT: "is missing", errno.ELOOP: _LINK}.get(error.errno or 0)
        if what is None:
            raise ResourceError(f"cannot be read: {error.strerror}", where=path) from error
        raise damaged(what, path) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise damaged("is not a regular file", path)
    return fd


def file_chunks(path: Path) -> Iterator[memoryview]:
    """The bytes of a plain file, in pieces that are overwritten by the next. Raises IntegrityError
    (missing, a link), ResourceError.
    """
    fd = open_plain(path)
    try:
        yield from chunks_from(fd, 0, path)
    finally:
        os.close(fd)


def chunks_from(fd: int, offset: int, path: Path) -> Iterator[memoryview]:
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    while True:
        try:
            read = os.preadv(fd, [buffer], offset)
        except OSError as error:
            raise ResourceError(f"cannot be read: {error.strerror}", where=path) from error
        if not read:
            return
        yield view[:read]
        offset += read


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no file or it holds no JSON object (a
    zeroed page, a cut file).
    """
    try:
        data = b"".join(bytes(chunk) for chunk in file_chunks(path))
        found = json.loads(data)
    except IntegrityError as error:
        if error.what == "is missing":
            return None
        raise
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
