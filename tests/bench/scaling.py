"""The scaling law that `lmssl plan` sizes small models by: losses over a grid of sizes and tokens, and the fit.

    python -m tests.bench.scaling --text FILES --out FOLDER [--factors 0.5 0.71 1 1.41 2] [--steps 250 500 1000 2000]

The family is `plan`'s own: the small llama of tests/bench/common.py times each factor, trained by the recipe of tests/bench/time_to_loss.py. Every run has its
whole schedule and one thread; as many go side by side as there are cores, since only losses are read. What a run gave stays in
FOLDER, and a second call does not repeat it. The law is FLOOR + FACTOR_N / N^a + FACTOR_D / D^b, N without embeddings,
fitted as Hoffmann et al. do (2203.15556, section 3.3): Huber loss of log loss, from many starts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from lmssl import models, plan
from tests.bench.common import SHAPES, alone, side_by_side
from tests.bench.time_to_loss import recipe_of


def trained(factor: float, steps: int, text: str, out: Path) -> dict[str, Any]:
    """{"factor", "inner", "tokens", "loss"} of one run."""
    kept = out / f"{factor:g}-{steps}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    folder = out / f"{factor:g}-{steps}"
    folder.mkdir(exist_ok=True)
    section = SHAPES["small"]["next_token"]
    made = plan.scaled(section, models.config_of(section), factor)
    sizes = [f"model.{name}={value}" for name, value in made.items() if name != "architecture"]
    recipe = recipe_of("next_token", "small", text, 0, folder)
    alone([sys.executable, "-m", "lmssl", "pretrain", str(recipe), "--overwrite", f"trainer.max_steps={steps}", "trainer.torch_compile=false", *sizes])
    metrics = json.loads((folder / "ours" / "metrics.json").read_text())
    inner = plan.inner_parameters(AutoModelForCausalLM.from_pretrained(folder / "ours"))
    facts = {"factor": factor, "inner": inner, "tokens": metrics["tokens"], "loss": metrics["held_out"]["loss"]}
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
    points = side_by_side(lambda factor, steps: trained(factor, steps, options.text, options.out.resolve()), grid)
    print(json.dumps({"bench": "scaling law", "runs": len(points), **fit(points)}), flush=True)


if __name__ == "__main__":
    main()
