"""What reliability costs, beside the stock Trainer in the same run; one JSON line each.

    python -m tests.bench.reliability [save] [stream] [resume]

save: a checkpoint of 100M parameters and their optimizer with manifest, hashes and fsync, against the stock save,
alternating. stream: share of a step of the quickstart's model that rows, objective and collator take, without a worker.
resume: seconds to the first step at step 1,000,000 of a run, beyond what a fresh start takes.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

import lmssl
from lmssl import models, tokenization
from lmssl.objectives import MaskedTokens, NextToken, SpanCorruption
from tests import helpers
from tests.drills import stock
from tests.drills.common import stop_at

PAIRS = 5
SAVES = 14
"""The first two are not counted: they make the files that later ones replace, and a disk's times scatter."""


def line(name: str, pairs: list[tuple[float, float]], **more: Any) -> None:
    ratios = [ours / stock for ours, stock in pairs]
    text = {"bench": name, "ratio": round(statistics.median(ratios), 3), "ours_seconds": round(statistics.median(a for a, _ in pairs), 3)}
    print(json.dumps(text | {"stock_seconds": round(statistics.median(b for _, b in pairs), 3), "ratios": [round(r, 3) for r in ratios], **more}), flush=True)


def timed(work: Any) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def big_model(tokens: Any) -> Any:
    section = {"architecture": "gpt2", "n_embd": 768, "n_layer": 13, "n_head": 12}
    return models.build(section, tokens.vocab(), NextToken(), 128, 0)


def with_state(trainer: Any) -> Any:
    """A trainer as it is after a step, its AdamW moments filled."""
    trainer.create_optimizer_and_scheduler(10)
    for p in trainer.model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.model_wrapped = trainer.model
    return trainer


def save(folder: Path) -> None:
    tokens = helpers.token_set(folder)
    keys = {"max_steps": 10, "save_strategy": "steps"}
    ours = with_state(lmssl.PretrainTrainer(big_model(tokens), NextToken(), tokens, helpers.arguments(folder / "ours", **keys), 128, quiet=True))
    args = helpers.arguments(folder / "stock", save_total_limit=2, **keys)
    theirs = with_state(transformers.Trainer(big_model(tokens), args, train_dataset=[{"input_ids": [0]}]))
    theirs._created_lr_scheduler = True
    held, whole = [], []
    for number in range(1, SAVES + 1):
        for trainer in (ours, theirs) if number % 2 else (theirs, ours):
            trainer.state.global_step = number
            os.sync()  # what an earlier save left to be written must not be paid by the next
            torch.ones(1 << 29).sum()  # 2 GB of warm pages for both: a virtual machine gives back what lies free, and the next touch pays
            spent = timed(lambda t=trainer: t._save_checkpoint(t.model, None))
            if trainer is theirs:
                stocks = spent
            else:
                mine, sealed = spent, spent + timed(ours._settle)
        held.append((mine, stocks))
        whole.append((sealed, stocks))
    size = sum(p.stat().st_size for p in (folder / "ours" / f"checkpoint-{SAVES}").iterdir())
    facts = {"parameters": models.parameters(ours.model), "megabytes": size >> 20}
    line("save: training is held for", held[2:], **facts)
    line("save: whole, verified and on disk after", whole[2:], **facts)


class _Times(TrainerCallback):
    """When each step began."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun.append(time.perf_counter())


def stream(folder: Path) -> None:
    """The quickstart's shape: 4 layers of 128, 8,192 ids, rows of 128, 16 a step."""
    tokens = lmssl.from_iterable(helpers.sentences(4000), tokenization.load("tokenizer_assets/bpe-8k"), folder / "tokens", 0.05)
    section = {"architecture": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    for name, objective, keys in (
        ("next_token", NextToken(), section),
        ("masked", MaskedTokens(unit="word"), {"architecture": "bert", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}),
        ("span_corruption", SpanCorruption(), {"architecture": "t5", "d_model": 128, "d_kv": 32, "d_ff": 344, "num_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu"}),
    ):
        args = helpers.arguments(folder / name, max_steps=60, per_device_train_batch_size=16, bf16=True, logging_steps=100)
        trainer = lmssl.PretrainTrainer(models.build(keys, tokens.vocab(), objective, 128, 0), objective, tokens, args, 128, quiet=True)
        spent, times, original = [], _Times(), trainer.get_batch_samples

        def reading(*a: Any, original: Any = original, spent: list = spent, **k: Any) -> Any:
            begun = time.perf_counter()
            value = original(*a, **k)
            spent.append(time.perf_counter() - begun)
            return value

        trainer.get_batch_samples = reading
        trainer.add_callback(times)
        trainer.run()
        step = statistics.median(b - a for a, b in zip(times.begun[10:], times.begun[11:]))
        share = statistics.median(spent[10:]) / step
        print(json.dumps({"bench": "stream", "objective": name, "share_of_step": round(share, 4), "step_milliseconds": round(step * 1e3, 2)}), flush=True)


def resume(folder: Path) -> None:
    tokens, far = helpers.token_set(folder), 1_000_000

    def at(step: int) -> float:
        """Seconds from train() to the first step's end of a run that is resumed at `step`."""
        out = folder / f"at-{step}"
        trainer = lmssl.PretrainTrainer(
            helpers.small_model("bert", tokens.vocab()), MaskedTokens(), tokens, helpers.arguments(out, max_steps=far + 10, logging_steps=100), 32, quiet=True
        )
        trainer.add_callback(stop_at(step + 1))
        return timed(lambda: trainer.run(trainer.resume_point() if step else None))

    def stock_at(step: int) -> float:
        trainer = stock.trainer(folder, "masked", folder / f"stock-{step}", max_steps=far + 10, logging_steps=100, save_strategy="no")
        trainer.add_callback(stop_at(step + 1))
        return timed(lambda: trainer.train(resume_from_checkpoint=str(folder / f"stock-{step}" / f"checkpoint-{step}") if step else None))

    (folder / "text.txt").write_text("\n".join(helpers.sentences(600)))
    place(folder, tokens, far)
    pairs, fresh = [], []
    for _ in range(PAIRS):
        fresh.append((at(0), stock_at(0)))
        pairs.append((at(far), stock_at(far)))
    beyond = [statistics.median(p[k] - f[k] for p, f in zip(pairs, fresh, strict=True)) for k in (0, 1)]
    print(json.dumps({"bench": "resume at step 1,000,000", "seconds_beyond_a_fresh_start": round(beyond[0], 2), "stock": round(beyond[1], 2)}), flush=True)


def place(folder: Path, tokens: Any, far: int) -> None:
    """Checkpoints of step 1,000,000: ours through the trainer's own save, stock's through its own."""
    ours = lmssl.PretrainTrainer(helpers.small_model("bert", tokens.vocab()), MaskedTokens(), tokens, helpers.arguments(folder / f"at-{far}", max_steps=far + 10), 32, quiet=True)
    theirs = stock.trainer(folder, "masked", folder / f"stock-{far}", max_steps=far + 10)
    for trainer in (ours, theirs):
        with_state(trainer)
        trainer.state.train_batch_size, trainer.state.num_train_epochs, trainer.state.save_steps, trainer.state.logging_steps = 4, 1, 500, 1
        trainer.state.global_step, trainer.state.max_steps = far, far + 10
        trainer.state.epoch = 1.0
        trainer._save_checkpoint(trainer.model, None)
    ours._settle()


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    chosen = sys.argv[1:] or ["save", "stream", "resume"]
    for name in chosen:
        folder = Path(tempfile.mkdtemp())
        try:
            {"save": save, "stream": stream, "resume": resume}[name](folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
