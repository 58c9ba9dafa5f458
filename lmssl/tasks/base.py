"""Few labels done properly: nested stratified subsets, several seeds, and the twin from scratch beside every run.

The curve: for each number of labels and each seed, the same subset, the same order, the same steps and the same
learning rate, once from the pretrained checkpoint and once from the same configuration with random weights.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from lmssl import arguments, models, tokenization
from lmssl.data import corpus
from lmssl.data.stream import generator, mix, permuted
from lmssl.data.tokens import below, content_hash
from lmssl.errors import UserError
from lmssl.tokenization import Tokenizer
from lmssl.trainer import ExactTrainer

log = logging.getLogger("lmssl")


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled text.

    Attributes:
        text: the input.
        label: class name.
        where: file:line.
    """

    text: str
    label: str
    where: str


class Task(Protocol):
    """What a task adds to the label curve. A frozen dataclass whose fields are the recipe's task section."""

    name: str
    metric: str
    labels: list[int]
    seeds: int

    def read(self, sources: list[corpus.Source]) -> list[Example]: ...

    def model(self, source: str | None, like: str, classes: list[str], seed: int) -> PreTrainedModel:
        """From a checkpoint, or (source None) from the configuration of `like` with random weights."""
        ...

    def encode(self, tokenizer: Tokenizer, family: str, examples: Sequence[Example], classes: list[str], length: int) -> list[dict[str, Any]]: ...

    def score(self, model: PreTrainedModel, items: list[dict[str, Any]], collator: Collator, batch: int, compiled: bool = False) -> dict[str, float]: ...


def steps_for(labels: int) -> int:
    """Optimizer steps for a number of labels, the same for both inits: 16 + 8 * sqrt(labels)."""
    return 16 + round(8 * math.sqrt(labels))


def nested(examples: Sequence[Example], seed: int) -> list[int]:
    """An order whose every prefix is stratified: the first 20 stand within the first 100.

    Each class is shuffled on its own; classes are then interleaved in proportion to their size.
    """
    by_class: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        by_class.setdefault(example.label, []).append(i)
    keyed = []
    for number, (_, members) in enumerate(sorted(by_class.items())):
        order = generator(mix(seed, 0x5EED), number).permutation(len(members))
        keyed += [((rank + 0.5) / len(members), number, members[at]) for rank, at in enumerate(order)]
    return [i for _, _, i in sorted(keyed)]


def split_test(examples: list[Example], test: float) -> tuple[list[Example], list[Example]]:
    """(train, test): the test documents have the smallest content hashes: a fraction of them, or a number.

    The same rule as `data.held_out` in pretraining, so a fraction given in both keeps the test text out of both.
    """
    hashes = np.array([content_hash(e.text) for e in examples], np.uint64)
    if isinstance(test, float):
        chosen = hashes < np.uint64(below(test))
    else:
        if not 0 < test < len(examples):
            raise UserError(f"data.test: {test} of {len(examples)} examples; leave some to train on")
        chosen = hashes <= np.sort(hashes)[test - 1]
    return [e for e, c in zip(examples, chosen, strict=True) if not c], [e for e, c in zip(examples, chosen, strict=True) if c]


class Few(torch.utils.data.Dataset):
    """A few encoded examples as a stream: item i of the run, shuffled anew each epoch."""

    def __init__(self, items: list[dict[str, Any]], seed: int, length: int):
        self.items, self.seed, self.length = items, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        epoch, k = divmod(i, len(self.items))
        return self.items[permuted(k, len(self.items), self.seed, epoch)]


@dataclass
class Collator:
    """Pads `input_ids` to the longest of a batch, rounded up to a multiple: int64 tensors, `labels` last.

    Attributes:
        pad: the padding id.
        multiple: of the width; a coarse one keeps the number of shapes small, which a compiled model pays for.
    """

    pad: int
    multiple: int = 8

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = -(-max(len(item["input_ids"]) for item in items) // self.multiple) * self.multiple
        ids = torch.full((len(items), width), self.pad)
        mask = torch.zeros(len(items), width, dtype=torch.int64)
        for b, item in enumerate(items):
            ids[b, : len(item["input_ids"])] = torch.as_tensor(np.asarray(item["input_ids"], np.int64))
            mask[b, : len(item["input_ids"])] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([item["label"] for item in items])}


