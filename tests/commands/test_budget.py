from __future__ import annotations

import pytest

from gradsift.commands.budget import parse
from gradsift.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "read", "rows"),
    [
        ("5%", 55210, 2761),  # 2760.5 is rounded half up
        ("0.05", 55210, 2761),
        ("5%", 8000, 400),
        ("1000", 8000, 1000),
        ("1_000", 8000, 1000),
        ("0.001%", 100, 1),  # at least one row
        ("100%", 7, 7),
        ("1.0", 7, 7),
        ("1", 7, 1),
        ("12.5 %", 10, 1),
        ("50%", 5, 3),
    ],
)
def test_a_budget_comes_to_rows_of_what_was_read(text: str, read: int, rows: int) -> None:
    assert parse(text).rows(read) == rows


def test_numbers_are_taken_as_they_are_written() -> None:
    assert parse(0.05).rows(8000) == 400
    assert parse(400).rows(8000) == 400


@pytest.mark.parametrize(
    "text", ["0", "0%", "0.0", "", "many", "-5", "5%%", "101%", "1.5", "5 percent", "nan", "1e3"]
)
def test_what_is_no_budget_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        parse(text)
    assert caught.value.exit_code == 2
    assert caught.value.remedy
