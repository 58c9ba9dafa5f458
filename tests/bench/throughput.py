"""Tokens a second at the identical model, AdamW and batch: lmssl (bf16, compiled) and stock, in turns.

    python -m tests.bench.throughput [next_token masked span_corruption] [--shape middle] [--rows 32] [--length 256]

Each side is a process of its own that sleeps while the other trains; medians of the pairs. Stock is fp32 and eager on a CPU; on a GPU it is bf16,
compiled, with fused AdamW and workers. `matmul_share`: the executed matmul FLOPs of a step over what a bare bf16 product reaches on this machine.
`--shape base` is GPT-2 124M, BERT base and T5 base, for a GPU: all sides begin at once there, since compilation is what takes long.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lmssl.tasks.base import batched
from tests.bench.common import KINDS, REVIEWS, TOKENIZER, Side, ours, report, stock, texts

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
SIZES = {"base": {"next_token": (16, 1024), "masked": (32, 512), "span_corruption": (16, 512)}}
"""Rows and tokens of a row, where they are not the options'."""


def begin(kind: str, work: Callable[..., None], shape: str, rows: int, length: int, source: str, tokens: Path) -> Side:
    """A side, warm."""
    if work is ours:
        side = Side(ours, kind, shape, str(tokens), length, rows, 10**6, ADAMW | ({"batch": "given"} if shape in SIZES else {}))
    else:
        side = Side(stock, kind, shape, str(tokens), length, rows, 10**6, source=source)
    side.seconds(3)
    return side


def measure(kind: str, shape: str, pairs: int, steps: int, sides: Sequence[Side]) -> dict[str, Any]:
    """Their turns, as one JSON line."""
    spent: list[list[float]] = [[], []]
    for number in range(pairs):
        for k in (0, 1) if number % 2 else (1, 0):
            spent[k].append(sides[k].seconds(steps) / sides[k].facts["tokens"])
    mine, theirs = (side.facts for side in sides)
    seconds, slow = (sorted(side)[len(side) // 2] for side in spent)
    more = {
        "parameters": mine["parameters"],
        "batch_tokens": mine["tokens"],
        "micro_batch_rows": mine["micro_batch"],
        "tokens_per_second": round(1 / seconds),
        "matmul_share": round(mine["flops"] / mine["tokens"] / seconds / mine["peak"], 3),
    }
    if "flops" in theirs:  # on a GPU
        more |= {"stock_tokens_per_second": round(1 / slow), "stock_matmul_share": round(theirs["flops"] / theirs["tokens"] / slow / mine["peak"], 3)}
        more |= {"peak_tflops": round(mine["peak"] / 1e12), "memory_mb": mine["memory_mb"], "stock_memory_mb": theirs["memory_mb"]}
    return report(f"throughput {kind} {shape}", *([1000 * s for s in side] for side in spent), unit="1,000 tokens", **more)


def main() -> None:
    from lmssl import from_iterable, load_tokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--shape", default="middle")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--text", default=REVIEWS, help="as a recipe's data.text")
    options = parser.parse_args()
    sizes = SIZES.get(options.shape, {})
    at_once = len(options.kinds) if sizes else 1
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        from_iterable(texts(options.text, 4000), load_tokenizer(TOKENIZER), tokens, 0.02)
        for kinds in batched(options.kinds, at_once):
            jobs = [(kind, work, options.shape, *sizes.get(kind, (options.rows, options.length)), options.text, tokens) for kind in kinds for work in (ours, stock)]
            with ThreadPoolExecutor(len(jobs) if sizes else 1) as pool:
                sides = list(pool.map(lambda job: begin(*job), jobs))
            try:
                for kind, pair in zip(kinds, batched(sides, 2), strict=True):
                    measure(kind, options.shape, options.pairs, options.steps, pair)
            finally:
                for side in sides:
                    side.close()


if __name__ == "__main__":
    main()
