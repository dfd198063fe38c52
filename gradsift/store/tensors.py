"""Tensor files that verify themselves, and hashes of files and folders."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from gradsift.errors import GradsiftError, IntegrityError, ResourceError
from gradsift.store.atomic import chunks_from, damaged, file_chunks, open_plain, write_buffers
from gradsift.store.canonical import canonical_json, recipe_digest

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def file_hash(path: Path) -> str:
    """xxh3-128 hex of a file; of one that carries its own digest, that digest, after checking it.
    Raises IntegrityError, ResourceError.
    """
    if path.suffix == ".safetensors":
        try:
            file = TensorFile(path)
        except IntegrityError:
            # not a file of ours, or a damaged one: then the plain hash below is not the one in the
            # manifest
            return _hash_bytes(path)
        with file:
            if file.digest is not None:
                file.verify()
                return file.digest
    return _hash_bytes(path)


def _hash_bytes(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    for chunk in file_chunks(path):
        hasher.update(chunk)
    return hasher.hexdigest()


def folder_hash(folder: Path) -> str:
    """One digest of every file below a folder of the user's, which may hold links (a hub cache
    does).
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return recipe_digest(
        {path.relative_to(folder).as_posix(): file_hash(path.resolve()) for path in files}
    )


_NO_DIGEST = "0" * 32


# Number formats of the file and the bytes of a number: a header is read, and a file hashed, without
# torch.
_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@functools.cache
def _dtypes() -> dict[str, torch.dtype]:
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }


class _Entry(NamedTuple):
    kind: str  # a key of _SIZES
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    size: int  # bytes

    @property
    def dtype(self) -> torch.dtype:
        return _dtypes()[self.kind]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | Sequence[Tensor]], meta: Mapping[str, str]
) -> str:
    """Writes a safetensors file atomically and returns its digest, which stands in the file's
    metadata under "xxh3".

    A list of tensors is written as what `torch.cat` would make of it, without making it: mapped
    parts need no memory.

    The digest is xxh3-128 of the whole file with the 32 digits of the digest itself read as zeros,
    so it covers names, shapes, metadata and values. The bytes depend on the arguments alone. Errors
    as `write_atomic`.
    """
    import torch

    kinds = {dtype: kind for kind, dtype in _dtypes().items()}
    arrays = {
        name: [_plain(t) for t in ([value] if isinstance(value, torch.Tensor) else value)]
        for name, value in tensors.items()
    }
    header: dict[str, Any] = {"__metadata__": {**meta, "xxh3": _NO_DIGEST}}
    # keeps every tensor aligned to its element
    order = sorted(arrays, key=lambda name: (-arrays[name][0].element_size(), name))
    offset = 0
    for name in order:
        parts = arrays[name]
        end = offset + sum(part.numel() for part in parts) * parts[0].element_size()
        shape = [sum(len(part) for part in parts), *parts[0].shape[1:]] if parts[0].ndim else []
        header[name] = {
            "dtype": kinds[parts[0].dtype],
            "shape": shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = canonical_json(header)
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little") + text
    payload = [
        part.reshape(-1).view(torch.uint8).numpy().data
        for name in order
        for part in arrays[name]
        if part.numel()
    ]
    hasher = xxhash.xxh3_128(head)
    for view in payload:
        hasher.update(view)
    digest = hasher.hexdigest()
    write_buffers(Path(path), [_put_digest(head, _NO_DIGEST, digest, Path(path)), *payload])
    return digest


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _put_digest(head: bytes, old: str, new: str, path: Path) -> bytes:
    field = b'"xxh3":"%s"' % old.encode()
    if head.count(field) != 1:
        raise damaged("the digest field of the header is damaged", path)
    return head.replace(field, b'"xxh3":"%s"' % new.encode())


def read_tensors(
    path: Path, *, verify: bool = True, expect: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """The tensors of a file, mapped from disk (private pages: writing to one changes no file).

    `verify` hashes the file first; `expect` holds metadata that must be there. Raises
    IntegrityError naming the file and its fault.
    """
    with TensorFile(path) as file:
        if verify:
            file.verify()
        file.expect(expect or {})
        return {name: file.tensor(name) for name in file.entries}


class TensorFile:
    """An open safetensors file with a checked header: `meta`, `entries` (name -> dtype, shape,
    place), `digest` as the header states it.

    Raises IntegrityError when the file is missing, a link, not a regular file, cut short or padded,
    or when its header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._fd = open_plain(self.path)
        try:
            self._read_header()
        except GradsiftError:
            self.close()
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self.close()
            raise damaged("its header is damaged", self.path) from error
        except OSError as error:
            self.close()
            raise ResourceError(f"cannot be read: {error.strerror}", where=self.path) from error

    def _read_header(self) -> None:
        self.size = os.fstat(self._fd).st_size
        prefix = os.pread(self._fd, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + length > self.size:
            raise damaged(f"is cut short or not a tensor file ({self.size:,} bytes)", self.path)
        if length > 100_000_000:
            raise damaged("its header is damaged", self.path)
        self._head = prefix + os.pread(self._fd, length, 8)
        header = json.loads(self._head[8:])
        self.meta: dict[str, str] = header.pop("__metadata__", {})
        self.digest: str | None = self.meta.get("xxh3")
        self.entries: dict[str, _Entry] = {}
        end = 8 + length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            kind, shape = entry["dtype"], tuple(entry["shape"])
            if 8 + length + start != end or stop - start != math.prod(shape) * _SIZES[kind]:
                raise damaged(f"its header is damaged at {name!r}", self.path)
            self.entries[name] = _Entry(kind, shape, end, stop - start)
            end += stop - start
        if end != self.size:
            raise damaged(f"has {self.size:,} bytes where its header says {end:,}", self.path)

    def expect(self, meta: Mapping[str, str]) -> None:
        """Raises IntegrityError naming the first metadata field that is not as expected."""
        for key, value in meta.items():
            if self.meta.get(key) != value:
                raise damaged(f"its {key} is {self.meta.get(key)!r}, expected {value!r}", self.path)

    def verify(self) -> None:
        """Hashes the file (about memory speed when cached). Raises IntegrityError when the bytes
        are not those that were written.
        """
        if self.digest is None:
            raise damaged("holds no digest", self.path)
        hasher = xxhash.xxh3_128(_put_digest(self._head, self.digest, _NO_DIGEST, self.path))
        for chunk in chunks_from(self._fd, len(self._head), self.path):
            hasher.update(chunk)
        found = hasher.hexdigest()
        if found != self.digest:
            raise damaged(
                f"its bytes are not what was written (digest {found}, written {self.digest})",
                self.path,
            )

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor (default: all), mapped, not copied. Each call maps anew:
        writing to it changes nothing else.
        """
        import torch

        entry = self.entries[name]
        dtype, shape, place, size = entry.dtype, entry.shape, entry.start, entry.size
        if shape and (start or stop is not None):
            stop = shape[0] if stop is None else stop
            each = size // shape[0] if shape[0] else 0
            place, size, shape = (
                place + start * each,
                (stop - start) * each,
                (stop - start, *shape[1:]),
            )
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        if os.fstat(self._fd).st_size != self.size:
            # reading a map beyond the end of its file kills the process
            raise damaged("was cut short or grew while it was open", self.path)
        skip = place % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(self._fd, skip + size, access=mmap.ACCESS_COPY, offset=place - skip)
        return torch.frombuffer(
            pages, dtype=dtype, count=size // dtype.itemsize, offset=skip
        ).reshape(shape)

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
