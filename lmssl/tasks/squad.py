"""Extractive answers: windows over long contexts, spans read back from logits, exact match and F1.

Format and definitions: Rajpurkar et al. 2016 (arXiv:1606.05250, SQuAD 1.1) and 2018 (arXiv:1806.03822, SQuAD 2.0).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmssl.words import spaced

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Lower case, without punctuation, articles and extra white space.

    >>> normalised("The  U.S.,  a  country")
    'us country'
    """
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def exact_match(guess: str, golds: Sequence[str]) -> float:
    """1 where the guess equals an answer after normalisation."""
    return float(any(normalised(guess) == normalised(gold) for gold in golds))


def f1(guess: str, golds: Sequence[str], empty_matches: bool = True) -> float:
    """The best F1 over the answers between bags of normalised words; where a script has no spaces, of characters.

    Args:
        empty_matches: two empty bags score 1 (SQuAD 2.0); SQuAD 1.1 scores every empty bag 0.
    """
    return max(_f1(spaced(normalised(guess)).split(), spaced(normalised(gold)).split(), empty_matches) for gold in golds)


def _f1(guess: list[str], gold: list[str], empty_matches: bool) -> float:
    if not guess or not gold:
        return float(empty_matches and guess == gold)
    shared = sum((Counter(guess) & Counter(gold)).values())
    return 2 * shared / (len(guess) + len(gold))


def scores(guesses: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean exact match and F1, as fractions; by kind of question where some have no answer.

    Args:
        guesses: "" says that there is no answer.
        answers: the gold answers of each question; none for an unanswerable one, which makes this SQuAD 2.0.
    """
    second = any(not golds for golds in answers)
    # SQuAD 2.0 leaves out gold answers that normalise to nothing; a question without any is unanswerable.
    golds = [([g for g in some if normalised(g)] or [""]) if second else list(some) for some in answers]
    exact = np.array([exact_match(guess, some) for guess, some in zip(guesses, golds, strict=True)])
    overlap = np.array([f1(guess, some, empty_matches=second) for guess, some in zip(guesses, golds, strict=True)])
    result = {"exact_match": float(exact.mean()), "f1": float(overlap.mean())}
    if second:
        has = np.array([bool(some) for some in answers])
        for name, chosen in (("answerable", has), ("unanswerable", ~has)):
            if chosen.any():
                result |= {f"exact_match_{name}": float(exact[chosen].mean()), f"f1_{name}": float(overlap[chosen].mean())}
    return result


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a context that fits the model, behind its question.

    Attributes:
        ids: int32 [L], the model's input: bos question eos context eos.
        first: position of the window's first context token.
        spans: int64 [n, 2], characters of the context for each of its n context tokens.
        null: position that stands for "no answer here".
        answer: (start, end) positions of the answer's tokens, inclusive; (null, null) where it is not wholly inside.
        exact: whether those tokens spell exactly the answer (its ends are token edges).
    """

    ids: np.ndarray
    first: int
    spans: np.ndarray
    null: int
    answer: tuple[int, int]
    exact: bool = True

    def allowed(self) -> np.ndarray:
        """bool [L]: positions that an answer may begin or end at: the context and the null position."""
        mask = np.zeros(len(self.ids), bool)
        mask[self.first : self.first + len(self.spans)] = True
        mask[self.null] = True
        return mask


def windows(
    question: np.ndarray, context: np.ndarray, spans: np.ndarray, answer: tuple[int, int] | None, *, length: int, stride: int, bos: Sequence[int], eos: int, null_last: bool
) -> list[Window]:
    """Overlapping windows over one context.

    A question longer than a third of the window loses its end. Neighbouring windows share `stride` tokens (no more
    than half of a window), so that an answer of up to that many tokens stands wholly in one of them.

    Args:
        question, context: token ids without specials.
        spans: characters [begin, end) of each context token.
        answer: characters [begin, end) of the answer, or None.
        length: tokens of a window at most.
        null_last: decoders say "no answer" at the last position, which has read everything; others at the first.
    """
    head = np.concatenate([np.array(bos, np.int32), question[: length // 3], [eos]]).astype(np.int32)
    room = length - len(head) - 1
    step = max(1, room - min(stride, room // 2))
    covered = covering(spans, answer) if answer else None
    made = []
    for begin in range(0, max(1, len(context)), step):
        part, cut = context[begin : begin + room], spans[begin : begin + room]
        ids = np.concatenate([head, part, [eos]]).astype(np.int32)
        null = len(ids) - 1 if null_last else 0
        at, exact = (null, null), True
        if covered is not None and answer is not None and begin <= covered[0] and covered[1] < begin + len(part):
            at = (len(head) + covered[0] - begin, len(head) + covered[1] - begin)
            exact = (int(spans[covered[0], 0]), int(spans[covered[1], 1])) == answer
        made.append(Window(ids, len(head), cut, null, at, exact))
        if begin + room >= len(context):
            break
    return made


def covering(spans: np.ndarray, answer: tuple[int, int]) -> tuple[int, int] | None:
    """First and last token of the smallest run of tokens that covers the characters [begin, end); None where none does.

    >>> covering(np.array([[0, 3], [4, 9], [9, 10]]), (4, 8))
    (1, 1)
    """
    touching = np.flatnonzero((spans[:, 0] < answer[1]) & (spans[:, 1] > answer[0]))
    return (int(touching[0]), int(touching[-1])) if len(touching) else None


@dataclass(frozen=True, slots=True)
class Span:
    """A candidate answer: characters [begin, end) of the context and its score, start logit + end logit."""

    begin: int
    end: int
    score: float


def candidates(window: Window, start: np.ndarray, end: np.ndarray, count: int, longest: int) -> tuple[list[Span], float]:
    """(the best valid spans, the null score) of one window: inside the context, end not before start, not too long.

    Args:
        start, end: float [L], logits.
        count: spans at most.
        longest: tokens of an answer at most.
    """
    n = len(window.spans)
    begins, ends = start[window.first : window.first + n], end[window.first : window.first + n]
    null = float(start[window.null] + end[window.null])
    if not n:
        return [], null
    table = begins[:, None] + ends[None, :]
    offsets = np.arange(n)[None, :] - np.arange(n)[:, None]
    table = np.where((offsets >= 0) & (offsets < longest), table, -np.inf)
    flat = np.argpartition(-table, min(count, table.size) - 1, axis=None)[:count]
    flat = flat[np.argsort(-table.reshape(-1)[flat], kind="stable")]
    found = [Span(int(window.spans[i // n, 0]), int(window.spans[i % n, 1]), float(table.reshape(-1)[i])) for i in flat]
    return [s for s in found if np.isfinite(s.score)], null


def best(per_window: Sequence[tuple[list[Span], float]], count: int) -> tuple[list[Span], float]:
    """The n-best of a question over its windows, each span once, and its null score: the smallest of any window."""
    seen: dict[tuple[int, int], Span] = {}
    for span in sorted((s for spans, _ in per_window for s in spans), key=lambda s: -s.score):
        seen.setdefault((span.begin, span.end), span)
    return list(seen.values())[:count], min(null for _, null in per_window)
