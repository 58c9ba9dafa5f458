"""What every task shares: labelled examples, nested subsets, an honest test split, and what a task has to say.

A task is a frozen dataclass whose fields are the recipe's `task` section. It reads examples, builds the model of
either init, encodes, and evaluates; `lmssl.tasks.curve` does everything else, the same for all tasks.
"""

from __future__ import annotations

import math
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lmssl import models, output, tokenization
from lmssl.config import of_folder as config_of_folder
from lmssl.data import corpus
from lmssl.data.stream import generator, mix, permuted
from lmssl.data.tokens import below, content_hash
from lmssl.errors import UserError, said
from lmssl.objectives.base import Family
from lmssl.tasks import adapters
from lmssl.tokenization import Tokenizer

Item = dict[str, Any]
"""One encoded input: arrays and numbers that a collator understands."""
T = TypeVar("T")


def same(text: str) -> str:
    """What two texts have in common that differ in white space, or in how they compose their accents, alone.

    >>> same(" a  film\\n"), same("a film")
    ('a film', 'a film')
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled example.

    Attributes:
        text: what the model reads.
        label: class name, by which subsets are stratified; "" where a task has no classes.
        where: file:line.
    """

    text: str
    label: str
    where: str

    def texts(self) -> tuple[str, ...]:
        """Every text that must not have been seen in pretraining."""
        return (self.text,)

    def group(self) -> str:
        """What examples share that stand on one side of a split: those to train on, or the test set."""
        return self.text


@dataclass(frozen=True)
class Task(ABC):
    """What a task adds to the label curve, and what the `task` section of each may say.

    A task is a frozen dataclass that adds its columns as fields and fills in the abstract methods.
    """

    name: ClassVar[str]
    column: ClassVar[str | None]
    """The field that names the column of a lone text, for inputs without columns; None where one text is not enough."""
    classes: ClassVar[bool]
    """Whether labels are classes, by which subsets are stratified."""
    needs: ClassVar[str] = "columns of its own; give .jsonl, .csv or .parquet"
    """What an input is where a lone text is not enough, and the files that hold it; for a refusal."""

    labels: list[int] = field(default_factory=lambda: [20, 100, 500])
    """Numbers of labelled examples, each a prefix of the next."""
    seeds: int = 5
    """Runs for each number and init."""
    scratch_labels: list[int] = field(default_factory=list)
    """Further numbers for the model from scratch alone: they place the label equivalence."""
    learning_rates: list[float] = field(default_factory=list)
    """At most a few rates; the best by validation loss is chosen for each number and init on seed 0. Empty: the trainer's."""
    validation: float = 0.25
    """Share of the few labels that the choice of a learning rate holds out; the runs themselves train on all."""
    method: Literal["full", "probe", "lora"] = "full"
    """What of the pretrained model is trained: everything, the head alone, or low-rank updates (peft). The twin from scratch always trains everything."""
    lora_rank: int = 8
    """Rank of the low-rank updates."""

    def __post_init__(self) -> None:
        for name in ("labels", "scratch_labels"):
            counts = getattr(self, name)
            if (name == "labels" and not counts) or (counts and min(counts) < 1) or len(set(counts)) < len(counts):
                raise ValueError(f"{name}={counts} must be different whole numbers above 0")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1")
        if self.learning_rates and not all(0 < r < math.inf for r in self.learning_rates):
            raise ValueError(f"learning_rates={self.learning_rates} must be numbers above 0")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation={self.validation} must be above 0 and below 1")
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank={self.lora_rank} must be at least 1")

    @property
    @abstractmethod
    def metric(self) -> str:
        """Which of the scores is the `score`; in [0, 1]."""

    @abstractmethod
    def read(self, sources: list[corpus.Source]) -> list[Any]:
        """Every labelled example of the sources; what is none is refused with file:line."""

    @abstractmethod
    def unlabelled(self, record: dict[str, Any], where: str) -> Any:
        """An example of a record to predict, whose label is not known."""

    @abstractmethod
    def model(self, backbone: Backbone, pretrained: bool, seed: int) -> PreTrainedModel:
        """The model with the task's head, of either init."""

    @abstractmethod
    def encode(self, backbone: Backbone, examples: Sequence[Any]) -> list[list[Item]]:
        """The training items of each example (a long context has several)."""

    @abstractmethod
    def collator(self, backbone: Backbone, multiple: int) -> Callable[[list[Item]], dict[str, Tensor]]:
        """Items -> tensors with `labels`; widths are multiples of `multiple`."""

    @abstractmethod
    def evaluate(self, model: PreTrainedModel, backbone: Backbone, examples: Sequence[Any], batch: int, compiled: bool = False) -> tuple[dict[str, Any], list[str]]:
        """(scores with the metric among them, the output for each example)."""

    @abstractmethod
    def predictions(self, model: PreTrainedModel, backbone: Backbone, examples: Sequence[Any], batch: int) -> list[dict[str, Any]]:
        """What `lmssl predict` writes of each example."""

    @abstractmethod
    def finish(self, backbone: Backbone) -> Tokenizer:
        """The tokenizer to save with a fine-tuned model, so that plain transformers makes the same inputs."""

    def parts(self, example: Any) -> tuple[str, ...]:
        """The texts of an input, in the order in which a tokenizer is given them."""
        return (example.text,)

    def usage(self, folder: str, decoder: bool, written: bool) -> str:
        """Python that uses the fine-tuned model in plain transformers, for its card; "" where there is none to show.

        Args:
            folder: of the model, as a Python literal.
            decoder: whether the model is one.
            written: whether it writes its answers.
        """
        return ""

    def fitted(self, train: Sequence[Any], test: Sequence[Any]) -> Any:
        """The task with what is left to the labelled data decided, which the test set has no part in; refused where the two do not suit it."""
        return self

    def check_packages(self) -> None:
        """Refuse, before anything is trained, what needs a package that is not installed."""
        if self.method == "lora":
            adapters.peft()

    def writes(self, backbone: Backbone) -> bool:
        """Whether the model answers by writing text."""
        return False

    def notes(self, backbone: Backbone, examples: Sequence[Any]) -> dict[str, int]:
        """Counts about the test examples that the result should state."""
        return {}

    def scores(self, truth: Sequence[str], guesses: Sequence[str]) -> dict[str, float]:
        """Of guessed classes; a task with `classes` and another metric than accuracy has its own."""
        return {"accuracy": sum(a == b for a, b in zip(truth, guesses, strict=True)) / len(truth)}

    def majority(self, examples: Sequence[Any]) -> float:
        """What the largest class as every answer scores; 0 where there are no classes."""
        if not self.classes:
            return 0.0
        truth = [e.label for e in examples]
        ((largest, _),) = Counter(truth).most_common(1)
        return self.scores(truth, [largest] * len(truth))[self.metric]

    def write_outputs(self, folder: Path, name: str, examples: Sequence[Any], outputs: Sequence[str]) -> None:
        """Save the output for each test example: a line each."""
        folder.mkdir(parents=True, exist_ok=True)
        output.write(folder / f"{name}.txt", "".join(line + "\n" for line in outputs))


