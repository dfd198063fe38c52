"""RowStore: n x d rows on disk, in shards that verify themselves.

A store is a folder of `store.json` (what it holds), `ids.safetensors` and one
`rows-NNNNN.safetensors` per shard. What is done is read off the shards themselves, never off a list
kept beside them. Rows are kept at unit length, in fp16 or int8, their length in fp32.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from gradsift.errors import IntegrityError, MismatchError
from gradsift.rules.blocks import Raw, take
from gradsift.store import provenance
from gradsift.store.artifact import REPAIR, SCHEMA, Artifact, check_schema, read_manifest
from gradsift.store.atomic import (
    make_folder,
    read_json,
    remove_leftovers,
    require_space,
    write_atomic,
)
from gradsift.store.canonical import canonical_json, differences, recipe_digest
from gradsift.store.packing import QUARANTINE, Ids, StoreDtype, pack
from gradsift.store.tensors import TensorFile, file_hash, read_tensors, write_tensors
from gradsift.types import Rows, counted

HEADER, IDS = "store.json", "ids.safetensors"
_COLUMNS = {
    "norms": torch.float32,
    "losses": torch.float32,
    "scales": torch.float32,
    "tokens": torch.int32,
    "codes": torch.uint8,
}
_OPEN_SHARDS = 64
_REACH = 16  # rows: a gap of a few is cheaper to map than a further read


class RowStore:
    """Unit rows [n, d] with `scales` (L2 norm of the projected row: raw row = unit row * scale),
    `norms` (of the unprojected gradient), `losses`, `tokens` and quarantine `codes`, each [n].

    `[a:b]` gives rows a to b - 1 as a Tensor [b - a, d], fp16 (fp32 from an int8 store), zeros
    where quarantined; what it returns is mapped from disk page by page as it is read, and may be
    written to without touching the store. `digest` is the recipe digest it was created with; `spec`
    whatever describes the rows (projection, modules, transform).
    """

    def __init__(self, path: Path, header: Mapping[str, Any], ids: Ids) -> None:
        """Use `create` or `open`."""
        self.path, self.ids = path, ids
        self.digest: str = header["recipe"]
        self.spec: dict[str, Any] = header["spec"]
        self.dtype: StoreDtype = header["dtype"]
        self.shape: tuple[int, int] = (header["rows"], header["dim"])
        self.shard_rows: int = header["shard_rows"]
        self.problems: list[str] = []  # the damaged shards that `create` found, in words
        self._key = recipe_digest(dict(header))
        self._distrusted: set[int] = set()
        self._checked: set[int] = set()
        self._hashes: Mapping[str, str] | None = None  # the manifest's
        self._files: OrderedDict[int, TensorFile] = OrderedDict()
        self._columns: dict[str, Tensor] = {}

    # --- making and opening

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        recipe_digest: str,
        ids: Sequence[str],
        dim: int,
        spec: Mapping[str, Any],
        shard_rows: int = 2048,
        dtype: StoreDtype = "float16",
    ) -> RowStore:
        """A store to fill: a new one, or what an earlier process left of the same one.

        Shards already there are hashed; damaged or foreign ones are named in `problems` and count
        as missing. Raises MismatchError naming the field when the folder holds a store of other
        settings or ids; DiskFull before anything is written when the rows will not fit;
        ResourceError.
        """
        if dim < 1 or shard_rows < 1 or dtype not in ("float16", "int8"):
            raise ValueError(f"no store of dim {dim}, shard_rows {shard_rows}, dtype {dtype!r}")
        path = Path(path)
        make_folder(path)
        remove_leftovers(path)
        packed = Ids.of(ids)
        tensors = packed.tensors()
        header = {
            "schema": SCHEMA,
            "recipe": recipe_digest,
            "rows": len(packed),
            "dim": dim,
            "dtype": dtype,
            "shard_rows": shard_rows,
            "spec": json.loads(canonical_json(dict(spec))),
            "ids": _ids_digest(packed),
        }
        stored = read_json(path / HEADER)
        if stored is not None:
            check_schema(stored, path / HEADER)
            for field, theirs, ours in differences(stored, header):
                what = f"holds rows made with {field} = {theirs!r}, not {ours!r}"
                raise MismatchError(
                    what, where=path, remedy="Choose another folder, or delete this one."
                )
        store = cls(path, header, packed)
        if stored is None:
            write_atomic(path / HEADER, canonical_json(header))
        try:
            read_tensors(path / IDS, expect={"store": store._key})
        except IntegrityError:
            write_tensors(path / IDS, tensors, {"store": store._key})
        missing = store.missing(verify=True)
        require_space(path, sum(store._shard_bytes(shard) for shard in missing))
        return store

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> RowStore:
        """A complete store, to read. `verify` hashes every shard; else headers, sizes and stated
        digests are checked.

        Raises IntegrityError naming every file at fault, MismatchError for a newer schema.
        """
        store = cls.partial(path)
        if faults := store.faults(verify=verify):
            named = "; ".join(f"{name} {what}" for name, what in list(faults.values())[:5])
            more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise IntegrityError(f"{named}{more}", where=path, remedy=REPAIR)
        return store

    @classmethod
    def partial(cls, path: Path) -> RowStore:
        """A store as it stands, perhaps with shards missing, to look at. Writes nothing. Errors as
        `open`, of header and ids alone.
        """
        path = Path(path)
        header = read_json(path / HEADER)
        if header is None:
            raise IntegrityError("is missing or damaged", where=path / HEADER, remedy=REPAIR)
        check_schema(header, path / HEADER)
        manifest = read_manifest(path)
        try:
            found = read_tensors(path / IDS, expect={"store": recipe_digest(header)})
            store = cls(path, header, Ids(found["text"].numpy(), found["offsets"].numpy()))
        except (KeyError, TypeError) as error:
            raise IntegrityError("is damaged", where=path / HEADER, remedy=REPAIR) from error
        if len(store.ids) != store.shape[0] or _ids_digest(store.ids) != header["ids"]:
            raise IntegrityError(
                "holds other ids than store.json says", where=path / IDS, remedy=REPAIR
            )
        store._hashes = None if manifest is None else manifest["files"]
        return store

    # --- state, read off the files

    @property
    def shards(self) -> list[slice]:
        """The row range of every shard."""
        n = self.shape[0]
        return [slice(a, min(a + self.shard_rows, n)) for a in range(0, n, self.shard_rows)]

    def faults(self, *, verify: bool = False) -> dict[int, tuple[str, str]]:
        """{shard: (file name, what is wrong)} for every shard that is absent or not usable.
        `verify` hashes them.
        """
        faults = {}
        for shard in range(len(self.shards)):
            try:
                with self._open_shard(shard) as file:
                    if verify:
                        file.verify()
            except IntegrityError as error:
                faults[shard] = (_shard_name(shard), error.what)
        return faults

    def missing(self, *, verify: bool = False) -> list[int]:
        """The shards still to be written: absent, damaged, or of another store. `verify` hashes
        those that are there.
        """
        faults = self.faults(verify=verify)
        if verify:
            damaged = {
                shard: fault
                for shard, fault in faults.items()
                if (self.path / _shard_name(shard)).exists()
            }
            self.problems = [f"{self.path / name}: {what}" for name, what in damaged.values()]
            self._distrusted = set(damaged)
        return sorted(set(faults) | self._distrusted)

    def _open_shard(self, shard: int) -> TensorFile:
        """Raises IntegrityError when the file is not this very shard of this very store (whatever
        its name).
        """
        name, rows = _shard_name(shard), self.shards[shard]
        file = TensorFile(self.path / name)
        try:
            file.expect(
                {
                    "store": self._key,
                    "recipe": self.digest,
                    "shard": str(shard),
                    "rows": f"{rows.start}:{rows.stop}",
                }
            )
            if {
                key: (entry.dtype, entry.shape) for key, entry in file.entries.items()
            } != self._layout(shard):
                raise IntegrityError(
                    "holds tensors of other names, types or shapes", where=file.path
                )
            if self._hashes is not None and self._hashes.get(name) != file.digest:
                raise IntegrityError("is not the shard that the manifest names", where=file.path)
        except IntegrityError:
            file.close()
            raise
        return file

    def _layout(self, shard: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        count, rows = self.shards[shard].stop - self.shards[shard].start, {"rows": torch.float16}
        if self.dtype == "int8":
            rows = {"rows": torch.int8, "steps": torch.float32}
        shapes = {"rows": (count, self.shape[1])}
        return {
            name: (dtype, shapes.get(name, (count,)))
            for name, dtype in {**rows, **_COLUMNS}.items()
        }

    def _shard_bytes(self, shard: int) -> int:
        return 4096 + sum(
            dtype.itemsize * int(np.prod(shape)) for dtype, shape in self._layout(shard).values()
        )

    # --- writing

    def write(
        self,
        shard: int,
        rows: Tensor,
        *,
        norms: Tensor,
        losses: Tensor,
        tokens: Tensor,
        codes: Tensor | None = None,
    ) -> None:
        """Writes shard number `shard` atomically; does nothing when it is there already, so
        finished work is never rewritten.

        `rows` [r, d] un-normalised, on any device; `norms`, `losses` [r]; `tokens` [r], supervised
        tokens; `codes` [r]: a QUARANTINE code that the caller knows of (out of memory), else 0.
        Raises DiskFull, ResourceError; ValueError for wrong shapes.
        """
        count = self.shards[shard].stop - self.shards[shard].start
        if tuple(rows.shape) != (count, self.shape[1]) or any(
            column.shape != (count,) for column in (norms, losses, tokens)
        ):
            raise ValueError(
                f"shard {shard} takes rows [{count}, {self.shape[1]}], not {list(rows.shape)}, and"
                f" columns [{count}]"
            )
        if self._wanted(shard):
            self.keep(
                shard,
                pack(
                    rows, norms=norms, losses=losses, tokens=tokens, codes=codes, dtype=self.dtype
                ),
            )

    def keep(
        self,
        shard: int,
        tensors: Mapping[str, Tensor],
        made: Mapping[str, str] | None = None,
        failed: Collection[int] = (),
    ) -> None:
        """As `write`, of tensors that `packing.pack` made for this store, perhaps in another
        process. `made`: what `provenance.made_on` says; `failed`: rows that did not fit in memory,
        which the codes in `tensors` tell already.
        """
        if not self._wanted(shard):
            return
        place = self.shards[shard]
        meta = {
            "store": self._key,
            "recipe": self.digest,
            "shard": str(shard),
            "rows": f"{place.start}:{place.stop}",
        }
        write_tensors(self.path / _shard_name(shard), tensors, {**(made or {}), **meta})
        self._distrusted.discard(shard)

    def _wanted(self, shard: int) -> bool:
        if shard in self._distrusted:
            return True
        try:
            self._open_shard(shard).close()
        except IntegrityError:
            return True
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        # sent to another process it is opened there, not copied
        return RowStore.open, (self.path.absolute(),)

    def files(self) -> dict[str, str]:
        """{file name: hash} of the whole store, for Artifact.finish. Raises IntegrityError while
        shards are missing.
        """
        hashes = {}
        for name in (HEADER, IDS):
            hashes[name] = file_hash(self.path / name)
        if faults := self.missing():
            raise IntegrityError(
                f"{len(faults)} of {counted(len(self.shards), 'shard is', 'shards are')} missing",
                where=self.path,
                remedy="Run the command again.",
            )
        for shard in range(len(self.shards)):
            with self._open_shard(shard) as file:
                hashes[_shard_name(shard)] = file.digest or ""
        return hashes

    def counts(self) -> dict[str, Any]:
        """Rows, usable rows, supervised tokens, and quarantined rows by reason: what a manifest
        says of a store.
        """
        return {
            "rows": self.shape[0],
            "usable": int(self.usable.sum()),
            "tokens": int(self.tokens.sum(dtype=torch.int64)),
            "quarantined": self.quarantined(),
        }

    def quarantined(self) -> dict[str, int]:
        """{reason: rows} over the quarantined rows."""
        found = Counter(code for code in self.codes.tolist() if code)
        return {QUARANTINE.get(code, f"code {code}"): found[code] for code in sorted(found)}

    def seal(
        self,
        artifact: Artifact,
        *,
        extra: Mapping[str, Any] | None = None,
        stats: Mapping[str, Any] | None = None,
    ) -> None:
        """Completes the artifact whose folder this store fills. Raises IntegrityError while shards
        are missing.
        """
        made = provenance.summary(
            self.path / _shard_name(shard) for shard in range(len(self.shards))
        )
        artifact.finish(
            files=self.files(), counts=self.counts(), extra={**(extra or {}), **made}, stats=stats
        )

    # --- reading

    norms = property(
        lambda self: self._column("norms"),
        doc="fp32 [n], L2 norms of the untransformed, unprojected gradients",
    )
    losses = property(
        lambda self: self._column("losses"), doc="fp32 [n], mean over the supervised tokens, nats"
    )
    scales = property(
        lambda self: self._column("scales"),
        doc="fp32 [n], L2 norms of the projected rows; 0 where quarantined",
    )
    tokens = property(lambda self: self._column("tokens"), doc="int32 [n], supervised tokens")
    codes = property(
        lambda self: self._column("codes"), doc="uint8 [n], 0 = usable, else a key of QUARANTINE"
    )

    @property
    def usable(self) -> Tensor:
        """bool [n]."""
        return self.codes == 0

    def _column(self, name: str) -> Tensor:
        if name not in self._columns:
            parts = [self._file(shard).tensor(name) for shard in range(len(self.shards))]
            self._columns[name] = (
                torch.cat(parts) if parts else torch.empty(0, dtype=_COLUMNS[name])
            )
        return self._columns[name]

    def __len__(self) -> int:
        return self.shape[0]

    def raw(self) -> Raw:
        """The rows as they were before they were brought to length 1: `[a:b]` gives them as fp32 [b
        - a, d].
        """
        return Raw(self)

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError("rows are read in file order: a step of 1")
        if stop <= start:
            return torch.empty(
                (0, self.shape[1]), dtype=torch.float32 if self.dtype == "int8" else torch.float16
            )
        parts = []
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            base = shard * self.shard_rows
            parts.append(self._read(shard, max(start - base, 0), min(stop - base, self.shard_rows)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, shard: int, start: int, stop: int) -> Tensor:
        file = self._file(shard)
        rows = file.tensor("rows", start, stop)
        if self.dtype == "float16":
            return rows
        # int8 times fp32 in one step is 40 times slower
        return rows.float().mul_(file.tensor("steps", start, stop)[:, None])

    def _file(self, shard: int) -> TensorFile:
        """The open shard, from the last few used. Raises IntegrityError where it is missing or
        damaged.
        """
        if shard not in self._files:
            if shard in self._distrusted:
                raise IntegrityError(
                    "is damaged, and not made anew yet",
                    where=self.path / _shard_name(shard),
                    remedy=REPAIR,
                )
            try:
                file = self._open_shard(shard)
                if shard not in self._checked:
                    # once, when it is first read: at memory speed, and what is read comes from the
                    # same pages
                    file.verify()
                    self._checked.add(shard)
            except IntegrityError as error:
                raise IntegrityError(error.what, where=error.where, remedy=REPAIR) from error
            self._files[shard] = file
            if len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard]

    def __repr__(self) -> str:
        return f"RowStore({self.path.name}, {self.shape[0]:,} x {self.shape[1]:,} {self.dtype})"


class RowView:
    """The rows `indices` [k] of other rows, in that order: `.shape` (k, d), `[a:b]` gathers."""

    def __init__(self, rows: Rows, indices: Sequence[int] | np.ndarray | Tensor) -> None:
        self.rows = rows
        self.indices = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        n = rows.shape[0]
        if self.indices.ndim != 1 or (
            len(self.indices) and not (int(self.indices.min()) >= 0 and int(self.indices.max()) < n)
        ):
            raise ValueError(f"indices of a view must be one row of numbers in 0..{n - 1}")

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.indices), self.rows.shape[1]

    @property
    def scales(self) -> Tensor | None:
        """The norms that unit rows of a store must be multiplied by; None over rows that carry
        none.
        """
        scales = getattr(self.rows, "scales", None)
        return None if scales is None else scales[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: slice) -> Tensor:
        return take(self.rows, self.indices[rows], reach=_REACH)


def _ids_digest(ids: Ids) -> str:
    hasher = xxhash.xxh3_128()
    for tensor in ids.tensors().values():
        hasher.update(tensor.numpy().data)
    return hasher.hexdigest()


def _shard_name(shard: int) -> str:
    return f"rows-{shard:05d}.safetensors"
