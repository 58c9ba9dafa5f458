"""One offline HTML page per run or set of runs, and the same plots as PNG."""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmssl import output, statistics
from lmssl.data.contamination import GRAM, SHORTEST
from lmssl.errors import UserError

_CHECKPOINT = re.compile(r"(damaged-)?checkpoint-\d+")
METHODS = {"probe": "the head alone", "lora": "low-rank updates and the head"}
COLOURS = {"pretrained": "#1f77b4", "scratch": "#d62728", "held out": "#2ca02c", "training": "#7f7f7f", "tf-idf": "#9467bd"}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
h1 { font-size: 1.7rem } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem } h3 { margin-top: 1.5rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e5e5e5 }
th:first-child, td:first-child { text-align: left } caption { text-align: left; color: #666; padding-bottom: .3rem }
figure { margin: 1rem 0 } svg { width: 100%; height: auto }
.facts td { text-align: left } .facts td:first-child { color: #666 } figcaption, .note { color: #666; font-size: .9rem }
.rows p { font: .85rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere; margin: .2rem 0 .6rem; padding: .5rem; background: #f6f6f6 }
.rows b { color: #666; font-weight: 600 } mark { background: #ffe08a; padding: 0 .1em } .verdict { font-weight: 600 }
"""


def write(folders: list[Path], *, png: bool = False) -> Path:
    """Write report.html into the first folder, from every metrics.json below the folders; returns its path.

    Raises:
        UserError: a folder that is none, or without metrics.json, or one that cannot be read; no matplotlib.
    """
    runs: list[tuple[Path, dict[str, Any]]] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        found = sorted(p for p in folder.rglob("metrics.json") if not any(_CHECKPOINT.fullmatch(part) for part in p.relative_to(folder).parts))
        if not found:
            raise UserError(f"{folder}: no metrics.json in it or below; a finished run leaves one")
        for path in found:
            try:
                metrics = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path}: not valid JSON: {error}") from None
            if not isinstance(metrics, dict) or ("results" in metrics and not {"summary", "metric", "task"} <= set(metrics)):
                raise UserError(f"{path}: is not of a run of lmssl")
            # Else of a checkpoint that was only scored, or of a folder inside another that was named.
            if {"results", "objective"} & set(metrics) and not any(path.parent.samefile(known) for known, _ in runs):
                runs.append((path.parent, metrics))
    if not runs:
        raise UserError(f"{folders[0]}: no metrics.json of a run in it or below, only of checkpoints that were scored")
    runs.sort(key=lambda run: "results" not in run[1])  # the evidence first
    target = folders[0] / "report.html"
    title = "lmssl: " + ", ".join(folder.name for folder in folders)
    output.write(target, page(runs, title, folders[0] if png else None))
    return target


def page(runs: list[tuple[Path, dict[str, Any]]], title: str, pngs: Path | None = None) -> str:
    """The whole page. `pngs`: a folder that gets every plot as PNG too."""
    parts = []
    evidence = [run for run in runs if "results" in run[1]]
    for folder, metrics in evidence:
        name = f"{folder}: " if len(evidence) > 1 else ""
        parts.append(f'<p class="verdict">{html.escape(name + verdict(metrics))}</p>')
    for number, (folder, metrics) in enumerate(runs):
        name = f"{number + 1}-{folder.name}"

        def figure(kind: str, draw: Callable[[Any], None], caption: str, name: str = name) -> str:
            return f"<figure>{_svg(draw, pngs / f'{name}-{kind}.png' if pngs else None)}<figcaption>{html.escape(caption)}</figcaption></figure>"

        parts.append((_finetuned if "results" in metrics else _pretrained)(folder, metrics, figure))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def _pretrained(folder: Path, metrics: dict[str, Any], figure: Callable[..., str]) -> str:
    curve = metrics.get("curve", [])
    held = metrics.get("held_out", {})
    facts = [
        ("objective", metrics.get("objective")),
        ("model", f"{metrics.get('architecture')} ({metrics.get('family')}), {metrics.get('parameters', 0):,} parameters"),
        ("steps, tokens", f"{metrics.get('steps', 0):,} steps, {metrics.get('tokens', 0):,} tokens"),
        ("training time", f"{metrics.get('seconds', 0) / 60:.1f} minutes, {metrics.get('tokens_per_second', 0):,.0f} tokens/s"),
        ("held-out loss", f"{held.get('loss', math.nan):.4f} nats a token, {held.get('bits_per_byte', math.nan):.4f} bits per byte"),
        *_machine(metrics),
    ]
    body = f"<h2>Pretraining: {html.escape(str(folder))}</h2>{_facts(facts)}"
    if len([c for c in curve if "loss" in c]) > 1:
        body += figure("loss", lambda ax: _draw_loss(ax, curve, held), "Loss over optimizer steps; the last held-out point is the final model in float32.")
        body += figure("throughput", lambda ax: _draw_speed(ax, curve), "Input tokens a second since the start, padding left out.")
    if metrics.get("rows_shown"):
        body += "<h3>What the model was asked</h3>" + "".join(_row(r) for r in metrics["rows_shown"])
    return body


def _row(shown: dict[str, str]) -> str:
    def part(name: str, text: str) -> str:
        marked = html.escape(text[:1500])
        for token in ("&lt;mask&gt;", "[MASK]", *(f"&lt;extra_id_{i}&gt;" for i in range(99, -1, -1))):
            marked = marked.replace(token, f"<mark>{token}</mark>")
        return f"<b>{name}</b><p>{marked}{' ...' if len(text) > 1500 else ''}</p>"

    same = shown["input"] == shown["row"]
    return f'<div class="rows">{part("text", shown["row"])}{"" if same else part("input", shown["input"])}{part("labels", shown["labels"])}</div>'


def _trivial(metrics: dict[str, Any]) -> str:
    """The answer to every example that `majority` scores."""
    return "the largest class alone" if metrics.get("classes") else "no answer to any"


def _finetuned(folder: Path, metrics: dict[str, Any], figure: Callable[..., str]) -> str:
    seeds = len({r["seed"] for r in metrics["results"]})
    facts = [
        ("backbone", f"{metrics.get('backbone')} ({metrics.get('architecture')}, {metrics.get('family')})"),
        ("test set", f"{metrics.get('test_examples', 0):,} examples" + (f"; {_trivial(metrics)} gives {metrics['majority']:.1%}" if metrics.get("majority") else "")),
        ("leak check", leaks_in_words(metrics.get("leaks"))),
        ("runs", f"{len(metrics['results'])}: {seeds} seed{'s' * (seeds > 1)}, both inits, the same subsets and steps"),
        *([("trained", f"{METHODS[metrics['method']]}; the twin from scratch whole")] if metrics.get("method", "full") != "full" else []),
        ("learning rate", _rates(metrics)),
        *[("accepted", accepted_in_words(change)) for change in metrics.get("accepted", [])],
        *[(name.replace("_", " "), f"{count:,}") for name, count in metrics.get("notes", {}).items()],
        ("time", f"{metrics.get('seconds', 0) / 60:.1f} minutes"),
        *_machine(metrics),
    ]
    header, *rows = label_rows(metrics)
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    caption = f"{metrics['metric']} in percent" + (f", mean ± standard deviation over {seeds} seeds; gain paired by seed with its 95% interval" if seeds > 1 else ", one seed")
    caption += "; equivalent: labels from scratch that reach the same" if "equivalent" in header else ""
    table = f"<table><caption>{html.escape(caption)}</caption><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in header)}</tr>{cells}</table>"
    plot = figure(
        "labels", lambda ax: _draw_labels(ax, metrics), "Each point is one seed" + ("; the line joins the means, the band is one standard deviation." if seeds > 1 else ".")
    )
    return f"<h2>{html.escape(metrics['task'].capitalize())} on few labels: {html.escape(str(folder))}</h2>{table}{plot}{_facts(facts)}"


def verdict(metrics: dict[str, Any]) -> str:
    """What pretraining bought, in a sentence, negative results included; and another where the backbone was continued from somebody's checkpoint."""
    before, tests = metrics.get("continued_from"), metrics.get("test_examples", statistics.FEW_TESTS)
    few = f" {tests} test examples are few{statistics.worth(tests, metrics['metric'])}, and no interval over seeds counts them." if tests < statistics.FEW_TESTS else ""
    return _verdict(metrics) + few + (f" The other model has random weights, so this counts what {before} brought." if before else "")


def _verdict(metrics: dict[str, Any]) -> str:
    intervals = [row["gain"]["interval"] for row in metrics["summary"]]
    mean, error = mean_gain(metrics)
    change = f"{metrics['task']} {metrics['metric']} by {100 * mean:+.1f} points on average"
    if error is None:
        return f"Pretraining changes {change}, over one seed: no spread, so no evidence."
    sure, lost = sum(interval[0] > 0 for interval in intervals), sum(interval[1] < 0 for interval in intervals)
    where = f"; the gain's 95% interval is above zero at {sure} of {len(intervals)} label counts" + (f", below it at {lost}" if lost else "")
    low, high = statistics.interval(mean, error, len({r["seed"] for r in metrics["results"]}))
    over_all = f"(95% interval {100 * low:+.1f} to {100 * high:+.1f})"
    if low > 0:
        return f"Pretraining changes {change} {over_all}{where}."
    return f"No gain shown: pretraining changes {change} {over_all}{where if sure or lost else ''}."


def mean_gain(metrics: dict[str, Any]) -> tuple[float, float | None]:
    """The mean over the label counts of the paired gain, and its standard error over seeds (None for one seed)."""
    seeds = sorted({r["seed"] for r in metrics["results"]})
    sign = {"pretrained": 1.0, "scratch": -1.0}
    counts = {row["labels"] for row in metrics["summary"]}  # further counts from scratch have no partner
    means = [sum(sign[r["init"]] * r["score"] for r in metrics["results"] if r["seed"] == s and r["labels"] in counts) / len(counts) for s in seeds]
    mean = sum(means) / len(means)
    if len(means) < 2:
        return mean, None
    return mean, math.sqrt(sum((m - mean) ** 2 for m in means) / (len(means) - 1) / len(means))


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


def _rates(metrics: dict[str, Any]) -> str:
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


def _machine(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    env = metrics.get("environment")
    if not env:
        return []
    return [
        ("machine", f"{env['device']}, {env['threads']} threads, {env['processes']} process(es)"),
        ("versions", f"lmssl {env['lmssl']}, torch {env['torch']}, transformers {env['transformers']}"),
    ]


def _facts(facts: list[tuple[str, Any]]) -> str:
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in facts)
    return f'<table class="facts">{rows}</table>'


def _svg(draw: Callable[[Any], None], png: Path | None) -> str:
    try:
        import matplotlib
    except ImportError:
        raise UserError("report: needs matplotlib; pip install 'lmssl[report]'") from None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "lmssl", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(7.5, 3.8), layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        if png:
            figure.savefig(png, dpi=150)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _draw_loss(ax: Any, curve: list[dict[str, float]], held: dict[str, float]) -> None:
    training = [c for c in curve if "loss" in c]
    measured = [c for c in curve if "held_out_loss" in c]
    ax.plot([c["step"] for c in training], [c["loss"] for c in training], color=COLOURS["training"], label="training")
    if measured:
        ax.plot([c["step"] for c in measured], [c["held_out_loss"] for c in measured], "o-", color=COLOURS["held out"], label="held out")
    ax.set(xlabel="optimizer step", ylabel="loss (nats a labelled token)")
    ax.legend(frameon=False)


def _draw_speed(ax: Any, curve: list[dict[str, float]]) -> None:
    points = [(c["step"], c["tokens_per_second"]) for c in curve if "tokens_per_second" in c]
    ax.plot(*zip(*points, strict=True), color=COLOURS["training"])
    ax.set(xlabel="optimizer step", ylabel="tokens a second", ylim=(0, None))


def _draw_labels(ax: Any, metrics: dict[str, Any]) -> None:
    curves = {init: [(r["labels"], r["score"]) for r in metrics["results"] if r["init"] == init] for init in ("scratch", "pretrained")}
    curves |= {name: [(r["labels"], r["score"]) for r in rows] for name, rows in metrics.get("baselines", {}).items()}
    for name, points in curves.items():
        colour, x = COLOURS[name], sorted({n for n, _ in points})
        spreads = [statistics.spread([100 * score for n, score in points if n == count]) for count in x]
        mean, std = [s["mean"] or 0.0 for s in spreads], [s["std"] or 0.0 for s in spreads]
        ax.plot(x, mean, "-" if name in ("scratch", "pretrained") else "--", color=colour, label=name)
        ax.fill_between(x, [m - s for m, s in zip(mean, std, strict=True)], [m + s for m, s in zip(mean, std, strict=True)], color=colour, alpha=0.15, linewidth=0)
        ax.plot([n for n, _ in points], [100 * score for _, score in points], ".", color=colour, alpha=0.6)
    if metrics.get("majority"):
        ax.axhline(100 * metrics["majority"], color="#999", linestyle=":", label=_trivial(metrics))
    ticks = sorted({n for points in curves.values() for n, _ in points})
    ax.set_xscale("log")
    named = ticks[:1]
    for tick in ticks:
        if math.log(tick / named[-1]) > 0.07 * math.log(ticks[-1] / ticks[0]):  # nearer ones would stand in each other
            named.append(tick)
    ax.set_xticks(ticks, [f"{v:,}" if v in named else "" for v in ticks])
    ax.minorticks_off()
    ax.set(xlabel="labelled examples", ylabel=f"{metrics['metric']} (%)")
    ax.legend(frameon=False)
