"""How methods write numbers in their sentences on a row."""

from __future__ import annotations


def figure(value: float, digits: int = 3) -> str:
    """`digits` significant digits, thousands separated, no exponent from 0.0001 on."""
    if value and abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    if round(abs(value)) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def answer(tokens: int) -> str:
    """A row's answer by its length."""
    return f"{tokens:,}-token answer"


def count(number: int, noun: str) -> str:
    """A number with its noun in the right form."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
