"""The stream: everything a run consumes, as a pure function of (seed, i).

`Stream[i]` is item i of the run, however the batch is split, however many workers and ranks read it, and wherever it
was resumed: `epoch, k = divmod(i, rows)`, the row `permuted(k)` of that epoch, its noise from a generator keyed by
(seed, i). Resuming is arithmetic, and no state is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmssl.data.tokens import TokenSet
from lmssl.objectives.base import IGNORE, Arrays, Family, Objective, Row, Vocab, first_tokens, lengths_of

if TYPE_CHECKING:
    import torch

_MASK = 2**64 - 1
SAMPLE = 2048
"""Rows that are looked at for the lengths of batches: less than a second's work."""


def mix(*values: int) -> int:
    """64 bits that depend on every bit of the values: splitmix64's finaliser, chained."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ value) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def permuted(k: int, n: int, seed: int, epoch: int) -> int:
    """Where a shuffle of range(n) puts k: a bijection for each (seed, epoch), in constant memory.

    A Feistel network over the smallest even number of bits that holds n; values beyond n walk on through it.

    >>> sorted(permuted(k, 10, seed=0, epoch=3) for k in range(10))
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = k >> half, k & low
        for turn in range(6):
            left, right = right, left ^ (mix(seed, epoch, turn, right) & low)
        k = left << half | right
        if k < n:
            return k


def generator(seed: int, i: int) -> np.random.Generator:
    """The noise of item i: no global state, no worker and no rank in its key."""
    return np.random.Generator(np.random.Philox(key=np.array([seed & _MASK, i], np.uint64)))


class Stream:
    """A map-style dataset as long as the run: item i -> the objective's arrays.

    Args:
        tokens: the token set.
        objective: what to make of each row.
        seq_length: tokens that the model reads.
        seed: of order and noise.
        length: number of items; None for one pass in file order (held-out text).
        start: the decoder's start id, where a model fixes one.
    """

    def __init__(self, tokens: TokenSet, objective: Objective, seq_length: int, seed: int, length: int | None, start: int | None = None):
        self.tokens, self.objective, self.seed = tokens, objective, seed
        self.vocab: Vocab = tokens.vocab(start)
        self.seq_length, self.row_length = seq_length, objective.row_length(seq_length)
        self.rows = tokens.rows(self.row_length)
        self.shuffled = length is not None
        self.length = self.rows if length is None else length

    def __len__(self) -> int:
        return self.length

    def most_documents(self) -> int:
        """Documents in a row, at most, padding counted as one."""
        return self.tokens.most_documents(self.row_length)

    def index(self, i: int) -> tuple[int, int]:
        """Epoch and row of item i."""
        epoch, k = divmod(i, self.rows)
        return epoch, permuted(k, self.rows, self.seed, epoch) if self.shuffled else k

    def row(self, i: int) -> Row:
        """The row that item i is made of, before any noise."""
        return self.tokens.row(self.index(i)[1], self.row_length, self.vocab.pad)

    def __getitem__(self, i: int) -> Arrays:
        if not 0 <= i < self.length:
            raise IndexError(f"item {i} of a stream of {self.length}")
        return self.objective(self.row(i), self.vocab, generator(self.seed, i))


