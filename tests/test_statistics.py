"""What scores say: paired gains, their interval, label equivalence."""

import numpy as np
import pytest

from lmssl import evidence, statistics


def results_of(scratch, pretrained):
    """Results of {labels: [score of seed 0, 1, ...]}."""
    table = {"scratch": scratch, "pretrained": pretrained}
    return [{"labels": n, "init": init, "seed": seed, "score": v} for init, rows in table.items() for n, values in rows.items() for seed, v in enumerate(values)]


def test_summary_is_paired():
    (row,) = statistics.summary(results_of({10: [0.5, 0.6, 0.7], 99: [0.9]}, {10: [0.6, 0.7, 0.8]}))
    assert row["gain"]["mean"] == pytest.approx(0.1)
    assert row["gain"]["error"] == pytest.approx(0.0, abs=1e-12)
    assert row["scratch"]["std"] == pytest.approx(0.1)
    from scipy import stats

    for freedom in (1, 4, 30, 31, 63, 1000):
        assert statistics.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-3)
    rng = np.random.default_rng(0)
    a, b = rng.random(5), rng.random(5)
    (row,) = statistics.summary(results_of({10: a}, {10: b}))
    expected = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert row["gain"]["interval"] == pytest.approx([expected.low, expected.high], abs=1e-3)


def test_further_counts_from_scratch_leave_the_verdict_alone():
    scratch, pretrained = {10: [0.5, 0.6], 100: [0.6, 0.7]}, {10: [0.65, 0.75], 100: [0.75, 0.85]}
    for more in ({}, {1000: [0.9, 0.9]}):
        results = results_of(scratch | more, pretrained)
        gain = statistics.mean_gain(results)
        assert (gain["mean"], gain["error"]) == pytest.approx((0.15, 0.0), abs=1e-9)


def test_equivalence_on_a_known_curve():
    """From scratch: 60% at 100, 70% at 1,000, linear in the logarithm; so 65% is worth 316 labels."""
    scratch = {100: [0.6] * 5, 1000: [0.7] * 5, 4000: [0.69] * 5}
    rows = {row["labels"]: row for row in statistics.equivalence(results_of(scratch, {20: [0.65] * 5, 50: [0.7] * 5, 100: [0.75] * 5, 10: [0.5] * 5}))}
    assert rows[20]["equivalent"] == pytest.approx(10**2.5)
    assert rows[20]["interval"] == pytest.approx([10**2.5] * 2)
    assert rows[50]["equivalent"] == pytest.approx(1000), "the dip at 4,000 is no gain"
    assert (rows[100]["equivalent"], rows[100]["beyond"]) == (4000, "above")
    assert (rows[10]["equivalent"], rows[10]["beyond"]) == (100, "below")
    assert statistics.in_words(rows[100]) == "over 4,000 [over 4,000, over 4,000]"


@pytest.mark.parametrize("seeds", [5, 10])
def test_equivalence_interval_holds_the_truth(seeds):
    """Noisy seeds around a known curve: the 95% interval holds the true value nearly always."""
    rng, held, widths = np.random.default_rng(1), 0, []
    for _ in range(100):
        noise = lambda mean: (mean + rng.normal(0, 0.01, seeds)).tolist()  # noqa: E731
        scratch = {n: noise(0.5 + 0.1 * np.log10(n / 10)) for n in (10, 100, 1000, 10000)}
        (row,) = statistics.equivalence(results_of(scratch, {100: noise(0.65)}), draws=1000)
        held += row["interval"][0] <= 10**2.5 <= row["interval"][1]
        widths.append(row["interval"][1] / row["interval"][0])
    assert held >= 90, held
    assert np.median(widths) < 2.5, "and says something: a step of the curve is a factor of 10"


def test_a_few_seeds_have_no_interval_of_equivalence():
    (row,) = statistics.equivalence(results_of({10: [0.5] * 4, 100: [0.6] * 4}, {10: [0.55] * 4}))
    assert row["interval"] is None
    assert statistics.in_words(row) == "32"


def test_no_effect_is_no_gain():
    """Noise around one mean, for both: the headline claims a gain in one case of forty, the share beyond one end of a 95% interval."""
    rng, claimed = np.random.default_rng(0), 0
    for _ in range(1000):
        results = results_of(*({n: rng.normal(0.6, 0.02, 3).tolist() for n in (20, 100, 500)} for _ in range(2)))
        claimed += evidence.verdict({"task": "sentiment", "metric": "accuracy", "results": results, "summary": statistics.summary(results)}).startswith("Pretraining")
    assert claimed <= 45


def test_equivalence_needs_a_curve():
    assert statistics.equivalence(results_of({10: [0.5]}, {10: [0.6]})) == []
    assert statistics.equivalence(results_of({10: [0.5, 0.4], 20: [0.5]}, {10: [0.6, 0.6]})) == []


def test_the_verdict_and_the_table_say_which_is_which():
    def metrics(scratch, pretrained):
        results = results_of({10: scratch}, {10: pretrained})
        return {"task": "sentiment", "metric": "accuracy", "results": results, "summary": statistics.summary(results)}

    gained, lost = metrics([0.5, 0.6], [0.65, 0.77]), metrics([0.65, 0.77], [0.5, 0.6])
    assert evidence.verdict(gained).startswith("Pretraining changes sentiment accuracy by +16.0 points on average (95% interval +3.3 to +28.7); ")
    assert "are few" not in evidence.verdict(gained | {"test_examples": 100})
    assert evidence.verdict(gained | {"test_examples": 12}).endswith("12 test examples are few: each is 8.3 points, and no interval over seeds counts them.")
    assert evidence.verdict(gained | {"test_examples": 12, "metric": "bleu"}).endswith("12 test examples are few, and no interval over seeds counts them.")
    assert evidence.verdict(lost).startswith("A loss: pretraining changes sentiment accuracy by -16.0 points")
    results = results_of({10: [0.6, 0.61, 0.6], 20: [0.6, 0.61, 0.6]}, {10: [0.55, 0.56, 0.551], 20: [0.7, 0.71, 0.701]})
    mixed = {"task": "sentiment", "metric": "accuracy", "results": results, "summary": statistics.summary(results)}
    assert evidence.verdict(mixed).endswith("is above zero at 1 of 2 label counts, below it at 1.")
    assert "below it at 2" in evidence.verdict(mixed | {"summary": [mixed["summary"][0]] * 2, "results": results_of({10: [0.6, 0.61, 0.6]}, {10: [0.55, 0.56, 0.551]})})
    assert evidence.label_rows(gained)[:2] == [["labels", "scratch", "pretrained", "gain"], ["10", "55.0 ± 7.1", "71.0 ± 8.5", "+16.0 [+3.3, +28.7]"]]
    same = metrics([0.5, 0.6], [0.6, 0.7])  # as of a hundred tests it may well be: no spread is no certainty
    assert evidence.verdict(same) == "Pretraining changes sentiment accuracy by +10.0 points on average, the same for each seed: no spread, so no evidence."
    assert evidence.label_rows(same)[1][-1] == "+10.0"
    one = metrics([0.5, 0.6, 0.4], [0.6, 0.7, 0.5])
    assert one["summary"][0]["gain"] == {"mean": pytest.approx(0.1), "error": 0.0, "interval": None}
