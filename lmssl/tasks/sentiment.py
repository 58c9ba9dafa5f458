"""Sentiment, and any other classification of one text or a pair, through transformers' own sequence-classification heads.

Pooling is what the architecture's own head does, the same for both inits:

* decoders (GPT-2, Llama): the last token. The text is given without a closing eos, since what stands at eos is never
  trained in pretraining.
* encoders: ModernBERT the mean of all tokens (`classifier_pooling: mean`); BERT and RoBERTa the first token (bos).
  BERT's pooler and RoBERTa's dense layer are random after masked pretraining, as from scratch.
* encoder-decoders (T5, BART): the decoder's state at eos.

A pair is given as `bos a eos b eos` (decoders without the last eos).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lmssl import models, output
from lmssl.data import corpus
from lmssl.errors import UserError
from lmssl.tasks.base import Backbone, Example, Item, Task, by_length, has_classifier, inputs_of, same
from lmssl.tokenization import Tokenizer

log = logging.getLogger("lmssl")


@dataclass(frozen=True, slots=True)
class Labelled(Example):
    """One text, or a pair, with its class.

    Attributes:
        second: the second text of a pair, or None.
    """

    second: str | None = None

    def texts(self) -> tuple[str, ...]:
        return (self.text,) if self.second is None else (self.text, self.second)

    def group(self) -> str:
        """Both texts of a pair: the first may be one of a few (a topic, a product) that every example is about."""
        return "\n".join(self.texts())


@dataclass(frozen=True)
class Sentiment(Task):
    """The task section of a classification recipe.

    A text longer than the model reads keeps its beginning or its end (`keep`): reviews conclude at the end. Of a pair
    the longer text is cut first.
    """

    text: str = "text"
    """Column of the text."""
    text_a: str | None = None
    """Column of the first text of a pair; `text` is then not read."""
    text_b: str | None = None
    """Column of the second text of a pair."""
    label: str = "label"
    """Column of the class; its values are the class names."""
    keep: Literal["start", "end"] = "end"
    """Which part of a long text is kept."""
    cue: str = ""
    """Text appended to every input, for example " Overall, this film was"; special tokens may stand in it. What a decoder's head
    reads is the state that predicts the next token; a cue makes the next token the one in question (compare Schick and
    Schuetze 2020, 2001.07676). T5's head reads the decoder's last state."""
    answers: dict[str, list[str]] = field(default_factory=dict)
    """For each class, texts that may follow the cue, for example {"0": [" bad"], "1": [" good"]}: the head of a decoder begins as the rows
    by which the vocabulary projection predicts their first tokens (their mean), and so knows what pretraining knows (Schick and
    Schuetze's verbalizer; the same is done to the twin, whose rows are random)."""
    metric: Literal["accuracy", "macro_f1"] = "accuracy"
    """The score that a result goes by: `macro_f1`, the mean over the classes, where some are rare and count as much. Both are measured."""

    name: ClassVar[str] = "sentiment"
    column: ClassVar[str | None] = "text"
    needs: ClassVar[str] = "two texts; give .jsonl, .csv or .parquet"
    classes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.text_a is None) != (self.text_b is None):
            raise ValueError(f"text_a={self.text_a} and text_b={self.text_b} must both be named, or neither")
        if self.cue and self.keep == "start":
            raise ValueError(f"cue={self.cue!r} stands at the end of an input, which keep=start cuts off; use keep=end")
        object.__setattr__(self, "answers", {_plain(name): texts for name, texts in self.answers.items()})
        if self.answers and not self.cue:
            raise ValueError("answers need a cue that they follow, for example cue=' Overall, this film was'")
        if empty := [name for name, texts in self.answers.items() if not texts or not all(texts)]:
            raise ValueError(f"answers: class '{empty[0]}' has an empty one")

    def fitted(self, train: Sequence[Any], test: Sequence[Any]) -> Sentiment:
        """Refuses answers for other classes than the examples have."""
        classes, named = {e.label for e in (*train, *test)}, set(self.answers)
        if named and classes != named:
            raise UserError(f"task.answers: for the classes {', '.join(sorted(named))}; the examples have {', '.join(sorted(classes))}")
        return self

    def read(self, sources: list[corpus.Source]) -> list[Labelled]:
        """Every labelled example of the sources; those of the same text but for white space are dropped and counted."""
        found: dict[tuple[str, ...], Labelled] = {}
        again, torn = 0, list[str]()
        for source in sources:
            for record, where in corpus.labelled(source):
                example = dataclasses.replace(self.unlabelled(record, where), label=_class(record, self.label, where))
                kept = found.setdefault(tuple(map(same, example.texts())), example)
                again += kept is not example
                if kept.label != example.label:
                    torn.append(f"{where} is '{example.label}', {kept.where} '{kept.label}'")
        if again:
            log.info("%d examples whose text stands twice dropped", again)
        if torn:
            log.warning("%d texts stand twice with different classes; the first counts: %s", len(torn), torn[0])
        return list(found.values())

    def unlabelled(self, record: dict[str, Any], where: str) -> Labelled:
        """A record to predict."""
        return Labelled(corpus.text_of(record, self.text_a or self.text, where), "", where, corpus.text_of(record, self.text_b, where) if self.text_b else None)

    def model(self, backbone: Backbone, pretrained: bool, seed: int) -> PreTrainedModel:
        """The classifier; the head is drawn from the seed for both inits. Class names stand in its configuration."""
        if backbone.family == "encoder-decoder" and backbone.pad == backbone.tokenizer.eos():  # its head counts them in each text
            way_out = f"pretrain with one that has: lmssl tokenizer --from {backbone.source} --out NEW_FOLDER"
            raise UserError(
                f"model.from: the tokenizer of {backbone.source} has no pad token, and would pad with eos, by which an encoder-decoder's classifier reads a text; {way_out}"
            )
        names = dict(enumerate(backbone.classes))
        changes: dict[str, Any] = {"num_labels": len(names), "id2label": names, "label2id": {c: i for i, c in names.items()}, "problem_type": "single_label_classification"}
        if hasattr(backbone.config, "classifier_pooling") and not has_classifier(backbone.config):  # a trained head reads what it was trained on
            changes["classifier_pooling"] = "mean"
        model = backbone.build(AutoModelForSequenceClassification, pretrained, seed, **changes)
        if self.answers:
            if backbone.family != "decoder" or not isinstance(getattr(model, "score", None), torch.nn.Linear):
                raise UserError(f"task.answers: the head of {type(model).__name__} is not a projection of the state that predicts the next token; leave answers out")
            if not pretrained or any(name.startswith("score.") for name in models.drawn(model)):  # else it is trained: of a fine-tuned checkpoint
                model.score.weight.data.copy_(self._rows(backbone, pretrained, seed))
        return model

    def _rows(self, backbone: Backbone, pretrained: bool, seed: int) -> Tensor:
        """[classes, width]: the rows by which the language model predicts the first tokens of each class's answers, their mean."""
        writer = backbone.build(models.AUTO["decoder"], pretrained, seed)
        if pretrained and (drawn := models.drawn(writer)):
            raise UserError(f"task.answers: {backbone.source} has no vocabulary projection ({min(drawn)} is missing); leave answers out")
        weight = writer.get_output_embeddings().weight.detach()
        first = [[self._first(backbone, answer) for answer in self.answers[c]] for c in backbone.classes]
        if len({tuple(sorted(some)) for some in first}) < len(first):
            raise UserError(
                f"task.answers: the answers of two classes begin with the same tokens, which tell nothing: {', '.join(backbone.tokenizer.decode(some) for some in first)}"
            )
        return torch.stack([weight[some].mean(0) for some in first])

    def _first(self, backbone: Backbone, answer: str) -> int:
        """The token with which an answer begins where it follows the cue, which may differ from the one that it begins with alone."""
        cue, both = (backbone.tokenizer.template(text).tolist() for text in (self.cue, self.cue + answer))
        return next(b for k, b in enumerate(both) if k >= len(cue) or b != cue[k])

    def encode(self, backbone: Backbone, examples: Sequence[Any]) -> list[list[Item]]:
        """Token ids cut to the backbone's length, and the class number (0 where there is none)."""
        begin = np.array(backbone.begin(), np.int32)
        eos = np.array([backbone.tokenizer.id("eos")], np.int32)
        cue = backbone.tokenizer.template(self.cue)
        # Behind a text the cue may be other tokens than alone; one with special tokens in it is divided there anyway.
        joint = "" if self._spelt(backbone) else self.cue
        end = np.concatenate([cue[:0] if joint else cue, eos[:0] if backbone.family == "decoder" else eos])
        numbers = {name: i for i, name in enumerate(backbone.classes)}
        seconds: list[Any] = [None] * len(examples)
        if self.text_b:
            seconds = backbone.ids([f"{e.second}{joint}" for e in examples])
        rows = []
        room, within = backbone.length - len(begin) - len(end), len(cue) if joint else 0
        if ((room - 1) // 2 if self.text_b else room) <= within:
            raise UserError(f"data.max_length: {backbone.length} tokens leave no room for a text" + (f" beside the cue's {len(cue)}" if self.cue else ""))
        for first, second in zip(backbone.ids([e.text if self.text_b else f"{e.text}{joint}" for e in examples]), seconds, strict=True):
            if second is None:
                rows.append(np.concatenate([begin, self._cut(first, room), end]))
                continue
            to_first = _share(len(first), len(second), room - 1)
            rows.append(np.concatenate([begin, self._cut(first, to_first), eos, self._cut(second, room - 1 - to_first), end]))
        return [[{"input_ids": row, "label": numbers.get(e.label, 0)}] for row, e in zip(rows, examples, strict=True)]

    def _spelt(self, backbone: Backbone) -> bool:
        """Whether special tokens stand in the cue."""
        return bool(backbone.tokenizer.vocab().special[backbone.tokenizer.template(self.cue)].any())

    def _cut(self, ids: np.ndarray, room: int) -> np.ndarray:
        return ids[:room] if self.keep == "start" or room < 1 else ids[-room:]

    def collator(self, backbone: Backbone, multiple: int) -> Callable[[list[Item]], dict[str, Tensor]]:
        pad = backbone.pad

        def collate(items: list[Item]) -> dict[str, Tensor]:
            return inputs_of([item["input_ids"] for item in items], pad, multiple, most=backbone.length) | {"labels": torch.tensor([item["label"] for item in items])}

        return collate

    def logits(self, model: PreTrainedModel, backbone: Backbone, examples: Sequence[Any], batch: int, compiled: bool = False) -> np.ndarray:
        """float32 [N, classes]; full batches through the compiled model, so that a ragged one costs no compilation."""
        items, collate = [item for (item,) in self.encode(backbone, examples)], self.collator(backbone, 64 if compiled else 8)
        model.eval()
        fast = torch.compile(model, dynamic=False) if compiled else model

        @torch.no_grad()
        def forward(members: list[Item]) -> list[np.ndarray]:
            tensors = {k: v.to(model.device) for k, v in collate(members).items() if k != "labels"}
            return list((fast if len(members) == batch else model)(**tensors).logits.float().cpu().numpy())

        return np.stack(by_length(items, lambda item: len(item["input_ids"]), batch, forward))

    def evaluate(self, model: PreTrainedModel, backbone: Backbone, examples: Sequence[Any], batch: int, compiled: bool = False) -> tuple[dict[str, Any], list[str]]:
        """Accuracy and macro-averaged F1; the guessed class of each example."""
        guesses = [backbone.classes[i] for i in self.logits(model, backbone, examples, batch, compiled).argmax(-1)]
        return self.scores([e.label for e in examples], guesses), guesses

    def scores(self, truth: Sequence[str], guesses: Sequence[str]) -> dict[str, float]:
        """Accuracy and macro-averaged F1 of guessed classes."""
        return {"accuracy": float((np.array(guesses) == np.array(truth)).mean()), "macro_f1": macro_f1(np.array(truth), np.array(guesses))}

    def predictions(self, model: PreTrainedModel, backbone: Backbone, examples: Sequence[Any], batch: int) -> list[dict[str, Any]]:
        """{"label", "probabilities": {class: probability}}."""
        chances = torch.from_numpy(self.logits(model, backbone, examples, batch)).softmax(-1).numpy()
        return [{"label": backbone.classes[int(row.argmax())], "probabilities": {c: round(float(p), 6) for c, p in zip(backbone.classes, row, strict=True)}} for row in chances]

    def write_outputs(self, folder: Path, name: str, examples: Sequence[Any], outputs: Sequence[str]) -> None:
        """The guessed classes, a line each, and beside them where each example stands and its class."""
        super().write_outputs(folder, name, examples, outputs)
        output.write(folder / "examples.jsonl", "".join(json.dumps({"where": e.where, "label": e.label}) + "\n" for e in examples))

    def parts(self, example: Any) -> tuple[str, ...]:
        return (example.text, example.second) if self.text_b else (example.text,)

    def usage(self, folder: str, decoder: bool, written: bool) -> str:
        text = {"text": "The first text.", "text_pair": f"The second.{self.cue}"} if self.text_b else f"A text to work on.{self.cue}"
        return f"""\
from transformers import pipeline
classify = pipeline("text-classification", model={folder})
print(classify({text!r}, truncation=True))"""

    def finish(self, backbone: Backbone) -> Tokenizer:
        """Decoders are given no closing eos; a long text is cut on the side that the training cut."""
        side = "right" if self.keep == "start" else "left"
        return backbone.tokenizer.for_inputs(backbone.length, side, closing=backbone.family != "decoder", special=self._spelt(backbone))


def _class(record: dict[str, Any], column: str, where: str) -> str:
    label = corpus.field_of(record, column, where)
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise UserError(f"{where}: column '{column}' holds {label!r}, expected a class: text or a whole number")
    name = _plain(str(label))
    corpus.check_text(name, where)
    if len(name.splitlines()) > 1:
        raise UserError(f"{where}: column '{column}' holds {label!r}, a class of several lines")
    return name


def _share(first: int, second: int, room: int) -> int:
    """Tokens of a pair's first text: the longer one is cut, and where both are longer than half, each to half, as plain transformers does it.

    >>> _share(10, 3, 8), _share(3, 10, 8), _share(10, 9, 7), _share(9, 9, 7), _share(2, 3, 8)
    (5, 3, 4, 3, 2)
    """
    if min(first, second) > room // 2:
        return room // 2 + (room % 2 if first > second else 0)
    return min(first, room - second) if first > second else first


def _plain(name: str) -> str:
    """A class name as it is compared."""
    return unicodedata.normalize("NFC", name).strip()


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