UNBOUNDED = 256
"""Tokens that a model of relative positions (T5) reads, where `data.max_length` does not say."""


@dataclass(frozen=True)
class Backbone:
    """A checkpoint to fine-tune, and how its inputs are made.

    Attributes:
        source: folder or hub id.
        config: its transformers configuration.
        family: decoder, encoder or encoder-decoder.
        tokenizer: its tokenizer.
        length: tokens that the model reads.
        classes: class names in the order of their numbers; empty where a task has none.
    """

    source: str
    config: PretrainedConfig
    family: Family
    tokenizer: Tokenizer
    length: int
    classes: tuple[str, ...] = ()

    @classmethod
    def load(cls, source: str, max_length: int | None = None, classes: Sequence[str] = ()) -> Backbone:
        """Read configuration and tokenizer; weights wait.

        Raises:
            UserError: no checkpoint there, or more tokens asked for than it has positions.
        """
        config = models.read_config(source, "model.from")
        limit = models.max_length(config)
        if max_length and limit and max_length > limit:
            raise UserError(f"data.max_length: {max_length} tokens, but the backbone has {limit} positions")
        tokenizer = tokenization.load(source)
        if tokenizer.id("eos") is None:
            raise UserError(f"model.from: the tokenizer of {source} has no eos token; lmssl pretrain with model.from={source} adds one, and trains it")
        trained = config_of_folder(source).get("data", {}).get("seq_length")  # a continued checkpoint may have positions for more
        usual = min(limit, trained or limit) if limit else UNBOUNDED
        return cls(source, config, models.family_of(config), tokenizer, max_length or usual, tuple(classes))

    @property
    def pad(self) -> int:
        return self.config.pad_token_id if self.config.pad_token_id is not None else self.tokenizer.vocab().pad

    def begin(self) -> list[int]:
        """What every input begins with: bos, where the tokenizer has one."""
        bos = self.tokenizer.id("bos")
        return [] if bos is None else [bos]

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, no special token around them; int32 arrays."""
        begin = len(self.begin())
        return [ids[begin:-1] for ids in self.tokenizer.encode(list(texts))]

    def build(self, auto: Any, pretrained: bool, seed: int, **changes: Any) -> PreTrainedModel:
        """A model of class `auto` in float32: from the checkpoint, or from its configuration with random weights.

        What the checkpoint lacks (the head) is drawn from the seed for both.
        """
        start = {"decoder_start_token_id": self.tokenizer.vocab().start} if self.family == "encoder-decoder" and models.decoder_start(self.config) is None else {}
        config = type(self.config).from_dict(self.config.to_dict() | {"pad_token_id": self.pad} | start | changes)
        eos = self.tokenizer.eos()
        torch.manual_seed(seed)
        try:
            if not pretrained:
                model = auto.from_config(config, **models.attention(self.length, config)).float()
                models.train_every_token(model, self.pad, eos)
                if self.began_local():  # what needs no text is not pretraining's gain
                    models.begin_local(model, slow=False)
                return model
            renamed = self._renamed(auto)
            keys = {"config": config, **models.attention(self.length, config), "use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
            with models.quietly():
                model, info = auto.from_pretrained(self.source, output_loading_info=True, key_mapping=renamed, **keys)
            models.keep_names(model)
        except ValueError as error:
            raise UserError(f"model.from: {config.model_type} has no {auto.__name__.removeprefix('AutoModel')} head in transformers: {said(error)}") from error
        except Exception as error:  # no weights, a pickle, a broken file: a type for each library in between
            why = f"the weights cannot be loaded: {said(error)}{models.pickled(self.source)}"
            if "ignore_mismatched_sizes" in str(error):
                why = f"its weights are of other shapes than {auto.__name__.removeprefix('AutoModel')} has here, for example of a head for other classes"
            raise UserError(f"model.from: {self.source}: {why}") from error
        models.train_every_token(model, self.pad, eos)
        models.mark_drawn(model, info["missing_keys"])
        body = [name for name, _ in model.named_parameters() if name.startswith(f"{model.base_model_prefix}.")]
        drawn = models.drawn(model)
        if body and len(drawn.intersection(body)) > len(body) // 2:
            raise UserError(f"model.from: {self.source}: its weights do not reach {type(model).__name__}: {len(drawn)} tensors are missing, {min(drawn)} ...")
        return model

    def began_local(self) -> bool:
        """Whether the checkpoint's own training, or that of the one which it continues, began as `models.begin_local` has it."""
        folder, seen = self.source, set[str]()
        while folder not in seen:
            seen.add(folder)
            section = config_of_folder(folder).get("model", {})
            if "architecture" in section:
                return models.init_of(section) != "default"
            folder = str(section.get("from", folder))
        return False

    def _renamed(self, auto: Any) -> dict[str, str] | None:
        """Pattern -> replacement for the names of a pretrained checkpoint, where a head's class calls the model beneath it otherwise.

        In transformers 5.23 Llama's question-answering head says `transformer`, its language-modelling head `model`;
        from_pretrained would leave every weight at random, with no more than a warning.
        """
        kind = type(self.config)
        names = [auto_class._model_mapping[kind].base_model_prefix for auto_class in (models.AUTO[self.family], auto) if kind in auto_class._model_mapping]
        return {rf"^{names[0]}\.": f"{names[1]}."} if len(set(names)) == 2 and all(names) else None


