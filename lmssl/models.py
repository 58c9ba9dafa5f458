"""Backbones: any transformers architecture by name, or an existing checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lmssl.config import check_keys
from lmssl.errors import UserError, did_you_mean, said
from lmssl.objectives.base import Family, Objective, Vocab

log = logging.getLogger("lmssl")

AUTO = {"decoder": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM, "encoder-decoder": AutoModelForSeq2SeqLM}
"""The class that each family is pretrained as, and loaded with."""
MOST_BEFORE = 64
"""Rows of a table of positions that may stand before the first position."""
SHORT_ROW = 256
"""Tokens up to which attention on a CPU is faster as plain matrix products."""
RELATIVE = ("t5", "mt5", "umt5", "longt5")
"""Architectures whose positions are biases of attention, of any distance."""
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


def config_of(section: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers configuration that a recipe's model section means; nothing is built yet.

    Raises:
        UserError: neither or both of `architecture` and `from`, an unknown architecture or config key, a value that
            the configuration refuses, a checkpoint that cannot be read.
    """
    keys = dict(section)
    architecture, source = keys.pop("architecture", None), keys.pop("from", None)
    if (architecture is None) == (source is None):
        raise UserError("model: name either an architecture (gpt2, bert, t5, ...) or a checkpoint to continue from (from: FOLDER)")
    if source is not None:
        check_keys(keys, ["attn_implementation"], "model")
        return _exact(read_config(str(source), "model.from"), f"model.from: {source}")
    if not isinstance(architecture, str):
        raise UserError(f"model.architecture: expected the name of an architecture, got {architecture!r}")
    choices = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    if architecture not in choices or architecture not in transformers.CONFIG_MAPPING:
        raise UserError(f"model.architecture: no architecture '{architecture}' in transformers {transformers.__version__}; {did_you_mean(architecture, choices)}")
    cls = transformers.CONFIG_MAPPING[architecture]
    keys.pop("attn_implementation", None)
    if (init := init_of(keys)) not in ("text", "local", "default"):
        raise UserError(f"model.init: expected text, local or default, got {init!r}")
    keys.pop("init", None)
    check_keys(keys, known_keys(cls), "model")
    if keys.get("output_router_logits"):
        raise UserError("model.output_router_logits: what balances the load of experts is no part of lmssl's loss, and would have no effect; leave it out")
    if keys.get("return_dict") is False:
        raise UserError("model.return_dict: lmssl reads a model's outputs by name; leave it out")
    try:
        made = cls(**{k: v for k, v in keys.items() if v is not None or _takes_nothing(cls, k)})
    except Exception as error:  # strict dataclass errors, ValueErrors, TypeErrors: each config class has its own
        raise UserError(f"model: {architecture} refuses this configuration: {' '.join(str(error).split())}") from error
    return _exact(made, f"model.architecture: '{architecture}'")


def _exact(config: PretrainedConfig, where: str) -> PretrainedConfig:
    """Refuse a model whose loss of a document depends on what else is in its batch, or that does without attention where its kernel is missing."""
    if config.model_type == "mra":
        raise UserError(f"{where}: its attention is a CUDA kernel of its own, and nothing without that; take another architecture, for example bert")
    if getattr(config, "expert_capacity", None):
        raise UserError(f"{where}: its experts leave out tokens beyond their capacity, so that a document's loss depends on what else is in the batch; take another architecture")
    return config


def _check_rotations(config: PretrainedConfig, seq_length: int) -> None:
    """Refuse rows for which positions are rotated by the longest document in the batch."""
    rotations = getattr(config, "rope_parameters", None) or {}
    usual = rotations.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rotations.get("rope_type") == "longrope" and usual and seq_length > usual:
        raise UserError(
            f"data.seq_length: {seq_length}; beyond {usual} tokens '{config.model_type}' rotates a whole batch by its longest document (longrope); take {usual} or fewer"
        )


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
        hint = "" if "/" in source or Path(source).exists() else "; a hub id reads owner/name"
        raise UserError(f"{where}: {source} is no checkpoint folder (no config.json in it){hint}")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        if Path(source).exists():
            raise UserError(f"{where}: {source}: cannot be loaded: {said(error)}") from error
        raise UserError(f"{where}: {source} is no folder here, and cannot be had from the hub under that id ({said(error, 120)})") from error
    except Exception as error:
        raise UserError(f"{where}: {source}: cannot be loaded: {said(error)}") from error


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
    _check_rotations(config, seq_length)
    needed = max(n for lengths in objective.lengths(seq_length).values() for n in lengths)
    torch.manual_seed(seed)
    if "from" in section:
        return _continue(section, config, family, vocab, seq_length, needed)
    if section.get("vocab_size", vocab.size) != vocab.size:
        raise UserError(f"model.vocab_size: {section['vocab_size']}, but the tokenizer has {vocab.size} ids; leave it out")
    config.vocab_size = vocab.size
    try:
        _set_ids(config, family, vocab)
        _check_ids(config, section)
        _set_positions(config, AUTO[family], section, needed)
        for name, value in _whole_attention(config).items():
            setattr(config, name, value)
        model = AUTO[family].from_config(config, **attention(seq_length, config, section))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model: {config.model_type} cannot be built from this configuration: {' '.join(str(error).split())}") from error
    train_every_token(model, vocab.pad, vocab.eos)
    if init_of(section) != "default":
        begin_local(model)
    return model.float()


