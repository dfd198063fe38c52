"""A model, its adapters and its trainings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsift.types import lazy_face

if TYPE_CHECKING:
    from gradsift.model.load import load_tokenizer

__all__ = ["load_tokenizer"]
__getattr__, __dir__ = lazy_face(__name__, {"load_tokenizer": "load"})
