"""Wall-clock to the stock script's final held-out loss, side by side: hours, so `make bench` leaves it out.

    python -m tests.bench.time_to_loss KIND --text FILES --out FOLDER [--seeds 0 1 2] [--minutes 20] [--stock-rows R --stock-rate LR] [overrides]

Both start from one AutoConfig, tokenizer and text. For each seed the stock side trains its steps to the end and is scored
by lmssl's evaluator on the same isolated held-out rows and, for masked tokens, the same 15% masks; then lmssl trains by
RECIPES, and is scored by the same. Every run is a process of its own that begins with empty caches. `seconds` are of the
training alone; `cold_seconds` count everything from launch to the saved model: imports, preparation, compilation.

The stock side's steps are those of --minutes on this machine, found once by timing a few and the same for every seed;
`--stock-steps` says them instead. What a run gave stays in FOLDER/KIND-SEED/SIDE.json, and a second call does not repeat it. `--side stock` runs one side
alone: so the grid of stock rates and batches was searched.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lmssl import config
from tests.bench.common import DROPOUT, ROOT, SHAPES, TOKENIZER

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "next_token": {"objective": {"name": "next_token"}, "trainer": {"max_steps": 2650, "learning_rate": 8e-3, "adam_beta1": 0.7, "adam_beta2": 0.997}},
    "masked": {"objective": {"name": "masked", "rate": 0.3}, "trainer": {"max_steps": 500, "learning_rate": 6e-3}},
    "span_corruption": {"objective": {"name": "span_corruption"}, "trainer": {"max_steps": 500, "learning_rate": 3e-3}},
}
"""lmssl's own side for the small shapes, the same for every seed; its steps were chosen so that it ends below what stock reaches (docs/log.md).
Another shape has its own as overrides."""
STOCK = {"next_token": (4, 2e-3), "masked": (16, 2e-3), "span_corruption": (16, 4e-3)}
"""Rows and learning rate of the stock side for the small shapes, from the grids in docs/log.md; another shape has
its own in --stock-rows and --stock-rate."""
LENGTH, HELD_OUT = 128, 0.005
SCORED_AS = {"next_token": [], "masked": ["objective.rate=0.15", "objective.unit=token"], "span_corruption": []}
"""What both checkpoints are scored with, whatever they were trained with: for masked tokens the stock side's own noise."""


class Whole:
    """Stands in for turns: the whole run at once, timed."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        self.facts: dict[str, Any] = {}
        self.first = self.last = 0.0
        outer = self

        class Times(TrainerCallback):
            def on_train_begin(self, *args: Any, **keys: Any) -> None:
                outer.first = time.perf_counter()

            def on_train_end(self, *args: Any, **keys: Any) -> None:
                outer.last = time.perf_counter()

        self.callback = Times()

    def begin(self) -> bool:
        self.first = self.first or time.perf_counter()
        return False

    def end(self) -> None:
        self.last = time.perf_counter()


def recipe_of(kind: str, shape: str, text: str, seed: int, out: Path) -> Path:
    """lmssl's recipe of a kind, written."""
    trainer = (
        RECIPES[kind]["trainer"]
        | {"per_device_train_batch_size": 16, "lr_scheduler_type": "linear"}
        | {"output_dir": str(out / "ours"), "seed": seed, "save_strategy": "no", "torch_compile": True}
    )
    data = {"text": text, "tokenizer": TOKENIZER, "seq_length": LENGTH, "held_out": HELD_OUT}
    path = out / "recipe.yaml"
    path.write_text(config.dump({"data": data, "model": SHAPES[shape][kind] | DROPOUT[kind], "objective": RECIPES[kind]["objective"], "trainer": trainer}))
    return path


def train_stock(kind: str, shape: str, text: str, seed: int, steps: int, rows: int, rate: float, out: Path) -> None:
    """In a process of its own: trains, saves, prints the seconds of training."""
    from lmssl import from_iterable, load_tokenizer
    from tests.bench.common import stock

    tokenizer = load_tokenizer(TOKENIZER)
    with tempfile.TemporaryDirectory() as folder:
        # One document: the stock side takes its ids from here, and makes its own rows of the text.
        tokens = from_iterable(["Nothing."] * 2, tokenizer, Path(folder) / "tokens", 0.0)
        whole = Whole()
        stock(
            whole, kind, shape, str(tokens.folder), LENGTH, rows, steps,
            rate=rate, seed=seed, keep=str(out / "stock"), source=text, most=None, held_out=HELD_OUT, callbacks=[whole.callback],
        )  # fmt: skip
    tokenizer.save(out / "stock")
    print(json.dumps({"seconds": round(whole.last - whole.first, 1), "tokens": whole.facts["tokens"] * steps}))


