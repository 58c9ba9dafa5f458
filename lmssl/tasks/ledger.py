"""The finished runs of a label curve on disk: what `lmssl finetune --resume` does not run again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmssl import checkpoints, models, output
from lmssl.errors import UserError, written
from lmssl.ranks import processes
from lmssl.tasks.base import Backbone, Task

NAME = "progress.json"
INPUTS = 2
"""Raised where a recipe comes to mean other inputs or steps than before: what was finished until then is of another curve. One more with a
grid of learning rates, whose validation examples have changed since; two more with pairs, which have been cut otherwise."""
COUNTS = ("labels", "seeds", "scratch_labels")
"""Fields of a task that say how many runs there are, not how one of them goes."""
FREE = ("output_dir", "logging", "save", "report_to", "run_name", "dataloader", "worker_timeout", "on_spike", "disable_tqdm", "log_level", "per_device_eval_batch_size")
"""Beginnings of the trainer fields that change no result."""
SCORED_ON = ("data.test", "task.metric")
"""What the scores of all runs must have in common: twins are compared, seeds averaged."""
UNSAID = [("tf32", False), ("metric", "accuracy")]
"""Values that earlier versions had without saying so."""


def identity_of(task: Task, backbone: Backbone, train: Sequence[Any], test: Sequence[Any], values: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """What every run of a curve depends on, flat, under the names that a recipe has for it."""
    fields = {f"task.{k}": v for k, v in dataclasses.asdict(task).items() if k not in COUNTS and (k, v) not in UNSAID}  # type: ignore[call-overload]
    fields |= {f"trainer.{k}": v for k, v in values.items() if not k.startswith(FREE) and (k, v) not in UNSAID}
    if (count := processes()) > 1:  # each step takes as many times the examples of one
        fields["processes"] = count
    if list(backbone.classes) != sorted(backbone.classes):  # as earlier versions had them
        fields["classes"] = ", ".join(backbone.classes)
    fields |= {"data.train": _content(train), "data.test": _content(test), "data.max_length": backbone.length}
    return output.plain(
        {
            "task": task.name,
            "model.from": _weights(backbone),
            "model.settings": _settings(backbone),
            **fields,
            "threads": threads,
            "inputs": INPUTS + bool(task.learning_rates) + 2 * bool(getattr(task, "text_b", None)),
        }
    )


def _content(examples: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        # Not where it stands, which is also the id of a question without one.
        digest.update(json.dumps({k: v for k, v in dataclasses.asdict(example).items() if v != example.where}, sort_keys=True).encode())
    return f"{len(examples)} examples, sha256 {digest.hexdigest()[:16]}"


def _weights(backbone: Backbone) -> str:
    """sha256 of a folder's weights; of a hub id, the id and the revision that it had."""
    files = sorted(Path(backbone.source).glob("*.safetensors"))
    if not files:
        return f"{backbone.source}@{getattr(backbone.config, '_commit_hash', None)}"
    return "sha256 " + hashlib.sha256("".join(map(checkpoints.sha256, files)).encode()).hexdigest()[:16]


def _settings(backbone: Backbone) -> str:
    """sha256 of what else a folder's models are made of: the configuration, but for who wrote it, and the tokenizer."""
    said = models.settings(backbone.config) + backbone.tokenizer.backend.to_str()
    return "sha256 " + hashlib.sha256(said.encode()).hexdigest()[:16]


class Ledger:
    """Results and learning rates tried so far, written whole after each run.

    Args:
        folder: of the curve.
        identity: of `identity_of`.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], writes: bool = True):
        self.path, self.identity, self.writes = folder / NAME, identity, writes
        self.results: list[dict[str, Any]] = []
        self.tuning: list[dict[str, Any]] = []
        self.accepted: list[dict[str, Any]] = []
        """{"after": finished runs, "changed": {key: [then, now]}} of each time that a difference was accepted."""
        self.seconds = 0.0
        self.outdated = False
        """Whether the model in the folder is of another recipe, by an accepted difference."""

    @property
    def digest(self) -> str:
        """Of the identity: what a run that was begun under another is not to go on with."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def load(self, accept: Sequence[str] = (), most: int = 0) -> None:
        """What an earlier process of this curve finished; nothing where none did.

        Args:
            accept: keys of the identity that may differ.
            most: number of labels of the run whose model is saved.

        Raises:
            UserError: the file is damaged, or is of a curve that differs and the difference is not in `accept`.
        """
        if not self.path.exists():
            return
        try:
            found = checkpoints.read_signed(self.path)
        except checkpoints.Damaged as error:
            raise UserError(f"--resume: {error}; --overwrite begins anew") from None
        checkpoints.check_accepted(accept, {*found["identity"], *self.identity})
        changed = dict[str, list[Any]]()
        # What inputs are made of follows from other keys too, which say more.
        for key in sorted({*found["identity"], *self.identity}, key=lambda key: (key == "inputs", key)):
            then, now = (identity.get(key, dict(UNSAID).get(key.rpartition(".")[2])) for identity in (found["identity"], self.identity))
            if then == now:
                continue
            if key in SCORED_ON and found["results"]:
                raise UserError(
                    f"--resume: {key} changed: the finished runs were scored by {then}, this recipe says {now}; --overwrite begins anew, another trainer.output_dir keeps them"
                )
            changed[key] = [then, now]
        if unknown := [key for key in changed if key not in accept]:
            (then, now), way_out = changed[unknown[0]], " ".join(f"--accept {key}" for key in unknown)
            how = f"the finished runs have {then}, this recipe {now}" if unknown[0] != "inputs" else "the finished runs are of an lmssl that made other inputs of a recipe"
            raise UserError(f"--resume: {unknown[0]} changed: {how}; {way_out} goes on all the same")
        self.results, self.tuning, self.seconds = found["results"], found["tuning"], found["seconds"]
        if any(key.startswith("task.") or key in ("data.max_length", "classes") for key in changed):
            # The recipe beside the saved model is the new one, which others read its inputs by: it is trained again.
            self.outdated = any(r.get("saved") for r in self.results)
            saved = {"labels": most, "init": "pretrained", "seed": 0}
            self.results = [r for r in self.results if not r.get("saved") and any(r[k] != v for k, v in saved.items())]
        self.accepted = found.get("accepted", []) + ([{"after": len(self.results), "changed": changed}] if changed and self.results else [])

    def result(self, **run: Any) -> dict[str, Any] | None:
        """The finished run of these labels, init and seed."""
        return next((r for r in self.results if all(r[k] == v for k, v in run.items())), None)

    def loss(self, **tried: Any) -> float | None:
        """The validation loss of a learning rate that was tried, infinite where it diverged."""
        found = next((t for t in self.tuning if all(t[k] == v for k, v in tried.items())), None)
        return None if found is None else math.inf if found["validation_loss"] is None else found["validation_loss"]

    def save(self, seconds: float) -> None:
        """Write it, whole and on disk."""
        self.seconds = seconds
        if self.writes:
            with written(str(self.path)):
                checkpoints.write_signed(self.path, {"identity": self.identity, "seconds": seconds, "tuning": self.tuning, "results": self.results, "accepted": self.accepted})