@torch.no_grad()
def begin_local(model: PreTrainedModel, slow: bool = True) -> None:
    """Where positions are learned and queries and keys are maps of their own (BERT and its kin), begin by looking near by.

    Positions begin as sinusoids (Vaswani et al. 2017, 1706.03762), large enough to count and slow to change; queries and keys
    begin as one orthogonal map, so that a token attends to what resembles it, which is first of all what stands beside
    it (compare Trockman and Kolter 2023, 2305.09828). From the usual start a small post-norm BERT reads its text as a bag of words for
    millions of tokens (docs/log.md). Every other architecture is left as transformers draws it.

    Args:
        slow: the positions are to change slowly (Muon's `lmssl_rate`).
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
            if slow:
                table.weight.lmssl_rate = SLOW  # type: ignore[attr-defined]


def attention(length: int, config: PretrainedConfig, section: Mapping[str, Any] = {}) -> dict[str, Any]:
    """`attn_implementation` for rows of a length: the section's own; plain matrix products on a CPU for short rows, where the fused kernel
    takes longer, and for T5, whose trained biases it does not take (docs/decisions/0012); else what transformers chooses."""
    if "attn_implementation" in section:
        if section["attn_implementation"] == "flex_attention" and not torch.accelerator.is_available():
            raise UserError("model.attn_implementation: flex_attention cannot be trained on a CPU (PyTorch has no backward pass for it); leave it out")
        return {"attn_implementation": section["attn_implementation"]}
    plain = length <= SHORT_ROW or config.model_type in RELATIVE
    return {"attn_implementation": "eager"} if plain and not torch.accelerator.is_available() else {}


def _whole_attention(config: PretrainedConfig) -> dict[str, str]:
    """What of a configuration must be another for attention that sees all of a row: BigBird changes to it for good as soon as it meets a short one."""
    return {"attention_type": "original_full"} if getattr(config, "attention_type", None) == "block_sparse" else {}


def _set_ids(config: PretrainedConfig, family: Family, vocab: Vocab) -> None:
    ids = {"pad": vocab.pad, "bos": vocab.bos, "eos": vocab.eos, "cls": vocab.bos, "sep": vocab.eos, "mask": vocab.mask}
    for role, value in ids.items():
        if role in ("pad", "bos", "eos") or hasattr(config, f"{role}_token_id"):
            setattr(config, f"{role}_token_id", value)
    if family == "encoder-decoder":
        config.decoder_start_token_id = vocab.start
        if hasattr(config, "forced_eos_token_id"):
            config.forced_eos_token_id = None


def _check_ids(config: PretrainedConfig, section: Mapping[str, Any]) -> None:
    """Refuse special ids of a recipe's own that are not the tokenizer's."""
    for name, value in section.items():
        if name.endswith("_token_id") and value is not None and value != getattr(config, name, None):
            raise UserError(f"model.{name}: {value}, but the tokenizer says {getattr(config, name, None)}; leave it out")


def _set_positions(config: PretrainedConfig, auto: Any, section: Mapping[str, Any], needed: int) -> None:
    """As many positions as the rows need, no more: untrained ones would only invite longer inputs."""
    name = next((n for n in POSITIONS if n in known_keys(type(config))), None)
    if name is None:
        return
    chosen = next((section[n] for n in POSITIONS if n in section), None)
    if chosen is None:
        setattr(config, name, max(needed, (config.pad_token_id or 0) + 2))  # RoBERTa's table holds the pad id's row
    with torch.device("meta"):
        offset = position_offset(auto.from_config(config))
    if chosen is None and offset > needed + MOST_BEFORE:
        raise UserError(
            f"model.architecture: {config.model_type} numbers positions from the pad id on, which is {offset - 1} in this tokenizer; "
            "take another architecture, or a tokenizer whose pad id is small (lmssl tokenizer trains one)"
        )
    if chosen is None:
        setattr(config, name, needed + offset)
    elif chosen < needed + offset:
        raise UserError(f"model.{name}: {chosen} positions, but data.seq_length and the objective need {needed + offset}")


def position_offset(model: nn.Module) -> int:
    """The first position's number: RoBERTa and its kin, MPNet among them, count from padding_idx + 1."""
    for module in model.modules():
        if any(hasattr(module, f"create_position_ids_from_{what}") for what in ("input_ids", "inputs_embeds")) and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1  # type: ignore[arg-type]
    return 0


