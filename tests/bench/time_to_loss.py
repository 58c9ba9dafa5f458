"""Wall-clock to the stock script's final held-out loss, side by side: hours, so `make bench` leaves it out.

    python -m tests.bench.time_to_loss KIND --text FILES --stock-steps N --stock-rows R --stock-rate LR --out FOLDER [recipe overrides]

Both start from one AutoConfig, tokenizer and text, preparation done. The stock side trains its steps to the end and is
scored by lmssl's evaluator on the same isolated held-out rows and, for masked tokens, the same 15% masks. Then lmssl
trains by its own recipe, as long as `trainer.max_steps` says, and is scored by the same. Seconds are of training alone,
compilation beside them; `cold` counts everything from launch to the saved model, preparation included, with empty caches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from lmssl import config
from tests.bench.common import DROPOUT, ROOT, SHAPES, TOKENIZER, stock

RECIPES = {
    "next_token": {"objective": {"name": "next_token"}, "trainer": {"per_device_train_batch_size": 16}},
    "masked": {"objective": {"name": "masked", "rate": 0.3, "unit": "word"}, "trainer": {"per_device_train_batch_size": 16}},
    "span_corruption": {"objective": {"name": "span_corruption"}, "trainer": {"per_device_train_batch_size": 16}},
}
"""lmssl's own side: what its recipes say, whatever the stock side does."""
HELD_OUT = 0.005


class Running:
    """Stands in for turns: the whole run at once, timed."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        self.facts: dict[str, float] = {}
        self.first = self.last = 0.0
        outer = self

        class Times(TrainerCallback):
            def on_train_begin(self, *args, **keys) -> None:
                outer.first = time.perf_counter()

            def on_train_end(self, *args, **keys) -> None:
                outer.last = time.perf_counter()

        self.callback = Times()

    def begin(self) -> bool:
        self.first = self.first or time.perf_counter()
        return False

    def end(self) -> None:
        self.last = time.perf_counter()

    def __getattr__(self, name: str):
        return getattr(self.callback, name)


def score(checkpoint: str, recipe: Path) -> float:
    """Held-out loss by lmssl's evaluator, with the recipe's data and the objective's fixed held-out rate."""
    import shutil

    shutil.copy(recipe, Path(checkpoint) / "recipe.yaml")
    subprocess.run([sys.executable, "-m", "lmssl", "evaluate", checkpoint], cwd=ROOT, check=True, capture_output=True)
    return float(json.loads((Path(checkpoint) / "metrics.json").read_text())["held_out"]["loss"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=RECIPES)
    parser.add_argument("--shape", default="small")
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--stock-steps", type=int, required=True)
    parser.add_argument("--stock-rows", type=int, default=32)
    parser.add_argument("--stock-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options, overrides = parser.parse_known_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    sections = {
        "data": {"text": options.text, "tokenizer": TOKENIZER, "seq_length": options.length, "held_out": HELD_OUT},
        "model": SHAPES[options.shape][options.kind] | DROPOUT[options.kind],
    }
    sections |= RECIPES[options.kind]
    sections["trainer"] = sections["trainer"] | {"output_dir": str(out / "ours"), "seed": options.seed, "save_strategy": "no"}
    recipe = out / "recipe.yaml"
    recipe.write_text(config.dump(sections))
    from lmssl.recipe import PretrainRecipe, prepared

    loaded = PretrainRecipe.load(recipe)
    tokens = prepared(loaded.data, loaded.tokenizer())
    begun, running = time.perf_counter(), Running()
    keys = {"rate": options.stock_rate, "seed": options.seed, "keep": str(out / "stock"), "source": options.text, "most": None, "held_out": HELD_OUT}
    stock(running, options.kind, options.shape, str(tokens.folder), options.length, options.stock_rows, options.stock_steps, **keys)
    tokens.tokenizer.save(out / "stock")
    theirs = {"seconds": round(running.last - running.first, 1), "all_seconds": round(time.perf_counter() - begun, 1), "loss": round(score(str(out / "stock"), recipe), 4)}
    print(json.dumps({"bench": f"time to loss, stock {options.kind}", **theirs}), flush=True)
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lmssl", "pretrain", str(recipe), "--overwrite", *overrides], cwd=ROOT, check=True)
    metrics = json.loads((out / "ours" / "metrics.json").read_text())
    ours = {"seconds": metrics["seconds"], "all_seconds": round(time.perf_counter() - begun, 1), "loss": round(score(str(out / "ours"), recipe), 4)}
    print(
        json.dumps(
            {
                "bench": f"time to loss {options.kind}",
                "reached": ours["loss"] <= theirs["loss"],
                "stock_over_ours": round(theirs["seconds"] / ours["seconds"], 2),
                "ours": ours,
                "stock": theirs,
            }
        )
    )


if __name__ == "__main__":
    main()
