"""Exact influence without projection: targets are preconditioned once and kept, pool gradients
stream past and are never stored.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.compute.batches import count_tokens, plan_batches
from gradsift.compute.cpu import matmul
from gradsift.compute.memory import Halving
from gradsift.errors import ConfigError, DataError, MismatchError, OutOfMemory
from gradsift.gradients.passes import Modules
from gradsift.rules.ranks import spearman
from gradsift.signals.curvature.kfac import Inverse
from gradsift.signals.curvature.passes import CurvaturePass, Layer, PassRow, pass_row
from gradsift.types import Encoded

log = logging.getLogger("gradsift")

AUTO_RANK = 32
MEMORY = 4 << 30
_OVERSAMPLE = 8
MANY = 32  # targets from which on holding gradients back pays
HELD = 192 << 20  # bytes of pool gradients held back
CHUNK = {"cpu": 1 << 22}  # numbers a contraction forms at once
GPU_CHUNK = 1 << 28


@dataclass(frozen=True)
class Targets:
    """Preconditioned gradients of m targets, ready to score any pool against.

    `members` [m]: the target rows of each, one or more. `full`: name -> [m, r, c]; `low`: name ->
    (left [m, r, q], right [m, c, q]), their product the rank-q approximation. `rank`: q, None when
    everything is kept whole. `kept`: name -> least share of a target's squared norm that its rank-q
    form has. `left_out`: target rows that do not fit in memory, in no target.
    """

    members: tuple[tuple[int, ...], ...]
    rank: int | None
    full: Mapping[str, Tensor]
    low: Mapping[str, tuple[Tensor, Tensor]]
    kept: Mapping[str, float] = field(default_factory=dict)
    left_out: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.members)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """(r, c) of a parameter, None where there is none of that name."""
        if name in self.low:
            left, right = self.low[name]
            return left.shape[1], right.shape[1]
        return tuple(self.full[name].shape[1:]) if name in self.full else None


def influence_scores(
    model: nn.Module,
    encoded_pool: Sequence[Encoded],
    encoded_target: Sequence[Encoded],
    preconditioner: Inverse | None,
    *,
    modules: Modules = None,
    target_batch: int = 1,
    drop_last: bool = False,
    rank: int | None = None,
    memory: int = MEMORY,
    token_budget: int = 1024,
    seed: int = 0,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yields (indices [b], scores [b, m]): score = <g_pool, (H + lambda I)^-1 g_target>, positive =
    training on the row helps the target. fp32, CPU.

    `prepare_targets` (which see for the arguments and errors) followed by `score_pool`: use those
    to score several pools.
    """
    targets = prepare_targets(
        model,
        encoded_target,
        preconditioner,
        modules=modules,
        target_batch=target_batch,
        drop_last=drop_last,
        rank=rank,
        memory=memory,
        token_budget=token_budget,
        seed=seed,
    )
    return score_pool(model, encoded_pool, targets, modules=modules, token_budget=token_budget)


