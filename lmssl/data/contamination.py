"""Which test texts the pretraining text has seen: overlap of 13 words in a row.

The rule of Brown et al. 2020 (arXiv:2005.14165, appendix C): texts are compared as lower-case words without
punctuation (`lmssl.words`: of a script without spaces each character is one); a test text has leaked where it shares 13
words in a row with a document. A test text of 8 to 12 words is looked for whole; a shorter one is not looked for, since
such a run of words is no evidence.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

from lmssl.words import words

GRAM = 13
"""Words in a row."""
RULE = 2
"""Changes where what counts as a word does, so that text cleaned by an older rule is prepared again."""
SHORTEST = 8
"""Words of a text that is looked for at all."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


MANY = 100
"""Texts found in one document above which they are looked for no longer: what so many share (a signature) may stand in every document."""


class Grams:
    """The word n-grams of some texts, to be looked for in documents.

    >>> grams = Grams(["a b c d e f g h", "one two"])
    >>> grams.found_in("So: A, b c d e f g h!").tolist(), grams.found_in("a b c d e f g").tolist()
    ([0], [])
    """

    def __init__(self, texts: Iterable[str]):
        self._ids: dict[str, int] = {}
        found: dict[int, list[tuple[np.ndarray, int]]] = {}
        for number, text in enumerate(texts):
            hashes = self._hashes(text)
            n = min(GRAM, len(hashes))
            if n >= SHORTEST:
                found.setdefault(n, []).append((_rolling(hashes, n), number))
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for n, parts in found.items():
            grams, owners = np.concatenate([g for g, _ in parts]), np.concatenate([np.full(len(g), k) for g, k in parts])
            order = np.argsort(grams, kind="stable")
            self._tables[n] = (grams[order], owners[order])

    def _hashes(self, text: str) -> np.ndarray:
        """uint64, one of each word."""
        if len(self._ids) > 2**20:
            self._ids.clear()
        ids, found = self._ids, words(text)
        for word in found:
            if word not in ids:
                ids[word] = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big")
        return np.array([ids[word] for word in found], np.uint64)

    def found_in(self, document: str) -> np.ndarray:
        """Numbers of the texts that share an n-gram with a document, ascending."""
        hashes, hits = self._hashes(document), [np.empty(0, np.int64)]
        for n, (grams, owners) in self._tables.items():
            if len(hashes) < n:
                continue
            here = np.unique(_rolling(hashes, n))
            first, last = np.searchsorted(grams, here, "left"), np.searchsorted(grams, here, "right")
            hits += [owners[a:b] for a, b in zip(first[last > first], last[last > first], strict=True)]
        return np.unique(np.concatenate(hits))

    def any_in(self, document: str) -> bool:
        """Whether any text shares an n-gram with a document; what many texts share costs no more than what one has."""
        hashes = self._hashes(document)
        for n, (grams, _) in self._tables.items():
            if len(hashes) >= n and len(grams):
                here = _rolling(hashes, n)
                if (grams[np.searchsorted(grams, here).clip(max=len(grams) - 1)] == here).any():
                    return True
        return False

    def forget(self, numbers: np.ndarray) -> None:
        """Look for these texts no longer."""
        for n, (grams, owners) in self._tables.items():
            kept = ~np.isin(owners, numbers)
            self._tables[n] = grams[kept], owners[kept]


def _rolling(hashes: np.ndarray, n: int) -> np.ndarray:
    """A hash of every n words in a row, uint64 [len - n + 1]."""
    total = np.zeros(len(hashes) - n + 1, np.uint64)
    with np.errstate(over="ignore"):
        for j in range(n):
            total = total * _FACTOR + hashes[j : len(hashes) - n + 1 + j]
    return total


def searchable(text: str) -> bool:
    """Whether a text is long enough to be looked for.

    >>> searchable("a b c d e f g h"), searchable("a b c")
    (True, False)
    """
    return len(words(text)) >= SHORTEST


def leaked(tests: Iterable[str], documents: Iterable[str]) -> list[int]:
    """Numbers of the test texts that share an n-gram with any document."""
    grams, found = Grams(tests), set[int]()
    for document in documents:
        new = grams.found_in(document)
        found.update(new.tolist())
        if len(new) > MANY:
            grams.forget(new)
    return sorted(found)
