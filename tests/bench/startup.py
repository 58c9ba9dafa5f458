"""What a user waits for: `lmssl --help`, `import lmssl`, and the first step of a 13.8M model, compiled or not, with cold and warm caches.

python -m tests.bench.startup
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lmssl import config
from tests.bench.common import REVIEWS, ROOT, SHAPES, TOKENIZER

RUNS = 5


def seconds(*command: str) -> float:
    begun = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - begun


def first_step(recipe: Path, caches: Path) -> float:
    """From launch to the first line of progress, which is printed after step 1."""
    env = os.environ | {"LMSSL_CACHE": str(caches / "text"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "kernels")}
    begun = time.perf_counter()
    command = [sys.executable, "-m", "lmssl", "pretrain", str(recipe), "--overwrite"]
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("step 1/"):
                spent = time.perf_counter() - begun
                process.kill()
                return spent
    raise RuntimeError("the run ended before its first step")


def main() -> None:
    for name, command in (("lmssl --help", ["-m", "lmssl", "--help"]), ("import lmssl", ["-c", "import lmssl"])):
        times = [seconds(sys.executable, *command) for _ in range(RUNS)]
        bare = [seconds(sys.executable, "-c", "pass") for _ in range(RUNS)]
        print(json.dumps({"bench": name, "seconds": round(statistics.median(times), 3), "of_which_python": round(statistics.median(bare), 3)}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for compiled in (False, True):
            recipe = Path(folder) / f"{compiled}.yaml"
            trainer = {"output_dir": f"{folder}/run", "max_steps": 50, "logging_steps": 1, "per_device_train_batch_size": 16, "torch_compile": compiled}
            data = {"text": REVIEWS, "tokenizer": TOKENIZER, "seq_length": 128}
            recipe.write_text(config.dump({"data": data, "model": SHAPES["middle"]["next_token"], "objective": {"name": "next_token"}, "trainer": trainer}))
            times = [first_step(recipe, Path(folder) / f"caches-{compiled}") for _ in range(RUNS + 1)]
            more = {"compiled": compiled, "cold_seconds": round(times[0], 1), "warm_seconds": round(statistics.median(times[1:]), 1)}
            print(json.dumps({"bench": "first step, 13.8M parameters", **more}), flush=True)


if __name__ == "__main__":
    main()
