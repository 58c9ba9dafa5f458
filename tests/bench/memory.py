"""Peak memory of training at 32,768 and 131,072 ids: lmssl (bf16) and stock (fp32), fresh processes, AdamW on both sides.

    python -m tests.bench.memory [next_token masked]

The peak is of the resident set, less what the process held before its first step (interpreter, libraries, model).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.common import DROPOUT, ROOT, SHAPES, TOKENIZER, objective_of, texts

SIZES = (32_768, 131_072)
ROWS, LENGTH, STEPS = 32, 256, 2


def held() -> int:
    """Resident bytes now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def train(side: str, kind: str, size: int, folder: Path) -> dict[str, int]:
    """{"before", "peak"} in bytes."""
    import torch
    import transformers

    from lmssl import arguments, machine, models
    from lmssl.data.tokens import TokenSet
    from lmssl.pretraining import PretrainTrainer

    tokens = TokenSet(folder / "tokens")
    vocab = dataclasses.replace(tokens.vocab(), size=size)
    own = {} if side == "ours" else {"attn_implementation": "sdpa"}  # what transformers chooses by itself
    model = models.build(SHAPES["small"][kind] | DROPOUT[kind] | own, vocab, objective_of(kind), LENGTH, 0)
    before = held()
    if side == "ours":
        section = {"optimizer": "adamw", "output_dir": str(folder / "ours"), "max_steps": STEPS, "per_device_train_batch_size": ROWS, "save_strategy": "no"}
        values = arguments.with_steps(arguments.resolve(section, arguments.pretrain_defaults()), 1)
        PretrainTrainer(model, objective_of(kind), tokens, arguments.build(values), LENGTH, quiet=True, **arguments.own(values)).run()
    else:
        args = transformers.TrainingArguments(
            str(folder / "stock"), max_steps=STEPS, per_device_train_batch_size=ROWS, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
        )
        rows = [{"input_ids": r} for r in torch.randint(200, 8000, (ROWS * STEPS, LENGTH)).tolist()]
        tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=kind == "masked", mlm_probability=0.15)
        transformers.Trainer(model, args, collator, rows).train()
    return {"before": before, "peak": machine.most_memory()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=["next_token", "masked"])
    parser.add_argument("--side", choices=["ours", "stock"])
    parser.add_argument("--size", type=int)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(train(options.side, options.kinds[0], options.size, options.folder)))
        return
    from lmssl import from_iterable, load_tokenizer

    with tempfile.TemporaryDirectory() as name:
        from_iterable(texts(most=500), load_tokenizer(TOKENIZER), Path(name) / "tokens", 0.02)
        for kind in options.kinds:
            for size in SIZES:
                line: dict[str, object] = {"bench": f"memory {kind}, {size:,} ids", "batch": f"{ROWS} x {LENGTH}"}
                for side in ("ours", "stock"):
                    command = [sys.executable, "-m", "tests.bench.memory", kind, "--side", side, "--size", str(size), "--folder", name]
                    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
                    got = json.loads(done.stdout.strip().splitlines()[-1])
                    line |= {f"{side}_peak_mb": got["peak"] >> 20, f"{side}_beyond_model_mb": (got["peak"] - got["before"]) >> 20}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
