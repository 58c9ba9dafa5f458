"""Rows before and after an objective, for a terminal."""

from __future__ import annotations

import os
import unicodedata
from typing import IO

import numpy as np

from lmssl.data.stream import Stream
from lmssl.objectives.base import IGNORE, Arrays, Vocab, first_tokens
from lmssl.tokenization import Tokenizer

DIRECTIONS = set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn around how a terminal shows what follows."""
STYLES = {"plain": "", "special": "2", "mask": "30;43", "random": "30;41", "kept": "30;46", "sentinel": "30;45"}
"""ANSI codes by what happened to a token."""
MARKS = {"mask": ("[", "]"), "random": ("{", "}"), "kept": ("(", ")"), "sentinel": ("", "")}
"""Brackets that say the same without colour."""
LEGEND = {"mask": "masked", "random": "replaced at random", "kept": "asked, left as it is", "sentinel": "sentinel", "special": "special token"}


def wants_colour(stream: IO[str]) -> bool:
    """Colour on a terminal, unless NO_COLOR is set; FORCE_COLOR asks for it anywhere."""
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and not os.environ.get("NO_COLOR"))


def row(stream: Stream, tokenizer: Tokenizer, i: int, colour: bool, width: int = 100) -> str:
    """Item i of a stream: the text, what the model reads, what it is asked."""
    before, arrays = stream.row(i), stream[i]
    used = before.segments > 0
    epoch, k = stream.index(i)
    vocab = stream.vocab
    lines = [f"item {i} (epoch {epoch}, row {k}): {len(np.unique(before.segments[used]))} documents, {int(used.sum())} tokens"]
    lines += _block("text", before.ids[used], _kinds(before.ids[used], vocab), tokenizer, colour, width)
    own = arrays["segments"] > 0
    kinds = _kinds(arrays["input_ids"][own], vocab)
    if "decoder_input_ids" not in arrays:
        kinds = _changed(arrays, before.ids, own, kinds)
    lines += _block("input", arrays["input_ids"][own], kinds, tokenizer, colour, width)
    labels = arrays["labels"][arrays["labels"] != IGNORE]
    if "decoder_input_ids" in arrays:
        lines += _block("target", labels, _kinds(labels, vocab), tokenizer, colour, width)
    lines.append(f"  {len(labels)} labels, {len(labels) / max(int(used.sum()), 1):.1%} of the tokens")
    return "\n".join(lines)


def legend(colour: bool) -> str:
    """What the colours (or brackets) mean."""
    return "  ".join(_paint(text, kind, colour) for kind, text in LEGEND.items())


def _kinds(ids: np.ndarray, vocab: Vocab) -> list[str]:
    sentinels = set(vocab.sentinels.tolist())
    return ["sentinel" if i in sentinels else "mask" if i == vocab.mask else "special" if vocab.special[i] else "plain" for i in ids.tolist()]


def _changed(arrays: Arrays, before: np.ndarray, own: np.ndarray, kinds: list[str]) -> list[str]:
    """Where a label is asked without a [MASK]: replaced at random, or left as it is. Next-token rows stay plain."""
    asked = arrays["labels"][own] != IGNORE
    if (asked | first_tokens(arrays["segments"][own])).all():
        return kinds
    same = arrays["input_ids"][own] == before[own]
    return ["kept" if a and s else "random" if a and k == "plain" else k for k, a, s in zip(kinds, asked, same, strict=True)]


def _block(title: str, ids: np.ndarray, kinds: list[str], tokenizer: Tokenizer, colour: bool, width: int) -> list[str]:
    """One labelled, wrapped paragraph; neighbouring tokens of one kind are decoded together."""
    runs: list[tuple[str, list[int]]] = []
    for i, kind in zip(ids.tolist(), kinds, strict=True):
        if runs and runs[-1][0] == kind == "plain":
            runs[-1][1].append(i)
        else:
            runs.append((kind, [i]))
    words: list[tuple[str, str]] = []
    for kind, members in runs:
        text = _visible(tokenizer.decode(members))
        if tokenizer.vocab().word_start[members[0]] and words and words[-1][0] != "special" and not text[:1].isspace():  # WordPiece: a word decoded alone has no space before it
            text = f" {text}"
        words += [(kind, w) for w in ([text] if kind != "plain" else _split(text)) if w]
    lines, line, used = [], "", 0
    for kind, word in words:
        left, right = MARKS.get(kind, ("", "")) if not colour else ("", "")
        size = len(word) + len(left) + len(right)
        if used and used + size > width - 10:
            lines.append(line)
            line, used, word = "", 0, word.lstrip() if kind == "plain" else word
        line += _paint(word, kind, colour)
        used += size
    lines.append(line)
    return [f"  {title if n == 0 else '':7} {text}" for n, text in enumerate(lines)]


def _visible(text: str) -> str:
    """A text on one line, without what a terminal would obey.

    >>> _visible("two\\nlines\\x1b[2J")
    'two lines\\\\x1b[2J'
    """
    return "".join(" " if c in "\n\t" else repr(c)[1:-1] if unicodedata.category(c) == "Cc" or c in DIRECTIONS else c for c in text)


def _split(text: str) -> list[str]:
    """Words, each with the space before it."""
    return [w for w in text.replace(" ", "\0 ").split("\0") if w]


def _paint(text: str, kind: str, colour: bool) -> str:
    if not colour:
        left, right = MARKS.get(kind, ("", ""))
        return f"{left}{text}{right}"
    return f"\x1b[{STYLES[kind]}m{text}\x1b[0m" if STYLES[kind] else text
