"""The one place where all parts meet: `pretrain` and `finetune` are the whole spine, top to bottom."""

from __future__ import annotations

import dataclasses
import logging
import typing
from pathlib import Path
from typing import Any

import numpy as np

from lmssl import arguments, config, folders, output, ranks
from lmssl.data.stream import Stream
from lmssl.data.tokens import TokenSet
from lmssl.errors import UserError, written
from lmssl.history import leak_check
from lmssl.objectives import fields_of, make
from lmssl.objectives.base import IGNORE, Objective
from lmssl.recipe import FinetuneRecipe, PretrainRecipe, prepared
from lmssl.tokenization import Tokenizer

if typing.TYPE_CHECKING:
    from lmssl.pretraining import PretrainTrainer
    from lmssl.tasks.curve import Curve

log = logging.getLogger("lmssl")

LOOK = 500
"""Labelled examples in which unknown tokens are counted."""
SHOWN = 3
"""Rows that a report shows."""


def pretrain(recipe: PretrainRecipe | str | Path, *, resume: bool = False, overwrite: bool = False, accept: tuple[str, ...] = (), quiet: bool = False) -> dict[str, Any]:
    """Pretrain as a recipe says; returns what metrics.json says.

    Args:
        recipe: a recipe, or its file.
        resume: continue from the newest whole checkpoint.
        overwrite: begin anew in a folder that holds a run.
        accept: differences from the checkpoint's run that resuming accepts ("seed", "batch", ...).

    Raises:
        UserError, Stopped, Interrupted: see lmssl.errors.
    """
    recipe = recipe if isinstance(recipe, PretrainRecipe) else PretrainRecipe.load(recipe)
    with folders.alone(recipe.trainer.get("output_dir")):
        return _pretrain(recipe, resume, overwrite, accept, quiet)


def _pretrain(recipe: PretrainRecipe, resume: bool, overwrite: bool, accept: tuple[str, ...], quiet: bool) -> dict[str, Any]:
    from lmssl import beginnings, models, probe

    objective, tokenizer = check(recipe, resume)
    values = arguments.resolve(recipe.trainer, arguments.pretrain_defaults(recipe.continued is not None))
    args = arguments.build(values)  # refuses before any text is read
    out, first = Path(args.output_dir), ranks.first_process()
    folders.check_kind(out, "objective", overwrite)
    folders.check_free(out, folders.leavings(out), recipe.continued, resume and folders.holds_run(out), overwrite or not first)
    before = (output.read_json(out / "metrics.json") or {}) if resume else {}
    if resume:
        values |= (chosen := probe.recorded(out, values))
        ranks.check_same_folder(out, (chosen, before.get("steps")))
    if _finished(out, before, values.get("max_steps")):
        return before
    folders.make(out)
    trainer, values = assemble(recipe, objective, tokenizer, values, quiet)
    if _finished(out, before, trainer.args.max_steps):  # of num_train_epochs
        return before
    ranks.check_same(trainer.identity | {"max_steps": trainer.args.max_steps})
    ranks.check_one_folder(out)
    if first and not resume:  # by now nothing more is to be refused that could have been
        folders.remove([*folders.leavings(out), *out.glob("damaged-checkpoint-*")])
    ranks.wait()  # for what is to be removed
    point = trainer.resume_point(accept) if resume else None
    if resume and point is None and before.get("steps"):
        way_out = f"model: {{from: {out}}} in place of the architecture continues it in another folder, --overwrite begins anew"
        raise UserError(f"--resume: {out} is finished at step {before['steps']}, and its checkpoints are gone; {way_out}")
    if point is None and models.init_of(recipe.model) == "text":
        beginnings.begin_from_text(trainer.model, trainer.train_dataset.tokens, trainer.args.seed)
    data = dataclasses.asdict(recipe.data) | {"tokenizer": recipe.data.tokenizer or recipe.continued}
    resolved = {"data": data, "model": recipe.model, "objective": fields_of(objective), "trainer": values}
    if trainer.is_world_process_zero():
        _announce(out, trainer, resolved, quiet)
    trainer.run(point)
    metrics = trainer.metrics()
    if trainer.is_world_process_zero():
        metrics |= {"data": trainer.train_dataset.tokens.identity, "environment": output.environment(trainer.args.device), "rows_shown": examples(trainer.train_dataset, tokenizer)}
        _finish(out, trainer, metrics, resolved)
    trainer.accelerator.wait_for_everyone()
    return metrics


def finetune(recipe: FinetuneRecipe | str | Path, *, resume: bool = False, overwrite: bool = False, accept: tuple[str, ...] = (), quiet: bool = False) -> dict[str, Any]:
    """Fine-tune on few labels, pretrained and from scratch, several seeds; returns what metrics.json says.

    Args:
        recipe: a recipe, or its file.
        resume: keep the finished runs of the folder, and go on with the others: those that an interruption left, and
            those that more seeds or numbers of labels add.
        overwrite: begin anew in a folder that holds runs.
        accept: differences from the finished runs that resuming accepts ("trainer.learning_rate", "data.train", ...).

    Raises:
        UserError, Stopped, Interrupted: see lmssl.errors.
    """
    recipe = recipe if isinstance(recipe, FinetuneRecipe) else FinetuneRecipe.load(recipe)
    with folders.alone(recipe.trainer.get("output_dir")):
        return _finetune(recipe, resume, overwrite, accept, quiet)


def _finetune(recipe: FinetuneRecipe, resume: bool, overwrite: bool, accept: tuple[str, ...], quiet: bool) -> dict[str, Any]:
    from lmssl import cards, evidence
    from lmssl.tasks import TASKS, curve, ledger

    values = arguments.resolve(recipe.trainer, arguments.finetune_defaults(), arguments.OWNED_BY_TASKS)
    out, first = Path(values["output_dir"]), ranks.first_process()
    there = folders.holds_run(out, ledger.NAME)
    present = folders.leavings(out, *((ledger.NAME, "checkpoints", "predictions") if there else ()))  # of others a folder may have such names
    folders.check_kind(out, "task", overwrite)
    folders.check_free(out, present, recipe.source, resume and there, overwrite or not first)
    runs = curve_of(recipe, values, quiet)
    task = runs.task
    before = (output.read_json(out / "metrics.json") or {}) if resume else {}
    ranks.check_same(runs.ledger.identity)
    ranks.check_same_folder(out, before.get("results"))
    if resume:
        runs.ledger.load(accept, max(task.labels))
        if runs.ledger.results and runs.is_told_by(before) and not accept:  # without a ledger nothing says of which recipe they are
            log.info("%s is finished; nothing to do", out)
            return before
    elif first and present:
        runs.try_out()  # before anything is removed
        folders.remove(present)
    ranks.wait()  # for what is to be removed
    resolved = {
        "task": {"name": config.name_of(task, TASKS)} | dataclasses.asdict(task),
        "data": dataclasses.asdict(recipe.data),
        "model": {"from": recipe.source},
        "trainer": values,
    }
    leaks = leak_check(recipe.source, runs.test)
    if not quiet and first:
        log.info("to train on: %s; to test: %s; leak check: %s", curve.counted(runs.train), curve.counted(runs.test), evidence.leaks_in_words(leaks))
    if first:
        folders.make(out)
        if runs.ledger.outdated:  # which nothing may read by the new recipe
            folders.remove(folders.found(out, folders.MODEL))
        output.write(out / "recipe.yaml", config.dump(output.plain(resolved)))
        runs.ledger.save(runs.ledger.seconds)  # what is resumed before any run is finished is compared with this
    ranks.check_one_folder(out)
    metrics = runs.run() | {"leaks": leaks, "continued_from": config.of_folder(recipe.source).get("model", {}).get("from"), "environment": output.environment(runs.args.device)}
    if "evaluated" in before and not runs.saved:
        metrics["evaluated"] = before["evaluated"]
    if first:
        with written(f"the results in {out}"):
            output.write(out / "README.md", cards.task_card(task, metrics, output.plain(resolved)))
            output.write_json(out / "metrics.json", metrics)
            runs.forget()
    return metrics


# --- what they are made of -----------------------------------------------------------------------------------------


def check(recipe: PretrainRecipe, resume: bool = False) -> tuple[Objective, Tokenizer]:
    """Everything that can be refused before any text is read: objective, family, configuration, tokenizer."""
    from lmssl import models

    objective = make(recipe.objective)
    model = models.config_of(recipe.model)
    models.check_family(model, objective, recipe.objective["name"])
    tokenizer = recipe.tokenizer()
    tokenizer.check(objective, recipe.objective["name"])
    if not resume:
        tokenizer.check_architecture(model, trained=recipe.continued is not None)
    return objective, tokenizer


def assemble(recipe: PretrainRecipe, objective: Objective, tokenizer: Tokenizer, values: dict[str, Any], quiet: bool) -> tuple[PretrainTrainer, dict[str, Any]]:
    """The trainer of a recipe, its text prepared and its model built, and the trainer section with the run's length.

    Args:
        objective, tokenizer: of `check`.
        values: of `arguments.resolve`.
    """
    from lmssl import models, packing, probe
    from lmssl.pretraining import PretrainTrainer, check_items

    token_set = prepared(recipe.data, tokenizer, quiet=quiet)
    values = arguments.with_steps(values, token_set.rows(objective.row_length(recipe.data.seq_length)))
    args, length = arguments.build(values), recipe.data.seq_length
    stream = Stream(token_set, objective, length, args.seed, args.max_steps * arguments.global_batch(values), _start(recipe))
    check_items(stream, models.family_of(models.config_of(recipe.model)))
    model = models.build(recipe.model, stream.vocab, objective, length, args.seed)
    values = probe.choose(values, args, model, stream, packing.collator(stream, length, models.family_of(model.config), args.device))
    args = arguments.build(values)
    return PretrainTrainer(model, objective, token_set, args, recipe.data.seq_length, quiet=quiet, **arguments.own(values)), values