def prepare_targets(
    model: nn.Module,
    encoded: Sequence[Encoded],
    preconditioner: Inverse | None,
    *,
    modules: Modules = None,
    target_batch: int = 1,
    drop_last: bool = False,
    rank: int | None = None,
    memory: int = MEMORY,
    token_budget: int = 1024,
    seed: int = 0,
) -> Targets:
    """The targets' gradients, multiplied by the inverse curvature (None: by nothing), grouped and,
    where asked or needed, compressed.

    target_batch: rows per target, in order; the loss of a target is the mean over all of its
      tokens. The released G-DIG code groups 2, and
      with `drop_last` loses an odd one, which otherwise makes a target of its own.
    rank: keep each module's matrix as its best rank-q approximation (randomised, seeded; whole
      where q >= min(r, c)). None: whole as long
      as all targets fit in `memory` bytes, else 32, which the log says. `rank_agreement` measures
      what that costs in order. Eigenvalue
      damping raises the rank of a gradient, which is at most its tokens; factored damping does not.

    When a batch runs out of memory it is halved; a row that does not fit alone is left out, as if
    it had not been given. Raises DataError for a target row without a supervised token or with a
    gradient that is not finite, ConfigError for a rank or target_batch below 1, MismatchError when
    the preconditioner was fitted for other parameters, OutOfMemory when no row fits.
    """
    if target_batch < 1 or (rank is not None and rank < 1):
        raise ConfigError(
            f"target_batch {target_batch}, rank {rank}", remedy="Both are at least 1."
        )
    passes = CurvaturePass(model, modules)
    if preconditioner is not None:
        preconditioner.check({name: layer.shape for name, layer in passes.layers.items()})
    lengths, supervised = count_tokens(encoded)
    if len(silent := np.flatnonzero(supervised == 0)):
        raise DataError(
            f"target row {silent[0]} has no supervised token",
            remedy="Remove it from the target set, or raise max_length.",
        )
    size = 4 * sum(layer.shape[0] * layer.shape[1] for layer in passes.layers.values())
    halving, left_out = Halving(), set[int]()
    while True:
        members = _members(
            [i for i in range(len(encoded)) if i not in left_out], target_batch, drop_last
        )
        if not members and left_out:
            raise OutOfMemory(
                f"{len(left_out)} target rows do not fit in memory, and no target is left",
                remedy="Use shorter target rows.",
            )
        if not members:
            raise DataError(
                "there are no targets",
                remedy="Pass at least one target row (target_batch of them with drop_last).",
            )
        if rank is None and size * len(members) > memory:
            rank = AUTO_RANK
            log.info(
                "%d targets of %.2f GB each do not fit in %.2f GB: kept at rank %d",
                len(members),
                size / 1e9,
                memory / 1e9,
                rank,
            )
        step = len(members) if rank is None else max(1, memory // size)
        kept = _Kept(passes, preconditioner, rank, seed)
        for start in range(0, len(members), step):
            part = members[start : start + step]
            kept.add(_gradients(passes, encoded, lengths, supervised, part, token_budget, halving))
        if halving.failed == left_out:
            return kept.targets(members, tuple(sorted(left_out)))
        # they leave their targets, and others may take their place there
        left_out = set(halving.failed)


def _members(
    rows: Sequence[int], target_batch: int, drop_last: bool
) -> tuple[tuple[int, ...], ...]:
    """The rows of each target."""
    stop = len(rows) - len(rows) % target_batch if drop_last else len(rows)
    return tuple(tuple(rows[a : min(a + target_batch, stop)]) for a in range(0, stop, target_batch))


def _gradients(
    passes: CurvaturePass,
    encoded: Sequence[Encoded],
    lengths: np.ndarray,
    supervised: np.ndarray,
    members: Sequence[Sequence[int]],
    token_budget: int,
    halving: Halving,
) -> dict[str, Tensor]:
    """name -> [m, r, c]: the gradient of each target's mean loss over all its tokens. Of no use
    where a row does not fit in memory.
    """
    total = {
        name: torch.zeros(len(members), *layer.shape, device=passes.device)
        for name, layer in passes.layers.items()
    }
    showing: list[int] = []
    added: set[tuple[str, int]] = set()
    places = np.concatenate([np.asarray(m) for m in members])
    owner = {int(i): k for k, member in enumerate(members) for i in member}
    weight = {
        int(i): float(supervised[i]) / float(supervised[list(member)].sum())
        for member in members
        for i in member
    }

    def visit(layer: Layer, x: Tensor, d: Tensor, lengths: list[int]) -> None:
        left, right = layer.sides(x.float(), d.float())
        for k, (index, t) in enumerate(zip(showing, lengths, strict=True)):
            if (layer.name, index) not in added:
                # else by a larger batch, before memory ran out at another layer
                matmul.add_matmul(
                    total[layer.name][owner[index]], left[k, :t].t(), right[k, :t], weight[index]
                )
                added.add((layer.name, index))

    def work(batch: np.ndarray) -> Tensor:
        rows = [pass_row(encoded, int(i), int(lengths[i])) for i in batch]
        showing[:] = [r.index for r in rows]
        return passes.show(rows, visit)

    for _ in halving.run(
        [places[batch] for batch in plan_batches(lengths[places], token_budget)], lengths, work
    ):
        pass  # the sums are all that is wanted
    for name, grads in total.items():
        fine = torch.isfinite(grads).flatten(1).all(1)
        if not bool(fine.all()):
            bad = members[int((~fine).nonzero()[0])]
            raise DataError(
                f"target row {bad[0]} has a gradient that is not finite",
                where=name,
                remedy="Remove it from the target set.",
            )
    return total


class _Kept:
    """Preconditions and compresses chunks of targets as they come."""

    def __init__(
        self, passes: CurvaturePass, preconditioner: Inverse | None, rank: int | None, seed: int
    ) -> None:
        self.passes, self.preconditioner, self.rank, self.seed = passes, preconditioner, rank, seed
        self.full: dict[str, list[Tensor]] = {}
        self.low: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.share: dict[str, float] = {}

    def add(self, grads: dict[str, Tensor]) -> None:
        for name in list(grads):
            grad = grads.pop(name)
            if self.preconditioner is not None:
                for k in range(len(grad)):
                    grad[k] = self.preconditioner.apply_inverse(name, grad[k])
            if self.rank is None or self.rank >= min(grad.shape[1:]):
                self.full.setdefault(name, []).append(grad)
            else:
                left, right, share = compress(grad, self.rank, self.seed, name)
                self.low.setdefault(name, []).append((left, right))
                self.share[name] = min(share, self.share.get(name, 1.0))

    def targets(self, members: tuple[tuple[int, ...], ...], left_out: tuple[int, ...]) -> Targets:
        full = {
            name: parts[0] if len(parts) == 1 else torch.cat(parts)
            for name, parts in self.full.items()
        }
        low = {
            name: (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
            for name, parts in self.low.items()
        }
        return Targets(members, self.rank, full, low, self.share, left_out)


def compress(matrices: Tensor, rank: int, seed: int, name: str) -> tuple[Tensor, Tensor, float]:
    """(left [m, r, q], right [m, c, q], least share of squared norm kept) of matrices [m, r, c]:
    left right^T is nearly the best approximation of rank q.

    Randomised range finding with two power iterations (Halko, Martinsson & Tropp, arXiv 0909.4061,
    algorithm 4.4); its numbers depend on (seed, name, shape) alone.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(key)
    c = matrices.shape[2]
    probe = torch.randn(c, min(rank + _OVERSAMPLE, *matrices.shape[1:]), generator=generator).to(
        matrices.device, matrices.dtype
    )
    base = torch.linalg.qr(matrices @ probe).Q
    for _ in range(2):
        base = torch.linalg.qr(matrices @ torch.linalg.qr(matrices.transpose(1, 2) @ base).Q).Q
    u, s, vh = torch.linalg.svd(base.transpose(1, 2) @ matrices, full_matrices=False)
    whole = matrices.flatten(1).square().sum(1)
    share = (s[:, :rank].square().sum(1) / whole)[whole > 0]
    left = base @ (u[:, :, :rank] * s[:, None, :rank])
    return (
        left.contiguous(),
        vh[:, :rank].transpose(1, 2).contiguous(),
        float(share.min()) if len(share) else 1.0,
    )


def score_pool(
    model: nn.Module,
    encoded: Sequence[Encoded],
    targets: Targets,
    *,
    modules: Modules = None,
    token_budget: int = 1024,
    halving: Halving | None = None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yields (indices [b], scores [b, m]) until every row of `encoded` was scored once: zeros first
    for rows without a supervised token, then by length, longest first. A row whose gradient is not
    finite scores NaN.

    When a batch runs out of memory it is halved, and a single row that does not fit scores NaN,
    with a warning in the log; `halving` learns of both. Between batches the model is what it was.
    Raises MismatchError when the model has other parameters than the targets.
    """
    passes = CurvaturePass(model, modules)
    for name, layer in passes.layers.items():
        if targets.shape(name) != layer.shape:
            remedy = "Prepare the targets with the same model and modules."
            raise MismatchError(
                f"the targets have no gradient of {name} {layer.shape}", remedy=remedy
            )
    return _stream(passes, encoded, targets, token_budget, halving or Halving())


def _stream(
    passes: CurvaturePass,
    encoded: Sequence[Encoded],
    targets: Targets,
    token_budget: int,
    halving: Halving,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    lengths, supervised = count_tokens(encoded)
    silent = np.flatnonzero(supervised == 0)
    if len(silent):
        yield silent, torch.zeros(len(silent), len(targets))
    scorer = Scorer(passes, targets)

    def work(batch: np.ndarray) -> Tensor:
        return scorer.add(batch, [pass_row(encoded, int(i), int(lengths[i])) for i in batch])

    for batch, made, _ in halving.run(plan_batches(lengths, token_budget), lengths, work):
        if made is None:
            yield batch, torch.full((1, len(targets)), torch.nan)
        if scorer.full:
            yield from scorer.flush()
    yield from scorer.flush()


class Scorer:
    """Scores batches of pool rows against targets.

    With many targets the product with them is a matter of reading them from memory: gradients of as
    many rows as `HELD` bytes take are then held back and multiplied at once. Otherwise, and where a
    batch alone would fill that, each module's gradients go once they are used.
    """

    def __init__(self, passes: CurvaturePass, targets: Targets) -> None:
        self.passes, self.targets = passes, targets
        capacity = HELD // (
            4 * sum(layer.shape[0] * layer.shape[1] for layer in passes.layers.values())
        )
        self.capacity = capacity if len(targets) >= MANY else 0
        self.held: dict[str, Tensor] = {}
        self.by_tokens: dict[str, bool] = {}  # by module, the same for all rows held
        self.done: list[tuple[np.ndarray, Tensor]] = []
        self.count = 0

    @property
    def full(self) -> bool:
        """True when the next batch, if as large as the last, would not be held."""
        return not self.done or self.count + len(self.done[-1][0]) > self.capacity

    def add(self, indices: np.ndarray, rows: Sequence[PassRow]) -> Tensor:
        """Runs a batch, and returns its losses; its scores come with the next `flush`."""
        first, b, m = self.count, len(rows), len(self.targets)
        hold = first + b <= self.capacity
        scores = torch.zeros(b, m, device=self.passes.device)

        def visit(layer: Layer, x: Tensor, d: Tensor, lengths: list[int]) -> None:
            left, right = layer.sides(x.float(), d.float())
            low = self.targets.low.get(layer.name)
            choice = self.by_tokens if hold else {}
            if low is not None and choice.setdefault(
                layer.name, cheaper_by_tokens(left, right, low[1], self.capacity if hold else b)
            ):
                _add_tokens(scores, left, right, *low)
            elif hold:
                if layer.name not in self.held:
                    self.held[layer.name] = torch.empty(
                        self.capacity, *layer.shape, device=self.passes.device
                    )
                matmul.bmm(
                    left.transpose(1, 2), right, out=self.held[layer.name][first : first + b]
                )
            else:
                step = max(1, _chunk(left.device) // (left.shape[2] * right.shape[2]))
                for start in range(0, b, step):
                    part = slice(start, start + step)
                    _add_product(
                        scores[part],
                        matmul.bmm(left[part].transpose(1, 2), right[part]),
                        self.targets,
                        layer.name,
                    )

        losses = self.passes.show(rows, visit)
        self.done.append((indices, scores))
        self.count += b if hold else 0
        return losses

    def flush(self) -> list[tuple[np.ndarray, Tensor]]:
        """(indices, scores on the CPU) of the batches since the last flush."""
        done, self.done = self.done, []
        if self.count:
            scores = torch.cat([scores for _, scores in done])
            for name, grads in self.held.items():
                if not self.by_tokens.get(name):
                    _add_product(scores[: self.count], grads[: self.count], self.targets, name)
            done = [
                (i, s)
                for (i, _), s in zip(done, scores.split([len(i) for i, _ in done]), strict=True)
            ]
        self.count, self.by_tokens = 0, {}
        return [(indices, scores.cpu()) for indices, scores in done]


def _chunk(device: torch.device) -> int:
    return CHUNK.get(device.type, GPU_CHUNK)


def _add_product(scores: Tensor, grads: Tensor, targets: Targets, name: str) -> None:
    """scores [b, m] += <grads_b, target_m> for grads [b, r, c]; low-rank targets are multiplied
    out, a few at a time.
    """
    flat = grads.flatten(1)
    if name in targets.full:
        matmul.add_matmul(scores, flat, targets.full[name].flatten(1).t())
        return
    left, right = targets.low[name]
    step = max(1, _chunk(grads.device) // flat.shape[1])
    for start in range(0, len(left), step):
        part = slice(start, start + step)
        matmul.add_matmul(
            scores[:, part], flat, torch.bmm(left[part], right[part].transpose(1, 2)).flatten(1).t()
        )


def cheaper_by_tokens(left: Tensor, right: Tensor, low: Tensor, rows: int) -> bool:
    """True when the products left_t p_m and right_t q_m cost less than gradients and targets
    multiplied out, the latter once for `rows` rows.
    """
    (b, t, r), (m, c, q) = left.shape, low.shape
    return b * t * m * q * (r + c) <= b * t * r * c + b * m * r * c + m * q * r * c * b / rows


def _add_tokens(scores: Tensor, left: Tensor, right: Tensor, p: Tensor, q: Tensor) -> None:
    """scores [b, m] += sum_t sum_k (left_t p_m)_k (right_t q_m)_k for targets p_m q_m^T, [m, r, k]
    and [m, c, k]: no gradient is formed.
    """
    (b, t, r), (m, c, k) = left.shape, q.shape
    step = max(1, _chunk(left.device) // (b * t * k))
    for start in range(0, m, step):
        part = slice(start, start + step)
        ps, qs = p[part].permute(1, 0, 2).reshape(r, -1), q[part].permute(1, 0, 2).reshape(c, -1)
        scores[:, part] += (
            (matmul.matmul(left, ps) * matmul.matmul(right, qs)).sum(1).view(b, -1, k).sum(2)
        )


def rank_agreement(
    model: nn.Module,
    encoded_pool: Sequence[Encoded],
    encoded_target: Sequence[Encoded],
    preconditioner: Inverse | None,
    rank: int = AUTO_RANK,
    *,
    modules: Modules = None,
    target_batch: int = 1,
    token_budget: int = 1024,
    seed: int = 0,
) -> Tensor:
    """Spearman correlation [m], for each target, of rank-q scores with those of whole matrices,
    over the given pool rows that have a finite score: pass a sample of both, for all whole matrices
    are held at once. Equal scores agree (1), also where they are the same for all rows; where only
    one of the two orders the rows, the agreement is 0. Errors as `prepare_targets`.
    """
    columns = []
    for q in (rank, None):
        stream = influence_scores(
            model,
            encoded_pool,
            encoded_target,
            preconditioner,
            modules=modules,
            target_batch=target_batch,
            rank=q,
            memory=2**62,
            token_budget=token_budget,
            seed=seed,
        )
        parts = list(stream)
        order = torch.from_numpy(np.concatenate([indices for indices, _ in parts]))
        columns.append(torch.cat([scores for _, scores in parts])[order.argsort()])
    fine = torch.isfinite(torch.cat(columns, 1)).all(1)
    reduced, whole = (scores[fine].double().numpy().T for scores in columns)
    agreement = [
        1.0 if np.array_equal(a, b) else spearman(a, b) for a, b in zip(reduced, whole, strict=True)
    ]
    return torch.tensor(agreement).nan_to_num(0.0)
