"""What a finished job hands over: a file of its artifact, checked, and copied to where `--out` says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradsift.data.pool import split_name
from gradsift.data.remote import is_url, place_of, sent
from gradsift.data.write import copy_file
from gradsift.errors import IntegrityError, UserError
from gradsift.store.artifact import REPAIR, Artifact, file_hash
from gradsift.store.atomic import make_folder


def check_out(out: str | Path | None, inputs: Sequence[str | Path]) -> None:
    """Raises UserError when `out` would overwrite a file of `inputs`, given as [NAME=]FILE."""
    if out is not None and any(place_of(str(out)) == place_of(split_name(file)[1]) for file in inputs):
        raise UserError("--out names an input file", where=out, remedy="Choose another name for what is written.")


def deliver(artifact: Artifact, name: str, out: str | Path | None) -> Path:
    """The file `name` of a complete artifact; with `out` a copy there, whose path is returned unless it is a URL.

    Raises IntegrityError when the file is not the one that was written; DiskFull, ResourceError, UserError for a URL that leads nowhere.
    """
    path = artifact.file(name)
    if file_hash(path) != artifact.manifest["files"][name]:
        raise IntegrityError("is not the file that the manifest names", where=path, remedy=REPAIR)
    if out is not None and is_url(str(out)):
        sent(path, str(out))
    elif out is not None:
        make_folder(Path(out).absolute().parent)
        copy_file(path, Path(out))
        path = Path(out)
    return path
