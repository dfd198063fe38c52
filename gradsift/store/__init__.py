"""Bytes on disk that are whole or absent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsift.types import lazy_face

if TYPE_CHECKING:
    from gradsift.store.rows import RowStore

__all__ = ["RowStore"]
__getattr__, __dir__ = lazy_face(__name__, {"RowStore": "rows"})
