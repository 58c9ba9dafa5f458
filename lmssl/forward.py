"""The forward pass over packed rows.

`prepare(model)` hooks a model so that one call takes `segments` (document numbers) and `label_positions`: documents
packed together do not see each other, and the vocabulary is projected only where a label is. A call without them is
untouched, so the model stays the ordinary `PreTrainedModel` that `save_pretrained` writes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmssl import packing
from lmssl.errors import UserError, refused, said
from lmssl.models import family_of, position_offset
from lmssl.objectives.base import Vocab
from lmssl.objectives.cross_entropy import Unprojected
from lmssl.packing import additive, positions_within, same_document

LONGEST = 1024
"""Tokens of the rows, at most, in which documents are looked for that see each other."""


def prepare(model: PreTrainedModel, kernel: bool = False) -> PreTrainedModel:
    """Hook a model so that its call also takes `segments`, `decoder_segments`, `label_positions` and `skip_logits`; once is enough.

    Args:
        kernel: batches may hold `borders` (`packing.most_documents`), and attention is to use them.
    """
    if not hasattr(model, "_lmssl_packed"):
        packed = _Packed(model)
        head = model.get_output_embeddings()
        if head is None:
            raise UserError(f"model: {type(model).__name__} has no vocabulary projection")
        model.register_forward_pre_hook(packed.before_model, with_kwargs=True)
        head.register_forward_pre_hook(packed.before_head)
        if type(head) is nn.Linear:
            head.__class__, head.packed = _Head, packed  # type: ignore[assignment]
        model._lmssl_packed = packed
    if kernel:
        packing.use_kernel(model, model._lmssl_packed.family == "decoder")
    return model


@torch.no_grad()
def check_isolated(model: PreTrainedModel, vocab: Vocab, seq_length: int, kernel: bool = False) -> None:
    """Refuse an architecture in which documents packed into one row see each other: other tokens in the first of two
    documents must leave what is predicted in the second as it is. Of a decoder also one whose tokens see later ones.

    Args:
        model: prepared.
        vocab: of the tokenizer.
        seq_length: tokens that the model reads.
        kernel: as of `prepare`; then it is asked in bfloat16.

    Raises:
        UserError: they see each other, or the architecture takes no mask of who may see whom.
    """
    # Some look further back than a window, or at summaries of hundreds of tokens.
    half, kind, family = min(LONGEST, seq_length) // 2, model.config.model_type, family_of(model.config)
    if str(getattr(model.config, "_attn_implementation", "")).startswith("flash") and model.device.type == "cpu":
        return
    draw = np.random.default_rng(0).choice(vocab.ordinary, (3, 2 * half))
    draw[1, half:] = draw[0, half:]  # another first document
    draw[2] = draw[0]
    draw[2, -1] = vocab.ordinary[vocab.ordinary != draw[0, -1]][0]  # another last token
    ids = torch.from_numpy(draw.astype(np.int64)).to(model.device)
    segments = torch.tensor([[1] * half + [2] * half] * 3, device=model.device)
    more = {"decoder_input_ids": ids, "decoder_segments": segments} if family == "encoder-decoder" else {}
    more |= {"borders": torch.arange(0, 6 * half + 1, half, dtype=torch.int32, device=model.device)} if kernel else {}
    asked = np.unique(np.concatenate([np.linspace(0, 2 * half - 1, 64).astype(np.int64), [half, 2 * half - 2]]))
    at = torch.from_numpy(np.concatenate([asked + row * 2 * half for row in range(3)])).to(model.device)
    try:
        with evaluating(model), torch.autocast(model.device.type, torch.bfloat16, enabled=kernel):
            logits = model(input_ids=ids, segments=segments, label_positions=at, **more).logits.float()
    except Exception as error:
        raise UserError(f"model: this '{kind}' cannot read a row of packed documents: {said(error, 200)}") from error
    if logits.shape[0] != len(at):
        raise UserError(f"model.architecture: '{kind}' projects the vocabulary outside of its output embeddings (get_output_embeddings), so not at labels alone; take another")
    logits = logits.view(3, len(asked), -1)
    little, second = 1e-4 * logits.abs().max(), int(np.searchsorted(asked, half))
    if family == "decoder" and (logits[0, :-1] - logits[2, :-1]).abs().max() > little:
        raise UserError(f"model: tokens see later ones in this '{kind}' (bidirectional attention), so there is nothing to predict; next_token needs a causal decoder")
    if (logits[0, second:] - logits[1, second:]).abs().max() > little:
        raise UserError(
            f"model: documents packed into one row see each other in '{kind}' (transformers {transformers.__version__} reads their borders from no input there); "
            "take one of another architecture, for example llama, bert or t5"
        )
    _check_plain(model, ids[:1, : min(16, half)], family)


def _check_plain(model: PreTrainedModel, ids: Tensor, family: str) -> None:
    """Refuse an architecture that predicts in a row of one document what it does not where transformers calls it plainly, for example with other positions.

    Args:
        ids: int64 [1, L].
    """
    more = {"decoder_input_ids": ids} if family == "encoder-decoder" else {}
    one = torch.ones_like(ids)
    segments = {"segments": one, **({"decoder_segments": one} if more else {})}
    with evaluating(model):
        packed, plain = (model(input_ids=ids, **more, **kind).logits.float() for kind in (segments, {}))
    if (packed - plain).abs().max() > 1e-3 * plain.abs().max():
        kind = model.config.model_type
        raise UserError(f"model.architecture: '{kind}' reads a row otherwise where it is not told of documents and positions, as transformers calls it; take another architecture")


@torch.no_grad()
def head_for_loss(model: PreTrainedModel, vocab: Vocab, args: transformers.TrainingArguments) -> nn.Linear | None:
    """The vocabulary projection of a prepared model that the loss may do by itself: None where logits are more than that
    (scaled or bent afterwards), and where it would not work: float16 needs its gradients scaled first; of weights that are not
    float32 the parts would be summed rounded; other devices than CPUs and CUDA's were not tried.

    Args:
        vocab: of the tokenizer.
        args: of the run.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, _Head) or head.weight.dtype != torch.float32 or args.fp16 or args.device.type not in ("cpu", "cuda"):
        return None
    ids = torch.from_numpy(vocab.ordinary[None, :2].astype(np.int64)).to(model.device)
    more = {"decoder_input_ids": ids} if family_of(model.config) == "encoder-decoder" else {}
    try:
        with evaluating(model):
            hidden, logits = (model(input_ids=ids, skip_logits=skip, **more).logits for skip in (True, False))
            same = torch.equal(nn.functional.linear(hidden, head.weight, head.bias), logits)
    except RuntimeError:  # of shapes: BART adds a number to each logit, MobileBERT multiplies with its weights outside of the module
        return None
    # accelerate wraps a model for ranks wherever there is a group of them, be it of one.
    head.packed.ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    return head if same else None


