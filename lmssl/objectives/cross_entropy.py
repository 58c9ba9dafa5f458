"""Summed cross-entropy that never holds a float32 copy of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmssl.objectives.base import IGNORE

CHUNK = 2**19
"""Logits widened to float32 at a time: 2 MiB, which a core's cache holds."""


class _SummedCrossEntropy(torch.autograd.Function):
    """Forward keeps the logits as they came and one number a row; backward writes softmax - onehot chunk by chunk.

    The arithmetic is float32 throughout; only the gradient is rounded, to the type of the logits, as any matrix
    product before it would round it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        rows = max(1, CHUNK // logits.shape[-1])
        normaliser = torch.cat([torch.logsumexp(part.float(), -1) for part in logits.split(rows)])
        asked = labels != IGNORE
        picked = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).float()
        ctx.save_for_backward(logits, labels, normaliser)
        return torch.where(asked, normaliser - picked, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, labels, normaliser = ctx.saved_tensors
        rows = max(1, CHUNK // logits.shape[-1])
        scale = torch.where(labels != IGNORE, grads[0], 0.0).float().unsqueeze(-1)
        out = torch.empty_like(logits)
        parts = zip(logits.split(rows), labels.split(rows), normaliser.split(rows), scale.split(rows), out.split(rows), strict=True)
        for part, target, norm, factor, into in parts:
            slope = (part.float() - norm.unsqueeze(-1)).exp_()
            at = target.clamp(min=0).unsqueeze(-1)
            slope.scatter_add_(-1, at, torch.full_like(at, -1.0, dtype=slope.dtype))
            into.copy_(slope.mul_(factor))
        return out, None


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of -log softmax(logits)[label].

    Args:
        logits: float32 or bfloat16 [N, C].
        labels: int64 [N]; -100 adds nothing.

    Returns:
        A float32 scalar; equal to `F.cross_entropy(logits.float(), labels, reduction="sum")` to rounding.
    """
    return _SummedCrossEntropy.apply(logits, labels)
