"""The baseline that any practitioner would ask about: TF-IDF and logistic regression on the same few labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Inverse regularisation strengths."""


def available() -> bool:
    """Whether scikit-learn is installed (extra `tasks`)."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        return False
    return True


def tfidf(train: Sequence[Any], test: Sequence[Any], metric: str = "accuracy") -> dict[str, float]:
    """The score of logistic regression on TF-IDF of unigrams and bigrams.

    Its regularisation is chosen by stratified cross-validation on the training examples alone, 5-fold or as many
    as the rarest class has examples; one example of a class leaves no fold, and C = 1.

    Args:
        train, test: examples with `texts()` and `label`.
        metric: accuracy, or macro_f1 over the classes of the test examples; regularisation is chosen by it, too.

    Returns:
        {"score", "C"}.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline

    def text(e: Any) -> str:
        return " ".join(e.texts())

    labels = [e.label for e in train]
    folds = min(5, *(labels.count(c) for c in set(labels)))
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=2000))
    if folds > 1:
        model = GridSearchCV(model, {"logisticregression__C": GRID}, cv=StratifiedKFold(folds, shuffle=True, random_state=0), scoring="f1_macro" if metric == "macro_f1" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit([text(e) for e in train], labels)
    chosen = model.best_params_["logisticregression__C"] if folds > 1 else 1.0
    truth, guesses = [e.label for e in test], model.predict([text(e) for e in test])
    score = f1_score(truth, guesses, labels=sorted(set(truth)), average="macro", zero_division=0) if metric == "macro_f1" else accuracy_score(truth, guesses)
    return {"score": float(score), "C": chosen}
