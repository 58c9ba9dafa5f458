"""What a lever does to the loss after so many tokens, one change at a time: losses alone, no speeds.

    python -m tests.bench.levers KIND --text FILES --out FOLDER [--steps 500] [--seeds 0] [NAME ...]

Every variant is the recipe of tests/bench/time_to_loss.py with some overrides, and for what no recipe can say with a patch of the stream,
which is how a lever is tried before it is built. One thread each, as many side by side as there are cores; what a run gave
stays in FOLDER. Masked tokens are scored at 15% of single tokens, whatever they were trained with.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.common import alone, side_by_side
from tests.bench.time_to_loss import RECIPES, recipe_of, scored

VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"trainer.lr_scheduler_type": "cosine"},
    "stable-20": {"trainer.lr_scheduler_type": "warmup_stable_decay", "decay": 0.2},
    "stable-50": {"trainer.lr_scheduler_type": "warmup_stable_decay", "decay": 0.5},
    "rate-falls": {"objective.rate": 0.45},
    "rows-grow": {},
    "heads-alike": {},
    "heads-behind": {},
    "heads-fan": {},
    "embeddings-slow": {},
    "embeddings-fast": {},
    "rate-1e-2": {"trainer.learning_rate": 1e-2},
    "rows-8": {"rows": 8},
    "rows-8-slower": {"rows": 8, "trainer.learning_rate": 4e-3},
    "branches-zero": {},
    "beta2-95": {"trainer.adam_beta2": 0.95},
    "beta2-997": {"trainer.adam_beta2": 0.997},
    "rows-32": {"rows": 32, "trainer.learning_rate": 8e-3},
    "momentum-95": {},
    "decay-0": {"trainer.weight_decay": 0.0},
    "counted-half": {},
    "counted-whole": {},
}
"""Overrides; "decay" is the share of the steps in which a stable rate falls to zero, "rows" is of a step, and has as many more
steps as its rows are fewer. Some have one of PATCHES as well."""
ONLY_FOR = {"rate-falls": "masked"} | dict.fromkeys(("heads-alike", "heads-behind", "heads-fan", "branches-zero", "counted-half", "counted-whole"), "next_token")
"""The one kind that a variant is for."""


def falling_rate() -> None:
    """The masking rate falls from the recipe's to 0.15 over the run, a closed formula of the item's number."""
    from lmssl.data.stream import Stream, generator

    def item(self: Any, i: int) -> Any:
        objective = self.objective
        if self.shuffled:
            objective = dataclasses.replace(objective, rate=objective.rate + (0.15 - objective.rate) * i / self.length)
        return objective(self.row(i), self.vocab, generator(self.seed, i))

    Stream.__getitem__ = item  # type: ignore[method-assign]


def growing_rows() -> None:
    """The first fifth of the run reads its rows in quarters, the next in halves: documents cut there, which attention keeps apart."""
    from lmssl.data.stream import Stream
    from lmssl.objectives.base import Row

    whole = Stream.row

    def row(self: Any, i: int) -> Row:
        found = whole(self, i)
        parts = 1 if not self.shuffled else 4 if i < self.length / 5 else 2 if i < self.length * 2 / 5 else 1
        cuts = (np.arange(len(found.ids)) * parts // len(found.ids)).astype(np.int32)
        return Row(found.ids, np.where(found.segments > 0, found.segments + cuts * (found.segments.max() + 1), 0).astype(np.int32))

    Stream.row = row  # type: ignore[method-assign]


def then(change: Callable[[Any], None]) -> None:
    """A new model begins as it does, and then changed."""
    from lmssl import models

    usual = models.begin_local

    def begin(model: Any) -> None:
        usual(model)
        change(model)

    models.begin_local = begin  # type: ignore[assignment]


def heads_near(back: Callable[[int], float]) -> None:
    """Queries and keys of rotary attention begin as one orthogonal map, keys turned so that head h looks back(h) tokens behind itself."""
    import torch

    @torch.no_grad()
    def change(model: Any) -> None:
        size, base = model.config.hidden_size // model.config.num_attention_heads, 10000.0
        frequencies = base ** -(torch.arange(0, size, 2) / size)
        for module in model.modules():
            if hasattr(module, "q_proj"):
                weight = torch.nn.init.orthogonal_(module.q_proj.weight).view(-1, size, module.q_proj.in_features)
                for head, (a, b) in enumerate(w.chunk(2) for w in weight):
                    cos, sin = (f(back(head) * frequencies)[:, None] for f in (torch.cos, torch.sin))
                    module.k_proj.weight.view_as(weight)[head] = torch.cat([a * cos - b * sin, b * cos + a * sin])

    then(change)


def embeddings_at(share: float) -> None:
    """Embeddings learn at a share of the other rates."""
    then(lambda model: setattr(model.get_input_embeddings().weight, "lmssl_rate", share))


def branches_zero() -> None:
    """What leaves attention and feed-forward is zero at the beginning, as in the speed runs of GPT-2's shape."""
    import torch

    def change(model: Any) -> None:
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                torch.nn.init.zeros_(p)

    then(change)


