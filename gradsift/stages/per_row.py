"""Signals of the base model or of the rows' own texts, one entry per row: loss, difficulty, n-gram
weights, features, embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.compute.stopping import Stopping
from gradsift.data.records import text_of
from gradsift.errors import UserError
from gradsift.model.lora import attach_lora
from gradsift.model.warmup import plan_warmup
from gradsift.signals import bm25, difficulty, ngrams
from gradsift.signals.embeddings import POOLING, TOKEN_BUDGET, hidden_size
from gradsift.signals.features import features as own_features
from gradsift.stages.checks import check_quarantine, check_values
from gradsift.stages.context import Context
from gradsift.stages.recipe import Recipe
from gradsift.stages.rows import mean_pairwise_cosine
from gradsift.stages.shards import map_shards
from gradsift.stages.work import EmbeddingWork, ScalarWork
from gradsift.store.artifact import Artifact
from gradsift.store.partial import Partial
from gradsift.store.rows import RowStore
from gradsift.store.tensors import write_tensors
from gradsift.types import Example, Signal

_LABELS = {"loss": "loss of the base model", "ifd": "instruction-following difficulty"}
_NOUNS = {"loss": "loss", "ifd": "difficulty"}


def recipes(context: Context, signal: Signal) -> list[Recipe]:
    """The stages of a signal, in the order they are made."""
    if signal.name == "embeddings":
        return [embeddings_recipe(context, signal.side)]
    if signal.name == "features":
        return [features_recipe(context, signal.fields)]
    if signal.name == "difficulty":
        return _difficulty_recipes(context, signal.fields)
    rows = {"rows": context.encode_recipe("pool").digest}
    if signal.name == "bm25":
        inputs = {side: rows.digest for side, rows in context.sides.items()}
        if "target" in context.sides:  # its rows that cannot be encoded are no queries
            inputs["encoded"] = context.encode_recipe("target").digest
        if "tokenised" in context.sides["pool"].formats.values():
            inputs["tokens"] = context.encode_recipe("pool").digest
        return [Recipe("bm25", {"k1": bm25.K1, "b": bm25.B}, inputs)]
    if signal.name == "ngrams":
        inputs = {side: rows.digest for side, rows in context.sides.items()}
        inputs |= {  # tokens are read as words by the tokenizer
            f"{side} tokens": context.encode_recipe(side).digest
            for side, rows in context.sides.items()
            if "tokenised" in rows.formats.values()
        }
        return [Recipe("ngrams", {"buckets": ngrams.BUCKETS, "prior": ngrams.PRIOR}, inputs)]
    return [
        Recipe(
            signal.name,
            {"shard_rows": context.config.gradients.shard_rows},
            rows,
            context.compute_identity(),
        )
    ]


def value(context: Context, signal: Signal) -> tuple[Any, Tensor | None]:
    """A signal over all rows of its side, and which of them it can vouch for, bool [n] (None =
    all).

    Raises DataError as `checks.check_values`, UserError for n-gram weights without a target.
    """
    if signal.name == "embeddings":
        store = embeddings(context, signal.side)
        return store, store.usable
    if signal.name == "features":
        return features(context, signal.fields), None
    if signal.name == "bm25":
        return bm25_scores(context, signal), None
    numbers = scalars(context, signal)
    return numbers, _known(numbers)


# --- embeddings


def embeddings_recipe(context: Context, side: str) -> Recipe:
    settings = {
        "pooling": POOLING,
        "token_budget": TOKEN_BUDGET,
        "shard_rows": context.config.gradients.shard_rows,
    }
    return Recipe(
        "embeddings",
        settings,
        {"rows": context.encode_recipe(side).digest},
        context.compute_identity(),
    )


def embeddings(context: Context, side: str) -> RowStore:
    """Unit embeddings of one side under the base model."""
    encoded = context.encoded(side)

    def fill(artifact: Artifact) -> None:
        model = context.load_base()
        spec = {"pooling": POOLING, "dim": hidden_size(model)}
        store = RowStore.create(
            artifact.path,
            recipe_digest=artifact.digest,
            ids=context.sides[side].ids,
            dim=spec["dim"],
            spec=spec,
            shard_rows=context.config.gradients.shard_rows,
        )
        work = EmbeddingWork(context.lend(model), spec["dim"], context.pad_id, context.advance)
        del model
        map_shards(context, store, work, encoded, label=f"embeddings of the {side}")
        check_quarantine(store, encoded, "embedding")
        store.seal(artifact, extra={"mean_pairwise_cosine": mean_pairwise_cosine(store)})

    return RowStore.open(context.make(embeddings_recipe(context, side), fill).path)


# --- features


def features_recipe(context: Context, fields: Sequence[str]) -> Recipe:
    return Recipe("features", {"fields": list(fields)}, {"rows": context.sides["pool"].digest})


def features(context: Context, fields: Sequence[str]) -> Tensor:
    """Numbers of the pool's own rows, fp32 [n, d]."""

    def fill(artifact: Artifact) -> None:
        columns = own_features(context.sides["pool"], fields)
        hash_ = write_tensors(
            artifact.path / "features.safetensors",
            {"features": columns},
            {"recipe": artifact.digest},
        )
        artifact.finish(
            files={"features.safetensors": hash_},
            counts={"rows": len(columns), "columns": columns.shape[1]},
        )

    return context.make(features_recipe(context, fields), fill).tensors("features.safetensors")[
        "features"
    ]


