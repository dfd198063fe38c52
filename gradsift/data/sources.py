"""The sources of a pool as they are named: `[NAME=]FILE`, a folder, a pattern or hf:NAME, and what
is wrong with them before a row is read.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradsift.data.files import SUFFIXES, Text, check_source
from gradsift.data.folders import folder_files, is_pattern, is_saved, matching
from gradsift.data.formats import FAULTS, FIELD_NAMES, FORMATS, Fields, RowFault, detect, settle
from gradsift.data.marks.preference import approved, preference
from gradsift.data.remote import is_url
from gradsift.errors import DataError, UnknownName, UserError

VOTERS = 1000  # rows of a file that decide its format
LOOKED_AT = 16 << 20  # bytes of a text whose format is looked for before it is read
SCANNED = 64 << 20  # bytes of texts that are searched for the name of a field before they are read


class Source(NamedTuple):
    """A file to read, and the group of its rows."""

    group: str
    file: str


def expanded(sources: Sequence[str | Path]) -> list[Source]:
    """The files behind the names of sources: those of a folder or a pattern are one group.

    Raises:
        UserError: a pattern names no file, or a folder none that could be read.
    """
    found = []
    for source in sources:
        name, file = split_name(source)
        group = name or default_name(file)
        if file.startswith("hf:") or is_url(file):
            found.append(Source(group, file))
        elif is_pattern(file):
            found += [Source(group, str(path)) for path in matching(file)]
        elif os.path.isdir(path := Path(file)) and not is_saved(path):
            found += [Source(group, str(inside)) for inside in folder_files(path)]
        else:
            found.append(Source(group, file))
    return found


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
        or os.path.exists(text)
    ):
        return None, text
    return name, file


def default_name(file: str) -> str:
    """The group of a source without a name: the file's name without the suffixes of containers; of
    a pattern what stands before its first wildcard, or the folder.
    """
    if file.startswith("hf:"):
        return re.sub(r"\[.*\]$", "", file[3:]).split("@")[0].rstrip("/").rsplit("/", 1)[-1]
    path = Path(file.partition("?")[0] if is_url(file) else file)
    if not is_url(file) and is_pattern(file):
        parts = [part for part in path.parts if not re.search(r"[*?[]", part)]
        stem = re.split(r"[*?[]", path.name)[0].rstrip("-_.")
        return stem or (parts[-1] if parts and parts[-1] not in ("/", ".", "..") else "pool")
    while path.suffix.lower() in SUFFIXES and path.stem:
        path = path.with_suffix("")
    return path.name or path.resolve().name


def holds(file: str, path: Path) -> bool:
    """Whether a folder or pattern that is read holds a path, be there a file or not."""
    if file.startswith("hf:") or is_url(file):
        return False
    if is_pattern(file):
        return fnmatch.fnmatch(str(path.resolve()), str(Path(file).resolve()))
    folder = Path(file)
    if not os.path.isdir(folder) or is_saved(folder):
        return False
    return path.resolve().is_relative_to(folder.resolve())


def check_pool(
    sources: Sequence[str | Path],
    *,
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    group_field: str | None = None,
    inherited: Collection[str] = (),
) -> list[Text | None]:
    """Raises what `read_pool` raises before it reads a row, without unpacking or fetching anything;
    of plain texts also that no format fits, or that no row has a field that was named.

    Returns:
        For each file its text where it is a plain one, else None.
    """
    named = expanded(sources)
    check_names(named, format, mapping, files, inherited)
    texts = [check_source(source.file) for source in named]
    heads = []
    for source, text in zip(named, texts, strict=True):
        if text is not None:
            records, whole = _head(text)
            heads += records
            if whole:
                asked = choice(source.group, format, mapping, files)
                settled(text.name, records, *asked, inherited)
    plain = [text for text in texts if text is not None]
    if len(plain) == len(texts) and sum(map(len, plain)) <= SCANNED:
        wanted = {} if group_field is None else {group_field: "to group by"}
        if "mapping" not in inherited:
            wanted |= {theirs: f"for {ours!r}" for ours, theirs in (mapping or {}).items()}
        for field, why in wanted.items():
            if field.isascii() and not any(_mentions(text, field) for text in plain):
                error = absent(field, why, heads)
                # a group that looks like no field at all is told when the rows are read
                if field != group_field or "Did you mean" in (error.remedy or ""):
                    raise error
    return texts


def choice(
    group: str,
    format: str,
    mapping: Mapping[str, str] | None,
    files: Mapping[str, Mapping[str, Any]] | None,
) -> tuple[str, Mapping[str, str] | None]:
    """(format, mapping) that are asked for the files of one group: its own before the common
    ones.
    """
    own = (files or {}).get(group, {})
    return own.get("format") or format, {**(mapping or {}), **(own.get("mapping") or {})}


def _head(text: Text) -> tuple[list[dict[str, Any]], bool]:
    """The first records of a text, and whether they are those that vote on its format."""
    records: list[dict[str, Any]] = []
    for place in itertools.islice(text.rows(), VOTERS):
        if place.start > LOOKED_AT:
            return records, False
        try:
            if place.data is not None:
                records.append(text.parse(place.data))
        except RowFault:
            continue
    return records, True


def _mentions(text: Text, field: str) -> bool:
    """Whether a row of the text may have the field."""
    if text.kind not in ("lines", "array"):
        return field in getattr(text, "columns", ())
    return any(f'"{field}"'.encode() in chunk for chunk in _overlapping(text, len(field) + 2))


def _overlapping(text: Text, length: int) -> Iterator[bytes]:
    """The bytes of a text in pieces, each with the last `length` bytes of the one before."""
    for at in range(0, len(text), 1 << 22):
        yield text.read(max(0, at - length), min(at + (1 << 22), len(text)))


def check_names(
    sources: Sequence[Source],
    format: str,
    mapping: Mapping[str, str] | None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    inherited: Collection[str] = (),
) -> None:
    """Raises UserError for no source, UnknownName for a format, a field of the mapping or a group
    that there is not.
    """
    if not sources:
        raise UserError("no pool file was named", remedy="Name at least one file.")
    groups = {source.group for source in sources}
    for name in files or {}:
        if name not in groups and "files" not in inherited:
            raise UnknownName("source", name, groups)
    for asked in (format, *[own.get("format") or "auto" for own in (files or {}).values()]):
        if asked != "auto" and asked not in FORMATS:
            raise UnknownName("format", asked, [*FORMATS, "auto"])
    known = (*FIELD_NAMES, "id", "group")
    for named in (mapping or {}, *[own.get("mapping") or {} for own in (files or {}).values()]):
        for ours in named:
            if ours not in known:
                raise UnknownName("field of the mapping", ours, known)


def settled(
    name: str,
    records: list[dict[str, Any]],
    format: str,
    mapping: Mapping[str, str] | None,
    inherited: Collection[str] = (),
) -> tuple[str, Fields]:
    """Format and fields of the file `name` by its first records; see `formats.settle`.

    Raises:
        DataError: no known format fits, or all are preference rows.
    """
    if len(records) == 1 and (remedy := _turned(records[0])):
        raise DataError("is one object around its rows", where=name, remedy=remedy)
    winner, fields = settle(records, format, mapping, inherited)
    judged = [text for record in records if (text := preference(record, fields.named))]
    if judged and len(judged) < len(records):
        named = fields.named
        judged = [t for r in records if (t := preference(r, named) or approved(r, named))]
    alone = len(judged) == len(records) or (winner is None and 2 * len(judged) > len(records))
    if (winner is not None and not (judged and alone)) or not records:
        return winner or "messages", fields
    if alone:
        raise DataError(
            f"holds preference rows, not rows with one answer: {judged[0]}",
            where=name,
            remedy=FAULTS["preference"],
        )
    seen = Counter(str(key) for record in records for key in record)
    names = ", ".join(repr(key[:60]) for key, _ in seen.most_common(8)) or "none"
    raise DataError(
        f"no known format fits its fields: {names}", where=name, remedy=_remedy(records, seen)
    )


def _turned(record: dict[str, Any]) -> str | None:
    """What to do about the only record of a file where the rows stand inside it: below a key, as
    the values of their ids, or column by column.
    """
    values = list(record.values())
    for key, value in record.items():
        inside = value[0] if isinstance(value, list) and value else None
        if isinstance(inside, dict) and not detect(record, Fields()) and detect(inside, Fields()):
            return f"Write the list below its key {key!r} alone."
    if len(values) > 1 and all(isinstance(value, dict) for value in values):
        if detect(values[0], Fields()):
            return "Write its values alone, one row a line."
        if len({tuple(value) for value in values}) == 1 and len(values[0]) > 1:
            return "It holds columns: write it with orient='records' and lines=True."
    if (
        len(values) > 1
        and all(isinstance(value, list) and len(value) > 1 for value in values)
        and len({len(value) for value in values}) == 1
        and not any(isinstance(item, (dict, list, int)) for value in values for item in value)
    ):
        return "It holds columns: write it with orient='records' and lines=True."
    return None


# names that others give to a question and to its answer
_ASKED = ("question", "query", "prompt", "instruction", "input", "inputs", "problem", "user")
_SAID = ("answer", "response", "output", "outputs", "completion", "solution", "target", "targets")


def _remedy(records: list[dict[str, Any]], seen: Counter[str]) -> str:
    """What to do about rows that no format fits."""
    if "input_ids" in seen:
        return (
            "Add `labels`: the tokens that are learned, and -100 for the others; or a"
            " `completion_mask`."
        )
    asked, said = (next((n for n in names if n in seen), None) for names in (_ASKED, _SAID))
    example = f"instruction={asked or 'question'},output={said or 'answer'}"
    known = "; ".join(f"{name} ({', '.join(required)})" for name, (required, _) in FORMATS.items())
    return (
        f"Name your fields by a mapping: --map {example} (of a target: --target-map; in a TOML file"
        f" the key `mapping` of [pool] or [target]). Formats: {known}."
    )


def absent(field: str, why: str, records: list[dict[str, Any]] | Counter[str]) -> UserError:
    """The error for a field that was named and that no row has."""
    names = (
        records
        if isinstance(records, Counter)
        else Counter(str(key) for record in records for key in record)
    )
    near = difflib.get_close_matches(field, list(names), n=1, cutoff=0.5)
    shown = ", ".join(repr(name[:60]) for name, _ in names.most_common(8)) or "none"
    return UserError(
        f"no row has the field {field!r} {why}",
        remedy=f"Did you mean {near[0]!r}?" if near else f"The rows have: {shown}.",
    )
