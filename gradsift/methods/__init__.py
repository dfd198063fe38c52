"""METHODS: name -> "module:Class". Third parties add theirs through the entry-point group
`gradsift.methods`, read by the same table.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gradsift.errors import ConfigError, UnknownName
from gradsift.types import Selector

METHODS: dict[str, str] = {
    "bids": "gradsift.methods.bids:Bids",
    "bm25": "gradsift.methods.bm25:Bm25",
    "contrast": "gradsift.methods.contrast:Contrast",
    "dsir": "gradsift.methods.dsir:Dsir",
    "g2is": "gradsift.methods.g2is:G2is",
    "gdig": "gradsift.methods.gdig:Gdig",
    "gist": "gradsift.methods.gist:Gist",
    "gradmatch": "gradsift.methods.gradmatch:Gradmatch",
    "ifd": "gradsift.methods.ifd:Ifd",
    "kcenter": "gradsift.methods.kcenter:Kcenter",
    "length": "gradsift.methods.length:Length",
    "less": "gradsift.methods.less:Less",
    "perplexity": "gradsift.methods.perplexity:Perplexity",
    "random": "gradsift.methods.random:Random",
    "rds": "gradsift.methods.rds:Rds",
    "selffilter": "gradsift.methods.selffilter:Selffilter",
    "tagcos": "gradsift.methods.tagcos:Tagcos",
}


@cache
def table() -> dict[str, str]:
    """METHODS and what installed packages register; a built-in name cannot be taken over."""
    from importlib.metadata import entry_points

    return {
        **{entry.name: entry.value for entry in entry_points(group="gradsift.methods")},
        **METHODS,
    }


def load(name: str) -> type[Any]:
    """The class behind a method's name. Raises UnknownName with the nearest one."""
    home = METHODS.get(name) or table().get(name)  # the table asks every installed package
    if home is None:
        raise UnknownName("method", name, table())
    module, _, attribute = home.partition(":")
    return getattr(importlib.import_module(module), attribute)


def make(name: str, options: Mapping[str, Any] | None = None) -> Selector:
    """A selector from its name and `-o key=value` options (strings are converted to the field's
    type).

    Raises UnknownName for a method or option that does not exist, ConfigError for a value of the
    wrong type.
    """
    cls = load(name)
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in options or {}:
        if key not in fields:
            raise UnknownName(f"option of {name}", key, fields)
    try:
        return TypeAdapter[Any](cls).validate_python(dict(options or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        said = (
            f"option {where} of {name}: {first['msg']}, not {first.get('input')!r}"
            if where
            else f"options of {name}: {first['msg'].removeprefix('Value error, ')}"
        )
        raise ConfigError(said, remedy="See `gradsift methods`.") from None


def options_from(pairs: Iterable[str], *, before: str, remedy: str) -> dict[str, str]:
    """Options from `KEY=VALUE` texts, for `make`.

    Args: pairs: The texts. A key may be written with hyphens; the later of two equal keys holds.
        before: The beginning of the error's text, which the faulty pair follows: as the user wrote
        it. remedy: What the error advises.

    Raises:
        ConfigError: For a text without `=` or without a key.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{before}{pair}: not KEY=VALUE", remedy=remedy)
        options[key.strip().replace("-", "_")] = value.strip()
    return options


def options_of(selector: Selector) -> dict[str, Any]:
    """The hyper-parameters as plain data: part of the selection's recipe."""
    return dataclasses.asdict(selector)  # type: ignore[call-overload]


def describe() -> list[dict[str, Any]]:
    """Every method as plain data: name, first sentence, where it is from, target, signals it needs
    by default, cost, options with defaults.
    """
    found = []
    for name in sorted(table()):
        cls = load(name)
        needs = sorted({signal.name for signal in cls().needs()})
        options = {field.name: field.default for field in dataclasses.fields(cls)}
        text = inspect.getdoc(cls) or ""
        found.append(
            {
                "name": name,
                "summary": text.split("\n\n")[0].replace("\n", " "),
                "source": re.split("; |: ", _said(text, "Source"), maxsplit=1)[0],
                "target": cls.target,
                "needs": needs,
                "cost": _said(text, "Cost"),
                "options": options,
            }
        )
    return found


def _said(text: str, what: str) -> str:
    """The sentence that a docstring says after "Source:" or "Cost:"; "" where it says nothing."""
    found = re.search(rf"\b{what}: (.+?)(?=\.\s|\.?\n\n|\.?\Z)", text, re.DOTALL)
    return " ".join(found[1].split()) if found else ""
