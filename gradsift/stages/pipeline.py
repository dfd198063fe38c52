"""How stages follow: which stages a method's signals take, and the signals themselves over the rows
that all of them have.

Every stage has a `Recipe`, whose digest depends only on the recipes before it: the whole plan is
known before anything runs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gradsift.compute import ray
from gradsift.compute.progress import Told
from gradsift.errors import DataError, IntegrityError, MismatchError
from gradsift.gradients.objectives import Loss
from gradsift.model.warmup import RECORD
from gradsift.rules.blocks import Narrow
from gradsift.signals.backends import backend, pool_transform, through_curvature
from gradsift.stages import checks, curvature, influence, per_row, rows, tuned
from gradsift.stages.context import Context
from gradsift.stages.evidence import CurvatureEvidence, Evidence, Helped, Vectors
from gradsift.stages.recipe import Recipe
from gradsift.store import provenance
from gradsift.store.artifact import REPAIR
from gradsift.store.atomic import marker, read_json
from gradsift.store.rows import RowStore, RowView
from gradsift.types import Signal, Signals

if TYPE_CHECKING:
    import numpy as np

# Signal name -> the module whose `recipes(context, signal)` and `value(context, signal)` make it.
STAGES: dict[str, ModuleType] = {
    "bm25": per_row,
    "difficulty": per_row,
    "embeddings": per_row,
    "features": per_row,
    "ifd": per_row,
    "influence": influence,
    "loss": per_row,
    "ngrams": per_row,
    "rows": rows,
    "tuned": tuned,
}


def stage_of(signal: Signal) -> ModuleType:
    """The module that makes a signal. An influence comes from stored rows, or through the
    curvature. Raises UnknownName.
    """
    return curvature if through_curvature(signal) else STAGES[signal.name]


class Pipeline(Context):
    """The stages of one run, over a pool and perhaps a target set. Use inside `run.lock()`."""

    def at_hand(self, needs: frozenset[Signal]) -> list[Signal]:
        """The declared signals in fixed order, those of a target only where there is one: that is
        how a method has an optional target.
        """
        return [signal for signal in sorted(needs, key=repr) if signal.side in self.sides]

    def recipes(self, needs: frozenset[Signal]) -> list[Recipe]:
        """Every stage that `needs` takes, in the order they are made, without repeats. Raises
        MismatchError for rows of other modules.
        """
        stages = [self.encode_recipe(side) for side in self.sides]
        for signal in self.at_hand(needs):
            self._check_modules(signal)
            stages += stage_of(signal).recipes(self, signal)
        return list({recipe.digest: recipe for recipe in stages}.values())

    def _check_modules(self, signal: Signal) -> None:
        if signal.modules == "linear" and self.modules is None:
            remedy = (
                'Set [gradients] modules = "linear" in the file given with --config, for a new'
                " --run folder."
            )
            raise MismatchError(
                "the method reads gradients of all linear layers, this run's are of modules ="
                " 'lora'",
                remedy=remedy,
            )

    def signals(self, needs: frozenset[Signal]) -> tuple[Signals, np.ndarray]:
        """The declared signals over the usable rows (those no signal has quarantined), and the pool
        indices of these rows.
        """
        encoded = self.encoded("pool")
        usable = {side: torch.as_tensor(self.encoded(side).codes == 0) for side in self.sides}
        values: dict[Signal, Any] = {}
        for signal in self.at_hand(needs):
            values[signal], good = stage_of(signal).value(self, signal)
            if good is not None:
                usable[signal.side] &= good
        kept = {side: good.nonzero()[:, 0] for side, good in usable.items()}
        if not len(kept["pool"]):
            raise DataError(
                "no usable row in the pool", remedy="See dropped rows with `gradsift inspect`."
            )
        if "target" in self.sides:
            checks.check_groups(self.sides["target"], usable["target"], self.encoded("target"))
        values = {
            s: narrowed(v if bool(usable[s.side].all()) else restrict(v, kept[s.side]), s.dim)
            for s, v in values.items()
        }
        pool = kept["pool"]
        signals = Signals(
            values=values,
            n=len(pool),
            tokens=encoded.supervised[pool.numpy()],
            groups=[self.sides["pool"].groups[int(i)] for i in pool],
            target_groups=(
                self._target_groups(needs, kept["target"]) if "target" in self.sides else ()
            ),
            map=Told(ray.mapping(self.executor, lambda: marker(self.run.root)), self.progress),
        )
        return signals, pool.numpy()

    def _target_groups(self, needs: frozenset[Signal], kept: Tensor) -> Sequence[str]:
        """Groups of the target rows that signals hold: those `kept`, or those behind the columns of
        an influence matrix.
        """
        groups = self.sides["target"].groups
        for signal in self.at_hand(needs):
            if signal.name == "influence":
                scores = self.stored(stage_of(signal).recipe(self, signal))
                if scores is None:
                    raise IntegrityError(
                        "was taken away while it was read", where=self.run.root, remedy=REPAIR
                    )
                return [groups[int(i)] for i in scores.tensors("scores.safetensors")["target"]]
        return [groups[int(i)] for i in kept]

    def evidence(self, needs: frozenset[Signal], read: Sequence[Recipe]) -> Evidence:
        """What the stages saw. `needs`: signals of the method, which `signals` has made; `read`:
        every stage of the selection.
        """
        encoded, last = self.encoded("pool"), self._last_rows(needs)
        norms = None if last is None else last.norms.numpy()
        losses = None if last is None else last.losses.numpy()
        for signal in self.at_hand(needs):
            if signal.name == "loss":
                losses = per_row.scalars(self, signal).numpy()
        extra = self._last_gradients(needs)
        artifacts = [artifact for recipe in read if (artifact := self.stored(recipe)) is not None]
        return Evidence(
            lengths=encoded.lengths,
            supervised=encoded.supervised,
            norms=norms,
            losses=losses,
            mean_cosine=extra.get("mean_pairwise_cosine"),
            coverage=extra.get("coverage"),
            curvature=tuple(
                facts
                for signal in self.at_hand(needs)
                if (facts := self._curvature(signal)) is not None
            ),
            artifacts={artifact.path.name: artifact.digest for artifact in artifacts},
            warnings=tuple(
                text
                for artifact in artifacts
                for text in provenance.warnings(artifact.path.name, artifact.manifest["extra"])
            ),
            seeds={
                "warm-up": self.config.warmup.seed,
                "adapter": self.config.warmup.lora.seed,
                "projection": self.config.gradients.seed,
            },
            vectors=self._vectors(needs, {recipe.digest for recipe in read}),
            helped=self._helped(needs),
            tuned=(
                {group: tuned.training(self, group) for group in tuned.groups(self)}
                if any(signal.name == "tuned" for signal in self.at_hand(needs))
                else {}
            ),
            **self._warmed(read),
            dropped=tuple(encoded.dropped(self.sides["pool"])),
        )

    def _vectors(self, needs: frozenset[Signal], read: Collection[str]) -> Vectors | None:
        """Rows to draw the pool by: gradients at the last checkpoint, else embeddings or features,
        else the influence on every target row. Only those of the recipes `read`, by digest, so that
        a report does not depend on what else the run holds.
        """
        signals = self.at_hand(needs)
        last = self.checkpoint_count - 1
        for signal in filter(reads_stored_rows, signals):
            loss: Loss = (
                backend(str(signal.backend)).loss if signal.name == "influence" else "cross-entropy"
            )
            made_by = rows.recipe(
                self, "pool", last, pool_transform(signal), loss, signal.adam_form
            )
            pool = self._store(made_by, read)
            if pool is not None:
                wanted = "target" in self.sides
                made_by = rows.recipe(self, "target", last, "none", loss) if wanted else None
                target = None if made_by is None else self._store(made_by, read)
                adam = pool_transform(signal) == "adam"
                return _of_stores("gradients", pool, target, adam=adam)
        for signal in signals:
            if signal.side == "pool" and signal.name == "embeddings":
                of = {
                    side: self._store(per_row.embeddings_recipe(self, side), read)
                    for side in self.sides
                }
                if (pool := of["pool"]) is not None:
                    return _of_stores("embeddings", pool, of.get("target"))
            if signal.name == "features":
                columns = per_row.features(self, signal.fields)
                return Vectors("features", columns, columns.isfinite().all(dim=1).numpy())
        if (helped := self._helped(needs)) is not None and helped.scores.shape[1] > 1:
            fine = helped.scores.isfinite().all(dim=1) & (helped.scores != 0).any(dim=1)
            return Vectors("influence", helped.scores, fine.numpy())
        return None

    def _store(self, recipe: Recipe, read: Collection[str]) -> RowStore | None:
        stored = self.stored(recipe) if recipe.digest in read else None
        return None if stored is None else RowStore.open(stored.path)

    def _helped(self, needs: frozenset[Signal]) -> Helped | None:
        """The influence on every target row, where one was made through the curvature."""
        for signal in filter(through_curvature, self.at_hand(needs)):
            stored = self.stored(curvature.recipe(self, signal))
            if stored is not None:
                held = stored.tensors("scores.safetensors")
                if held["scores"].shape[1] == len(held["target"]):
                    return Helped(held["scores"], held["target"].numpy())
        return None

    def _warmed(self, read: Sequence[Recipe]) -> dict[str, Any]:
        """The warm-up's losses and checkpoints, where the selection read them."""
        if all(recipe.stage != "warmup" for recipe in read):
            return {}
        record = None
        if self.warmup_from is None and (made := self.stored(self.warmup_recipe())) is not None:
            record = read_json(made.path / RECORD)
        losses = (record or {}).get("losses", [])
        return {
            "checkpoints": tuple(checkpoint.step for checkpoint in self.checkpoints()),
            "warmup_losses": tuple(float(loss) for loss in losses),
        }

    def _last_rows(self, needs: frozenset[Signal]) -> RowStore | None:
        """The pool's stored rows at the last checkpoint, of the first signal that reads any."""
        for signal in self.at_hand(needs):
            if reads_stored_rows(signal):
                loss: Loss = (
                    backend(str(signal.backend)).loss
                    if signal.name == "influence"
                    else "cross-entropy"
                )
                stored = self.stored(
                    rows.recipe(
                        self,
                        "pool",
                        self.checkpoint_count - 1,
                        pool_transform(signal),
                        loss,
                        signal.adam_form,
                    )
                )
                return None if stored is None else RowStore.open(stored.path)
        return None

    def _last_gradients(self, needs: frozenset[Signal]) -> dict[str, Any]:
        """What the last of the pool's gradient stages noted in its manifest."""
        pool = self.encode_recipe("pool").digest
        of_pool = [
            recipe
            for recipe in self.recipes(needs)
            if recipe.stage == "gradients" and recipe.inputs["rows"] == pool
        ]
        stored = self.stored(of_pool[-1]) if of_pool else None
        return {} if stored is None else stored.manifest.get("extra", {})

    def _curvature(self, signal: Signal) -> CurvatureEvidence | None:
        scores = self.stored(curvature.recipe(self, signal)) if through_curvature(signal) else None
        if scores is None:
            return None
        fit, extra = self.stored(curvature.fit_recipe(self, signal)), scores.manifest["extra"]
        rows = None if fit is None else fit.manifest["counts"]["rows"]
        return CurvatureEvidence(
            rows, extra["damping_to_mean_eigenvalue"], extra["rank"], extra.get("rank_agreement")
        )


