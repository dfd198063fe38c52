"""Artifacts: folders that are either complete or resumable.

An artifact is a folder named by `folder_name`. `manifest.json` is written last: it exists =
complete. The recipe names everything the content depends on, so a folder is found
again by what it holds, never by when or where it was made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.errors import IntegrityError, MismatchError
from gradsift.store.atomic import (
    TEMP,
    inside,
    make_folder,
    read_json,
    remove_leftovers,
    write_atomic,
)
from gradsift.store.canonical import canonical_json, recipe_digest, seal_fault, sealed
from gradsift.store.tensors import TensorFile, file_hash

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1  # of every JSON file in a run folder
MANIFEST, STATS, RECIPE = "manifest.json", "stats.json", "recipe.json"
# of files that tell of clocks, and may be written anew: no manifest holds their hashes
SUMS = "report.digests.json"
_FIELDS = ("stage", "version", "config", "inputs", "identity")  # of a recipe
_UPGRADE = "Upgrade gradsift, or choose another --run folder."
_REMAKE = (
    "Delete it and run the same command again: the files beside it are checked, and kept where they"
    " are whole."
)
REPAIR = (
    "Run `gradsift verify RUN`, then the same command again: only what is damaged is made anew."
)


def recipe(
    stage: str,
    *,
    version: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything an artifact's content depends on. `inputs`: recipe digests by name; `identity`: of
    pool, model, tokenizer, template.
    """
    if not stage.replace("-", "").replace("_", "").isalnum() or not stage.isascii():
        raise ValueError(f"{stage!r} is not a stage name: letters, digits, - and _")
    return {
        "stage": stage,
        "version": version,
        "config": dict(config),
        "inputs": dict(inputs),
        "identity": dict(identity),
    }


def folder_name(made_by: Mapping[str, Any]) -> str:
    """The folder of an artifact: `<stage>-<first 12 digits of the recipe digest>`, with the method
    between the two where the recipe names one.
    """
    method = made_by["config"].get("method")
    named = isinstance(method, str) and method.isascii() and method.replace("_", "").isalnum()
    parts = [made_by["stage"], *([method] if named else []), recipe_digest(dict(made_by))[:12]]
    return "-".join(parts)


def recipe_file(made_by: Mapping[str, Any], schema: int = SCHEMA) -> bytes:
    """The bytes of recipe.json for what `recipe()` returns."""
    return canonical_json({"schema": schema, **made_by})


def read_sealed(path: Path, *, remedy: str) -> dict[str, Any]:
    """The object of a file that `sealed` made, without its seal. Raises IntegrityError with this
    remedy where it is not as it was written.
    """
    found = read_json(path)
    what = "is damaged" if found is None else seal_fault(found)
    if found is None or what is not None:
        raise IntegrityError(what or "", where=path, remedy=remedy)
    return {key: value for key, value in found.items() if key != "seal"}


def rewritten(folder: Path, name: str) -> bytes | None:
    """A recipe.json or stats.json for a complete artifact whose own is lost: the manifest repeats
    the recipe; times are not known any more. None for any other file, or where the manifest cannot
    tell.
    """
    try:
        manifest = read_manifest(folder) if name in (RECIPE, STATS) else None
    except (IntegrityError, MismatchError):
        return None
    if manifest is None:
        return None
    return (
        recipe_file({field: manifest[field] for field in _FIELDS})
        if name == RECIPE
        else canonical_json(sealed({}))
    )


def file_hashes(folder: Path) -> dict[str, str]:
    """The hash of every file below `folder` but manifest, stats, recipe, sums and temporary ones,
    by relative name ("/" between parts).
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
    own = {MANIFEST, STATS, RECIPE, SUMS}
    return {
        name: file_hash(inside(folder, name))
        for name in names
        if name not in own and not name.rpartition("/")[2].startswith(TEMP)
    }


def check_schema(found: Mapping[str, Any], path: Path) -> None:
    """Raises MismatchError when `found` was written by a newer gradsift. Older schemas are read."""
    schema = found.get("schema")
    if not isinstance(schema, int):
        raise IntegrityError("states no schema version", where=path, remedy=_REMAKE)
    if schema > SCHEMA:
        raise MismatchError(
            f"was written in schema {schema}; this gradsift reads up to {SCHEMA}",
            where=path,
            remedy=_UPGRADE,
        )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete artifact; None when it has none, or one that is not JSON (then the
    artifact is resumed, shard by shard).

    Raises IntegrityError when it was edited, MismatchError when its schema is newer.
    """
    path = inside(folder, MANIFEST)
    found = read_json(path)
    if found is None:
        return None
    check_schema(found, path)
    body = {key: value for key, value in found.items() if key != "seal"}
    if found.get("seal") != recipe_digest(body):
        raise IntegrityError("was edited after it was written", where=path, remedy=_REMAKE)
    return found


