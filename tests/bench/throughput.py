"""Tokens a second at the identical model, AdamW and batch: lmssl (bf16, compiled) and stock, in turns.

    python -m tests.bench.throughput [next_token masked span_corruption] [--shape middle] [--rows 32] [--length 256]

Each side is a process of its own that sleeps while the other trains; medians of the pairs. Stock is fp32 and eager on a CPU
(`--best-stock`: bf16 and compiled, where it has a Trainer); on a GPU it is bf16, compiled, with fused AdamW and workers. `matmul_share`: the
executed matmul FLOPs of a step over what a bare bf16 product reaches on this machine. `--shape base` is GPT-2 124M, BERT base and T5 base, for a
GPU: all sides begin at once there, since compilation is what takes long.
"""

from __future__ import annotations

import argparse
import sys
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


def begin(kind: str, work: Callable[..., None], shape: str, rows: int, length: int, source: str, tokens: Path, best: bool, pieces: int) -> Side:
    """A side, warm."""
    if work is ours:
        side = Side(ours, kind, shape, str(tokens), length, rows, 10**6, ADAMW | ({"batch": "given"} if shape in SIZES else {}))
    else:
        side = Side(stock, kind, shape, str(tokens), length, rows, 10**6, source=source, most=12_000 if shape in SIZES else 4000, best_on_cpu=best, pieces=pieces)
    side.seconds(3)
    return side


def attempt(job: tuple[Any, ...]) -> Side | None:
    """A side, or None where it cannot begin: the others go on."""
    try:
        return begin(*job)
    except Exception as error:
        print(f"{job[0]}, {job[1].__name__}: {error}", file=sys.stderr, flush=True)
        return None


def measure(name: str, pairs: int, steps: int, sides: Sequence[Side], peak: float | None) -> dict[str, Any]:
    """Their turns, as one JSON line; `peak` where it is not the one that our side found when it began."""
    spent: list[list[float]] = [[], []]
    for number in range(pairs):
        for k in (0, 1) if number % 2 else (1, 0):
            spent[k].append(sides[k].seconds(steps) / sides[k].facts["tokens"])
    mine, theirs = (side.facts for side in sides)
    mine |= {"peak": peak} if peak else {}
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
    return report(name, *([1000 * s for s in side] for side in spent), unit="1,000 tokens", **more)


def main() -> None:
    import torch

    from lmssl import from_iterable, load_tokenizer, machine

    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--shape", default="middle")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a turn; 3, of the base shapes 30")
    parser.add_argument("--best-stock", action="store_true", help="on a CPU, the Trainer with bf16 and torch_compile")
    parser.add_argument("--stock-pieces", type=int, default=1, help="that stock takes a step's rows in, its gradients added up; lmssl's are chosen by batch: auto")
    parser.add_argument("--text", default=REVIEWS, help="as a recipe's data.text")
    options = parser.parse_args()
    sizes = SIZES.get(options.shape, {})
    at_once = len(options.kinds) if sizes else 1
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        from_iterable(texts(options.text, 4000), load_tokenizer(TOKENIZER), tokens, 0.02)
        for kinds in batched(options.kinds, at_once):
            jobs = [
                (kind, work, options.shape, *sizes.get(kind, (options.rows, options.length)), options.text, tokens, options.best_stock, options.stock_pieces)
                for kind in kinds
                for work in (ours, stock)
            ]
            with ThreadPoolExecutor(len(jobs) if sizes else 1) as pool:
                sides = list(pool.map(attempt, jobs))
            # Beside sides that are still warming up a GPU would look slower than it is.
            peak = machine.matmul_peak(machine.device(), torch.bfloat16, torch.get_num_threads()) if at_once > 1 else None
            try:
                for kind, pair in zip(kinds, batched(sides, 2), strict=True):
                    if all(pair):
                        name = f"throughput {kind} {options.shape}"
                        name += ", stock with bf16 and compilation" if options.best_stock else ""
                        name += f", stock in {options.stock_pieces} pieces" if options.stock_pieces > 1 else ""
                        measure(name, options.pairs, options.steps or (30 if sizes and torch.cuda.is_available() else 3), pair, peak)
            finally:
                for side in filter(None, sides):
                    side.close()


if __name__ == "__main__":
    main()
