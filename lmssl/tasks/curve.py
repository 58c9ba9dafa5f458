"""The label curve: for each number of labels and each seed, the same subset, steps and protocol for both inits.

Once from the pretrained checkpoint, and once from the same configuration with random weights. Learning rates, where a
grid is given, are chosen for each init and number of labels on seed 0, by the loss on a part of those few labels;
the test set is looked at once a run, when it ends. Finished runs are kept in a ledger, an unfinished one in its
checkpoints, so that a curve goes on where it was interrupted.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from lmssl import arguments, checkpoints, ranks
from lmssl.data import corpus
from lmssl.data.stream import mix
from lmssl.errors import Diverged, Stopped, UserError, fitting, written
from lmssl.models import parameters
from lmssl.objectives.base import IGNORE
from lmssl.objectives.cross_entropy import token_loss
from lmssl.statistics import FEW_TESTS, INITS, equivalence, summary, worth
from lmssl.tasks import adapters, baseline
from lmssl.tasks.base import Backbone, Few, Item, Task, batched, has_classifier, nested, same, split_test, split_validation, steps_for
from lmssl.tasks.ledger import Ledger, identity_of
from lmssl.trainer import ExactTrainer
from lmssl.watch import of_the_data

log = logging.getLogger("lmssl")

FEWER = "--resume with a smaller trainer.per_device_eval_batch_size"
"""The way out where scoring does not fit into memory."""


LARGE, LARGE_RATE = 50_000_000, 2e-4
"""Parameters from which on a learning rate of this size or more is warned of."""


def labelled(task: Task, train: str | list[str], test: float | str | list[str]) -> tuple[list[Any], list[Any]]:
    """(train, test) examples; what is in both is left in the test set alone.

    Args:
        test: files; or a fraction, or a number, of the examples of `train`, by smallest content hash.
    """
    examples = task.read(corpus.resolve(train, "data.train"))
    if isinstance(test, int | float):
        examples, held = split_test(examples, test)
    else:
        held = task.read(corpus.resolve(test, "data.test"))
    known = {same(e.group()) for e in held}
    left = [e for e in examples if same(e.group()) not in known]
    if len(left) < len(examples):
        log.info("%d examples to train on are in the test set, too; they are not trained on", len(examples) - len(left))
    if examples and not left:
        raise UserError("data.test: holds every example of data.train; nothing is left to train on (a share of data.train: data.test=0.1)")
    return left, held


def counted(examples: Sequence[Any]) -> str:
    """How many examples there are, and of which classes."""
    counts = Counter(e.label for e in examples if e.label)
    shown = [f"{name}: {counts[name]:,}" for name in in_order(counts)]
    return f"{len(examples):,} examples" + (f" ({', '.join(shown[:20])}{', ...' * (len(shown) > 20)})" if shown else "")


def in_order(classes: Iterable[str]) -> list[str]:
    """Class names as the rows of a new head stand: whole numbers by size, so that of the classes 0, 1, 2, ... output 2 is class 2; others as text.

    >>> in_order(["10", "9", "1"]), in_order(["b", "10", "9"]), in_order(["1", "01"])
    (['1', '9', '10'], ['10', '9', 'b'], ['01', '1'])
    """
    names = set(classes)
    return sorted(names, key=lambda name: (int(name), name)) if all(name.removeprefix("-").isdecimal() for name in names) else sorted(names)


def check(task: Task, train: Sequence[Any], test: Sequence[Any]) -> list[str]:
    """The class names (none where the task has none); refuses counts and classes that cannot work."""
    if not train:
        raise UserError("data.train: no labelled example")
    classes = in_order(e.label for e in train) if task.classes else []
    if task.classes and len(classes) < 2:
        raise UserError(f"data.train: only one class ({classes[0] if classes else 'none'}); a classifier needs two")
    if not test:
        raise UserError("data.test: no test example; a larger share or number of data.train (data.test=0.1), or files")
    for name in ("labels", "scratch_labels"):
        counts = getattr(task, name)
        if counts and max(counts) > len(train):
            raise UserError(f"task.{name}: {max(counts)} labels asked for, {len(train)} examples to train on")
        if counts and min(counts) < max(1, len(classes)):
            raise UserError(f"task.{name}: {min(counts)} labels cannot hold one example of each of {len(classes)} classes")
    if task.learning_rates and min([*task.labels, *task.scratch_labels]) < 2:
        raise UserError("task.learning_rates: a choice needs at least 2 labels, one to train on and one to validate")
    least = min([*task.labels, *task.scratch_labels])
    for seed in range(task.seeds) if task.classes else ():
        few = {train[i].label for i in nested(train, seed)[:least]}
        if seed == 0 and len(few) < len(classes):
            log.warning("of %d classes %d are too rare for the first %d labels: %s ...", len(classes), len(classes) - len(few), least, ", ".join(sorted(set(classes) - few)[:5]))
        if len(few) < 2:
            raise UserError(f"task.labels: the first {least} examples of seed {seed} are all '{few.pop()}', because the other classes are too rare; ask for more labels")
    for count in sorted({*task.labels, *task.scratch_labels}) if task.classes and task.learning_rates else ():
        labels = [train[i].label for i in nested(train, 0)[:count]]
        places, held = split_validation(labels, task.validation)
        if unknown := {labels[i] for i in held} - {labels[i] for i in places}:
            log.warning("task.learning_rates: with %d labels learning rates are validated on %d classes that are not trained on; more labels judge better", count, len(unknown))
    if task.classes and (untested := set(classes) - {e.label for e in test}):
        log.warning("of %d classes %d have no test example, and no score tells of them: %s", len(classes), len(untested), ", ".join(in_order(untested)[:5]))
    if len(test) < FEW_TESTS:
        log.warning("data.test: %d examples are few to judge by%s", len(test), worth(len(test), task.metric))
    for example in test:
        if task.classes and example.label not in classes:
            raise UserError(f"{example.where}: the class '{example.label}' is not in the training data ({', '.join(classes)}); leave it out, or give data.test as files")
    return classes


def in_order_of(config: Any, classes: list[str]) -> list[str]:
    """Class names as the rows of a checkpoint's own trained head stand, where it has one for just these."""
    own = getattr(config, "id2label", None) or {}
    if not classes or not has_classifier(config) or len(own) != len(classes):
        return classes
    names = [own[i] for i in sorted(own)]
    if sorted(names) == sorted(classes):
        return names
    log.warning("model.from: the head of the checkpoint was trained for %s; its rows are taken for %s, in this order", ", ".join(names[:5]), ", ".join(classes[:5]))
    return classes


