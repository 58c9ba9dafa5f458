"""Which test texts the pretraining text has seen: overlap of 13 words in a row.

The rule of Brown et al. 2020 (arXiv:2005.14165, appendix C): texts are compared as lower-case words without
punctuation (`lmssl.words`: of a script without spaces each character is one); a test text has leaked where it shares 13
words in a row with a document. A test text of 8 to 12 words is looked for whole; a shorter one is not looked for, since
such a run of words is no evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lmssl.words import words

GRAM = 13
"""Words in a row."""
RULE = 2
"""Changes where what counts as a word does, so that text cleaned by an older rule is prepared again."""
SHORTEST = 8
"""Words of a text that is looked for at all."""
MANY = 100
"""Texts found at once above which they are looked for no longer: what so many share (a signature) may stand in every document."""
BLOCK = 2**18
"""Characters that are hashed at once: what is made of them stays in a processor's cache."""
LONGEST = 256
"""Bytes of a word that count."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.array([2 ** (8 * n) - 1 for n in range(9)], np.uint64)
"""What leaves the first n of 8 bytes."""
_LETTERS = bytes(ord(chr(c).lower()) if chr(c).isalnum() or c == ord("_") else 0 for c in range(128)) + bytes(128)


class Grams:
    """The word n-grams of some texts, to be looked for in documents.

    >>> grams = Grams(["a b c d e f g h", "one two"])
    >>> grams.found_in(["So: A, b c d e f g h!"]).tolist(), grams.any_in(["a b c d", "e f g h", "a b c d e f g h i"]).tolist()
    ([0], [False, False, True])
    """

    def __init__(self, texts: Iterable[str]):
        found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        number = self.short = 0
        """Texts of too few words to be looked for."""
        for some in _blocks(texts):
            hashes, owners = _hashed(some)
            sizes = np.bincount(owners, minlength=len(some)).clip(max=GRAM)
            self.short += int((sizes < SHORTEST).sum())
            for n in np.unique(sizes[sizes >= SHORTEST]).tolist():
                grams, first = _rolling(hashes, n), owners[: len(hashes) - n + 1]
                kept = (sizes[first] == n) & (first == owners[n - 1 :])
                found.setdefault(n, []).append((grams[kept], first[kept] + number))
            number += len(some)
        self._tables: dict[int, _Table] = {}
        for n, parts in found.items():
            self._tables[n] = _Table(*map(np.concatenate, zip(*parts, strict=True)))

    def found_in(self, documents: Sequence[str]) -> np.ndarray:
        """Numbers of the texts that share an n-gram with any of the documents, ascending."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *(table.owners_of(grams) for table, grams, _ in self._maybe(documents))]))

    def any_in(self, documents: Sequence[str]) -> np.ndarray:
        """bool, for each document whether any text shares an n-gram with it; what many texts share costs no more than what one has."""
        met = np.zeros(len(documents), bool)
        for table, grams, where in self._maybe(documents):
            met[where[table.holds(grams)]] = True
        return met

    def _maybe(self, documents: Sequence[str]) -> Iterator[tuple[_Table, np.ndarray, np.ndarray]]:
        """Of each length the n-grams of the documents that may be in its table, and whose they are."""
        hashes, owners = _hashed(documents)
        for n, table in self._tables.items():
            if len(hashes) >= n:
                grams, first = _rolling(hashes, n), owners[: len(hashes) - n + 1]
                at = np.flatnonzero(table.may_hold(grams) & (first == owners[n - 1 :]))
                yield table, grams[at], first[at]

    def forget(self, numbers: np.ndarray) -> None:
        """Look for these texts no longer."""
        for table in self._tables.values():
            table.forget(numbers)


class _Table:
    """Hashes of n-grams with the numbers of their texts, sorted, behind a filter that most of the others don't pass."""

    def __init__(self, grams: np.ndarray, owners: np.ndarray):
        order = np.argsort(grams, kind="stable")
        self._grams, self._owners = grams[order], owners[order]
        bits = min(len(grams).bit_length() + 4, 24)
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(2**bits, bool)
        self._filter[grams >> self._shift] = True

    def may_hold(self, grams: np.ndarray) -> np.ndarray:
        return self._filter[grams >> self._shift]

    def holds(self, grams: np.ndarray) -> np.ndarray:
        if not len(self._grams):
            return np.zeros(len(grams), bool)
        return self._grams[np.searchsorted(self._grams, grams).clip(max=len(self._grams) - 1)] == grams

    def owners_of(self, grams: np.ndarray) -> np.ndarray:
        here = np.unique(grams)
        first, last = np.searchsorted(self._grams, here, "left"), np.searchsorted(self._grams, here, "right")
        return np.concatenate([self._owners[:0], *(self._owners[a:b] for a, b in zip(first, last, strict=True) if b > a)])

    def forget(self, numbers: np.ndarray) -> None:
        kept = ~np.isin(self._owners, numbers)
        self._grams, self._owners = self._grams[kept], self._owners[kept]


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Some texts at a time."""
    some, held = list[str](), 0
    for text in texts:
        some.append(text)
        held += len(text)
        if held >= BLOCK:
            yield some
            some, held = [], 0
    if some:
        yield some


def _hashed(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [words], a hash of each word of the texts; int64 [words], the text that it is of."""
    written = [text.encode().translate(_LETTERS) if text.isascii() else b"\0".join(word.encode() for word in words(text)) for text in texts]
    data = np.frombuffer(b"\0".join([b"", *written, bytes(8)]), np.uint8)
    letters = data != 0
    edges = np.flatnonzero(letters[1:] != letters[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    owners = np.repeat(np.arange(len(texts)), np.diff(np.searchsorted(starts, np.cumsum([1, *(len(text) + 1 for text in written)]))))
    eights = np.lib.stride_tricks.sliding_window_view(data, 8)
    hashes = np.zeros(len(starts), np.uint64)
    left = np.arange(len(starts))
    with np.errstate(over="ignore"):
        for at in range(0, LONGEST, 8):
            piece = eights[starts[left] + at].view("<u8")[:, 0] & _FIRST[(ends[left] - starts[left] - at).clip(max=8)]
            mixed = (hashes[left] ^ piece) * _FACTOR
            hashes[left] = (mixed ^ (mixed >> np.uint64(29))) * _FACTOR
            left = left[ends[left] - starts[left] > at + 8]
            if not len(left):
                break
    return hashes, owners


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
    for some in _blocks(documents):
        new = grams.found_in(some)
        found.update(new.tolist())
        if len(new) > MANY:
            grams.forget(new)
    return sorted(found)
