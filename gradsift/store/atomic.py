"""Files that are there completely or not at all, and that verify themselves: canonical JSON, atomic writes, tensor files, free space.

Every file reaches its name by one rename of finished, synced bytes, so a reader never sees half a file, whatever instant the writer
was killed at. More than 400 lines because all that renames or syncs stands here, and nowhere else: `tests/faults/failpoints.py` strikes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from gradsift.errors import DiskFull, GradsiftError, IntegrityError, ResourceError

TEMP = ".gradsift-tmp-"
_NO_DIGEST = "0" * 32
_LINK = "is a symbolic link; gradsift follows none inside a run"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


_REMEDY = "In a run: `gradsift verify RUN`, then the same command again. Elsewhere: copy the file again."


def _damaged(what: str, path: Path) -> IntegrityError:
    return IntegrityError(what, where=path, remedy=_REMEDY)


def canonical_json(obj: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8. The same bytes for any locale, hash seed and insertion order.

    Raises TypeError for what has no single spelling (sets, paths, bytes, keys that are not strings) and ValueError for NaN and infinities.
    """
    _refuse_ambiguous(obj, "$")
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")


def _refuse_ambiguous(obj: Any, place: str) -> None:
    if obj is None or isinstance(obj, (str, bool, int)):
        return
    if isinstance(obj, float):
        if not math.isfinite(obj):
            raise ValueError(f"{place}: {obj} has no place in a recipe")
    elif isinstance(obj, dict):
        for key, value in obj.items():
            if not isinstance(key, str):
                raise TypeError(f"{place}: the key {key!r} is not a string")
            _refuse_ambiguous(value, f"{place}.{key}")
    elif isinstance(obj, (list, tuple)):
        for i, value in enumerate(obj):
            _refuse_ambiguous(value, f"{place}[{i}]")
    else:
        raise TypeError(f"{place}: a {type(obj).__name__} cannot be part of a recipe")


def recipe_digest(obj: Any) -> str:
    """sha256 hex of canonical_json(obj)."""
    return hashlib.sha256(canonical_json(obj)).hexdigest()


def inside(root: Path, name: str) -> Path:
    """root / name, for a name read from a file. Raises IntegrityError when `..`, an absolute path or a symbolic link would leave `root`."""
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
    """Raises DiskFull (needed, free: bytes) when less than `needed` bytes are free where `path` is, or will be."""
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
    return DiskFull(f"no space left: {needed:,} bytes needed, {free:,} free", where=path, remedy=remedy, needed=needed, free=free)


def resource_error(error: OSError, path: Path, needed: int = 0) -> ResourceError:
    """What a failed write of `needed` bytes to `path` means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _disk_full(path, needed, _free_bytes(path.parent))
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(f"cannot be written: {error.strerror}", where=path, remedy="Choose a --run folder that you may write to.")
    return ResourceError(f"cannot be written: {error.strerror}", where=path, remedy="Check the disk, then run the same command again.")


def make_folder(path: Path) -> None:
    """Makes `path` and its parents, durably. Raises ResourceError where that is not allowed."""
    try:
        if path.is_dir():
            return
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise resource_error(error, path) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`: all of it or, after a crash at any instant, none of it. Durable when it returns.

    Raises DiskFull (needed, free) when the disk or quota is full, ResourceError when the folder may not be written or the disk fails.
    """
    _write_buffers(Path(path), [data])


def _write_buffers(path: Path, buffers: Sequence[bytes | memoryview]) -> None:
    with replacing(path, sum(memoryview(buffer).nbytes for buffer in buffers)) as file:
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                view = view[os.write(file.fileno(), view[: 1 << 26]) :]


@contextlib.contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[IO[bytes]]:
    """A file to be written that takes the name `path` when the block ends, whole and synced; where the block raises, nothing is left of it.

    For what is written piece by piece, `needed` bytes in all as far as that is known. Errors as `write_atomic`.
    """
    temp = path.with_name(TEMP + secrets.token_hex(8))
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            try:
                # Held until the file has its name: a leftover that can be locked belongs to a dead writer.
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
        _sync_folder(path.parent)
    except OSError as error:
        raise resource_error(error, path, needed) from error


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


def rename(path: Path, target: Path) -> None:
    """Gives a file or a folder another name, durably. Raises OSError."""
    os.rename(path, target)
    _sync_folder(target.parent)


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A new folder that takes the name `folder` when the block ends, with the files in it synced; where the block raises, nothing is left.

    Where another process was first, its folder stays; what dead ones have left beside it is deleted. Raises OSError.
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
        with contextlib.suppress(FileNotFoundError):  # before it was locked it looked like a dead writer's, and was deleted
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


