"""Tokenizers: train, load, check, complete; and the `Vocab` that objectives see. Imports neither torch nor transformers.

A tokenizer is a folder with `tokenizer.json` (the `tokenizers` library's file) and `tokenizer_config.json` (which
names the special tokens), as `AutoTokenizer` reads it and `save_pretrained` writes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lmssl import byte_pairs, output, vocabulary
from lmssl.errors import UserError, did_you_mean, said
from lmssl.objectives.base import Objective, Vocab

log = logging.getLogger("lmssl")

SENTINELS = [f"<extra_id_{i}>" for i in range(100)]
ROLES = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "mask": "<mask>"}
"""The special tokens that a new tokenizer gets, by role."""
KINDS = ("bpe", "wordpiece", "unigram")
_NAMED = tuple(f"{role}_token" for role in ("pad", "bos", "cls", "eos", "sep", "mask"))
"""Settings that name the tokens of a role."""
_VOCABULARY = re.compile(r"vocab|merges|spiece|sentencepiece|spm|tekken|tiktoken|bpe|\.model")
"""Names of the files that hold one in the formats before tokenizer.json."""
MOST_UNKNOWN, MANY_UNKNOWN = 0.5, 0.05
"""Shares of unknown tokens above which text is refused, and warned of."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass
class Tokenizer:
    """A `tokenizers.Tokenizer` with the roles of its special tokens.

    Attributes:
        backend: the tokenizer itself.
        roles: token text by role: pad, bos, eos, mask (those it has; [CLS] serves as bos and [SEP] as eos).
        sentinels: token texts, <extra_id_0> first.
        settings: the rest of tokenizer_config.json, kept when it is saved again.
        source: where it was loaded from, for messages.
    """

    backend: Any
    roles: dict[str, str]
    sentinels: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @cached_property
    def reader(self) -> Any:
        """What text of data is encoded by: the backend, or a copy in which no spelling leads to a special token."""
        return vocabulary.without_spellings(self.backend, self._special()) if vocabulary.spells(self.backend, self._special()) else self.backend

    @cached_property
    def _fast(self) -> Any:
        """What makes the same ids faster, where that is possible (lmssl.byte_pairs)."""
        return byte_pairs.encoder(self.backend)

    def _special(self) -> set[str]:
        """Texts of the special tokens."""
        marked = (token.content for token in self.backend.get_added_tokens_decoder().values() if token.special)
        return {*self.roles.values(), *self.sentinels, *marked}

    def id(self, role: str) -> int | None:
        """The id of a role's token, None where there is none."""
        text = self.roles.get(role)
        return None if text is None else self.backend.token_to_id(text)

    @property
    def size(self) -> int:
        """Number of ids: one more than the largest."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def hash(self) -> str:
        """sha256 over what decides ids and roles."""
        # Unigram scores change in their last digit when they are written and read again.
        spec = json.loads(self.backend.to_str(), parse_float=lambda digits: round(float(digits), 6))
        content = json.dumps([spec, self.roles, self.sentinels, *(["read without spellings"] if vocabulary.spells(self.backend, self._special()) else [])], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def eos(self) -> int:
        """The id that ends every document; refused where there is none."""
        eos = self.id("eos")
        if eos is None:
            raise UserError(f"data.tokenizer: {self.source} has no eos token; add it with: lmssl tokenizer --from {self.source} --out NEW_FOLDER")
        return eos

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text between bos (where there is one) and eos; a special token spelt in a text is plain text.

        Returns:
            int32 arrays.
        """
        bos = [self.id("bos")] if "bos" in self.roles else []
        eos = [self.eos()]
        if self._fast is not None:
            with contextlib.suppress(ValueError):
                return [np.concatenate([bos, ids, eos]).astype(np.int32) for ids in byte_pairs.encode(self._fast, self.backend, texts)]
        return [np.array(bos + e.ids + eos, np.int32) for e in self.reader.encode_batch_fast(texts, add_special_tokens=False)]

    def template(self, text: str) -> np.ndarray:
        """Ids of a text of the user's own, not of data: special tokens spelt in it are special tokens. int32 [n]."""
        self.backend.encode_special_tokens = False
        try:
            return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.int32)
        finally:
            self.backend.encode_special_tokens = True

    def spans(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids of each text, without bos and eos, and the characters that each token stands for.

        Returns:
            (ids int32 [n], spans int64 [n, 2]): `text[begin:end]` is the token's text without white space around it.
        """
        found = []
        for text, encoding in zip(texts, self.reader.encode_batch(texts, add_special_tokens=False), strict=True):
            spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            for n, (begin, end) in enumerate(encoding.offsets):
                # Byte-level and Unigram tokens carry the space before a word.
                while begin < end - 1 and text[begin].isspace():
                    begin += 1
                while end > begin + 1 and text[end - 1].isspace():
                    end -= 1
                spans[n] = begin, end
            found.append((np.array(encoding.ids, np.int32), spans))
        return found

    def for_inputs(self, length: int, truncation_side: str = "right", *, closing: bool = True, padding_side: str = "right", special: bool = False) -> Tokenizer:
        """A copy that makes a fine-tuned model's inputs in plain transformers: bos, text (eos, second text), eos.

        Args:
            length: tokens that the model reads.
            truncation_side: left keeps the end of a long text.
            closing: whether the input ends with eos.
            padding_side: left for decoders that generate.
            special: whether special tokens spelt in a text are special tokens; else they are text, as they are in training.
        """
        made = self._laid_out(closing)
        made.settings |= {"model_max_length": length, "truncation_side": truncation_side, "padding_side": padding_side, "split_special_tokens": not special}
        made.settings["model_input_names"] = ["input_ids", "attention_mask"]
        made.roles = {"pad": self.roles["eos"]} | self.roles  # what the model is padded with, else no pipeline would batch
        return made

    def for_prompts(self) -> Tokenizer:
        """The tokenizer to save with a decoder: one that ends a text with eos, behind which there is nothing to generate, is laid out anew without."""
        eos = self.id("eos")
        return self._laid_out(closing=False) if eos is not None and self.backend.encode("a").ids[-1:] == [eos] else self

    def _laid_out(self, closing: bool) -> Tokenizer:
        """A copy that lays a text out as lmssl does: bos (where there is one), text (eos, second text), eos where it closes."""
        from tokenizers import Tokenizer as Backend
        from tokenizers.processors import TemplateProcessing

        backend = Backend.from_str(self.backend.to_str())
        bos, eos = ([self.roles["bos"]] if "bos" in self.roles else []), self.roles["eos"]
        end = [eos] if closing else []
        tokens = [(t, backend.token_to_id(t)) for t in {*bos, eos}]
        backend.post_processor = TemplateProcessing(single=[*bos, "$A", *end], pair=[*bos, "$A", eos, "$B", *end], special_tokens=tokens)
        # A class of an architecture of its own (RobertaTokenizer) would put its own template in the place of this one.
        return Tokenizer(backend, dict(self.roles), self.sentinels, self.settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, self.source)

    def unknown(self) -> int | None:
        """The id that stands for what the vocabulary does not hold; None where there is none, or one with another role."""
        model = self.backend.model
        if hasattr(model, "unk_token"):
            found = self.backend.token_to_id(model.unk_token or "")
        else:  # Unigram's is a number that its binding does not show
            found = json.loads(self.backend.to_str())["model"]["unk_id"]
        return None if found in map(self.id, self.roles) else found

    def check_known(self, unknown: int, tokens: int, where: str) -> None:
        """Refuse text that is mostly unknown to the vocabulary; say so where much of it is.

        Args:
            unknown, tokens: how many of how many.
            where: the recipe's key of the text.
        """
        said = f"{where}: {unknown:,} of {tokens:,} tokens are unknown to the tokenizer {self.source}"
        if unknown > MOST_UNKNOWN * tokens:
            raise UserError(f"{said}; train one on text of this kind: lmssl tokenizer TEXT --out FOLDER")
        if unknown > MANY_UNKNOWN * tokens:
            log.warning("%s; one trained on text of this kind would lose less of it", said)

    def round_trip(self, texts: list[str]) -> list[str]:
        """What is left of each text after encoding and decoding: all of it, or its lower case, its accents gone, ..."""
        encoded = self.reader.encode_batch_fast(texts, add_special_tokens=False)
        return self.backend.decode_batch([e.ids for e in encoded], skip_special_tokens=True)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens shown."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def lacks(self, objective: Objective) -> list[str]:
        """What an objective needs and the tokenizer has not, of "eos" (which all need), "mask" and "sentinels"."""
        return [need for need in ("eos", *sorted(objective.needs)) if not (self.sentinels if need == "sentinels" else need in self.roles)]

    def check(self, objective: Objective, name: str) -> None:
        """Refuse a tokenizer that lacks what an objective needs, naming the command that adds it."""
        if missing := self.lacks(objective):
            raise UserError(
                f"data.tokenizer: {self.source or 'the tokenizer'} has no {' and no '.join(missing)} token, which objective '{name}' needs; "
                f"add it with: lmssl tokenizer --from {self.source or 'FOLDER'} --out NEW_FOLDER"
            )

    def check_architecture(self, config: Any, trained: bool = False) -> None:
        """Refuse an architecture of which transformers would read this tokenizer as another; of a model that was trained so, warn.

        For some (Qwen2) AutoTokenizer takes the architecture's own class, whatever tokenizer_config.json says, and cuts text by the rules of that.

        Args:
            config: the model's, of transformers.
            trained: whether the model is a checkpoint with this tokenizer.
        """
        from transformers.models.auto import tokenization_auto

        if config.model_type not in getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", ()):
            return
        text, found = "In 2010 (a word), it's £5:\n\n  caf\u00e9 naïve\u0301 — 12,345 don't.", None
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(TypeError, ValueError, KeyError):  # where the class can make nothing of it
            self.save(folder)
            config.save_pretrained(folder)
            found = _theirs(Path(folder))(text, add_special_tokens=False)["input_ids"]
        if found == self.backend.encode(text, add_special_tokens=False).ids:
            return
        why = f"transformers reads every tokenizer of a '{config.model_type}' by rules of that architecture's own, and this one as another than it is"
        if not trained:
            raise UserError(f"model.architecture: {why}; take an architecture that has none, for example llama or qwen3")
        log.warning("model.from: %s: %s; lmssl reads it as it is, so the model's answers in plain transformers will be others", self.source, why)

    def complete(self, sentinels: bool = True) -> list[str]:
        """Add the missing of pad, bos, eos, mask and the 100 sentinels; returns the added tokens in id order."""
        from tokenizers import AddedToken

        added = [token for role, token in ROLES.items() if role not in self.roles and role != "bos"]
        self.roles |= {role: token for role, token in ROLES.items() if token in added}
        if sentinels and len(self.sentinels) < len(SENTINELS):
            added += [s for s in SENTINELS if self.backend.token_to_id(s) is None]
            self.sentinels = list(SENTINELS)
        self.backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in added])
        for name in ("reader", "_fast", "_vocab"):  # made of what there was
            self.__dict__.pop(name, None)
        return added

    def vocab(self, start: int | None = None) -> Vocab:
        """What objectives see of it. `start`: the decoder's start id where a model fixes one; else bos, else pad."""
        return self._vocab if start is None else dataclasses.replace(self._vocab, start=start)

    @cached_property
    def _vocab(self) -> Vocab:
        """Of 250,000 tokens it takes nine seconds."""
        size, texts = self.size, [""] * self.size
        for text, i in self.backend.get_vocab(with_added_tokens=True).items():
            texts[i] = text
        special = np.zeros(size, bool)
        for i, token in self.backend.get_added_tokens_decoder().items():
            special[i] = token.special
        for text in [*self.roles.values(), *self.sentinels, *vocabulary.UNKNOWN]:
            if (i := self.backend.token_to_id(text)) is not None:
                special[i] = True
        special |= np.array([t == "" for t in texts])
        eos = self.eos()
        pad, bos = self.id("pad"), self.id("bos")
        return Vocab(
            size=size,
            pad=eos if pad is None else pad,
            bos=bos,
            eos=eos,
            mask=self.id("mask"),
            start=bos if bos is not None else eos if pad is None else pad,
            sentinels=np.array([self.backend.token_to_id(s) for s in self.sentinels], np.int32),
            special=special,
            **vocabulary.facts(texts, special, self.backend),
        )

    def save(self, folder: str | Path) -> None:
        """Write the folder that `AutoTokenizer` and `load` read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        output.write(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": int(1e30), "clean_up_tokenization_spaces": False} | self.settings
        settings |= {f"{role}_token": text for role, text in self.roles.items()}
        settings["extra_special_tokens"] = self.sentinels
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load(source: str | Path) -> Tokenizer:
    """A tokenizer from a folder or, with a network, a hub id.

    Raises:
        UserError: no such folder and no such id, a folder without tokenizer files, a broken file.
    """
    folder = _fetch(str(source))
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _load_slow(source, folder)
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
        settings: dict[str, Any] = {}
        for name in reversed(_FILES[1:]):
            if (folder / name).is_file():
                settings |= json.loads((folder / name).read_text(encoding="utf-8"))
    except Exception as error:  # the backend raises bare Exception
        raise UserError(f"data.tokenizer: {path} cannot be read: {said(error)}") from error
    if not any(name in settings for name in _NAMED):  # google-bert's: transformers has them with the architecture's class
        with contextlib.suppress(Exception):  # of many types, where there is no config.json that tells the class
            settings |= _named_by(_theirs(folder))
    return _assemble(backend, settings, str(source))


def _theirs(folder: Path) -> Any:
    """The tokenizer as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _named_by(theirs: Any) -> dict[str, Any]:
    """The special tokens that a tokenizer of transformers names, as settings."""
    return {name: getattr(theirs, name, None) for name in _NAMED}


def _assemble(backend: Any, settings: dict[str, Any], source: str) -> Tokenizer:
    backend.encode_special_tokens = True  # "</s>" spelt in a review is text, not the end of the document
    backend.no_padding()
    backend.no_truncation()

    def text_of(role: str) -> str | None:
        value = settings.get(f"{role}_token")
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) and backend.token_to_id(value) is not None else None

    roles = {"pad": text_of("pad"), "bos": text_of("bos") or text_of("cls"), "eos": text_of("eos") or text_of("sep"), "mask": text_of("mask")}
    sentinels = [found for s in SENTINELS if (found := next((t for t in (s, f"▁{s}") if backend.token_to_id(t) is not None), None))]  # mT5's are ordinary pieces
    drop = {f"{role}_token" for role in (*roles, "additional_special")} | {"extra_special_tokens", "additional_special_tokens"}
    kept = {k: v for k, v in settings.items() if k not in drop}
    return Tokenizer(backend, {r: t for r, t in roles.items() if t}, sentinels, kept, source)


