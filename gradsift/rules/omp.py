"""Orthogonal matching pursuit: choose atoms whose weighted sum is close to a target vector.

Source: GRAD-MATCH (Killamsetty et al. 2021, section 3.2), in the form TAGCOS uses per cluster
(Zhang et al. 2024, section 3.3).

One pass over the atoms per round (the correlations); Gram entries are computed among the chosen
atoms only, as they are picked, and a Cholesky factor of them is extended by one row: n x d x k +
k^2 x d operations for k picks, and never an n x n matrix. The correlations are made in the atoms'
precision (float32 for float16 stores); choosing among near ties, the solves and the residual are
float64, so that duplicate atoms tie exactly and the lowest index wins.

Differences from the routine released with TAGCOS:

- It breaks when the atom just added is the one with the most negative coefficient, and leaves
  coefficients of a solve that still had that atom; here the answer is always a completed solve of
  the atoms returned.
- It stops on a second pick of a chosen atom: `on_repeat="stop"`. Here `"mask"` leaves tried atoms
out of the search and goes on.
- It goes on while the best correlation is negative; here that ends the search, as does an all-zero
target (there a division by zero).
- It solves singular systems (duplicate atoms, ridge 0) by least squares; here an atom that depends
on the chosen ones is not usable.
- Its rounds are at most `budget` even when atoms were dropped; that holds here for `"stop"`. With
`"mask"` each atom is tried at most once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .blocks import BLOCK, Rows, check_budget, check_rng, floating, read, sizes, spans

# bytes of atoms kept in float32 between rounds; larger ones are read again each round (same
# numbers)
RESIDENT = 1 << 30


@dataclass(frozen=True)
class Match:
    """`indices` int64 [k] in the order in which they were picked; `coefficients` float64 [k];
    `residual_norms` float64 [r], L2.

    r is the number of completed solves, more than k when atoms were dropped; the last one is the
    residual of the answer.
    """

    indices: Tensor
    coefficients: Tensor
    residual_norms: Tensor

    def __len__(self) -> int:
        return len(self.indices)


def match(
    atoms: Rows,
    target: Any,
    budget: int,
    *,
    ridge: float,
    nonnegative: bool = True,
    on_repeat: Literal["mask", "stop"] = "mask",
    tol: float = 1e-4,
) -> Match:
    """Choose up to `budget` rows of atoms [n, d] and coefficients x so that their weighted sum is
    near target [d].

    Each round adds the atom with the largest correlation with the residual r (largest absolute
    value if not `nonnegative`; ties to the lowest index). The first atom gets x = <f, target> /
    |f|^2, without ridge; from the second on x = (F F' + ridge I)^-1 F target. If `nonnegative`, the
    most negative coefficient is dropped and the rest solved again until none is negative.

    Ends when |r| < tol |target|, when the best correlation is <= 0 (up to rounding), when the
    budget or the atoms are used up, and with `on_repeat="stop"` also on the second pick of a chosen
    atom, when the atom just added is dropped, and after `budget` rounds. Returns fewer than
    `budget` atoms then. Raises ValueError for bad shapes, values that are not finite, ridge or tol
    < 0, and an unknown `on_repeat`.
    """
    search = Search(
        atoms, target, ridge=ridge, nonnegative=nonnegative, on_repeat=on_repeat, tol=tol
    )
    return search.run(check_budget(budget, search.n))


def fill(
    atoms: Rows,
    target: Any,
    budget: int,
    *,
    ridge: float,
    refill: Literal["repeat", "random", "none"] = "repeat",
    rng: np.random.Generator | None = None,
    found: Match | None = None,
    **options: Any,
) -> Tensor:
    """Choose `budget` atoms by `match`, and make up for what it leaves open -> int64 [<= budget],
    in pick order.

    `refill="repeat"` matches the same target again with the atoms not yet chosen until the budget
    is spent or a call adds nothing (the outer loop released with TAGCOS, which has no exit in the
    latter case); `"random"` draws the rest uniformly from `rng` (GRAD-MATCH); `"none"` returns what
    one call found. `ridge` and `options` are those of `match`; `found`: what it found with them,
    where it was called before. Raises ValueError like `match`, for an unknown `refill`, and for
    `"random"` without `rng`.
    """
    if refill not in ("repeat", "random", "none"):
        raise ValueError(f'refill must be "repeat", "random" or "none", got {refill!r}')
    if refill == "random":
        rng = check_rng(rng)
    search = Search(atoms, target, ridge=ridge, **options)
    budget = check_budget(budget, search.n)
    chosen = (found or search.run(budget)).indices
    while refill == "repeat" and len(chosen) < budget:
        more = search.run(budget - len(chosen), without=chosen).indices
        if len(more) == 0:
            break
        chosen = torch.cat([chosen, more])
    if refill == "random" and rng is not None and len(chosen) < budget:
        left = np.setdiff1d(np.arange(search.n), chosen.numpy())
        drawn = rng.choice(left, size=budget - len(chosen), replace=False)
        chosen = torch.cat([chosen, torch.from_numpy(drawn)])
    return chosen


class Search:
    """The atoms, the target and the options of one matching problem; `run` may be called again with
    fewer atoms.
    """

    def __init__(
        self,
        atoms: Rows,
        target: Any,
        *,
        ridge: float,
        nonnegative: bool = True,
        on_repeat: str = "mask",
        tol: float = 1e-4,
    ) -> None:
        self.n, self.d = sizes(atoms, "atoms")
        goal = floating(target, "target", 1)
        if len(goal) != self.d:
            raise ValueError(f"target has {len(goal)} entries, the atoms have {self.d} columns")
        if not ridge >= 0 or not tol >= 0:
            raise ValueError(f"ridge and tol must be >= 0, got {ridge} and {tol}")
        if on_repeat not in ("mask", "stop"):
            raise ValueError(f'on_repeat must be "mask" or "stop", got {on_repeat!r}')
        self.ridge, self.nonnegative, self.tol, self.stop = (
            float(ridge),
            nonnegative,
            float(tol),
            on_repeat == "stop",
        )
        self.target = goal.detach().cpu().double().numpy()
        keep = isinstance(atoms, Tensor) and atoms.dtype in (torch.float32, torch.float64)
        keep = keep or self.n * self.d * 4 <= RESIDENT
        self.blocks: list[Callable[[], Tensor]] = [
            _reader(atoms, a, b, keep) for a, b in spans(self.n)
        ]
        # the last residual and its correlations
        self._seen: tuple[np.ndarray, np.ndarray] | None = None

    def correlations(self, residual: np.ndarray) -> np.ndarray:
        """<atom, residual> for every atom, [n] in the atoms' precision. A round that changed
        nothing costs no second pass.
        """
        if self._seen is None or self._seen[0] is not residual:
            found = []
            for block in self.blocks:
                atoms = block()
                found.append(atoms @ torch.from_numpy(residual).to(atoms))
            self._seen = residual, torch.cat(found).cpu().numpy()
            if not np.isfinite(self._seen[1]).all():
                raise ValueError("atoms hold NaN or infinite values")
        return self._seen[1]

    def pick(self, residual: np.ndarray, closed: np.ndarray) -> tuple[int, np.ndarray, float]:
        """(index, atom, correlation) of the open atom that fits best; correlation 0 where none fits
        beyond rounding.
        """
        found = self.correlations(residual)
        score = np.where(closed, -np.inf, found if self.nonnegative else np.abs(found))
        index = int(score.argmax())
        atom = self._atoms(index // BLOCK, [index % BLOCK])[0]
        slack = 4 * float(
            np.finfo(found.dtype).eps * np.linalg.norm(atom) * np.linalg.norm(residual)
        )
        if score[index] <= slack:
            return index, atom, 0.0
        near = np.flatnonzero(score >= score[index] - slack)
        if len(near) > 1:
            # settled in float64, by a sum that gives equal atoms equal bits wherever they stand
            exact = np.concatenate(
                [
                    self._exact(block, near, residual)
                    for block in range(near[0] // BLOCK, near[-1] // BLOCK + 1)
                ]
            )
            if int(near[exact.argmax()]) != index:
                index = int(near[exact.argmax()])
                atom = self._atoms(index // BLOCK, [index % BLOCK])[0]
        return index, atom, float(score[index])

    def _exact(self, block: int, near: np.ndarray, residual: np.ndarray) -> np.ndarray:
        here = near[near // BLOCK == block] % BLOCK
        values = (self._atoms(block, here.tolist()) * residual).sum(1)
        return values if self.nonnegative else np.abs(values)

    def _atoms(self, block: int, places: list[int]) -> np.ndarray:
        return self.blocks[block]()[places].detach().cpu().double().numpy()

    def run(self, budget: int, without: Tensor | None = None) -> Match:
        closed = np.zeros(self.n, dtype=bool)
        if without is not None:
            closed[without.numpy()] = True
        size = float(np.linalg.norm(self.target))
        residual, norms = self.target, [size]
        solve = _Solver(self.d, self.target, self.ridge)
        rounds = budget if self.stop else self.n
        for _ in range(rounds if size > 0 else 0):
            if len(solve.chosen) >= budget or norms[-1] < self.tol * size or closed.all():
                break
            index, atom, correlation = self.pick(residual, closed)
            if correlation <= 0 or (self.stop and index in solve.chosen):
                break
            closed[index] = not self.stop
            if not solve.add(index, atom):
                if self.stop:
                    break
                continue
            kept = solve.settle() if self.nonnegative else True
            if solve.changed:
                residual = self.target - solve.x @ solve.atoms[: len(solve.x)]
                norms.append(float(np.linalg.norm(residual)))
            if not kept and self.stop:
                break
        indices = torch.tensor(solve.chosen, dtype=torch.int64)
        return Match(
            indices, torch.from_numpy(solve.x.copy()), torch.tensor(norms[1:], dtype=torch.float64)
        )


class _Solver:
    """The chosen atoms, and the inverse M of the Cholesky factor of their ridged Gram matrix; x =
    M' M F target.
    """

    def __init__(self, d: int, target: np.ndarray, ridge: float) -> None:
        self.chosen: list[int] = []
        self.x = np.zeros(0)
        self.target, self.ridge = target, ridge
        self.atoms, self.gram, self.inverse, self.against = (
            np.zeros((8, d)),
            np.zeros((8, 8)),
            np.zeros((8, 8)),
            np.zeros(8),
        )
        self.rounds, self.changed = 0, False

    def add(self, index: int, atom: np.ndarray) -> bool:
        """Take one more atom and solve. False, with nothing changed, if the chosen atoms already
        span it (ridge 0).
        """
        k = len(self.chosen)
        if k == len(self.atoms):
            self._grow()
        column = self.atoms[:k] @ atom
        square = float(atom @ atom)
        below = self.inverse[:k, :k] @ column
        pivot = square + self.ridge - float(below @ below)
        if pivot <= 1e-12 * (square + self.ridge):
            return False
        self.atoms[k], self.against[k] = atom, atom @ self.target
        self.gram[k, :k] = self.gram[:k, k] = column
        self.gram[k, k] = square
        root = np.sqrt(pivot)
        self.inverse[k, :k] = -(below @ self.inverse[:k, :k]) / root
        self.inverse[k, k] = 1 / root
        self.chosen.append(index)
        self.rounds += 1
        before = self.x
        self.x = np.array([self.against[0] / square]) if self.rounds == 1 else self._solution()
        self._before = before
        self.changed = True
        return True

    def settle(self) -> bool:
        """Drop the most negative coefficient and solve again until none is negative. False if the
        atom just added was dropped.
        """
        kept, dropped = True, 0
        while len(self.x) and self.x.min() < 0:
            worst = int(self.x.argmin())
            last = kept and worst == len(self.x) - 1
            self._drop(worst)
            dropped += 1
            if last:
                kept = False
                if dropped == 1:  # back to the solve of the round before: nothing new was completed
                    self.x, self.changed = self._before, False
                    return False
            self.x = self._solution()
        return kept

    def _solution(self) -> np.ndarray:
        k = len(self.chosen)
        factor = self.inverse[:k, :k]
        return (factor @ self.against[:k]) @ factor

    def _drop(self, place: int) -> None:
        k = len(self.chosen) - 1
        del self.chosen[place]
        if place == k:
            return
        for rows in (self.atoms, self.gram, self.against):
            rows[place:k] = rows[place + 1 : k + 1]
        self.gram[:k, place:k] = self.gram[:k, place + 1 : k + 1]
        factor = np.linalg.cholesky(self.gram[:k, :k] + self.ridge * np.eye(k))
        lower = torch.linalg.solve_triangular(
            torch.from_numpy(factor), torch.eye(k, dtype=torch.float64), upper=False
        )
        self.inverse[:k, :k] = lower.numpy()

    def _grow(self) -> None:
        k = len(self.atoms)
        self.atoms = np.concatenate([self.atoms, np.zeros_like(self.atoms)])
        self.against = np.concatenate([self.against, np.zeros(k)])
        for name in ("gram", "inverse"):
            wide = np.zeros((2 * k, 2 * k))
            wide[:k, :k] = getattr(self, name)
            setattr(self, name, wide)


def _reader(atoms: Rows, a: int, b: int, keep: bool) -> Callable[[], Tensor]:
    if not keep:
        return lambda: read(atoms, a, b)
    block = read(atoms, a, b)
    return lambda: block
