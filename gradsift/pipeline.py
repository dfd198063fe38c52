"""The stages of a run over one pool: encode, warm-up, gradients, their mean, influence, embeddings, loss; each made once, reused by digest.

Every stage has a `Recipe`, whose digest depends only on the recipes before it: the whole plan is known before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gradsift import curved, machine, scalars
from gradsift.artifact import Artifact, folder_hash
from gradsift.checkpoints import adam_transform, load_checkpoints
from gradsift.config import Config
from gradsift.durable import write_tensors
from gradsift.encode import EncodedRows, encode, tokenizer_identity
from gradsift.errors import DataError, MismatchError, UserError
from gradsift.execute import Executor, Serial, Stopping
from gradsift.gradients import output_dim
from gradsift.influence import backend, score
from gradsift.model import coverage, load_adapter, load_model, load_tokenizer, model_identity
from gradsift.pool import Pool
from gradsift.progress import Progress, silent
from gradsift.projection import Projection
from gradsift.rowwork import Scaled, check_quarantine, fill_mean, mean_pairwise_cosine, shard_worker
from gradsift.run import Run
from gradsift.signals.embeddings import POOLING, TOKEN_BUDGET, embedding_worker, hidden_size
from gradsift.stages import Recipe, Stages
from gradsift.store import RowStore, RowView
from gradsift.types import Checkpoint, Signal, Signals
from gradsift.warmup import warm_up


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
        self.executor = executor or Serial()
        self.progress = progress or silent()
        self.threads = machine.settle(config.machine.threads)
        name, remote = config.model.name, config.model.trust_remote_code
        self.tokenizer = load_tokenizer(name, revision=config.model.revision, trust_remote_code=remote)
        self.model_identity = model_identity(name, config.model.revision)
        self._encoded: dict[str, EncodedRows] = {}
        self._model: Any = None

    # What each stage is made of.

    def encode_recipe(self, side: str) -> Recipe:
        settings = self.config.encode
        return Recipe("encode", settings.canonical(), {"rows": self.sides[side].digest}, tokenizer_identity(self.tokenizer, settings))

    def warmup_recipe(self) -> Recipe:
        if self.warmup_from is not None:
            return Recipe("warmup", {"from": folder_hash(self.warmup_from)}, identity={"model": self.model_identity})
        return Recipe("warmup", self.config.warmup.canonical(), {"pool": self.encode_recipe("pool").digest}, self.compute_identity())

    def gradients_recipe(self, side: str, checkpoint: int, transform: str) -> Recipe:
        settings = self.config.gradients.canonical()
        if transform == "none":
            del settings["adam_form"]
        inputs = {"rows": self.encode_recipe(side).digest, "warmup": self.warmup_recipe().digest}
        return Recipe("gradients", {**settings, "transform": transform, "checkpoint": checkpoint}, inputs, self.compute_identity())

    def mean_recipe(self, side: str, transform: str) -> Recipe:
        inputs = {str(c): self.gradients_recipe(side, c, transform).digest for c in range(self.checkpoint_count)}
        return Recipe("mean", {"weights": "mean_lr"}, inputs)

    def influence_recipe(self, signal: Signal) -> Recipe:
        if through_curvature(signal):
            return curved.influence_recipe(self, signal)
        inputs = {}
        for c in self.used_checkpoints(signal):
            inputs[f"pool{c}"] = self.gradients_recipe("pool", c, signal.transform).digest
            inputs[f"target{c}"] = self.gradients_recipe("target", c, "none").digest
        return Recipe("influence", {"backend": signal.backend, "checkpoints": signal.checkpoints}, inputs)

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
        """Every stage that `needs` takes, in the order they are made, without repeats."""
        found = [self.encode_recipe(side) for side in self.sides]
        for signal in self.at_hand(needs):
            found += self._recipes_of(signal)
        return list({recipe.digest: recipe for recipe in found}.values())

    def _recipes_of(self, signal: Signal) -> list[Recipe]:
        if signal.name == "embeddings":
            return [self.embeddings_recipe(signal.side)]
        if signal.name in scalars.SCALARS:
            return scalars.recipes(self, signal.name)
        if through_curvature(signal):
            return curved.recipes(self, signal)
        sides = [(signal.side, signal.transform)]
        if signal.name == "influence":
            sides = [("pool", signal.transform), ("target", "none")]
        rows = [self.gradients_recipe(side, c, transform) for side, transform in sides for c in self.used_checkpoints(signal)]
        after = {"influence": [self.influence_recipe(signal)] if signal.name == "influence" else []}.get(signal.name, [])
        if signal.name == "rows" and signal.checkpoints == "mean":
            after = [self.mean_recipe(signal.side, signal.transform)]
        return [self.warmup_recipe(), *rows, *after]

    # Making them.

    def encoded(self, side: str) -> EncodedRows:
        if side not in self._encoded:
            artifact = self.make(self.encode_recipe(side), lambda artifact: self._encode(side, artifact))
            self._encoded[side] = EncodedRows.load(artifact.path)
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
        return load_checkpoints(self.make(self.warmup_recipe(), self._warm_up).path)

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

    def load_base(self) -> Any:
        model = self.config.model
        return load_model(
            model.name,
            dtype=model.dtype,
            device=model.device,
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

    @property
    def modules(self) -> Literal["linear"] | None:
        """What `extract` and the curvature take gradients of: None = the LoRA modules."""
        return None if self.config.gradients.modules == "lora" else "linear"

    @property
    def projection(self) -> Projection:
        settings = self.config.gradients
        return Projection(dim=settings.dim, seed=settings.seed, kind=settings.projection)

    def rows(self, side: str, checkpoint: int, transform: str) -> RowStore:
        """The stored rows of one side at one checkpoint."""
        if transform == "adam" and side == "target":
            raise UserError("target rows are plain gradients; only the pool's rows take the Adam transform")
        at = self.checkpoints()[checkpoint]
        recipe = self.gradients_recipe(side, checkpoint, transform)
        artifact = self.make(recipe, lambda artifact: self._extract(artifact, side, at, transform))
        return RowStore.open(artifact.path)

    def _extract(self, artifact: Artifact, side: str, at: Checkpoint, transform: str) -> None:
        settings = self.config.gradients
        encoded, pool = self.encoded(side), self.sides[side]
        modules = self.modules
        dim = output_dim(self.model_at(at), self.projection, modules)
        store = RowStore.create(
            artifact.path,
            recipe_digest=artifact.digest,
            ids=pool.ids,
            dim=dim,
            spec={**settings.model_dump(include={"projection", "seed", "modules"}), "dim": dim, "transform": transform},
            shard_rows=settings.shard_rows,
            dtype=settings.store_dtype,
        )

        def make_worker() -> Any:
            model = self.model_at(at)
            force = self.config.machine.force
            return shard_worker(
                store,
                encoded,
                model,
                projection=self.projection,
                transform=adam_transform(at, settings.adam_form, base=model, force=force) if transform == "adam" else None,
                modules=modules,
                token_budget=settings.token_budget,
                advance=self.progress.advance,
            )

        for problem in store.problems:
            self.progress.note(f"made anew: {problem}")
        shards = store.missing()
        tokens = sum(int(encoded.lengths[store.shards[shard]].sum()) for shard in shards)
        self.progress.start(tokens, "tokens", f"gradients of the {side}, checkpoint {at.step}, {transform}")
        halvings = sum(result for _, result in self.executor.map(make_worker, shards))
        self.progress.done()
        check_quarantine(store, encoded)
        covered, cosine = coverage(self.model_at(at), modules), mean_pairwise_cosine(store)
        what = f"{covered.modules} modules, {covered.share:.1%} of the trainable parameters"
        self.progress.note(f"gradients of the {side}, checkpoint {at.step}: {what}; mean pairwise cosine {cosine:.2f}")
        extra = {"mean_pairwise_cosine": cosine, "coverage": covered.summary()}
        store.seal(artifact, extra=extra, stats={"batch_halvings": halvings})

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

    def influence(self, signal: Signal) -> Tensor:
        """Scores [n, m] of every pool row, zero where a row is quarantined."""
        if "target" not in self.sides:
            raise UserError("influence needs a target", remedy="Add --target FILE.")
        checkpoints = self.checkpoints()
        used = self.used_checkpoints(signal)
        pool = [self.rows("pool", c, signal.transform) for c in used]
        target = [self.rows("target", c, "none") for c in used]
        for a, b in zip(pool, target, strict=True):
            for name in ("projection", "dim", "seed", "modules"):
                if a.spec[name] != b.spec[name]:
                    raise MismatchError(f"pool and target rows differ in {name}: {a.spec[name]} and {b.spec[name]}")
        good = torch.stack([store.usable for store in target]).all(dim=0)
        if not good.any():
            raise DataError("no target row has a usable gradient", remedy="Look at the target with `gradsift inspect`.")

        def fill(artifact: Artifact) -> None:
            keep = good.nonzero()[:, 0]
            views = [RowView(store, keep) for store in target]
            groups = [self.sides["target"].groups[int(i)] for i in keep]
            weights = [checkpoints[c].mean_lr for c in used]
            scores = score(pool, views, weights, str(signal.backend), groups=groups)
            hash_ = write_tensors(artifact.path / "scores.safetensors", {"scores": scores, "target": keep}, {"recipe": artifact.digest})
            artifact.finish(files={"scores.safetensors": hash_}, counts={"rows": len(scores)})

        artifact = self.make(self.influence_recipe(signal), fill)
        return artifact.tensors("scores.safetensors")["scores"]

    def loss(self) -> Tensor:
        """Mean nats per supervised token under the base model, fp32 [n]; NaN for a row that could not be encoded."""
        return scalars.values(self, "loss")

    def embeddings(self, side: str) -> RowStore:
        """Unit embeddings of one side under the base model."""
        encoded = self.encoded(side)

        def fill(artifact: Artifact) -> None:
            model, recipe, ids = self.load_base(), artifact.digest, self.sides[side].ids
            spec = {"pooling": POOLING, "dim": hidden_size(model)}
            shard_rows = self.config.gradients.shard_rows
            store = RowStore.create(artifact.path, recipe_digest=recipe, ids=ids, dim=spec["dim"], spec=spec, shard_rows=shard_rows)
            for problem in store.problems:
                self.progress.note(f"made anew: {problem}")
            shards = store.missing()
            self.progress.start(sum(int(encoded.lengths[store.shards[s]].sum()) for s in shards), "tokens", f"embeddings of the {side}")
            worker = embedding_worker(store, encoded, model, pad_id=self.pad_id, advance=self.progress.advance)
            list(self.executor.map(lambda: worker, shards))
            self.progress.done()
            check_quarantine(store, encoded, "embedding")
            store.seal(artifact, extra={"mean_pairwise_cosine": mean_pairwise_cosine(store)})

        return RowStore.open(self.make(self.embeddings_recipe(side), fill).path)

    def signals(self, needs: frozenset[Signal]) -> tuple[Signals, np.ndarray]:
        """The declared signals over the usable rows (those no signal has quarantined), and the pool indices of these rows."""
        encoded = self.encoded("pool")
        usable = {side: torch.ones(len(rows), dtype=torch.bool) for side, rows in self.sides.items()}
        usable["pool"] &= torch.as_tensor(encoded.codes == 0)
        values: dict[Signal, Any] = {}
        for signal in self.at_hand(needs):
            values[signal], good = self._signal(signal)
            if good is not None:
                usable[signal.side] &= good
        kept = {side: good.nonzero()[:, 0] for side, good in usable.items()}
        for side, rows in kept.items():
            if not len(rows):
                raise DataError(f"no usable row in the {side}", remedy="See dropped rows with `gradsift inspect`.")
        values = {s: _restrict(v, kept[s.side]) if len(kept[s.side]) < len(usable[s.side]) else v for s, v in values.items()}
        pool = kept["pool"]
        signals = Signals(
            values=values,
            n=len(pool),
            tokens=encoded.supervised[pool.numpy()],
            groups=[self.sides["pool"].groups[int(i)] for i in pool],
            target_groups=self._target_groups(needs, kept["target"]) if "target" in self.sides else (),
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
        if signal.name in scalars.SCALARS:
            found = scalars.values(self, signal.name)
            return found, found.isfinite()
        if through_curvature(signal):
            return curved.influence(self, signal)
        if signal.name == "influence":
            stores = [self.rows("pool", c, signal.transform) for c in self.used_checkpoints(signal)]
            return self.influence(signal), torch.stack([store.usable for store in stores]).all(dim=0)
        if signal.name == "embeddings":
            store = self.embeddings(signal.side)
            return store, store.usable
        if signal.checkpoints == "mean":
            mean = self.mean_rows(signal.side, signal.transform)
            return Scaled(mean), mean.usable
        stores = [self.rows(signal.side, c, signal.transform) for c in self.used_checkpoints(signal)]
        good = torch.stack([store.usable for store in stores]).all(dim=0)
        return stores if signal.checkpoints == "each" else stores[-1], good


def through_curvature(signal: Signal) -> bool:
    return signal.name == "influence" and backend(str(signal.backend)).curvature is not None


def _restrict(value: Any, kept: Tensor) -> Any:
    if isinstance(value, list):
        return [RowView(rows, kept) for rows in value]
    return value[kept] if isinstance(value, Tensor) else RowView(value, kept)
