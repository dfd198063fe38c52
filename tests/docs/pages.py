"""The shape of a page of measurements: what stays the same when a bench runs again and its page is
not yet written again.
"""

from __future__ import annotations


def titles(page: str) -> list[str]:
    """Its headings, the first one first."""
    return [line for line in page.splitlines() if line.startswith("#")]


def tables(page: str) -> list[list[list[str]]]:
    """Its tables: lines of cells, the head first, without the line of dashes."""
    found: list[list[list[str]]] = []
    before = ""
    for line in page.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip().strip("|").split("|")])
        before = line
    for table in found:
        assert len(table) > 2 and set("".join(table[1])) <= {"-", ":"}, table[:2]
        del table[1]
    return found


def check_measured(page: str, generated: str, command: str) -> None:
    """Both have the generator's title and name its command; every line of a table fills its
    columns, and no cell holds a missing number.
    """
    assert titles(page)[0] == titles(generated)[0]
    for text in (page, generated):
        assert command in text
        sections = [title for title in titles(text) if title.startswith("## ")]
        assert len(sections) == len(set(sections))
        assert tables(text)
        for head, *lines in tables(text):
            for cells in lines:
                assert len(cells) == len(head), cells
                assert not {"nan", "inf", "None"} & set(cells), cells
    assert {tuple(table[0]) for table in tables(page)} & {
        tuple(table[0]) for table in tables(generated)
    }
