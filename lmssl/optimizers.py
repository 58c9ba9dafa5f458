"""Muon for the matrices inside the model, AdamW for everything else, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmssl import machine

USUAL, LARGE = 0.02, 0.5
"""Root mean square of embeddings as most architectures draw them, and from where on they count as drawn from N(0, 1)."""


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW behind one optimizer: one learning rate, one schedule, one state.

    Muon orthogonalises the momentum of each weight matrix (Jordan et al. 2024); its update is scaled to AdamW's
    typical size (Liu et al. 2025, 2502.16982), so that both share one learning rate. Embeddings, the vocabulary
    projection, norms and biases take AdamW.

    The arithmetic is that of `torch.optim.Muon`, to the same bits (float32 where the hardware has no bfloat16), but matrices
    of one shape go through it together: one product of many small matrices instead of many small products (decision
    0015).

    Args:
        groups: parameter groups; each has `muon: bool` and `weight_decay`.
        lr: learning rate.
        betas, eps: of AdamW. Most rows of an embedding have no gradient in a small batch, so that the second moment must last
            until their token comes again (decision 0019).
        momentum: of Muon.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8, momentum: float = 0.9):
        for group in groups:
            own = {"momentum": momentum, "ns_coefficients": (3.4445, -4.775, 2.0315), "eps": 1e-7, "ns_steps": 5}
            group |= own if group["muon"] else {"betas": betas, "eps": eps}
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.found_inf: Tensor | None = None
        """A float32 scalar, 1 where a step is to leave everything as it is, without anybody waiting to see it: torch's own name for it."""
        self._link()

    def _link(self) -> None:
        """An AdamW for each group that takes it, which works on this optimizer's own group and state."""
        self._adamw: dict[int, torch.optim.AdamW] = {}
        for number, group in enumerate(self.param_groups):
            if not group["muon"]:
                part = torch.optim.AdamW(group["params"], lr=group["lr"], weight_decay=group["weight_decay"], fused=True)
                for key, value in part.param_groups[0].items():
                    group.setdefault(key, value)
                part.param_groups, part.state = [group], self.state
                self._adamw[number] = part

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss: Any = closure() if closure else None
        for number, group in enumerate(self.param_groups):
            if group["muon"]:
                self._muon(group)
            else:
                self._adamw[number].found_inf = self.found_inf  # type: ignore[attr-defined]
                self._adamw[number].step()
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        shapes: dict[torch.Size, list[Any]] = {}
        for p in group["params"]:
            if p.grad is not None:
                shapes.setdefault(p.shape, []).append(p)
        for shape, members in shapes.items():
            grads = [p.grad for p in members]
            for p in members:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
            buffers = [self.state[p]["momentum_buffer"] for p in members]
            kept: Any = 1.0
            if self.found_inf is not None:
                # A gradient that is its own momentum changes no momentum, and what comes of it is taken 0 times.
                kept = 1 - self.found_inf
                grads = [torch.where(self.found_inf > 0, buffer, grad) for buffer, grad in zip(buffers, grads, strict=True)]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))  # Nesterov's look ahead
            updates = orthogonalised(updates, group["ns_coefficients"], group["ns_steps"], group["eps"]).float()
            if self.found_inf is not None:
                updates *= kept
            torch._foreach_mul_(members, 1 - kept * (group["lr"] * group["weight_decay"]))
            torch._foreach_add_(members, updates.unbind(), alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def leaves_out(optimizer: Any) -> bool:
    """Whether an optimizer leaves a step out by itself where its `found_inf` is set."""
    return isinstance(optimizer, MuonAdamW) or (isinstance(optimizer, torch.optim.Adam) and all(group.get("fused") for group in optimizer.param_groups))


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """[N, A, B]: each matrix with singular values near 1, by the quintic Newton-Schulz iteration (Jordan et al. 2024).

    In bfloat16, or in float32 where the hardware does not multiply bfloat16 itself.
    """
    a, b, c = coefficients
    x, tall = matrices.to(torch.bfloat16 if machine.native_bf16(matrices.device.type) else torch.float32), matrices.shape[1] > matrices.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


def muon_groups(model: nn.Module, weight_decay: float, lr: float, sizes: Mapping[str, float] = {}) -> list[dict[str, Any]]:
    """Parameter groups: matrices inside the model for Muon; embeddings and projection, and all vectors, for AdamW.

    T5 draws its embeddings from N(0, 1), 50 times the usual size, and was trained by steps relative to the size of what
    they change (Adafactor; Shazeer and Stern 2018, 1804.04235, section 8). Such a matrix gets a learning rate larger by as much, and
    a weight decay smaller by as much. A matrix with a rate of its own (`lmssl_rate`, see models.begin_local) gets that share of the
    learning rate.

    Args:
        sizes: of `sizes_of`, when the model was new; a matrix that is not in it is measured as it is now.
    """
    others = _adamw_matrices(model)
    measured = [(p, sizes[n] if n in sizes else _size(p)) for n, p in others.items()]
    trained, outer = [p for p in model.parameters() if p.requires_grad], {id(p) for p in others.values()}
    inner = [p for p in trained if p.ndim == 2 and id(p) not in outer]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [
        {"params": inner, "muon": True, "weight_decay": weight_decay},
        {"params": [p for p, size in measured if size < LARGE and not hasattr(p, "lmssl_rate")], "muon": False, "weight_decay": weight_decay},
        {"params": vectors, "muon": False, "weight_decay": 0.0},
    ]
    for p, size in measured:
        if hasattr(p, "lmssl_rate"):
            groups.append({"params": [p], "muon": False, "lr": lr * p.lmssl_rate, "weight_decay": 0.0})
        elif size >= LARGE:
            groups.append({"params": [p], "muon": False, "lr": lr * size / USUAL, "weight_decay": weight_decay * USUAL / size})
    return [g for g in groups if g["params"]]


def outer_parameters(model: nn.Module) -> set[int]:
    """The `id` of every parameter of the embeddings and the vocabulary projection; all others are inside the model."""
    outer = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return outer | ({id(p) for p in head.parameters()} if head is not None else set())


def sizes_of(model: nn.Module) -> dict[str, float]:
    """Root mean square of each matrix that AdamW takes, by name: what decides its group, for good, when a run begins."""
    return {name: _size(p) for name, p in _adamw_matrices(model).items()}


def _adamw_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, what is trained and no vector, but not Muon's either: embeddings, the vocabulary projection, tensors of more dimensions."""
    outer = outer_parameters(model)
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p.ndim >= 2 and (id(p) in outer or p.ndim > 2)}


def _size(p: Tensor) -> float:
    """Root mean square, to one digit, so that what chance adds to a matrix changes nothing."""
    return round(float(p.detach().float().square().mean().sqrt()), 1)
