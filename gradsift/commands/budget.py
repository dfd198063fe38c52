"""Budgets: "5%", "0.05", "1000", "10M-tokens" and what they come to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Literal

from gradsift.errors import BudgetError

_SHAPE = re.compile(r"(?P<number>\d+(?:_\d+)*(?:\.\d+)?)(?P<percent>\s*%)?")
_TOKENS = re.compile(
    r"(?P<number>\d+(?:_\d+)*(?:\.\d+)?)(?P<unit>[kKMBG]?|\s*%)-(?P<supervised>supervised-)?tokens"
)
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


@dataclass(frozen=True)
class Budget:
    """A share of the rows read, or a count of rows; or, for `unit` other than "rows", a share or
    count of tokens.

    unit "tokens": all tokens of the encoded rows, prompts and template too, which is what a trainer
    pays for. "supervised": those that carry loss. A share of tokens is of those of the usable rows.
    """

    text: str
    share: Decimal | None = None
    count: int | None = None
    unit: Literal["rows", "tokens", "supervised"] = "rows"

    def rows(self, read: int) -> int:
        """How many rows, of `read` (before quarantine): a share is rounded half up, at least 1."""
        if self.count is not None:
            return self.count
        assert self.share is not None
        return max(1, int((self.share * read).to_integral_value(ROUND_HALF_UP)))

    def tokens(self, usable: int) -> int:
        """How many tokens, of `usable` ones."""
        return self.rows(usable)

    def canonical(self, read: int) -> Any:
        """What enters a recipe: the number of rows, or unit and amount."""
        return (
            self.rows(read)
            if self.unit == "rows"
            else {self.unit: str(self.share) if self.count is None else self.count}
        )


def parse(text: str | int | float) -> Budget:
    """A budget from its text. Whole numbers are counts, numbers with a point or a % are shares;
    "10M-tokens", "500k-supervised-tokens" and "5%-tokens" bound tokens. Raises BudgetError.
    """
    spelled = str(text).strip()
    found = _TOKENS.fullmatch(spelled)
    if found:
        return _of_tokens(spelled, found)
    found = _SHAPE.fullmatch(spelled)
    if not found:
        remedy = "Write a share (5% or 0.05), a count of rows (1000) or of tokens (10M-tokens)."
        raise BudgetError(f"--budget {spelled}: not a budget", remedy=remedy)
    number = Decimal(found["number"].replace("_", ""))
    if number == 0:
        raise BudgetError(f"--budget {spelled}: nothing to choose", remedy="Give at least 1 row.")
    if found["percent"] or "." in found["number"]:
        return Budget(spelled, share=_share(spelled, number / 100 if found["percent"] else number))
    return Budget(spelled, count=int(number))


def _of_tokens(spelled: str, found: re.Match[str]) -> Budget:
    number, unit = (
        Decimal(found["number"].replace("_", "")),
        "supervised" if found["supervised"] else "tokens",
    )
    if number == 0:
        raise BudgetError(
            f"--budget {spelled}: nothing to choose", remedy="Give at least the tokens of one row."
        )
    if "%" in found["unit"]:
        return Budget(spelled, share=_share(spelled, number / 100), unit=unit)
    count = number * _UNITS[found["unit"]]
    if count != int(count):
        raise BudgetError(
            f"--budget {spelled}: not a whole number of tokens",
            remedy="Write 10M-tokens, 500k-tokens or 5%-tokens.",
        )
    return Budget(spelled, count=int(count), unit=unit)


def _share(spelled: str, share: Decimal) -> Decimal:
    if share > 1:
        raise BudgetError(
            f"--budget {spelled}: more than the whole pool", remedy="Give at most 100%."
        )
    return share
