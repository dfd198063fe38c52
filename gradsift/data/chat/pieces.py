"""Where the texts of a conversation stand in its rendering: each text gets a character of its own
at either end, and the rendering tells where the characters went.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gradsift.data.chat.turns import REASONING

Turn = dict[str, Any]
Draw = Callable[[list[Turn]], str | None]  # a conversation -> its text, None where it is refused

# A private plane of Unicode: no text of a pool holds these characters, and if one does, the pieces
# of its row are looked for one by one.
_FIRST, _LAST = 0xF0000, 0xFFFFD
_ONLY = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_THOUGHT = re.compile(
    r"\s*(?:<think>|<thought>|\[THINK\]|<\|START_THINKING\|>|<\|channel>thought\b)?\s*(.*?)\s*"
    r"(?:</think>|</thought>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>)\s*",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """The place [start, end) of one text of turn `turn`."""

    turn: int
    start: int
    end: int


class Places:
    """Where the turns of one rendering stand."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = sorted(pieces, key=lambda piece: (piece.start, piece.end))
        self._of: dict[int, tuple[int, int]] = {}
        for piece in pieces:
            start, end = self._of.get(piece.turn, (piece.start, piece.end))
            self._of[piece.turn] = min(start, piece.start), max(end, piece.end)

    def start(self, turn: int) -> int | None:
        """The first character of the turn's texts; None where none of them was written."""
        return self._of[turn][0] if turn in self._of else None

    def end(self, turn: int) -> int | None:
        """Behind the last character of the turn's texts."""
        return self._of[turn][1] if turn in self._of else None

    def others(self, turn: int, start: int, end: int) -> int | None:
        """A turn besides `turn` whose text stands in [start, end)."""
        for piece in self.pieces:
            if piece.turn != turn and piece.start < end and piece.end > start:
                return piece.turn
        return None


def split_thought(content: str) -> tuple[str, str]:
    """(reasoning, answer) of a content that begins with reasoning in tags; ("", content) of any
    other.
    """
    found = _THOUGHT.match(content)
    if found is None:
        return "", content
    last = found
    while (more := _THOUGHT.match(content, last.end())) is not None:
        last = more
    return content[found.start(1) : last.end(1)], content[last.end() :]


def find_places(turns: list[Turn], text: str, draw: Draw) -> Places:
    """The places of all turns in `text`, which is what `draw` makes of them.

    A text that the template leaves out has no place. One rendering finds all where the template
    writes what it is given; else each piece costs one.
    """
    owners: list[int] = []
    drawn = draw(_marked(turns, owners))
    if drawn is not None and not _ONLY.search(text) and _ONLY.sub("", drawn) == text:
        return Places(_read(drawn, owners))
    pieces = []
    for number, turn in enumerate(owners):
        drawn = draw(_marked(turns, [], only=number))
        if drawn is None or drawn == text:
            continue
        start = common(text, drawn)
        end = len(text) - common(text[start:][::-1], drawn[start:][::-1])
        pieces.append(Piece(turn, start, end))
    return Places(pieces)


def _read(drawn: str, owners: list[int]) -> list[Piece]:
    """The places of the texts; of a text that is written again (a call's name over its result, say)
    the first.
    """
    begun: dict[int, int] = {}
    closed: dict[int, Piece] = {}
    for seen, found in enumerate(_ONLY.finditer(drawn)):
        number, at = (ord(found.group()) - _FIRST) // 2, found.start() - seen
        if ord(found.group()) % 2 == _FIRST % 2:
            begun.setdefault(number, at)
        elif number in begun:
            closed.setdefault(number, Piece(owners[number], begun[number], at))
    return list(closed.values())


def _marked(turns: list[Turn], owners: list[int], only: int | None = None) -> list[Turn]:
    """A copy of the turns with a character at either end of each text, or of the text `only`
    alone; `owners` gets the turn of each text.
    """

    def around(text: Any, turn: int) -> Any:
        if not isinstance(text, str) or not text.strip():
            return text
        number, core = len(owners), text.strip()
        owners.append(turn)
        if (only is not None and number != only) or _FIRST + 2 * number >= _LAST:
            return text
        begin = text.index(core)
        first, last = chr(_FIRST + 2 * number), chr(_FIRST + 2 * number + 1)
        return text[:begin] + first + core + last + text[begin + len(core) :]

    made = []
    for k, turn in enumerate(turns):
        new = dict(turn)
        thought, answer = split_thought(turn["content"] or "")
        if turn["content"]:
            tags = turn["content"][: len(turn["content"]) - len(answer)]
            before, _, after = tags.partition(thought) if thought else (tags, "", "")
            new["content"] = before + around(thought, k) + after + around(answer, k)
        named = [key for key in REASONING if isinstance(turn.get(key), str)]
        if named:
            new |= dict.fromkeys(named, around(turn[named[0]], k))
        if isinstance(turn.get("tool_calls"), list):
            new["tool_calls"] = [_marked_call(call, k, around) for call in turn["tool_calls"]]
        made.append(new)
    return made


def _marked_call(call: Any, turn: int, around: Callable[[Any, int], Any]) -> Any:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = {**call["function"], "name": around(call["function"].get("name"), turn)}
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):  # keys stay: templates sort by them
        function["arguments"] = {key: around(value, turn) for key, value in arguments.items()}
    elif isinstance(arguments, str):
        function["arguments"] = around(arguments, turn)
    return {**call, "function": function}


def common(one: str, other: str) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
