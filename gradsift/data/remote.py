"""Files that lie elsewhere: s3://, gs://, memory:// and whatever else fsspec knows. Fetched to a
local cache to be read, written whole.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import xxhash

from gradsift.errors import ResourceError, UserError
from gradsift.store.atomic import (
    make_folder,
    remove_leftovers,
    replacing,
    require_space,
    resource_error,
)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# What storages call the state of a file. One that tells none of these is asked for its bytes each
# time.
_STATES = (
    *("ETag", "etag", "md5", "md5Hash", "content_md5", "generation", "version_id", "VersionId"),
    *("LastModified", "last_modified", "mtime", "created"),
)


def is_url(name: str) -> bool:
    return _URL.match(name) is not None


def place_of(name: str) -> str | Path:
    """Where a path or URL leads: the same for two names of one file on this machine's disk.
    Elsewhere the URL itself.
    """
    if not is_url(name):
        return Path(name).resolve()
    scheme, _, path = name.partition("://")
    return Path(path).resolve() if scheme.lower() in ("file", "local") else name


def fetched(url: str, cache: Path | None = None) -> Path:
    """A local copy of one file, made anew only when the storage says that the file has changed; of
    a file:// URL the file itself.

    Copies lie in `cache` (default: `cache_folder()` / "remote") by URL and state; deleting them is
    safe while nothing runs. Raises UserError (no such file, an unknown kind of URL, a missing
    package for it), DiskFull, ResourceError (the storage does not answer).
    """
    from gradsift.compute.machine import cache_folder

    system, path = _system(url)
    if _is_local(system):
        return Path(path)
    try:
        about = system.info(path)
    except FileNotFoundError:
        raise UserError(
            "there is no such file",
            where=url,
            remedy="Check the URL, and that its storage lets you read it.",
        ) from None
    except Exception as error:  # every storage has errors of its own
        raise _refusal(url, error) from error
    if about.get("type") == "directory":
        raise UserError("is a folder", where=url, remedy="Name its files, one --pool each.")
    state = repr(sorted((key, str(about[key])) for key in {*_STATES, "size"} & about.keys()))
    known = any(key in about for key in _STATES)
    folder = (cache or cache_folder() / "remote") / xxhash.xxh3_128_hexdigest(
        f"{url}\0{state}".encode()
    )
    target = folder / (url.partition("?")[0].rstrip("/").rsplit("/", 1)[-1] or "file")
    if known and target.is_file():
        return target
    make_folder(folder)
    for other in folder.parent.iterdir():
        # a copy that was cut off may be of a state that the file has no more
        _tidy(other)
    require_space(folder, int(about.get("size") or 0))
    try:
        with system.open(path, "rb") as source:
            _copied(source, target, int(about.get("size") or 0))
    except ResourceError:
        raise
    except Exception as error:
        raise _refusal(url, error, target, int(about.get("size") or 0)) from error
    return target


def sent(file: Path, url: str) -> None:
    """Copies a local file to `url`. On a local disk it is seen when it is whole, elsewhere as the
    storage's own upload has it. Raises as `fetched`.
    """
    system, path = _system(url)
    try:
        if _is_local(system):
            make_folder(Path(path).absolute().parent)
            _tidy(Path(path).absolute().parent)
            with open(file, "rb") as source:
                _copied(source, Path(path).absolute(), file.stat().st_size)
        else:
            system.put_file(str(file), path)
    except ResourceError:
        raise
    except Exception as error:
        raise _refusal(
            url, error, Path(path) if _is_local(system) else None, file.stat().st_size
        ) from error


def _copied(source: Any, target: Path, size: int) -> None:
    """The bytes of an open file as `target`, all of them or, where it fails, what was there
    before.
    """
    with replacing(target, size) as copy:
        while chunk := _read(source):
            copy.write(chunk)


def _read(source: Any) -> bytes:
    try:
        return source.read(1 << 22)
    except OSError as error:
        raise _Unread from error


class _Unread(Exception):
    """The storage, not the disk, has failed; its cause is the error."""


def _tidy(folder: Path) -> None:
    with contextlib.suppress(OSError):
        remove_leftovers(folder)


def _system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"this kind of URL needs another package ({error})",
            where=url,
            remedy="Install what it names.",
        ) from error
    except ValueError as error:
        raise UserError(
            f"no storage of this kind is known ({error})",
            where=url,
            remedy="Known kinds: fsspec's, such as s3:// or gs://.",
        ) from None


def _is_local(system: Any) -> bool:
    return "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))


def _refusal(url: str, error: Exception, copy: Path | None = None, size: int = 0) -> ResourceError:
    """`copy`, `size`: the file on this machine that was being written, and how large it was to
    be.
    """
    if isinstance(error, _Unread) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    elif (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, FileNotFoundError | PermissionError)
    ):
        return resource_error(error, copy or Path(url), size)
    said = " ".join(str(error).split())[:200]
    return ResourceError(
        f"the storage refused ({type(error).__name__}: {said})",
        where=url,
        remedy="Check the credentials and the network.",
    )
