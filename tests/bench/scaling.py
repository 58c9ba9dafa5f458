"""The scaling law that `lmssl plan` sizes small models by: losses over a grid of sizes and tokens, and the fit.

    python -m tests.bench.scaling --text FILES --out FOLDER [--factors 0.5 0.71 1 1.41 2] [--steps 250 500 1000 2000]

The family is `plan`'s own: the small llama of tests/bench/common.py times each factor. Every run has its whole schedule (linear decay to
zero), one thread, and its own recipe; as many go side by side as there are cores, since only losses are read. What a run gave stays in
FOLDER, and a second call does not repeat it. The law is FLOOR + FACTOR_N / N^a + FACTOR_D / D^b, N without embeddings,
fitted as Hoffmann et al. do (2203.15556, section 3.3): Huber loss of log loss, from many starts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lmssl import config, models, plan
from tests.bench.common import ROOT, SHAPES, TOKENIZER

ROWS, LENGTH, RATE = 16, 128, 6e-3


def trained(factor: float, steps: int, text: str, out: Path) -> dict[str, Any]:
    """{"factor", "inner", "tokens", "loss"} of one run."""
    kept = out / f"{factor:g}-{steps}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    section = SHAPES["small"]["next_token"]
    model = plan.scaled(section, models.config_of(section), factor)
    folder = out / f"run-{factor:g}-{steps}"
    trainer = {"output_dir": str(folder), "max_steps": steps, "learning_rate": RATE, "lr_scheduler_type": "linear", "save_strategy": "no"}
    data = {"text": text, "tokenizer": TOKENIZER, "seq_length": LENGTH, "held_out": 0.005}
    recipe = out / f"{factor:g}-{steps}.yaml"
    recipe.write_text(config.dump({"data": data, "model": model, "objective": {"name": "next_token"}, "trainer": trainer | {"per_device_train_batch_size": ROWS}}))
    command = [sys.executable, "-m", "lmssl", "pretrain", str(recipe), "--overwrite"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    metrics = json.loads((folder / "metrics.json").read_text())
    outer = model["hidden_size"] * json.loads((folder / "config.json").read_text())["vocab_size"]
    facts = {"factor": factor, "inner": metrics["parameters"] - outer, "tokens": metrics["tokens"], "loss": metrics["held_out"]["loss"]}
    kept.write_text(json.dumps(facts))
    print(json.dumps(facts), flush=True)
    return facts


def fit(points: list[dict[str, Any]]) -> dict[str, float]:
    """{"floor", "factor_n", "exponent_n", "factor_d", "exponent_d", "error"}: error is the root mean square of log loss."""
    from scipy.optimize import minimize

    n, d, loss = (np.log([p[key] for p in points]) for key in ("inner", "tokens", "loss"))

    def residuals(x: np.ndarray) -> np.ndarray:
        e, a, alpha, b, beta = x
        return np.logaddexp(np.logaddexp(e, a - alpha * n), b - beta * d) - loss

    def huber(x: np.ndarray, delta: float = 1e-3) -> float:
        r = np.abs(residuals(x))
        return float(np.where(r <= delta, 0.5 * r**2, delta * (r - 0.5 * delta)).sum())

    starts = itertools.product((0.0, 0.5, 1.0), (1.0, 4.0, 8.0), (0.2, 0.5, 0.8), (1.0, 4.0, 8.0), (0.2, 0.5, 0.8))
    bounds = [(-1.0, 1.5), (-5.0, 25.0), (0.05, 2.0), (-5.0, 25.0), (0.05, 2.0)]
    best = min((minimize(huber, start, method="L-BFGS-B", bounds=bounds) for start in starts), key=lambda found: found.fun).x
    values = dict(zip(("floor", "factor_n", "exponent_n", "factor_d", "exponent_d"), [*np.exp(best[:2]), best[2], np.exp(best[3]), best[4]], strict=True))
    return {name: float(f"{value:.4g}") for name, value in values.items()} | {"error": round(float(np.sqrt((residuals(best) ** 2).mean())), 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 0.71, 1, 1.41, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[250, 500, 1000, 2000])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # Long ones first, so that no core waits for the last.
    grid = sorted(itertools.product(options.factors, options.steps), key=lambda pair: -(pair[0] ** 2) * pair[1])
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        points = list(pool.map(lambda pair: trained(*pair, options.text, options.out.resolve()), grid))
    print(json.dumps({"bench": "scaling law", "runs": len(points), **fit(points)}), flush=True)


if __name__ == "__main__":
    main()
