"""Backbones: any transformers architecture by name, or an existing checkpoint; and the forward pass over packed rows.

`prepare(model)` hooks a model so that one call takes `segments` (document numbers) and `label_positions`: documents
packed together do not see each other, and the vocabulary is projected only where a label is. A call without them is
untouched, so the model stays the ordinary `PreTrainedModel` that `save_pretrained` writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lmssl import packing
from lmssl.config import check_keys
from lmssl.errors import UserError, did_you_mean
from lmssl.objectives.base import Family, Objective, Vocab
from lmssl.objectives.cross_entropy import Unprojected
from lmssl.packing import additive, positions_within, same_document

log = logging.getLogger("lmssl")

AUTO = {"decoder": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM, "encoder-decoder": AutoModelForSeq2SeqLM}
"""The class that each family is pretrained as, and loaded with."""
SHORT_ROW = 256
"""Tokens up to which attention on a CPU is faster as plain matrix products."""
POSITIONS = ("max_position_embeddings", "n_positions")
AMPLITUDE, SLOW = 8.0, 0.03
"""Of positions that begin as sinusoids: their root mean square over that of other embeddings; their learning rate over that of other embeddings."""


def family_of(config: PretrainedConfig) -> Family:
    """decoder, encoder or encoder-decoder, from the configuration alone.

    An architecture that can be both (BERT) is an encoder unless its `is_decoder` is set.
    """
    kind = config.model_type
    if config.is_encoder_decoder and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "encoder-decoder"
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return "encoder"
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    raise UserError(f"model.architecture: '{kind}' has no language-modelling head in transformers {transformers.__version__}")


def check_family(config: PretrainedConfig, objective: Objective, name: str) -> Family:
    """The family of a config, refused where the objective cannot train it."""
    family = family_of(config)
    if family not in objective.families:
        from lmssl.objectives import OBJECTIVES

        fitting = [n for n, o in OBJECTIVES.items() if family in o.families]  # type: ignore[attr-defined]
        own = f"'{config.model_type}' is {'a' if family == 'decoder' else 'an'} {family}"
        raise UserError(f"objective.name: '{name}' trains {' and '.join(sorted(objective.families))} models; {own} (use {' or '.join(fitting)})")
    return family


def config_of(section: Mapping[str, Any], where: str = "model") -> PretrainedConfig:
    """The transformers configuration that a recipe's model section means; nothing is built yet.

    Raises:
        UserError: neither or both of `architecture` and `from`, an unknown architecture or config key, a value that
            the configuration refuses, a checkpoint that cannot be read.
    """
    keys = dict(section)
    architecture, source = keys.pop("architecture", None), keys.pop("from", None)
    if (architecture is None) == (source is None):
        raise UserError(f"{where}: name either an architecture (gpt2, bert, t5, ...) or a checkpoint to continue from (from: FOLDER)")
    if source is not None:
        check_keys(keys, ["attn_implementation"], where)
        return read_config(str(source), f"{where}.from")
    if not isinstance(architecture, str):
        raise UserError(f"{where}.architecture: expected the name of an architecture, got {architecture!r}")
    choices = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    if architecture not in choices or architecture not in transformers.CONFIG_MAPPING:
        raise UserError(f"{where}.architecture: no architecture '{architecture}' in transformers {transformers.__version__}; {did_you_mean(architecture, choices)}")
    cls = transformers.CONFIG_MAPPING[architecture]
    keys.pop("attn_implementation", None)
    if (init := init_of(keys)) not in ("text", "local", "default"):
        raise UserError(f"{where}.init: expected text, local or default, got {init!r}")
    keys.pop("init", None)
    check_keys(keys, known_keys(cls), where)
    try:
        return cls(**{k: v for k, v in keys.items() if v is not None or _takes_nothing(cls, k)})
    except Exception as error:  # strict dataclass errors, ValueErrors, TypeErrors: each config class has its own
        raise UserError(f"{where}: {architecture} refuses this configuration: {' '.join(str(error).split())}") from error


def _takes_nothing(cls: type, key: str) -> bool:
    """Whether null is a value of a configuration's key; else it unsets it."""
    try:
        cls(**{key: None})
    except Exception:
        return False
    return True


def init_of(section: Mapping[str, Any]) -> Any:
    """Where the model of a section begins: text, local or default; a continued checkpoint begins as it is."""
    return "default" if "from" in section else section.get("init", "text")


def known_keys(cls: type) -> set[str]:
    """The keys that a configuration class understands, common ones and aliases included."""
    if dataclasses.is_dataclass(cls):
        names = {f.name for f in dataclasses.fields(cls)}
    else:
        names = {p for base in cls.__mro__ for p in inspect.signature(base).parameters}
    hidden = {"self", "kwargs", "args", "transformers_version", "architectures", "model_type", "name_or_path"}
    return (names | set(getattr(cls, "attribute_map", {})) | {"attn_implementation", "tie_word_embeddings", "layer_types"}) - hidden


