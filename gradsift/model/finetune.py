"""Retrain and compare: does a subset train a better model than its controls?

Every subset gets the same base model, the same recipe and the same number of optimiser steps; what differs is the rows. Losses are kept per
test row and per seed, so that a difference comes with an interval that knows both sources of luck.
"""

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

from gradsift.compute.cpu.attention import short_rows
from gradsift.compute.cpu.matmul import quick_layers
from gradsift.compute.memory import Halving
from gradsift.config import FinetuneSettings
from gradsift.data.encode import token_batches
from gradsift.errors import ConfigError, DataError, OutOfMemory
from gradsift.model.load import attach_lora, load_model
from gradsift.model.losses import row_losses, token_nats
from gradsift.types import Encoded

EncodedSequence = Sequence[Encoded] | Sequence[Mapping[str, list[int]]]


@dataclass(frozen=True)
class HeldOut:
    """Losses on m test rows. `sums` float64 [m]: nats summed over the row's supervised tokens; `tokens` int64 [m]: how many those are."""

    sums: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per supervised token over the whole set: long answers weigh more than short ones."""
        return float(self.sums.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Interval:
    """A difference of two losses (a - b, nats per supervised token; negative = a is better) and its bootstrap interval."""

    difference: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Compared:
    """One line of a comparison. `losses` float64 [seeds, m]: nats per test row; `loss`: nats per supervised token, mean over seeds;
    `against`: the difference to the control, None for the control itself. `rows`, `supervised` (tokens): of the first seed's subset;
    `steps`: optimiser steps of each training."""

    name: str
    rows: int
    supervised: int
    steps: int
    losses: np.ndarray
    loss: float
    against: Interval | None


def finetune(
    model: str | Path | Callable[[], Any],
    rows: EncodedSequence,
    *,
    settings: FinetuneSettings | None = None,
    weights: np.ndarray | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """A freshly loaded `model` (a name, a folder, or what a function returns) trained on encoded `rows`; in eval mode, a PeftModel in LoRA mode.

    The loss of a step is the mean over the supervised tokens of its rows, each row weighted by `weights` [rows] (all 1 by default): sum of
    w_i times the row's nats / sum of w_i times its supervised tokens. Rows that supervise nothing are left out. `progress(step, steps)` is
    called after every step. The same seed gives the same weights on one kind of machine and number of threads; the process's random state
    stays as it was. Raises DataError when no row is usable or the training diverges, ConfigError for weights that do not fit.
    """
    settings = settings or FinetuneSettings()
    given, factors = _usable(rows, weights)
    steps = settings.steps_for(len(given))
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), ExitStack() as stack:
        torch.manual_seed(settings.seed)
        base = model() if callable(model) else load_model(str(model), device=device)
        net: nn.Module = attach_lora(base, settings.lora.model_copy(update={"seed": settings.seed})) if settings.mode == "lora" else base
        if settings.mode == "full":
            net.requires_grad_(True)
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.rate, weight_decay=settings.weight_decay)
        net.train()
        # not only around the forward pass: a checkpointed block runs again on the way back
        stack.enter_context(quick_layers(net.modules()))
        stack.enter_context(short_rows(settings.bf16 and torch.device(device).type == "cpu"))
        for step, chosen in enumerate(_steps(len(given), steps, settings), start=1):
            optimizer.param_groups[0]["lr"] = settings.rate * _schedule(step, steps, settings.warmup_ratio)
            loss = _accumulate(net, [given[i] for i in chosen], factors[chosen], settings, device)
            if not math.isfinite(loss):
                raise DataError(f"the training diverged at step {step}", remedy="Lower the learning rate.")
            nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if progress is not None:
                progress(step, steps)
    return net.eval()


def _usable(rows: EncodedSequence, weights: np.ndarray | None) -> tuple[list[Any], np.ndarray]:
    factors = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=np.float64)
    if factors.shape != (len(rows),) or not np.isfinite(factors).all() or (factors < 0).any():
        raise ConfigError(f"weights must be {len(rows):,} finite numbers that are not negative, got an array of shape {factors.shape}")
    kept = [i for i in range(len(rows)) if factors[i] > 0 and any(label != -100 for label in rows[i]["labels"][1:])]
    if not kept:
        raise DataError("no row to train on: none has both supervised tokens and a weight above 0", remedy="Look at the chosen rows.")
    return [rows[i] for i in kept], factors[kept]


def _steps(rows: int, steps: int, settings: FinetuneSettings) -> Iterator[np.ndarray]:
    """Row positions of each step: passes over the rows follow each other without a gap, each a fresh permutation."""
    rng = np.random.default_rng(settings.seed)
    size = settings.batch_size
    order = np.concatenate([rng.permutation(rows) for _ in range(math.ceil(steps * size / rows))])
    for step in range(steps):
        yield order[step * size : (step + 1) * size]


def _schedule(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the top rate at step 1..steps; the last step still moves."""
    rising = math.ceil(warmup_ratio * steps)
    return step / rising if step < rising else (steps - step + 1) / (steps - rising + 1)


def _accumulate(net: nn.Module, rows: list[Any], factors: np.ndarray, settings: FinetuneSettings, device: str) -> float:
    """Gradients of one step's loss, added up over micro-batches; returns the loss."""
    counts = np.array([sum(label != -100 for label in row["labels"][1:]) for row in rows])
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
    """Losses of `model` on encoded test rows, at most `token_budget` padded tokens at a time; the model's mode is left as it was.

    A row that supervises nothing counts 0 tokens. Raises DataError when no row supervises anything, OutOfMemory when one does not
    fit: losses of two models are compared row by row, so none may be left out of one.
    """
    halving = Halving()
    found = row_losses(model, rows, token_budget=token_budget, halving=halving)
    if halving.failed:
        raise OutOfMemory(
            f"test row {min(halving.failed)} does not fit in memory", remedy="Take it out, or encode with a smaller max_length."
        )
    if not found.tokens.any():
        raise DataError("no test row has a supervised token", remedy="Check the format and the chat template with `gradsift inspect`.")
    return HeldOut(found.total.numpy(), found.tokens.numpy())