def _fetch(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"data.tokenizer: {source} is a file; name the folder that holds tokenizer.json")
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        siblings = [str(folder.parent / p.name) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = did_you_mean(source, siblings) if siblings else "train one with: lmssl tokenizer --help"
        raise UserError(f"data.tokenizer: no such folder: {source}; {hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[*_FILES, "*.model", "vocab.*", "merges.txt"]))
    except Exception as error:  # offline, unknown id, refused: many types, one way out
        raise UserError(
            f"data.tokenizer: '{source}' is no folder here and cannot be had from the hub ({type(error).__name__}); train one with: lmssl tokenizer TEXT --out {source}"
        ) from error


def _load_slow(source: str | Path, folder: Path) -> Tokenizer:
    """A folder without tokenizer.json: transformers converts the old formats, and of a folder without any makes a tokenizer that knows nothing."""
    if not any(_VOCABULARY.search(path.name) for path in folder.glob("*")):
        raise UserError(f"data.tokenizer: {source} holds no tokenizer: neither tokenizer.json nor a vocabulary")
    try:
        theirs = _theirs(folder)
        backend = theirs.backend_tokenizer
    except Exception as error:
        if any(folder.glob("*.model")) and any(importlib.util.find_spec(name) is None for name in ("sentencepiece", "google")):
            raise UserError(f"data.tokenizer: {source} holds a SentencePiece model alone; to read it: pip install sentencepiece protobuf") from error
        raise UserError(f"data.tokenizer: {source} holds no tokenizer that can be loaded: {said(error)}") from error
    return _assemble(backend, _named_by(theirs), str(source))


def train(texts: Iterable[str], kind: str = "bpe", size: int = 8192, progress: bool = False) -> Tokenizer:
    """Train a tokenizer with pad, bos, eos, mask and 100 sentinels, ready for every objective.

    Args:
        texts: documents; read once, so a generator will do.
        kind: "bpe" (byte-level, no unknown token), "wordpiece" (lower case, accents and voicing marks dropped, as BERT's) or "unigram".
        size: number of ids, special tokens included.
        progress: bars on standard error.

    Raises:
        UserError: an unknown kind, a size too small to hold the special tokens and the alphabet.
    """
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    special = [*ROLES.values(), *([] if kind == "bpe" else ["<unk>"]), *SENTINELS]
    tokens = [AddedToken(t, normalized=False, special=True) for t in special]
    if kind not in KINDS:
        raise UserError(f"kind: no tokenizer kind '{kind}'; {did_you_mean(kind, KINDS)}")
    if size < len(special) + 256:
        raise UserError(f"size: {size} ids hold no vocabulary beside {len(special)} special tokens and 256 bytes; use at least {len(special) + 256}")
    if kind == "bpe":
        backend = Backend(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(vocab_size=size, special_tokens=tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=2, show_progress=progress)
    elif kind == "wordpiece":
        backend = Backend(models.WordPiece(unk_token="<unk>"))
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=tokens, show_progress=progress)
    else:
        backend = Backend(models.Unigram())
        backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizers.NFKC(), pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=tokens, unk_token="<unk>", show_progress=progress)
    try:
        backend.train_from_iterator(_counted(texts), trainer)
    except UserError:
        raise
    except Exception as error:  # the backend raises bare Exception
        raise UserError(f"size: {size} ids do not do for this text: {said(error)}; a larger one, or kind bpe, which needs 256 bytes alone") from error
    if backend.get_vocab_size() > size:  # WordPiece keeps every character
        raise UserError(f"size: the text has more characters than {size} ids hold: {backend.get_vocab_size()} would do, or kind bpe, which needs 256 bytes alone")
    bos, eos = ROLES["bos"], ROLES["eos"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", pair=f"{bos} $A {eos} $B:1 {eos}:1", special_tokens=[(t, backend.token_to_id(t)) for t in (bos, eos)]
    )
    settings = {} if kind == "bpe" else {"unk_token": "<unk>"}
    tokenizer = Tokenizer(backend, dict(ROLES), list(SENTINELS), settings, f"a new {kind} tokenizer")
    backend.encode_special_tokens = True
    return tokenizer


def check_texts(texts: Any) -> None:
    """Refuse what Python would take apart into something else than documents: a text into letters, a table into its columns' names."""
    if isinstance(texts, str | bytes | dict) or hasattr(texts, "columns"):
        raise UserError(
            f"texts: expected documents, one after the other, got a {type(texts).__name__}" + ("; its column of texts: table['text']" if hasattr(texts, "columns") else "")
        )


def _counted(texts: Iterable[str]) -> Iterator[str]:
    check_texts(texts)
    count = 0
    for text in texts:
        count += 1
        if not isinstance(text, str):
            raise UserError(f"document {count}: expected text, got {type(text).__name__}")
        yield text
    if not count:
        raise UserError("text: no document to train a tokenizer on")
