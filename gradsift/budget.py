"""Budgets: "5%", "0.05", "1000" and what they come to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from gradsift.errors import BudgetError

_SHAPE = re.compile(r"(?P<number>\d+(?:_\d+)*(?:\.\d+)?)(?P<percent>\s*%)?")


@dataclass(frozen=True)
class Budget:
    """A share of the rows read, or a count of rows."""

    text: str
    share: Decimal | None = None
    count: int | None = None

    def rows(self, read: int) -> int:
        """How many rows, of `read` (before quarantine): a share is rounded half up, at least 1."""
        if self.count is not None:
            return self.count
        assert self.share is not None
        return max(1, int((self.share * read).to_integral_value(ROUND_HALF_UP)))


def parse(text: str | int | float) -> Budget:
    """A budget from its text. Whole numbers are counts, numbers with a point or a % are shares. Raises BudgetError."""
    spelled = str(text).strip()
    found = _SHAPE.fullmatch(spelled)
    if not found:
        raise BudgetError(f"--budget {spelled}: not a budget", remedy="Write a share (5% or 0.05) or a count of rows (1000).")
    number = Decimal(found["number"].replace("_", ""))
    if number == 0:
        raise BudgetError(f"--budget {spelled}: nothing to choose", remedy="Give at least 1 row.")
    if found["percent"] or "." in found["number"]:
        share = number / 100 if found["percent"] else number
        if share > 1:
            raise BudgetError(f"--budget {spelled}: more than the whole pool", remedy="Give at most 100%.")
        return Budget(spelled, share=share)
    return Budget(spelled, count=int(number))
