"""Corrupted-text denoising for encoder-decoders: T5's span corruption and BART's noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmssl.objectives.base import Arrays, Family, Row, SameLength, Vocab, check_rate, round_random, spans_of

ROOM = 4
"""Tokens by which a row of span corruption stays below what its model reads: what a few borders of documents add."""


def random_lengths(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`total` split into `parts` lengths of at least 1, all splits equally likely: int64 [parts]."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def joined(pieces: list[np.ndarray], segments: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of documents end to end, int32, and the document number of every position."""
    ids = np.concatenate([*pieces, np.empty(0, np.int32)]).astype(np.int32)
    return ids, np.repeat(np.array(segments, np.int32), [len(p) for p in pieces])


def encoder_arrays(inputs: list[np.ndarray], segments: list[int]) -> Arrays:
    """What the encoder reads."""
    ids, numbers = joined(inputs, segments)
    return {"input_ids": ids, "segments": numbers}


def decoder_arrays(targets: list[np.ndarray], segments: list[int], start: int) -> Arrays:
    """Labels and the decoder input that predicts them, each document starting anew from `start`."""
    labels, numbers = joined(targets, segments)
    inputs, _ = joined([np.concatenate([[start], t[:-1]]) for t in targets], segments)
    return {"decoder_input_ids": inputs, "decoder_segments": numbers, "labels": labels}


@dataclass(frozen=True, slots=True)
class SpanCorruption:
    """Replace spans by sentinels and predict the spans: the denoising objective of T5.

    `rate` of the tokens are noise, in spans of mean length `mean_span`; span and gap lengths are uniform random
    splits, no two spans touch. Each span becomes one sentinel in the encoder; the decoder spells `sentinel span
    sentinel span ... eos`. Specials are never noise, so no span crosses a document; sentinels and decoder start
    anew with each document, and a document without noise has no decoder part.

    Paper: Raffel et al. 2019, 1910.10683, section 3.1.4 and appendix; lengths as in its reference code.

    Twelve tokens of one document (eos = 1, start = 2, sentinels 39, 38), rate 0.3, mean span 2:

        ids               = [10 11 12 13 14 15 16 17 18 19 20  1]
        ->
        input_ids         = [10 11 39 14 15 16 17 18 19 38  1]
        decoder_input_ids = [ 2 39 12 13 38 20]
        labels            = [39 12 13 38 20  1]

    >>> from lmssl.objectives.toy import vocab
    >>> row = Row(np.array([10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 1]), np.ones(12, int))
    >>> out = SpanCorruption(rate=0.3, mean_span=2.0)(row, vocab(), np.random.default_rng(4))
    >>> out["input_ids"].tolist()
    [10, 11, 39, 14, 15, 16, 17, 18, 19, 38, 1]
    >>> out["decoder_input_ids"].tolist()
    [2, 39, 12, 13, 38, 20]
    >>> out["labels"].tolist()
    [39, 12, 13, 38, 20, 1]

    The arithmetic of T5: 568 tokens of one document become 512 and 114 labels. A row is a few tokens shorter, so that the borders of several
    documents find room in the same 512 (ROOM).

    >>> SpanCorruption().expected(568), SpanCorruption().row_length(512)
    ((512, 114), 564)
    """

    rate: float = 0.15
    """Share of the tokens that is noise."""
    mean_span: float = 3.0
    """Mean span length, tokens."""

    families: ClassVar[frozenset[Family]] = frozenset({"encoder-decoder"})
    needs: ClassVar[frozenset[str]] = frozenset({"sentinels"})

    def __post_init__(self) -> None:
        check_rate("rate", self.rate, open_low=True, high=0.9)
        check_rate("mean_span", self.mean_span, low=1.0, high=1000.0)

    def counts(self, tokens: int) -> tuple[int, int]:
        """Noise tokens and spans among `tokens` maskable ones."""
        noise = min(max(round(tokens * self.rate), 1), tokens - 1)
        spans = min(max(round(noise / self.mean_span), 1), noise, tokens - noise)
        return noise, spans

    def expected(self, raw: int) -> tuple[int, int]:
        """Encoder and decoder length of `raw` tokens of one document, each with its closing eos."""
        noise, spans = self.counts(raw)
        return raw - noise + spans + 1, noise + spans + 1

    def row_length(self, model_length: int) -> int:
        raw = max(2, model_length - ROOM - 1)
        while self.expected(raw + 1)[0] <= model_length - ROOM:
            raw += 1
        return raw

    def lengths(self, model_length: int) -> dict[str, tuple[int, ...]]:
        # Each border may split a span (one more sentinel) and closes a decoder part (one more eos), so that the lengths of a row depend
        # on its text. They are bounded by what every noise token being a span and a document of its own would take.
        raw = self.row_length(model_length)
        encoder, decoder = self.expected(raw)
        return {"input_ids": _steps(encoder, raw), "labels": _steps(decoder, 3 * self.counts(raw)[0])}

    def most_labels(self, model_length: int) -> int:
        return self.lengths(model_length)["labels"][-1]

    def held_out(self) -> SpanCorruption:
        return self

    def doubt(self, model_length: int, vocab: Vocab) -> str | None:
        """What a run with rows of this length should be warned of."""
        spans, sentinels = self.counts(self.row_length(model_length))[1], len(vocab.sentinels)
        if spans <= sentinels:
            return None
        return (
            f"objective: a document that fills a row has {spans} spans, the tokenizer {sentinels} sentinels: {1 - sentinels / spans:.0%} of its noise is left out; "
            "a larger objective.mean_span, or a smaller data.seq_length, leaves none out"
        )

    def __call__(self, row: Row, vocab: Vocab, rng: np.random.Generator) -> Arrays:
        maskable = np.flatnonzero((row.segments > 0) & ~vocab.special[row.ids])
        noise = np.zeros(len(row.ids), bool)
        if len(maskable) >= 2:
            tokens, spans = self.counts(len(maskable))
            gaps = random_lengths(len(maskable) - tokens, spans, rng)
            runs = random_lengths(tokens, spans, rng)
            pattern = np.repeat(np.tile([False, True], spans), np.stack([gaps, runs], 1).reshape(-1))
            noise[maskable[pattern]] = True
        inputs, numbers, targets, documents = [], [], [], []
        for begin, end in row.documents():
            kept, spelled = self._corrupt(row.ids[begin:end], noise[begin:end], vocab)
            inputs.append(kept)
            numbers.append(int(row.segments[begin]))
            if len(spelled) > 1:
                targets.append(spelled)
                documents.append(int(row.segments[begin]))
        return encoder_arrays(inputs, numbers) | decoder_arrays(targets, documents, vocab.start)

    @staticmethod
    def _corrupt(ids: np.ndarray, noise: np.ndarray, vocab: Vocab) -> tuple[np.ndarray, np.ndarray]:
        """One document: what the encoder keeps, and what the decoder spells (eos last)."""
        spans = spans_of(noise.astype(np.int8))
        if len(spans) > len(vocab.sentinels):  # those that no sentinel is left for stay text, all over the document
            spans = [spans[i] for i in np.linspace(0, len(spans) - 1, len(vocab.sentinels)).round().astype(int)]
        kept: list[np.ndarray] = []
        spelled: list[np.ndarray] = []
        at = 0
        for (begin, end), sentinel in zip(spans, vocab.sentinels, strict=False):
            kept += [ids[at:begin], np.array([sentinel])]
            spelled += [np.array([sentinel]), ids[begin:end]]
            at = end
        return np.concatenate([*kept, ids[at:]]), np.concatenate([*spelled, np.array([vocab.eos])])


