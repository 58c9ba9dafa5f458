"""Predictions of a fine-tuned checkpoint for files or standard input, a JSON object a line."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmssl import config, output
from lmssl.data import corpus
from lmssl.errors import Interrupted, Stopped, UserError, fitting, refused

if TYPE_CHECKING:
    from lmssl.tasks.base import Backbone, Task

CHUNK = 16
"""Batches that are read before they are sorted by length and answered."""


def load(checkpoint: str, task_name: str | None, overrides: Sequence[str] = ()) -> tuple[Task, Backbone, Any]:
    """(task, backbone, model) of a fine-tuned checkpoint.

    Its recipe.yaml says which task and columns; a checkpoint without one needs the task's name.

    Raises:
        UserError: no checkpoint, no task named, another task than it was trained for.
    """
    from lmssl import machine, models
    from lmssl.tasks import TASKS, make_task
    from lmssl.tasks.base import Backbone

    models.read_config(checkpoint, "CHECKPOINT")
    sections = config.of_folder(checkpoint)
    if sections:
        if "task" not in sections:
            raise UserError(f"{checkpoint}: is a pretrained backbone, not a fine-tuned model; lmssl finetune makes one")
        if task_name and task_name != sections["task"].get("name"):
            raise UserError(f"--task: {checkpoint} was fine-tuned for {sections['task'].get('name')}, not {task_name}")
        config.check_code(sections["task"], TASKS, "task", checkpoint, [*overrides, f"task.name={task_name}"])
    elif not task_name:
        raise UserError(f"--task: {checkpoint} has no recipe.yaml that says what it was fine-tuned for; name the task")
    known_by_recipe = bool(sections)
    sections = config.apply_overrides({"task": sections.get("task", {"name": task_name})}, overrides, ("task",))
    task, backbone = make_task(sections["task"]), Backbone.load(checkpoint)
    length = backbone.tokenizer.settings.get("model_max_length") or 0
    if 0 < length < 10**6:  # transformers' word for no limit is 1e30
        backbone = dataclasses.replace(backbone, length=min(length, models.max_length(backbone.config) or length))
    if task.classes:
        names = getattr(backbone.config, "id2label", None) or {}
        backbone = dataclasses.replace(backbone, classes=tuple(names[i] for i in sorted(names)))
    kind = "regression" if task.classes and len(backbone.classes) < 2 else getattr(backbone.config, "problem_type", None)
    if what := task.classes and {"regression": "a number", "multi_label_classification": "any number of classes"}.get(kind or ""):
        raise UserError(f"{checkpoint}: answers with {what}, not with one of several classes; transformers' pipeline reads it as it was trained")
    model = task.model(backbone, True, 0)
    if drawn := models.drawn(model):
        raise UserError(f"{checkpoint}: has no weights for {task.name} ({min(drawn)} is missing); lmssl finetune makes a checkpoint that has")
    if not known_by_recipe:
        if task.writes(backbone) and backbone.family == "decoder":
            raise UserError(
                f"{checkpoint}: was not fine-tuned by lmssl, which cannot know what stands between an input and its answer; transformers' generate writes as it was trained to"
            )
        _check_layout(checkpoint, task, backbone)
    return task, backbone, model.to(machine.device()).eval()


def _check_layout(checkpoint: str, task: Task, backbone: Backbone) -> None:
    """Refuse a checkpoint that others trained where its own tokenizer lays an input out otherwise than tasks do here: with other
    special tokens around it, or with token types. Its answers would be others than in plain transformers."""
    from transformers import AutoTokenizer

    columns = [name for key in ("text_a", "text_b", "text", "question", "context", "source") if (name := getattr(task, key, None))]
    example = task.unlabelled({name: f"what {name} says" for name in columns}, "")
    here = [int(i) for i in task.encode(backbone, [example])[0][0]["input_ids"]]
    with refused(f"{checkpoint}: its tokenizer"):
        own = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)(*task.parts(example))
    typed = getattr(backbone.config, "type_vocab_size", 0) > 1 and any(own.get("token_type_ids", ()))
    if own["input_ids"] != here or typed:
        raise UserError(
            f"{checkpoint}: was not fine-tuned by lmssl, and its tokenizer makes {backbone.tokenizer.decode(own['input_ids'])!r} of an input, lmssl "
            f"{backbone.tokenizer.decode(here)!r}{' without token types' if own['input_ids'] == here else ''}; transformers' pipeline reads it as it was trained"
        )


def examples(task: Task, files: Sequence[str]) -> Iterator[Any]:
    """The inputs of files, or of standard input where there is none: lines of text, or of JSON objects."""
    field = getattr(task, task.column) if task.column and not getattr(task, "text_b", None) else None
    sources = corpus.resolve(list(files), "FILE") if files else []
    records: Iterable[corpus.Record] = (r for s in sources for r in _named(s, field, task)) if files else _stdin(field)
    for record, where in records:
        yield task.unlabelled(record, where)


def _named(source: corpus.Source, field: str | None, task: Task) -> Iterator[corpus.Record]:
    if source.kind != "txt":
        yield from corpus.labelled(source)
        return
    for record, where in corpus.records(source):
        if field is None:
            raise UserError(f"{where}: this task needs {task.needs}")
        if record["text"].strip():
            yield {field: record["text"]}, where


def _stdin(field: str | None) -> Iterator[corpus.Record]:
    if sys.stdin is None:
        raise UserError("stdin: is closed; name a FILE")
    for number, raw in enumerate(sys.stdin.buffer, 1):
        where = f"stdin:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
        if not line.strip():
            continue
        if line.lstrip().startswith("{") or field is None:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                hint = "" if field is None else '; a text that begins with { reads {"' + field + '": "{..."}'
                raise UserError(f"{where}: not valid JSON: {error}{hint}") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected a JSON object, one a line")
            yield record, where
        else:
            yield {field: line}, where


def predict(checkpoint: str, files: Sequence[str], *, task_name: str | None = None, overrides: Sequence[str] = (), batch: int = 32, quiet: bool = True) -> Iterator[dict[str, Any]]:
    """The prediction for each input, in order.

    Args:
        checkpoint: folder or hub id of a fine-tuned model.
        files: as `data.text` of a recipe; none: standard input.
        task_name: needed where the checkpoint has no recipe.yaml.
        overrides: `task.key=value`, for other column names.
        batch: inputs at a time.

    Yields:
        {"where", ...}: what `predictions` of the task says.
    """
    from tqdm import tqdm

    if batch < 1:
        raise UserError(f"--batch: {batch} must be at least 1")
    task, backbone, model = load(checkpoint, task_name, overrides)
    stream = examples(task, files)
    with tqdm(unit="input", disable=quiet or None, leave=False) as bar:
        for some in _chunks(stream, CHUNK * batch):
            with fitting(f"a batch of {batch} inputs", "a smaller --batch", UserError):
                rows = task.predictions(model, backbone, some, batch)
            for example, row in zip(some, rows, strict=True):
                yield {"where": example.where, **row}
            bar.update(len(some))


def _chunks(stream: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """So many examples at a time; those before a bad record come before its error."""
    some: list[Any] = []
    try:
        for example in stream:
            some.append(example)
            if len(some) == size:
                yield some
                some = []
    except UserError:
        if some:
            yield some
        raise
    if some:
        yield some


def write(rows: Iterator[dict[str, Any]], out: Path | None) -> None:
    """Predictions as JSON lines, to a file or to standard output; what can be refused is refused before the file is opened.

    A pipe, a device or a link is written to; an ordinary file is replaced when the predictions are whole.

    Raises:
        UserError: a bad record; the predictions before it are kept in OUT.part.
        Interrupted: a signal; so are those before it.
        Stopped: the disk is full; so are those that it holds.
    """
    first = next(rows, None)
    whole = () if first is None else chain([first], rows)
    if out is None:
        for row in whole:
            print(json.dumps(row, ensure_ascii=not output.has_all_letters()))
        return
    ordinary = not out.is_symlink() and (out.is_file() or not out.exists())
    beside = out.with_name(f"{out.name}.part") if ordinary else out
    try:
        with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for row in whole:
                print(json.dumps(row, ensure_ascii=False), file=file)
        if ordinary:
            beside.replace(out)
    except (UserError, KeyboardInterrupt, OSError) as error:
        if not ordinary or not (beside.is_file() and beside.stat().st_size):
            raise
        kept, ordinary = beside, False
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted.by(error, f"the predictions made until then are in {kept}") from error
        if isinstance(error, OSError):
            raise Stopped(f"{out} cannot be written: {error.strerror or error}; the predictions before are in {kept}") from error
        raise UserError(f"{error}; the predictions before it are in {kept}") from error
    finally:
        if ordinary:
            beside.unlink(missing_ok=True)
