"""Text in, text out, with any family: what translation and generated answers share.

* encoder-decoders read `bos source eos` and write `target eos` behind their start token.
* encoders become the encoder of an `EncoderDecoderModel` (Rothe et al. 2020, arXiv:1907.12461). Where the
  architecture can attend across, the decoder is a second copy of it; where it cannot (ModernBERT), it is a GPT-2 of
  the same width with the encoder's embeddings. Cross-attention is new in both inits.
* decoders read `bos source separator` and continue with `target eos`; the loss is on the target alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lmssl import forward, models
from lmssl.data.stream import mix
from lmssl.errors import UserError, said
from lmssl.objectives.base import IGNORE
from lmssl.tasks.base import Backbone, Item, by_length, inputs_of, padded
from lmssl.tokenization import Tokenizer


def model(backbone: Backbone, pretrained: bool, seed: int, beams: int, longest: int | None = None) -> PreTrainedModel:
    """The model that writes, of either init, prepared so that the vocabulary is projected at labels alone."""
    if backbone.family == "encoder":
        made = _warm_started(backbone, pretrained, seed)
    else:
        made = backbone.build(models.AUTO[backbone.family], pretrained, seed)
    made.generation_config = generation_config(backbone, made, beams, longest)
    made.generation_config.use_cache = _remembers(made, backbone)
    return forward.prepare(made)


@torch.no_grad()
def _remembers(made: PreTrainedModel, backbone: Backbone) -> bool:
    """Whether a model that writes with a cache of keys and values writes what it does without one: some architectures of transformers
    (MegatronBERT, BigBird as a decoder) do not.

    Raises:
        UserError: it cannot write at all.
    """
    ids = torch.from_numpy(backbone.tokenizer.vocab().ordinary[None, :4].astype(np.int64))
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 1, "output_logits": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}

    def logits(use_cache: bool) -> Tensor:
        with forward.evaluating(made):
            return torch.stack(made.generate(ids, use_cache=use_cache, **settings).logits)

    try:
        plain = logits(False)
    except Exception as error:
        raise UserError(f"model.from: this '{backbone.config.model_type}' cannot write: {said(error, 200)}") from error
    try:
        return torch.allclose(logits(True), plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    except Exception:
        return False


def generation_config(backbone: Backbone, made: PreTrainedModel, beams: int, longest: int | None = None) -> GenerationConfig:
    """Beam search with the tokenizer's special ids; saved with the model. At most `longest` tokens, and no more than the positions leave: as many for
    every source, so that neighbours in a batch decide nothing."""
    vocab = backbone.tokenizer.vocab()
    start = None if backbone.family == "decoder" else models.decoder_start(made.config)
    most = backbone.length // 2 if start is None else backbone.length - 1
    return GenerationConfig(
        num_beams=beams, do_sample=False, early_stopping=beams > 1, max_new_tokens=min(longest or most, most),
        pad_token_id=backbone.pad, bos_token_id=vocab.bos, eos_token_id=vocab.eos, decoder_start_token_id=start,
    )  # fmt: skip


def _warm_started(backbone: Backbone, pretrained: bool, seed: int) -> PreTrainedModel:
    encoder = backbone.build(AutoModel, pretrained, seed)
    config = decoder_config(backbone.config, backbone.length)
    same, own = config.model_type == backbone.config.model_type, mix(seed, 1) >> 1  # from seed + 1 the next run's encoder is drawn
    if same:
        decoder = backbone.build(AutoModelForCausalLM, pretrained, own, is_decoder=True, add_cross_attention=True)
    else:
        torch.manual_seed(own)
        decoder = AutoModelForCausalLM.from_config(config, **models.attention(backbone.length, config)).float()
        models.mark_drawn(decoder, (name for name, _ in decoder.named_parameters()))
        with torch.no_grad():
            ours, theirs = decoder.get_input_embeddings().weight, encoder.get_input_embeddings().weight
            if ours.shape == theirs.shape:  # ALBERT's are narrower than its layers
                ours.copy_(theirs)
    vocab = backbone.tokenizer.vocab()
    joint = EncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)
    joint.decoder_start_token_id, joint.pad_token_id, joint.eos_token_id = vocab.start, backbone.pad, vocab.eos
    joint.vocab_size, joint.tie_word_embeddings = config.vocab_size, False
    made = EncoderDecoderModel(config=joint, encoder=encoder, decoder=decoder)
    models.mark_drawn(made, (f"{part}.{name}" for part in ("encoder", "decoder") for name in models.drawn(getattr(made, part))))
    return made


def decoder_config(encoder: PretrainedConfig, length: int) -> PretrainedConfig:
    """The decoder beside an encoder: its own architecture with cross-attention, else a GPT-2 of its size."""
    if encoder.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = type(encoder).from_dict(encoder.to_dict() | {"is_decoder": True, "add_cross_attention": True})
        with torch.device("meta"):
            if any("cross" in name for name, _ in AutoModelForCausalLM.from_config(config).named_modules()):
                return config
    sizes: dict[str, Any] = {"n_embd": encoder.hidden_size, "n_layer": encoder.num_hidden_layers, "n_head": encoder.num_attention_heads, "n_positions": length}
    ids = {f"{role}_token_id": getattr(encoder, f"{role}_token_id", None) for role in ("pad", "bos", "eos")}
    dropout = getattr(encoder, "mlp_dropout", getattr(encoder, "hidden_dropout_prob", 0.1))
    sizes |= {"embd_pdrop": dropout, "resid_pdrop": dropout, "attn_pdrop": dropout}
    return AutoConfig.for_model("gpt2", vocab_size=encoder.vocab_size, is_decoder=True, add_cross_attention=True, tie_word_embeddings=True, **sizes, **ids)


def encode(backbone: Backbone, sources: Sequence[str], targets: Sequence[str], separator: str) -> list[Item]:
    """Training items: `input_ids` and the `target` ids with their eos.

    A source longer than half of a decoder's length (than an encoder's length) loses its end; so does a target.
    """
    eos, decoder = backbone.tokenizer.vocab().eos, backbone.family == "decoder"
    rows = prompts(backbone, sources, separator, backbone.length // 2 if decoder else backbone.length)
    items = []
    for row, ids in zip(rows, backbone.ids(targets), strict=True):
        room = backbone.length - 1 - (len(row) if decoder else 0)
        items.append({"input_ids": row, "target": np.append(ids[:room], eos)})
    return items


def prompts(backbone: Backbone, sources: Sequence[str], separator: str, room: int) -> list[np.ndarray]:
    """What the model is given before it writes, at most `room` tokens each."""
    begin = np.array(backbone.begin(), np.int32)
    end = backbone.ids([separator])[0] if backbone.family == "decoder" else np.array([backbone.tokenizer.vocab().eos], np.int32)
    if not len(end):
        raise UserError(f"task.separator: the tokenizer makes no token of {separator!r}, so nothing would end the source; use a word or a sign")
    if room <= len(begin) + len(end):
        raise UserError(f"data.max_length: {backbone.length} tokens leave no room for a source")
    # Behind a source the separator may be other tokens than alone; a source that is cut ends in those that it is alone.
    joint = backbone.ids([f"{source}{separator}" for source in sources]) if backbone.family == "decoder" else [np.append(ids, end) for ids in backbone.ids(sources)]
    long = [k for k, ids in enumerate(joint) if len(ids) > room - len(begin)]
    for k, ids in zip(long, backbone.ids([sources[k] for k in long]), strict=True):
        joint[k] = np.concatenate([ids[: room - len(begin) - len(end)], end])
    return [np.concatenate([begin, ids]).astype(np.int32) for ids in joint]


def collator(backbone: Backbone, multiple: int) -> Callable[[list[Item]], dict[str, Tensor]]:
    """Tensors for `forward`; `labels` [K] are gathered, `label_positions` [K] say which logits predict them."""
    decoder, pad = backbone.family == "decoder", backbone.pad
    start = None if decoder else _start(backbone)

    def collate(items: list[Item]) -> dict[str, Tensor]:
        targets = [item["target"] for item in items]
        if decoder:
            batch = inputs_of([np.concatenate([item["input_ids"], item["target"]]) for item in items], pad, multiple, most=backbone.length)
            asked = [np.concatenate([np.full(len(item["input_ids"]) - 1, IGNORE), item["target"], [IGNORE]]) for item in items]
            labels = padded(asked, IGNORE, multiple, most=backbone.length).reshape(-1)
        else:
            batch = inputs_of([item["input_ids"] for item in items], pad, multiple, most=backbone.length)
            batch["decoder_input_ids"] = padded([np.concatenate([[start], t[:-1]]) for t in targets], pad, multiple, most=backbone.length)
            labels = padded(targets, IGNORE, multiple, most=backbone.length).reshape(-1)
        at = (labels != IGNORE).nonzero().squeeze(-1)
        return batch | {"labels": labels[at], "label_positions": at}

    return collate


def _start(backbone: Backbone) -> int:
    return backbone.tokenizer.vocab(models.decoder_start(backbone.config)).start


@torch.no_grad()
def generate(made: PreTrainedModel, backbone: Backbone, sources: Sequence[str], separator: str, batch: int) -> list[str]:
    """What a model of `model` writes for each source, searched as it is configured, in batches of similar length."""
    made.eval()
    decoder = backbone.family == "decoder"
    rows = prompts(backbone, sources, separator, backbone.length // 2 if decoder else backbone.length)

    def write(members: list[np.ndarray]) -> list[str]:
        inputs = {k: v.to(made.device) for k, v in inputs_of(members, backbone.pad, 1, left=decoder).items()}
        width = inputs["input_ids"].shape[1]
        out = made.generate(**inputs)
        return [text_of(backbone.tokenizer, row[width:] if decoder else row[1:]) for row in out.tolist()]

    return by_length(rows, len, batch, write)


def usage(folder: str, decoder: bool, text: str) -> str:
    """Python that has a saved model write behind a text in plain transformers."""
    auto, new = ("AutoModelForCausalLM", '[:, inputs["input_ids"].shape[1] :]') if decoder else ("AutoModelForSeq2SeqLM", "")
    return f"""\
from transformers import {auto}, AutoTokenizer
model, tokenizer = {auto}.from_pretrained({folder}), AutoTokenizer.from_pretrained({folder})
inputs = tokenizer([{text!r}], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs){new}, skip_special_tokens=True))"""


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text before the first eos, special tokens left out, white space made single."""
    eos = tokenizer.id("eos")
    ids = ids[: ids.index(eos)] if eos in ids else ids
    return " ".join(tokenizer.backend.decode(ids, skip_special_tokens=True).split())
