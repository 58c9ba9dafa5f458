"""Masked-token reconstruction: single tokens, whole words or spans."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from lmssl.objectives.base import IGNORE, Arrays, Family, Row, SameLength, Vocab, check_rate, round_random

LONGEST_SPAN = 10_000
"""Words of `span_max` at most: each row draws from a table of so many lengths."""


@dataclass(frozen=True, slots=True)
class MaskedTokens(SameLength):
    """Hide some tokens and predict them from both sides: the masked language model of BERT.

    Of the maskable tokens (no special, no padding) a share `rate` is selected: exactly that share in the mean, for
    rows of any length. Of the selected, 80% become [MASK], 10% an ordinary token drawn at random and 10% stay as
    they are (a span as a whole); the labels ask for all of them.

    What is selected together:

    * `token`: each token alone (Devlin et al. 2018, 1810.04805).
    * `word`: all pieces of a word, by the tokenizer's own word marks (BERT, whole word masking). A word that would
      exceed the share is left out, so the share is kept from below.
    * `span`: runs of whole words; the length is geometric with p = 0.2 among 1 to 10 words, mean 3.8 (SpanBERT, Joshi
      et al. 2019, 1907.10529).

    A rate of 0.3-0.4 often beats 0.15 (Wettig et al. 2022, 2202.08005); held-out loss is measured at 0.15 always.

    At rate 0.5, everything selected masked (mask = 4, eos = 1):

        ids       = [10 11 12 13  1]
        ->
        input_ids = [10  4  4 13  1]
        labels    = [ . 11 12  .  .]      . is -100

    >>> from lmssl.objectives.toy import vocab
    >>> row = Row(np.array([10, 11, 12, 13, 1]), np.ones(5, int))
    >>> out = MaskedTokens(rate=0.5, mask=1.0, random=0.0)(row, vocab(), np.random.default_rng(6))
    >>> out["input_ids"].tolist(), out["labels"].tolist()
    ([10, 4, 4, 13, 1], [-100, 11, 12, -100, -100])
    """

    rate: float = 0.15
    """Share of the maskable tokens that is selected."""
    unit: Literal["token", "word", "span"] = "token"
    """What is selected together."""
    mask: float = 0.8
    """Share of the selected that becomes [MASK]."""
    random: float = 0.1
    """Share of the selected that becomes a random ordinary token; what is left stays as it is."""
    span_p: float = 0.2
    """Parameter of the geometric span length, in words (unit: span)."""
    span_max: int = 10
    """Longest span, in words (unit: span)."""

    families: ClassVar[frozenset[Family]] = frozenset({"encoder"})
    needs: ClassVar[frozenset[str]] = frozenset({"mask"})

    def __post_init__(self) -> None:
        check_rate("rate", self.rate, open_low=True)
        check_rate("mask", self.mask)
        check_rate("random", self.random)
        check_rate("mask + random", self.mask + self.random, high=1.0 + 1e-9)
        check_rate("span_p", self.span_p, open_low=True)
        if not 1 <= self.span_max <= LONGEST_SPAN:
            raise ValueError(f"span_max={self.span_max} must be between 1 and {LONGEST_SPAN:,} words")

    def most_labels(self, model_length: int) -> int:
        return min(model_length, int(self.rate * model_length) + 1)

    def held_out(self) -> MaskedTokens:
        return replace(self, rate=0.15)

    def __call__(self, row: Row, vocab: Vocab, rng: np.random.Generator) -> Arrays:
        maskable = np.flatnonzero((row.segments > 0) & ~vocab.special[row.ids])
        budget = round_random(self.rate * len(maskable), rng)
        if self.unit == "token":
            chosen = rng.permutation(maskable)[:budget]
        else:
            chosen, span = self._groups(row, vocab, maskable, budget, rng)
        input_ids, labels = row.ids.copy(), np.full_like(row.ids, IGNORE)
        labels[chosen] = row.ids[chosen]
        fate = rng.random(len(chosen))
        if self.unit == "span":  # SpanBERT's spans are masked, replaced or kept as a whole
            fate = fate[np.unique(span, return_inverse=True)[1]]
        input_ids[chosen[fate < self.mask]] = vocab.mask
        replaced = chosen[(fate >= self.mask) & (fate < self.mask + self.random)]
        input_ids[replaced] = vocab.ordinary[rng.integers(len(vocab.ordinary), size=len(replaced))]
        return {"input_ids": input_ids, "segments": row.segments, "labels": labels}

    def _groups(self, row: Row, vocab: Vocab, maskable: np.ndarray, budget: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Positions of whole words (or runs of words), visited in random order, as many as the budget holds; and the number of each one's run."""
        if not len(maskable):
            return maskable, maskable
        starts = vocab.word_start[row.ids[maskable]].copy()
        # A gap (special token, padding) or another document begins a word even where the token carries no mark.
        starts[0] = True
        starts[1:] |= vocab.word_end[row.ids[maskable[:-1]]] | (np.diff(maskable) > 1) | (np.diff(row.segments[maskable]) != 0)
        begins = np.flatnonzero(starts)
        ends = np.append(begins[1:], len(maskable))
        segment = row.segments[maskable][begins]
        free, left = np.ones(len(begins), bool), budget
        selected, span = np.zeros(len(maskable), bool), np.zeros(len(maskable), int)
        order, words = rng.permutation(len(begins)), np.ones(len(begins), int)
        if self.unit == "span":
            law = (1 - self.span_p) ** np.arange(self.span_max)
            words += rng.choice(self.span_max, len(begins), p=law / law.sum())
        for first, count in zip(order, words, strict=True):
            for w in range(first, min(first + count, len(begins))):
                size = ends[w] - begins[w]
                if not free[w] or segment[w] != segment[first] or size > left:
                    break
                free[w], left = False, left - size
                selected[begins[w] : ends[w]], span[begins[w] : ends[w]] = True, first
            if left == 0:
                break
        return maskable[selected], span[selected]