def _of_stores(
    kind: Literal["gradients", "embeddings"],
    pool: RowStore,
    target: RowStore | None,
    *,
    adam: bool = False,
) -> Vectors:
    usable = None if target is None else target.usable.numpy()
    return Vectors(kind, pool, pool.usable.numpy(), target, usable, adam)


def signal_recipe(pipeline: Pipeline, signal: Signal) -> Recipe:
    """The recipe of the artifact that holds a signal: the last of its stages."""
    return stage_of(signal).recipes(pipeline, signal)[-1]


def reads_stored_rows(signal: Signal) -> bool:
    """Whether a signal of the pool comes from stored gradient rows."""
    return signal.side == "pool" and (
        signal.name == "rows" or (signal.name == "influence" and not through_curvature(signal))
    )


def restrict(value: Any, kept: Tensor) -> Any:
    """The rows `kept` of a signal's value: numbers, rows, or a list of rows."""
    if isinstance(value, list):
        return [restrict(rows, kept) for rows in value]
    return value[kept] if isinstance(value, Tensor) else RowView(value, kept)


def narrowed(value: Any, dim: int | None) -> Any:
    """Rows, or a list of them, that are wider than `dim` projected to it; anything else as it
    is.
    """
    if isinstance(value, list):
        return [narrowed(rows, dim) for rows in value]
    return Narrow(value, dim) if dim is not None and value.shape[1] > dim else value
