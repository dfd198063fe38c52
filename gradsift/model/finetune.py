"""One training on encoded rows, and the held-out loss of its model, kept per test row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gradsift.compute.batches import token_batches
from gradsift.compute.cpu.attention import short_rows
from gradsift.compute.cpu.matmul import quick_layers
from gradsift.compute.memory import Halving
from gradsift.config import FinetuneSettings
from gradsift.errors import ConfigError, DataError, OutOfMemory
from gradsift.model.load import load_model
from gradsift.model.lora import attach_lora
from gradsift.model.losses import row_losses, token_nats
from gradsift.types import IGNORE, Encoded

EncodedSequence = Sequence[Encoded] | Sequence[Mapping[str, list[int]]]


@dataclass(frozen=True)
class HeldOut:
    """Losses on m test rows. `sums` float64 [m]: nats summed over the row's supervised tokens;
    `tokens` int64 [m]: how many those are.
    """

    sums: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per supervised token over the whole set: long answers weigh more than short ones."""
        return float(self.sums.sum() / self.tokens.sum())


def finetune(
    model: str | Path | Callable[[], Any],
    rows: EncodedSequence,
    *,
    settings: FinetuneSettings | None = None,
    weights: np.ndarray | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """A freshly loaded `model` (a name, a folder, or what a function returns) trained on encoded
    `rows`; in eval mode, a PeftModel in LoRA mode.

    The loss of a step is the mean over the supervised tokens of its rows, each row weighted by
    `weights` [rows] (all 1 by default): sum of w_i times the row's nats / sum of w_i times its
    supervised tokens. Rows that supervise nothing are left out. `progress(step, steps)` is called
    after every step. The same seed gives the same weights on one kind of machine and number of
    threads; the process's random state stays as it was. Raises DataError when no row is usable or
    the training diverges, ConfigError for weights that do not fit.
    """
    settings = settings or FinetuneSettings()
    given, factors = _usable(rows, weights)
    steps = settings.steps_for(len(given))
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), ExitStack() as stack:
        torch.manual_seed(settings.seed)
        base = model() if callable(model) else load_model(str(model), device=device)
        net: nn.Module = (
            attach_lora(base, settings.lora.model_copy(update={"seed": settings.seed}))
            if settings.mode == "lora"
            else base
        )
        if settings.mode == "full":
            net.requires_grad_(True)
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.rate, weight_decay=settings.weight_decay)
        net.train()
        # not only around the forward pass: a checkpointed block runs again on the way back
        stack.enter_context(quick_layers(net.modules()))
        stack.enter_context(short_rows(settings.bf16 and torch.device(device).type == "cpu"))
        for step, chosen in enumerate(step_rows(len(given), steps, settings), start=1):
            optimizer.param_groups[0]["lr"] = settings.rate * rate_factor(
                step, steps, settings.warmup_ratio
            )
            loss = _accumulate(net, [given[i] for i in chosen], factors[chosen], settings, device)
            if not math.isfinite(loss):
                raise DataError(
                    f"the training diverged at step {step}", remedy="Lower the learning rate."
                )
            nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if progress is not None:
                progress(step, steps)
    return net.eval()


def _usable(rows: EncodedSequence, weights: np.ndarray | None) -> tuple[list[Any], np.ndarray]:
    factors = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=np.float64)
    if factors.shape != (len(rows),) or not np.isfinite(factors).all() or (factors < 0).any():
        raise ConfigError(
            f"weights must be {len(rows):,} finite numbers that are not negative, got an array of"
            f" shape {factors.shape}"
        )
    kept = [
        i
        for i in range(len(rows))
        if factors[i] > 0 and any(label != IGNORE for label in rows[i]["labels"][1:])
    ]
    if not kept:
        raise DataError(
            "no row to train on: none has both supervised tokens and a weight above 0",
            remedy="Look at the chosen rows.",
        )
    return [rows[i] for i in kept], factors[kept]


def step_rows(rows: int, steps: int, settings: FinetuneSettings) -> Iterator[np.ndarray]:
    """Row positions of each step: passes over the rows follow each other without a gap, each a
    fresh permutation.
    """
    rng = np.random.default_rng(settings.seed)
    size = settings.batch_size
    order = np.concatenate([rng.permutation(rows) for _ in range(math.ceil(steps * size / rows))])
    for step in range(steps):
        yield order[step * size : (step + 1) * size]


def rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the top rate at step 1..steps; the last step still moves."""
    rising = math.ceil(warmup_ratio * steps)
    return step / rising if step < rising else (steps - step + 1) / (steps - rising + 1)


def _accumulate(
    net: nn.Module, rows: list[Any], factors: np.ndarray, settings: FinetuneSettings, device: str
) -> float:
    """Gradients of one step's loss, added up over micro-batches; returns the loss."""
    counts = np.array([sum(label != IGNORE for label in row["labels"][1:]) for row in rows])
    total, loss = float(factors @ counts), 0.0
    for part in token_batches([len(row["input_ids"]) for row in rows], settings.token_budget):
        shares = torch.tensor(factors[part] / total, dtype=torch.float32, device=device)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=settings.bf16):
            nats, owner = token_nats(net, [rows[i] for i in part])
        part_loss = nats @ shares[owner]
        part_loss.backward()
        loss += part_loss.item()
    return loss


def heldout_loss(model: nn.Module, rows: EncodedSequence, token_budget: int = 2048) -> HeldOut:
    """Losses of `model` on encoded test rows, at most `token_budget` padded tokens at a time; the
    model's mode is left as it was.

    A row that supervises nothing counts 0 tokens. Raises DataError when no row supervises anything,
    OutOfMemory when one does not fit: losses of two models are compared row by row, so none may be
    left out of one.
    """
    halving = Halving()
    found = row_losses(model, rows, token_budget=token_budget, halving=halving)
    if halving.failed:
        raise OutOfMemory(
            f"test row {min(halving.failed)} does not fit in memory",
            remedy="Take it out, or encode with a smaller max_length.",
        )
    if not found.tokens.any():
        raise DataError(
            "no test row has a supervised token",
            remedy="Check the format and the chat template with `gradsift inspect`.",
        )
    return HeldOut(found.total.numpy(), found.tokens.numpy())