# --- words


def bm25_scores(context: Context, signal: Signal) -> Tensor:
    """BM25 of every pool row for every usable target row, fp32 [n, m]. Raises UserError without a
    target.
    """
    if "target" not in context.sides:
        raise UserError("bm25 needs a target", remedy="Add --target FILE.")
    good = np.flatnonzero(context.encoded("target").codes == 0)

    def fill(artifact: Artifact) -> None:
        pool, target = context.sides["pool"], context.sides["target"]
        context.progress.start(len(pool), "rows", "words of the pool")
        queries = [_text(context, target[int(i)]) for i in good]
        advance = Stopping(context.progress).advance
        found = bm25.scores((_text(context, row) for row in pool), queries, advance=advance)
        context.progress.done()
        hash_ = write_tensors(
            artifact.path / "scores.safetensors", {"scores": found}, {"recipe": artifact.digest}
        )
        artifact.finish(files={"scores.safetensors": hash_}, counts={"rows": len(found)})

    made = context.make(recipes(context, signal)[-1], fill)
    return made.tensors("scores.safetensors")["scores"]


def _text(context: Context, example: Example) -> str:
    """What a row says: the contents of its turns, or the text that its tokens stand for."""
    if example.tokens is None:
        return text_of(example)
    return str(context.tokenizer.decode(list(example.tokens[0]), skip_special_tokens=True))


# --- one number per row


def scalars(context: Context, signal: Signal) -> Tensor:
    """One number for every pool row [n], or two [n, 2] for "ifd"; NaN for rows that could not be
    encoded or did not fit in memory.
    """
    name, file = signal.name, f"{signal.name}.safetensors"

    def fill(artifact: Artifact) -> None:
        if name in _LABELS:
            _fill_from_base(context, name, artifact)
            return
        numbers = _ngrams(context) if name == "ngrams" else _difficulty(context, signal.fields)
        hash_ = write_tensors(artifact.path / file, {name: numbers}, {"recipe": artifact.digest})
        artifact.finish(files={file: hash_}, counts={"rows": len(numbers)})

    return context.make(recipes(context, signal)[-1], fill).tensors(file)[name]


