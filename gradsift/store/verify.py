"""Checking what a run holds, file by file: what is wrong, where, and whether a run can make it
anew.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from gradsift.errors import GradsiftError, IntegrityError, MismatchError
from gradsift.store.artifact import MANIFEST, RECIPE, STATS, SUMS, Artifact, recipe_file
from gradsift.store.atomic import inside, read_json
from gradsift.store.canonical import seal_fault
from gradsift.store.tensors import TensorFile, file_hash

BY_NAME = "Give the folder its name back, or delete it."


@dataclass(frozen=True)
class Problem:
    """Something wrong in a run: `artifact` is the folder's name ("": the run's own), `file` the
    name within it ("": the folder itself), `what` the fault. `remedy`: what the user has to do,
    where no run can make it anew; else empty.
    """

    artifact: str
    file: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        text = (
            f"{self.artifact}/{self.file} {self.what}"
            if self.artifact
            else f"{self.file} {self.what}"
        )
        return f"{text}. {self.remedy}" if self.remedy else text


def own_fault(path: Path, known: Collection[str]) -> str | None:
    """What is wrong with a JSON file of the run itself, which has no keys but the `known` and its
    seal; older ones have none.
    """
    try:
        found = read_json(path)
    except GradsiftError as error:
        return error.what
    if found is None:
        return "is damaged"
    if strange := sorted(found.keys() - {*known, "seal"}):
        return f"is damaged, or was edited: it has a field {strange[0]!r}"
    return seal_fault(found)


def check_folder(folder: Path, only: Collection[str] | None = None) -> list[Problem]:
    """What is wrong in an artifact's folder. `only`: hash no more than these of a complete one's
    files.
    """
    try:
        artifact = Artifact.load(folder)
    except GradsiftError as error:
        place = Path(error.where or folder)
        file = place.name if place.parent == folder else ""
        by_hand = isinstance(error, MismatchError) or not file
        return [
            Problem(folder.name, file, error.what, (error.remedy or BY_NAME) if by_hand else "")
        ]
    if artifact is None:
        return [Problem(folder.name, RECIPE, "is damaged")]
    if artifact.complete:
        return _check_files(artifact, only)
    # and with it torch: only work that is not complete is read as rows
    from gradsift.store.rows import HEADER

    problems = (
        [Problem(folder.name, MANIFEST, "is damaged")] if (folder / MANIFEST).exists() else []
    )
    if (folder / HEADER).exists():
        problems += _check_shards(folder)
    return problems + _check_parts(folder)


def _check_files(artifact: Artifact, only: Collection[str] | None) -> list[Problem]:
    stated: Mapping[str, str] = artifact.manifest["files"]
    problems = _check_named(
        artifact.path,
        {name: hash_ for name, hash_ in stated.items() if only is None or name in only},
        "the manifest",
    )
    foreign = sorted(
        path.name for path in artifact.path.glob("*.safetensors") if path.name not in stated
    )
    problems += [
        Problem(artifact.path.name, name, "is a file that the manifest does not name")
        for name in foreign
    ]
    return problems + _check_beside(artifact)


def _check_named(folder: Path, stated: Mapping[str, str], who: str) -> list[Problem]:
    """Files of `folder` that are not as `who` states."""
    problems = []
    for name, hash_ in stated.items():
        try:
            found = file_hash(inside(folder, name))
        except GradsiftError as error:
            problems.append(Problem(folder.name, name, error.what))
            continue
        if found != hash_:
            problems.append(
                Problem(
                    folder.name,
                    name,
                    f"is not the file that {who} names (hash {found}, stated {hash_})",
                )
            )
    return problems


def _check_beside(artifact: Artifact) -> list[Problem]:
    """The files that the manifest does not hash: the recipe, which it repeats; stats and reports,
    which tell of clocks and carry seals.
    """
    folder, problems = artifact.path, []
    if (what := _recipe_fault(artifact)) is not None:
        problems.append(Problem(folder.name, RECIPE, what))
    for name in (STATS, SUMS):
        sealed = name in artifact.manifest.get("sealed", ())  # those of older runs are not
        if not sealed and not os.path.lexists(folder / name):
            continue
        try:
            found = read_json(inside(folder, name))
            what = (
                ("is damaged" if os.path.lexists(folder / name) else "is missing")
                if found is None
                else seal_fault(found, required=sealed)
            )
        except GradsiftError as error:
            found, what = None, error.what
        if what is not None:
            problems.append(Problem(folder.name, name, what))
        elif name == SUMS and found is not None:
            problems += _check_named(folder, found["files"], SUMS)
    return problems


def _recipe_fault(artifact: Artifact) -> str | None:
    """That it holds no other recipe than the manifest was seen when the artifact was loaded."""
    path = inside(artifact.path, RECIPE)
    try:
        found = read_json(path)
        if found is None:
            return "is damaged" if path.exists() else "is missing"
        return (
            None
            if path.read_bytes() == recipe_file(artifact.recipe, found["schema"])
            else "is not as it was written"
        )
    except GradsiftError as error:
        return error.what


def _check_shards(folder: Path) -> list[Problem]:
    """Damaged shards of a store that is being filled; absent ones are no problem."""
    from gradsift.store.rows import HEADER, RowStore

    try:
        store = RowStore.partial(folder)
    except GradsiftError as error:
        name = Path(error.where or HEADER).name
        # taken away by a repair: made anew
        return [Problem(folder.name, name, error.what)] if os.path.lexists(folder / name) else []
    return [
        Problem(folder.name, name, what)
        for name, what in store.faults(verify=True).values()
        if os.path.lexists(folder / name)
    ]


def _check_parts(folder: Path) -> list[Problem]:
    """Damaged parts of an artifact that is being made: what is kept of its shards until all are
    done.
    """
    from gradsift.store.partial import FOLDER

    problems = []
    for path in sorted((folder / FOLDER).glob("*.*")):
        try:
            if path.suffix == ".safetensors":
                with TensorFile(path) as file:
                    file.verify()
            elif path.suffix == ".json" and read_json(path) is None:
                raise IntegrityError("is damaged", where=path)
        except GradsiftError as error:
            problems.append(Problem(folder.name, f"{FOLDER}/{path.name}", error.what))
    return problems
