"""How long a row may be, how far a packed file may grow when it is unpacked, and what to do about
one that cannot be unpacked.
"""

from __future__ import annotations

from gradsift.errors import ResourceError

MAX_ROW_BYTES = 10_000_000
EXPANSION = 1000.0  # unpacked over packed bytes: gzip's own limit is 1032, text rarely passes 20
EXPANSION_FROM = 1 << 30  # bytes; smaller files may expand as they like
AGAIN = "Copy or download the file again."
ROOM = "Set TMPDIR to a roomier disk."


def expanded(written: int, read: int, limit: float, name: str) -> None:
    """Raises ResourceError when `written` bytes unpacked from `read` are more than a file may
    become.
    """
    if written > EXPANSION_FROM and written > read * limit:
        what = f"expands beyond {limit:g} times its size ({written:,} bytes from {read:,})"
        raise ResourceError(
            what, where=name, remedy="Unpack it by hand, or raise max_expansion, if you trust it."
        )
