"""The stages of a run over one pool: encode, warm-up, gradients, their mean, influence, embeddings, loss; each made once, reused by digest.

Every stage has a `Recipe`, whose digest depends only on the recipes before it: the whole plan is known before anything runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gradsift.compute import machine, ray
from gradsift.compute.executor import Executor
from gradsift.compute.progress import Progress, Told, silent
from gradsift.compute.stopping import Stopping
from gradsift.config import Config
from gradsift.data.encode import EncodedRows, encode, tokenizer_identity
from gradsift.data.pool import Pool
from gradsift.errors import DataError, MismatchError, UserError
from gradsift.gradients.objectives import Loss
from gradsift.gradients.passes import output_dim
from gradsift.gradients.projection import Projection, projection_of
from gradsift.model.checkpoints import load_checkpoints
from gradsift.model.layers import coverage
from gradsift.model.load import load_model, load_tokenizer, model_identity, quantiser
from gradsift.model.lora import load_adapter
from gradsift.model.warmup import warm_up
from gradsift.rules.blocks import Narrow
from gradsift.signals.backends import through_curvature
from gradsift.signals.embeddings import POOLING, TOKEN_BUDGET, hidden_size
from gradsift.stages import checks, curvature, influence, per_row, tuned
from gradsift.stages.checks import check_quarantine
from gradsift.stages.context import Stages
from gradsift.stages.recipe import Recipe, named
from gradsift.stages.rows import Scaled, adam_transform, fill_mean, mean_pairwise_cosine
from gradsift.stages.work import EmbeddingWork, GradientWork, ModelSource, nothing
from gradsift.store.artifact import Artifact
from gradsift.store.provenance import made_on
from gradsift.store.rows import RowStore, RowView
from gradsift.store.run import Run
from gradsift.store.tensors import folder_hash
from gradsift.types import Checkpoint, Signal, Signals


class Pipeline(Stages):
    """The stages of one run, over a pool and perhaps a target set. Use inside `run.lock()`."""

    def __init__(
        self,
        run: Run,
        config: Config,
        pool: Pool,
        target: Pool | None = None,
        *,
        warmup_from: Path | None = None,
        executor: Executor | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(run)
        self.config, self.warmup_from = config, warmup_from
        self.sides: dict[str, Pool] = {"pool": pool, **({"target": target} if target is not None else {})}
        self.progress = progress or silent()
        self.threads = machine.settle(config.machine.threads)
        self.executor = executor or ray.executor_of(config, self.threads, self.progress.note)
        name, remote = config.model.name, config.model.trust_remote_code
        self.tokenizer = load_tokenizer(name, revision=config.model.revision, trust_remote_code=remote)
        self.model_identity = model_identity(name, config.model.revision)
        self._encoded: dict[str, EncodedRows] = {}
        self._model: Any = None

    def over(self, pool: Pool, target: Pool | None = None) -> Pipeline:
        """The same run, settings and model over other rows. Costs share one list."""
        other = copy.copy(self)
        other.sides = {"pool": pool, **({"target": target} if target is not None else {})}
        other._encoded = {}
        return other

    # What each stage is made of.

    def encode_recipe(self, side: str) -> Recipe:
        settings = self.config.encode
        return Recipe("encode", settings.canonical(), {"rows": self.sides[side].digest}, tokenizer_identity(self.tokenizer, settings))

    def warmup_recipe(self) -> Recipe:
        if self.warmup_from is not None:
            return Recipe("warmup", {"from": folder_hash(self.warmup_from)}, identity={"model": self.model_identity})
        return Recipe("warmup", self.config.warmup.canonical(), {"pool": self.encode_recipe("pool").digest}, self.compute_identity())

    def gradients_recipe(self, side: str, checkpoint: int, transform: str, loss: Loss = "cross-entropy") -> Recipe:
        settings = self.config.gradients.canonical() | named(loss)
        if transform == "adam" and self.modules is not None:
            what = f"the warm-up's Adam moments are those of its LoRA layers, and modules = {self.modules!r} reads others"
            raise UserError(what, remedy='Leave [gradients] modules = "lora", or take plain gradients: -o transform=none.')
        if transform == "none":
            settings = {name: value for name, value in settings.items() if not name.startswith("adam_")}
        inputs = {"rows": self.encode_recipe(side).digest, "warmup": self.warmup_recipe().digest}
        return Recipe("gradients", {**settings, "transform": transform, "checkpoint": checkpoint}, inputs, self.compute_identity())

    def mean_recipe(self, side: str, transform: str) -> Recipe:
        inputs = {str(c): self.gradients_recipe(side, c, transform).digest for c in range(self.checkpoint_count)}
        return Recipe("mean", {"weights": "mean_lr"}, inputs)

    def influence_recipe(self, signal: Signal) -> Recipe:
        return self._influence(signal).influence_recipe(self, signal)

    @staticmethod
    def _influence(signal: Signal) -> Any:
        """The room that makes this influence: through the curvature, or from stored rows."""
        return curvature if through_curvature(signal) else influence

    def embeddings_recipe(self, side: str) -> Recipe:
        settings = {"pooling": POOLING, "token_budget": TOKEN_BUDGET, "shard_rows": self.config.gradients.shard_rows}
        return Recipe("embeddings", settings, {"rows": self.encode_recipe(side).digest}, self.compute_identity())

    def compute_identity(self) -> dict[str, Any]:
        model = self.config.model
        kind = machine.cpu_kind() if model.device == "cpu" else model.device.split(":")[0]
        return {
            "model": self.model_identity,
            "dtype": model.dtype,
            "attention": model.attention or "default",
            "machine": kind,
            "threads": self.threads,
            "torch": torch.__version__,
            **quantiser(model.dtype),
        }

    @property
    def checkpoint_count(self) -> int:
        return self.config.warmup.checkpoints if self.warmup_from is None else len(load_checkpoints(self.warmup_from))

    def used_checkpoints(self, signal: Signal) -> range:
        last = self.checkpoint_count
        return range(last - 1, last) if signal.checkpoints == "last" else range(last)

    def at_hand(self, needs: frozenset[Signal]) -> list[Signal]:
        """The declared signals in fixed order, those of a target only where there is one: that is how a method has an optional target."""
        return [signal for signal in sorted(needs, key=repr) if signal.side in self.sides]

    def recipes(self, needs: frozenset[Signal]) -> list[Recipe]:
        """Every stage that `needs` takes, in the order they are made, without repeats. Raises MismatchError for rows of other modules."""
        found = [self.encode_recipe(side) for side in self.sides]
        for signal in self.at_hand(needs):
            found += self._recipes_of(signal)
        return list({recipe.digest: recipe for recipe in found}.values())

    def _recipes_of(self, signal: Signal) -> list[Recipe]:
        if signal.modules == "linear" and self.modules is None:
            remedy = 'Set [gradients] modules = "linear" in the file given with --config, for a new --run folder.'
            raise MismatchError("the method reads gradients of all linear layers, this run's are of modules = 'lora'", remedy=remedy)
        if signal.name == "embeddings":
            return [self.embeddings_recipe(signal.side)]
        if signal.name in per_row.SCALARS:
            return per_row.recipes(self, signal.name, signal.fields)
        if signal.name == "tuned":
            return tuned.recipes(self)
        if signal.name == "features":
            return [per_row.features_recipe(self, signal.fields)]
        if signal.name == "influence":
            return self._influence(signal).recipes(self, signal)
        rows = [self.gradients_recipe(signal.side, c, signal.transform) for c in self.used_checkpoints(signal)]
        mean = [self.mean_recipe(signal.side, signal.transform)] if signal.checkpoints == "mean" else []
        return [self.warmup_recipe(), *rows, *mean]

    # Making them.

    def encoded(self, side: str) -> EncodedRows:
        if side not in self._encoded:
            artifact = self.checked(self.make(self.encode_recipe(side), lambda artifact: self._encode(side, artifact)))
            self._encoded[side] = EncodedRows.load(artifact.path)
            if side == "target":  # before anything is spent
                checks.check_encoded(self.sides[side], self._encoded[side])
        return self._encoded[side]

    def _encode(self, side: str, artifact: Artifact) -> None:
        rows = encode(self.sides[side], self.tokenizer, self.config.encode, progress=self.progress)
        for note in rows.notes:
            self.progress.note(note)
        rows.save(artifact.path)
        counts = {"rows": len(rows), "usable": int((rows.codes == 0).sum()), "tokens": int(rows.lengths.sum())}
        artifact.finish(counts=counts)

    def checkpoints(self) -> list[Checkpoint]:
        if self.warmup_from is not None:
            return load_checkpoints(self.warmup_from)
        made = self.checked(self.make(self.warmup_recipe(), self._warm_up))
        named = {name.partition("/")[0] for name in made.manifest["files"]}  # and no folder that somebody has put beside them
        return [checkpoint for checkpoint in load_checkpoints(made.path) if checkpoint.path.name in named]

    def _warm_up(self, artifact: Artifact) -> None:
        model = self.load_base()
        checkpoints = warm_up(
            model,
            self.encoded("pool"),
            self.config.warmup,
            artifact.path,
            pad_id=self.pad_id,
            progress=Stopping(self.progress),
            force=self.config.machine.force,
        )
        artifact.finish(counts={"checkpoints": len(checkpoints), "steps": checkpoints[-1].step})

    @property
    def pad_id(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if isinstance(token, int))

    def load_base(self, dtype: str | None = None) -> Any:
        """The base model, in the run's number format or in another."""
        model = self.config.model
        return load_model(
            model.name,
            dtype=dtype or model.dtype,
            device="auto" if self.config.machine.spans(model.device) else model.device,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            attention=model.attention,
        )

    def model_at(self, checkpoint: Checkpoint) -> Any:
        """The warmed-up model at a checkpoint, in eval mode; only one is held."""
        if self._model is None or self._model[0] != checkpoint.path:
            self._model = None
            self._model = (checkpoint.path, load_adapter(self.load_base(), checkpoint.path))
        return self._model[1]

    def lend(self, model: Any, at: Checkpoint | None = None) -> Callable[[], Any]:
        """`model` (the base, or that of a checkpoint) for the executor's workers: it itself, or how they get their own elsewhere."""
        if not self.executor.remote:
            return lambda: model
        self._model = None  # a worker may need the room
        spans = self.config.machine.spans(self.config.model.device)
        return ModelSource.of(self.config.model, self.model_identity, None if at is None else at.path, spans=spans).load

    def advances(self, encoded: EncodedRows) -> tuple[Callable[[int], None], Callable[[slice], None]]:
        """Who tells the progress: workers here after each batch, or the one who waits for workers elsewhere after each shard."""
        if self.executor.remote:
            return nothing, lambda rows: self.progress.advance(int(encoded.lengths[rows].sum()))
        return self.progress.advance, lambda rows: None

    @property
    def modules(self) -> Literal["linear"] | None:
        """What `extract` and the curvature take gradients of: None = the LoRA modules."""
        return None if self.config.gradients.modules == "lora" else "linear"

    @property
    def projection(self) -> Projection:
        return projection_of(self.config.gradients)

    def rows(self, side: str, checkpoint: int, transform: str, loss: Loss = "cross-entropy") -> RowStore:
        """The stored rows of one side at one checkpoint: gradients of the loss, or of the margin of an answer."""
        if transform == "adam" and side == "target":
            raise UserError("target rows are plain gradients; only the pool's rows take the Adam transform")
        at = self.checkpoints()[checkpoint]
        recipe = self.gradients_recipe(side, checkpoint, transform, loss)
        artifact = self.make(recipe, lambda artifact: self._extract(artifact, side, at, transform, loss))
        return RowStore.open(artifact.path)

    def _extract(self, artifact: Artifact, side: str, at: Checkpoint, transform: str, loss: Loss) -> None:
        settings = self.config.gradients
        encoded, pool = self.encoded(side), self.sides[side]
        modules = self.modules
        model = self.model_at(at)
        dim, covered = output_dim(model, self.projection, modules), coverage(model, modules)
        store = RowStore.create(
            artifact.path,
            recipe_digest=artifact.digest,
            ids=pool.ids,
            dim=dim,
            spec={**settings.model_dump(include={"projection", "seed", "modules"}), "dim": dim, "transform": transform, **named(loss)},
            shard_rows=settings.shard_rows,
            dtype=settings.store_dtype,
        )

        inner, outer = self.advances(encoded)
        force = self.config.machine.force
        form, momentum = settings.adam_form, settings.adam_momentum
        map_ = adam_transform(at, form, momentum=momentum, base=model, force=force) if transform == "adam" else None
        lent = self.lend(model, at)
        del model
        work = GradientWork(
            lent, self.projection, map_, modules, settings.token_budget, settings.store_dtype, dim, inner, loss, settings.norms
        )
        for problem in store.problems:
            self.progress.note(f"made anew: {problem}")
        shards = store.missing()
        tokens = sum(int(encoded.lengths[store.shards[shard]].sum()) for shard in shards)
        self.progress.start(tokens, "tokens", f"gradients of the {side}, checkpoint {at.step}, {transform}")
        for shard, (packed, halvings) in self.executor.map(work, shards, lambda shard: encoded.part(store.shards[shard])):
            store.put(shard, packed, made_on(self.executor.gpu, halvings))
            outer(store.shards[shard])
        self.progress.done()
        check_quarantine(store, encoded)
        cosine = mean_pairwise_cosine(store)
        what = f"{covered.modules} modules, {covered.share:.1%} of the trainable parameters"
        self.progress.note(f"gradients of the {side}, checkpoint {at.step}: {what}; mean pairwise cosine {cosine:.2f}")
        extra = {"mean_pairwise_cosine": cosine, "coverage": covered.summary()}
        store.seal(artifact, extra=extra)

    def mean_rows(self, side: str, transform: str) -> RowStore:
        """Checkpoint mean of unit rows weighted by mean_lr (TAGCOS, released `mean_grad`): not re-normalised, the norm is in `scales`."""
        checkpoints = self.checkpoints()
        stores = [self.rows(side, c, transform) for c in range(len(checkpoints))]
        weights = [checkpoint.mean_lr / sum(c.mean_lr for c in checkpoints) for checkpoint in checkpoints]

        def fill(artifact: Artifact) -> None:
            shard_rows = self.config.gradients.shard_rows
            spec = {**stores[0].spec, "checkpoints": "mean"}
            ids, dim = self.sides[side].ids, stores[0].shape[1]
            mean = RowStore.create(artifact.path, recipe_digest=artifact.digest, ids=ids, dim=dim, spec=spec, shard_rows=shard_rows)
            fill_mean(mean, stores, weights)
            mean.seal(artifact, extra={"mean_pairwise_cosine": mean_pairwise_cosine(mean), "weights": weights})

        return RowStore.open(self.make(self.mean_recipe(side, transform), fill).path)

    def loss(self) -> Tensor:
        """Mean nats per supervised token under the base model, fp32 [n]; NaN for a row that could not be encoded."""
        return per_row.values(self, "loss")

    def embeddings(self, side: str) -> RowStore:
        """Unit embeddings of one side under the base model."""
        encoded = self.encoded(side)

        def fill(artifact: Artifact) -> None:
            model, recipe, ids = self.load_base(), artifact.digest, self.sides[side].ids
            spec, shard_rows = {"pooling": POOLING, "dim": hidden_size(model)}, self.config.gradients.shard_rows
            store = RowStore.create(artifact.path, recipe_digest=recipe, ids=ids, dim=spec["dim"], spec=spec, shard_rows=shard_rows)
            for problem in store.problems:
                self.progress.note(f"made anew: {problem}")
            shards = store.missing()
            self.progress.start(sum(int(encoded.lengths[store.shards[s]].sum()) for s in shards), "tokens", f"embeddings of the {side}")
            inner, outer = self.advances(encoded)
            work = EmbeddingWork(self.lend(model), spec["dim"], self.pad_id, inner)
            del model
            for shard, (packed, halvings) in self.executor.map(work, shards, lambda shard: encoded.part(store.shards[shard])):
                store.put(shard, packed, made_on(self.executor.gpu, halvings))
                outer(store.shards[shard])
            self.progress.done()
            check_quarantine(store, encoded, "embedding")
            store.seal(artifact, extra={"mean_pairwise_cosine": mean_pairwise_cosine(store)})

        return RowStore.open(self.make(self.embeddings_recipe(side), fill).path)

    def signals(self, needs: frozenset[Signal]) -> tuple[Signals, np.ndarray]:
        """The declared signals over the usable rows (those no signal has quarantined), and the pool indices of these rows."""
        encoded = self.encoded("pool")
        usable = {side: torch.as_tensor(self.encoded(side).codes == 0) for side in self.sides}
        values: dict[Signal, Any] = {}
        for signal in self.at_hand(needs):
            values[signal], good = self._signal(signal)
            if good is not None:
                usable[signal.side] &= good
        kept = {side: good.nonzero()[:, 0] for side, good in usable.items()}
        if not len(kept["pool"]):
            raise DataError("no usable row in the pool", remedy="See dropped rows with `gradsift inspect`.")
        if "target" in self.sides:
            checks.check_groups(self.sides["target"], usable["target"], self.encoded("target"))
        values = {s: narrowed(v if bool(usable[s.side].all()) else restrict(v, kept[s.side]), s.dim) for s, v in values.items()}
        pool = kept["pool"]
        signals = Signals(
            values=values,
            n=len(pool),
            tokens=encoded.supervised[pool.numpy()],
            groups=[self.sides["pool"].groups[int(i)] for i in pool],
            target_groups=self._target_groups(needs, kept["target"]) if "target" in self.sides else (),
            map=Told(ray.mapping(self.executor, self.run.root), self.progress),
        )
        return signals, pool.numpy()

    def _target_groups(self, needs: frozenset[Signal], kept: Tensor) -> Sequence[str]:
        """Groups of the target rows that signals hold: those `kept`, or those behind the columns of an influence matrix."""
        groups = self.sides["target"].groups
        for signal in self.at_hand(needs):
            if signal.name == "influence":
                made = self.make(self.influence_recipe(signal), lambda _: None)
                return [groups[int(i)] for i in made.tensors("scores.safetensors")["target"]]
        return [groups[int(i)] for i in kept]

    def _signal(self, signal: Signal) -> tuple[Any, Tensor | None]:
        """A signal over all rows of its side, and which of them it can vouch for (None = all)."""
        if signal.name in per_row.SCALARS:
            found = per_row.values(self, signal.name, signal.fields)
            return found, found.isfinite()
        if signal.name == "influence":
            return self._influence(signal).influence(self, signal)
        if signal.name == "tuned":
            return (found := tuned.values(self)), found.isfinite().all(dim=1)
        if signal.name == "features":
            return per_row.features(self, signal.fields), None
        if signal.name == "embeddings":
            store = self.embeddings(signal.side)
            return store, store.usable
        if signal.checkpoints == "mean":
            mean = self.mean_rows(signal.side, signal.transform)
            return Scaled(mean), mean.usable
        stores = [self.rows(signal.side, c, signal.transform) for c in self.used_checkpoints(signal)]
        good = torch.stack([store.usable for store in stores]).all(dim=0)
        return stores if signal.checkpoints == "each" else stores[-1], good


def restrict(value: Any, kept: Tensor) -> Any:
    """The rows `kept` of a signal's value: numbers, rows, or a list of rows."""
    if isinstance(value, list):
        return [restrict(rows, kept) for rows in value]
    return value[kept] if isinstance(value, Tensor) else RowView(value, kept)


def narrowed(value: Any, dim: int | None) -> Any:
    """Rows, or a list of them, that are wider than `dim` projected to it; anything else as it is."""
    if isinstance(value, list):
        return [narrowed(rows, dim) for rows in value]
    return Narrow(value, dim) if dim is not None and value.shape[1] > dim else value
