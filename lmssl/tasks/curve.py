"""The label curve: for each number of labels and each seed, the same subset, steps and protocol for both inits.

Once from the pretrained checkpoint, and once from the same configuration with random weights. Learning rates, where a
grid is given, are chosen for each init and number of labels on seed 0, by the loss on a part of those few labels;
the test set is looked at once a run, when it ends.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from lmssl import arguments
from lmssl.data import corpus
from lmssl.data.stream import mix
from lmssl.data.tokens import content_hash
from lmssl.errors import UserError
from lmssl.objectives.base import IGNORE, token_loss
from lmssl.statistics import equivalence, summary
from lmssl.tasks import adapters, baseline
from lmssl.tasks.base import Backbone, Few, Item, Task, batched, nested, split_test, split_validation, steps_for
from lmssl.trainer import ExactTrainer

log = logging.getLogger("lmssl")


def labelled(task: Task, train: str | list[str], test: float | str | list[str]) -> tuple[list[Any], list[Any]]:
    """(train, test) examples; a text that is in both is left in the test set alone.

    Args:
        test: files; or a fraction, or a number, of the examples of `train`, by smallest content hash.
    """
    examples = task.read(corpus.resolve(train, "data.train"))
    if isinstance(test, int | float):
        return split_test(examples, test)
    held = task.read(corpus.resolve(test, "data.test"))
    known = {content_hash(e.text) for e in held}
    return [e for e in examples if content_hash(e.text) not in known], held


def check(task: Task, train: Sequence[Any], test: Sequence[Any]) -> list[str]:
    """The class names (none where the task has none); refuses counts and classes that cannot work."""
    classes = sorted({e.label for e in train}) if task.classes else []
    if task.classes and len(classes) < 2:
        raise UserError(f"data.train: only one class ({classes[0] if classes else 'none'}); a classifier needs two")
    if not test:
        raise UserError("data.test: no test example")
    for name in ("labels", "scratch_labels"):
        counts = getattr(task, name)
        if counts and max(counts) > len(train):
            raise UserError(f"task.{name}: {max(counts)} labels asked for, {len(train)} examples to train on")
        if counts and min(counts) < max(1, len(classes)):
            raise UserError(f"task.{name}: {min(counts)} labels cannot hold one example of each of {len(classes)} classes")
    if task.learning_rates and min([*task.labels, *task.scratch_labels]) < 2:
        raise UserError("task.learning_rates: a choice needs at least 2 labels, one to train on and one to validate")
    for example in test:
        if task.classes and example.label not in classes:
            raise UserError(f"{example.where}: the class '{example.label}' is not in the training data ({', '.join(classes)})")
    return classes


@dataclass
class Run:
    """One fine-tuning run.

    Attributes:
        labels: number of labelled examples.
        init: scratch or pretrained.
        seed: of subset, head, order and dropout.
    """

    labels: int
    init: str
    seed: int


def runs_of(task: Task) -> list[Run]:
    """Every run of the curve; the twins stand side by side."""
    counts = sorted({*task.labels, *task.scratch_labels})
    return [Run(n, init, seed) for seed in range(task.seeds) for n in counts for init in ("scratch", "pretrained") if init == "scratch" or n in task.labels]


class Curve:
    """Everything that the runs of one label curve share.

    Args:
        task: e.g. Sentiment.
        backbone: the pretrained checkpoint.
        train, test: labelled examples.
        values: a resolved trainer section; where it has neither max_steps nor num_train_epochs, the number of steps
            is `steps_for` the number of labels.
        quiet: no progress.
    """

    def __init__(self, task: Task, backbone: Backbone, train: Sequence[Any], test: Sequence[Any], values: dict[str, Any], quiet: bool = False):
        self.task, self.backbone, self.train, self.test, self.quiet = task, backbone, train, test, quiet
        self.values, self.args = values, arguments.build(values)
        self.collate = task.collator(backbone, 64 if self.args.torch_compile else 8)
        self.out = Path(self.args.output_dir)
        self.rates: dict[tuple[str, int], float] = {}
        self.tuning: list[dict[str, Any]] = []
        self._subset: tuple[int, list[list[Item]]] = (-1, [])
        if self.args.torch_compile:
            # Every width is compiled for itself; a kernel for all widths is slower than the few that occur.
            torch._dynamo.config.automatic_dynamic_shapes = False
            torch._dynamo.config.recompile_limit = 64

    def run(self) -> dict[str, Any]:
        """Every run; {"task", "metric", "results": [{"labels", "init", "seed", "score", ...}], "summary", ...}."""
        begun, todo, results = time.time(), runs_of(self.task), list[dict[str, Any]]()
        notes = self.task.notes(self.backbone, self.test)
        if notes and not self.quiet and self.args.process_index == 0:
            log.info("of the test examples: %s", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in notes.items()))
        for run in todo:
            items = self._few(run.seed)
            rate = self._rate(run)
            model, steps = self._trained(run, items[: run.labels], rate)
            scores = self._scored(model, run)
            results.append({**vars(run), "steps": steps, "learning_rate": rate, "score": scores[self.task.metric], **scores})
            if (run.seed, run.labels, run.init) == (0, max(self.task.labels), "pretrained") and self.args.process_index == 0:
                self._save(model)
            self._say(run, results, len(todo), begun)
        metrics = {
            "task": self.task.name,
            "metric": self.task.metric,
            "method": self.task.method,
            "written": self.task.writes(self.backbone),
            "backbone": self.backbone.source,
            "family": self.backbone.family,
            "architecture": self.backbone.config.model_type,
            "classes": list(self.backbone.classes),
            "test_examples": len(self.test),
            "majority": max((sum(e.label == c for e in self.test) for c in self.backbone.classes), default=0) / len(self.test),
            "max_length": self.backbone.length,
            "learning_rate": self.args.learning_rate,
            "tuning": self.tuning,
            "results": results,
            "summary": summary(results),
            "equivalence": equivalence(results),
            "notes": notes,
        }
        if self.task.classes and baseline.available():
            metrics["baselines"] = {"tf-idf": self._baseline()}
        return metrics | {"seconds": round(time.time() - begun, 1)}

    def _few(self, seed: int) -> list[list[Item]]:
        """The items of a seed's examples in nested order, as many as are ever used."""
        if self._subset[0] != seed:
            most = max([*self.task.labels, *self.task.scratch_labels])
            self._subset = (seed, self.task.encode(self.backbone, [self.train[i] for i in nested(self.train, seed)[:most]]))
        return self._subset[1]

    def _rate(self, run: Run) -> float:
        """The learning rate of an init and a number of labels: the grid's best by validation loss on seed 0."""
        if not self.task.learning_rates:
            return self.args.learning_rate
        if (run.init, run.labels) not in self.rates:
            items = self._few(0)
            train, held = split_validation(items[: run.labels], self.task.validation)
            losses = {}
            for rate in self.task.learning_rates:
                model, _ = self._trained(Run(run.labels, run.init, 0), train, rate)
                losses[rate] = self._loss(model, [item for some in held for item in some])
                self.tuning.append({"labels": run.labels, "init": run.init, "learning_rate": rate, "validation_loss": losses[rate]})
            self.rates[run.init, run.labels] = min(losses, key=lambda rate: losses[rate])
            if not self.quiet:
                tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
                log.info("%5d labels  %-10s  learning rate %g (validation loss %s)", run.labels, run.init, self.rates[run.init, run.labels], tried)
        return self.rates[run.init, run.labels]

    def _trained(self, run: Run, few: list[list[Item]], rate: float) -> tuple[PreTrainedModel, int]:
        """A model fine-tuned on the items of a few examples, and its optimizer steps."""
        pretrained = run.init == "pretrained"
        model = self.task.model(self.backbone, pretrained, run.seed)
        method = self.task.method if pretrained else "full"
        model = adapters.apply(model, method, self.task.lora_rank)
        values = self.values if {"max_steps", "num_train_epochs"} & set(self.values) else self.values | {"max_steps": steps_for(run.labels)}
        values = arguments.with_steps(values, run.labels)
        args: TrainingArguments = copy.copy(self.args)
        for name in ("max_steps", "logging_steps", "save_steps", "warmup_steps"):
            setattr(args, name, values[name])
        args.seed, args.learning_rate = run.seed, rate
        items = [item for some in few for item in some]
        stream = Few(items, mix(run.seed, 1) >> 1, args.max_steps * arguments.global_batch(values))
        self.trainer = ExactTrainer(model, args, stream, self.collate, quiet=True, **arguments.own(values))
        self.trainer.run()
        return adapters.merge(model, method), args.max_steps

    @torch.no_grad()
    def _loss(self, model: PreTrainedModel, items: list[Item]) -> float:
        """Mean loss a label over items."""
        model.eval()
        total = count = 0.0
        for members in batched(items, self.args.per_device_eval_batch_size):
            tensors = {k: v.to(self.args.device) for k, v in self.collate(list(members)).items()}
            labels = tensors.pop("labels")
            with self.trainer.compute_loss_context_manager():
                total += token_loss(model(**tensors), labels, 1.0).item()
            count += (labels != IGNORE).sum().item()
        return total / max(count, 1)

    def _scored(self, model: PreTrainedModel, run: Run) -> dict[str, Any]:
        with self.trainer.compute_loss_context_manager():
            scores, outputs = self.task.evaluate(model, self.backbone, self.test, self.args.per_device_eval_batch_size, compiled=self.args.torch_compile)
        if self.args.process_index == 0:
            self.task.write_outputs(self.out / "predictions", f"{run.labels}-{run.init}-{run.seed}", self.test, outputs)
        return scores

    def _save(self, model: PreTrainedModel) -> None:
        model.save_pretrained(self.out)
        self.task.finish(self.backbone, model).save(self.out)

    def _baseline(self) -> list[dict[str, Any]]:
        """TF-IDF with logistic regression on every subset."""
        rows = []
        for seed in range(self.task.seeds):
            examples = [self.train[i] for i in nested(self.train, seed)]
            rows += [{"labels": n, "seed": seed, **baseline.tfidf(examples[:n], self.test)} for n in self.task.labels]
        return rows

    def _say(self, run: Run, results: list[dict[str, Any]], total: int, begun: float) -> None:
        if self.quiet or int(os.environ.get("RANK", 0)):
            return
        left = (time.time() - begun) / len(results) * (total - len(results))
        score = results[-1]["score"]
        log.info("%5d labels  seed %d  %-10s  %s %.4f  (%d of %d, %d s left)", run.labels, run.seed, run.init, self.task.metric, score, len(results), total, left)