def has_classifier(config: Any) -> bool:
    """Whether a checkpoint was saved with a classification head, which fine-tuning keeps."""
    return any("SequenceClassification" in name for name in config.architectures or ())


def steps_for(labels: int) -> int:
    """Optimizer steps for a number of labels, the same for both inits: 16 + 8 * sqrt(labels)."""
    return 16 + round(8 * math.sqrt(labels))


def nested(examples: Sequence[Example], seed: int) -> list[int]:
    """An order whose every prefix is stratified: the first 20 stand within the first 100.

    Each class is shuffled on its own; classes are then interleaved in proportion to their size.
    """
    by_class: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        by_class.setdefault(example.label, []).append(i)
    keyed = []
    for number, (_, members) in enumerate(sorted(by_class.items())):
        order = generator(mix(seed, 0x5EED), number).permutation(len(members))
        keyed += [((rank + 0.5) / len(members), number, members[at]) for rank, at in enumerate(order)]
    return [i for _, _, i in sorted(keyed)]


def split_test(examples: list[Example], test: float) -> tuple[list[Example], list[Example]]:
    """(train, test): the test documents have the smallest content hashes: a fraction of them, or a number.

    The same rule as `data.held_out` in pretraining, so a fraction given in both keeps the test text out of both.
    """
    hashes = np.array([content_hash(e.group()) for e in examples], np.uint64)
    if isinstance(test, float):
        chosen = hashes < np.uint64(below(test))
    else:
        if not 0 < test < len(examples):
            raise UserError(f"data.test: {test} of {len(examples)} examples; leave some to train on")
        chosen = hashes <= np.sort(hashes)[test - 1]
    return [e for e, c in zip(examples, chosen, strict=True) if not c], [e for e, c in zip(examples, chosen, strict=True) if c]


