"""What stands in a tokenizer's vocabulary: each token's text, and the special tokens that no text of data may spell."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from lmssl import byte_pairs, words

UNKNOWN = {"<unk>", "[UNK]"}
"""How tokenizers call the token for what they do not know."""
_UNWRITTEN = "\uffff"
"""A code point that no text holds (Unicode: a noncharacter)."""


def facts(texts: list[str], special: np.ndarray, backend: Any) -> dict[str, np.ndarray]:
    """What `Vocab` says of every token's text, read off the vocabulary's own marks."""
    read, count = _style(backend), len(texts)
    found = {name: np.zeros(count, bool) for name in ("word_start", "word_end", "sentence_end")} | {"token_bytes": np.zeros(count, np.int32)}
    for i in np.flatnonzero(~special):
        text, found["word_start"][i], found["word_end"][i], found["token_bytes"][i] = read(texts[i])
        found["word_start"][i] |= words.spaceless(text)
        found["sentence_end"][i] = words.ends_sentence(text)
    return found


def _style(backend: Any) -> Callable[[str], tuple[str, bool, bool, int]]:
    """How a vocabulary writes its tokens: token -> its text, whether it is marked as a word's begin and as its end, the bytes that it stands for."""
    spec = json.loads(backend.to_str())
    inside, suffix = spec["model"].get("continuing_subword_prefix"), spec["model"].get("end_of_word_suffix")
    letters = byte_pairs.alphabet()

    def byte_level(token: str) -> tuple[str, bool, bool, int]:
        end = bool(suffix) and token.endswith(suffix)  # CLIP has both
        token = token.removesuffix(suffix) if suffix else token
        known = all(c in letters for c in token)  # else it was added as it is
        data = bytes(letters[c] for c in token) if known else token.encode()
        text = data.decode("utf-8", "replace")
        return text, text[:1].isspace() or (known and words.punctuation(text)), end, len(data) + (end and _spaced(text[-1:]))

    def word_begins(token: str) -> tuple[str, bool, bool, int]:
        text, start = token.removeprefix(inside), not token.startswith(inside)
        return text, start, False, len(text.encode()) + (start and _spaced(text[:1]))

    def word_ends(token: str) -> tuple[str, bool, bool, int]:
        text, end = token.removesuffix(suffix), token.endswith(suffix)
        return text, False, end, len(text.encode()) + (end and _spaced(text[-1:]))

    def metaspace(token: str) -> tuple[str, bool, bool, int]:
        text, byte = token.replace("▁", " "), len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return text, token.startswith("▁"), False, 1 if byte else len(text.encode())

    if '"ByteLevel"' in json.dumps([spec["pre_tokenizer"], spec["decoder"]]):
        return byte_level
    return word_begins if inside else word_ends if suffix else metaspace


def _spaced(character: str) -> bool:
    """Whether a word that begins or ends so is taken to stand behind a space."""
    return character.isalnum() and not words.spaceless(character)


def spells(backend: Any, special: set[str]) -> bool:
    """Whether a text can spell a special token, although `encode_special_tokens` has the `tokenizers` library look for none: in a vocabulary of
    pieces or words they stand as entries like others, and "<s>" is found by its letters."""
    if type(backend.model).__name__ not in ("Unigram", "WordPiece", "WordLevel"):
        return False
    return any(backend.token_to_id(t) in backend.encode(f"{t} x{t}", add_special_tokens=False).ids for t in special - UNKNOWN)


def without_spellings(backend: Any, special: set[str]) -> Any:
    """A copy with the same ids in which no text spells a special token."""
    from tokenizers import Tokenizer as Backend

    spec = json.loads(backend.to_str())
    model = spec["model"]
    if "unk_token" in model:
        special = special | {model["unk_token"]}
        model["unk_token"] = _UNWRITTEN + model["unk_token"]
        model["vocab"] = {_UNWRITTEN * (piece in special) + piece: i for piece, i in model["vocab"].items()}
    else:
        unknown = model["unk_id"]
        model["vocab"] = [[_UNWRITTEN * (piece in special or i == unknown) + piece, score] for i, (piece, score) in enumerate(model["vocab"])]
    for token in spec["added_tokens"]:
        token["content"] = _UNWRITTEN * (token["content"] in special) + token["content"]
    made = Backend.from_str(json.dumps(spec))
    made.encode_special_tokens = True
    return made
