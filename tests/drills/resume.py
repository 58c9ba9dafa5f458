"""Kill -9 a training run at random steps, resume it, and compare the final weights bit for bit.

For each of the three objective kinds: one uninterrupted run, then KILLS runs that are killed at a random moment while
they are alive and training, resumed with --resume until they finish. One JSON line each; exit status 1 on a difference.

    python -m tests.drills.resume [--kills 10] [--seed 0]
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from tests.helpers import SMALL, sentences

STEPS = 300
KINDS = {"next_token": "gpt2", "masked": "bert", "span_corruption": "t5"}


def command(folder: Path, kind: str, out: Path, steps: int, *more: str) -> list[str]:
    keys = ", ".join(f"{k}: {v}" for k, v in SMALL[KINDS[kind]].items())
    recipe = folder / f"{kind}.yaml"
    recipe.write_text(
        f"data: {{text: {folder / 'text.txt'}, tokenizer: tokenizer_assets/bpe-8k, seq_length: 32, held_out: 0.1}}\n"
        f"model: {{architecture: {KINDS[kind]}, {keys}}}\nobjective: {{name: {kind}}}\n"
        f"trainer: {{output_dir: {out}, max_steps: {steps}, save_steps: 20, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, logging_steps: 1, bf16: false}}\n"
    )
    return [sys.executable, "-m", "lmssl", "pretrain", str(recipe), *more]


def killed_run(folder: Path, kind: str, out: Path, steps: int, draw: random.Random, environment: dict[str, str]) -> list[int]:
    """Train, die at a random step, resume until finished; the steps at which it died."""
    target, died = draw.randint(1, steps - 1), []
    process = subprocess.Popen(command(folder, kind, out, steps), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    for line in process.stderr:
        if line.startswith(f"step {target}/"):
            time.sleep(draw.random() * 0.02)
            process.send_signal(signal.SIGKILL)
            died.append(target)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.returncode
    subprocess.run(command(folder, kind, out, steps, "--resume"), check=True, capture_output=True, env=environment)
    return died


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    draw, failed_any = random.Random(options.seed), False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("\n".join(sentences(600)))
        environment = os.environ | {"LMSSL_CACHE": str(folder / "cache")}
        for kind in options.kinds:
            begun, failed, died = time.time(), 0, []
            whole = folder / kind
            subprocess.run(command(folder, kind, whole, options.steps), check=True, capture_output=True, env=environment)
            expected = load_file(whole / "model.safetensors")
            for number in range(options.kills):
                out = folder / f"{kind}-{number}"
                died += killed_run(folder, kind, out, options.steps, draw, environment)
                found = load_file(out / "model.safetensors")
                failed += any(not expected[k].equal(found[k]) for k in expected)
            failed_any |= failed > 0
            print(
                json.dumps(
                    {
                        "drill": "resume",
                        "objective": kind,
                        "held": not failed,
                        "tried": options.kills,
                        "failed": failed,
                        "killed_at": died,
                        "seconds": round(time.time() - begun, 1),
                    }
                ),
                flush=True,
            )
    return int(failed_any)


if __name__ == "__main__":
    sys.exit(main())
