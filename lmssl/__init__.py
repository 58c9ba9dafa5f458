"""lmssl: self-supervised pretraining of text models, and proof that it pays."""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "NextToken": "lmssl.objectives",
    "MaskedTokens": "lmssl.objectives",
    "SpanCorruption": "lmssl.objectives",
    "Infilling": "lmssl.objectives",
    "Row": "lmssl.objectives.base",
    "Vocab": "lmssl.objectives.base",
    "Objective": "lmssl.objectives.base",
    "token_loss": "lmssl.objectives.cross_entropy",
    "TokenSet": "lmssl.data.tokens",
    "prepare": "lmssl.data.preparation",
    "from_iterable": "lmssl.data.preparation",
    "Stream": "lmssl.data.stream",
    "load_tokenizer": "lmssl.tokenization:load",
    "train_tokenizer": "lmssl.tokenization:train",
    "build_model": "lmssl.models:build",
    "begin_from_text": "lmssl.beginnings",
    "PretrainTrainer": "lmssl.pretraining",
    "pretrain": "lmssl.runs",
    "finetune": "lmssl.runs",
    "PretrainRecipe": "lmssl.recipe",
    "FinetuneRecipe": "lmssl.recipe",
    "UserError": "lmssl.errors",
    "Stopped": "lmssl.errors",
    "Interrupted": "lmssl.errors",
}
"""Public names and where they live; loaded when first asked for, so that `import lmssl` stays light."""

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'lmssl' has no attribute '{name}'")
    module, _, attribute = _NAMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
