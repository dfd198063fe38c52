"""How often and on which rows a method is asked, so that shares of groups and a budget in tokens
hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from gradsift.commands.budget import Budget
from gradsift.commands.select.constraints import Bound, Constraints, Screen
from gradsift.commands.select.mix import mixed
from gradsift.errors import BudgetError, DataError
from gradsift.store.rows import RowView
from gradsift.types import Selector, Signal, Signals, Subset, counted


def narrow(signals: Signals, places: np.ndarray, needs: frozenset[Signal]) -> Signals:
    """The declared signals over some of the rows, in the order of `places`."""
    at = torch.as_tensor(places)

    def part(value: Any) -> Any:
        if isinstance(value, list):
            return [part(rows) for rows in value]
        return value[at] if isinstance(value, Tensor) else RowView(value, at)

    every = len(places) == signals.n and bool((places == np.arange(signals.n)).all())
    # A target's signals are there only where a target was given.
    values = {s: signals[s] for s in needs if s in signals.values}
    if every:
        return replace(signals, values=values)
    return replace(
        signals,
        values={s: part(value) if s.side == "pool" else value for s, value in values.items()},
        n=len(places),
        tokens=None if signals.tokens is None else signals.tokens[places],
        groups=[signals.groups[int(p)] for p in places] if len(signals.groups) else (),
    )


class Choice:
    """A method over the candidates among `signals`, under the shares of groups; `rows(k)` chooses k
    rows in all, the included ones first.

    candidates, included: places in `signals`. mix: the share of the seats that the method fills,
    the rest being drawn; None = all. A part of the rows is chosen by the method itself,
    with that part's signals alone.
    """

    def __init__(
        self,
        selector: Selector,
        signals: Signals,
        candidates: np.ndarray,
        included: np.ndarray,
        bounds: Sequence[Bound],
        seed: int,
        mix: Fraction | None = None,
    ) -> None:
        self.selector, self.signals, self.candidates, self.included = (
            selector,
            signals,
            candidates,
            included,
        )
        self.bounds, self.seed, self.mix, self.needs = bounds, seed, mix, selector.needs()
        groups = np.asarray(list(signals.groups) or [""] * signals.n, dtype=object)
        self.groups, self.taken = groups[candidates], Counter(groups[included].tolist())
        self.sizes = Counter(self.groups.tolist())

    def limits(self, k: int) -> dict[str, tuple[int, int]]:
        """(least, most) of the bounded groups among the candidates' seats when k rows are chosen in
        all.

        Raises BudgetError for bounds that k rows cannot keep.
        """
        found = {}
        for bound in self.bounds:
            least, most = (max(0, rows - self.taken[bound.group]) for rows in bound.rows(k))
            if self.taken[bound.group] > bound.rows(k)[1]:
                raise BudgetError(
                    f"--include-ids names {counted(self.taken[bound.group], 'row')} of"
                    f" {bound.group}, its"
                    f" most is {bound.rows(k)[1]:,}",
                    remedy="Raise that group's most, or take rows off the list.",
                )
            if least > self.sizes[bound.group]:
                raise BudgetError(
                    f"{bound.group} is to have {least:,} more rows and {self.sizes[bound.group]:,}"
                    " can be chosen",
                    remedy="Lower its least in --per-group.",
                )
            if least > most:
                raise BudgetError(
                    f"{bound.group}: at least {least:,} and at most {counted(most, 'row')}",
                    remedy="Correct its --per-group.",
                )
            found[bound.group] = least, min(most, self.sizes[bound.group])
        return found

    def room(self, k: int) -> int:
        """The most rows that can be chosen in all when percentages are those of k."""
        limits = self.limits(k)
        return len(self.included) + sum(
            limits[g][1] if g in limits else size for g, size in self.sizes.items()
        )

    def rows(self, k: int) -> Subset:
        """k rows: indices are places in `signals`; notes cover all of `signals`' rows. Fewer only
        where the method itself returns fewer.

        Raises BudgetError where the included rows or the bounds do not fit k.
        """
        seats, limits = k - len(self.included), self.limits(k)
        least = sum(a for a, _ in limits.values())
        if seats < least:
            raise BudgetError(
                f"{len(self.included):,} included rows and {least:,} for the groups' least do not"
                f" fit a budget of {counted(k, 'row')}",
                remedy="Raise --budget.",
            )
        if self.room(k) < k:
            raise BudgetError(
                f"the groups' most leave {counted(self.room(k), 'row')} for a budget of {k:,}",
                remedy="Raise a group's most, or add --allow-short.",
            )
        fixed: dict[str, int] = {}
        while True:
            free = (
                ~np.isin(self.groups, list(fixed))
                if fixed
                else np.ones(len(self.groups), dtype=bool)
            )
            part = self._part(free, seats - sum(fixed.values()), np.random.default_rng(self.seed))
            counts = Counter(self.groups[part[0]].tolist())
            low = {
                g: a - counts[g] for g, (a, _) in limits.items() if g not in fixed and counts[g] < a
            }
            high = {
                g: counts[g] - b for g, (_, b) in limits.items() if g not in fixed and counts[g] > b
            }
            if not low and not high:
                break
            # As a flexible box layout settles widths: the larger sum of violations is settled
            # first, the other may then be gone.
            surplus = sum(high.values()) - sum(low.values())
            fixed |= {g: limits[g][1] for g in high if surplus >= 0}
            fixed |= {g: limits[g][0] for g in low if surplus <= 0}
        parts = [part]
        for group, count in sorted(fixed.items()):
            rng = np.random.default_rng([self.seed, xxhash.xxh32_intdigest(group.encode())])
            parts.append(self._part(self.groups == group, count, rng))
        return self._merged(parts)

    def _part(
        self, mask: np.ndarray, seats: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, Subset | None, np.ndarray]:
        """(candidates picked, the method's answer, the candidates it was asked about) for a part of
        the candidates.
        """
        asked = np.flatnonzero(mask)
        if seats == 0 or not len(asked):
            return np.empty(0, dtype=np.int64), None, asked
        given = narrow(self.signals, self.candidates[asked], self.needs)
        if len(asked) < len(self.candidates) or len(self.included):
            given = replace(given, share=None)  # it is of all the rows
        try:
            seats_here = min(seats, len(asked))
            found = (
                self.selector.select(given, seats_here, rng=rng)
                if self.mix is None
                else mixed(self.selector, given, seats_here, self.mix, rng)
            )
        except ValueError as error:
            name = type(self.selector).__name__.lower()
            raise DataError(
                f"{name} cannot choose: {error}",
                remedy="See its options in `gradsift methods` (-o), or the rows.",
            ) from error
        check(found, len(asked), seats, type(self.selector).__name__)
        return asked[np.asarray(found.indices, dtype=np.int64)], found, asked

    def _merged(self, parts: Sequence[tuple[np.ndarray, Subset | None, np.ndarray]]) -> Subset:
        """The included rows, then the parts' picks in turn by their relative rank; columns put
        together over all rows.
        """
        order = sorted(
            ((i + 0.5) / len(picks), number, i)
            for number, (picks, _, _) in enumerate(parts)
            for i in range(len(picks))
        )
        chosen = [self.candidates[parts[number][0][i]] for _, number, i in order]
        answers = [found for _, found, _ in parts if found is not None]

        def column(name: str, of_included: float) -> np.ndarray | None:
            values = [None if found is None else getattr(found, name) for _, found, _ in parts]
            if not answers or any(getattr(found, name) is None for found in answers):
                return None
            picked = [float(values[number][i]) for _, number, i in order]  # type: ignore[index]
            return np.array([of_included] * len(self.included) + picked)

        indices = np.concatenate([self.included, np.array(chosen, dtype=np.int64)])
        return Subset(indices, column("gains", np.nan), column("weights", 1.0), self._notes(parts))

    def _notes(
        self, parts: Sequence[tuple[np.ndarray, Subset | None, np.ndarray]]
    ) -> dict[str, Any]:
        n, notes = self.signals.n, dict[str, Any]()
        clusters = 0
        for _, found, asked in parts:
            highest = clusters
            for name, value in (found.notes if found is not None else {}).items():
                array = None if isinstance(value, (str, Mapping)) else np.asarray(value)
                if name == "centroid_norms" and array is not None:
                    notes[name] = np.concatenate([notes.get(name, np.empty(0)), array])
                elif array is None or array.ndim != 1 or len(array) != len(asked):
                    notes.setdefault(name, value)
                else:
                    if name == "cluster":
                        array, highest = (
                            np.where(array >= 0, array + clusters, array),
                            clusters + int(array.max(initial=-1)) + 1,
                        )
                    blank = (
                        np.nan if array.dtype.kind == "f" else None if array.dtype == object else -1
                    )
                    notes.setdefault(name, np.full(n, blank, dtype=array.dtype))[
                        self.candidates[asked]
                    ] = array
            clusters = highest
        return notes

    def tokens(self, cost: np.ndarray, total: int) -> Subset:
        """The method's own choice of as many rows as `total` tokens pay for; cost [n]: tokens of
        each row of `signals`.

        Looks for a k whose rows fit where those of k + 1 do not, by interpolation and halving.
        Where a larger choice only appends this is the longest prefix that fits. Raises BudgetError
        where not even the fewest rows fit.
        """
        cheapest = np.sort(cost[self.candidates])
        base = int(cost[self.included].sum())
        few = len(self.included) + max(1 if not len(self.included) else 0, self._fewest())
        many = len(self.included) + int(
            np.searchsorted(np.cumsum(cheapest), total - base, side="right")
        )
        while many > few and self.room(many) < many:
            many = max(few, self.room(many))
        if base > total or many < few:
            raise BudgetError(
                f"{counted(total, 'token does', 'tokens do')} not pay for the"
                f" {counted(few, 'row')} that must be chosen",
                remedy="Raise --budget.",
            )
        low, high, best = few - 1, many + 1, None
        spent, over, halve = base, None, False
        mean = max(float(cost[self.candidates].mean()), 1e-9)
        while high - low > 1 and (best is None or total - spent >= cheapest[0]):
            slope = mean if over is None else (over - spent) / (high - low)
            k = (
                (low + high) // 2
                if halve
                else low + max(1, int((total - spent) / max(slope, 1e-9)))
            )
            k = min(max(k, low + 1), high - 1)
            found = self.rows(k)
            width, used = high - low, int(cost[np.asarray(found.indices)].sum())
            if used <= total:
                low, spent, best = k, used, found
                if len(found) < k:  # the method has no more to give
                    break
            else:
                high, over = k, used
            halve = (high - low) * 2 > width
        if best is None:
            raise BudgetError(
                f"{counted(total, 'token does', 'tokens do')} not pay for {counted(few, 'row')}"
                " of this method's choice",
                remedy="Raise --budget.",
            )
        return best

    def _fewest(self) -> int:
        """Rows that counts (not percentages) in the bounds ask for besides the included ones."""
        return sum(
            max(0, int(b.least) - self.taken[b.group])
            for b in self.bounds
            if b.least and "%" not in b.least
        )


def choose(
    selector: Selector,
    signals: Signals,
    screened: Screen,
    kept: np.ndarray,
    limits: Constraints,
    budget: Budget,
    *,
    read: int,
    lengths: np.ndarray,
    seed: int,
    allow_short: bool = False,
) -> Subset:
    """The method's choice under `limits`: indices are places in `signals`, whose pool rows are
    `kept`; `lengths` [n pool]: tokens of a row.

    A budget of rows is of the `read` ones. Raises BudgetError for a budget that cannot be met and,
    without `allow_short`, one over the rows that may be chosen.
    """
    candidates, included = (
        np.searchsorted(kept, rows) for rows in (screened.candidates, screened.included)
    )
    share = budget.share if budget.unit == "rows" else None
    signals = replace(signals, share=None if share is None else Fraction(share))
    choice = Choice(selector, signals, candidates, included, limits.per_group, seed, limits.mix)
    if budget.unit != "rows":
        cost = lengths[kept] if budget.unit == "tokens" else signals.tokens
        assert cost is not None
        return choice.tokens(np.asarray(cost, dtype=np.int64), budget.tokens(int(cost.sum())))
    rows = budget.rows(read)
    if rows > (usable := len(candidates) + len(included)) and not allow_short:
        raise BudgetError(
            f"the budget is {counted(rows, 'row')} and {counted(usable, 'is', 'are')} usable",
            remedy="Lower --budget, or add --allow-short.",
        )
    rows = min(rows, usable)
    while allow_short and choice.room(rows) < rows:
        rows = choice.room(rows)
    return choice.rows(rows)


def check(subset: Subset, n: int, budget: int, method: str) -> None:
    """What every selection must hold; a method that breaks it is at fault, not the user."""
    indices = np.asarray(subset.indices)
    if len(np.unique(indices)) != len(indices):
        raise RuntimeError(f"{method} chose a row twice")
    if len(indices) > budget or (len(indices) and not (indices.min() >= 0 and indices.max() < n)):
        raise RuntimeError(f"{method} chose rows outside its budget or pool")
