"""The sources of a pool as they are named: `[NAME=]FILE` or hf:NAME, and what is wrong with them
before a row is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gradsift.data.files import SUFFIXES, Text, check_source
from gradsift.data.formats import FIELD_NAMES, FORMATS
from gradsift.data.remote import is_url
from gradsift.errors import UnknownName, UserError


def split_name(source: str | Path) -> tuple[str | None, str]:
    """`[NAME=]FILE` -> (NAME, FILE). A file whose own name has an equals sign wins."""
    text = str(source)
    name, equals, file = text.partition("=")
    if (
        isinstance(source, Path)
        or not equals
        or not name
        or "/" in name
        or name.startswith("hf:")
        or is_url(text)
        or Path(text).exists()
    ):
        return None, text
    return name, file


def default_name(file: str) -> str:
    """The file's name without the suffixes of containers: its group."""
    if file.startswith("hf:"):
        return file[3:].split("@")[0].rstrip("/").rsplit("/", 1)[-1]
    path = Path(file.partition("?")[0] if is_url(file) else file)
    while path.suffix.lower() in SUFFIXES and path.stem:
        path = path.with_suffix("")
    return path.name or str(path)


def check_pool(
    sources: Sequence[str | Path],
    *,
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
) -> list[Text | None]:
    """Raises what `read_pool` raises before it reads a row, without unpacking or fetching anything.

    Returns:
        For each source its text where it is a plain one, else None.
    """
    check_names(sources, format, mapping)
    return [check_source(split_name(source)[1]) for source in sources]


def check_names(
    sources: Sequence[str | Path], format: str, mapping: Mapping[str, str] | None
) -> None:
    """Raises UserError for no source, UnknownName for a format or a field of the mapping that there
    is not.
    """
    if not sources:
        raise UserError("no pool file was named", remedy="Name at least one file.")
    if format != "auto" and format not in FORMATS:
        raise UnknownName("format", format, [*FORMATS, "auto"])
    for ours in mapping or {}:
        if ours not in (*FIELD_NAMES, "id", "group"):
            raise UnknownName("field of the mapping", ours, (*FIELD_NAMES, "id", "group"))