@dataclass(frozen=True, slots=True)
class Infilling(SameLength):
    """Corrupt a text in BART's ways and predict the whole of it.

    In this order, each within its document: sentences are shuffled (`permute`), spans covering `rate` of the tokens
    with Poisson(`mean_span`) lengths each become one [MASK], where a span of length 0 inserts a [MASK]; single
    tokens are masked (`mask_rate`) or deleted (`delete_rate`); the document is rotated to begin at a random token
    (`rotate`). BART's own choice is infilling and sentence permutation. The decoder spells the original.

    Paper: Lewis et al. 2019, 1910.13461, section 2.2.

    A span of two (mask = 4, eos = 1, start = 2), no permutation:

        ids               = [10 11 12 13 14  1]
        ->
        input_ids         = [10 11  4 14  1]
        decoder_input_ids = [ 2 10 11 12 13 14]
        labels            = [10 11 12 13 14  1]

    >>> from lmssl.objectives.toy import vocab
    >>> row = Row(np.array([10, 11, 12, 13, 14, 1]), np.ones(6, int))
    >>> out = Infilling(rate=0.4, permute=0.0)(row, vocab(), np.random.default_rng(1))
    >>> out["input_ids"].tolist()
    [10, 11, 4, 14, 1]
    >>> out["decoder_input_ids"].tolist()
    [2, 10, 11, 12, 13, 14]
    >>> out["labels"].tolist()
    [10, 11, 12, 13, 14, 1]
    """

    rate: float = 0.3
    """Share of the tokens covered by spans."""
    mean_span: float = 3.0
    """Mean of the Poisson span length, tokens."""
    permute: float = 1.0
    """Share of the sentences that is shuffled."""
    mask_rate: float = 0.0
    """Share of the remaining tokens masked one by one."""
    delete_rate: float = 0.0
    """Share of the remaining tokens deleted."""
    rotate: float = 0.0
    """Share of the documents that is rotated."""

    families: ClassVar[frozenset[Family]] = frozenset({"encoder-decoder"})
    needs: ClassVar[frozenset[str]] = frozenset({"mask"})

    def __post_init__(self) -> None:
        for name in ("rate", "permute", "mask_rate", "delete_rate", "rotate"):
            check_rate(name, getattr(self, name))
        check_rate("mean_span", self.mean_span, low=1.0, high=1000.0)
        if not any((self.rate, self.permute, self.mask_rate, self.delete_rate, self.rotate)):
            raise ValueError("every noise is 0: nothing would be learnt; set rate=0.3 and permute=1.0 for BART's own mix")

    def __call__(self, row: Row, vocab: Vocab, rng: np.random.Generator) -> Arrays:
        documents = row.documents()
        texts, numbers = [row.ids[begin:end] for begin, end in documents], [int(row.segments[begin]) for begin, _ in documents]
        return encoder_arrays([self._corrupt(ids, vocab, rng) for ids in texts], numbers) | decoder_arrays(texts, numbers, vocab.start)

    def _corrupt(self, ids: np.ndarray, vocab: Vocab, rng: np.random.Generator) -> np.ndarray:
        """One document with its noise; the special tokens at its ends stay where they are."""
        ordinary = np.flatnonzero(~vocab.special[ids])
        if len(ordinary) < 2:
            return ids
        first, last = int(ordinary[0]), int(ordinary[-1]) + 1
        text, mask = ids[first:last], int(vocab.mask or 0)
        if self.permute:
            text = self._shuffle_sentences(text, vocab, rng)
        if self.rate:
            text = self._infill(text, vocab, rng)
        if self.mask_rate:
            text = np.where(~vocab.special[text] & (rng.random(len(text)) < self.mask_rate), mask, text)
        if self.delete_rate:
            stays = vocab.special[text] | (rng.random(len(text)) >= self.delete_rate)
            stays[0] |= not stays.any()  # of a document that the encoder does not see at all the decoder would look at others
            text = text[stays]
        if self.rotate and len(text) > 1 and rng.random() < self.rotate:
            text = np.roll(text, -int(rng.integers(1, len(text))))
        return np.concatenate([ids[:first], text, ids[last:]])

    def _shuffle_sentences(self, text: np.ndarray, vocab: Vocab, rng: np.random.Generator) -> np.ndarray:
        ends = np.flatnonzero(vocab.sentence_end[text]) + 1
        # "..." and "?!" close one sentence, not several.
        ends = ends[np.append(np.diff(ends) > 1, True)] if len(ends) else ends
        sentences = np.split(text, ends[ends < len(text)])
        count = len(sentences)
        moved = np.sort(rng.permutation(count)[: round_random(self.permute * count, rng)])
        order = np.arange(count)
        order[moved] = rng.permutation(moved)
        return np.concatenate([sentences[i] for i in order])

    def _infill(self, text: np.ndarray, vocab: Vocab, rng: np.random.Generator) -> np.ndarray:
        ordinary = np.flatnonzero(~vocab.special[text])
        noise = round_random(self.rate * len(ordinary), rng)
        spans: list[int] = []
        while (left := noise - sum(spans)) > 0:
            spans.append(min(int(rng.poisson(self.mean_span)), left))
        covered = [s for s in spans if s]
        # An inserted [MASK] takes a place that longer spans set free, so a row never outgrows its length.
        inserted = min(len(spans) - len(covered), noise - len(covered))
        # Spans go to uniformly random places: gaps before, between and after them are a random split that may be 0.
        gaps = random_lengths(len(ordinary) - noise + len(covered) + 1, len(covered) + 1, rng) - 1
        filled, kept = text.copy(), np.ones(len(text), bool)
        at = 0
        for gap, span in zip(gaps, covered, strict=False):
            hidden = ordinary[at + gap : at + gap + span]
            filled[hidden[0]] = vocab.mask
            kept[hidden[1:]] = False
            at += gap + span
        filled = filled[kept]
        return np.insert(filled, rng.integers(0, len(filled) + 1, size=inserted), int(vocab.mask or 0))


def _steps(least: int, most: int, multiple: int = 8) -> tuple[int, ...]:
    """Multiples of what vector units like, from the first that holds `least` to the first that holds `most`.

    >>> _steps(60, 70)
    (64, 72)
    """
    up = [-(-length // multiple) * multiple for length in (least, max(least, most))]
    return tuple(range(up[0], up[1] + 1, multiple))
