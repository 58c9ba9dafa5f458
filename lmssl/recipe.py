"""Recipes: the sections of a YAML file, typed and checked; what they do is in lmssl.runs."""

from __future__ import annotations

import dataclasses
import logging
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmssl import config, tokenization
from lmssl.data import preparation
from lmssl.data.tokens import TokenSet
from lmssl.errors import UserError
from lmssl.objectives import make
from lmssl.tokenization import Tokenizer

if typing.TYPE_CHECKING:
    from lmssl.tasks.base import Task

log = logging.getLogger("lmssl")

PRETRAIN = ("data", "model", "objective", "trainer")
FINETUNE = ("task", "data", "model", "trainer")


def _complete(sections: dict[str, Any], names: tuple[str, ...], path: str) -> None:
    for name in names:
        if name not in sections:
            raise UserError(f"{path}: the section '{name}' is missing; this kind of recipe has {', '.join(names)}")
        if not isinstance(sections[name], dict):
            raise UserError(f"{path}: {name}: expected a mapping of keys to values, got {sections[name]!r:.80}")


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
        if continued:
            model["from"] = os.path.expanduser(str(model["from"]))  # a folder may be called by a number
        if data.tokenizer is None and not continued:
            raise UserError("data.tokenizer: missing; name a tokenizer folder, for example tokenizer_assets/bpe-8k")
        if data.tokenizer is not None:
            data = dataclasses.replace(data, tokenizer=os.path.expanduser(data.tokenizer))
        return cls(data, model, dict(sections["objective"]), dict(sections["trainer"]))

    @property
    def continued(self) -> str | None:
        """The checkpoint that is trained on, where it is no new model."""
        return self.model.get("from")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, completed where a checkpoint is continued that lacks what the objective needs."""
        source = self.data.tokenizer or str(self.continued)
        tokenizer = tokenization.load(source)
        if self.data.tokenizer and self.continued:
            _check_same_ids(tokenizer, self.continued)
        missing = tokenizer.lacks(make(self.objective))
        if self.continued and missing:
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


def prepared(data: DataSection, tokenizer: Tokenizer, quiet: bool = False) -> TokenSet:
    """The token set of a `data` section, made or found."""
    return preparation.prepare(data.text, tokenizer, data.held_out, data.decontaminate, on_bad_record=data.on_bad_record, quiet=quiet)


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

    task: Task
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
        if source is None or isinstance(source, dict | list):
            raise UserError("model.from: missing; name the pretrained checkpoint")
        data = config.build(FinetuneData, sections["data"], "data")
        return cls(make_task(sections["task"]), data, os.path.expanduser(str(source)), dict(sections["trainer"]))
