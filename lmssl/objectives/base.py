"""What an objective is given and what it returns: rows, a vocabulary, arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

Family = Literal["decoder", "encoder", "encoder-decoder"]
Arrays = dict[str, np.ndarray]

IGNORE = -100
"""The label of a position without a label: transformers' own convention."""


@dataclass(frozen=True, slots=True)
class Row:
    """Packed tokens, straight from the stream.

    Attributes:
        ids: int32 [L], token ids; documents stand one after another, each ends with `eos` (and begins with `bos`
            where the tokenizer has one) unless the row cut it.
        segments: int32 [L], which document a position belongs to: 1, 1, 2, 2, 0. 0 is padding and stands last.
    """

    ids: np.ndarray
    segments: np.ndarray

    def documents(self) -> list[tuple[int, int]]:
        """The [begin, end) of each document in the row, padding left out."""
        return spans_of(self.segments)


@dataclass(frozen=True, slots=True)
class Vocab:
    """What an objective may know of a tokenizer. Arrays are indexed by token id.

    Attributes:
        size: number of ids, added tokens included.
        pad, bos, eos, mask: special ids; None where the tokenizer has none (pad falls back to eos).
        start: the id that a decoder is started with.
        sentinels: int32 [S], <extra_id_0>, <extra_id_1>, ... in the order they are used.
        special: bool [size], ids that are never masked, never predicted by noise and never drawn as replacements.
        word_start: bool [size], the token begins a word (by the tokenizer's own mark, or in a script without spaces).
        word_end: bool [size], the token ends a word, where the tokenizer marks ends.
        sentence_end: bool [size], the token closes a sentence.
        token_bytes: int32 [size], UTF-8 bytes of text the token stands for; 0 for specials.
        ordinary: int32, the ids that are not special (derived).
    """

    size: int
    pad: int
    bos: int | None
    eos: int
    mask: int | None
    start: int
    sentinels: np.ndarray
    special: np.ndarray
    word_start: np.ndarray
    word_end: np.ndarray
    sentence_end: np.ndarray
    token_bytes: np.ndarray
    ordinary: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ordinary", np.flatnonzero(~self.special).astype(np.int32))


class Objective(Protocol):
    """A pretext task: a frozen dataclass whose fields are its configuration.

    To add one, write a dataclass with these members (see docs/extending.md); a recipe reaches it by
    `objective: {name: "package.module:Class", ...}` without a change here.

    It may also have `doubt(model_length, vocab) -> str | None`: what a run warns of before it begins, where its settings do not suit
    the rows or the tokenizer.
    """

    families: ClassVar[frozenset[Family]]
    """The model families it can train."""
    needs: ClassVar[frozenset[str]]
    """Special tokens it cannot do without: of "mask", "sentinels"."""

    def row_length(self, model_length: int) -> int:
        """Raw tokens in a row for a model that reads `model_length` tokens."""
        ...

    def lengths(self, model_length: int) -> dict[str, tuple[int, ...]]:
        """For each returned array family ("input_ids", "labels"), the lengths it may be padded to, ascending.

        The last one is a proven bound: no row of `row_length` tokens ever needs more, so nothing is ever truncated.
        A batch is padded to the smallest that holds its rows; while training to one of two, so that shapes stay few
        enough to compile (`lmssl.data.stream.two_lengths`).
        """
        ...

    def most_labels(self, model_length: int) -> int:
        """A proven bound on labelled positions in one row: the vocabulary is projected at no more than these."""
        ...

    def held_out(self) -> Objective:
        """The objective that held-out loss is measured with: of masked tokens always 15%, so that runs at other rates compare; of the others the same."""
        ...

    def __call__(self, row: Row, vocab: Vocab, rng: np.random.Generator) -> Arrays:
        """`forward()`'s arguments by name, plus `segments` (and `decoder_segments`): int arrays, one dimension each.

        `labels` are transformers' own: unshifted for decoders, -100 where nothing is asked.
        """
        ...