def by_length(items: list[dict[str, Any]], batch: int, score: Callable[[list[dict[str, Any]]], Sequence[Any]]) -> list[Any]:
    """Apply `score` to batches of similar length, longest first; results in the order of the items."""
    order = sorted(range(len(items)), key=lambda i: -len(items[i]["input_ids"]))
    results: list[Any] = [None] * len(items)
    for begin in range(0, len(order), batch):
        members = order[begin : begin + batch]
        for i, value in zip(members, score([items[i] for i in members]), strict=True):
            results[i] = value
    return results


@dataclass(frozen=True)
class Setting:
    """What every run of one label curve shares.

    Attributes:
        source: the pretrained checkpoint.
        family: of the backbone.
        length: tokens of a text that the model reads.
        values: the resolved trainer section, without the length of a run.
        args: TrainingArguments of it.
        classes: class names in the order of their numbers.
    """

    source: str
    family: str
    architecture: str
    tokenizer: Tokenizer
    length: int
    values: dict[str, Any]
    args: TrainingArguments
    classes: list[str]
    collator: Collator


def curve(task: Task, data: Any, source: str, values: dict[str, Any], quiet: bool = False) -> dict[str, Any]:
    """The label curve of one checkpoint: every count, seed and init.

    Args:
        task: e.g. Sentiment.
        data: `train`, `test`, `max_length` of the recipe.
        source: the pretrained checkpoint.
        values: a resolved trainer section; where it has neither max_steps nor num_train_epochs, the number of steps
            is `steps_for` the number of labels.

    Returns:
        {"task", "metric", "results": [{"labels", "init", "seed", "score", ...}], "summary": [...], ...}.
    """
    train, test = _read(task, data)
    setting = _setting(data, source, values, sorted({e.label for e in train}))
    _check(task, train, test, setting.classes)
    test_items = task.encode(setting.tokenizer, setting.family, test, setting.classes, setting.length)
    begun, runs = time.time(), [(seed, labels, init) for seed in range(task.seeds) for labels in task.labels for init in ("scratch", "pretrained")]
    results: list[dict[str, Any]] = []
    few: list[dict[str, Any]] = []
    for seed, labels, init in runs:
        if labels == task.labels[0] and init == "scratch":
            chosen = nested(train, seed)[: max(task.labels)]
            few = task.encode(setting.tokenizer, setting.family, [train[i] for i in chosen], setting.classes, setting.length)
        model = task.model(source if init == "pretrained" else None, source, setting.classes, seed)
        steps, scores = _one(task, model, few[:labels], test_items, setting, seed)
        results.append({"labels": labels, "init": init, "seed": seed, "steps": steps, "score": scores[task.metric], **scores})
        if (seed, labels, init) == (0, max(task.labels), "pretrained") and setting.args.process_index == 0:
            model.save_pretrained(Path(setting.args.output_dir))
            setting.tokenizer.save(setting.args.output_dir)
        if not quiet:
            left = (time.time() - begun) / len(results) * (len(runs) - len(results))
            log.info("%5d labels  seed %d  %-10s  %s %.4f  (%d of %d, %d s left)", labels, seed, init, task.metric, scores[task.metric], len(results), len(runs), left)
    return {
        "task": task.name,
        "metric": task.metric,
        "backbone": source,
        "family": setting.family,
        "architecture": setting.architecture,
        "classes": setting.classes,
        "test_examples": len(test),
        "majority": max(sum(e.label == c for e in test) for c in setting.classes) / len(test),
        "max_length": setting.length,
        "learning_rate": setting.args.learning_rate,
        "seconds": round(time.time() - begun, 1),
        "results": results,
        "summary": summary(results),
    }


