"""The baseline that any practitioner would ask about: TF-IDF and logistic regression on the same few labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lmssl.tasks.base import Task
from lmssl.words import mostly_spaceless, words

GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Inverse regularisation strengths."""


def available() -> bool:
    """Whether scikit-learn is installed (extra `tasks`)."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        return False
    return True


def tfidf(train: Sequence[Any], test: Sequence[Any], task: Task) -> dict[str, float]:
    """The score of logistic regression on TF-IDF of unigrams and bigrams, of words with spaces around them; where most texts have none, as in Chinese, of characters.

    Its regularisation is chosen by stratified cross-validation on the training examples alone, 5-fold or as many
    as the largest class has examples; where fewer than two classes have two, C = 1.

    Args:
        train, test: examples with `texts()` and `label`.
        task: scores the guesses; where its metric is macro_f1, regularisation is chosen by that, too, otherwise by accuracy.

    Returns:
        {"score", "C"}.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline

    def text(e: Any) -> str:
        return " ".join(e.texts())

    labels = [e.label for e in train]
    counts = sorted(map(labels.count, set(labels)), reverse=True)
    folds = min(5, counts[0]) if min(counts[:2]) > 1 else 1  # a class of which some folds have no example is missed there, and no reason not to tune
    texts = [text(e) for e in train]
    how: dict[str, Any] = {"tokenizer": words, "token_pattern": None} if mostly_spaceless(texts) else {}
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **how), LogisticRegression(max_iter=2000))
    if folds > 1:
        scoring = "f1_macro" if task.metric == "macro_f1" else None
        model = GridSearchCV(model, {"logisticregression__C": GRID}, cv=StratifiedKFold(folds, shuffle=True, random_state=0), scoring=scoring)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(texts, labels)
    chosen = model.best_params_["logisticregression__C"] if folds > 1 else 1.0
    return {"score": task.scores([e.label for e in test], model.predict([text(e) for e in test]).tolist())[task.metric], "C": chosen}