def output_for_loss(model: nn.Module, head: nn.Linear | None, inputs: Mapping[str, Any]) -> Any:
    """What `token_loss` takes: the model's output, without its logits where the loss projects.

    Args:
        model: prepared, or what wraps it.
        head: of `head_for_loss`.
        inputs: a batch without its labels.
    """
    return model(**inputs) if head is None else Unprojected(model(**inputs, skip_logits=True).logits, head.weight, head.bias)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; afterwards the model is in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def as_trained(model: PreTrainedModel, args: transformers.TrainingArguments) -> Iterator[None]:
    """Inside, the model is as a step of training finds it: dropout on, activations checkpointed where the run's are; afterwards as it was."""
    kind = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"  # before transformers 5.20
    training, less_memory = model.training, getattr(args, kind)
    if less_memory:
        keys = dict(getattr(args, f"{kind}_kwargs") or {})
        own = {name: keys.pop(name) for name in ("every_n_layers", "offload") if name in keys}
        with refused(f"trainer.{kind}"):
            getattr(model, f"{kind}_enable")(**{f"{kind}_kwargs": keys or None}, **own)
    model.train()
    try:
        yield
    finally:
        model.train(training)
        if less_memory:
            getattr(model, f"{kind}_disable")()


class _Packed:
    """The two hooks of a prepared model. Pure tensor code: one graph under torch.compile, one forward under DDP."""

    def __init__(self, model: PreTrainedModel):
        self.family = family_of(model.config)
        self.offset = position_offset(model)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.window = _window(model) if self.family == "encoder" else None
        self.at: Tensor | None = None
        self.skip_logits = self.ranks = False

    def before_model(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        self.at, self.skip_logits = kwargs.pop("label_positions", None), kwargs.pop("skip_logits", False)
        segments, borders = kwargs.pop("segments", None), kwargs.pop("borders", None)
        if segments is None:
            return args, kwargs
        if self.family == "encoder-decoder":
            own = kwargs.pop("decoder_segments")
            encoder_mask = additive(same_document(segments, segments))
            kwargs["encoder_outputs"] = model.get_encoder()(input_ids=kwargs.pop("input_ids"), attention_mask=encoder_mask)
            kwargs["attention_mask"] = additive(same_document(own, segments))
            causal = torch.ones(own.shape[1], own.shape[1], dtype=torch.bool, device=own.device).tril()
            kwargs["decoder_attention_mask"] = additive(same_document(own, own) & causal)
            kwargs["use_cache"] = False
            return args, kwargs
        if self.takes_positions:
            kwargs["position_ids"] = positions_within(segments) + self.offset
        kwargs |= packing.handed_on(borders, segments.shape[1])
        if self.family == "decoder":
            # transformers reads the documents off the restarting positions, for every attention implementation.
            kwargs["use_cache"] = False
            return args, kwargs
        allowed = same_document(segments, segments)
        if self.window is None:
            kwargs["attention_mask"] = additive(allowed)
        else:
            at = torch.arange(segments.shape[1], device=segments.device)
            near = (at[:, None] - at[None, :]).abs() <= self.window
            kwargs["attention_mask"] = {"full_attention": additive(allowed), "sliding_attention": additive(allowed & near)}
        return args, kwargs

    def before_head(self, head: nn.Module, args: tuple) -> tuple | None:
        if self.at is None:
            return None
        hidden, at, self.at = args[0], self.at, None
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, at), *args[1:])


def _window(model: PreTrainedModel) -> int | None:
    """How far tokens see in layers with a window; None where no layer has one.

    Raises:
        UserError: they have different ones.
    """
    if "sliding_attention" not in (getattr(model.config, "layer_types", None) or []):
        return None
    try:
        return int(model.config.sliding_window)
    except Exception as error:  # of transformers, which calls it ambiguous where layers may differ
        raise UserError(f"model.architecture: '{model.config.model_type}' has a window of its own in each layer, which is not supported; take another architecture") from error


class _Left(torch.autograd.Function):
    """The hidden state as it came, on a path that leads back to the projection's parameters too: of several ranks DDP takes
    what a model's output does not depend on for unused, and the loss brings their gradient by another path."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


class _Head(nn.Linear):
    """A vocabulary projection that a call can leave to the loss (`skip_logits=True`)."""

    packed: _Packed

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.packed.skip_logits:
            return super().forward(hidden)
        return _Left.apply(hidden, self.weight, self.bias) if self.packed.ranks else hidden
