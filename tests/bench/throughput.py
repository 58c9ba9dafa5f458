"""Tokens a second at the identical model, AdamW and batch: lmssl (bf16, compiled) and stock (fp32, eager), in turns.

    python -m tests.bench.throughput [next_token masked span_corruption] [--shape middle] [--rows 32] [--length 256]

Each side is a process of its own that sleeps while the other trains; medians of the pairs. `matmul_share`: the executed
matmul FLOPs of lmssl's step over what a bare bf16 product reaches on this machine.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.common import KINDS, TOKENIZER, Side, ours, report, stock, texts

ADAMW = {
    "optimizer": "adamw",
    "optim": "adamw_torch_fused",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.01,
    "adam_beta2": 0.999,
    "torch_compile": True,
    "batch": "auto",
}


def measure(kind: str, shape: str, rows: int, length: int, pairs: int, steps: int, folder: Path) -> dict[str, Any]:
    from lmssl import from_iterable, load_tokenizer

    tokens = folder / "tokens"
    if not tokens.exists():
        from_iterable(texts(most=4000), load_tokenizer(TOKENIZER), tokens, 0.02)
    sides = [Side(ours, kind, shape, str(tokens), length, rows, 10**6, ADAMW), Side(stock, kind, shape, str(tokens), length, rows, 10**6)]
    try:
        for side in sides:
            side.seconds(3)
        spent: list[list[float]] = [[], []]
        for number in range(pairs):
            for k in (0, 1) if number % 2 else (1, 0):
                spent[k].append(sides[k].seconds(steps) / sides[k].facts["tokens"])
        facts = sides[0].facts
    finally:
        for side in sides:
            side.close()
    best = sorted(spent[0])[len(spent[0]) // 2] * facts["tokens"]
    more = {
        "parameters": facts["parameters"],
        "batch_tokens": facts["tokens"],
        "micro_batch_rows": facts["micro_batch"],
        "tokens_per_second": round(facts["tokens"] / best),
        "matmul_share": round(facts["flops"] / best / facts["peak"], 3),
    }
    return report(f"throughput {kind} {shape}", *([1000 * s for s in side] for side in spent), unit="1,000 tokens", **more)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--shape", default="middle")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            measure(kind, options.shape, options.rows, options.length, options.pairs, options.steps, Path(folder))


if __name__ == "__main__":
    main()