def _read(task: Task, data: Any) -> tuple[list[Example], list[Example]]:
    """(train, test), without a text that is in both."""
    examples = task.read(corpus.resolve(data.train, "data.train"))
    if isinstance(data.test, int | float):
        return split_test(examples, data.test)
    test = task.read(corpus.resolve(data.test, "data.test"))
    known = {content_hash(e.text) for e in test}
    return [e for e in examples if content_hash(e.text) not in known], test


def _setting(data: Any, source: str, values: dict[str, Any], classes: list[str]) -> Setting:
    backbone = models.read_config(source, "model.from")
    tokenizer, args, limit = tokenization.load(source), arguments.build(values), models.max_length(backbone)
    if data.max_length and limit and data.max_length > limit:
        raise UserError(f"data.max_length: {data.max_length} tokens, but the backbone has {limit} positions")
    pad = backbone.pad_token_id if backbone.pad_token_id is not None else tokenizer.vocab().pad
    return Setting(
        source, models.family_of(backbone), backbone.model_type, tokenizer, data.max_length or limit or 256,
        values, args, classes, Collator(pad, 64 if args.torch_compile else 8),
    )  # fmt: skip


def _check(task: Task, train: list[Example], test: list[Example], classes: list[str]) -> None:
    if len(classes) < 2:
        raise UserError(f"data.train: only one class ({classes[0] if classes else 'none'}); a classifier needs two")
    if not test:
        raise UserError("data.test: no test example")
    if max(task.labels) > len(train):
        raise UserError(f"task.labels: {max(task.labels)} labels asked for, {len(train)} examples to train on")
    if min(task.labels) < len(classes):
        raise UserError(f"task.labels: {min(task.labels)} labels cannot hold one example of each of {len(classes)} classes")
    for example in test:
        if example.label not in classes:
            raise UserError(f"{example.where}: the class '{example.label}' is not in the training data ({', '.join(classes)})")


def _one(task: Task, model: PreTrainedModel, few: list[dict[str, Any]], test: list[dict[str, Any]], setting: Setting, seed: int) -> tuple[int, dict[str, float]]:
    """Fine-tune one model on the few examples and score it on the test set: (optimizer steps, scores)."""
    values = setting.values if {"max_steps", "num_train_epochs"} & set(setting.values) else setting.values | {"max_steps": steps_for(len(few))}
    values = arguments.with_steps(values, len(few))
    args = copy.copy(setting.args)
    for name in ("max_steps", "logging_steps", "save_steps", "warmup_steps"):
        setattr(args, name, values[name])
    args.seed = seed
    items = args.max_steps * arguments.global_batch(values)
    trainer = ExactTrainer(model, args, Few(few, mix(seed, 1) >> 1, items), setting.collator, values["optimizer"], quiet=True)
    trainer.run()
    with trainer.compute_loss_context_manager():
        return args.max_steps, task.score(model, test, setting.collator, args.per_device_eval_batch_size, compiled=args.torch_compile)


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each number of labels: mean and standard deviation of both inits, and the paired gain with its error.

    The gain is paired by seed (same subset); `interval` is its 95% t-interval, `error` its standard error;
    one seed has neither.
    """
    rows = []
    for labels in sorted({r["labels"] for r in results}):
        score = {init: {r["seed"]: r["score"] for r in results if r["labels"] == labels and r["init"] == init} for init in ("scratch", "pretrained")}
        gains = np.array([score["pretrained"][s] - score["scratch"][s] for s in score["pretrained"]])
        mean = float(gains.mean())
        gain: dict[str, Any] = {"mean": mean, "error": None, "interval": None}
        if len(gains) > 1:
            error = float(gains.std(ddof=1) / math.sqrt(len(gains)))
            half = t_quantile(len(gains) - 1) * error
            gain |= {"error": error, "interval": [mean - half, mean + half]}
        spread = {i: {"mean": float(np.mean([*v.values()])), "std": float(np.std([*v.values()], ddof=1)) if len(v) > 1 else None} for i, v in score.items()}
        rows.append({"labels": labels, **spread, "gain": gain})
    return rows


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t (table; beyond 30 degrees of freedom the normal's 1.96)."""
    table = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
    table += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
    return table[freedom - 1] if 1 <= freedom <= len(table) else 1.96 if freedom > 0 else float("nan")