def train_every_token(model: PreTrainedModel, pad: int, eos: int) -> None:
    """Have the embeddings of all tokens but a real pad token learn. torch gives no gradient to the row of `padding_idx`: where a tokenizer without pad is padded
    with eos, that would be the token that ends every document; where an architecture has its own number there (MPNet), any token."""
    table: Any = model.get_input_embeddings()
    row = getattr(table, "padding_idx", None)
    if row is None or (row == pad and pad != eos):
        return
    for module in model.modules():  # BART's encoder and decoder have tables of their own, of the same weights
        if isinstance(module, nn.Embedding) and module.weight is table.weight:
            module.padding_idx = None  # type: ignore[assignment]
    with torch.no_grad():
        if not table.weight[row].any():  # as a new model's
            table.weight[row].normal_(std=float(table.weight.std()))


def max_length(config: PretrainedConfig) -> int | None:
    """Tokens the model can read, None where positions are relative and unbounded."""
    value = next((getattr(config, n) for n in POSITIONS if isinstance(getattr(config, n, None), int)), None)
    if value is None or config.model_type in RELATIVE:
        return None
    with torch.device("meta"):
        return value - position_offset(AUTO[family_of(config)].from_config(config))


def _continue(section: Mapping[str, Any], config: PretrainedConfig, family: Family, vocab: Vocab, seq_length: int, needed: int) -> PreTrainedModel:
    source = str(section["from"])
    positions = max_length(config)
    if positions is not None and positions < needed:
        raise UserError(f"data.seq_length: the rows need {needed} positions, {source} has {positions}")
    try:
        keys = {"trust_remote_code": False, "use_safetensors": True, "dtype": torch.float32, **attention(seq_length, config, section), **_whole_attention(config)}
        with quietly():
            model, info = AUTO[family].from_pretrained(source, output_loading_info=True, **keys)
    except Exception as error:
        raise UserError(f"model.from: {source}: the weights cannot be loaded: {said(error)}{pickled(source)}") from error
    if info["missing_keys"]:
        log.warning("model.from: %s lacks %s; they start at random", source, ", ".join(sorted(info["missing_keys"])[:6]))
    mark_drawn(model, info["missing_keys"])
    rows = model.get_input_embeddings().weight.shape[0]
    if vocab.size > rows:
        log.info("model.from: embeddings grown from %d to %d rows for the tokenizer's new tokens, each the mean of the old", rows, vocab.size)
        model.resize_token_embeddings(vocab.size, mean_resizing=True)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = vocab.pad
    if family == "encoder-decoder" and decoder_start(model.config) is None:
        model.config.decoder_start_token_id = vocab.start
        if model.generation_config is not None:
            model.generation_config.decoder_start_token_id = vocab.start
    train_every_token(model, vocab.pad, vocab.eos)
    return model


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, transformers says nothing of weights that a checkpoint lacks: a head always is one, and what else is missing lmssl says itself."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def pickled(source: str) -> str:
    """What to do about a checkpoint whose weights are a pickle, which is not loaded; "" of others."""
    if any(Path(source).glob("*.safetensors")) or not any(Path(source).glob("*.bin")):
        return ""
    way_out = "where you trust it, from_pretrained and save_pretrained of its transformers class make safetensors of it"
    return f"; its *.bin is a pickle, which could run any code and is not loaded: {way_out}"


def mark_drawn(model: nn.Module, names: Iterable[str]) -> None:
    """Note which parameters a checkpoint lacked, so that they begin at random."""
    model._lmssl_drawn = frozenset(names)  # type: ignore[assignment]


def drawn(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that the model's checkpoint lacked."""
    return getattr(model, "_lmssl_drawn", frozenset())  # type: ignore[return-value]


def keep_names(model: PreTrainedModel) -> None:
    """Save the weights under the names that the model has, by which a resumed run finds them: no older names that they were read under
    (LayerNorm.gamma), and none that an architecture's files on the hub have instead (gpt_neox, mixtral)."""
    model._weight_conversions = []


def decoder_start(config: PretrainedConfig) -> int | None:
    """The id that a decoder is started with, where the configuration fixes one."""
    return getattr(config, "decoder_start_token_id", None)


def settings(config: PretrainedConfig) -> str:
    """What a configuration says of the model, and not of who wrote it."""
    return json.dumps({k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype", "architectures")}, sort_keys=True, default=str)


def description(config: PretrainedConfig, model: PreTrainedModel) -> str:
    """One line that differs where two models do, but for their weights."""
    digest = hashlib.sha256(settings(config).encode()).hexdigest()
    return f"{config.model_type}, {parameters(model):,} parameters, configuration {digest[:8]}"


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
