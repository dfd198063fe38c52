"""Fields that hold pictures, films or sounds: what a row says cannot be read without them.

A field such as `image_url` says where a text came from as often as what it is about, and is not
counted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

from gradsift.data.marks.words import is_flag, is_nothing

_MEDIA = re.compile(
    r"^(?:(?:images?|imgs?|pictures?|videos?|audios?)(?:_(?:paths?|files?|bytes|base64))?"
    r"|pixel_values(?:_videos)?|input_features)$"
)


@functools.lru_cache(maxsize=4096)
def _suspects(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        key for key in keys if _MEDIA.match(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    )


def media(record: Mapping[str, Any], named: Collection[str] = ()) -> str | None:
    """The first field of a row or a turn that holds a picture, a film or a sound.

    Args:
        record: the row, or the turn.
        named: fields that a mapping names: their owner has said that they hold text.
    """
    for key in _suspects(tuple(map(str, record))):
        if key not in named and _filled(record[key]):
            return key
    return None


def _filled(value: Any) -> bool:
    """Whether there is something in it. Numbers and truth values count or say, they hold none, and
    neither do the texts for them.
    """
    if isinstance(value, dict):
        return any(map(_filled, value.values())) or any(
            isinstance(item, (bytes, bytearray)) and item for item in value.values()
        )
    if isinstance(value, (list, tuple)):
        return any(
            _filled(item) if isinstance(item, (dict, list, tuple, str)) else item is not None
            for item in value
        )
    if isinstance(value, str):
        return not (is_nothing(value) or is_flag(value))
    return isinstance(value, (bytes, bytearray)) and bool(value.strip())
