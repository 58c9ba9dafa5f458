"""Embeddings whose gradient is summed in a fixed order, also by compiled code on a GPU.

torch.compile has the backward pass of a lookup add in the order that threads arrive in. Torch's switch for deterministic algorithms sorts first,
but has one thread add up all gradients of a row, of which BERT's token types and T5's relative positions have two and 32, and
slows down every matrix product (docs/decisions/0023). Eager torch sorts and adds in parts; here compiled code calls that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.library.custom_op("lmssl::lookup_gradient", mutates_args=())
def lookup_gradient(grad: Tensor, ids: Tensor, rows: int, padding: int) -> Tensor:
    """[rows, D]: the sum of the gradients [..., D] of each id; none for `padding`."""
    return torch.ops.aten.embedding_dense_backward(grad, ids, rows, padding, False)


@lookup_gradient.register_fake
def _(grad: Tensor, ids: Tensor, rows: int, padding: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[-1])


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding = len(weight), padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return lookup_gradient(grads[0], ids, ctx.rows, ctx.padding), None, None


class InOrder(nn.Embedding):
    """`nn.Embedding`, its gradient by `lookup_gradient`."""

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            return super().forward(input)
        return _Lookup.apply(self.weight, input, -1 if self.padding_idx is None else self.padding_idx)


def in_order(model: nn.Module) -> None:
    """Have every embedding of a model sum its gradient in a fixed order; once is enough."""
    for module in model.modules():
        kind = type(module)
        if isinstance(module, nn.Embedding) and not isinstance(module, InOrder):
            # Of a class that scales what it looks up: its own forward pass, then ours in the place of nn.Embedding's.
            module.__class__ = InOrder if kind is nn.Embedding else type(kind.__name__, (kind, InOrder), {"__module__": kind.__module__})
