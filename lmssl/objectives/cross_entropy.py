"""The one loss of every objective and task, over a summed cross-entropy that never holds a float32 copy of the logits, or, where it projects to them itself, no logits at all.

On a CPU the arithmetic goes through the logits in parts that its caches hold. On a GPU two kernels that torch compiles do it, each of
which reads the logits once or twice and keeps what is between in registers; where torch cannot compile, larger parts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmssl import machine
from lmssl.objectives.base import IGNORE

CHUNK = {"cpu": 2**20, "cuda": 2**26}
"""Logits worked on in float32 at a time: on a CPU 4 MiB, which the caches of a few cores hold."""
PROJECTED, FEWEST = {"cpu": 2**22, "cuda": 2**28}, 128
"""Logits projected at a time, on a CPU 8 MiB in bfloat16; but FEWEST rows at least, fewer make poor matrix products."""
LOGITS = 2**28
"""Logits held whole at a time, at most, where nothing is trained: 1 GiB in float32."""
ALIGNED = {"cpu": 1, "cuda": 64}
"""Columns that logits are filled up to a multiple of: a GPU multiplies matrices of odd sizes at a third of its speed."""
LOG2E = 1 / math.log(2)
"""Exponentials are taken to base 2: on a CPU torch's `exp2` takes a third of the time of its `exp`, for the same digits."""


def _kind(device: torch.device) -> str:
    """Whose sizes above a device takes."""
    return "cpu" if device.type == "cpu" else "cuda"