def read_config(source: str, where: str) -> PretrainedConfig:
    """The configuration of a checkpoint folder or hub id, no remote code run."""
    if not (Path(source) / "config.json").is_file() and (Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise UserError(f"{where}: {source} is no checkpoint folder (no config.json in it)")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        if Path(source).exists():
            raise UserError(f"{where}: {source}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        raise UserError(f"{where}: {source} is no folder here, and cannot be had from the hub under that id ({str(error).strip().splitlines()[0][:120]})") from error
    except Exception as error:
        raise UserError(f"{where}: {source}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def build(section: Mapping[str, Any], vocab: Vocab, objective: Objective, seq_length: int, seed: int) -> PreTrainedModel:
    """The model of a recipe, new or continued, with everything that depends on the tokenizer taken from it.

    Args:
        section: `architecture` and config keys, or `from`.
        vocab: of the tokenizer; gives vocabulary size and every special id.
        objective: gives the lengths that positions must suffice for.
        seq_length: tokens the model reads.
        seed: of the initial weights, and of those that a continued checkpoint lacks.

    Raises:
        UserError: as `config_of`; too few positions; a vocabulary that contradicts the tokenizer.
    """
    config = config_of(section)
    family = family_of(config)
    needed = max(n for lengths in objective.lengths(seq_length).values() for n in lengths)
    torch.manual_seed(seed)
    if "from" in section:
        return _continue(section, config, family, vocab, seq_length, needed)
    if section.get("vocab_size", vocab.size) != vocab.size:
        raise UserError(f"model.vocab_size: {section['vocab_size']}, but the tokenizer has {vocab.size} ids; leave it out")
    config.vocab_size = vocab.size
    _set_ids(config, family, vocab)
    try:
        _set_positions(config, AUTO[family], section, needed)
        model = AUTO[family].from_config(config, **attention(seq_length, section))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model: {config.model_type} cannot be built from this configuration: {' '.join(str(error).split())}") from error
    if init_of(section) != "default":
        begin_local(model)
    return model.float()


@torch.no_grad()
def begin_local(model: PreTrainedModel) -> None:
    """Where positions are learned and queries and keys are maps of their own (BERT and its kin), begin by looking near by.

    Positions begin as sinusoids (Vaswani et al. 2017, 1706.03762), large enough to count and slow to change; queries and keys
    begin as one orthogonal map, so that a token attends to what resembles it, which is first of all what stands beside
    it (compare Trockman and Kolter 2023, 2305.09828). From the usual start a small post-norm BERT reads its text as a bag of words for
    millions of tokens (docs/log.md). Every other architecture is left as transformers draws it.
    """
    for module in model.modules():
        query, key, table = (getattr(module, name, None) for name in ("query", "key", "position_embeddings"))
        if isinstance(query, nn.Linear) and isinstance(key, nn.Linear) and query.weight.shape == key.weight.shape:
            key.weight.copy_(nn.init.orthogonal_(query.weight))
        if isinstance(table, nn.Embedding):
            count, width = table.weight.shape
            first = 0 if table.padding_idx is None else table.padding_idx + 1
            at = torch.arange(count - first)[:, None] / 1000.0 ** (torch.arange(0, width, 2) / width)
            size = math.sqrt(2) * AMPLITUDE * getattr(model.config, "initializer_range", 0.02)
            table.weight[first:] = size * torch.cat([at.sin(), at.cos()], 1)[:, :width]
            table.weight.lmssl_rate = SLOW  # type: ignore[attr-defined]


def attention(length: int, section: Mapping[str, Any] = {}) -> dict[str, Any]:
    """`attn_implementation` for rows of a length: the section's own; plain matrix products for short rows on a CPU, where
    the fused kernel takes longer (docs/decisions/0012); else what transformers chooses."""
    if "attn_implementation" in section:
        return {"attn_implementation": section["attn_implementation"]}
    return {"attn_implementation": "eager"} if length <= SHORT_ROW and not torch.accelerator.is_available() else {}


def _set_ids(config: PretrainedConfig, family: Family, vocab: Vocab) -> None:
    ids = {"pad": vocab.pad, "bos": vocab.bos, "eos": vocab.eos, "cls": vocab.bos, "sep": vocab.eos, "mask": vocab.mask}
    for role, value in ids.items():
        if role in ("pad", "bos", "eos") or hasattr(config, f"{role}_token_id"):
            setattr(config, f"{role}_token_id", value)
    if family == "encoder-decoder":
        config.decoder_start_token_id = vocab.start
        if hasattr(config, "forced_eos_token_id"):
            config.forced_eos_token_id = None


def _set_positions(config: PretrainedConfig, auto: Any, section: Mapping[str, Any], needed: int) -> None:
    """As many positions as the rows need, no more: untrained ones would only invite longer inputs."""
    name = next((n for n in POSITIONS if n in known_keys(type(config))), None)
    if name is None:
        return
    chosen = next((section[n] for n in POSITIONS if n in section), None)
    if chosen is None:
        setattr(config, name, needed)
    with torch.device("meta"):
        offset = position_offset(auto.from_config(config))
    if chosen is None:
        setattr(config, name, needed + offset)
    elif chosen < needed + offset:
        raise UserError(f"model.{name}: {chosen} positions, but data.seq_length and the objective need {needed + offset}")


def position_offset(model: nn.Module) -> int:
    """The first position's number: RoBERTa and its kin count from padding_idx + 1."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1  # type: ignore[arg-type]
    return 0


def max_length(config: PretrainedConfig) -> int | None:
    """Tokens the model can read, None where positions are relative and unbounded."""
    value = next((getattr(config, n) for n in POSITIONS if isinstance(getattr(config, n, None), int)), None)
    if value is None or config.model_type in ("t5", "mt5", "umt5", "longt5"):
        return None
    with torch.device("meta"):
        return value - position_offset(AUTO[family_of(config)].from_config(config))


def _continue(section: Mapping[str, Any], config: PretrainedConfig, family: Family, vocab: Vocab, seq_length: int, needed: int) -> PreTrainedModel:
    source = str(section["from"])
    positions = max_length(config)
    if positions is not None and positions < needed:
        raise UserError(f"data.seq_length: the rows need {needed} positions, {source} has {positions}")
    try:
        keys = {"trust_remote_code": False, "use_safetensors": True, "dtype": torch.float32, **attention(seq_length, section)}
        model, info = AUTO[family].from_pretrained(source, output_loading_info=True, **keys)
    except Exception as error:
        raise UserError(f"model.from: {source}: the weights cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if info["missing_keys"]:
        log.warning("model.from: %s lacks %s; they start at random", source, ", ".join(sorted(info["missing_keys"])[:6]))
    model._lmssl_new = frozenset(info["missing_keys"])
    rows = model.get_input_embeddings().weight.shape[0]
    if vocab.size > rows:
        log.info("model.from: embeddings grown from %d to %d rows for the tokenizer's new tokens, each the mean of the old", rows, vocab.size)
        model.resize_token_embeddings(vocab.size, mean_resizing=True)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = vocab.pad
    return model


def description(config: PretrainedConfig, model: PreTrainedModel) -> str:
    """One line that differs where two models do, but for their weights."""
    plain = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype", "architectures")}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()
    return f"{config.model_type}, {parameters(model):,} parameters, configuration {digest[:8]}"


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


class _Packed:
    """The two hooks of a prepared model. Pure tensor code: one graph under torch.compile, one forward under DDP."""

    def __init__(self, model: PreTrainedModel):
        self.family = family_of(model.config)
        self.offset = position_offset(model)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        kinds = set(getattr(model.config, "layer_types", None) or [])
        self.window = model.config.sliding_window if self.family == "encoder" and "sliding_attention" in kinds else None
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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; afterwards the model is in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


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
    except RuntimeError:  # of shapes: BART adds a number to each logit
        return None
    head.packed.ranks = args.world_size > 1
    return head if torch.equal(nn.functional.linear(hidden, head.weight, head.bias), logits) else None


def output_for_loss(model: nn.Module, head: nn.Linear | None, inputs: Mapping[str, Any]) -> Any:
    """What `token_loss` takes: the model's output, without its logits where the loss projects.

    Args:
        model: prepared, or what wraps it.
        head: of `head_for_loss`.
        inputs: a batch without its labels.
    """
    return model(**inputs) if head is None else Unprojected(model(**inputs, skip_logits=True).logits, head.weight, head.bias)


@torch.no_grad()
def check_isolated(model: PreTrainedModel, vocab: Vocab, seq_length: int, kernel: bool = False) -> None:
    """Refuse an architecture in which documents packed into one row see each other: other tokens in the first of two
    documents must leave what is predicted in the second as it is.

    Args:
        model: prepared.
        vocab: of the tokenizer.
        seq_length: tokens that the model reads.
        kernel: as of `prepare`; then it is asked in bfloat16.

    Raises:
        UserError: they see each other, or the architecture takes no mask of who may see whom.
    """
    half, kind = min(8, seq_length // 2), model.config.model_type
    if str(getattr(model.config, "_attn_implementation", "")).startswith("flash") and model.device.type == "cpu":
        return
    draw = np.random.default_rng(0).choice(vocab.ordinary, (2, 2 * half))
    ids = torch.from_numpy(draw.astype(np.int64)).to(model.device)
    ids[1, half:] = ids[0, half:]
    segments = torch.tensor([[1] * half + [2] * half] * 2, device=model.device)
    more = {"decoder_input_ids": ids, "decoder_segments": segments} if family_of(model.config) == "encoder-decoder" else {}
    more |= {"borders": torch.arange(0, 4 * half + 1, half, dtype=torch.int32, device=model.device)} if kernel else {}
    try:
        with evaluating(model), torch.autocast(model.device.type, torch.bfloat16, enabled=kernel):
            logits = model(input_ids=ids, segments=segments, **more).logits[:, half:].float()
    except Exception as error:
        raise UserError(f"model.architecture: '{kind}' cannot be told which tokens may see each other: {' '.join(str(error).split())[:200]}") from error
    if (logits[0] - logits[1]).abs().max() > 1e-4 * logits.abs().max():
        raise UserError(
            f"model.architecture: documents packed into one row see each other in '{kind}' (transformers {transformers.__version__} reads their borders from no input there); "
            "take another architecture, for example llama, bert or t5"
        )


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
