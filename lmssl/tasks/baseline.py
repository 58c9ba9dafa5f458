"""The baseline that any practitioner would ask about: TF-IDF and logistic regression on the same few labels."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lmssl.tasks.base import Task
from lmssl.words import mostly_spaceless, words

GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Inverse regularisation strengths."""


def available() -> bool:
    """Whether scikit-learn is installed (extra `tasks`)."""
    return importlib.util.find_spec("sklearn") is not None


def tfidf(train: Sequence[Any], test: Sequence[Any], task: Task) -> dict[str, float]:
    """The score of logistic regression on TF-IDF of unigrams and bigrams, of words with spaces around them; where most texts have none, as in Chinese, of characters.

    Its regularisation is chosen by stratified cross-validation on the training examples alone, 5-fold or as many
    as the largest class has examples; where fewer than two classes have two, C = 1.

    Args:
        train, test: examples with `texts()` and `label`.
        task: scores the guesses.

    Returns:
        {"score", "C"}.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.model_selection import StratifiedKFold

    def text(e: Any) -> str:
        return " ".join(e.texts())

    def score(truth: np.ndarray, guesses: np.ndarray) -> float:
        return task.scores(truth.tolist(), guesses.tolist())[task.metric]

    labels, texts = np.array([e.label for e in train]), [text(e) for e in train]
    sizes = sorted(Counter(labels.tolist()).values(), reverse=True)
    folds = min(5, sizes[0]) if min(sizes[:2]) > 1 else 1  # a class of which some folds have no example is missed there, and no reason not to tune
    how: dict[str, Any] = {"tokenizer": words, "token_pattern": None} if mostly_spaceless(texts) else {}
    counter = CountVectorizer(ngram_range=(1, 2), **how)
    chosen = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = counter.fit_transform(texts)
        if folds > 1:
            parts = StratifiedKFold(folds, shuffle=True, random_state=0).split(counts, labels)
            scores = [[score(labels[held], guesses) for guesses in _guesses(counts[rest], labels[rest], counts[held], GRID)] for rest, held in parts]
            chosen = GRID[int(np.mean(scores, 0).argmax())]
        (guesses,) = _guesses(counts, labels, counter.transform(map(text, test)), [chosen])
    return {"score": score(np.array([e.label for e in test]), guesses), "C": chosen}


def _guesses(counts: Any, labels: np.ndarray, others: Any, strengths: Sequence[float]) -> Iterator[np.ndarray]:
    """What logistic regression at each inverse regularisation says of others.

    Args:
        counts, others: sparse [texts, terms]; terms that the first have not are not known.
    """
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    known, weights = counts.getnnz(0) > 0, TfidfTransformer(sublinear_tf=True)
    features, unseen = weights.fit_transform(counts[:, known]), weights.transform(others[:, known])
    for strength in strengths:
        yield LogisticRegression(C=strength, max_iter=2000).fit(features, labels).predict(unseen)
