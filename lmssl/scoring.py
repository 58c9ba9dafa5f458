"""Scoring a checkpoint: held-out loss and bits per byte, a task's scores, and which sentence of a minimal pair it prefers."""

from __future__ import annotations

import logging
import math
import typing
from pathlib import Path
from typing import Any

import numpy as np

from lmssl import config, folders, output, tokenization
from lmssl.data import preparation
from lmssl.data.stream import Stream
from lmssl.errors import UserError, fitting
from lmssl.history import has_changed
from lmssl.objectives import OBJECTIVES, make
from lmssl.recipe import DataSection, prepared

log = logging.getLogger("lmssl")

LONGEST = 1024
"""Tokens of a row, at most, that a checkpoint without a recipe is scored with: some read a hundred thousand."""
SMALLER = "a smaller trainer.per_device_eval_batch_size or data.seq_length"


def evaluate(checkpoint: str, overrides: typing.Sequence[str]) -> dict[str, Any]:
    """Loss and bits per byte of a pretrained checkpoint, on its own held-out text (`held_out` of its metrics.json) or on `data.text=PATH` (`evaluated`).

    Returns:
        {"loss", "bits_per_byte"}.
    """
    from lmssl import forward, machine, models
    from lmssl.data.stream import Collator
    from lmssl.evaluation import held_out

    folder = Path(checkpoint)
    checkpoint_config = models.read_config(checkpoint, "CHECKPOINT")
    family = models.family_of(checkpoint_config)
    tokenizer = tokenization.load(checkpoint)
    fallback = {"decoder": "next_token", "encoder": "masked", "encoder-decoder": "span_corruption" if tokenizer.sentinels else "infilling"}[family]
    own_text = not any(o.startswith("data.text=") for o in overrides)
    own = config.of_folder(folder)
    config.check_code(own.get("objective", {}), OBJECTIVES, "objective", checkpoint, overrides)
    sections = _sections(own, overrides, fallback, min(models.max_length(checkpoint_config) or 128, LONGEST), own_text)
    data = config.build(DataSection, sections["data"] | {"tokenizer": checkpoint}, "data")
    objective = make(sections["objective"]).held_out()
    models.check_family(checkpoint_config, objective, sections["objective"]["name"])
    tokenizer.check(objective, sections["objective"]["name"])
    batch = _batch(sections["trainer"])
    token_set = prepared(data, tokenizer).held_out() if own_text else preparation.prepare(data.text, tokenizer, 0.0, on_bad_record=data.on_bad_record)
    if own_text and has_changed(checkpoint, token_set):
        raise UserError(f"data.text: the text of {checkpoint} has changed since; what is held out of it now may have been trained on (other text: data.text=PATH)")
    start = models.decoder_start(checkpoint_config)
    vocab = token_set.vocab(start)
    model = models.build({"from": checkpoint}, vocab, objective, data.seq_length, 0)
    _check_whole(model, checkpoint)
    model = forward.prepare(model).to(machine.device())
    forward.check_isolated(model, vocab, data.seq_length)
    stream = Stream(token_set, objective, data.seq_length, seed=0, length=None, start=start)
    with fitting("the text", SMALLER, UserError):
        values = held_out(model, stream, Collator(objective, data.seq_length, family, vocab.pad), batch, model.device)
    if not values["labels"]:
        raise UserError(f"data.text: {sections['objective']['name']} asks for no token of this text; it is too short to measure anything")
    if not math.isfinite(values["loss"]):
        raise UserError(f"{checkpoint}: its loss is not finite; its weights are broken")
    found = {name: values[name] for name in ("loss", "bits_per_byte")}
    trusted = f"objective.name={own.get('objective', {}).get('name')}"  # says nothing that the recipe does not
    asked = [o for o in overrides if o.startswith(("data.", "objective.")) and o != trusted]
    if asked:
        _note(folder, "evaluated", {" ".join(asked): found})
    else:
        _note(folder, "held_out", found)
    return found


def _sections(own: dict[str, Any], overrides: typing.Sequence[str], objective: str, length: int, own_text: bool) -> dict[str, dict[str, Any]]:
    """The recipe of a checkpoint, or where it has none a name and a length, with overrides; refused where it would measure what was trained on."""
    sections: dict[str, dict[str, Any]] = {"data": {"seq_length": length}, "objective": {"name": objective}, "model": {}, "trainer": {}}
    sections |= own
    given = config.apply_overrides({"trainer": {}}, [o for o in overrides if o.startswith("trainer.")], ("trainer",))
    config.check_keys(given["trainer"], ["per_device_eval_batch_size"], "trainer")
    sections = config.apply_overrides(sections, overrides, ("data", "objective", "trainer"))
    if own_text and any(o.startswith(("data.held_out=", "data.decontaminate=")) for o in overrides):
        raise UserError("data.held_out: what this checkpoint was trained on would be measured too; other text: data.text=PATH")
    if own_text and "text" not in sections["data"]:
        raise UserError("data.text: missing; this checkpoint has no recipe, so say what to evaluate on: data.text=PATH")
    return sections


