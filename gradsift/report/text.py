"""How numbers and tables are written as text, and how text that hides or reorders itself is made
visible.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

# Line breaks and tabs stay. Format characters are shown because they can reorder or hide text
# (Boucher and Anderson, "Trojan Source", 2021); the zero-width joiner and variation selectors stay,
# since emoji and several scripts are built with them.
_KEEP = {"\n", "\t", "\u200c", "\u200d"}
_SUSPECT = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def pieces(text: str) -> list[tuple[str, bool]]:
    """`text` cut into (piece, is_control): a control or format character comes as its own piece,
    written U+XXXX.
    """
    out: list[tuple[str, bool]] = []
    at = 0
    for match in _SUSPECT.finditer(text):
        if match.group() in _KEEP:
            continue
        if match.start() > at:
            out.append((text[at : match.start()], False))
        out.append((f"U+{ord(match.group()):04X}", True))
        at = match.end()
    if at < len(text):
        out.append((text[at:], False))
    return out


def visible(text: str) -> str:
    """`text` in one line, with control and format characters written as [U+XXXX]."""
    return " ".join(
        "".join(f"[{piece}]" if control else piece for piece, control in pieces(text)).split()
    )


def excerpt(text: str, length: int = 90) -> str:
    line = visible(text)
    if len(line) <= length:
        return line
    while length and unicodedata.combining(line[length]):
        length -= 1
    return line[:length].rstrip() + "…"


def count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def number(value: Any) -> str:
    """Four significant digits for a float (whole floats as whole numbers), thousands separated,
    empty for None.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() or abs(value) >= 1e4 else f"{value:#.4g}"
    return str(value)


def share(part: float | None, whole: float | None = 1) -> str:
    return "" if part is None or not whole else f"{100 * part / whole:.1f} %"


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(value: int | None) -> str:
    if value is None:
        return ""
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain table: columns as wide as they need, two spaces apart, for it is data that
    no terminal width may cut.

    A row may end early; its last cell is then as long as it is, and widens no column.
    """
    widths = [
        max(len(row[i]) for row in rows if len(row) > i + 1) for i in range(max(map(len, rows)) - 1)
    ]
    return [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]]
        ).rstrip()
        for row in rows
    ]