def counted_targets(until: float, first: float = 0.5) -> None:
    """Half of every target is what follows its token in the whole text, by counting; a share that falls to nothing at `until` of the run."""
    import torch

    from lmssl.beginnings import BLOCK
    from lmssl.pretraining import PretrainTrainer

    usual = PretrainTrainer.compute_loss

    def table(tokens: Any, size: int) -> torch.Tensor:
        """float32 [V, V]: absolute discounting towards the frequencies of single tokens (Ney, Essen and Kneser 1994)."""
        counts = torch.zeros(size * size)
        for k in range(tokens.rows(BLOCK)):
            row = tokens.row(k, BLOCK, 0)
            ids, segments = (torch.from_numpy(x).long() for x in (row.ids, row.segments))
            together = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
            at = (ids[:-1] * size + ids[1:])[together]
            counts.index_add_(0, at, torch.ones(len(at)))
        counts = counts.view(size, size)
        single, total, kinds = counts.sum(0), counts.sum(1, keepdim=True), (counts > 0).sum(1, keepdim=True)
        single /= single.sum()
        return torch.where(total > 0, (counts - 0.75).clamp(min=0) / total.clamp(min=1), 0) + torch.where(total > 0, 0.75 * kinds / total.clamp(min=1), 1.0) * single

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        share = first * (1 - self.state.global_step / (until * self.state.max_steps))
        if share <= 0:
            return usual(self, model, inputs, return_outputs, num_items_in_batch)
        if not hasattr(self, "follows"):
            self.follows = table(self.train_dataset.tokens, self.model.config.vocab_size)
        labels, ids = inputs.pop("labels").reshape(-1), inputs["input_ids"].reshape(-1)
        found = model(**inputs).logits.reshape(len(labels), -1).log_softmax(-1)
        hard, soft = found.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1), (self.follows[ids] * found).sum(-1)
        return -((1 - share) * hard + share * soft)[labels >= 0].sum() / num_items_in_batch

    PretrainTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def momentum(value: float) -> None:
    """Muon's momentum."""
    from lmssl.optimizers import MuonAdamW

    usual = MuonAdamW.__init__
    MuonAdamW.__init__ = lambda self, *args, **keys: usual(self, *args, **(keys | {"momentum": value}))  # type: ignore[method-assign]


PATCHES: dict[str, Callable[[], None]] = {
    "rate-falls": falling_rate,
    "rows-grow": growing_rows,
    "heads-alike": lambda: heads_near(lambda head: 0),
    "heads-behind": lambda: heads_near(lambda head: 1),
    "heads-fan": lambda: heads_near(float),
    "embeddings-slow": lambda: embeddings_at(0.5),
    "embeddings-fast": lambda: embeddings_at(2.0),
    "branches-zero": branches_zero,
    "momentum-95": lambda: momentum(0.95),
    "counted-half": lambda: counted_targets(0.5),
    "counted-whole": lambda: counted_targets(1.0),
}
"""By the name of the variant: what no recipe can say."""


def loss_of(kind: str, name: str, seed: int, steps: int, text: str, out: Path) -> float:
    """The held-out loss of one run, or what it gave before."""
    folder = out / f"{kind}-{name}-{steps}-{seed}"
    kept = folder / "loss.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        overrides = {"trainer.max_steps": steps, "trainer.torch_compile": "false"} | VARIANTS[name]
        if rows := overrides.pop("rows", None):
            overrides |= {"trainer.per_device_train_batch_size": rows, "trainer.max_steps": steps * 16 // rows}
        if decay := overrides.pop("decay", None):
            overrides["trainer.lr_scheduler_kwargs"] = json.dumps({"num_decay_steps": round(decay * steps)})
        recipe = recipe_of(kind, "small", text, seed, folder)
        command = [sys.executable, "-m", "tests.bench.levers", kind, *(f"{k}={v}" for k, v in overrides.items()), "--child", str(recipe), "--patch", name]
        alone(command)
        loss = scored(kind, folder / "ours", recipe)
        kept.write_text(json.dumps(loss))
        print(json.dumps({"lever": name, "kind": kind, "steps": steps, "seed": seed, "loss": loss}), flush=True)
    return json.loads(kept.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=RECIPES)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--text")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--child", help="a recipe to pretrain in this process; the names are then its overrides")
    parser.add_argument("--patch", choices=VARIANTS, help="the variant whose patch that process takes, where it has one")
    options = parser.parse_args()
    if options.child:
        from lmssl.cli import run

        if options.patch in PATCHES:
            PATCHES[options.patch]()
        sys.exit(run(["pretrain", options.child, "--overwrite", *options.names]))
    names = options.names or [n for n in VARIANTS if ONLY_FOR.get(n, options.kind) == options.kind]
    grid = list(itertools.product(names, options.seeds))
    losses = side_by_side(lambda name, seed: loss_of(options.kind, name, seed, options.steps, options.text, options.out.resolve()), grid)
    means = {name: round(float(np.mean([loss for (n, _), loss in zip(grid, losses, strict=True) if n == name])), 4) for name in names}
    print(json.dumps({"bench": f"levers, {options.kind}, {options.steps} steps", "seeds": len(options.seeds), **means}), flush=True)


if __name__ == "__main__":
    main()