def evaluate_task(checkpoint: str, overrides: typing.Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The scores of a fine-tuned checkpoint on labelled files, `data.test=FILE`; `evaluated` of its metrics.json.

    Args:
        overrides: `data.test`, and `task.key=value` for other column names.

    Returns:
        (name of the metric that the task goes by, {name: score}).
    """
    from lmssl import predict
    from lmssl.data import corpus

    own = [item for item in overrides if item.startswith("task.")]
    sections = config.apply_overrides({"data": {}, "trainer": {}}, [item for item in overrides if item not in own], ("data", "trainer"))
    config.check_keys(sections["data"], ["test"], "data")
    config.check_keys(sections["trainer"], ["per_device_eval_batch_size"], "trainer")
    files, batch = sections["data"].get("test"), _batch(sections["trainer"])
    if not files or not all(isinstance(name, str) for name in (files if isinstance(files, list) else [files])):
        given = "missing" if not files else f"{files} names no file"
        raise UserError(f"data.test: {given}; {checkpoint} is a fine-tuned model, so name labelled files: data.test=FILE")
    task, backbone, model = predict.load(checkpoint, None, own)
    examples = task.read(corpus.resolve(files, "data.test"))
    if not examples:
        raise UserError(f"data.test: {files}: no example")
    for example in examples if task.classes else ():
        if example.label not in backbone.classes:
            raise UserError(f"{example.where}: the class '{example.label}' is none of the model's ({', '.join(backbone.classes)})")
    with fitting("the test set", SMALLER, UserError):
        scores, _ = task.evaluate(model, backbone, examples, batch)
    scores |= {"test_examples": len(examples)}
    _note(Path(checkpoint), "evaluated", {", ".join([files] if isinstance(files, str) else files): scores})
    return task.metric, scores


def _check_whole(model: Any, checkpoint: str) -> None:
    """Refuse a model parts of which are random: their score would say nothing."""
    from lmssl import models

    if drawn := models.drawn(model):
        raise UserError(f"{checkpoint}: is no pretrained language model: {min(drawn)} is missing")


def is_fine_tuned(checkpoint: str) -> bool:
    """Whether a checkpoint's recipe says that it was fine-tuned for a task."""
    return "task" in config.of_folder(checkpoint)


def _batch(trainer: dict[str, Any]) -> int:
    """Rows or examples at a time."""
    batch = trainer.get("per_device_eval_batch_size", 64)
    if not isinstance(batch, int) or batch < 1:
        raise UserError(f"trainer.per_device_eval_batch_size: {batch!r} must be a whole number above 0")
    return batch


def _note(folder: Path, key: str, value: dict[str, Any]) -> None:
    """Into metrics.json of a checkpoint that lies here; what is there under other keys, or of other texts, stays."""
    if not folder.is_dir():
        return
    try:
        with folders.lock_of(folder, "scores"):  # of several evaluations at once none is lost
            metrics = output.read_json(folder / "metrics.json") or {}
            before = metrics.get(key, {}) if key == "evaluated" else {}
            output.write_json(folder / "metrics.json", metrics | {key: before | value})
    except OSError as error:
        log.warning("%s cannot be written, so this score stands nowhere else: %s", folder / "metrics.json", error.strerror or error)


def minimal_pairs(checkpoint: str, path: str) -> dict[str, Any]:
    """Which sentence of each minimal pair a checkpoint prefers; written into its metrics.json as `minimal_pairs`.

    Args:
        path: records with `sentence_good`, `sentence_bad` and, where there are several phenomena, `UID`.
    """
    from tqdm import tqdm

    from lmssl import likelihood, machine, models
    from lmssl.data import corpus
    from lmssl.tasks.base import Backbone

    folder = Path(checkpoint)
    models.read_config(checkpoint, "CHECKPOINT")
    backbone = Backbone.load(checkpoint)
    names, hint = ("sentence_good", "sentence_bad"), "minimal pairs have the columns of BLiMP: sentence_good, sentence_bad, UID"
    records = [record for source in corpus.resolve(path, "--pairs") for record in corpus.labelled(source, hint)]
    pairs = [(*(corpus.text_of(r, name, where, hint) for name in names), str(r.get("UID", "all"))) for r, where in records]
    if not pairs:
        raise UserError(f"--pairs: {path} holds no pair")
    model = backbone.build(models.AUTO[backbone.family], True, 0).to(machine.device())
    _check_whole(model, checkpoint)
    vocab = backbone.tokenizer.vocab(models.decoder_start(backbone.config))
    ids = backbone.ids([text for good, bad, _ in pairs for text in (good, bad)])
    room = (models.max_length(backbone.config) or 2**31) - 2
    for number, row in enumerate(ids):
        if len(row) > room:
            raise UserError(f"{records[number // 2][1]}: a sentence of {len(row)} tokens; the checkpoint reads {room}")
    trained_by = config.of_folder(checkpoint).get("objective", {}).get("name", "infilling" if backbone.config.model_type in ("bart", "mbart") else "")
    by = "mask" if trained_by == "infilling" else "sentinel"
    total = len(ids) if backbone.family == "decoder" else sum(map(len, ids))
    with tqdm(total=total, unit="row", disable=None, leave=False) as bar, fitting("the sentences", "a device with more of it, or shorter ones", UserError):
        values = likelihood.log_likelihoods(model, backbone.family, ids, vocab, by, bar.update)
    if not np.isfinite(values).all():
        raise UserError(f"{checkpoint}: gives a sentence a likelihood that is not finite; its weights are broken")
    found = likelihood.preferred(values[::2], values[1::2], [kind for _, _, kind in pairs])
    _note(folder, "minimal_pairs", found)
    return found
