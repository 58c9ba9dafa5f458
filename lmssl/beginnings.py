"""Where a new model begins: embeddings that already know which tokens keep which company.

Counting tells in seconds what a model otherwise learns in its first million tokens: words that stand in the same
places are alike. A factorisation of positive pointwise mutual information does the same as word2vec's skip-grams with
negative sampling (Levy and Goldberg 2014), and a new model's embeddings begin there, in place of noise of the same size.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from torch import Tensor

from lmssl.data.tokens import TokenSet

log = logging.getLogger("lmssl")

BLOCK, MOST_BLOCKS = 2**16, 32
"""Tokens are counted in so many blocks of this size, spread evenly over the text: 2.1 million at most."""
WINDOW = 4
"""Tokens to either side that are a token's company; one at distance d counts 1 / d."""
COLUMNS, CELLS = 2048, 2**28
"""Of the table of counts, at most: a larger vocabulary has columns for its most frequent tokens alone, and 1 GB in all."""
SMOOTHING = 0.75
"""Power of the columns' counts: without it rare company counts for too much (Levy, Goldberg and Dagan 2015, Q15-1016)."""
LOGITS, MOST_SIZE = 16.0, 0.25
"""Width times root mean square of the embeddings, at least, up to a root mean square of MOST_SIZE: what the usual 0.02 is
at a width of 768. A narrow model's logits would otherwise begin too small by as much as it is narrower (docs/log.md)."""
MOST_RANK = 512
"""Components of the factorisation, at most; wider embeddings hold them in a random subspace."""


@torch.no_grad()
def begin_from_text(model: Any, tokens: TokenSet, seed: int = 0) -> None:
    """Set a new model's embeddings by the company that tokens keep, and its output biases to their log frequencies.

    Rows keep the size that the architecture draws them with, but LOGITS / width at least (MOST_SIZE at most); tokens that the text does not hold keep
    their noise, at the same size.

    Args:
        model: a PreTrainedModel; its input embeddings have a row for each id of the tokenizer.
        tokens: the training documents.
        seed: of the factorisation's start and of the rotation that spreads it over the coordinates.
    """
    begun = time.perf_counter()
    weight = model.get_input_embeddings().weight
    counts, total = cooccurrences(tokens, weight.shape[0])
    found = embeddings(counts, weight.shape[1], seed).to(weight)
    # A token may have been seen in no company beyond chance: it keeps its noise as well.
    seen, size = (total > 0).to(weight.device) & found.any(1), weight.square().mean().sqrt()
    wanted = size.clamp(min=min(LOGITS / weight.shape[1], MOST_SIZE))
    weight *= wanted / size
    weight[seen] = found[seen] * wanted
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        share = (total + 0.5) / (total + 0.5).sum()
        head.bias.copy_((share * len(share)).log())
    log.info("embeddings initialised from co-occurrence counts: %.1f s", time.perf_counter() - begun)


def cooccurrences(tokens: TokenSet, size: int) -> tuple[Tensor, Tensor]:
    """How often tokens stand near each other, never across the border of two documents.

    Args:
        size: rows of the table: ids of the vocabulary.

    Returns:
        float32 [V, C]: of each id with each of the C most frequent ids, WINDOW to either side, weighted 1 / distance;
        float32 [V]: how often each id was counted.
    """
    blocks = tokens.rows(BLOCK)
    taken = min(blocks, MOST_BLOCKS)
    rows = [tokens.row(k * blocks // taken, BLOCK, 0) for k in range(taken)]
    ids, segments = (torch.stack([torch.from_numpy(getattr(row, name)).long() for row in rows]) for name in ("ids", "segments"))
    total = torch.bincount(ids[segments > 0], minlength=size).float()
    columns = min(size, COLUMNS, max(1, CELLS // size))
    # Stable, so that tokens of one frequency always come in one order.
    place = torch.full((size,), -1).scatter_(0, total.argsort(descending=True, stable=True)[:columns], torch.arange(columns))
    counts = torch.zeros(size * columns)
    for distance in range(1, WINDOW + 1):
        left, right = ids[:, :-distance], ids[:, distance:]
        together = (segments[:, :-distance] == segments[:, distance:]) & (segments[:, distance:] > 0)
        for a, b in ((left[together], right[together]), (right[together], left[together])):
            at = place[b]
            cells = (a * columns + at)[at >= 0]
            counts.index_add_(0, cells, torch.full((len(cells),), 1 / distance))
    return counts.view(size, columns), total


def embeddings(counts: Tensor, width: int, seed: int) -> Tensor:
    """float32 [V, width], rows with a root mean square of 1: left singular vectors of the positive pointwise mutual
    information, each times the square root of its singular value.

    Args:
        counts: float32 [V, C]; is used up.
    """
    rows, columns = counts.sum(1), counts.sum(0) ** SMOOTHING
    columns /= columns.sum()
    pmi = counts.log_().sub_(rows.clamp(min=1e-9).log()[:, None]).sub_(columns.clamp(min=1e-9).log()).clamp_(min=0)
    rank = min(width, MOST_RANK, *pmi.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, _ = torch.svd_lowrank(pmi, min(rank + 16, *pmi.shape), niter=2)
        rotation = torch.linalg.qr(torch.randn(width, width))[0][:rank]
    return torch.nn.functional.normalize(u[:, :rank] * s[:rank].sqrt(), dim=1, eps=1e-6) @ rotation * math.sqrt(width)