def compare_subsets(
    model: str | Path,
    subsets: Mapping[str, EncodedSequence | Callable[[int], EncodedSequence]],
    test: EncodedSequence,
    settings: FinetuneSettings,
    seeds: Sequence[int],
    *,
    control: str = "random",
    level: float = 0.95,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Compared]:
    """Trains on every subset with every seed and tests: one line per subset, in the order given.

    A subset is encoded rows, or a function of the seed that returns them (a random control is drawn anew for every seed, so that its luck
    counts too). All trainings take the same number of optimiser steps: `settings.steps`, or what `epochs` passes over the largest subset
    need. `progress(done, trainings)` is called after every training. Each line but the control's has its difference to the control with
    the interval of `paired_interval`. Raises ConfigError when `control` is not among the subsets or there is no seed, and what `finetune`
    raises.
    """
    if control not in subsets or not seeds:
        raise ConfigError(f"a comparison needs at least one seed and a subset named {control!r}", remedy="Add the control to the subsets.")
    drawn = {name: [rows(seed) if callable(rows) else rows for seed in seeds] for name, rows in subsets.items()}
    steps = settings.steps_for(max(len(rows) for draws in drawn.values() for rows in draws))
    losses: dict[str, np.ndarray] = {}
    tokens, done = np.zeros(0, dtype=np.int64), 0
    for name, draws in drawn.items():
        sums = []
        for seed, rows in zip(seeds, draws, strict=True):
            tuned = finetune(model, rows, settings=settings.model_copy(update={"seed": seed, "steps": steps}), device=device)
            held = heldout_loss(tuned, test, settings.token_budget)
            tokens, done = held.tokens, done + 1
            sums.append(held.sums)
            if progress is not None:
                progress(done, len(seeds) * len(drawn))
        losses[name] = np.stack(sums)
    lines = []
    for name, draws in drawn.items():
        rng = np.random.default_rng(settings.seed)
        against = None if name == control else paired_interval(losses[name], losses[control], tokens, rng=rng, level=level)
        supervised = sum(label != -100 for i in range(len(draws[0])) for label in draws[0][i]["labels"][1:])
        loss = float(losses[name].mean(axis=0).sum() / tokens.sum())
        lines.append(Compared(name, len(draws[0]), supervised, steps, losses[name], loss, against))
    return lines


def paired_interval(
    losses_a: np.ndarray, losses_b: np.ndarray, tokens: np.ndarray, *, rng: np.random.Generator, level: float = 0.95, draws: int = 4000
) -> Interval:
    """The difference of two losses, paired over test rows, with the interval of `loss_draws`.

    losses_a [seeds a, m], losses_b [seeds b, m]: nats per test row; tokens [m]: supervised tokens of the rows. With a single seed its luck
    cannot be seen, and the interval covers the test rows only. Low and high are percentiles of the draws.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    drawn = loss_draws({"a": losses_a, "b": losses_b}, tokens, rng=rng, draws=draws)
    low, high = np.quantile(drawn["a"] - drawn["b"], [(1 - level) / 2, (1 + level) / 2])
    difference = (losses_a.mean(axis=0) - losses_b.mean(axis=0)).sum() / tokens.sum()
    return Interval(float(difference), float(low), float(high), level)


def loss_draws(
    losses: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    *,
    rng: np.random.Generator,
    draws: int = 4000,
    shares: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Hierarchical bootstrap of several losses on one test set: name -> [draws] nats per supervised token.

    losses: name -> [seeds, m] nats per test row; tokens [m]: supervised tokens of the rows. Each draw resamples the test rows (the same for
    all names: an easy row is easy for everyone) and, for each name by itself, the seeds. Resampling k seeds alone gives a variance that is
    (k - 1) / k of what it should be, a third too little for three seeds; so a draw's deviations from the mean over seeds are widened by
    sqrt(k / (k - 1)) (Rao and Wu 1988, the rescaled bootstrap). Any statistic of the draws (a difference, a ratio, a mean over test sets)
    has the interval of its percentiles. `shares`: name -> what `seed_shares` returned, where the same trainings are tested on several sets.
    """
    m = len(tokens)
    if shares is None:
        shares = {name: seed_shares(len(table), draws, rng) for name, table in losses.items()}
    for name, table in losses.items():
        if table.ndim != 2 or table.shape[1] != m or not table.size:
            raise ValueError(f"losses [seeds, m] of {name} and tokens [m] do not fit: {table.shape}, {tokens.shape}")
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in losses}
    for start in range(0, draws, 256):  # a block of draws at a time bounds the memory
        block = min(256, draws - start)
        rows = rng.multinomial(m, np.full(m, 1 / m), size=block)
        for name, table in losses.items():
            mean = table.mean(axis=0)
            means = mean + shares[name][start : start + block] @ (table - mean)
            drawn[name].append((rows * means).sum(axis=1) / (rows @ tokens))
    return {name: np.concatenate(parts) for name, parts in drawn.items()}


def seed_shares(k: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[draws, k]: the share of each of k seeds in a resample of them, widened as `loss_draws` says; zeros for a single seed."""
    if k == 1:
        return np.zeros((draws, 1))
    return math.sqrt(k / (k - 1)) * rng.multinomial(k, np.full(k, 1 / k), size=draws) / k
