"""The error tree. Every error says what is wrong, where (file, line, row id), and what to type
next.

GradsiftError                     exit 1
├── UserError                     exit 2   a wrong option, name, budget or combination; one line
with a remedy
│   ├── ConfigError                        an unknown or badly typed setting
│   ├── UnknownName                        a method, backend, format or option that does not exist
(nearest name given)
│   ├── BudgetError                        a budget of 0, or over the usable rows
│   └── MismatchError                      stored work made under other settings; names the field
├── DataError                     exit 3   an input file that cannot be used
│   └── TooManyBadRows
├── ResourceError                 exit 4   disk, memory or a device
│   ├── DiskFull
│   └── OutOfMemory
├── IntegrityError                exit 5   stored bytes that are not what was written
└── Interrupted                   exit 130 stopped by a signal; the same command resumes
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gradsift.redaction import redacted


class GradsiftError(Exception):
    """Base of every error gradsift raises on purpose.

    `what` is the fault, `where` the place (a path, `file:line`, a row id), `remedy` what to do
    next; str() joins them in one line, without the secrets that URLs may hold.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str | Path | None = None, remedy: str | None = None
    ) -> None:
        self.what, self.where, self.remedy = what, None if where is None else str(where), remedy
        super().__init__(what)

    def __reduce__(self) -> tuple[Any, ...]:
        # As a worker's error reaches the process that waits for it: by its fields, since
        # constructors differ.
        return _rebuilt, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return redacted(f"{text}. {self.remedy}" if self.remedy else text)


def _rebuilt(
    kind: type[GradsiftError], args: tuple[Any, ...], fields: dict[str, Any]
) -> GradsiftError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class UserError(GradsiftError):
    exit_code = 2


class ConfigError(UserError):
    pass


class UnknownName(UserError):
    def __init__(
        self, kind: str, name: str, known: Iterable[str], *, where: str | Path | None = None
    ) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = (
            f"Did you mean {near[0]!r}?"
            if near and len(known) > 2
            else f"Known: {', '.join(known) or 'none'}."
        )
        super().__init__(f"unknown {kind} {name!r}", where=where, remedy=hint)
        self.name, self.nearest = name, near[0] if near else None


class BudgetError(UserError):
    pass


class MismatchError(UserError):
    pass


class DataError(GradsiftError):
    exit_code = 3


class TooManyBadRows(DataError):
    pass


class ResourceError(GradsiftError):
    exit_code = 4


class DiskFull(ResourceError):
    """`needed` and `free` are bytes, None where they are not known."""

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        remedy: str | None = None,
        needed: int | None = None,
        free: int | None = None,
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.needed, self.free = needed, free


class OutOfMemory(ResourceError):
    pass


class IntegrityError(GradsiftError):
    exit_code = 5


class Interrupted(GradsiftError):
    exit_code = 130