def _fill_from_base(context: Context, name: str, artifact: Artifact) -> None:
    """What the base model alone says of each row, shard by shard: fp32 [n] for "loss", fp64 [n, 2]
    for "ifd".
    """
    encoded = context.encoded("pool")
    keeper = Partial(artifact, len(encoded), context.config.gradients.shard_rows)
    if keeper.missing():
        model = context.lend(None if context.executor.remote else context.load_base())
        begin = context.begin_id if name == "ifd" else None
        work = ScalarWork(model, name, context.pad_id, context.advance, begin=begin)
        # the answer alone is read too
        answers = np.where(encoded.codes == 0, encoded.supervised + 1, 0) if name == "ifd" else 0
        map_shards(
            context, keeper, work, encoded, label=_LABELS[name], tokens=encoded.lengths + answers
        )
    finish_scalars(
        keeper,
        name,
        artifact,
        context,
        _NOUNS[name],
        torch.float32 if name == "loss" else torch.float64,
    )


def finish_scalars(
    keeper: Partial, name: str, artifact: Artifact, context: Context, noun: str, dtype: torch.dtype
) -> None:
    """Joins the shards' numbers [n] into NAME.safetensors and completes the artifact. Raises
    DataError as `checks.check_values`.
    """
    numbers, about = torch.cat(keeper.read(name)).to(dtype), keeper.about()
    check_values(
        _known(numbers),
        context.encoded("pool"),
        noun,
        about["counts"].get("quarantined", {}),
        artifact,
    )
    file = f"{name}.safetensors"
    hash_ = write_tensors(artifact.path / file, {name: numbers}, {"recipe": artifact.digest})
    artifact.finish(files={file: hash_}, **about)
    keeper.remove()  # last: until `finish` the shards are the only copy


def _known(numbers: Tensor) -> Tensor:
    """bool [n]: the rows whose numbers [n] or [n, c] are all finite."""
    return numbers.isfinite().reshape(len(numbers), -1).all(dim=1)


def _ngrams(context: Context) -> Tensor:
    if "target" not in context.sides:
        raise UserError("n-gram weights need a target", remedy="Add --target FILE.")
    sides = {
        side: (_text(context, example) for example in rows) for side, rows in context.sides.items()
    }
    return torch.as_tensor(ngrams.importance(sides["pool"], sides["target"]))


def _difficulty_recipes(context: Context, fields: Sequence[str]) -> list[Recipe]:
    """`fields`: what difficulty is learned from, in place of embeddings."""
    settings = context.config.warmup.canonical()
    for unused in ("checkpoints", "scheduler", "warmup_ratio", "weight_decay", "weights"):
        settings.pop(unused, None)
    source = features_recipe(context, fields) if fields else embeddings_recipe(context, "pool")
    inputs = {"rows": context.encode_recipe("pool").digest, "features": source.digest}
    return [source, Recipe("difficulty", settings, inputs, context.compute_identity())]


def _difficulty(context: Context, fields: Sequence[str]) -> Tensor:
    encoded, settings = context.encoded("pool"), context.config.warmup
    source = features(context, fields) if fields else embeddings(context, "pool")
    plan = plan_warmup(encoded, settings)
    rows = [encoded[int(i)] for i in plan.rows]
    units = torch.cat([source[int(i) : int(i) + 1].float() for i in plan.rows])
    tokens = sum(len(rows[i]["input_ids"]) for step in plan.steps for batch in step for i in batch)
    context.progress.start(tokens, "tokens", "training the score net")
    model = attach_lora(context.load_base(), settings.lora)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # dropout, where the adapter has any
        net = difficulty.train_score_net(
            model,
            rows,
            units,
            plan.steps,
            lr=settings.lr,
            pad_id=context.pad_id,
            max_grad_norm=settings.max_grad_norm,
            advance=Stopping(context.progress).advance,
        )
    context.progress.done()
    numbers = difficulty.learned_difficulty(net, source)
    numbers[
        torch.as_tensor(encoded.codes != 0) if isinstance(source, Tensor) else ~source.usable
    ] = torch.nan
    return numbers