class Collator:
    """Rows -> one batch of tensors: padded to the objective's fixed lengths, labels gathered to where they are predicted.

    The batch holds what `forward` takes, `segments` (which lmssl.forward turns into masks), and

    * `labels` int64 [K]: the labelled tokens, padded with -100 to a fixed K;
    * `label_positions` int64 [K]: the flat position whose logits predict each, so that the vocabulary is projected
      nowhere else. For decoders that is the position before;
    * `borders` int32 [N + 1], where `most_documents` is given: where each document begins, rows laid end to end, and where the
      last one ends, again and again up to a length that batches share, as compilation wants it.

    Args:
        objective, seq_length, family: of the run.
        pad: the id.
        most_documents: in a row, padding counted as one; an objective that makes more of them gets longer `borders`.
        lengths: to pad to; None takes all of the objective's.
    """

    def __init__(self, objective: Objective, seq_length: int, family: Family, pad: int, most_documents: int | None = None, lengths: Mapping[str, Sequence[int]] | None = None):
        self.lengths = lengths or objective.lengths(seq_length)
        self.most_labels = objective.most_labels(seq_length)
        self.family, self.pad, self.most_documents = family, pad, most_documents

    def __call__(self, items: list[Arrays]) -> dict[str, torch.Tensor]:
        import torch

        arrays: dict[str, np.ndarray] = {}
        for name in items[0]:
            rows = [item[name] for item in items]
            allowed = self.lengths[lengths_of(name)]
            longest = max(map(len, rows))
            width = next((n for n in allowed if n >= longest), None)
            if width is None:
                raise ValueError(f"{name} of {longest} exceeds the bound {allowed[-1]} that the objective promised")
            fill = IGNORE if name == "labels" else 0 if name.endswith("segments") else self.pad
            padded = np.full((len(rows), width), fill, np.int64)
            for b, row in enumerate(rows):
                padded[b, : len(row)] = row
            arrays[name] = padded
        labels = arrays["labels"]
        at = np.flatnonzero(labels.reshape(-1) != IGNORE)
        capacity = len(items) * min(self.most_labels, labels.shape[1])
        if len(at) > capacity:
            raise ValueError(f"{len(at)} labels exceed the bound {capacity} that the objective promised")
        positions, targets = np.zeros(capacity, np.int64), np.full(capacity, IGNORE, np.int64)
        positions[: len(at)] = at - 1 if self.family == "decoder" else at
        targets[: len(at)] = labels.reshape(-1)[at]
        arrays |= {"labels": targets, "label_positions": positions}
        if self.most_documents is not None:
            arrays["borders"] = borders(arrays["segments"], self.most_documents)
        return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}


def two_lengths(stream: Stream, seq_length: int) -> dict[str, tuple[int, ...]]:
    """Of an objective's lengths those that a run pads to: the smallest that its first rows fit in, with a token to spare, and the last, which
    holds every row. Each length more is a shape more to compile; one that is chosen without a look at the text is padding for most texts.

    Args:
        stream: of the run.
        seq_length: tokens that the model reads.
    """
    lengths = stream.objective.lengths(seq_length)
    if all(len(some) < 2 for some in lengths.values()):
        return lengths
    longest = dict.fromkeys(lengths, 0)
    for i in range(min(SAMPLE, len(stream))):
        for name, array in stream[i].items():
            longest[lengths_of(name)] = max(longest[lengths_of(name)], len(array))
    return {name: tuple(sorted({next((n for n in some if n > longest[name]), some[-1]), some[-1]})) for name, some in lengths.items()}


def borders(segments: np.ndarray, most: int) -> np.ndarray:
    """Of [B, L] segments, as `Collator` says.

    >>> borders(np.array([[1, 1, 2], [1, 0, 0]]), 3).tolist()
    [0, 2, 3, 4, 6, 6, 6]
    """
    found, room = np.flatnonzero(first_tokens(segments)), len(segments) * most
    while room < len(found):
        room *= 2
    return np.concatenate([found, np.full(room + 1 - len(found), segments.size)]).astype(np.int32)


class Onwards:
    """The items of a run that are still to come, as a sampler of torch's DataLoader.

    Args:
        begin, end: its items.
        length: of the whole run in items, from which transformers counts the steps.
    """

    def __init__(self, begin: int, end: int, length: int):
        self.items, self.length = range(begin, end), length

    def __iter__(self) -> Iterator[int]:
        return iter(self.items)

    def __len__(self) -> int:
        return self.length


def count_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """Non-padding input tokens of a batch, encoder and decoder: a number on the batch's device, which need not be waited for."""
    import torch

    return torch.stack([(batch[name] != 0).sum() for name in ("segments", "decoder_segments") if name in batch]).sum()
