"""What comes of rendering one row: its text with the spans to learn, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass

NO_SUPERVISED, TOO_LONG, CUT_AWAY, REFUSED, REWRITTEN, OUTSIDE_VOCABULARY, ANSWER_LOST = range(1, 8)


class EncodeFault(Exception):
    """A row that cannot be encoded. `code` is a key of encode.REASONS, `detail` what happened."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail


@dataclass(frozen=True, slots=True)
class Rendered:
    """`text` as the tokenizer gets it; `spans`: the character ranges [start, end) to learn. ends:
    whether a BOS and EOS go around it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    ends: bool = False
