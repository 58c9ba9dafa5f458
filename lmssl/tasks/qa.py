"""Question answering on SQuAD 1.1 and 2.0 data: a span of the context, or none.

Input: `bos question eos context eos`, the question first so that a decoder reads the context knowing it. Long
contexts are read in overlapping windows. Through transformers' own question-answering heads, which give each position
a start and an end logit; only positions of the context and one null position may be chosen, in training as in
prediction, so that padding never moves the loss. An architecture without such a head writes its answer instead.

The loss is lmssl's one loss, over two labels a window (start and end).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES

from lmssl import output
from lmssl.data import corpus
from lmssl.errors import UserError
from lmssl.tasks import generation, squad
from lmssl.tasks.base import Backbone, Example, Item, Task, by_length, inputs_of, padded
from lmssl.tasks.squad import Span, Window
from lmssl.tokenization import Tokenizer

log = logging.getLogger("lmssl")

SHAPE = '{"text": ["Ada"], "answer_start": [11]} (characters into the context), both of one length, or a list of {"text": "Ada", "answer_start": 11}'
"""Of answers, for refusals."""


@dataclass(frozen=True, slots=True)
class Question(Example):
    """A question about `text`, the context.

    Attributes:
        question: the question.
        id: its id, or its place in the file.
        answers: (text, first character in the context) of each gold answer; none: unanswerable.
    """

    question: str = ""
    id: str = ""
    answers: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """The task section of a question-answering recipe; `labels` counts questions."""

    question: str = "question"
    """Column of the question."""
    context: str = "context"
    """Column of the text that holds the answer."""
    answers: str = "answers"
    """Column of the answers: {text: [...], answer_start: [...]}, or a list of {text, answer_start}; as JSON in CSV."""
    id: str = "id"
    """Column of the question's id; without one, its place in the file."""
    stride: int = 64
    """Tokens that neighbouring windows share."""
    longest: int = 30
    """Tokens of an answer at most."""
    n_best: int = 20
    """Spans kept for each question."""
    no_answer: bool | None = None
    """Whether "no answer" may be given; unset: whether the labelled data has unanswerable questions."""
    null_margin: float = 0.0
    """"No answer" is given where the null score exceeds the best span's by more than this."""
    answer: Literal["auto", "span", "text"] = "auto"
    """Choose a span, or write the answer; auto: a span where the architecture has such a head."""
    separator: str = "\n"
    """Written answers: the text between question, context and answer."""
    beams: int = 4
    """Written answers: beams of the search."""

    name: ClassVar[str] = "qa"
    metric = "f1"
    column: ClassVar[str | None] = None
    classes: ClassVar[bool] = False
    needs: ClassVar[str] = "a question and a context; give .jsonl, .csv, .parquet or SQuAD .json"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("longest", "n_best", "beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.stride < 0:
            raise ValueError(f"stride={self.stride} must be at least 0 tokens")

    def read(self, sources: list[corpus.Source]) -> list[Question]:
        """Every question of the sources; one that stands twice on the same context is one, with the answers of both. An answer that does not stand where it says is refused."""
        found: dict[tuple[str, str], Question] = {}
        ids: dict[str, Question] = {}
        again = 0
        for source in sources:
            for record, where in corpus.labelled(source):
                example = dataclasses.replace(self.unlabelled(record, where), answers=_answers(record, self.answers, self.context, where))
                if kept := found.get(key := (example.text, example.question)):
                    more = tuple(answer for answer in example.answers if answer not in kept.answers)
                    found[key] = dataclasses.replace(kept, answers=kept.answers + more)
                    again += 1
                    continue
                if ids.setdefault(example.id, example) is not example:
                    raise UserError(f"{where}: the id '{example.id}' is that of another question, at {ids[example.id].where}; predictions go by it")
                found[key] = example
        if again:
            log.info("%d questions that stand twice on their context are one with the first, whose id they go by", again)
        return list(found.values())

    def unlabelled(self, record: dict[str, Any], where: str) -> Question:
        """A record to predict."""
        return Question(
            corpus.text_of(record, self.context, where), "", where, corpus.text_of(record, self.question, where), str(where if record.get(self.id) is None else record[self.id])
        )

    def fitted(self, train: Sequence[Any], test: Sequence[Any]) -> QuestionAnswering:
        """`no_answer` decided by the examples to train on."""
        return self if self.no_answer is not None else dataclasses.replace(self, no_answer=any(not e.answers for e in train))

    def writes(self, backbone: Backbone) -> bool:
        """Whether the answer is written rather than chosen."""
        has_head = backbone.config.model_type in MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES
        if self.answer == "span" and not has_head:
            raise UserError(f"task.answer: {backbone.config.model_type} has no question-answering head in transformers; use text")
        return self.answer == "text" or not has_head

    def model(self, backbone: Backbone, pretrained: bool, seed: int) -> PreTrainedModel:
        if self.writes(backbone):
            return generation.model(backbone, pretrained, seed, self.beams, self.longest)
        return prepare_spans(backbone.build(AutoModelForQuestionAnswering, pretrained, seed))

    def windows(self, backbone: Backbone, examples: Sequence[Any]) -> list[list[Window]]:
        """The windows of each question."""
        texts = list(dict.fromkeys(e.text for e in examples))
        contexts = dict(zip(texts, backbone.tokenizer.spans(texts), strict=True))
        made, vocab = [], backbone.tokenizer.vocab()
        for example, question in zip(examples, backbone.ids([e.question for e in examples]), strict=True):
            ids, spans = contexts[example.text]
            gold = (example.answers[0][1], example.answers[0][1] + len(example.answers[0][0])) if example.answers else None
            made.append(
                squad.windows(question, ids, spans, gold, length=backbone.length, stride=self.stride, bos=backbone.begin(), eos=vocab.eos, null_last=backbone.family == "decoder")
            )
        return made

    def encode(self, backbone: Backbone, examples: Sequence[Any]) -> list[list[Item]]:
        """Each question's windows. A window that lacks the answer teaches "no answer here"."""
        if self.writes(backbone):
            return [[item] for item in generation.encode(backbone, self._prompts(examples), [e.answers[0][0] if e.answers else "" for e in examples], self.separator)]
        return [[{"input_ids": w.ids, "allowed": w.allowed(), "labels": w.answer} for w in some] for some in self.windows(backbone, examples)]

    def _prompts(self, examples: Sequence[Any]) -> list[str]:
        return [f"{e.question}{self.separator}{e.text}" for e in examples]

    def collator(self, backbone: Backbone, multiple: int) -> Callable[[list[Item]], dict[str, Tensor]]:
        if self.writes(backbone):
            return generation.collator(backbone, multiple)
        pad = backbone.pad

        def collate(items: list[Item]) -> dict[str, Tensor]:
            allowed = padded([item["allowed"] for item in items], 0, multiple, most=backbone.length).bool()
            return inputs_of([item["input_ids"] for item in items], pad, multiple, most=backbone.length) | {
                "allowed": allowed,
                "labels": torch.tensor([item["labels"] for item in items]),
            }

        return collate

    def n_best_of(self, model: PreTrainedModel, backbone: Backbone, examples: Sequence[Any], batch: int) -> list[tuple[list[Span], float]]:
        """(spans, best first; null score) of each question, over its windows."""
        per_example = self.windows(backbone, examples)
        flat = [w for some in per_example for w in some]
        model.eval()

        @torch.no_grad()
        def forward(members: list[Window]) -> list[tuple[list[Span], float]]:
            inputs = {k: v.to(model.device) for k, v in inputs_of([w.ids for w in members], backbone.pad, most=backbone.length).items()}
            outputs = model(**inputs)
            starts, ends = outputs.start_logits.float().cpu().numpy(), outputs.end_logits.float().cpu().numpy()
            return [squad.candidates(w, s, e, self.n_best, self.longest) for w, s, e in zip(members, starts, ends, strict=True)]

        found = iter(by_length(flat, lambda w: len(w.ids), batch, forward))
        return [squad.best([next(found) for _ in some], self.n_best) for some in per_example]

    def predict(self, model: PreTrainedModel, backbone: Backbone, examples: Sequence[Any], batch: int) -> list[str]:
        """The answer to each question; "" for none."""
        if self.writes(backbone):
            return generation.generate(model, backbone, self._prompts(examples), self.separator, batch)
        return [self.choose(e.text, spans, null) for e, (spans, null) in zip(examples, self.n_best_of(model, backbone, examples, batch), strict=True)]

    def choose(self, context: str, spans: list[Span], null: float) -> str:
        """The best span's text, or "" where there is none or "no answer" is better."""
        if not spans or (self.no_answer and null > spans[0].score + self.null_margin):
            return ""
        return context[spans[0].begin : spans[0].end]

    def evaluate(self, model: PreTrainedModel, backbone: Backbone, examples: Sequence[Any], batch: int, compiled: bool = False) -> tuple[dict[str, Any], list[str]]:
        """Exact match and F1 in [0, 1], and the answers."""
        guesses = self.predict(model, backbone, examples, batch)
        return squad.scores(guesses, [[text for text, _ in e.answers] for e in examples]), guesses

    def notes(self, backbone: Backbone, examples: Sequence[Any]) -> dict[str, int]:
        """How many gold answers end inside a token, and how many fit no window."""
        if self.writes(backbone):
            return {}
        asked = [some for some, e in zip(self.windows(backbone, examples), examples, strict=True) if e.answers]
        held = [[w for w in some if w.answer != (w.null, w.null)] for some in asked]
        return {"answers": len(asked), "answers_inside_a_token": sum(bool(some) and not some[0].exact for some in held), "answers_in_no_window": sum(not some for some in held)}

    def majority(self, examples: Sequence[Any]) -> float:
        """What no answer to any question scores, where some have none."""
        return sum(not e.answers for e in examples) / len(examples) if self.no_answer else 0.0

    def predictions(self, model: PreTrainedModel, backbone: Backbone, examples: Sequence[Any], batch: int) -> list[dict[str, Any]]:
        """{"id", "answer"}, and of a chosen span its characters in the context, the n-best and the null score."""
        if self.writes(backbone):
            return [{"id": e.id, "answer": text} for e, text in zip(examples, self.predict(model, backbone, examples, batch), strict=True)]
        rows = []
        for e, (spans, null) in zip(examples, self.n_best_of(model, backbone, examples, batch), strict=True):
            best = [{"text": e.text[s.begin : s.end], "begin": s.begin, "end": s.end, "score": round(s.score, 4)} for s in spans]
            rows.append({"id": e.id, "answer": self.choose(e.text, spans, null), "n_best": best, "null_score": round(null, 4)})
        return rows

    def write_outputs(self, folder: Path, name: str, examples: Sequence[Any], outputs: Sequence[str]) -> None:
        """{id: answer}, as the official evaluation script reads it."""
        folder.mkdir(parents=True, exist_ok=True)
        output.write_json(folder / f"{name}.json", {e.id: answer for e, answer in zip(examples, outputs, strict=True)})

    def parts(self, example: Any) -> tuple[str, ...]:
        return example.question, example.text

    def usage(self, folder: str, decoder: bool, written: bool) -> str:
        if written:
            return generation.usage(folder, decoder, f"The question?{self.separator}The text with the answer." + (self.separator if decoder else ""))
        null = ""
        if self.no_answer:
            at = -1 if decoder else 0
            null = f"""null = outputs.start_logits[0, {at}] + outputs.end_logits[0, {at}]
answer = "" if null - scores.max() > {self.null_margin} else answer  # unanswerable
"""
        return f"""\
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
model, tokenizer = AutoModelForQuestionAnswering.from_pretrained({folder}), AutoTokenizer.from_pretrained({folder})
question, context = "Who wrote it?", "It was written by Ada Lovelace in 1843."
inputs = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True, truncation="only_second")
spans, inside = inputs.pop("offset_mapping")[0], [i for i, s in enumerate(inputs.sequence_ids()) if s == 1]
outputs = model(**inputs)
scores = outputs.start_logits[0, inside, None] + outputs.end_logits[0, None, inside]
scores = scores.where(scores.new_ones(scores.shape).triu().tril({self.longest} - 1) > 0, float("-inf"))
start, end = (inside[i] for i in divmod(scores.argmax().item(), len(inside)))
answer = context[spans[start][0] : spans[end][1]].strip()
{null}print(answer)"""

    def finish(self, backbone: Backbone) -> Tokenizer:
        decoder = backbone.family == "decoder"
        writes = self.writes(backbone)
        return backbone.tokenizer.for_inputs(backbone.length, closing=not (decoder and writes), padding_side="left" if decoder and writes else "right")


def _answers(record: dict[str, Any], column: str, context: str, where: str) -> tuple[tuple[str, int], ...]:
    impossible = str(record.get("is_impossible") or "false").lower()
    if impossible not in ("true", "1", "false", "0"):
        raise UserError(f"{where}: column 'is_impossible' holds {record['is_impossible']!r}, expected true or false")
    if impossible in ("true", "1"):
        return ()
    value = corpus.field_of(record, column, where)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{where}: column '{column}' holds text that is not JSON ({error}); expected {SHAPE}") from None
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        pairs = list(zip(texts, starts, strict=False)) if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts) else None
    else:
        pairs = [(a.get("text"), a.get("answer_start")) for a in value] if isinstance(value, list) and all(isinstance(a, dict) for a in value) else None
    if pairs is None:
        raise UserError(f"{where}: column '{column}' holds {str(value)[:80]}, expected {SHAPE}")
    text = record[context]
    for answer, start in pairs:
        if not isinstance(answer, str) or not isinstance(start, int) or isinstance(start, bool) or not answer:
            raise UserError(f"{where}: column '{column}' holds the answer {answer!r} at {start!r}, expected text at a character number")
        if start < 0 or text[start : start + len(answer)] != answer:
            raise UserError(
                f"{where}: the answer {answer[:60]!r} does not stand at character {start} of '{context}': there is {text[max(start, 0) : max(start, 0) + len(answer)][:60]!r}"
            )
    return tuple(pairs)


class _Spans:
    """The two hooks of a question-answering model: `allowed` in, `logits` [B, 2, L] out."""

    def __init__(self) -> None:
        self.allowed: Tensor | None = None

    def before(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.allowed = kwargs.pop("allowed", None)
        return args, kwargs

    def after(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.allowed is None:
            return output
        logits = torch.stack([output.start_logits, output.end_logits], 1)
        allowed, self.allowed = self.allowed[:, None], None
        return {"logits": logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)}


def prepare_spans(model: PreTrainedModel) -> PreTrainedModel:
    """Hook a question-answering model so that a call with `allowed` bool [B, L] returns {"logits": [B, 2, L]}, start
    and end, with every other position ruled out. A call without it is untouched."""
    hooks = _Spans()
    model.register_forward_pre_hook(hooks.before, with_kwargs=True)
    model.register_forward_hook(hooks.after, with_kwargs=True)
    return model
