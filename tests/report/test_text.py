"""Plain tables."""

from __future__ import annotations

from gradsift.report.text import table


def test_columns_are_as_wide_as_they_need_and_the_last_cell_of_a_row_widens_none() -> None:
    long = "a reason that is longer than any column is wide"
    assert table(
        [["name", "n", "about"], ["x", "1,000", long], ["longer", long], ["", "7", ""]]
    ) == [
        "name    n      about",
        f"x       1,000  {long}",
        f"longer  {long}",
        "        7",
    ]
    assert table([["alone"], ["too"]]) == ["alone", "too"]
