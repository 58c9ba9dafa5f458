"""Recipes: the one place where all parts meet. `pretrain` and `finetune` are the whole spine, top to bottom."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import platform
import shutil
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmssl import __version__, config, tokenization
from lmssl.data import tokens
from lmssl.data.stream import Stream
from lmssl.data.tokens import TokenSet
from lmssl.errors import UserError
from lmssl.objectives import fields_of, make
from lmssl.objectives.base import Objective
from lmssl.tokenization import Tokenizer

if typing.TYPE_CHECKING:
    from transformers import TrainingArguments

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
        if data.tokenizer is None and "from" not in sections["model"]:
            raise UserError("data.tokenizer: missing; name a tokenizer folder, for example tokenizer_assets/bpe-8k")
        return cls(data, dict(sections["model"]), dict(sections["objective"]), dict(sections["trainer"]))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, completed where a checkpoint is continued that lacks what the objective needs."""
        source = self.data.tokenizer or str(self.model["from"])
        tokenizer = tokenization.load(source)
        lacks = "mask" not in tokenizer.roles or not tokenizer.sentinels
        if "from" in self.model and lacks and make(self.objective).needs:
            added = tokenizer.complete()
            log.info("data.tokenizer: %s lacked special tokens; added %d: %s ...", source, len(added), ", ".join(added[:3]))
        return tokenizer


@dataclass(frozen=True)
class FinetuneData:
    """`data` of a fine-tuning recipe."""

    train: str | list[str]
    """Labelled files, as `data.text` of a pretraining recipe."""
    test: str | int | float | list[str] = 0.1
    """Test files; or a fraction, or a number, of the documents of `train`, taken by smallest content hash."""
    max_length: int | None = None
    """Tokens of a text that the model reads; unset: what the backbone was pretrained with."""


@dataclass(frozen=True)
class FinetuneRecipe:
    """The four sections of a fine-tuning recipe."""

    task: Any
    data: FinetuneData
    source: str
    trainer: dict[str, Any]
    sections: dict[str, dict[str, Any]]

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
        return cls(make_task(sections["task"]), data, source, dict(sections["trainer"]), sections)


# --- the trainer section -------------------------------------------------------------------------------------------

POSITIVE = (
    "learning_rate",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "logging_steps",
    "save_steps",
    "eval_steps",
)
NOT_NEGATIVE = ("weight_decay", "warmup_steps", "max_grad_norm", "seed", "dataloader_num_workers", "adam_epsilon")
BELOW_ONE = ("adam_beta1", "adam_beta2")


