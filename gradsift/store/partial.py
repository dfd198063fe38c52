"""What finished shards of a stage gave, kept in files until the stage is complete: a stage that was stopped goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsift.errors import IntegrityError
from gradsift.store import provenance
from gradsift.store.artifact import Artifact
from gradsift.store.atomic import make_folder, remove_leftovers
from gradsift.store.packing import OUT_OF_MEMORY, QUARANTINE
from gradsift.store.tensors import read_tensors, write_tensors

FOLDER = "parts"
_FAILED = "out_of_memory"


class Parts:
    """The shards' tensors of an artifact that is being made: one file each, in its folder `parts`. `made_with`: what they depend on besides
    the recipe; those made with something else are made anew."""

    def __init__(self, artifact: Artifact, rows: int, shard_rows: int, made_with: Mapping[str, str] | None = None) -> None:
        self.folder, self.digest = artifact.path / FOLDER, artifact.digest
        self.shards = [slice(a, min(a + shard_rows, rows)) for a in range(0, rows, shard_rows)]
        self._made_with = made_with or {}
        self._failed = dict[int, int]()
        self.problems: list[str] = []
        make_folder(self.folder)
        remove_leftovers(self.folder)

    def missing(self) -> list[int]:
        """The shards that are absent or damaged; `problems` then names the damaged ones."""
        faults = {shard: fault for shard in range(len(self.shards)) if (fault := self._fault(shard)) is not None}
        self.problems = [str(fault) for shard, fault in faults.items() if self._path(shard).exists()]
        return list(faults)

    def keep(self, shard: int, tensors: Mapping[str, Tensor], made: Mapping[str, str] | None = None, failed: Collection[int] = ()) -> None:
        """`made`: what `provenance.made_on` says of the shard; `failed`: the rows that did not fit in memory, by place in it. Raises DiskFull,
        ResourceError."""
        lost = {_FAILED: torch.tensor(sorted(failed))} if failed else {}
        write_tensors(self._path(shard), {**tensors, **lost}, {**(made or {}), **self._meta(shard)})
        self._failed[shard] = len(failed)

    def made(self) -> dict[str, Any]:
        """How the shards were made, for the manifest."""
        return provenance.summary(self._path(shard) for shard in range(len(self.shards)))

    def read(self, name: str) -> list[Tensor]:
        """One tensor of every shard, in order, mapped from disk."""
        return [read_tensors(self._path(shard), expect=self._meta(shard))[name] for shard in range(len(self.shards))]

    def about(self) -> dict[str, Any]:
        """What the manifest of the stage says, as for a store of rows: arguments of `Artifact.finish`."""
        failed = sum(self._failed.values())
        quarantined = {"quarantined": {QUARANTINE[OUT_OF_MEMORY]: failed}} if failed else {}
        rows = self.shards[-1].stop if self.shards else 0
        return {"counts": {"rows": rows, **quarantined}, "extra": self.made()}

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _path(self, shard: int) -> Path:
        return self.folder / f"part-{shard:05d}.safetensors"

    def _meta(self, shard: int) -> dict[str, str]:
        rows = self.shards[shard]
        return {"recipe": self.digest, "shard": str(shard), "rows": f"{rows.start}:{rows.stop}", **self._made_with}

    def _fault(self, shard: int) -> IntegrityError | None:
        """Why a shard must be made; None where it is whole."""
        try:
            tensors = read_tensors(self._path(shard), expect=self._meta(shard))
        except IntegrityError as error:
            return error
        self._failed[shard] = len(tensors.get(_FAILED, ()))
        return None
