"""What a worker does with a shard, and what it needs for that: records that travel to other
processes and machines.

Each record is a maker for `Executor.map`: called once in the worker it gets the model, and what it
returns takes the rows of one shard and gives back tensors. The one who called `map` writes them
down, so a worker needs no folder of the run.
"""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsift.compute.memory import Halving
from gradsift.config import ModelSettings
from gradsift.data.encode import EncodedRows
from gradsift.errors import MismatchError, UserError
from gradsift.gradients.objectives import Loss
from gradsift.gradients.passes import Modules, Norms, extract
from gradsift.gradients.projection import Projection
from gradsift.model.load import from_settings, model_identity
from gradsift.model.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter
from gradsift.model.losses import row_losses
from gradsift.signals import ifd
from gradsift.signals.curvature.exact import Targets, score_pool
from gradsift.signals.curvature.fit import Fitting
from gradsift.signals.embeddings import embed
from gradsift.store.canonical import canonical_json
from gradsift.store.packing import OUT_OF_MEMORY, StoreDtype, pack
from gradsift.types import Transform

Advance = Callable[[int], None]


@dataclass(frozen=True)
class ShardResult:
    """What a worker gives back for a shard: `tensors` for the keeper, how often a batch was halved
    for want of memory, and the places in the shard of rows that did not fit in memory alone (of
    rows for a store, their quarantine code says so instead).
    """

    tensors: dict[str, Tensor]
    halvings: int = 0
    failed: frozenset[int] = frozenset()


# the model of this process, kept from one stage to the next
_held: list[tuple[ModelSource, Any]] = []


def nothing(tokens: int) -> None:
    """An `advance` for workers whose progress is told by the one who waits for them."""


@dataclass(frozen=True)
class ModelSource:
    """A run's model, base or at a checkpoint, to be loaded elsewhere. `identity`: canonical JSON of
    what the run's own model is; `adapter`: the checkpoint's files; `spans`: over all devices that
    the process sees.
    """

    settings: ModelSettings
    identity: bytes
    adapter: tuple[tuple[str, bytes], ...] = ()
    spans: bool = False

    @classmethod
    def of(
        cls,
        settings: ModelSettings,
        identity: Any,
        checkpoint: Path | None = None,
        *,
        spans: bool = False,
    ) -> ModelSource:
        names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if checkpoint is not None else ()
        return cls(
            settings,
            canonical_json(identity),
            tuple((name, (Path(checkpoint or "") / name).read_bytes()) for name in names),
            spans,
        )

    def load(self) -> Any:
        """The model in eval mode; a second call in the same process gives the same one. Raises
        MismatchError where another model has the same name here, and as `load_model`.
        """
        if not _held or _held[0][0] != self:
            _held.clear()  # before the next is loaded: there may be room for one
            _held.append((self, self._load()))
        return _held[0][1]

    def _load(self) -> Any:
        model = self.settings
        where = f"{model.name} on {socket.gethostname()}"
        remedy = (
            "Give every machine the same files under that path, or name a hub model with"
            " --revision."
        )
        try:
            found = canonical_json(model_identity(model.name, model.revision))
        except UserError as error:
            if json.loads(self.identity)["kind"] == "hub":
                raise
            raise MismatchError(
                f"{error.what}, while the driver has one", where=where, remedy=remedy
            ) from error
        if found != self.identity:
            raise MismatchError(
                f"is another model here ({found.decode()}) than at the driver",
                where=where,
                remedy=remedy,
            )
        loaded = from_settings(model, device=model.device.split(":")[0], spread=self.spans)
        if not self.adapter:
            return loaded
        with tempfile.TemporaryDirectory(prefix="gradsift-") as folder:
            for name, data in self.adapter:
                (Path(folder) / name).write_bytes(data)
            return load_adapter(loaded, folder)


@dataclass(frozen=True)
class GradientWork:
    """Gradient rows of a shard, packed for a `RowStore`."""

    model: Callable[[], Any]
    projection: Projection
    transform: Transform | None
    modules: Modules
    token_budget: int
    dtype: StoreDtype
    dim: int
    advance: Advance = nothing
    loss: Loss = "cross-entropy"
    norms: Norms = "exact"

    def __call__(self) -> Callable[[EncodedRows], ShardResult]:
        model = self.model()

        def work(encoded: EncodedRows) -> ShardResult:
            count, halving = len(encoded), Halving()
            rows, norms, losses = (
                torch.zeros(count, self.dim),
                torch.zeros(count),
                torch.zeros(count),
            )
            tokens, codes = (
                torch.zeros(count, dtype=torch.int32),
                torch.zeros(count, dtype=torch.uint8),
            )
            usable = [i for i in range(count) if encoded.codes[i] == 0]
            taken = [encoded[i] for i in usable]
            options = {
                "transform": self.transform,
                "modules": self.modules,
                "token_budget": self.token_budget,
                "loss": self.loss,
            }
            for batch in extract(
                model,
                taken,
                projection=self.projection,
                norms=self.norms,
                halving=halving,
                **options,
            ):
                at = torch.tensor([usable[int(i)] for i in batch.indices])
                rows[at], norms[at], losses[at], tokens[at] = (
                    batch.rows,
                    batch.norms,
                    batch.losses,
                    batch.tokens,
                )
                for i in batch.failed:
                    codes[usable[i]] = OUT_OF_MEMORY
                self.advance(int(encoded.lengths[at.numpy()].sum()))
            packed = pack(
                rows, norms=norms, losses=losses, tokens=tokens, codes=codes, dtype=self.dtype
            )
            return ShardResult(packed, halving.count)

        return work


