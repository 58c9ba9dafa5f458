"""Small real things for the tests: a text, a tokenizer, a token set, and one model of each architecture."""

import random
from functools import cache
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

import lmssl
from lmssl import models, tokenization
from lmssl.objectives import Infilling, MaskedTokens, NextToken, SpanCorruption

WORDS = [
    "the",
    "a",
    "one",
    "old",
    "film",
    "story",
    "plot",
    "actor",
    "scene",
    "ending",
    "music",
    "was",
    "is",
    "seems",
    "felt",
    "looked",
    "very",
    "quite",
    "rather",
    "truly",
    "bad",
    "good",
    "dull",
    "bright",
    "slow",
    "strong",
    "weak",
    "warm",
]

SMALL = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    "bert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "roberta": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "modernbert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "local_attention": 8},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
}
DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
    "bart": {"dropout": 0.0},
}
OBJECTIVE = {
    "gpt2": NextToken(),
    "llama": NextToken(),
    "bert": MaskedTokens(),
    "roberta": MaskedTokens(rate=0.3),
    "modernbert": MaskedTokens(),
    "t5": SpanCorruption(),
    "bart": Infilling(),
}


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents of 3 to 60 words."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) + draw.choice(["", "", "", ".", ","]) for _ in range(draw.randint(3, 60))) for _ in range(count)]


@cache
def tokenizer(kind: str = "bpe") -> tokenization.Tokenizer:
    return tokenization.train(sentences(300), kind, 420 if kind == "bpe" else 400)


def token_set(folder: Path, count: int = 300, held_out: float = 0.1) -> lmssl.TokenSet:
    path = folder / f"tokens-{count}"
    return lmssl.TokenSet(path) if path.exists() else lmssl.from_iterable(sentences(count), tokenizer(), path, held_out)


def small_model(architecture: str, vocab, length: int = 32, seed: int = 0, *, dropout: bool = False, **keys):
    section = {"architecture": architecture, **SMALL[architecture], **({} if dropout else DROPOUT.get(architecture, {})), **keys}
    return models.build(section, vocab, OBJECTIVE[architecture], length, seed)


def saved_backbone(architecture: str, tokens: lmssl.TokenSet, folder: Path, length: int = 32, **keys) -> None:
    """A checkpoint of random weights with the token set's tokenizer, as pretraining leaves one."""
    small_model(architecture, tokens.vocab(), length, **keys).save_pretrained(folder)
    tokens.tokenizer.save(folder)


def arguments(folder: Path, **keys) -> TrainingArguments:
    values = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "warmup_steps": 0,
    }
    return TrainingArguments(str(folder), **(values | keys))


class Grads(TrainerCallback):
    """Keeps the gradient of the first step, float64, all parameters end to end."""

    def __init__(self):
        self.value: torch.Tensor | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.value is None:
            self.value = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def first_step(trainer) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a trainer's first step."""
    grads = Grads()
    trainer.add_callback(grads)
    trainer.run()
    return trainer.curve[0]["loss"], grads.value


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((a - b).norm() / b.norm())