class Artifact:
    """One stage's result for one recipe. `path` the folder, `digest` the full recipe digest;
    complete once `finish` has returned.

    Opening one deletes temporary files that dead writers left in it.
    """

    def __init__(self, root: Path, made_by: Mapping[str, Any], *, create: bool = True) -> None:
        """`made_by`: what `recipe()` returns.

        Raises IntegrityError when the folder is a link or holds another recipe, MismatchError for a
        newer schema.
        """
        self.recipe = dict(made_by)
        self.stage: str = self.recipe["stage"]
        self.digest = recipe_digest(self.recipe)
        plain, name = f"{self.stage}-{self.digest[:12]}", folder_name(self.recipe)
        # a selection of before folders were named after their method
        self.path = inside(root, plain if (root / plain).is_dir() else name)
        self._opened = time.monotonic()
        # spent on other artifacts since this one was opened
        self.seconds_elsewhere: Callable[[], float] = lambda: 0.0
        # what stats.json says of the machine: peak memory, versions
        self.machine: Callable[[], Mapping[str, Any]] = dict
        self._manifest: dict[str, Any] | None = None
        if create:
            make_folder(self.path)
        if not self.path.is_dir():
            return
        self._check_recipe()
        if not self.complete and create:
            for folder in (
                self.path,
                *(path for path in self.path.rglob("*") if path.is_dir() and not path.is_symlink()),
            ):
                remove_leftovers(folder)
            if read_json(inside(self.path, RECIPE)) is None:
                write_atomic(self.path / RECIPE, recipe_file(self.recipe))

    @classmethod
    def load(cls, path: Path) -> Artifact | None:
        """The artifact in an existing folder, complete or not; None where the folder holds none.
        Writes nothing.
        """
        found = read_manifest(path) or read_json(inside(path, RECIPE))
        if found is None:
            return None
        check_schema(found, path)
        if any(field not in found for field in _FIELDS):
            raise IntegrityError(
                "its recipe lacks a field",
                where=path,
                remedy="Delete the folder; the next run makes it anew.",
            )
        artifact = cls(path.parent, {field: found[field] for field in _FIELDS}, create=False)
        if artifact.path.name != path.name:
            remedy = "Give the folder its name back, or delete it."
            raise IntegrityError(
                f"holds the recipe of {artifact.path.name}", where=path, remedy=remedy
            )
        return artifact

    def _check_recipe(self) -> None:
        """The folder name holds 12 of 64 digits; the rest is compared here."""
        for name in (RECIPE, MANIFEST):
            found = read_json(inside(self.path, name))
            if found is None:
                continue
            check_schema(found, self.path / name)
            if any(
                found.get(field) != json.loads(canonical_json(value))
                for field, value in self.recipe.items()
            ):
                raise IntegrityError(
                    "holds another recipe than its folder name says",
                    where=self.path / name,
                    remedy="Delete that folder.",
                )

    @property
    def complete(self) -> bool:
        """True when manifest.json exists and parses. Raises IntegrityError for an edited one,
        MismatchError for a newer schema.
        """
        if self._manifest is None and self.path.is_dir():
            self._manifest = read_manifest(self.path)
        return self._manifest is not None

    @property
    def manifest(self) -> dict[str, Any]:
        """Recipe, counts, hash of every file, content digest. Raises IntegrityError while the
        artifact is not complete.
        """
        if not self.complete or self._manifest is None:
            raise IntegrityError(
                "is not complete",
                where=self.path,
                remedy="Run the command that makes it again; it resumes.",
            )
        return self._manifest

    @property
    def content(self) -> str:
        """The content digest: recipe_digest of {file: hash}. Equal for equal bytes, whoever made
        them, whenever and wherever.
        """
        return self.manifest["content"]

    @property
    def stats(self) -> dict[str, Any]:
        """Wall time, peak memory, versions and what the stage added; not digested, but sealed.
        Empty where they are lost.
        """
        found = read_json(inside(self.path, STATS)) or {}
        return (
            {}
            if seal_fault(found)
            else {key: value for key, value in found.items() if key != "seal"}
        )

    def file(self, name: str) -> Path:
        """The path of a file of this artifact. Raises IntegrityError for a name that leads outside,
        or through a link.
        """
        return inside(self.path, name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file of a complete artifact, hashed and compared with the manifest.
        Raises IntegrityError.
        """
        path = self.file(name)
        with TensorFile(path) as file:
            file.verify()
            if self.manifest["files"].get(name) != file.digest:
                raise IntegrityError(
                    "is not the file that the manifest names", where=path, remedy=REPAIR
                )
            return {key: file.tensor(key) for key in file.entries}

    def finish(
        self,
        *,
        files: Mapping[str, str] | None = None,
        counts: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        stats: Mapping[str, Any] | None = None,
    ) -> None:
        """Completes the artifact: stats.json first, manifest.json last.

        `files`: hash by name (default: every file in the folder, hashed now). `extra` goes into the
        manifest, so it must not hold clocks or paths; `stats` goes into stats.json. Raises
        IntegrityError when a named file is not there, DiskFull, ResourceError.
        """

        files = dict(sorted((file_hashes(self.path) if files is None else files).items()))
        for name in files:
            if not inside(self.path, name).is_file():
                raise IntegrityError(
                    "is missing",
                    where=self.path / name,
                    remedy="Run the same command again: it is made anew.",
                )
        made = {
            "wall_seconds": round(time.monotonic() - self._opened - self.seconds_elsewhere(), 3),
            "finished": time.time(),
            **self.machine(),
            **(stats or {}),
        }
        write_atomic(
            self.path / STATS, json.dumps(sealed(made), indent=1, sort_keys=True).encode() + b"\n"
        )
        body: dict[str, Any] = {
            "schema": SCHEMA,
            **self.recipe,
            "digest": self.digest,
            "counts": dict(counts),
            "extra": dict(extra or {}),
            "files": files,
            "content": recipe_digest(files),
            "sealed": [
                name for name in (STATS, SUMS) if (self.path / name).exists()
            ],  # beside `files`: those that carry a digest of themselves
        }
        manifest = sealed(json.loads(canonical_json(body)))
        write_atomic(
            self.path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n"
        )
        self._manifest = manifest
