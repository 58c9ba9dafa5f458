"""One offline HTML page per run or set of runs, and the same plots as PNG."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmssl import evidence, output, statistics
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
            metrics = output.read_json(path)
            if not isinstance(metrics, dict) or ("results" in metrics and not {"summary", "metric", "task"} <= set(metrics)):
                raise UserError(f"{path}: is not of a run of lmssl")
            # Else of a checkpoint that was only scored, or of a folder inside another that was named.
            if ("results" in metrics or {"objective", "held_out", "curve"} <= set(metrics)) and not any(path.parent.samefile(known) for known, _ in runs):
                runs.append((path.parent, metrics))
    if not runs:
        raise UserError(f"{folders[0]}: no metrics.json of a run in it or below, only of checkpoints that were scored")
    runs.sort(key=lambda run: "results" not in run[1])  # the evidence first
    target = folders[0] / "report.html"
    title = "lmssl: " + ", ".join(folder.resolve().name for folder in folders)
    output.write(target, page(runs, title, folders[0] if png else None))
    return target


def page(runs: list[tuple[Path, dict[str, Any]]], title: str, pngs: Path | None = None) -> str:
    """The whole page. `pngs`: a folder that gets every plot as PNG too."""
    parts = []
    curves = [run for run in runs if "results" in run[1]]
    for folder, metrics in curves:
        name = f"{folder}: " if len(curves) > 1 else ""
        parts.append(f'<p class="verdict">{html.escape(name + evidence.verdict(metrics))}</p>')
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


def _finetuned(folder: Path, metrics: dict[str, Any], figure: Callable[..., str]) -> str:
    seeds = len({r["seed"] for r in metrics["results"]})
    facts = [
        ("backbone", f"{metrics.get('backbone')} ({metrics.get('architecture')}, {metrics.get('family')})"),
        ("test set", f"{metrics.get('test_examples', 0):,} examples"),
        *([(evidence.trivial_answer(metrics), f"scores {metrics['majority']:.1%}")] if metrics.get("majority") else []),
        ("leak check", evidence.leaks_in_words(metrics.get("leaks"))),
        ("runs", f"{len(metrics['results'])}: {seeds} seed{'s' * (seeds > 1)}, both inits, the same subsets and steps"),
        *([("trained", f"{METHODS[metrics['method']]}; the twin from scratch whole")] if metrics.get("method", "full") != "full" else []),
        ("learning rate", evidence.rates_in_words(metrics)),
        *[("accepted", evidence.accepted_in_words(change)) for change in metrics.get("accepted", [])],
        *[(name.replace("_", " "), f"{count:,}") for name, count in metrics.get("notes", {}).items()],
        ("time", f"{metrics.get('seconds', 0) / 60:.1f} minutes"),
        *_machine(metrics),
    ]
    header, *rows = evidence.label_rows(metrics)
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    caption = f"{metrics['metric']} in percent" + (f", mean ± standard deviation over {seeds} seeds; gain paired by seed with its 95% interval" if seeds > 1 else ", one seed")
    caption += "; equivalent: labels from scratch that reach the same" if "equivalent" in header else ""
    table = f"<table><caption>{html.escape(caption)}</caption><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in header)}</tr>{cells}</table>"
    counts = {r["labels"] for r in metrics["results"]}
    spread = "the line joins the means, the band is one standard deviation" if len(counts) > 1 else "the mark is the mean, the bar one standard deviation"
    plot = figure("labels", lambda ax: _draw_labels(ax, metrics), "Each point is one seed" + (f"; {spread}." if seeds > 1 else "."))
    return f"<h2>{html.escape(metrics['task'].capitalize())} on few labels: {html.escape(str(folder))}</h2>{table}{plot}{_facts(facts)}"


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
    ax.xaxis.get_major_locator().set_params(integer=True)
    _legend(ax)


def _legend(ax: Any) -> None:
    """Beside the curves, of which any may be under it."""
    ax.figure.legend(frameon=False, loc="outside upper center", ncols=4)


def _draw_speed(ax: Any, curve: list[dict[str, float]]) -> None:
    points = [(c["step"], c["tokens_per_second"]) for c in curve if "tokens_per_second" in c]
    ax.plot(*zip(*points, strict=True), color=COLOURS["training"])
    ax.set(xlabel="optimizer step", ylabel="tokens a second", ylim=(0, None))
    ax.xaxis.get_major_locator().set_params(integer=True)


def _draw_labels(ax: Any, metrics: dict[str, Any]) -> None:
    curves = {init: [(r["labels"], r["score"]) for r in metrics["results"] if r["init"] == init] for init in ("scratch", "pretrained")}
    curves |= {name: [(r["labels"], r["score"]) for r in rows] for name, rows in metrics.get("baselines", {}).items()}
    ticks = sorted({n for points in curves.values() for n, _ in points})
    for k, (name, points) in enumerate(curves.items()):
        colour, x = COLOURS[name], sorted({n for n, _ in points})
        spreads = [statistics.spread([100 * score for n, score in points if n == count]) for count in x]
        mean, std = [s["mean"] or 0.0 for s in spreads], [s["std"] or 0.0 for s in spreads]
        aside = 1.0
        if len(ticks) == 1:  # no line: a mark for each, side by side
            aside = 1.05 ** (k - (len(curves) - 1) / 2)
            ax.errorbar([x[0] * aside], mean, std, fmt="D", capsize=5, color=colour, label=name)
        else:
            ax.plot(x, mean, "-" if name in ("scratch", "pretrained") else "--", color=colour, label=name)
            ax.fill_between(x, [m - s for m, s in zip(mean, std, strict=True)], [m + s for m, s in zip(mean, std, strict=True)], color=colour, alpha=0.15, linewidth=0)
        ax.plot([n * aside for n, _ in points], [100 * score for _, score in points], ".", color=colour, alpha=0.6)
    if metrics.get("majority"):
        ax.axhline(100 * metrics["majority"], color="#999", linestyle=":", label=evidence.trivial_answer(metrics))
    ax.set_xscale("log")
    if len(ticks) == 1:
        ax.set_xlim(ticks[0] / 1.5, ticks[0] * 1.5)
    named = ticks[:1]
    for tick in ticks:
        if math.log(tick / named[-1]) > 0.07 * math.log(ticks[-1] / ticks[0]):  # nearer ones would stand in each other
            named.append(tick)
    ax.set_xticks(ticks, [f"{v:,}" if v in named else "" for v in ticks])
    ax.minorticks_off()
    ax.set(xlabel="labelled examples", ylabel=f"{metrics['metric']} (%)")
    _legend(ax)
