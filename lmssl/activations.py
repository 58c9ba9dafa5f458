"""GELU's approximation by tanh, on a CPU in half the time: compiled without the tanh, else by torch's own kernel.

With u = sqrt(2 / pi) (x + 0.044715 x^3), 0.5 x (1 + tanh u) is x / (1 + exp(-2 u)). Of compiled code a tanh takes eight times as long there as a
power of two, and a step needs it twice for every number between the two layers of a feed-forward block.
Paper: Hendrycks and Gimpel 2016, 1606.08415.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

CUBIC = 0.044715
RATE = 2 * math.sqrt(2 / math.pi)
"""exp(-RATE * (x + CUBIC * x^3)) is what the approximation is made of."""
KINDS = (activations.NewGELUActivation, activations.GELUTanh)
"""transformers' classes for it."""


def _share(x: Tensor) -> Tensor:
    """How much of x is let through: in (0, 1)."""
    return 1 / (1 + torch.exp2(x * (-RATE / math.log(2) * (1 + CUBIC * x * x))))


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In a type; one that it has already is not asked for: torch 2.11 compiles a function that ends so without its gradient."""
    return x if x.dtype == dtype else x.to(dtype)


class _Gelu(torch.autograd.Function):
    """Keeps x alone; in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return _narrowed(wide * _share(wide), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        share = _share(wide)
        slope = share + wide * share * (1 - share) * (RATE * (1 + 3 * CUBIC * wide * wide))
        return _narrowed(grads[0] * slope, x.dtype)


class Gelu(nn.Module):
    """GELU, tanh approximation: [...] -> [...], in the type that comes."""

    def forward(self, input: Tensor) -> Tensor:
        return _Gelu.apply(input) if torch.compiler.is_compiling() else nn.functional.gelu(input, approximate="tanh")


def quicker(model: nn.Module, device: str) -> None:
    """Have a model compute its GELUs of this kind so where the device that trains it is a CPU; once is enough."""
    for module in model.modules():
        if device == "cpu" and type(module) in KINDS:
            module.__class__ = Gelu
