"""Translation, or any other rewriting of one text as another: beam search, BLEU and chrF by sacrebleu.

BLEU: Papineni et al. 2002; chrF: Popovic 2015; signatures: Post 2018 (arXiv:1804.08771). The outputs are saved as
plain text beside the references, so that `sacrebleu references.txt -i OUTPUT -m bleu chrf` repeats every figure.
How each family writes stands in `lmssl.tasks.generation`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from lmssl.data import corpus
from lmssl.errors import UserError
from lmssl.tasks import generation
from lmssl.tasks.base import Backbone, Example, Item, Task
from lmssl.tokenization import Tokenizer
from lmssl.words import mostly_spaceless

log = logging.getLogger("lmssl")


@dataclass(frozen=True, slots=True)
class Pair(Example):
    """A source text and its translation.

    Attributes:
        target: the translation.
    """

    target: str = ""

    def texts(self) -> tuple[str, ...]:
        return (self.text, self.target)


@dataclass(frozen=True)
class Translation(Task):
    """The task section of a translation recipe; `labels` counts pairs."""

    source: str = "source"
    """Column of the text to translate."""
    target: str = "target"
    """Column of its translation."""
    separator: str = "\n"
    """Decoders: the text between a source and its translation."""
    beams: int = 4
    """Beams of the search; 1 is greedy."""
    max_new_tokens: int | None = None
    """Tokens that are written at most; unset: half of a decoder's length, another model's whole length."""

    name: ClassVar[str] = "translation"
    metric = "bleu"
    column: ClassVar[str | None] = "source"
    classes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beams < 1:
            raise ValueError(f"beams={self.beams} must be at least 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1, or left out")
        if self.method == "probe":
            raise ValueError("method=probe: a frozen model cannot learn to write; use full or lora")

    def read(self, sources: list[corpus.Source]) -> list[Pair]:
        """Every pair of the sources; a source text that stands twice keeps its first translation."""
        found: dict[str, Pair] = {}
        again = 0
        for source in sources:
            for record, where in corpus.labelled(source):
                pair = Pair(corpus.text_of(record, self.source, where), "", where, corpus.text_of(record, self.target, where))
                again += found.setdefault(pair.text, pair) is not pair
        if again:
            log.info("%d pairs whose source stands twice dropped", again)
        return list(found.values())

    def unlabelled(self, record: dict[str, Any], where: str) -> Pair:
        """A record to predict."""
        return Pair(corpus.text_of(record, self.source, where), "", where)

    def writes(self, backbone: Backbone) -> bool:
        return True

    def model(self, backbone: Backbone, pretrained: bool, seed: int) -> PreTrainedModel:
        return generation.model(backbone, pretrained, seed, self.beams, self.max_new_tokens)

    def encode(self, backbone: Backbone, examples: Sequence[Any]) -> list[list[Item]]:
        return [[item] for item in generation.encode(backbone, [e.text for e in examples], [e.target for e in examples], self.separator)]

    def collator(self, backbone: Backbone, multiple: int) -> Callable[[list[Item]], dict[str, Tensor]]:
        return generation.collator(backbone, multiple)

    def predict(self, model: PreTrainedModel, backbone: Backbone, examples: Sequence[Any], batch: int) -> list[str]:
        """The translation of each example."""
        return generation.generate(model, backbone, [e.text for e in examples], self.separator, batch)

    def evaluate(self, model: PreTrainedModel, backbone: Backbone, examples: Sequence[Any], batch: int, compiled: bool = False) -> tuple[dict[str, Any], list[str]]:
        """BLEU and chrF in [0, 1] with their signatures, and the translations."""
        written = self.predict(model, backbone, examples, batch)
        return bleu_and_chrf(written, [" ".join(e.target.split()) for e in examples]), written

    def predictions(self, model: PreTrainedModel, backbone: Backbone, examples: Sequence[Any], batch: int) -> list[dict[str, Any]]:
        """{"translation"}."""
        return [{"translation": text} for text in self.predict(model, backbone, examples, batch)]

    def write_outputs(self, folder: Path, name: str, examples: Sequence[Any], outputs: Sequence[str]) -> None:
        """The translations, and beside them the sources and references, a line each."""
        super().write_outputs(folder, name, examples, outputs)
        super().write_outputs(folder, "sources", examples, [" ".join(e.text.split()) for e in examples])
        super().write_outputs(folder, "references", examples, [" ".join(e.target.split()) for e in examples])

    def check_packages(self) -> None:
        super().check_packages()
        _metrics()

    def usage(self, folder: str, decoder: bool, written: bool) -> str:
        return generation.usage(folder, decoder, "A text to work on." + (self.separator if decoder else ""))

    def finish(self, backbone: Backbone) -> Tokenizer:
        decoder = backbone.family == "decoder"
        return backbone.tokenizer.for_inputs(backbone.length, closing=not decoder, padding_side="left" if decoder else "right")


def _metrics() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise UserError("task: translation is scored by sacrebleu; pip install 'lmssl[tasks]'") from None
    return metrics


def bleu_and_chrf(written: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU and chrF2 as fractions, with sacrebleu's signatures; BLEU of characters where most references have no spaces between words."""
    library, scores = _metrics(), dict[str, Any]()
    by_character = {"tokenize": "char"} if mostly_spaceless(references) else {}
    for name, metric in (("bleu", library.BLEU(**by_character)), ("chrf", library.CHRF())):
        scores[name] = metric.corpus_score(list(written), [list(references)]).score / 100
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores
