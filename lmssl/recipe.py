"""Recipes: the one place where all parts meet. `pretrain` and `finetune` are the whole spine, top to bottom."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmssl import arguments, checkpoints, config, output, tokenization
from lmssl.data import tokens
from lmssl.data.stream import Stream
from lmssl.data.tokens import TokenSet
from lmssl.errors import UserError, written
from lmssl.objectives import fields_of, make
from lmssl.objectives.base import Objective
from lmssl.tokenization import Tokenizer

if typing.TYPE_CHECKING:
    from lmssl.pretraining import PretrainTrainer
    from lmssl.tasks.curve import Curve

log = logging.getLogger("lmssl")

PRETRAIN = ("data", "model", "objective", "trainer")
FINETUNE = ("task", "data", "model", "trainer")


def _complete(sections: dict[str, Any], names: tuple[str, ...], path: str) -> None:
    for name in names:
        if name not in sections:
            raise UserError(f"{path}: the section '{name}' is missing; this kind of recipe has {', '.join(names)}")


@dataclass(frozen=True)
class DataSection:
    """`data` of a pretraining recipe."""

    text: str | list[str]
    """Files, globs, folders, package:// files or hub ids, each with an optional ::column (see lmssl.data.corpus)."""
    tokenizer: str | None = None
    """Folder or hub id; unset: the tokenizer of the checkpoint in `model.from`."""
    seq_length: int = 128
    """Tokens the model reads at once."""
    held_out: float | str = 0.01
    """Fraction of the documents held out by content hash, or files of their own."""
    decontaminate: bool | str | list[str] = False
    """Test files: training documents that share 13 words in a row with them are dropped; true: with the held-out documents."""

    on_bad_record: typing.Literal["stop", "skip"] = "stop"
    """What becomes of a record that is no valid text: the first stops the preparation, or each is skipped and counted."""

    def __post_init__(self) -> None:
        if self.seq_length < 8:
            raise ValueError(f"seq_length={self.seq_length} must be at least 8 tokens")
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be a fraction above 0 and below 1, or a path")


@dataclass(frozen=True)
class PretrainRecipe:
    """The four sections of a pretraining recipe, typed; `model`, `objective` and `trainer` as mappings."""

    data: DataSection
    model: dict[str, Any]
    objective: dict[str, Any]
    trainer: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path, overrides: typing.Sequence[str] = ()) -> PretrainRecipe:
        """A recipe file with `section.key=value` overrides."""
        return cls.of(config.load(path, tuple(overrides), PRETRAIN), str(path))

    @classmethod
    def of(cls, sections: dict[str, dict[str, Any]], path: str = "recipe") -> PretrainRecipe:
        """A recipe from nested mappings."""
        _complete(sections, PRETRAIN, path)
        data = config.build(DataSection, sections["data"], "data")
        continued = sections["model"].get("from") is not None
        # null unsets a key; of an architecture's own it may also be the value.
        model = {k: v for k, v in sections["model"].items() if v is not None or not (continued or k in ("architecture", "from", "init", "attn_implementation"))}
        if data.tokenizer is None and not continued:
            raise UserError("data.tokenizer: missing; name a tokenizer folder, for example tokenizer_assets/bpe-8k")
        return cls(data, model, dict(sections["objective"]), dict(sections["trainer"]))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, completed where a checkpoint is continued that lacks what the objective needs."""
        source = self.data.tokenizer or str(self.model["from"])
        tokenizer = tokenization.load(source)
        if self.data.tokenizer and "from" in self.model:
            _check_same_ids(tokenizer, str(self.model["from"]))
        missing = tokenizer.lacks(make(self.objective))
        if "from" in self.model and missing:
            added = tokenizer.complete(sentinels="sentinels" in missing)
            log.info("data.tokenizer: %s lacked special tokens; added %d: %s ...", source, len(added), ", ".join(added[:3]))
        return tokenizer


def _check_same_ids(tokenizer: Tokenizer, checkpoint: str) -> None:
    """Refuse to continue a checkpoint with a tokenizer whose ids mean other tokens; one that only adds some will do."""
    if not any((Path(checkpoint) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return  # a checkpoint without its tokenizer, or one on the hub
    own, other = tokenization.load(checkpoint).backend.get_vocab(), tokenizer.backend.get_vocab()
    changed = [token for token, i in own.items() if other.get(token) != i]
    if changed:
        raise UserError(
            f"data.tokenizer: {tokenizer.source} gives other ids than the tokenizer of {checkpoint} to {len(changed):,} of its {len(own):,} tokens "
            f"({changed[0]!r}: {other.get(changed[0], 'none')} instead of {own[changed[0]]}); leave data.tokenizer out"
        )


@dataclass(frozen=True)
class FinetuneData:
    """`data` of a fine-tuning recipe."""

    train: str | list[str]
    """Labelled files, as `data.text` of a pretraining recipe."""
    test: str | int | float | list[str] = 0.1
    """Test files; or a fraction, or a number, of the documents of `train`, taken by smallest content hash."""
    max_length: int | None = None
    """Tokens of a text that the model reads; unset: as many as it has positions, 256 where it has none (T5)."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 8:
            raise ValueError(f"max_length={self.max_length} must be at least 8 tokens")
        if isinstance(self.test, float) and not 0 < self.test < 1:
            raise ValueError(f"test={self.test} must be a fraction above 0 and below 1, a number of documents, or files")


@dataclass(frozen=True)
class FinetuneRecipe:
    """The four sections of a fine-tuning recipe."""

    task: Any
    data: FinetuneData
    source: str
    trainer: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path, overrides: typing.Sequence[str] = ()) -> FinetuneRecipe:
        """A recipe file with `section.key=value` overrides."""
        return cls.of(config.load(path, tuple(overrides), FINETUNE), str(path))

    @classmethod
    def of(cls, sections: dict[str, dict[str, Any]], path: str = "recipe") -> FinetuneRecipe:
        """A recipe from nested mappings."""
        from lmssl.tasks import make_task

        _complete(sections, FINETUNE, path)
        config.check_keys(sections["model"], ["from"], "model")
        source = sections["model"].get("from")
        if not isinstance(source, str):
            raise UserError("model.from: missing; name the pretrained checkpoint")
        data = config.build(FinetuneData, sections["data"], "data")
        return cls(make_task(sections["task"]), data, source, dict(sections["trainer"]))


# --- pretrain ------------------------------------------------------------------------------------------------------


def prepared(data: DataSection, tokenizer: Tokenizer, quiet: bool = False) -> TokenSet:
    """The token set of a `data` section, made or found."""
    return tokens.prepare(data.text, tokenizer, data.held_out, data.decontaminate, on_bad_record=data.on_bad_record, quiet=quiet)


def check(recipe: PretrainRecipe, resume: bool = False) -> tuple[Objective, Tokenizer]:
    """Everything that can be refused before any text is read: objective, family, configuration, tokenizer."""
    from lmssl import models

    objective = make(recipe.objective)
    model = models.config_of(recipe.model)
    models.check_family(model, objective, recipe.objective["name"])
    tokenizer = recipe.tokenizer()
    tokenizer.check(objective, recipe.objective["name"])
    if "from" not in recipe.model and not resume:
        tokenizer.check_architecture(model)
    return objective, tokenizer


def pretrain(recipe: PretrainRecipe, *, resume: bool = False, overwrite: bool = False, accept: tuple[str, ...] = (), quiet: bool = False) -> dict[str, Any]:
    """Pretrain as a recipe says; returns what metrics.json says.

    Args:
        resume: continue from the newest whole checkpoint.
        overwrite: begin anew in a folder that holds a run.
        accept: differences from the checkpoint's run that resuming accepts ("seed", "batch", ...).

    Raises:
        UserError, Stopped, Interrupted: see lmssl.errors.
    """
    from lmssl import beginnings, models, probe

    objective, tokenizer = check(recipe, resume)
    values = arguments.resolve(recipe.trainer, arguments.pretrain_defaults("from" in recipe.model))
    args = arguments.build(values)  # refuses before any text is read
    out, first = Path(args.output_dir), int(os.environ.get("RANK", 0)) == 0
    _check_kind(out, "objective", overwrite)
    if resume:
        values |= probe.recorded(out / "recipe.yaml", recipe.trainer, PRETRAIN)
    else:
        _check_free(out, _leavings(out), recipe.model.get("from"), overwrite or not first)
    if finished := _finished(out, values.get("max_steps"), resume):
        return finished
    _folder(out)
    trainer, values = assemble(recipe, objective, tokenizer, values, quiet)
    if finished := _finished(out, trainer.args.max_steps, resume):  # of num_train_epochs
        return finished
    if first and not resume:  # by now nothing more is to be refused that could have been
        _remove([*_leavings(out), *out.glob("damaged-checkpoint-*")])
    point = trainer.resume_point(accept) if resume else None
    if resume and point is None and (done := output.read_json(out / "metrics.json") or {}).get("steps"):
        way_out = f"model: {{from: {out}}} in place of the architecture continues it in another folder, --overwrite begins anew"
        raise UserError(f"--resume: {out} is finished at step {done['steps']}, and its checkpoints are gone; {way_out}")
    if point is None and models.init_of(recipe.model) == "text":
        beginnings.begin_from_text(trainer.model, trainer.train_dataset.tokens, trainer.args.seed)
    resolved = {"data": dataclasses.asdict(recipe.data), "model": recipe.model, "objective": fields_of(objective), "trainer": values}
    resolved["data"]["tokenizer"] = recipe.data.tokenizer or str(recipe.model["from"])
    if trainer.is_world_process_zero():
        text = config.dump(output.plain(resolved))
        output.write(out / "recipe.yaml", text)
        if not quiet:
            steps, batch, stream = trainer.args.max_steps, trainer.global_batch, trainer.train_dataset
            log.info("%s", text)
            log.info("%s; %d steps of %d rows are %.2f epochs", data_in_words(stream.tokens, stream.rows), steps, batch, steps * batch / stream.rows)
    trainer.run(point)
    metrics = trainer.metrics()
    if trainer.is_world_process_zero():
        metrics |= {"data": trainer.train_dataset.tokens.identity, "environment": output.environment(), "rows_shown": examples(trainer.train_dataset, tokenizer)}
        _finish(out, trainer.accelerator.unwrap_model(trainer.model), tokenizer, metrics, resolved)
    trainer.accelerator.wait_for_everyone()
    return metrics


def _start(recipe: PretrainRecipe) -> int | None:
    """The decoder start that a continued checkpoint fixes."""
    from lmssl import models

    return getattr(models.read_config(str(recipe.model["from"]), "model.from"), "decoder_start_token_id", None) if "from" in recipe.model else None


def _leavings(out: Path, *more: str) -> list[Path]:
    """What an earlier run left in its folder: results, checkpoints and model, of which nothing may be taken for a later run's."""
    names = ("metrics.json", "recipe.yaml", *more, "checkpoint-*", "config.json", "generation_config.json", "model*.safetensors*", "README.md")
    return [path for name in names for path in sorted(out.glob(name))]


def _check_free(out: Path, present: list[Path], source: str | None, overwrite: bool) -> None:
    """Refuse an output folder that is the backbone itself, whose old run holds it, or that holds a run, unless that is to be overwritten."""
    if source is not None and (Path(source).resolve() == out.resolve() or any(Path(source).resolve().is_relative_to(path.resolve()) for path in present)):
        raise UserError(f"trainer.output_dir: {source}, the backbone in model.from, would be overwritten in {out}; name another folder")
    if present and present[0].name != "README.md" and not overwrite:
        raise UserError(f"trainer.output_dir: {out} holds a run ({present[0].name}); --resume continues it, --overwrite begins anew")


def _check_kind(out: Path, section: str, overwrite: bool) -> None:
    """Refuse a folder that holds a run of the other kind: pretraining's recipe has an `objective`, fine-tuning's a `task`."""
    sections = config.of_folder(out)
    if sections and not overwrite and section not in sections:
        held = "pretrained model" if section == "task" else "fine-tuned model"
        raise UserError(f"trainer.output_dir: {out} holds a {held}; name another folder (--overwrite removes it)")


def _remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _finished(out: Path, steps: int | None, resume: bool) -> dict[str, Any] | None:
    """What metrics.json says of a run that has all its steps."""
    done = output.read_json(out / "metrics.json") if resume else None
    if not done or not steps or done.get("steps", 0) < steps:
        return None
    log.info("%s is finished at step %d; nothing to do", out, done["steps"])
    return done


def _folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"trainer.output_dir: {out} is a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"trainer.output_dir: {out} cannot be made: {error.strerror}") from None


def assemble(recipe: PretrainRecipe, objective: Objective, tokenizer: Tokenizer, values: dict[str, Any], quiet: bool) -> tuple[PretrainTrainer, dict[str, Any]]:
    """The trainer of a recipe, its text prepared and its model built, and the trainer section with the run's length.

    Args:
        objective, tokenizer: of `check`.
        values: of `arguments.resolve`.
    """
    from lmssl import models, packing, probe
    from lmssl.pretraining import PretrainTrainer

    token_set = prepared(recipe.data, tokenizer, quiet=quiet)
    values = arguments.with_steps(values, token_set.rows(objective.row_length(recipe.data.seq_length)))
    args, length = arguments.build(values), recipe.data.seq_length
    stream = Stream(token_set, objective, length, args.seed, args.max_steps * arguments.global_batch(values), _start(recipe))
    model = models.build(recipe.model, stream.vocab, objective, length, args.seed)
    values = probe.choose(values, args, model, stream, packing.collator(stream, length, models.family_of(model.config), args.device))
    args = arguments.build(values)
    return PretrainTrainer(model, objective, token_set, args, recipe.data.seq_length, quiet=quiet, **arguments.own(values)), values


def data_in_words(token_set: TokenSet, rows: int) -> str:
    """How much text there is."""
    manifest = token_set.manifest
    counts = manifest["train"]
    return (
        f"{counts['documents']:,} documents, {counts['tokens']:,} tokens, {rows:,} rows; {manifest['duplicates']:,} duplicates dropped, "
        f"{manifest['held_out']['documents']:,} documents held out"
    )


def _finish(out: Path, model: Any, tokenizer: Tokenizer, metrics: dict[str, Any], resolved: dict[str, Any]) -> None:
    """The final model, its tokenizer, metrics.json (last) and the model card in the output folder."""
    from lmssl import cards

    with written(f"the model in {out}"):
        model.save_pretrained(out)
        tokenizer.save(out)
        output.write(out / "README.md", cards.model_card(metrics, output.plain(resolved)))
        output.write_json(out / "metrics.json", metrics)


def examples(stream: Stream, tokenizer: Tokenizer, count: int = 3) -> list[dict[str, str]]:
    """The first rows of the run, before and after, as text for the report."""
    shown = []
    for i in range(min(count, len(stream))):
        row, arrays = stream.row(i), stream[i]
        labels = arrays["labels"]
        shown.append(
            {
                "row": tokenizer.decode(row.ids[row.segments > 0]),
                "input": tokenizer.decode(arrays["input_ids"][arrays["segments"] > 0]),
                "labels": tokenizer.decode(labels[labels != -100]),
            }
        )
    return shown


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
    objective, tokenizer = make(recipe.objective), recipe.tokenizer()
    tokenizer.check(objective, recipe.objective["name"])
    values = arguments.resolve(recipe.trainer, arguments.pretrain_defaults("from" in recipe.model))
    token_set = prepared(recipe.data, tokenizer)
    steps = arguments.with_steps(values, token_set.rows(objective.row_length(recipe.data.seq_length)))["max_steps"]
    size = batch or arguments.global_batch(values)
    if at_step is not None and not 1 <= at_step <= steps:
        raise UserError(f"--at-step: {at_step} is not a step of this run; it has steps 1 to {steps}")
    begin, most = (at_item or 0, rows or 3) if at_step is None else ((at_step - 1) * size, min(rows or size, size))
    stream = Stream(token_set, objective, recipe.data.seq_length, values["seed"], begin + most, _start(recipe))
    return stream, tokenizer, range(begin, begin + most)


# --- finetune ------------------------------------------------------------------------------------------------------


def finetune(recipe: FinetuneRecipe, *, resume: bool = False, overwrite: bool = False, accept: tuple[str, ...] = (), quiet: bool = False) -> dict[str, Any]:
    """Fine-tune on few labels, pretrained and from scratch, several seeds; returns what metrics.json says.

    Args:
        resume: keep the finished runs of the folder, and go on with the others: those that an interruption left, and
            those that more seeds or numbers of labels add.
        overwrite: begin anew in a folder that holds runs.
        accept: differences from the finished runs that resuming accepts ("trainer.learning_rate", "data.test", ...).

    Raises:
        UserError, Stopped, Interrupted: see lmssl.errors.
    """
    from lmssl import cards, report
    from lmssl.tasks import curve, ledger

    values = arguments.resolve(recipe.trainer, arguments.finetune_defaults(), arguments.OWNED_BY_TASKS)
    out = Path(values["output_dir"])
    first = int(os.environ.get("RANK", 0)) == 0
    present = _leavings(out, ledger.NAME, "checkpoints", "predictions")
    _check_kind(out, "task", overwrite)
    _check_free(out, present, recipe.source, resume or overwrite)
    runs = curve_of(recipe, values, quiet)
    task: Any = runs.task
    before = (output.read_json(out / "metrics.json") or {}) if resume else {}
    if resume:
        runs.ledger.load(accept)
        if runs.is_told_by(before) and not accept:
            log.info("%s is finished; nothing to do", out)
            return before
    elif first and present:
        runs.try_out()  # before anything is removed
        _remove(present)
    resolved = {"task": {"name": task.name} | dataclasses.asdict(task), "data": dataclasses.asdict(recipe.data), "model": {"from": recipe.source}, "trainer": values}
    leaks = leak_check(recipe.source, runs.test)
    if not quiet and first:
        log.info("to train on: %s; to test: %s; leak check: %s", curve.counted(runs.train), curve.counted(runs.test), report.leaks_in_words(leaks))
    if first:
        _folder(out)
        output.write(out / "recipe.yaml", config.dump(output.plain(resolved)))
        runs.ledger.save(runs.ledger.seconds)  # what is resumed before any run is finished is compared with this
    metrics = runs.run() | {"leaks": leaks, "continued_from": config.of_folder(recipe.source).get("model", {}).get("from"), "environment": output.environment()}
    if "evaluated" in before and not runs.saved:
        metrics["evaluated"] = before["evaluated"]
    if first:
        with written(f"the results in {out}"):
            output.write(out / "README.md", cards.task_card(metrics, output.plain(resolved)))
            output.write_json(out / "metrics.json", metrics)
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return metrics


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
    return curve.Curve(task, backbone, train, test, values, quiet)


