"""Held-out loss and bits per byte: sums over labelled tokens, so that no batch size can move them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmssl.data.stream import Collator, Stream
from lmssl.objectives.base import IGNORE
from lmssl.objectives.cross_entropy import LOGITS


@torch.no_grad()
def held_out(
    model: nn.Module,
    stream: Stream,
    collator: Collator,
    batch_size: int,
    device: torch.device | str = "cpu",
    share: tuple[int, int] = (0, 1),
    reduce: Callable[[Tensor], Tensor] = lambda t: t,
) -> dict[str, float]:
    """Loss (nats a labelled token) and bits per byte over a whole stream.

    Bits per byte = summed NLL of the labelled tokens / ln 2 / UTF-8 bytes of those tokens (specials count 0): it
    compares runs with different tokenizers, within one objective.

    Args:
        model: prepared by `forward.prepare`.
        stream: of held-out text, `length=None`.
        batch_size: rows at a time, fewer where their logits would exceed LOGITS; has no influence on the result.
        share: (rank, world): this process takes every world-th batch.
        reduce: sums a float64 tensor over the processes.

    Returns:
        {"loss", "bits_per_byte", "labels", "rows"}.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    token_bytes = torch.from_numpy(stream.vocab.token_bytes)
    rank, world = share
    size = min(batch_size, max(1, LOGITS // (collator.most_labels * stream.vocab.size)))
    for begin in range(0, len(stream), size)[rank::world]:
        items = [stream[i] for i in range(begin, min(begin + size, len(stream)))]
        batch = collator(items)
        labels = batch.pop("labels")
        asked = labels != IGNORE
        outputs = model(**{k: v.to(device) for k, v in batch.items()})
        losses = nn.functional.cross_entropy(outputs.logits.reshape(len(labels), -1).float(), labels.to(device), ignore_index=IGNORE, reduction="none")
        sums += torch.tensor([losses.cpu().double().sum().item(), asked.sum().item(), token_bytes[labels[asked]].sum().item(), len(items)], dtype=torch.float64)
    model.train(training)
    nll, labels_seen, seen_bytes, rows = reduce(sums).tolist()
    return {
        "loss": nll / max(labels_seen, 1),
        "bits_per_byte": nll / math.log(2) / max(seen_bytes, 1),
        "labels": int(labels_seen),
        "rows": int(rows),
    }


def held_out_stream(stream_like: Stream, seq_length: int, start: int | None) -> Stream:
    """The held-out rows of a training stream: file order, a fixed seed, and the objective as it says that held-out text is measured."""
    return Stream(stream_like.tokens.held_out(), stream_like.objective.held_out(), seq_length, seed=0, length=None, start=start)
