"""Which files hold the rows of a folder or of a pattern, and of a folder that `datasets` saved."""

from __future__ import annotations

import glob
import json
import os
import re
from pathlib import Path
from typing import Any

from gradsift.errors import DataError, UnknownName, UserError

# kinds of files in a folder that are read as its rows; .json is as often a description
_ROWS = (".parquet", ".jsonl", ".ndjson", ".arrow", ".csv", ".tsv")
_PACKED = (".gz", ".zst", ".zstd")
_SPLIT = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?:[-_./]|$)")


def is_pattern(name: str) -> bool:
    """Whether a name is a pattern such as `data/*.parquet`, and not that of a file."""
    return glob.has_magic(name) and not os.path.lexists(name)


def is_saved(path: Path) -> bool:
    """Whether `datasets` saved a folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def matching(pattern: str) -> list[Path]:
    """The files that a pattern names, sorted. Raises UserError where there are none, or where one
    is a folder.
    """
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    files = [path for path in found if path.is_file()]
    if not files:
        what = "names folders alone" if found else "names no file"
        raise UserError(
            f"the pattern {what}", where=pattern, remedy="Correct it, and keep it in quotes."
        )
    return files


def _is_run(place: str, name: str) -> bool:
    """Whether a folder is one that `--run` named: what was chosen is no pool."""
    return os.path.isfile(os.path.join(place, name, "run.json"))


def folder_files(path: Path) -> list[Path]:
    """The files of a folder and the folders in it that hold rows, sorted: all of one kind.

    Raises:
        UserError: there are none, there are several kinds, or files of several splits.
    """
    files: dict[str, list[Path]] = {}
    for place, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name[0] not in "._" and not _is_run(place, name)]
        for name in names:
            file = Path(place, name)
            kinds = [suffix.lower() for suffix in file.suffixes]
            kind = kinds[-2] if len(kinds) > 1 and kinds[-1] in _PACKED else (kinds or [""])[-1]
            if kind in _ROWS and name[0] not in "._" and file.is_file():
                files.setdefault(kind, []).append(file)
    if not files:
        raise UserError(
            "is a folder, but not one that `datasets` saved, and no file in it holds rows",
            where=path,
            remedy=f"It may hold {', '.join(_ROWS)} files; name a .json file itself.",
        )
    if len(files) > 1:
        raise UserError(
            f"is a folder with files of several kinds ({', '.join(sorted(files))})",
            where=path,
            remedy=f"Name one of them, such as '{path}/**/*{min(files)}'.",
        )
    found = sorted(next(iter(files.values())))
    splits = {
        match[1]
        for file in found
        if (match := _SPLIT.search(file.relative_to(path).with_suffix("").as_posix()))
    }
    if len(splits) > 1:
        raise UserError(
            f"is a folder with files of several splits ({', '.join(sorted(splits))})",
            where=path,
            remedy=f"Name one of them, such as '{path}/**/*{min(splits)}*'.",
        )
    return found


def saved_files(path: Path, split: str = "") -> tuple[Path, list[Path]]:
    """The Arrow files of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Args:
        path: the folder.
        split: which of several splits; "" = train, or the only one.

    Returns:
        The folder of the split that is read, and its files in order.

    Raises:
        UserError: it is another kind of folder, holds several splits and no train, or a view.
        DataError: what describes its files is damaged.
    """
    if (path / "dataset_dict.json").is_file():
        names = _names(
            path / "dataset_dict.json", _described(path / "dataset_dict.json").get("splits")
        )
        if split and split not in names:
            raise UnknownName("split", split, names, where=path)
        if not split and "train" not in names and len(names) != 1:
            raise UserError(
                f"holds the splits {', '.join(names)}",
                where=path,
                remedy=f"Name one, such as {path / names[0]}.",
            )
        path = path / (split or ("train" if "train" in names else names[0]))
    elif split:
        raise UserError("holds no splits", where=path, remedy="Leave out the name in brackets.")
    state = path / "state.json"
    if not state.is_file():
        raise UserError(
            "is a folder, but not one that `datasets` saved",
            where=path,
            remedy="Name the files in it.",
        )
    described = _described(state)
    if described.get("_indices_data_files"):
        raise UserError(
            "holds a shuffled or filtered view",
            where=path,
            remedy="Call flatten_indices() before save_to_disk().",
        )
    files = described.get("_data_files")
    names = _names(
        state,
        (
            [file.get("filename") if isinstance(file, dict) else None for file in files]
            if isinstance(files, list)
            else None
        ),
    )
    return path, [path / name for name in names]


def _described(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(
            "is damaged: it holds no JSON object", where=path, remedy="Save the data set again."
        )
    return found


def _names(path: Path, names: Any) -> list[str]:
    """The names of files or folders beside `path` that it lists. Raises DataError for what is none,
    and for one that leads elsewhere.
    """
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(
            "is damaged: it does not list its parts", where=path, remedy="Save the data set again."
        )
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise DataError(
                f"the name {name!r} in it points outside its folder",
                where=path,
                remedy="Save the data set again.",
            )
    return names
