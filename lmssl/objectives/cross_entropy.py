"""Summed cross-entropy that never holds a float32 copy of the logits, or, where it projects to them itself, no logits at all."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lmssl.objectives.base import IGNORE

CHUNK = 2**20
"""Logits worked on in float32 at a time: 4 MiB, which the caches of a few cores hold."""
PROJECTED, FEWEST = 2**22, 128
"""Logits projected at a time: 8 MiB in bfloat16; but FEWEST rows at least, fewer make poor matrix products."""
LOG2E = 1 / math.log(2)
"""Exponentials are taken to base 2: on a CPU torch's `exp2` takes a third of the time of its `exp`, for the same digits."""


def _chunk_rows(columns: int) -> int:
    """Rows of so many logits that are worked on at a time."""
    return max(1, CHUNK // columns)


class _SummedCrossEntropy(torch.autograd.Function):
    """Forward keeps the logits as they came and one number a row; backward writes softmax - onehot chunk by chunk.

    The arithmetic is float32 throughout; only the gradient is rounded, to the type of the logits, as any matrix
    product before it would round it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        rows = _chunk_rows(logits.shape[-1])
        asked = labels != IGNORE
        at = labels.clamp(min=0).unsqueeze(-1)
        # One fused kernel a chunk; what it finds for the label gives the normaliser back.
        found = torch.cat([part.log_softmax(-1, dtype=torch.float32).gather(-1, target) for part, target in zip(logits.split(rows), at.split(rows), strict=True)])
        ctx.save_for_backward(logits, labels, logits.gather(-1, at).float() - found)
        return torch.where(asked, -found.squeeze(-1), 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, labels, normaliser = ctx.saved_tensors
        rows = _chunk_rows(logits.shape[-1])
        scale = torch.where(labels != IGNORE, grads[0], 0.0).float().unsqueeze(-1)
        out = torch.empty_like(logits)
        parts = zip(logits.split(rows), labels.clamp(min=0).unsqueeze(-1).split(rows), normaliser.split(rows), scale.split(rows), out.split(rows), strict=True)
        for part, at, norm, factor, into in parts:
            slope = torch.sub(part, norm, out=into) if into.dtype == torch.float32 else part.float().sub_(norm)
            slope.mul_(LOG2E).exp2_().mul_(factor).scatter_add_(-1, at, -factor)
            if slope is not into:
                into.copy_(slope)
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


def _to_gradients(logits: Tensor, targets: Tensor, factors: Tensor, into: Tensor, wide: Tensor | None) -> None:
    """[N, V] logits become factor * (softmax - onehot) where they stand; `into` [N, 1] takes the log probability of each target.

    Args:
        wide: float32 [R, V], room to work in on R rows at a time; None where the logits are float32.
    """
    rows = _chunk_rows(logits.shape[-1]) if wide is None else len(wide)
    for part, target, factor, found in zip(*(t.split(rows) for t in (logits, targets, factors, into)), strict=True):
        slope = part if wide is None else wide[: len(part)].copy_(part)
        slope.sub_(slope.amax(-1, keepdim=True)).mul_(LOG2E)  # in this order: what is large is gone before anything is rounded
        picked = slope.gather(-1, target)
        total = slope.exp2_().sum(-1, keepdim=True)
        torch.div(picked - total.log2(), LOG2E, out=found)
        slope.mul_(factor / total).scatter_add_(-1, target, -factor)
        if slope is not part:
            part.copy_(slope)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward projects some rows, takes their loss and its gradient, and forgets their logits; backward scales the gradients.

    The products are those of a projection of all rows at once, no more and no fewer.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            x, w, b = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            at, asked = labels.clamp(min=0).unsqueeze(-1), (labels != IGNORE).float().unsqueeze(-1)
            rows = min(len(x), max(FEWEST, PROJECTED // len(w)))
            # Blocks that every part uses again: freed and asked for again, those of this size would leave holes in the heap.
            block = torch.empty(rows, len(w), dtype=dtype, device=x.device)
            wide = None if dtype == torch.float32 else torch.empty(min(rows, _chunk_rows(len(w))), len(w), device=x.device)
            product = None if dtype == weight.dtype else torch.empty_like(w)
            to_hidden, to_weight, to_bias = torch.empty_like(x), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
            found = torch.empty_like(asked)
            for part, target, factor, into, loss in zip(*(t.split(rows) for t in (x, at, asked, to_hidden, found)), strict=True):
                logits = block[: len(part)]
                torch.mm(part, w.mT, out=logits)
                if b is not None:
                    logits += b
                _to_gradients(logits, target, factor, loss, wide)
                if to_bias is not None:
                    to_bias += logits.sum(0, dtype=torch.float32)
                torch.mm(logits, w, out=into)
                if product is None:
                    to_weight.addmm_(logits.mT, part)
                else:
                    to_weight += torch.mm(logits.mT, part, out=product)
            ctx.save_for_backward(to_hidden, to_weight, to_bias)
            return torch.where(asked > 0, -found, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_weight, to_bias = (found * grads[0] if wanted else None for found, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False))
        return to_hidden, to_weight, to_bias, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """`summed_cross_entropy` of `F.linear(hidden, weight, bias)`, holding the logits of some rows at a time.

    Under autocast the products are in its type, as those of `F.linear` are.

    Args:
        hidden: [N, D].
        weight: float32 [V, D].
        bias: float32 [V] or None.
        labels: int64 [N]; -100 adds nothing.

    Returns:
        A float32 scalar.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, dtype)