@dataclass(frozen=True, slots=True)
class Shot:
    """One labelled example, encoded.

    Attributes:
        where: file:line.
        label: class name; "" where a task has none.
        items: what is trained on (a long context has several).
    """

    where: str
    label: str
    items: list[Item]


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


class Curve:
    """Everything that the runs of one label curve share.

    Args:
        task: e.g. Sentiment.
        backbone: the pretrained checkpoint.
        train, test: labelled examples.
        values: a resolved trainer section; where it has neither max_steps nor num_train_epochs, the number of steps
            is `steps_for` the number of labels.
        quiet: no progress.

    Attributes:
        ledger: what is finished; `ledger.load()` before `run()` goes on where an earlier process ended.
    """

    def __init__(self, task: Task, backbone: Backbone, train: Sequence[Any], test: Sequence[Any], values: dict[str, Any], quiet: bool = False):
        self.task, self.backbone, self.train, self.test, self.quiet = task, backbone, train, test, quiet
        self.values, self.args = values, arguments.build(values)
        self.collate = task.collator(backbone, 64 if self.args.torch_compile else 8)
        self.out = Path(self.args.output_dir)
        self.first = self.args.process_index == 0
        self.ledger = Ledger(self.out, identity_of(task, backbone, train, test, values, torch.get_num_threads()), self.first)
        self.rates: dict[tuple[str, int], float] = {}
        self._subset: tuple[int, list[Shot]] = (-1, [])
        self.saved = False
        """Whether this process has saved a model."""
        if self.args.torch_compile:
            # Every width is compiled for itself; a kernel for all widths is slower than the few that occur.
            torch._dynamo.config.automatic_dynamic_shapes = False
            torch._dynamo.config.recompile_limit = 64

    def run(self) -> dict[str, Any]:
        """Every run; {"task", "metric", "results": [{"labels", "init", "seed", "score", ...}], "summary", ...}."""
        todo, ledger = self.todo(), self.ledger
        ranks.check_same_folder(self.out, (ledger.results, ledger.tuning, [path.name for path in sorted(self.out.glob("checkpoints/*/*"))]))
        notes = self.task.notes(self.backbone, self.test)
        if notes and not self.quiet and self.first:
            log.info("of the test examples: %s", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in notes.items()))
        missing = [run for run in todo if not ledger.result(**vars(run))]
        if len(missing) < len(todo) and not self.quiet:
            log.info("%d of %d runs are finished", len(todo) - len(missing), len(todo))
        if missing:
            size = parameters(self.try_out())  # before the twin has trained
            if size >= LARGE and self.args.learning_rate >= LARGE_RATE and not self.task.learning_rates and self.first:
                log.warning("a learning rate of %g is large for %d million parameters; 'task.learning_rates=[1e-5,3e-5,1e-4]' tries others", self.args.learning_rate, size // 10**6)
        self._started = time.time()
        self.begun = self._started - ledger.seconds
        for number, run in enumerate(missing):
            self._say(self._result(run), len(todo), number + 1, len(missing))
        return self._metrics([found for run in todo if (found := ledger.result(**vars(run)))], notes)

    def _result(self, run: Run) -> dict[str, Any]:
        """The result of a run, trained, scored and in the ledger."""
        rate, ledger = self._rate(run), self.ledger
        model, trainer = self._trained(run, self._few(run.seed), rate)
        scores = self._scored(model, trainer, run)
        result = {**vars(run), "steps": trainer.args.max_steps, "learning_rate": rate, "score": scores[self.task.metric], **scores}
        if (run.seed, run.labels, run.init) == (0, max(self.task.labels), "pretrained"):
            self.saved = True
            if self.first:
                self._save(model)
            for other in ledger.results:
                other.pop("saved", None)
            result["saved"] = True
        ledger.results.append(result)
        ledger.save(self._seconds())
        self._forget(run, rate)
        return result

    def try_out(self) -> PreTrainedModel:
        """Refuse weights that cannot be loaded, a method that finds nothing to train, examples that cannot be encoded: nothing is trained or written."""
        model = adapters.apply(self.task.model(self.backbone, True, 0), self.task.method, self.task.lora_rank)
        self._few(0)
        return model

    def is_told_by(self, metrics: dict[str, Any] | None) -> bool:
        """Whether metrics.json holds the result of every run and of no other."""
        told = [(r["labels"], r["init"], r["seed"]) for r in (metrics or {}).get("results", [])]
        return sorted(told) == sorted((run.labels, run.init, run.seed) for run in self.todo())

    def _metrics(self, results: list[dict[str, Any]], notes: dict[str, int]) -> dict[str, Any]:
        """What `run` returns."""
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
            "majority": self.task.majority(self.test),
            "max_length": self.backbone.length,
            "learning_rate": self.args.learning_rate,
            "tuning": self.ledger.tuning,
            **({"accepted": self.ledger.accepted} if self.ledger.accepted else {}),
            "results": results,
            "summary": summary(results),
            "equivalence": equivalence(results),
            "notes": notes,
            "saved_labels": next((r["labels"] for r in self.ledger.results if r.get("saved")), max(self.task.labels)),
        }
        if self.task.classes and baseline.available():
            try:
                metrics["baselines"] = {"tf-idf": self._baseline()}
            except ValueError as error:  # scikit-learn's, for example of texts without a word of two letters
                log.warning("no TF-IDF baseline: %s", str(error).strip().splitlines()[-1])
        return metrics | {"seconds": self._seconds()}

    def todo(self) -> list[Run]:
        """Every run of the curve; the twins stand side by side."""
        task = self.task
        counts = sorted({*task.labels, *task.scratch_labels})
        return [Run(n, init, seed) for seed in range(task.seeds) for n in counts for init in INITS if init == "scratch" or n in task.labels]

    def steps(self, run: Run) -> int:
        """Optimizer steps of a run: the recipe's, or those that the number of labels asks for."""
        return int(self._length(run)["max_steps"])

    def _length(self, run: Run) -> dict[str, Any]:
        values = self.values if {"max_steps", "num_train_epochs"} & set(self.values) else self.values | {"max_steps": steps_for(run.labels)}
        items = sum(len(shot.items) for shot in self._few(run.seed)[: run.labels]) if "num_train_epochs" in values else run.labels
        return arguments.with_steps(values, items)

    def sample(self, callback: TrainerCallback, init: str) -> tuple[PreTrainedModel, ExactTrainer]:
        """The largest run of an init, which `callback` may watch and end; its model, and what trained it."""
        return self._trained(Run(max(self.task.labels), init, 0), self._few(0), self.args.learning_rate, "-sample", [callback])

    def _seconds(self) -> float:
        return round(time.time() - self.begun, 1)

    def _few(self, seed: int) -> list[Shot]:
        """A seed's examples in nested order, as many as are ever used."""
        if self._subset[0] != seed:
            most = max([*self.task.labels, *self.task.scratch_labels])
            chosen = [self.train[i] for i in nested(self.train, seed)[:most]]
            self._subset = (seed, [Shot(e.where, e.label, items) for e, items in zip(chosen, self.task.encode(self.backbone, chosen), strict=True)])
        return self._subset[1]

    def _rate(self, run: Run) -> float:
        """The learning rate of an init and a number of labels: the grid's best by validation loss on seed 0."""
        if not self.task.learning_rates:
            return self.args.learning_rate
        if (run.init, run.labels) not in self.rates:
            losses = ranks.as_the_first({rate: self._tried(run, rate) for rate in self.task.learning_rates})  # ranks may differ in the last bits
            if not math.isfinite(min(losses.values())):
                raise Diverged(f"task.learning_rates: with {run.labels} labels, {run.init}, none of {', '.join(f'{r:g}' for r in losses)} gave a finite loss")
            self.rates[run.init, run.labels] = min(losses, key=lambda rate: losses[rate])
            if not self.quiet and self.first:
                tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
                log.info("%5d labels  %-10s  learning rate %g (validation loss %s)", run.labels, run.init, self.rates[run.init, run.labels], tried)
        return self.rates[run.init, run.labels]

    def _tried(self, run: Run, rate: float) -> float:
        """The validation loss of one learning rate; infinite where training with it does."""
        tried, one = {"labels": run.labels, "init": run.init, "learning_rate": rate}, Run(run.labels, run.init, 0)
        loss = self.ledger.loss(**tried)
        if loss is None:
            few = self._few(0)[: run.labels]
            train, held = ([few[i] for i in places] for places in split_validation([shot.label for shot in few], self.task.validation))
            try:
                model, trainer = self._trained(one, train, rate, "-tuning")
                with fitting("the validation set", FEWER, trainer.stopped):
                    loss = self._loss(model, trainer, [item for shot in held for item in shot.items])
                loss = loss if math.isfinite(loss) else math.inf
            except Diverged as error:
                log.warning("%d labels, %s, learning rate %g: %s", run.labels, run.init, rate, error)
                loss = math.inf
            self.ledger.tuning.append({**tried, "validation_loss": loss if math.isfinite(loss) else None})
            self.ledger.save(self._seconds())
            self._forget(one, rate, "-tuning")
        return loss

    def _trained(self, run: Run, few: list[Shot], rate: float, kind: str = "", callbacks: Sequence[TrainerCallback] = ()) -> tuple[PreTrainedModel, ExactTrainer]:
        """A model fine-tuned on the items of the first few examples, and what trained it; from its checkpoint, where one lies."""
        pretrained = run.init == "pretrained"
        model = self.task.model(self.backbone, pretrained, run.seed)
        method = self.task.method if pretrained else "full"
        model = adapters.apply(model, method, self.task.lora_rank)
        values = self._length(run)
        args: TrainingArguments = copy.copy(self.args)
        for name in ("max_steps", "logging_steps", "save_steps", "warmup_steps"):
            setattr(args, name, values[name])
        args.seed, args.learning_rate = run.seed, rate
        folder = self._folder(run, rate, kind)
        args.output_dir = str(folder)
        if args.max_steps <= args.save_steps:
            args.save_strategy = "no"
        pairs = [(item, shot.where) for shot in few[: run.labels] for item in shot.items]
        stream = Few([i for i, _ in pairs], [w for _, w in pairs], mix(run.seed, 1) >> 1, args.max_steps * arguments.global_batch(values))
        trainer = ExactTrainer(model, args, stream, self.collate, identity={"steps": args.max_steps, "curve": self.ledger.digest}, quiet=True, **arguments.own(values))
        for callback in callbacks:
            trainer.add_callback(callback)
        point, damaged = None, False
        try:
            point = trainer.resume_point() if ranks.as_the_first(checkpoints.all_of(folder)) else None
        except UserError as error:
            log.warning("%s; this run begins anew", str(error).partition("; --overwrite")[0])
            damaged = True
        trainer.accelerator.wait_for_everyone()  # no rank looks any more
        if damaged and self.first:
            shutil.rmtree(folder)
        trainer.accelerator.wait_for_everyone()  # nor begins where those still lie
        trainer.run(point)
        return adapters.merge(model, method), trainer

    def _folder(self, run: Run, rate: float, kind: str = "") -> Path:
        """Where the checkpoints of a run lie until its result is in the ledger."""
        return self.out / "checkpoints" / f"{run.labels}-{run.init}-{run.seed}-{rate:g}{kind}"

    def forget(self) -> None:
        """Remove what is left of the checkpoints of all runs; the folder may hold somebody else's."""
        folder = self.out / "checkpoints"
        for path in folder.glob("*-*-*-*"):
            if re.fullmatch(rf"\d+-({'|'.join(INITS)})-\d+-.*", path.name):
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # not there, or not empty
            folder.rmdir()

    def _forget(self, run: Run, rate: float, kind: str = "") -> None:
        if self.first:
            shutil.rmtree(self._folder(run, rate, kind), ignore_errors=True)

    @torch.no_grad()
    def _loss(self, model: PreTrainedModel, trainer: ExactTrainer, items: list[Item]) -> float:
        """Mean loss a label over items."""
        model.eval()
        total = count = 0.0
        for members in batched(items, self.args.per_device_eval_batch_size):
            tensors = {k: v.to(self.args.device) for k, v in self.collate(list(members)).items()}
            labels = tensors.pop("labels")
            with trainer.compute_loss_context_manager():
                total += token_loss(model(**tensors), labels, 1.0).item()
            count += (labels != IGNORE).sum().item()
        return total / max(count, 1)

    def _scored(self, model: PreTrainedModel, trainer: ExactTrainer, run: Run) -> dict[str, Any]:
        try:
            with fitting("the test set", FEWER, trainer.stopped), trainer.compute_loss_context_manager():
                scores, outputs = self.task.evaluate(model, self.backbone, self.test, self.args.per_device_eval_batch_size, compiled=self.args.torch_compile)
        except (UserError, Stopped):
            raise
        except Exception as error:
            if type(self.task).__module__.startswith("lmssl."):
                raise
            raise UserError(f"task.name: evaluate of '{self.task.name}': {of_the_data(error)}") from error  # anybody's own code
        score = scores.get(self.task.metric)
        if not isinstance(score, int | float) or not 0 <= score <= 1 or len(outputs) != len(self.test):  # of a task of one's own
            raise UserError(
                f"task: evaluate of '{self.task.name}' gave {self.task.metric}={score} and {len(outputs)} outputs for {len(self.test)} examples; a score lies in [0, 1]"
            )
        if self.first:
            self.task.write_outputs(self.out / "predictions", f"{run.labels}-{run.init}-{run.seed}", self.test, outputs)
        return scores

    def _save(self, model: PreTrainedModel) -> None:
        with written(f"the model in {self.out}"):
            model.save_pretrained(self.out)
            self.task.finish(self.backbone).save(self.out)
            for path in self.out.glob("*.safetensors"):
                checkpoints.sync(path)

    def _baseline(self) -> list[dict[str, Any]]:
        """TF-IDF with logistic regression on every subset."""
        rows = []
        for seed in range(self.task.seeds):
            examples = [self.train[i] for i in nested(self.train, seed)]
            rows += [{"labels": n, "seed": seed, **baseline.tfidf(examples[:n], self.test, self.task)} for n in self.task.labels]
        return rows

    def _say(self, result: dict[str, Any], total: int, done: int, missing: int) -> None:
        if self.quiet or not self.first:
            return
        left = (time.time() - self._started) / done * (missing - done)
        log.info(
            "%5d labels  seed %d  %-10s  %s %.4f  (%d of %d, %d s left)",
            result["labels"], result["seed"], result["init"], self.task.metric, result["score"], total - missing + done, total, left,
        )  # fmt: skip
