"""First steps of every architecture, pretraining and sentiment, saved for comparison; run by one process or torchrun."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import lmssl
from lmssl import ranks
from lmssl.data.stream import mix
from lmssl.errors import UserError
from lmssl.tasks.base import Backbone, Few
from lmssl.tasks.sentiment import Labelled, Sentiment
from lmssl.trainer import ExactTrainer
from tests.helpers import OBJECTIVE, arguments, first_step, saved_backbone, sentences, small_model, token_set

SENTIMENT = {"decoder": "llama", "encoder": "modernbert", "encoder-decoder": "t5"}


def save_backbones(shared: Path) -> None:
    """What the sentiment steps start from; saved before any process group exists."""
    tokens = token_set(shared)
    for family, architecture in SENTIMENT.items():
        saved_backbone(architecture, tokens, shared / family)


def sentiment_step(micro: int, folder: Path, accumulate: int = 1) -> tuple[float, torch.Tensor]:
    task, backbone = Sentiment(), Backbone.load(str(folder), 32, ["0", "1"])
    items = [item for (item,) in task.encode(backbone, [Labelled(text, str(n % 2), "") for n, text in enumerate(sentences(16))])]
    args = arguments(folder / "out", max_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate, max_grad_norm=0.0)
    return first_step(ExactTrainer(task.model(backbone, True, 0), args, Few(items, [""] * len(items), mix(0), 8), task.collator(backbone, 8), quiet=True))


def said_by(check: Any, *args: Any) -> str:
    """What it refuses."""
    try:
        check(*args)
    except UserError as error:
        return str(error)
    return ""


def main(shared: str, architectures: str, out: str, micro: str) -> None:
    tokens, world, steps = token_set(Path(shared)), int(os.environ.get("WORLD_SIZE", 1)), {}
    folder = Path(tempfile.mkdtemp())
    for name in architectures.split(","):
        args = arguments(folder, max_steps=1, per_device_train_batch_size=int(micro), max_grad_norm=0.0)
        trainer = lmssl.PretrainTrainer(small_model(name, tokens.vocab()), OBJECTIVE[name], tokens, args, 32, quiet=True)
        assert trainer.args.world_size == world
        assert (trainer.head is None) == (name == "bart")  # the loss projects, however many ranks there are
        steps[name] = first_step(trainer)
    for family in (family for family, name in SENTIMENT.items() if name in architectures.split(",")):
        steps[f"sentiment {family}"] = sentiment_step(int(micro), Path(shared) / family)
    (shared_folder := Path(out).parent / "seen").mkdir(exist_ok=True)
    ranks.check_same_folder(folder, "the same")
    ranks.check_same({"data": "the same", "threads": 1 + ranks.first_process()})
    ranks.check_one_folder(shared_folder)
    ranks.wait()
    refused = [
        said_by(ranks.check_same_folder, folder, os.environ.get("RANK")),
        said_by(ranks.check_same, {"seed": 0, "data": f"text {ranks.first_process()}"}),
        said_by(ranks.check_one_folder, folder),  # of this process alone
        said_by(ranks.check_one_folder, Path(out) / "nowhere"),
    ]
    if ranks.first_process():
        torch.save({"world": world, "steps": steps, "refused": refused, "left": os.listdir(shared_folder)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
