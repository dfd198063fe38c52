"""Which files hold the rows of a folder that `datasets` saved."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gradsift.errors import DataError, UserError

if TYPE_CHECKING:
    from pathlib import Path


def saved_files(path: Path) -> tuple[Path, list[Path]]:
    """The Arrow files of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Returns:
        The folder of the split that is read (train, or the only one), and its files in order.

    Raises:
        UserError: it is another kind of folder, holds several splits and no train, or a view.
        DataError: what describes its files is damaged.
    """
    if (path / "dataset_dict.json").is_file():
        names = _names(
            path / "dataset_dict.json", _described(path / "dataset_dict.json").get("splits")
        )
        if "train" not in names and len(names) != 1:
            raise UserError(
                f"holds the splits {', '.join(names)}",
                where=path,
                remedy=f"Name one, such as {path / names[0]}.",
            )
        path = path / ("train" if "train" in names else names[0])
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
