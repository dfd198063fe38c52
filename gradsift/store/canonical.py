"""Canonical JSON, digests of it, and objects that carry a digest of themselves."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """`body` with a digest of itself, in place of one that it had: what is changed later by
    accident is noticed.
    """
    plain = {key: value for key, value in body.items() if key != "seal"}
    return {**plain, "seal": recipe_digest(plain)}


def seal_fault(found: Mapping[str, Any], *, required: bool = False) -> str | None:
    """What is wrong with an object read from a file that `sealed` made; None where nothing is, or
    it has no seal and none is `required`.
    """
    if "seal" not in found:
        return "has lost its seal" if required else None
    try:
        return (
            None if sealed(found)["seal"] == found["seal"] else "was changed after it was written"
        )
    except ValueError:  # a NaN that was none
        return "was changed after it was written"


def differences(stored: Any, wanted: Any, field: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted field, stored value, wanted value) wherever two JSON values differ; None stands for
    an absent one.
    """
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = sorted(stored.keys() | wanted.keys())
        return [
            d
            for key in keys
            for d in differences(
                stored.get(key), wanted.get(key), f"{field}.{key}" if field else key
            )
        ]
    return [] if stored == wanted else [(field, stored, wanted)]


def canonical_json(obj: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8. The same bytes for any
    locale, hash seed and insertion order.

    Raises TypeError for what has no single spelling (sets, paths, bytes, keys that are not strings)
    and ValueError for NaN and infinities.
    """
    _refuse_ambiguous(obj, "$")
    return json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode("utf-8", "surrogatepass")


def _refuse_ambiguous(obj: Any, place: str) -> None:
    if obj is None or isinstance(obj, (str, bool, int)):
        return
    if isinstance(obj, float):
        if not math.isfinite(obj):
            raise ValueError(f"{place}: {obj} has no place in a recipe")
    elif isinstance(obj, dict):
        for key, value in obj.items():
            if not isinstance(key, str):
                raise TypeError(f"{place}: the key {key!r} is not a string")
            _refuse_ambiguous(value, f"{place}.{key}")
    elif isinstance(obj, (list, tuple)):
        for i, value in enumerate(obj):
            _refuse_ambiguous(value, f"{place}[{i}]")
    else:
        raise TypeError(f"{place}: a {type(obj).__name__} cannot be part of a recipe")


def recipe_digest(obj: Any) -> str:
    """sha256 hex of canonical_json(obj)."""
    return hashlib.sha256(canonical_json(obj)).hexdigest()