def scored(kind: str, checkpoint: Path, recipe: Path) -> float:
    """Held-out loss by lmssl's evaluator, with the recipe's data and SCORED_AS."""
    if not (checkpoint / "recipe.yaml").exists():
        shutil.copy(recipe, checkpoint / "recipe.yaml")
    subprocess.run([sys.executable, "-m", "lmssl", "evaluate", str(checkpoint), *SCORED_AS[kind]], cwd=ROOT, check=True, capture_output=True)
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    values = metrics["evaluated"][" ".join(SCORED_AS[kind])] if SCORED_AS[kind] else metrics["held_out"]
    return round(float(values["loss"]), 4)


def side(kind: str, name: str, command: list[str], recipe: Path, out: Path) -> dict[str, Any]:
    """One run with empty caches, scored; or what it gave before."""
    kept = out / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    with tempfile.TemporaryDirectory() as cache:
        places = {"LMSSL_CACHE": f"{cache}/lmssl", "HF_DATASETS_CACHE": f"{cache}/datasets", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        begun = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=os.environ | places | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True)
        cold = time.perf_counter() - begun
    if done.returncode:
        sys.exit(f"{name}: exit {done.returncode}")
    if name == "stock":
        facts = json.loads(done.stdout.strip().splitlines()[-1])
    else:
        metrics = json.loads((out / "ours" / "metrics.json").read_text())
        facts = {"seconds": round(metrics["seconds"], 1), "tokens": metrics["tokens"], "matmul_share": metrics["matmul_share"]}
    facts |= {"cold_seconds": round(cold, 1)}
    print(json.dumps({"trained": f"{out.name} {name}", **facts}), flush=True)  # what the hours gave, whatever scoring says
    facts["loss"] = scored(kind, out / name, recipe)
    kept.write_text(json.dumps(facts))
    print(json.dumps({"run": f"{out.name} {name}", **facts}), flush=True)
    return facts


def steps_of(minutes: float, trains: list[str], kept: Path) -> int:
    """The steps that the stock side takes in so many minutes; timed once, then kept."""
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as out:
            done = subprocess.run([*trains, "--out", out, "--stock-steps", "60"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        seconds = json.loads(done.stdout.strip().splitlines()[-1])["seconds"]
        kept.write_text(json.dumps({"steps": round(1.05 * minutes * 60 / seconds * 60)}))
    return int(json.loads(kept.read_text())["steps"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=RECIPES)
    parser.add_argument("--shape", default="small")
    parser.add_argument("--text", required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--stock-steps", type=int)
    parser.add_argument("--stock-rows", type=int)
    parser.add_argument("--stock-rate", type=float)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--side", choices=["ours", "stock", "train-stock"])
    parser.add_argument("--out", type=Path, required=True)
    options, overrides = parser.parse_known_args()
    kind, usual = options.kind, STOCK[options.kind]
    steps, rows, rate = options.stock_steps, options.stock_rows or usual[0], options.stock_rate or usual[1]
    if options.side == "train-stock":
        train_stock(kind, options.shape, options.text, options.seeds[0], steps, rows, rate, options.out)
        return
    shared = ["--shape", options.shape, "--text", options.text, "--stock-rows", str(rows), "--stock-rate", str(rate)]
    trains = [sys.executable, "-m", "tests.bench.time_to_loss", kind, "--side", "train-stock", *shared]
    if steps is None and options.side != "ours":
        steps = steps_of(options.minutes, trains, options.out / f"{kind}-steps.json")
    pairs = []
    for seed in options.seeds:
        out = (options.out / f"{kind}-{seed}").resolve()
        out.mkdir(parents=True, exist_ok=True)
        recipe = recipe_of(kind, options.shape, options.text, seed, out)
        commands = {
            "stock": [*trains, "--out", str(out), "--stock-steps", str(steps), "--seeds", str(seed)],
            "ours": [sys.executable, "-m", "lmssl", "pretrain", str(recipe), "--overwrite", *overrides],
        }
        pairs.append({name: side(kind, name, commands[name], recipe, out) for name in ("stock", "ours") if options.side in (None, name)})
    if options.side is None:
        line: dict[str, Any] = {"bench": f"time to loss, {kind}", "stock": f"{steps} steps of {rows} rows at {rate}", "pairs": len(pairs)}
        line["reached"] = sum(p["ours"]["loss"] <= p["stock"]["loss"] for p in pairs)
        for name, key in (("stock_over_ours", "seconds"), ("cold_stock_over_ours", "cold_seconds")):
            ratios = [p["stock"][key] / p["ours"][key] for p in pairs]
            line |= {name: round(statistics.median(ratios), 2), f"{name}_range": [round(min(ratios), 2), round(max(ratios), 2)]}
        for name in ("stock", "ours"):
            line |= {f"{name}_{key}": statistics.median(p[name][key] for p in pairs) for key in ("seconds", "cold_seconds", "loss")}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
