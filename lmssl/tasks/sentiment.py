"""Sentiment: one text, one class, through transformers' own sequence-classification heads.

Pooling is what the architecture's own head does, the same for both inits:

* decoders (GPT-2, Llama): the last token. The text is given without a closing eos, since what stands at eos is never
  trained in pretraining.
* encoders: ModernBERT the mean of all tokens (`classifier_pooling: mean`); BERT and RoBERTa the first token (bos).
  BERT's pooler and RoBERTa's dense layer are random after masked pretraining, as from scratch.
* encoder-decoders (T5, BART): the decoder's state at eos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lmssl import models
from lmssl.data import corpus
from lmssl.errors import UserError
from lmssl.tasks.base import Collator, Example, by_length
from lmssl.tokenization import Tokenizer


@dataclass(frozen=True)
class Sentiment:
    """The task section of a sentiment recipe.

    A text longer than the model reads keeps its beginning or its end (`keep`): reviews conclude at the end.
    """

    text: str = "text"
    """Column of the text."""
    label: str = "label"
    """Column of the class; its values are the class names."""
    labels: list[int] = field(default_factory=lambda: [20, 100, 500])
    """Numbers of labelled examples, each a prefix of the next."""
    seeds: int = 5
    """Runs for each number and init."""
    keep: str = "end"
    """Which part of a long text is kept: start or end."""

    name: ClassVar[str] = "sentiment"
    metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if not self.labels or min(self.labels) < 1 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels={self.labels} must be different whole numbers above 0")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1")
        if self.keep not in ("start", "end"):
            raise ValueError(f"keep={self.keep!r} must be start or end")

    def read(self, sources: list[corpus.Source]) -> list[Example]:
        """Every labelled example of the sources, exact duplicate texts dropped."""
        found: dict[str, Example] = {}
        for source in sources:
            for record, where in corpus.records(source):
                text = corpus.field_of(record, self.text, where)
                label = corpus.field_of(record, self.label, where)
                if not isinstance(text, str) or not text.strip():
                    raise UserError(f"{where}: column '{self.text}' holds {text!r}, expected text")
                if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
                    raise UserError(f"{where}: column '{self.label}' holds {label!r}, expected a class: text or a whole number")
                corpus.check_text(text, where)
                found.setdefault(text, Example(text, str(label), where))
        return list(found.values())

    def model(self, source: str | None, like: str, classes: list[str], seed: int) -> PreTrainedModel:
        """The classifier, from a checkpoint or from scratch; the head is drawn from the seed in both."""
        config = models.read_config(like, "model.from")
        config.num_labels = len(classes)
        config.id2label, config.label2id = dict(enumerate(classes)), {c: i for i, c in enumerate(classes)}
        if hasattr(config, "classifier_pooling"):
            config.classifier_pooling = "mean"
        torch.manual_seed(seed)
        try:
            if source is None:
                return AutoModelForSequenceClassification.from_config(config).float()
            return AutoModelForSequenceClassification.from_pretrained(source, config=config, use_safetensors=True, dtype=torch.float32)
        except ValueError as error:
            raise UserError(f"model.from: {config.model_type} has no sequence-classification head in transformers: {str(error).splitlines()[0]}") from error

    def encode(self, tokenizer: Tokenizer, family: str, examples: Sequence[Example], classes: list[str], length: int) -> list[dict[str, Any]]:
        """Token ids between bos and eos (decoders: no eos), cut to `length`, and the class number."""
        begin = 1 if "bos" in tokenizer.roles else 0
        end = 0 if family == "decoder" else 1
        items = []
        for example, ids in zip(examples, tokenizer.encode([e.text for e in examples]), strict=True):
            inner = ids[begin:-1]
            room = length - begin - end
            inner = inner[:room] if self.keep == "start" else inner[-room:]
            items.append({"input_ids": np.concatenate([ids[:begin], inner, ids[len(ids) - end :]]), "label": classes.index(example.label)})
        return items

    @torch.no_grad()
    def score(self, model: PreTrainedModel, items: list[dict[str, Any]], collator: Collator, batch: int, compiled: bool = False) -> dict[str, float]:
        """Accuracy and macro-averaged F1."""
        forward = classify(model, batch, compiled)
        guesses = np.array(by_length(items, batch, lambda members: forward(collator(members)).argmax(-1).tolist()))
        truth = np.array([item["label"] for item in items])
        return {"accuracy": float((guesses == truth).mean()), "macro_f1": macro_f1(truth, guesses)}


def classify(model: PreTrainedModel, batch: int, compiled: bool) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Collated tensors -> logits; full batches through the compiled model, so that a ragged one costs no compilation."""
    model.eval()
    fast = torch.compile(model, dynamic=False) if compiled else model

    def forward(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {k: v.to(model.device) for k, v in tensors.items() if k != "labels"}
        return (fast if len(inputs["input_ids"]) == batch else model)(**inputs).logits.float()

    return forward


def macro_f1(truth: np.ndarray, guesses: np.ndarray) -> float:
    """The mean over the true classes of 2 TP / (2 TP + FP + FN).

    >>> macro_f1(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]))
    0.7333333333333334
    """
    scores = []
    for c in np.unique(truth):
        hits = int(((truth == c) & (guesses == c)).sum())
        scores.append(2 * hits / int((truth == c).sum() + (guesses == c).sum()))
    return float(np.mean(scores))