def curve_of(recipe: FinetuneRecipe, values: dict[str, Any], quiet: bool) -> Curve:
    """The label curve of a recipe: backbone, examples and classes read and checked; nothing is trained or written yet.

    Args:
        values: of `arguments.resolve`.
    """
    from lmssl.tasks import curve
    from lmssl.tasks.base import Backbone

    backbone = Backbone.load(recipe.source, recipe.data.max_length)  # refuses before any text is read
    train, test = curve.labelled(recipe.task, recipe.data.train, recipe.data.test)
    task = recipe.task.fitted(train, test)
    task.check_packages()
    backbone = dataclasses.replace(backbone, classes=tuple(curve.in_order_of(backbone.config, curve.check(task, train, test))))
    backbone.tokenizer.check_architecture(backbone.config, trained=True)
    if (unknown := backbone.tokenizer.unknown()) is not None:
        ids = np.concatenate(backbone.ids([text for example in train[:LOOK] for text in example.texts()]))
        backbone.tokenizer.check_known(int((ids == unknown).sum()), len(ids), "data.train")
    return curve.Curve(task, backbone, train, test, values, quiet)


def preview(recipe: PretrainRecipe, rows: int | None = None, at_step: int | None = None, batch: int | None = None, at_item: int | None = None) -> tuple[Stream, Tokenizer, range]:
    """The items of the run that a recipe would start (or of a run's own recipe.yaml: that it read), without a model.

    Args:
        rows: how many; unset: 3, or all of the step.
        at_step: those that optimizer step N consumes, counted from 1.
        batch: rows of a step over all processes; unset: of one process.
        at_item: those from this item of the stream on, counted from 0.

    Returns:
        The stream, its tokenizer, and the items asked for.
    """
    from lmssl.pretraining import check_items

    objective, tokenizer = make(recipe.objective), recipe.tokenizer()
    tokenizer.check(objective, recipe.objective["name"])
    values = arguments.resolve(recipe.trainer, arguments.pretrain_defaults(recipe.continued is not None))
    token_set = prepared(recipe.data, tokenizer)
    steps = arguments.with_steps(values, token_set.rows(objective.row_length(recipe.data.seq_length)))["max_steps"]
    size = batch or arguments.global_batch(values)
    if at_step is not None and not 1 <= at_step <= steps:
        raise UserError(f"--at-step: {at_step} is not a step of this run; it has steps 1 to {steps}")
    begin, most = (at_item or 0, rows or 3) if at_step is None else ((at_step - 1) * size, min(rows or size, size))
    stream = Stream(token_set, objective, recipe.data.seq_length, values["seed"], begin + most, _start(recipe))
    check_items(stream)
    return stream, tokenizer, range(begin, begin + most)


def _start(recipe: PretrainRecipe) -> int | None:
    """The decoder start that a continued checkpoint fixes."""
    from lmssl import models

    return models.decoder_start(models.read_config(recipe.continued, "model.from")) if recipe.continued else None


def _announce(out: Path, trainer: PretrainTrainer, resolved: dict[str, Any], quiet: bool) -> None:
    """The recipe of the run into its folder, and what is to be done on the terminal."""
    text = config.dump(output.plain(resolved))
    output.write(out / "recipe.yaml", text)
    if not quiet:
        steps, batch, stream = trainer.args.max_steps, trainer.global_batch, trainer.train_dataset
        log.info("%s", text)
        log.info("%s; %d steps of %d rows are %.2f epochs", data_in_words(stream.tokens, stream.rows), steps, batch, steps * batch / stream.rows)


def data_in_words(token_set: TokenSet, rows: int) -> str:
    """How much text there is."""
    manifest = token_set.manifest
    counts = manifest["train"]
    return (
        f"{counts['documents']:,} documents, {counts['tokens']:,} tokens, {rows:,} rows; {manifest['duplicates']:,} duplicates dropped, "
        f"{manifest['held_out']['documents']:,} documents held out"
        + (f", {manifest['decontaminated']:,} dropped for what they share with tests" if "decontaminated" in manifest else "")
    )


def examples(stream: Stream, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The first rows of the run, before and after, as text for the report."""
    shown = []
    for i in range(min(SHOWN, len(stream))):
        row, arrays = stream.row(i), stream[i]
        labels = arrays["labels"]
        shown.append(
            {
                "row": tokenizer.decode(row.ids[row.segments > 0]),
                "input": tokenizer.decode(arrays["input_ids"][arrays["segments"] > 0]),
                "labels": tokenizer.decode(labels[labels != IGNORE]),
            }
        )
    return shown


def _finished(out: Path, before: dict[str, Any], steps: int | None) -> bool:
    """Whether the run that left its metrics has all its steps."""
    if not before or not steps or before.get("steps", 0) < steps:
        return False
    log.info("%s is finished at step %d; nothing to do", out, before["steps"])
    return True


def _finish(out: Path, trainer: PretrainTrainer, metrics: dict[str, Any], resolved: dict[str, Any]) -> None:
    """The final model, its tokenizer, metrics.json (last) and the model card in the output folder."""
    from lmssl import cards

    with written(f"the model in {out}"):
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(out)
        trainer.saved_tokenizer.save(out)
        output.write(out / "README.md", cards.model_card(metrics, output.plain(resolved)))
        output.write_json(out / "metrics.json", metrics)