def fault(item: Any, size: int, family: Family | None = None) -> str | None:
    """What is wrong with what an objective returned, None where it will do.

    Args:
        item: should be `Arrays`, as `Objective.__call__` says.
        size: of the vocabulary.
        family: of the model, where it is known: the first token of a document cannot be asked of a decoder.
    """
    if not isinstance(item, dict):
        return f"expected arrays by name, got {type(item).__name__}"
    alike = [("input_ids", "segments"), ("input_ids", "labels")]
    if family == "encoder-decoder" or "decoder_input_ids" in item:
        alike = [("input_ids", "segments"), ("decoder_input_ids", "decoder_segments"), ("decoder_input_ids", "labels")]
    if missing := [name for name in dict.fromkeys(name for pair in alike for name in pair) if name not in item]:
        return f"no {' and no '.join(missing)}"
    for name, array in item.items():
        if not isinstance(array, np.ndarray):
            return f"{name} must be a one-dimensional array of whole numbers, not {type(array).__name__}"
        if array.ndim != 1 or array.dtype.kind not in "iu":
            return f"{name} must be a one-dimensional array of whole numbers, not {array.dtype} {array.shape}"
    for one, other in alike:
        if len(item[one]) != len(item[other]):
            return f"{other} has {len(item[other])} entries, {one} {len(item[one])}"
    for name in (name for name in ("input_ids", "decoder_input_ids", "labels") if name in item):
        ids = item[name][item[name] != IGNORE] if name == "labels" else item[name]
        if len(odd := ids[(ids < 0) | (ids >= size)]):
            return f"{name} holds {odd[0]}; ids are 0 to {size - 1}" + (f", and what is not asked {IGNORE}" if name == "labels" else "")
    if family == "decoder" and (item["labels"] != IGNORE)[first_tokens(item["segments"])].any():
        return f"the first token of a document is asked, and nothing of it stands before: labels are unshifted, as transformers' own, and {IGNORE} there"
    return None


def beyond(item: Arrays, bounds: Mapping[str, Sequence[int]], most: int) -> str | None:
    """What of an item is more than its objective promised (`lengths`, `most_labels`), None where nothing is."""
    for name, array in item.items():
        if len(array) > (bound := bounds[lengths_of(name)][-1]):
            return f"{name} of {len(array)} exceeds the bound {bound} that lengths promised"
    if (asked := int((item["labels"] != IGNORE).sum())) > most:
        return f"{asked} labels exceed the bound {most} that most_labels promised"
    return None


def lengths_of(name: str) -> str:
    """Which of an objective's lengths an array of its has."""
    return "labels" if name == "labels" or name.startswith("decoder_") else "input_ids"


class SameLength:
    """For objectives whose every array is as long as the row, and whose held-out rate is their own."""

    __slots__ = ()

    def row_length(self, model_length: int) -> int:
        return model_length

    def lengths(self, model_length: int) -> dict[str, tuple[int, ...]]:
        return {"input_ids": (model_length,), "labels": (model_length,)}

    def most_labels(self, model_length: int) -> int:
        return model_length

    def held_out(self) -> Any:
        return self


def first_tokens(segments: np.ndarray) -> np.ndarray:
    """bool [..., L]: the token is its segment's first in its row."""
    first = np.ones(segments.shape, bool)
    first[..., 1:] = segments[..., 1:] != segments[..., :-1]
    return first


def spans_of(segments: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of each run of one non-zero value."""
    if not len(segments):
        return []
    edges = np.flatnonzero(np.diff(segments)) + 1
    bounds = [0, *edges.tolist(), len(segments)]
    return [(a, b) for a, b in pairwise(bounds) if segments[a] != 0]


def check_rate(name: str, value: float, *, low: float = 0.0, high: float = 1.0, open_low: bool = False) -> None:
    """`low <= value <= high` (or `low < value`), refused by name otherwise; NaN never passes."""
    if not (low <= value <= high) or (open_low and value == low):
        raise ValueError(f"{name}={value} must be {'above' if open_low else 'at least'} {low} and at most {high}")


def round_random(x: float, rng: np.random.Generator) -> int:
    """x rounded down or up, so that the mean is exactly x. Keeps a rate exact over rows of any length."""
    return int(np.floor(x + rng.random()))