@dataclass(frozen=True)
class EmbeddingWork:
    """Embeddings of a shard, packed for a `RowStore`. Losses are not measured here and are
    zeros.
    """

    model: Callable[[], Any]
    dim: int
    pad_id: int
    advance: Advance = nothing

    def __call__(self) -> Callable[[EncodedRows], ShardResult]:
        model = self.model()

        def work(encoded: EncodedRows) -> ShardResult:
            count, halving = len(encoded), Halving()
            usable = [i for i in range(count) if encoded.codes[i] == 0]
            rows, codes = torch.zeros(count, self.dim), torch.zeros(count, dtype=torch.uint8)
            if usable:
                taken = [encoded[i] for i in usable]
                rows[torch.tensor(usable)] = embed(
                    model, taken, pad_id=self.pad_id, advance=self.advance, halving=halving
                )
            for i in halving.failed:
                codes[usable[i]] = OUT_OF_MEMORY
            tokens = torch.as_tensor(encoded.supervised.copy())
            packed = pack(
                rows, norms=rows.norm(dim=1), losses=torch.zeros(count), tokens=tokens, codes=codes
            )
            return ShardResult(packed, halving.count)

        return work


@dataclass(frozen=True)
class ScalarWork:
    """What the base model says of each row of a shard: fp64 [r] for "loss", [r, 2] for "ifd"; NaN
    where a row could not be encoded or did not fit in memory.

    Args:
        name: "loss" or "ifd".
        begin: the token before a text, for "ifd".
        column: name of the tensor in the result; default: `name`.
    """

    model: Callable[[], Any]
    name: str
    pad_id: int
    advance: Advance = nothing
    column: str = ""
    begin: int | None = None

    def __call__(self) -> Callable[[EncodedRows], ShardResult]:
        model = self.model()

        def work(encoded: EncodedRows) -> ShardResult:
            halving = Halving()
            usable = [i for i in range(len(encoded)) if encoded.codes[i] == 0]
            rows = [encoded[i] for i in usable]
            if self.name == "loss":
                numbers = row_losses(
                    model, rows, pad_id=self.pad_id, advance=self.advance, halving=halving
                ).mean
            else:
                numbers = ifd.answer_losses(
                    model,
                    rows,
                    begin=self.begin,
                    pad_id=self.pad_id,
                    advance=self.advance,
                    halving=halving,
                )
            shape = (len(encoded), *numbers.shape[1:])
            full = torch.full(shape, torch.nan, dtype=torch.float64)
            full[torch.tensor(usable, dtype=torch.int64)] = numbers.double()
            failed = frozenset(usable[i] for i in halving.failed)
            return ShardResult({self.column or self.name: full}, halving.count, failed)

        return work


@dataclass(frozen=True)
class FittingWork:
    """The sums of a shard (its number) for the curvature: of the factors, or with `basis` of the
    corrected eigenvalues.
    """

    model: Callable[[], Any]
    rows: Sequence[Any]
    settings: dict[str, Any]
    basis: dict[str, Tensor] | None = None

    def __call__(self) -> Callable[[int], ShardResult]:
        fitting, basis = Fitting(self.model(), self.rows, **self.settings), self.basis

        def work(shard: int) -> ShardResult:
            return ShardResult(
                fitting.sum_factors(shard) if basis is None else fitting.sum_squares(shard, basis)
            )

        return work


@dataclass(frozen=True)
class ScoreWork:
    """Influence scores of the rows of a shard on m targets, fp32 [r, m]; NaN for rows that could
    not be encoded or did not fit in memory.
    """

    model: Callable[[], Any]
    targets: Targets
    modules: Modules
    token_budget: int
    advance: Advance = nothing

    def __call__(self) -> Callable[[EncodedRows], ShardResult]:
        model = self.model()

        def work(encoded: EncodedRows) -> ShardResult:
            halving = Halving()
            full = torch.full((len(encoded), len(self.targets)), torch.nan)
            usable = [i for i in range(len(encoded)) if encoded.codes[i] == 0]
            rows = [encoded[i] for i in usable]
            options = {
                "modules": self.modules,
                "token_budget": self.token_budget,
                "halving": halving,
            }
            for indices, scores in score_pool(model, rows, self.targets, **options):
                places = [usable[int(i)] for i in indices]
                full[torch.tensor(places)] = scores
                self.advance(int(encoded.lengths[places].sum()))
            return ShardResult(
                {"scores": full}, halving.count, frozenset(usable[i] for i in halving.failed)
            )

        return work