def split_validation(labels: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """(train, validation): places of examples in `nested` order, the share taken of each class. Where classes are too small for that,
    the last of some of them make the share of all up; at least one in all.

    >>> split_validation(["a", "b"] * 4, 0.25)
    ([0, 1, 2, 3, 4, 5], [6, 7])
    """
    seen: dict[str, int] = {}
    held: list[int] = []
    for place, label in enumerate(labels):
        before = seen.get(label, 0)
        seen[label] = before + 1
        if int((before + 1) * share + 1e-9) > int(before * share + 1e-9):
            held.append(place)
    tested = {labels[place] for place in held}
    for place in reversed(range(len(labels))):
        if len(held) < int(len(labels) * share + 1e-9) and labels[place] not in tested and seen[labels[place]] > 1:
            held.append(place)
            tested.add(labels[place])
    held = sorted(held) or [len(labels) - 1]
    out = set(held)
    return [i for i in range(len(labels)) if i not in out], held


class Few(torch.utils.data.Dataset):
    """A few encoded items as a stream: item i of the run, shuffled anew each epoch.

    Args:
        items: all of an epoch.
        places: where the example of each stands, as file:line.
        seed: of the order.
        length: items of the run.
    """

    def __init__(self, items: list[Item], places: list[str], seed: int, length: int):
        self.items, self.places, self.seed, self.length = items, places, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Item:
        return self.items[self._at(i)]

    def _at(self, i: int) -> int:
        epoch, k = divmod(i, len(self.items))
        return permuted(k, len(self.items), self.seed, epoch)

    def where(self, i: int) -> str:
        """Where the example of item i stands."""
        return self.places[self._at(i)]


def padded(rows: Sequence[Any], fill: int, multiple: int = 1, left: bool = False, most: int | None = None) -> Tensor:
    """Rows of different lengths as one int64 [B, L], L the longest rounded up to a multiple, but to no more than `most`."""
    longest = max(map(len, rows))
    width = max(longest, min(-(-longest // multiple) * multiple, most or 2**31))
    out = np.full((len(rows), width), fill, np.int64)
    for b, row in enumerate(rows):
        begin = width - len(row) if left else 0
        out[b, begin : begin + len(row)] = row
    return torch.from_numpy(out)


def inputs_of(rows: Sequence[Any], pad: int, multiple: int = 8, left: bool = False, most: int | None = None) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, L], as `padded`; a model has no positions beyond its length."""
    return {"input_ids": padded(rows, pad, multiple, left, most), "attention_mask": padded([np.ones(len(r), np.int64) for r in rows], 0, multiple, left, most)}


def by_length(items: Sequence[T], length: Callable[[T], int], batch: int, work: Callable[[list[T]], Sequence[Any]]) -> list[Any]:
    """Apply `work` to batches of similar length, longest first (a batch too large for memory fails at once); results in order."""
    order = sorted(range(len(items)), key=lambda i: -length(items[i]))
    results: list[Any] = [None] * len(items)
    for members in batched(order, batch):
        for i, value in zip(members, work([items[i] for i in members]), strict=True):
            results[i] = value
    return results


def batched(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of at most `size`."""
    for begin in range(0, len(values), size):
        yield values[begin : begin + size]
