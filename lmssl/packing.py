"""Documents packed into one row, and attention that keeps them apart: masks everywhere, variable-length kernels on a GPU.

On a GPU a mask rules FlashAttention out, so there each document is a sequence of its own to the kernel (torch's
`varlen_attn`), registered with transformers as an attention implementation beside its others. Whatever the kernel does not
do (float32, dropout, sliding windows, biases, short of compute capability 8.0) takes the mask, which is always there.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lmssl import machine
from lmssl.data.stream import Collator, Stream
from lmssl.objectives.base import Family

BEFORE, BOTH = "lmssl_varlen_causal", "lmssl_varlen"
"""Names of the attention implementation: a token sees what stands before it, or on both sides."""
MASKED = ("position_bias", "sliding_window", "softcap", "s_aux")
"""What an attention layer may ask beside scaling and dropout, and this kernel is not asked for."""
WIDEST = 256
"""Of a head, in FlashAttention."""
TILE, MOST = 128, 16
"""Rows of queries that the kernel keeps for each document, at least, and for each token, at most."""


def same_document(queries: Tensor, keys: Tensor) -> Tensor:
    """bool [B, 1, Lq, Lk]: query and key stand in the same document; a query without any key may see them all."""
    allowed = queries[:, None, :, None] == keys[:, None, None, :]
    # Decoder padding has no partner where the encoder row is full; a row of softmax with no entry would be NaN.
    return allowed | ~allowed.any(-1, keepdim=True)


def additive(allowed: Tensor) -> Tensor:
    """0 where allowed, else the most negative number that float32 and bfloat16 both hold."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, torch.finfo(torch.bfloat16).min)


def positions_within(segments: Tensor) -> Tensor:
    """int64 [B, L]: each token's position in its own document: 0 1 2 0 1 for segments 1 1 1 2 2."""
    at = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return at - torch.where(first, at, 0).cummax(1).values


def collator(stream: Stream, seq_length: int, family: Family, device: torch.device, lengths: dict[str, tuple[int, ...]] | None = None) -> Collator:
    """What makes the batches of a stream on a device, with `borders` where attention takes them; `lengths` as `Collator`."""
    return Collator(stream.objective, seq_length, family, stream.vocab.pad, most_documents(stream, family, device), lengths)


def most_documents(stream: Stream, family: Family, device: torch.device) -> int | None:
    """Documents in a row of a stream, at most, where attention takes each as a sequence of its own; None where it takes the mask: on a CPU, with
    an encoder and a decoder, and where a row may hold so many documents that the kernel's memory, a tile for each, outgrows what it saves."""
    if device.type != "cuda" or family == "encoder-decoder" or not supported():
        return None
    most = stream.most_documents()
    return most if most * TILE <= MOST * stream.row_length else None


def supported() -> bool:
    """Whether this machine's GPU has FlashAttention in torch."""
    return torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def use_kernel(model: PreTrainedModel, causal: bool) -> None:
    """Have a model's attention use the borders of documents where a call has them, unless it has another implementation than transformers' first choice."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation() and not _windows_in_masks(model):
        model.set_attn_implementation(BEFORE if causal else BOTH)


def _windows_in_masks(model: PreTrainedModel) -> bool:
    """Whether some layers see less than a document, and say so by their mask alone (qwen2_moe, phimoe), which a kernel without masks would not see."""
    partly = any(kind != "full_attention" for kind in getattr(model.config, "layer_types", None) or ()) or bool(getattr(model.config, "sliding_window", None))
    return partly and "sliding_window=" not in inspect.getsource(sys.modules[type(model).__module__])


def handed_on(borders: Tensor | None, length: int) -> dict[str, Any]:
    """What transformers' models hand on to their attention, under its own names for it."""
    if borders is None:
        return {}
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": length, "max_length_k": length}


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    causal: bool,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention implementation as transformers calls it: query, key and value [B, H, L, D] -> [B, L, H, D]."""
    autocast, dtype, width = torch.is_autocast_enabled(query.device.type), torch.get_autocast_dtype(query.device.type), query.shape[-1]
    asks_more = dropout or any(others.get(name) is not None for name in MASKED) or key.shape[2] != query.shape[2]
    asks_more = asks_more or (attention_mask is not None and attention_mask.shape[1] != 1)  # each head has its own (doge)
    if cu_seq_lens_q is None or asks_more or not autocast or width % 8 or width > WIDEST or value.shape[-1] != width:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others)
    groups = query.shape[1] // key.shape[1]
    # Positions by rotation leave queries and keys in float32; autocast narrows them for torch's own attention, and knows nothing of this one.
    q, k, v = (states.to(dtype).transpose(1, 2).reshape(-1, query.shape[1], width) for states in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=(-1, 0) if causal else (-1, -1))
    return out.view(query.shape[0], query.shape[2], -1, width), None  # type: ignore[union-attr]


def _products(query: Tensor, starts: Tensor, causal: bool, count: int) -> int:
    """FLOPs of so many L x L x d products a head of each document; half of each where a token sees only what stands before it."""
    squares = starts.diff().double().square().sum().item()
    return int(2 * count * query.shape[1] * query.shape[2] * squares / (2 if causal else 1))


def _forward_flops(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, ends: Tensor, longest: int, longest_key: int, causal: bool = False, *rest: Any, **more: Any) -> int:
    return _products(query, starts, causal, 2)


def _backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, starts: Tensor, *rest: Any, **more: Any) -> int:
    return _products(query, starts, bool(rest[3]), 5)  # its other arguments stand as forward's do; one of forward's products is taken anew


_forward_flops._get_raw = _backward_flops._get_raw = True  # type: ignore[attr-defined]
for _name, _causal in ((BEFORE, True), (BOTH, False)):
    AttentionInterface.register(_name, partial(attend, causal=_causal))
    AttentionMaskInterface.register(_name, sdpa_mask)
machine.COUNTED |= {torch.ops.torch_attn._varlen_attn: _forward_flops, torch.ops.torch_attn._varlen_attn_backward: _backward_flops}
