"""What finished pieces of a stage gave, kept in files until the stage is complete: a stage that was
stopped goes on where it was.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsift.errors import IntegrityError, MismatchError
from gradsift.store import provenance
from gradsift.store.artifact import Artifact
from gradsift.store.atomic import make_folder, read_json, remove_leftovers, write_atomic
from gradsift.store.canonical import canonical_json, differences
from gradsift.store.packing import OUT_OF_MEMORY, QUARANTINE
from gradsift.store.tensors import read_tensors, write_tensors

log = logging.getLogger("gradsift")

FOLDER = "parts"
_FAILED = "out_of_memory"


class Pieces:
    """Tensors by the name of the piece of work that gave them: a file each, in a folder of their
    own.

    Who keeps a piece says what it depends on (`meta`), and says it again to get it back.
    Raises ResourceError where the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        make_folder(self.folder)
        remove_leftovers(self.folder)

    def claim(self, header: str, spec: Mapping[str, Any], holds: str) -> None:
        """Writes what all pieces depend on, or compares it with what an earlier process wrote.

        Args:
            header: name of the JSON file.
            spec: plain JSON.
            holds: what the folder holds, for the error.

        Raises:
            MismatchError: an earlier process was given another spec; names the first field that
            differs.
        """
        stored = read_json(self.folder / header)
        if stored is None:
            write_atomic(self.folder / header, canonical_json(spec))
            return
        for field, theirs, ours in differences(stored, spec):
            what = f"holds {holds} with {field} = {theirs!r}, not {ours!r}"
            raise MismatchError(
                what, where=self.folder, remedy="Choose another folder, or delete this one."
            )

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def load(self, name: str, meta: Mapping[str, str]) -> dict[str, Tensor] | None:
        """A piece that was kept with this `meta`, mapped from disk. None where it is absent,
        damaged (the log says so) or another.
        """
        path = self.path(name)
        try:
            return read_tensors(path, expect=meta)
        except IntegrityError as error:
            if path.exists():
                log.warning("%s; it is made anew", error)
            return None

    def save(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, str],
        made: Mapping[str, str] | None = None,
    ) -> None:
        """Keeps a piece. `made`: what `provenance.made_on` says of it. Raises DiskFull,
        ResourceError.
        """
        write_tensors(self.path(name), tensors, {**(made or {}), **meta})

    def made(self, names: Iterable[str]) -> dict[str, Any]:
        """How these pieces were made, for the manifest. Raises IntegrityError where one is
        damaged.
        """
        return provenance.summary(self.path(name) for name in names)

    def remove(self) -> None:
        """Deletes the folder: last, for until the stage is complete the pieces are what is kept of
        the work.
        """
        shutil.rmtree(self.folder)


class Partial:
    """The shards' tensors of an artifact that is being made: one piece each, in its folder `parts`.
    `made_with`: what they depend on besides the recipe; those made with something else are made
    anew.
    """

    def __init__(
        self,
        artifact: Artifact,
        rows: int,
        shard_rows: int,
        made_with: Mapping[str, str] | None = None,
    ) -> None:
        self.pieces, self.digest = Pieces(artifact.path / FOLDER), artifact.digest
        self.shards = [slice(a, min(a + shard_rows, rows)) for a in range(0, rows, shard_rows)]
        self._made_with = made_with or {}
        self._failed = dict[int, int]()
        self.problems: list[str] = []

    def missing(self) -> list[int]:
        """The shards that are absent or damaged; `problems` then names the damaged ones."""
        faults = {
            shard: fault
            for shard in range(len(self.shards))
            if (fault := self._fault(shard)) is not None
        }
        self.problems = [
            str(fault)
            for shard, fault in faults.items()
            if self.pieces.path(_piece(shard)).exists()
        ]
        return list(faults)

    def keep(
        self,
        shard: int,
        tensors: Mapping[str, Tensor],
        made: Mapping[str, str] | None = None,
        failed: Collection[int] = (),
    ) -> None:
        """`made`: what `provenance.made_on` says of the shard; `failed`: the rows that did not fit
        in memory, by place in it. Raises DiskFull, ResourceError.
        """
        lost = {_FAILED: torch.tensor(sorted(failed))} if failed else {}
        self.pieces.save(_piece(shard), {**tensors, **lost}, self._meta(shard), made)
        self._failed[shard] = len(failed)

    def made(self) -> dict[str, Any]:
        """How the shards were made, for the manifest."""
        return self.pieces.made(_piece(shard) for shard in range(len(self.shards)))

    def read(self, name: str) -> list[Tensor]:
        """One tensor of every shard, in order, mapped from disk. Raises IntegrityError where a
        shard is missing or damaged.
        """
        paths = [self.pieces.path(_piece(shard)) for shard in range(len(self.shards))]
        return [
            read_tensors(path, expect=self._meta(shard))[name] for shard, path in enumerate(paths)
        ]

    def about(self) -> dict[str, Any]:
        """What the manifest of the stage says, as for a store of rows: arguments of
        `Artifact.finish`.
        """
        failed = sum(self._failed.values())
        quarantined = {"quarantined": {QUARANTINE[OUT_OF_MEMORY]: failed}} if failed else {}
        rows = self.shards[-1].stop if self.shards else 0
        return {"counts": {"rows": rows, **quarantined}, "extra": self.made()}

    def remove(self) -> None:
        """Deletes the shards, as `Pieces.remove`."""
        self.pieces.remove()

    def _meta(self, shard: int) -> dict[str, str]:
        rows = self.shards[shard]
        return {
            "recipe": self.digest,
            "shard": str(shard),
            "rows": f"{rows.start}:{rows.stop}",
            **self._made_with,
        }

    def _fault(self, shard: int) -> IntegrityError | None:
        """Why a shard must be made; None where it is whole."""
        try:
            tensors = read_tensors(self.pieces.path(_piece(shard)), expect=self._meta(shard))
        except IntegrityError as error:
            return error
        self._failed[shard] = len(tensors.get(_FAILED, ()))
        return None


def _piece(shard: int) -> str:
    return f"part-{shard:05d}"
