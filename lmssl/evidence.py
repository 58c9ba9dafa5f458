"""What a label curve shows, in words: the verdict, the table, and what was checked."""

from __future__ import annotations

from typing import Any

from lmssl import statistics
from lmssl.data.contamination import GRAM, SHORTEST


def verdict(metrics: dict[str, Any]) -> str:
    """What pretraining bought, in a sentence, negative results included; and another where the backbone was continued from somebody's checkpoint."""
    before, tests = metrics.get("continued_from"), metrics.get("test_examples", statistics.FEW_TESTS)
    few = f" {tests} test examples are few{statistics.worth(tests, metrics['metric'])}, and no interval over seeds counts them." if tests < statistics.FEW_TESTS else ""
    return _verdict(metrics) + few + (f" The other model has random weights, so this counts what {before} brought." if before else "")


def _verdict(metrics: dict[str, Any]) -> str:
    intervals = [row["gain"]["interval"] for row in metrics["summary"] if row["gain"]["interval"]]
    gain = statistics.mean_gain(metrics["results"])
    change = f"{metrics['task']} {metrics['metric']} by {100 * gain['mean']:+.1f} points on average"
    if gain["interval"] is None:
        return f"Pretraining changes {change}, {'over one seed' if gain['error'] is None else 'the same for each seed'}: no spread, so no evidence."
    sure, lost = sum(interval[0] > 0 for interval in intervals), sum(interval[1] < 0 for interval in intervals)
    where = f"; the gain's 95% interval is above zero at {sure} of {len(metrics['summary'])} label counts" + (f", below it at {lost}" if lost else "")
    low, high = gain["interval"]
    over_all = f"(95% interval {100 * low:+.1f} to {100 * high:+.1f})"
    if low > 0:
        return f"Pretraining changes {change} {over_all}{where}."
    if high < 0:
        return f"A loss: pretraining changes {change} {over_all}{where}."
    return f"No gain shown: pretraining changes {change} {over_all}{where if sure or lost else ''}."


def label_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """The label curve as text, header first: labels, scratch, pretrained, gain; and baselines and equivalence where there are any."""
    baselines = {name: {n: [r["score"] for r in rows if r["labels"] == n] for n in {r["labels"] for r in rows}} for name, rows in metrics.get("baselines", {}).items()}
    equivalents = {entry["labels"]: entry for entry in metrics.get("equivalence", [])}
    table = [["labels", "scratch", "pretrained", "gain", *baselines, *(["equivalent"] if equivalents else [])]]
    for row in metrics["summary"]:
        n = row["labels"]
        others = [_percent(statistics.spread(scores[n])) for scores in baselines.values()]
        table.append(
            [f"{n:,}", _percent(row["scratch"]), _percent(row["pretrained"]), _gain(row["gain"]), *others, *([statistics.in_words(equivalents[n])] if equivalents else [])]
        )
    return table


def label_table(metrics: dict[str, Any]) -> str:
    """`labels | scratch | pretrained | gain`, for a terminal and Markdown alike, and the verdict."""
    header, *rows = ["| " + " | ".join(row) + " |" for row in label_rows(metrics)]
    return "\n".join([header, "|" + "---:|" * len(label_rows(metrics)[0]), *rows, "", verdict(metrics)])


def _quoted(value: Any) -> str:
    """A value of a recipe; text in quotes where its ends would not be seen."""
    return (repr(value) if isinstance(value, str) and value != value.strip() else str(value) or "''")[:80]


def accepted_in_words(change: dict[str, Any]) -> str:
    """What `--accept` let differ between the runs of a curve."""
    told = "; ".join(f"{key} was {_quoted(then)}, is {_quoted(now)}" for key, (then, now) in change["changed"].items())
    return f"the first {change['after']:,} runs were made otherwise: {told}"


def leaks_in_words(leaks: dict[str, Any] | None) -> str:
    """The leak check of a result as a sentence."""
    if not leaks or not leaks["checked"]:
        return f"not made: {leaks['reason'] if leaks else 'an older run'}"
    short = f" ({leaks['short']:,} have fewer than {SHORTEST} words and were not looked for)" if leaks.get("short") else ""
    return f"{leaks['leaked']:,} of {leaks['test_examples']:,} test examples share {GRAM} words in a row with the pretraining text{short}"


def rates_in_words(metrics: dict[str, Any]) -> str:
    """The learning rates of a curve, and how they were chosen."""
    tuning = metrics.get("tuning")
    if not tuning:
        return f"{', '.join(f'{rate:g}' for rate in sorted({r.get('learning_rate', metrics['learning_rate']) for r in metrics['results']}))}, not tuned"
    grid = sorted({t["learning_rate"] for t in tuning})
    chosen = {(r["init"], r["labels"]): r["learning_rate"] for r in metrics["results"]}
    picks = "; ".join(f"{init} " + ", ".join(f"{rate:g} ({n:,})" for (i, n), rate in sorted(chosen.items()) if i == init) for init in ("scratch", "pretrained"))
    return f"of {', '.join(f'{r:g}' for r in grid)} by validation loss on the few labels of seed 0: {picks}"


def _percent(value: dict[str, Any]) -> str:
    return f"{100 * value['mean']:.1f}" + (f" ± {100 * value['std']:.1f}" if value["std"] is not None else "")


def _gain(gain: dict[str, Any]) -> str:
    text = f"{100 * gain['mean']:+.1f}"
    return text if gain["interval"] is None else f"{text} [{100 * gain['interval'][0]:+.1f}, {100 * gain['interval'][1]:+.1f}]"


def trivial_answer(metrics: dict[str, Any]) -> str:
    """The answer to every example that `majority` scores."""
    return "the largest class alone" if metrics.get("classes") else "no answer to any"
