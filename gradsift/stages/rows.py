"""Gradient rows as stages: the rows of one side at one checkpoint, and their mean over
checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsift.errors import UserError
from gradsift.gradients.adam import Adam
from gradsift.gradients.objectives import Loss
from gradsift.gradients.passes import output_dim
from gradsift.model.checkpoints import read_adam_state
from gradsift.model.layers import coverage, thin_coverage
from gradsift.stages.checks import check_quarantine
from gradsift.stages.context import Context
from gradsift.stages.recipe import Recipe, loss_fields
from gradsift.stages.shards import map_shards
from gradsift.stages.work import GradientWork
from gradsift.store.artifact import Artifact
from gradsift.store.rows import RowStore
from gradsift.types import AdamForm, Checkpoint, Signal, checkpoint_weights, counted

# rows read at a time: what they take in fp32 adds to the peak of the stage that just made them
_FEW = 128


def recipe(
    context: Context,
    side: str,
    checkpoint: int,
    transform: str,
    loss: Loss = "cross-entropy",
    form: AdamForm | None = None,
) -> Recipe:
    """The gradients of one side at one checkpoint (its number). `form`: of the Adam transform, None
    = the run's. Raises UserError for moments of other layers.
    """
    settings = context.config.gradients.canonical() | loss_fields(loss)
    settings["adam_form"] = form or settings["adam_form"]
    if transform == "adam" and context.modules is not None:
        what = (
            "the warm-up's Adam moments are those of its LoRA layers, and modules ="
            f" {context.modules!r} reads others"
        )
        raise UserError(
            what,
            remedy=(
                'Leave [gradients] modules = "lora", or take plain gradients: -o transform=none.'
            ),
        )
    if transform == "none":
        settings = {name: value for name, value in settings.items() if not name.startswith("adam_")}
    inputs = {"rows": context.encode_recipe(side).digest, "warmup": context.warmup_recipe().digest}
    return Recipe(
        "gradients",
        {**settings, "transform": transform, "checkpoint": checkpoint},
        inputs,
        context.compute_identity(),
    )


def mean_recipe(
    context: Context, side: str, transform: str, form: AdamForm | None = None
) -> Recipe:
    inputs = {
        str(c): recipe(context, side, c, transform, form=form).digest
        for c in range(context.checkpoint_count)
    }
    return Recipe("mean", {"weights": "mean_lr"}, inputs)


def recipes(context: Context, signal: Signal) -> list[Recipe]:
    """The stages of the signal "rows", in the order they are made."""
    each = [
        recipe(context, signal.side, c, signal.transform, form=signal.adam_form)
        for c in context.used_checkpoints(signal)
    ]
    mean = (
        [mean_recipe(context, signal.side, signal.transform, signal.adam_form)]
        if signal.checkpoints == "mean"
        else []
    )
    return [context.warmup_recipe(), *each, *mean]


def value(context: Context, signal: Signal) -> tuple[Any, Tensor]:
    """The signal "rows": a store, or one for each checkpoint; and which rows all of them have, bool
    [n].
    """
    if signal.checkpoints == "mean":
        mean = mean_rows(context, signal.side, signal.transform, signal.adam_form)
        return mean.raw(), mean.usable
    stores = [
        gradients(context, signal.side, c, signal.transform, form=signal.adam_form)
        for c in context.used_checkpoints(signal)
    ]
    usable = torch.stack([store.usable for store in stores]).all(dim=0)
    return stores if signal.checkpoints == "each" else stores[-1], usable


def gradients(
    context: Context,
    side: str,
    checkpoint: int,
    transform: str,
    loss: Loss = "cross-entropy",
    form: AdamForm | None = None,
) -> RowStore:
    """The stored rows of one side at one checkpoint: gradients of the loss, or of the margin of an
    answer.
    """
    if transform == "adam" and side == "target":
        raise UserError(
            "target rows are plain gradients; only the pool's rows take the Adam transform"
        )
    at = context.checkpoints()[checkpoint]
    made_by = recipe(context, side, checkpoint, transform, loss, form)
    artifact = context.make(
        made_by, lambda artifact: _extract(context, artifact, side, at, transform, loss, form)
    )
    return RowStore.open(artifact.path)


def _extract(
    context: Context,
    artifact: Artifact,
    side: str,
    at: Checkpoint,
    transform: str,
    loss: Loss,
    form: AdamForm | None,
) -> None:
    settings, modules, force = (
        context.config.gradients,
        context.modules,
        context.config.machine.force,
    )
    encoded = context.encoded(side)
    model = context.model_at(at)
    dim, covered = output_dim(model, context.projection, modules), coverage(model, modules)
    spec = {
        **settings.model_dump(mode="json", include={"projection", "seed", "modules"}),
        "dim": dim,
        "transform": transform,
    }
    store = RowStore.create(
        artifact.path,
        recipe_digest=artifact.digest,
        ids=context.sides[side].ids,
        dim=dim,
        spec=spec | loss_fields(loss),
        shard_rows=settings.shard_rows,
        dtype=settings.store_dtype,
    )
    adam = None
    if transform == "adam":
        adam = adam_transform(
            at,
            form or settings.adam_form,
            momentum=settings.adam_momentum,
            base=model,
            force=force,
        )
    lent = context.lend(model, at)
    del model
    work = GradientWork(
        model=lent,
        projection=context.projection,
        transform=adam,
        modules=modules,
        token_budget=settings.token_budget,
        dtype=settings.store_dtype,
        dim=dim,
        advance=context.advance,
        loss=loss,
        norms=settings.norms,
    )
    if (thin := thin_coverage(covered.summary())) is not None:
        context.progress.note(f"warning: {thin}")
    label = f"gradients of the {side}, checkpoint {at.step}"
    map_shards(context, store, work, encoded, label=f"{label}, {transform}")
    check_quarantine(store, encoded)
    cosine = mean_pairwise_cosine(store)
    what = f"{counted(covered.modules, 'module')}, {covered.share:.1%} of the trainable parameters"
    context.progress.note(f"{label}: {what}; mean pairwise cosine {cosine:.2f}")
    store.seal(artifact, extra={"mean_pairwise_cosine": cosine, "coverage": covered.summary()})


def mean_rows(
    context: Context, side: str, transform: str, form: AdamForm | None = None
) -> RowStore:
    """Checkpoint mean of unit rows weighted by mean_lr (TAGCOS, released `mean_grad`): not
    re-normalised, the norm is in `scales`.
    """
    checkpoints = context.checkpoints()
    stores = [gradients(context, side, c, transform, form=form) for c in range(len(checkpoints))]
    weights = checkpoint_weights([checkpoint.mean_lr for checkpoint in checkpoints])

    def fill(artifact: Artifact) -> None:
        mean = RowStore.create(
            artifact.path,
            recipe_digest=artifact.digest,
            ids=context.sides[side].ids,
            dim=stores[0].shape[1],
            spec={**stores[0].spec, "checkpoints": "mean"},
            shard_rows=context.config.gradients.shard_rows,
        )
        fill_mean(mean, stores, weights)
        mean.seal(
            artifact, extra={"mean_pairwise_cosine": mean_pairwise_cosine(mean), "weights": weights}
        )

    return RowStore.open(context.make(mean_recipe(context, side, transform, form), fill).path)


def adam_transform(
    checkpoint: Checkpoint,
    form: Any = "released",
    *,
    momentum: bool = True,
    base: nn.Module | None = None,
    force: bool = False,
) -> Adam:
    """The Adam transform at a checkpoint with the run's own betas, eps and number of updates;
    without `momentum`, with beta1 = 0.
    """
    state = read_adam_state(checkpoint, base=base, force=force)
    betas = state.betas if momentum else (0.0, state.betas[1])
    return Adam(state.m, state.v, state.step, betas, state.eps, form=form)


def fill_mean(mean: RowStore, stores: Sequence[RowStore], weights: Sequence[float]) -> None:
    """Fills `mean` with sum_t weights_t * unit row_t; a row that any checkpoint quarantined is
    zero, and so quarantined. Other columns are the last checkpoint's.
    """
    for shard in mean.missing():
        where = mean.shards[shard]
        rows = torch.zeros(where.stop - where.start, mean.shape[1])
        for weight, store in zip(weights, stores, strict=True):
            rows += weight * store[where].float()
        rows[~torch.stack([store.usable[where] for store in stores]).all(dim=0)] = 0
        last = stores[-1]
        mean.write(
            shard,
            rows,
            norms=last.norms[where],
            losses=last.losses[where],
            tokens=last.tokens[where],
        )


def mean_pairwise_cosine(store: RowStore) -> float:
    """Mean cosine over all pairs of different usable rows: (|sum|^2 - n) / (n (n - 1)). High = a
    large component shared by all rows.
    """
    total, count = torch.zeros(store.shape[1], dtype=torch.float64), int(store.usable.sum())
    for start in range(0, store.shape[0], _FEW):
        total += store[start : start + _FEW].float().sum(dim=0).double()
    return float((total @ total - count) / max(count * (count - 1), 1))