def remove_leftovers(folder: Path) -> list[str]:
    """Deletes the temporary files and folders of dead writers in `folder`, and returns their names. Those of living writers are locked, and
    stay."""
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


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    size: int  # bytes


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Sequence[Tensor]], meta: Mapping[str, str]) -> str:
    """Writes a safetensors file atomically and returns its digest, which stands in the file's metadata under "xxh3".

    A list of tensors is written as what `torch.cat` would make of it, without making it: mapped parts need no memory.

    The digest is xxh3-128 of the whole file with the 32 digits of the digest itself read as zeros, so it covers names, shapes, metadata and
    values. The bytes depend on the arguments alone. Errors as `write_atomic`.
    """
    arrays = {name: [_plain(t) for t in ([value] if isinstance(value, Tensor) else value)] for name, value in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {**meta, "xxh3": _NO_DIGEST}}
    order = sorted(arrays, key=lambda name: (-arrays[name][0].element_size(), name))  # keeps every tensor aligned to its element
    offset = 0
    for name in order:
        parts = arrays[name]
        end = offset + sum(part.numel() for part in parts) * parts[0].element_size()
        shape = [sum(len(part) for part in parts), *parts[0].shape[1:]] if parts[0].ndim else []
        header[name] = {"dtype": _DTYPE_NAMES[parts[0].dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = canonical_json(header)
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little") + text
    payload = [part.reshape(-1).view(torch.uint8).numpy().data for name in order for part in arrays[name] if part.numel()]
    hasher = xxhash.xxh3_128(head)
    for view in payload:
        hasher.update(view)
    digest = hasher.hexdigest()
    _write_buffers(Path(path), [_put_digest(head, _NO_DIGEST, digest, Path(path)), *payload])
    return digest


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _put_digest(head: bytes, old: str, new: str, path: Path) -> bytes:
    field = b'"xxh3":"%s"' % old.encode()
    if head.count(field) != 1:
        raise _damaged("the digest field of the header is damaged", path)
    return head.replace(field, b'"xxh3":"%s"' % new.encode())


def read_tensors(path: Path, *, verify: bool = True, expect: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, mapped from disk (private pages: writing to one changes no file).

    `verify` hashes the file first; `expect` holds metadata that must be there. Raises IntegrityError naming the file and its fault.
    """
    with TensorFile(path) as file:
        if verify:
            file.verify()
        file.expect(expect or {})
        return {name: file.tensor(name) for name in file.entries}


class TensorFile:
    """An open safetensors file with a checked header: `meta`, `entries` (name -> dtype, shape, place), `digest` as the header states it.

    Raises IntegrityError when the file is missing, a link, not a regular file, cut short or padded, or when its header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._fd = _open_plain(self.path)
        try:
            self._read_header()
        except GradsiftError:
            self.close()
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.close()
            raise _damaged("its header is damaged", self.path) from error
        except OSError as error:
            self.close()
            raise ResourceError(f"cannot be read: {error.strerror}", where=self.path) from error

    def _read_header(self) -> None:
        self.size = os.fstat(self._fd).st_size
        prefix = os.pread(self._fd, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + length > self.size:
            raise _damaged(f"is cut short or not a tensor file ({self.size:,} bytes)", self.path)
        if length > 100_000_000:
            raise _damaged("its header is damaged", self.path)
        self._head = prefix + os.pread(self._fd, length, 8)
        header = json.loads(self._head[8:])
        self.meta: dict[str, str] = header.pop("__metadata__", {})
        self.digest: str | None = self.meta.get("xxh3")
        self.entries: dict[str, _Entry] = {}
        end = 8 + length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            if 8 + length + start != end or stop - start != math.prod(shape) * dtype.itemsize:
                raise _damaged(f"its header is damaged at {name!r}", self.path)
            self.entries[name] = _Entry(dtype, shape, end, stop - start)
            end += stop - start
        if end != self.size:
            raise _damaged(f"has {self.size:,} bytes where its header says {end:,}", self.path)

    def expect(self, meta: Mapping[str, str]) -> None:
        """Raises IntegrityError naming the first metadata field that is not as expected."""
        for key, value in meta.items():
            if self.meta.get(key) != value:
                raise _damaged(f"its {key} is {self.meta.get(key)!r}, expected {value!r}", self.path)

    def verify(self) -> None:
        """Hashes the file (about memory speed when cached). Raises IntegrityError when the bytes are not those that were written."""
        if self.digest is None:
            raise _damaged("holds no digest", self.path)
        hasher = xxhash.xxh3_128(_put_digest(self._head, self.digest, _NO_DIGEST, self.path))
        for chunk in _chunks(self._fd, len(self._head), self.path):
            hasher.update(chunk)
        found = hasher.hexdigest()
        if found != self.digest:
            raise _damaged(f"its bytes are not what was written (digest {found}, written {self.digest})", self.path)

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor (default: all), mapped, not copied. Each call maps anew: writing to it changes nothing else."""
        dtype, shape, place, size = self.entries[name]
        if shape and (start or stop is not None):
            stop = shape[0] if stop is None else stop
            each = size // shape[0] if shape[0] else 0
            place, size, shape = place + start * each, (stop - start) * each, (stop - start, *shape[1:])
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        if os.fstat(self._fd).st_size != self.size:  # reading a map beyond the end of its file kills the process
            raise _damaged("was cut short or grew while it was open", self.path)
        skip = place % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(self._fd, skip + size, access=mmap.ACCESS_COPY, offset=place - skip)
        return torch.frombuffer(pages, dtype=dtype, count=size // dtype.itemsize, offset=skip).reshape(shape)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.close()


def _open_plain(path: Path) -> int:
    """A descriptor of a regular file that is not a link. O_NONBLOCK: a FIFO must not hang the open."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        what = {errno.ENOENT: "is missing", errno.ELOOP: _LINK}.get(error.errno or 0)
        if what is None:
            raise ResourceError(f"cannot be read: {error.strerror}", where=path) from error
        raise _damaged(what, path) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _damaged("is not a regular file", path)
    return fd


def file_chunks(path: Path) -> Iterator[memoryview]:
    """The bytes of a plain file, in pieces that are overwritten by the next. Raises IntegrityError (missing, a link), ResourceError."""
    fd = _open_plain(path)
    try:
        yield from _chunks(fd, 0, path)
    finally:
        os.close(fd)


def _chunks(fd: int, offset: int, path: Path) -> Iterator[memoryview]:
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