def _chunk_rows(logits: Tensor) -> int:
    """Rows of logits that are worked on at a time."""
    return max(1, CHUNK[_kind(logits.device)] // logits.shape[-1])


def _log_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [N, 1] twice: the log probability of each target, and the logarithm of what its row is divided by."""
    wide = logits.float()
    norm = wide.logsumexp(-1, keepdim=True)
    return wide.gather(-1, targets) - norm, norm


def _slopes(logits: Tensor, norm: Tensor, targets: Tensor, factors: Tensor) -> Tensor:
    """[N, V] factor * (softmax - onehot), in the type of the logits."""
    onehot = torch.arange(logits.shape[-1], device=logits.device) == targets
    return (((logits.float() - norm).exp() - onehot.float()) * factors).to(logits.dtype)


def _to_slopes(logits: Tensor, columns: int, targets: Tensor, factors: Tensor, into: Tensor) -> None:
    """As `_to_gradients`, in one go; what is beyond `columns` counts for nothing and becomes 0. Of logits without those, each row would begin
    somewhere else in memory, and a GPU could not read several numbers at a time."""
    inside = logits if columns == logits.shape[-1] else torch.where(torch.arange(logits.shape[-1], device=logits.device) < columns, logits, -torch.inf)
    found, norm = _log_probabilities(inside, targets)
    into.copy_(found)
    logits.copy_(_slopes(inside, norm, targets, factors))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    machine.same_bits("cuda")  # here, since what the probe compiles before there is a trainer is kept for the run, and a run that is not compiled has this
    return torch.compile(function)


_compiles = functools.cache(machine.compiles)


def _fused(tensor: Tensor) -> bool:
    """Whether the arithmetic is left to kernels that torch compiles."""
    return tensor.is_cuda and _compiles("cuda")


class _SummedCrossEntropy(torch.autograd.Function):
    """Forward keeps the logits as they came and one number a row; backward writes softmax - onehot chunk by chunk.

    The arithmetic is float32 throughout; only the gradient is rounded, to the type of the logits, as any matrix
    product before it would round it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        asked = labels != IGNORE
        at = labels.clamp(min=0).unsqueeze(-1)
        if _fused(logits):
            found, norm = _compiled(_log_probabilities)(logits, at)
            ctx.save_for_backward(logits, labels, norm)
            return torch.where(asked, -found.squeeze(-1), 0.0).sum()
        rows = _chunk_rows(logits)
        # One fused kernel a chunk; what it finds for the label gives the normaliser back.
        found = torch.cat([part.log_softmax(-1, dtype=torch.float32).gather(-1, target) for part, target in zip(logits.split(rows), at.split(rows), strict=True)])
        ctx.save_for_backward(logits, labels, logits.gather(-1, at).float() - found)
        return torch.where(asked, -found.squeeze(-1), 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, labels, normaliser = ctx.saved_tensors
        rows = _chunk_rows(logits)
        scale = torch.where(labels != IGNORE, grads[0], 0.0).float().unsqueeze(-1)
        if _fused(logits):
            return _compiled(_slopes)(logits, normaliser, labels.clamp(min=0).unsqueeze(-1), scale), None
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
    rows = _chunk_rows(logits) if wide is None else len(wide)
    for part, target, factor, found in zip(*(t.split(rows) for t in (logits, targets, factors, into)), strict=True):
        slope = part if wide is None else wide[: len(part)].copy_(part)
        slope.sub_(slope.amax(-1, keepdim=True)).mul_(LOG2E)  # in this order: what is large is gone before anything is rounded
        picked = slope.gather(-1, target)
        total = slope.exp2_().sum(-1, keepdim=True)
        torch.div(picked - total.log2(), LOG2E, out=found)
        slope.mul_(factor / total).scatter_add_(-1, target, -factor)
        if slope is not part:
            part.copy_(slope)


def _filled_up(weight: Tensor, multiple: int) -> Tensor:
    """A matrix with rows of zeros behind the last, up to a multiple of so many."""
    missing = -len(weight) % multiple
    return torch.nn.functional.pad(weight, (0, 0, 0, missing)) if missing else weight


def _rows_at_a_time(rows: int, columns: int, device: torch.device) -> int:
    """Rows projected at a time; on a GPU all parts alike where that can be had, since each other shape is compiled anew."""
    most = max(FEWEST, PROJECTED[_kind(device)] // columns)
    if device.type == "cpu":
        return min(rows, most)
    parts = max(1, -(-rows // most))
    return -(-rows // next((n for n in range(parts, 2 * parts) if rows % n == 0), parts))


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward projects some rows, takes their loss and its gradient, and forgets their logits; backward scales the gradients.

    The products are those of a projection of all rows at once, no more and no fewer.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            x, b = hidden.to(dtype), None if bias is None else bias.to(dtype)
            columns, fused = len(weight), _fused(x)
            w = _filled_up(weight.to(dtype), ALIGNED[_kind(x.device)])
            at, asked = labels.clamp(min=0).unsqueeze(-1), (labels != IGNORE).float().unsqueeze(-1)
            rows = _rows_at_a_time(len(x), columns, x.device)
            # Blocks that every part uses again: freed and asked for again, those of this size would leave holes in the heap.
            block = torch.empty(rows, len(w), dtype=dtype, device=x.device)
            wide = None if fused or dtype == torch.float32 else torch.empty(min(rows, _chunk_rows(block)), columns, device=x.device)
            product = None if dtype == weight.dtype and len(w) == columns else torch.empty_like(w)
            to_hidden, to_weight, to_bias = torch.empty_like(x), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
            found = torch.empty_like(asked)
            for part, target, factor, into, loss in zip(*(t.split(rows) for t in (x, at, asked, to_hidden, found)), strict=True):
                filled = block[: len(part)]
                logits = filled[:, :columns]  # what is beyond is 0, and stands against rows of zeros
                torch.mm(part, w.mT, out=filled)
                if b is not None:
                    logits += b
                if fused:
                    _compiled(_to_slopes)(filled, columns, target, factor, loss)
                else:
                    _to_gradients(logits, target, factor, loss, wide)
                if to_bias is not None:
                    to_bias += logits.sum(0, dtype=torch.float32)
                torch.mm(filled, w, out=into)
                if product is None:
                    to_weight.addmm_(logits.mT, part)
                else:
                    to_weight += torch.mm(filled.mT, part, out=product)[:columns]
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


@dataclass(frozen=True)
class Unprojected:
    """Output of a model that left its vocabulary projection to the loss: hidden [..., D], weight [V, D], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | float | None = None) -> Tensor:
    """The one loss of every objective and task: summed cross-entropy over labelled tokens / their number.

    A sum divided by the count over the whole optimizer step (every micro-batch, every rank), so that the split of a
    batch never changes its gradient. A mean of means is wrong as soon as two micro-batches hold different counts.

    Args:
        outputs: a model output with `logits`, float [..., C]; or `Unprojected`.
        labels: int64, as many as there are rows of logits, -100 where nothing is asked. Decoder labels are already
            aligned with the logits that predict them.
        num_items_in_batch: labelled tokens of the whole optimizer step; None counts those at hand.

    Returns:
        A float32 scalar.
    """
    labels = labels.reshape(-1)
    if isinstance(outputs, Unprojected):
        total = linear_cross_entropy(outputs.hidden.reshape(labels.numel(), -1), outputs.weight, outputs.bias, labels)
    else:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        total = summed_cross_entropy(logits.reshape(labels.numel(), -1), labels)
    return total / ((labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch)