def training_arguments(section: dict[str, Any], defaults: dict[str, Any], *, epoch_items: int | None = None) -> tuple[TrainingArguments, str, dict[str, Any]]:
    """The trainer section, typed and completed.

    Args:
        section: `TrainingArguments` fields and `optimizer`.
        defaults: lmssl's own values for what is unset.
        epoch_items: rows of one epoch, so that `num_train_epochs` can become `max_steps`.

    Returns:
        TrainingArguments, the optimizer's name, and the section with every default filled in.

    Raises:
        UserError: unknown keys, wrong types, senseless values, fields that lmssl owns.
    """
    from transformers import TrainingArguments

    from lmssl.trainer import OWNED

    hints = typing.get_type_hints(TrainingArguments)
    fields = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    values = dict(section)
    for name in values:
        if name in OWNED:
            raise UserError(f"trainer.{name}: not to be set: {OWNED[name]}")
    if isinstance(accelerator := values.get("accelerator_config"), dict) and {"split_batches", "dispatch_batches"} & set(accelerator):
        raise UserError("trainer.accelerator_config: split_batches and dispatch_batches are not to be set: item i of the stream belongs to one place in the batch")
    config.check_keys(values, [*(fields - set(OWNED)), "optimizer"], "trainer")
    values = {k: config.convert(v, Literal["adamw", "muon"] if k == "optimizer" else hints[k], f"trainer.{k}") for k, v in values.items()}
    if "output_dir" not in values:
        raise UserError("trainer.output_dir: missing; name the folder of the run")
    _check_ranges(values)
    epochs = values.pop("num_train_epochs", None)
    if epochs is not None and "max_steps" in values:
        raise UserError("trainer.num_train_epochs: max_steps is set as well; keep one of them")
    values = {**defaults, **values}
    if epochs is not None and epoch_items:
        batch = int(os.environ.get("WORLD_SIZE", 1)) * values["per_device_train_batch_size"] * values.get("gradient_accumulation_steps", 1)
        values["max_steps"] = math.ceil(epochs * epoch_items / batch)
    optimizer = values.pop("optimizer")
    steps = values["max_steps"]
    values.setdefault("logging_steps", max(1, steps // 100))
    values.setdefault("save_steps", max(1, steps // 4))
    values.setdefault("warmup_steps", min(100, steps // 10))
    try:
        args = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())[:300]}") from error
    if not args.use_cpu and args.world_size > 1 and args.device.type == "cpu":
        args.use_cpu = True
    return args, optimizer, {"optimizer": optimizer, **values}


def _check_ranges(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not math.isfinite(value):
            raise UserError(f"trainer.{name}: {value} is not a finite number")
        if (name in POSITIVE and value <= 0) or (name in NOT_NEGATIVE and value < 0) or (name in BELOW_ONE and not 0 <= value < 1):
            bound = "above 0" if name in POSITIVE else "at least 0" if name in NOT_NEGATIVE else "at least 0 and below 1"
            raise UserError(f"trainer.{name}: {value} must be {bound}")


def hardware_defaults() -> dict[str, Any]:
    """bf16 where the hardware has it natively; the CPU where there is no accelerator."""
    import torch

    if torch.cuda.is_available():
        return {"bf16": torch.cuda.is_bf16_supported(including_emulation=False), "use_cpu": False}
    if torch.backends.mps.is_available():
        return {"bf16": False, "use_cpu": False}
    native = any(getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return {"bf16": native, "use_cpu": True}


def pretrain_defaults() -> dict[str, Any]:
    """What an unset trainer field is in pretraining; never the Trainer's own 5e-5."""
    return {
        "optimizer": "muon",
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "max_steps": 10_000,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "seed": 0,
        "report_to": "none",
        **hardware_defaults(),
    }


# --- pretrain ------------------------------------------------------------------------------------------------------


def check(recipe: PretrainRecipe) -> tuple[Objective, Tokenizer]:
    """Everything that can be refused before any text is read: objective, family, configuration, tokenizer."""
    from lmssl import models

    objective = make(recipe.objective)
    models.check_family(models.config_of(recipe.model), objective, recipe.objective["name"])
    tokenizer = recipe.tokenizer()
    tokenizer.check(objective, recipe.objective["name"])
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
    from lmssl import models
    from lmssl.trainer import PretrainTrainer

    objective, tokenizer = check(recipe)
    args, _, _ = training_arguments(recipe.trainer, pretrain_defaults())
    out = Path(args.output_dir)
    finished = _claim(out, args, resume, overwrite)
    if finished:
        log.info("%s is finished at step %d; nothing to do", out, finished["steps"])
        return finished
    token_set = tokens.prepare(recipe.data.text, tokenizer, recipe.data.held_out, quiet=quiet)
    rows = token_set.rows(objective.row_length(recipe.data.seq_length))
    args, optimizer, trainer_section = training_arguments(recipe.trainer, pretrain_defaults(), epoch_items=rows)
    model = models.build(recipe.model, token_set.vocab(_start(recipe)), objective, recipe.data.seq_length, args.seed)
    trainer = PretrainTrainer(model, objective, token_set, args, recipe.data.seq_length, optimizer, quiet)
    point = trainer.resume_point(accept) if resume else None
    resolved = {"data": dataclasses.asdict(recipe.data), "model": recipe.model, "objective": fields_of(objective), "trainer": trainer_section}
    resolved["data"]["tokenizer"] = recipe.data.tokenizer or str(recipe.model["from"])
    if trainer.is_world_process_zero():
        text = config.dump(_plain(resolved))
        if not quiet:
            log.info("%s", text)
        _write(out / "recipe.yaml", text)
    _log_data(token_set, rows, trainer, quiet)
    trainer.run(point)
    metrics = trainer.metrics()
    if trainer.is_world_process_zero():
        metrics |= {"environment": environment(), "rows_shown": examples(trainer.train_dataset, tokenizer)}
        _finish(out, trainer.accelerator.unwrap_model(trainer.model), tokenizer, metrics, resolved)
    trainer.accelerator.wait_for_everyone()
    return metrics


def _start(recipe: PretrainRecipe) -> int | None:
    """The decoder start that a continued checkpoint fixes."""
    if "from" not in recipe.model:
        return None
    from lmssl import models

    return getattr(models.read_config(str(recipe.model["from"]), "model.from"), "decoder_start_token_id", None)


def _claim(out: Path, args: Any, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Make the output folder ours, by the rules of the design; a finished run is returned."""
    rank = int(os.environ.get("RANK", 0))
    present = [p for p in (out / "metrics.json", out / "recipe.yaml", *out.glob("checkpoint-*")) if p.exists()]
    if out.exists() and not out.is_dir():
        raise UserError(f"trainer.output_dir: {out} is a file")
    if resume:
        done = _read(out / "metrics.json")
        return done if done and done.get("steps", 0) >= args.max_steps else None
    if present and not overwrite and rank == 0:
        raise UserError(f"trainer.output_dir: {out} holds a run ({present[0].name}); --resume continues it, --overwrite begins anew")
    if rank == 0:
        for path in [*present, *out.glob("damaged-checkpoint-*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"trainer.output_dir: {out} cannot be made: {error.strerror}") from None
    return None


def _log_data(token_set: TokenSet, rows: int, trainer: Any, quiet: bool) -> None:
    if quiet or not trainer.is_world_process_zero():
        return
    counts, batch = token_set.manifest["train"], trainer.global_batch
    log.info(
        "%d documents, %d tokens, %d rows; %d duplicates dropped, %d documents held out; %d steps of %d rows are %.2f epochs",
        counts["documents"], counts["tokens"], rows, token_set.manifest["duplicates"], token_set.manifest["held_out"]["documents"],
        trainer.args.max_steps, batch, trainer.args.max_steps * batch / rows,
    )  # fmt: skip


def _finish(out: Path, model: Any, tokenizer: Tokenizer, metrics: dict[str, Any], resolved: dict[str, Any]) -> None:
    """The final model, its tokenizer, metrics.json (last) and the model card in the output folder."""
    from lmssl import report

    model.save_pretrained(out)
    tokenizer.save(out)
    _write(out / "README.md", report.model_card(metrics, _plain(resolved)))
    _write(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")


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


def preview(recipe: PretrainRecipe, rows: int) -> tuple[Stream, Tokenizer]:
    """The first rows of the run that a recipe would start, without a model."""
    objective, tokenizer = make(recipe.objective), recipe.tokenizer()
    tokenizer.check(objective, recipe.objective["name"])
    token_set = tokens.prepare(recipe.data.text, tokenizer, recipe.data.held_out)
    return Stream(token_set, objective, recipe.data.seq_length, int(recipe.trainer.get("seed", 0)), rows), tokenizer


# --- finetune ------------------------------------------------------------------------------------------------------


def finetune(recipe: FinetuneRecipe, *, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Fine-tune on few labels, pretrained and from scratch, several seeds; returns what metrics.json says."""
    from lmssl.tasks import base

    args, optimizer, _ = training_arguments(recipe.trainer, base.trainer_defaults() | hardware_defaults())
    out = Path(args.output_dir)
    if (out / "metrics.json").exists() and not overwrite:
        raise UserError(f"trainer.output_dir: {out} holds a run (metrics.json); --overwrite begins anew")
    out.mkdir(parents=True, exist_ok=True)
    resolved = recipe.sections | {"task": dataclasses.asdict(recipe.task) | {"name": recipe.task.name}}
    metrics = base.curve(recipe.task, recipe.data, recipe.source, args, optimizer, "max_steps" in recipe.trainer, quiet)
    metrics |= {"environment": environment()}
    if int(os.environ.get("RANK", 0)) == 0:
        _write(out / "recipe.yaml", config.dump(_plain(resolved)))
        _write(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    return metrics


# --- evaluate ------------------------------------------------------------------------------------------------------


def evaluate(checkpoint: str, overrides: typing.Sequence[str]) -> dict[str, Any]:
    """Held-out loss and bits per byte of a checkpoint, on its own held-out text or on `data.text=PATH`."""
    from lmssl import models
    from lmssl.data.stream import Collator
    from lmssl.evaluation import held_out, result

    folder = Path(checkpoint)
    saved = config.load(folder / "recipe.yaml", (), PRETRAIN) if (folder / "recipe.yaml").is_file() else {}
    checkpoint_config = models.read_config(checkpoint, "CHECKPOINT")
    family = models.family_of(checkpoint_config)
    fallback = {"decoder": "next_token", "encoder": "masked", "encoder-decoder": "span_corruption"}[family]
    sections: dict[str, dict[str, Any]] = {"data": {"seq_length": models.max_length(checkpoint_config) or 128}, "objective": {"name": fallback}, "model": {}, "trainer": {}}
    sections |= saved
    sections = config.apply_overrides(sections, overrides, ("data", "objective", "trainer"))
    own_text = not any(o.startswith("data.text=") for o in overrides)
    if own_text and "text" not in sections["data"]:
        raise UserError("data.text: missing; this checkpoint has no recipe, so say what to evaluate on: data.text=PATH")
    data = config.build(DataSection, sections["data"] | {"tokenizer": checkpoint}, "data")
    objective = make(sections["objective"]).held_out()
    models.check_family(checkpoint_config, objective, sections["objective"]["name"])
    tokenizer = tokenization.load(checkpoint)
    token_set = tokens.prepare(data.text, tokenizer, data.held_out).held_out() if own_text else tokens.prepare(data.text, tokenizer, 0.0)
    start = getattr(checkpoint_config, "decoder_start_token_id", None)
    vocab = token_set.vocab(start)
    model = models.prepare(models.build({"from": checkpoint}, vocab, objective, data.seq_length, 0))
    stream = Stream(token_set, objective, data.seq_length, seed=0, length=None, start=start)
    values = held_out(model, stream, Collator(objective, data.seq_length, family, vocab.pad), sections["trainer"].get("per_device_eval_batch_size", 64))
    metrics = (_read(folder / "metrics.json") or {}) | {"held_out": result(values) | {"text": "held out" if own_text else data.text}}
    if folder.is_dir():
        _write(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    return metrics


# --- files ---------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What was measured on what machine."""
    import torch
    import transformers

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else _processor()
    return {
        "lmssl": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }


def _processor() -> str:
    try:
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _plain(value: Any) -> Any:
    """Nested mappings of JSON types: enums to their values, tuples to lists."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, int | float | bool | type(None)) else str(getattr(value, "value", value))


def _write(path: Path, text: str) -> None:
    """Whole or not there: written beside, then renamed."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
