"""What a set of scores says: mean, spread, the paired gain with its interval, and the label equivalence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

INITS = ("scratch", "pretrained")
Result = dict[str, Any]
"""{"labels", "init", "seed", "score", ...} of one run."""

MEANS = ("accuracy", "f1")
"""Metrics that are means over the examples, of which each is worth as much as another: neither macro-F1 nor BLEU."""
FEWEST_SEEDS = 5
"""For an interval by bootstrap: draws from fewer hold too little."""
FEW_TESTS = 100
"""Test examples below which a result says that they are few."""


def worth(tests: int, metric: str) -> str:
    """What one of so many test examples is worth, as the end of a sentence.

    >>> worth(10, "accuracy"), worth(10, "bleu")
    (': each is 10.0 points', '')
    """
    return f": each is {100 / tests:.1f} points" if metric in MEANS else ""


def table_of(results: Sequence[Result], init: str) -> dict[int, dict[int, float]]:
    """score[labels][seed] of one init, label counts ascending."""
    found: dict[int, dict[int, float]] = {}
    for r in sorted(results, key=lambda r: (r["labels"], r["seed"])):
        if r["init"] == init:
            found.setdefault(r["labels"], {})[r["seed"]] = r["score"]
    return found


def spread(scores: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation; one score has none."""
    return {"mean": float(np.mean(scores)), "std": float(np.std(scores, ddof=1)) if len(scores) > 1 else None}


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For each number of labels that both inits have: mean and standard deviation of both, and the paired gain.

    The gain is paired by seed (same subset); `interval` is its 95% t-interval, `error` its standard error;
    one seed has neither, and gains that are all the same no interval.
    """
    scratch, pretrained = (table_of(results, init) for init in INITS)
    rows = []
    for labels in pretrained:
        gain = _paired([pretrained[labels][s] - scratch[labels][s] for s in pretrained[labels]])
        rows.append({"labels": labels, "scratch": spread([*scratch[labels].values()]), "pretrained": spread([*pretrained[labels].values()]), "gain": gain})
    return rows


def mean_gain(results: Sequence[Result]) -> dict[str, Any]:
    """The paired gain over the numbers of labels that both inits have, averaged; as in `summary`."""
    scratch, pretrained = (table_of(results, init) for init in INITS)
    seeds = sorted({s for row in pretrained.values() for s in row})
    return _paired([float(np.mean([pretrained[n][s] - scratch[n][s] for n in pretrained])) for s in seeds])


def _paired(gains: Sequence[float]) -> dict[str, Any]:
    """Mean of a gain a seed, its standard error and 95% t-interval; where all are the same, which few tests may well make them, there is nothing to judge by."""
    mean = float(np.mean(gains))
    if len(gains) < 2:
        return {"mean": mean, "error": None, "interval": None}
    error = float(np.std(gains, ddof=1) / math.sqrt(len(gains)))
    if error < 1e-12:
        return {"mean": mean, "error": 0.0, "interval": None}
    half = t_quantile(len(gains) - 1) * error
    return {"mean": mean, "error": error, "interval": [mean - half, mean + half]}


def equivalence(results: Sequence[Result], draws: int = 2000) -> list[dict[str, Any]]:
    """How many labels from scratch reach what N labels reach after pretraining.

    The curve from scratch is its means over seeds, made monotone by their running maximum, linear between counts in
    the logarithm of the count. The 95% interval is a bootstrap over seeds, drawn jointly for both inits, its percentiles
    widened as far as Student's t asks of so few (Hesterberg 2014, 1411.5279: plain ones hold the truth in 82 of 100 cases of
    five seeds); below five seeds there is none. A value beyond the counts that were run is the last of them, and `beyond`
    says on which side ("above", "below").

    Returns:
        For each N: {"labels": N, "equivalent", "beyond", "interval": [low, high] or None, "interval_beyond"}.
    """
    scratch, pretrained = (table_of(results, init) for init in INITS)
    seeds = sorted({s for row in [*scratch.values(), *pretrained.values()] for s in row})
    if len(scratch) < 2 or any(set(row) != set(seeds) for row in [*scratch.values(), *pretrained.values()]):
        return []
    counts = np.array(list(scratch))
    curve = np.array([[row[s] for s in seeds] for row in scratch.values()])
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(seeds), (draws, len(seeds)))
    rows = []
    for labels, row in pretrained.items():
        scores = np.array([row[s] for s in seeds])
        value, beyond = _reach(counts, curve.mean(1), scores.mean())
        entry: dict[str, Any] = {"labels": labels, "equivalent": value, "beyond": beyond, "interval": None, "interval_beyond": None}
        if len(seeds) >= FEWEST_SEEDS:
            side = {"below": -1, None: 0, "above": 1}
            drawn = sorted((_reach(counts, curve[:, p].mean(1), scores[p].mean()) for p in picks), key=lambda pair: (pair[0], side[pair[1]]))
            tail = int(draws * (1 - math.erf(math.sqrt(len(seeds) / (len(seeds) - 1) / 2) * t_quantile(len(seeds) - 1))) / 2)
            low, high = drawn[tail], drawn[-1 - tail]
            entry |= {"interval": [low[0], high[0]], "interval_beyond": [low[1], high[1]]}
        rows.append(entry)
    return rows


def _reach(counts: np.ndarray, curve: np.ndarray, score: float) -> tuple[float, str | None]:
    """The count at which a rising curve reaches a score, and on which side of the counts it lies, if on one."""
    curve = np.maximum.accumulate(curve)
    if score > curve[-1]:
        return float(counts[-1]), "above"
    if score < curve[0]:
        return float(counts[0]), "below"
    at = int(np.searchsorted(curve, score, "left"))
    if at == 0 or curve[at] == score:
        return float(counts[at]), None
    share = (score - curve[at - 1]) / (curve[at] - curve[at - 1])
    return float(np.exp(np.log(counts[at - 1]) + share * (np.log(counts[at]) - np.log(counts[at - 1])))), None


def in_words(entry: dict[str, Any]) -> str:
    """An entry of `equivalence` as text.

    >>> in_words({"labels": 100, "equivalent": 412.3, "beyond": None, "interval": [240.0, 2500.0], "interval_beyond": [None, "above"]})
    '412 [240, over 2,500]'
    """

    def one(value: float, beyond: str | None) -> str:
        return {"above": "over ", "below": "under ", None: ""}[beyond] + f"{value:,.0f}"

    text = one(entry["equivalent"], entry["beyond"])
    if entry["interval"] is None:
        return text
    return f"{text} [{', '.join(one(v, b) for v, b in zip(entry['interval'], entry['interval_beyond'], strict=True))}]"


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t: a table; beyond 30 degrees of freedom the first terms of its expansion around the normal's."""
    table = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
    table += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
    if freedom > len(table):
        return 1.959964 + 2.372271 / freedom + 2.822500 / freedom**2
    return table[freedom - 1] if freedom > 0 else float("nan")
