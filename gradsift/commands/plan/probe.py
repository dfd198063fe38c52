"""The probe of a plan: a few dozen rows through the model, to learn its speed and memory here."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from gradsift.compute import machine
from gradsift.compute.batches import pad_batch, token_batches
from gradsift.compute.cpu.matmul import quick_layers
from gradsift.config import WarmupSettings
from gradsift.data.encode import EncodedRows, encode
from gradsift.gradients.adam import Adam
from gradsift.gradients.passes import extract, output_dim
from gradsift.model.layers import tracked_modules
from gradsift.model.lora import attach_lora
from gradsift.model.losses import row_losses
from gradsift.model.warmup import plan_warmup
from gradsift.signals.embeddings import hidden_size
from gradsift.stages.pipeline import Pipeline
from gradsift.types import IGNORE, Signal


@dataclass(frozen=True)
class Rates:
    """What the probe measured, in tokens per second and bytes."""

    train: float
    gradients: float
    forward: float
    encode_rows: float
    multiply: float  # fp32 multiply-adds per second
    peak_bytes: int
    used_bytes: int  # that is not free again afterwards
    dim: int
    parameters: int
    hidden: int
    factors: int  # bytes of a shard's curvature sums
    tracked: int  # bytes of a whole gradient


PROBE = 48  # rows whose gradient is taken to learn the machine's speed


# What a stage does with the model.
TRAINING = {"warmup", "difficulty", "tuned"}


GRADIENTS = {"gradients", "curvature", "influence"}


FORWARD = {"loss", "ifd", "embeddings", "tuned"}


ANY = frozenset(TRAINING | GRADIENTS | FORWARD)


def probe(
    pipeline: Pipeline, encoded: EncodedRows, needs: Collection[Signal], todo: Collection[str] = ANY
) -> Rates:
    """Runs the model as the stages named in `todo` will (others get a rate of 1), to learn speed
    and memory on this machine: on rows spread over the pool's lengths, and the batches that are the
    largest. Where `needs` names no signal, the model is not loaded.
    """
    started = time.perf_counter()
    encode(
        pipeline.sides["pool"].take(range(min(500, len(pipeline.sides["pool"])))),
        pipeline.tokenizer,
        pipeline.config.encode,
    )
    encode_rate = min(500, len(pipeline.sides["pool"])) / (time.perf_counter() - started)
    a, b = torch.randn(1024, 2048), torch.randn(2048, 128)
    multiply = a.numel() * 128 / min(_timed(lambda: a @ b) for _ in range(5))
    if not needs:
        return Rates(
            1,
            1,
            1,
            encode_rate,
            multiply,
            machine.peak_bytes(),
            machine.used_bytes(),
            0,
            0,
            0,
            0,
            0,
        )
    model = attach_lora(pipeline.load_base(), pipeline.config.warmup.lora)
    settings = pipeline.config.gradients
    modules = pipeline.modules
    names = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    train, taken, forward = 1.0, 1.0, 1.0
    if TRAINING & set(todo):
        batches = _micro_batches(encoded, pipeline.config.warmup)
        tokens = sum(len(encoded[i]["input_ids"]) for batch in batches for i in batch)
        train = tokens / _timed(lambda: _pass(model, encoded, batches, pipeline.pad_id))
    rows = [
        encoded[i] for i in _spread_and_largest(encoded, settings.shard_rows, settings.token_budget)
    ]
    tokens = sum(len(row["input_ids"]) for row in rows)
    if GRADIENTS & set(todo):
        adam = None
        if modules is None:
            zeros = {name: torch.zeros_like(parameter) for name, parameter in names.items()}
            adam = Adam(
                zeros, {name: torch.ones_like(parameter) for name, parameter in names.items()}, 1
            )

        def gradients() -> None:
            for start in range(0, len(rows), settings.shard_rows):
                part, options = (
                    rows[start : start + settings.shard_rows],
                    {"transform": adam, "modules": modules},
                )
                for _ in extract(
                    model,
                    part,
                    projection=pipeline.projection,
                    token_budget=settings.token_budget,
                    **options,
                ):
                    pass

        gradients()  # draws the projection's maps, once
        taken = tokens / _timed(gradients)
    if FORWARD & set(todo):
        forward = tokens / _timed(lambda: row_losses(model, rows, pad_id=pipeline.pad_id))
    dim = output_dim(model, pipeline.projection, modules)
    parameters = sum(p.numel() for p in names.values())
    shapes = [
        tuple(cast(Any, module).weight.shape) for module in tracked_modules(model, modules).values()
    ]
    factors, tracked = 4 * sum(r * r + c * c for r, c in shapes), 4 * sum(r * c for r, c in shapes)
    used, peak = machine.used_bytes(), machine.peak_bytes()
    return Rates(
        train,
        taken,
        forward,
        encode_rate,
        multiply,
        peak,
        used,
        dim,
        parameters,
        hidden_size(model),
        factors,
        tracked,
    )


def _spread_and_largest(encoded: EncodedRows, shard_rows: int, token_budget: int) -> list[int]:
    """First the rows of the batch with the most tokens that a shard can give, which takes what a
    stage takes at the most, then rows spread over the lengths.
    """
    usable = np.flatnonzero(encoded.codes == 0)
    shards = [usable[start : start + shard_rows] for start in range(0, len(usable), shard_rows)]
    batches = [
        shard[batch]
        for shard in shards
        for batch in token_batches(encoded.lengths[shard], token_budget)
    ]
    largest = max(batches, key=lambda batch: len(batch) * encoded.lengths[batch].max()).tolist()
    by_length = usable[np.argsort(encoded.lengths[usable], kind="stable")]
    spread = by_length[np.linspace(0, len(by_length) - 1, min(PROBE, len(by_length))).astype(int)]
    return [*largest, *sorted(set(spread.tolist()) - set(largest))]


def _micro_batches(encoded: EncodedRows, settings: WarmupSettings) -> list[list[int]]:
    """The first micro-batches of the warm-up, of `PROBE` rows or a few more, and its largest."""
    planned = plan_warmup(encoded, settings)
    batches = [planned.rows[piece].tolist() for step in planned.steps for piece in step]
    counts = np.cumsum([len(batch) for batch in batches])
    largest = max(batches, key=lambda batch: len(batch) * encoded.lengths[batch].max())
    return [*batches[: int(np.searchsorted(counts, PROBE)) + 1], largest]


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _pass(model: Any, encoded: EncodedRows, batches: list[list[int]], pad_id: int) -> None:
    """Forward and backward, as the warm-up's steps; each in a call of its own, so that nothing of
    it is there when the next one starts.
    """

    def step(batch: list[int]) -> None:
        ids, mask, labels = pad_batch([encoded[i] for i in batch], pad_id)
        kept = labels[:, 1:] != IGNORE
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1][kept].float()
        torch.nn.functional.cross_entropy(logits, labels[:, 1:][kept]).backward()

    with quick_layers(model.modules()):
        for batch in batches:
            step(batch)
    model.zero_grad(set_to_none=True)