def leak_check(source: str, test: typing.Sequence[Any]) -> dict[str, Any]:
    """How many test examples share 13 words in a row with what the backbone was pretrained on, and the checkpoints that it was continued from.

    Returns:
        {"checked": True, "test_examples", "leaked", "examples": where the first few stand}; or {"checked": False, "reason"}.
    """
    from lmssl.data.contamination import leaked

    owners = [k for k, example in enumerate(test) for _ in example.texts()]
    found, seen = set[int](), set[Path]()
    folder: str | None = source
    while folder is not None:
        try:
            if Path(folder).resolve() in seen:
                raise UserError(f"{folder} was continued from what has been replaced since")
            seen.add(Path(folder).resolve())
            token_set, tokenizer, before = _pretraining_text(folder)
        except UserError as error:
            known = f"; of the text since then {len(found):,} of {len(test):,} test examples" if folder != source else ""
            return {"checked": False, "reason": f"{error}{known}"}
        # The documents come out of the tokenizer again, perhaps in lower case; so must the test texts.
        texts = tokenizer.round_trip([text for example in test for text in example.texts()])
        found |= {owners[i] for i in leaked(texts, token_set.texts())}
        folder = before
    return {"checked": True, "test_examples": len(test), "leaked": len(found), "examples": [test[k].where for k in sorted(found)[:20]]}


def _pretraining_text(checkpoint: str) -> tuple[TokenSet, Tokenizer, str | None]:
    """What a checkpoint was pretrained on, its tokenizer, and the checkpoint that it was continued from.

    Raises:
        UserError: its text is not known, not at hand, or no longer what it was.
    """
    if not (Path(checkpoint) / "recipe.yaml").is_file():
        raise UserError(f"{checkpoint} has no recipe.yaml, so its text is not known")
    if "task" in config.of_folder(checkpoint):
        raise UserError(f"{checkpoint} was fine-tuned, and what it has seen since its pretraining is not known")
    sections = config.load(Path(checkpoint) / "recipe.yaml", (), PRETRAIN)
    try:
        tokenizer = tokenization.load(checkpoint)
        found = prepared(config.build(DataSection, sections["data"], "data"), tokenizer, quiet=True)
    except UserError as error:
        raise UserError(f"the pretraining text of {checkpoint} is not at hand: {error}") from None
    if has_changed(checkpoint, found) or _recorded(checkpoint, "earlier_data"):
        raise UserError(f"the pretraining text of {checkpoint} has changed since, or was another before the run was resumed")
    return found, tokenizer, sections["model"].get("from")


def has_changed(checkpoint: str, found: TokenSet) -> bool:
    """Whether the text that a checkpoint's recipe names is another than the one it was trained on, as far as its metrics.json or its manifest knows."""
    then = _recorded(checkpoint, "data") or _recorded(checkpoint, "identity")
    return then is not None and then["data"] != found.identity["data"]


def _recorded(checkpoint: str, key: str) -> Any:
    """What metrics.json of a finished run says, or the manifest of a checkpoint along the way."""
    return (output.read_json(Path(checkpoint) / "metrics.json") or {}).get(key) or checkpoints.facts(Path(checkpoint)).get(key)
