"""What finished shards of a stage gave, kept in files until the stage is complete: a stage that was stopped goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gradsift import provenance
from gradsift.artifact import Artifact
from gradsift.durable import make_folder, read_tensors, remove_leftovers, write_tensors
from gradsift.errors import IntegrityError

FOLDER = "parts"


class Parts:
    """The shards' tensors of an artifact that is being made: one file each, in its folder `parts`."""

    def __init__(self, artifact: Artifact, rows: int, shard_rows: int) -> None:
        self.folder, self.digest = artifact.path / FOLDER, artifact.digest
        self.shards = [slice(a, min(a + shard_rows, rows)) for a in range(0, rows, shard_rows)]
        make_folder(self.folder)
        remove_leftovers(self.folder)

    def missing(self) -> list[int]:
        """The shards that are absent or damaged."""
        return [shard for shard in range(len(self.shards)) if not self._there(shard)]

    def keep(self, shard: int, tensors: dict[str, Tensor], made: Mapping[str, str] | None = None) -> None:
        """`made`: what `provenance.made_on` says of the shard. Raises DiskFull, ResourceError."""
        write_tensors(self._path(shard), tensors, {**(made or {}), **self._meta(shard)})

    def made(self) -> dict[str, Any]:
        """How the shards were made, for the manifest."""
        return provenance.summary(self._path(shard) for shard in range(len(self.shards)))

    def read(self, name: str) -> list[Tensor]:
        """One tensor of every shard, in order, mapped from disk."""
        return [read_tensors(self._path(shard), expect=self._meta(shard))[name] for shard in range(len(self.shards))]

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _path(self, shard: int) -> Path:
        return self.folder / f"part-{shard:05d}.safetensors"

    def _meta(self, shard: int) -> dict[str, str]:
        rows = self.shards[shard]
        return {"recipe": self.digest, "shard": str(shard), "rows": f"{rows.start}:{rows.stop}"}

    def _there(self, shard: int) -> bool:
        try:
            read_tensors(self._path(shard), expect=self._meta(shard))
        except IntegrityError:
            return False
        return True
