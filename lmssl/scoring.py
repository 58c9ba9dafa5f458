"""Scoring a checkpoint: held-out loss and bits per byte, and which sentence of a minimal pair it prefers."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from lmssl import config, output, tokenization
from lmssl.data import tokens
from lmssl.data.stream import Stream
from lmssl.errors import UserError
from lmssl.objectives import make
from lmssl.recipe import PRETRAIN, DataSection, prepared


def evaluate(checkpoint: str, overrides: typing.Sequence[str]) -> dict[str, Any]:
    """Held-out loss and bits per byte of a checkpoint, on its own held-out text or on `data.text=PATH`."""
    from lmssl import models
    from lmssl.data.stream import Collator
    from lmssl.evaluation import held_out, result

    folder = Path(checkpoint)
    saved = config.load(folder / "recipe.yaml", (), PRETRAIN) if (folder / "recipe.yaml").is_file() else {}
    checkpoint_config = models.read_config(checkpoint, "CHECKPOINT")
    family = models.family_of(checkpoint_config)
    tokenizer = tokenization.load(checkpoint)
    fallback = {"decoder": "next_token", "encoder": "masked", "encoder-decoder": "span_corruption" if tokenizer.sentinels else "infilling"}[family]
    sections: dict[str, dict[str, Any]] = {"data": {"seq_length": models.max_length(checkpoint_config) or 128}, "objective": {"name": fallback}, "model": {}, "trainer": {}}
    sections |= saved
    sections = config.apply_overrides(sections, overrides, ("data", "objective", "trainer"))
    own_text = not any(o.startswith("data.text=") for o in overrides)
    if own_text and "text" not in sections["data"]:
        raise UserError("data.text: missing; this checkpoint has no recipe, so say what to evaluate on: data.text=PATH")
    data = config.build(DataSection, sections["data"] | {"tokenizer": checkpoint}, "data")
    objective = make(sections["objective"]).held_out()
    models.check_family(checkpoint_config, objective, sections["objective"]["name"])
    tokenizer.check(objective, sections["objective"]["name"])
    batch = sections["trainer"].get("per_device_eval_batch_size", 64)
    if not isinstance(batch, int) or batch < 1:
        raise UserError(f"trainer.per_device_eval_batch_size: {batch!r} must be a whole number above 0")
    token_set = prepared(data, tokenizer).held_out() if own_text else tokens.prepare(data.text, tokenizer, 0.0)
    start = getattr(checkpoint_config, "decoder_start_token_id", None)
    vocab = token_set.vocab(start)
    model = models.prepare(models.build({"from": checkpoint}, vocab, objective, data.seq_length, 0))
    stream = Stream(token_set, objective, data.seq_length, seed=0, length=None, start=start)
    values = held_out(model, stream, Collator(objective, data.seq_length, family, vocab.pad), batch)
    if not values["labels"]:
        raise UserError(f"data.text: {sections['objective']['name']} asks for no token of this text; it is too short to measure anything")
    metrics = (output.read_json(folder / "metrics.json") or {}) | {"held_out": result(values) | {"text": "held out" if own_text else data.text}}
    if folder.is_dir():
        output.write_json(folder / "metrics.json", metrics)
    return metrics


def minimal_pairs(checkpoint: str, path: str) -> dict[str, Any]:
    """Which sentence of each minimal pair a checkpoint prefers; written into its metrics.json as `minimal_pairs`.

    Args:
        path: records with `sentence_good`, `sentence_bad` and, where there are several phenomena, `UID`.
    """
    from tqdm import tqdm

    from lmssl import likelihood, models
    from lmssl.data import corpus

    folder = Path(checkpoint)
    checkpoint_config = models.read_config(checkpoint, "CHECKPOINT")
    family, tokenizer = models.family_of(checkpoint_config), tokenization.load(checkpoint)
    records = [record for source in corpus.resolve(path, "--pairs") for record in corpus.records(source)]
    names, hint = ("sentence_good", "sentence_bad"), "minimal pairs have the columns of BLiMP: sentence_good, sentence_bad, UID"
    pairs = [(*(corpus.text_of(r, name, where, hint) for name in names), str(r.get("UID", "all"))) for r, where in records]
    if not pairs:
        raise UserError(f"--pairs: {path} holds no pair")
    model = models.AUTO[family].from_pretrained(checkpoint, use_safetensors=True, trust_remote_code=False).float()
    vocab = tokenizer.vocab(getattr(checkpoint_config, "decoder_start_token_id", None))
    begin = 1 if "bos" in tokenizer.roles else 0
    ids = [row[begin:-1] for row in tokenizer.encode([text for good, bad, _ in pairs for text in (good, bad)])]
    room = (models.max_length(checkpoint_config) or 2**31) - 2
    if too_long := next((n for n, row in enumerate(ids) if len(row) > room), None):
        raise UserError(f"{records[too_long // 2][1]}: a sentence of {len(ids[too_long])} tokens; the checkpoint reads {room}")
    saved = config.load(folder / "recipe.yaml", (), PRETRAIN) if (folder / "recipe.yaml").is_file() else {}
    by = "mask" if saved.get("objective", {}).get("name") == "infilling" or checkpoint_config.model_type in ("bart", "mbart") else "sentinel"
    total = len(ids) if family == "decoder" else sum(map(len, ids))
    with tqdm(total=total, unit="row", disable=None, leave=False) as bar:
        values = likelihood.log_likelihoods(model, family, ids, vocab, by, bar.update)
    found = likelihood.preferred(values[::2], values[1::2], [kind for _, _, kind in pairs])
    if folder.is_dir():
        output.write_json(folder / "metrics.json", (output.read_json(folder / "metrics.json") or {}) | {"minimal_pairs": found})
    return found
