"""Overlap with test sets: 13 words in a row that a pool row shares with a test instance.

The usual measure (Brown et al. 2020, arXiv 2005.14165, appendix C). Case, spacing and punctuation
do not count. A word is a run of letters and digits; in scripts written without spaces every
character is one.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from gradsift.data.records import text_of
from gradsift.types import Example

WORDS = 13
# instances of one test set that share 13 words from which on these are its template, not its
# content
TEMPLATE = 5

# Thai to Lao, Myanmar, Khmer, kana, Chinese characters.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # noqa: E501
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
# apostrophes and accents left by decomposition are no gap between words
_INSIDE = re.compile("['\u2019\u02bc\u0300-\u036f]")


def words(text: str) -> list[str]:
    """The words that are compared: compatibility forms unified (full-width letters, ligatures),
    case folded, apostrophes removed.
    """
    plain = unicodedata.normalize("NFKC", text)
    return _WORD.findall(_INSIDE.sub("", unicodedata.normalize("NFKC", plain.casefold())))


class Overlap(NamedTuple):
    """A pool row's first shared words, the test set they stand in, and the number of the instance
    there (from 0).
    """

    test: str
    instance: int
    words: str


@dataclass(frozen=True)
class TestCounts:
    """What a test set gave: `templates` = n-grams left out because TEMPLATE or more instances share
    them, `short` = instances with fewer than 13 words, which cannot be found.
    """

    name: str
    instances: int
    grams: int
    templates: int
    short: int


class TestSets:
    """Test sets to be kept out of a selection. `digest` depends on the texts and the rule; `counts`
    has one line per set.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    def __init__(self, sets: Iterable[tuple[str, Iterable[Example]]]) -> None:
        self._numbers: dict[str, int] = {}
        self._grams: dict[bytes, tuple[int, int]] = {}
        self.counts: list[TestCounts] = []
        hasher = xxhash.xxh3_128(f"{WORDS} {TEMPLATE}".encode())
        for name, examples in sets:
            hasher.update(b"\0set")
            texts = [text_of(example) for example in examples]
            for text in texts:
                hasher.update(b"\0" + text.encode("utf-8", "backslashreplace"))
            self._add(name, texts)
        self.digest = hasher.hexdigest()

    def _add(self, name: str, texts: Sequence[str]) -> None:
        number = len(self.counts)
        found: list[set[bytes]] = []
        for text in texts:
            ids = [self._numbers.setdefault(word, len(self._numbers) + 1) for word in words(text)]
            found.append({gram for _, gram in _grams(np.array(ids, dtype=np.int32))})
        shared = Counter(gram for grams in found for gram in grams)
        for instance, grams in enumerate(found):
            for gram in grams:
                if shared[gram] < TEMPLATE:
                    self._grams.setdefault(gram, (number, instance))
        templates = sum(count >= TEMPLATE for count in shared.values())
        self.counts.append(
            TestCounts(
                name,
                len(texts),
                len(shared) - templates,
                templates,
                sum(not grams for grams in found),
            )
        )

    def overlap(self, text: str) -> Overlap | None:
        """The first 13 words of `text` that a test instance holds too, None where there are
        none.
        """
        found = words(text)
        # A word that no test set has cannot be part of a match; 0 stands for all of them.
        ids = np.array([self._numbers.get(word, 0) for word in found], dtype=np.int32)
        for place, gram in _grams(ids):
            if gram in self._grams:
                number, instance = self._grams[gram]
                return Overlap(
                    self.counts[number].name, instance, " ".join(found[place : place + WORDS])
                )
        return None


def _grams(ids: np.ndarray) -> Iterable[tuple[int, bytes]]:
    """(place, key) of every 13 known words in a row; equal words have equal keys and no others
    do.
    """
    if len(ids) < WORDS:
        return
    unknown = np.concatenate([[0], np.cumsum(ids == 0)])
    for place in np.flatnonzero(unknown[WORDS:] == unknown[:-WORDS]).tolist():
        yield place, ids[place : place + WORDS].tobytes()
