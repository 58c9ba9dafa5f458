"""What a step spends its time on: the kernels of five steps, and how long the device waits between them.

    python -m tests.bench.kernels ours|stock [next_token|masked|span_corruption] [--shape base] [--rows 32] [--length 256]

One line of JSON (milliseconds of a step, of its kernels, and of a step while it is profiled), then the kernels, longest first: milliseconds and calls of a step.
On a GPU kernels are CUDA's, on a CPU torch's operators.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from tests.bench import throughput
from tests.bench.common import KINDS, REVIEWS, TOKENIZER, ours, stock, texts

WARM, TIMED, PROFILED = 8, 10, 5
"""Steps before anything is measured, steps timed, and steps profiled behind them."""


class Watch(TrainerCallback):
    """Times some steps, profiles the next, says what it saw and ends the training."""

    def __init__(self, name: str):
        self.name, self.facts, self.steps, self.gpu = name, dict[str, Any](), 0, torch.cuda.is_available()
        self.profile = profile(activities=[ProfilerActivity.CUDA if self.gpu else ProfilerActivity.CPU])

    def _now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self) -> bool:
        """Before a step; True where no step is wanted any more."""
        self.steps += 1
        if self.steps == WARM:
            self.begun = self._now()
        elif self.steps == WARM + TIMED:
            self.step, self.begun = (self._now() - self.begun) / TIMED, time.perf_counter()
            self.profile.__enter__()
        elif self.steps == WARM + TIMED + PROFILED:
            profiled = (self._now() - self.begun) / PROFILED
            self.profile.__exit__(None, None, None)
            self._say(profiled)
        return self.steps >= WARM + TIMED + PROFILED

    def _say(self, profiled: float) -> None:
        spent = "self_device_time_total" if self.gpu else "self_cpu_time_total"
        rows = sorted(((getattr(e, spent) / PROFILED / 1000, e.count / PROFILED, e.key) for e in self.profile.key_averages()), reverse=True)
        kernels = [row for row in rows if row[0] > 0 and not row[2].startswith(("Optimizer.", "##", "ProfilerStep", "CompiledFx", "Torch-Compiled"))]
        line = {"bench": self.name, "step_ms": 1000 * self.step, "kernels_ms": sum(row[0] for row in kernels), "profiled_step_ms": 1000 * profiled}
        print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()}))
        for milliseconds, calls, name in kernels[:40]:
            print(f"{milliseconds:9.3f} {calls:7.1f} x {name[:150]}")

    def end(self) -> None:
        """After a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.begin()


def main() -> None:
    from lmssl import from_iterable, load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["ours", "stock"])
    parser.add_argument("kind", nargs="?", choices=KINDS, default=KINDS[0])
    parser.add_argument("--shape", default="base")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    rows, length = throughput.SIZES.get(options.shape, {}).get(options.kind, (options.rows, options.length))
    watch = Watch(f"kernels {options.side} {options.kind} {options.shape}")
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        from_iterable(texts(REVIEWS, 4000), load_tokenizer(TOKENIZER), tokens, 0.02)
        given = (watch, options.kind, options.shape, str(tokens), length, rows, 10**6)
        if options.side == "ours":
            ours(*given, throughput.ADAMW | {"batch": "given"})
        else:
            stock(*given)


if __name__ == "__main__":
    main()
