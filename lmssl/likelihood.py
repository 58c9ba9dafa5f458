"""How likely a pretrained model finds a text, and minimal pairs: which of two sentences it prefers.

* decoders: the log-likelihood of the tokens after bos (eos where there is none), as lm-eval counts it.
* encoders: the pseudo-log-likelihood of Salazar et al. 2020 (arXiv:1910.14659): each token masked alone, its
  log-probability summed.
* encoder-decoders: the same with one token at a time replaced, by a sentinel where the model was pretrained with span
  corruption (the decoder then writes that span), by the mask where it was pretrained with infilling (the decoder
  then writes the whole text, and the replaced token is scored).

Minimal pairs: BLiMP (Warstadt et al. 2020, arXiv:1912.00582). A tie counts as half, never as right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmssl.errors import UserError
from lmssl.objectives.base import Family, Vocab
from lmssl.objectives.cross_entropy import LOGITS

TIE = 1e-5
"""Nats: log-likelihoods closer than this are a tie."""
TOKENS = 2**14
"""Input tokens of one batch, padding included."""

Query = tuple[list[int], list[int], int, int]
"""(input ids, decoder ids or [], position whose logits are read, token looked up) of one question to the model."""


@torch.no_grad()
def log_likelihoods(model: Any, family: Family, ids: Sequence[np.ndarray], vocab: Vocab, by: str = "sentinel", on_rows: Callable[[int], Any] = lambda n: None) -> np.ndarray:
    """Log-likelihood (pseudo, but for decoders) of each text in nats, float64 [N].

    Args:
        model: the pretrained model with its language-modelling head.
        family: of it.
        ids: token ids of each text, no special token around them.
        vocab: of its tokenizer.
        by: encoder-decoders: "sentinel" or "mask".
        on_rows: called with the number of rows done, for progress.

    Raises:
        UserError: a tokenizer without the mask or sentinel that this family needs.
    """
    model.eval()
    rows: list[Query] = []
    owners: list[int] = []
    make = {"decoder": _causal, "encoder": _masked, "encoder-decoder": _sentinel if by == "sentinel" else _infilled}[family]
    for number, text in enumerate(ids):
        made = make(text.tolist(), vocab)
        rows += made
        owners += [number] * len(made)
    totals = np.zeros(len(ids))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    while order:
        take = max(1, min(TOKENS, LOGITS // vocab.size) // max(map(len, rows[order[0]][:2])))
        batch, order = order[:take], order[take:]
        values = _score(model, [rows[i] for i in batch], vocab.pad, causal=family == "decoder")
        np.add.at(totals, [owners[i] for i in batch], values)
        on_rows(len(batch))
    return totals


def _score(model: Any, rows: list[Query], pad: int, causal: bool) -> np.ndarray:
    inputs = _padded([r[0] for r in rows], pad, model.device)
    if rows[0][1]:
        inputs["decoder_input_ids"] = _padded([r[1] for r in rows], pad, model.device)["input_ids"]
    logits = model(**inputs).logits.float()
    if causal:
        targets = inputs["input_ids"][:, 1:].unsqueeze(-1)
        each = logits[:, :-1].log_softmax(-1).gather(-1, targets).squeeze(-1).double()
        return (each * inputs["attention_mask"][:, 1:]).sum(1).cpu().numpy()
    at, token = torch.tensor([r[2] for r in rows], device=model.device), torch.tensor([r[3] for r in rows], device=model.device)
    here = logits[torch.arange(len(rows), device=model.device), at].log_softmax(-1)
    return here.gather(-1, token.unsqueeze(-1)).squeeze(-1).double().cpu().numpy()


def _padded(rows: list[list[int]], pad: int, device: Any) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _around(vocab: Vocab) -> list[int]:
    return [] if vocab.bos is None else [vocab.bos]


def _causal(text: list[int], vocab: Vocab) -> list[Query]:
    return [([vocab.eos if vocab.bos is None else vocab.bos, *text], [], 0, 0)]


def _masked(text: list[int], vocab: Vocab) -> list[Query]:
    if vocab.mask is None:
        raise UserError("the tokenizer has no mask token, which the pseudo-likelihood of an encoder needs")
    whole = [*_around(vocab), *text, vocab.eos]
    first = len(whole) - 1 - len(text)
    return [([*whole[:i], vocab.mask, *whole[i + 1 :]], [], i, whole[i]) for i in range(first, len(whole) - 1)]


def _sentinel(text: list[int], vocab: Vocab) -> list[Query]:
    if not len(vocab.sentinels):
        raise UserError("the tokenizer has no sentinels, which the pseudo-likelihood of this model needs")
    sentinel, begin = int(vocab.sentinels[0]), _around(vocab)
    return [([*begin, *text[:i], sentinel, *text[i + 1 :], vocab.eos], [vocab.start, sentinel], 1, token) for i, token in enumerate(text)]


def _infilled(text: list[int], vocab: Vocab) -> list[Query]:
    if vocab.mask is None:
        raise UserError("the tokenizer has no mask token, which the pseudo-likelihood of this model needs")
    begin = _around(vocab)
    whole = [*begin, *text, vocab.eos]
    decoder = [vocab.start, *whole[:-1]]
    return [([*begin, *text[:i], vocab.mask, *text[i + 1 :], vocab.eos], decoder, len(begin) + i, token) for i, token in enumerate(text)]


def preferred(good: np.ndarray, bad: np.ndarray, kinds: Sequence[str]) -> dict[str, Any]:
    """Accuracy on minimal pairs, a tie counted as half.

    Args:
        good, bad: log-likelihoods of both sentences of each pair.
        kinds: the phenomenon of each pair.

    Returns:
        {"pairs", "accuracy", "mean_by_phenomenon", "ties", "by_phenomenon": {name: accuracy}}.
    """
    tied = np.abs(good - bad) <= TIE
    points = np.where(tied, 0.5, (good > bad).astype(float))
    names = np.array(kinds)
    by_kind = {str(name): float(points[names == name].mean()) for name in np.unique(names)}
    return {
        "pairs": len(points),
        "accuracy": float(points.mean()),
        "mean_by_phenomenon": float(np.mean([*by_kind.values()])),
        "ties": int(tied.sum()),
        "by_phenomenon": by_kind,
    }
