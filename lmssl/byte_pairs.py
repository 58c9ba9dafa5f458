"""Byte-level BPE by tiktoken (extra `fast`): the ids of the `tokenizers` library, several times as fast.

The `tokenizers` library merges the pair that stands first in its list of merges; tiktoken the pair whose union has the
smallest id. The two make the same ids of every text where

1. ids follow the list, and no union stands in it twice: then a listed pair has the same rank for both;
2. the list spells every token out: the token's own bytes merge into it. Then just before its rank they stand as its
   listed pair; and since a merge looks at nothing outside its pair, no other pair with the same union ever stands
   side by side there, in any text;
3. both split a text into the same pieces first, and no part of it stands between them.

`encoder` checks 1 and 2 of each tokenizer that it is given; 3 was checked for every code point (tests/bench/preparation.py), and where a
tokenizer has a pattern of its own `encode` counts the bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How `pre_tokenizers.ByteLevel` splits text (Radford et al. 2019)."""
CHUNK = 64
"""Texts that a thread takes at a time."""


def alphabet() -> dict[str, int]:
    """The letter that a byte-level vocabulary writes for each byte -> the byte.

    >>> len(alphabet()), alphabet()["Ġ"], alphabet()["A"]
    (256, 32, 65)
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


class Fast(NamedTuple):
    """A tiktoken encoding, and the bytes of each of its tokens, where they are to be counted."""

    encoding: Any
    sizes: np.ndarray | None


def encoder(backend: Any) -> Fast | None:
    """That of a `tokenizers.Tokenizer`; None where it is no plain byte-level BPE, or tiktoken is missing."""
    try:
        import tiktoken
    except ImportError:
        return None
    spec = json.loads(backend.to_str())
    model, pattern = spec["model"], _pattern(spec)
    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk", "ignore_merges")
    if pattern is None or spec["normalizer"] or model["type"] != "BPE" or any(model.get(k) for k in unusual) or not all(t["special"] for t in spec["added_tokens"]):
        return None
    letters, added = alphabet(), {t["content"] for t in spec["added_tokens"]}
    vocab = {text: i for text, i in model["vocab"].items() if text not in added}
    merged = [vocab.get("".join(pair), -1) for pair in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])]
    if -1 in merged or sorted(merged) != merged or len(vocab) != len(merged) + 256 or not all(letter in vocab for letter in letters):
        return None
    if any(c not in letters for text in vocab for c in text) or any(backend.model.token_to_id(text) != i or not _reached(backend, text) for text, i in vocab.items()):
        return None
    ranks = {bytes(letters[c] for c in text): i for text, i in vocab.items()}
    try:
        fast = tiktoken.Encoding("lmssl", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError:  # a regular expression that it has no engine for
        return None
    return Fast(fast, None if pattern == GPT2 else _sizes(ranks))


def _sizes(ranks: dict[bytes, int]) -> np.ndarray:
    """Bytes of each token, by id."""
    sizes = np.zeros(max(ranks.values()) + 1, np.int64)
    sizes[list(ranks.values())] = [len(token) for token in ranks]
    return sizes


def _reached(backend: Any, token: str) -> bool:
    return [found.value for found in backend.model.tokenize(token)] == [token]


def _pattern(spec: dict[str, Any]) -> str | None:
    """The regular expression that splits text before any merge: ByteLevel's own, or one that stands before it."""
    steps = spec["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(before) > 1:
        return None
    if not before:
        return GPT2 if last.get("use_regex", True) else None
    (split,) = before
    isolated = split.get("type") == "Split" and split["behavior"] == "Isolated" and not split["invert"] and not last.get("use_regex", True)
    return split["pattern"].get("Regex") if isolated else None


def encode(fast: Fast, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text, uint32; on several threads, since tiktoken leaves the interpreter free.

    Raises:
        ValueError: the pattern leaves a part of a text unmatched, which tiktoken would drop.
    """

    def some(begin: int) -> list[np.ndarray]:
        part = texts[begin : begin + CHUNK]
        found = [fast.encoding.encode_to_numpy(text) for text in part]
        if fast.sizes is not None and any(fast.sizes[ids].sum() != len(text.encode()) for ids, text in zip(found, part, strict=True)):
            raise ValueError("the tokenizer's pattern leaves a part of a text unmatched")
        return found

    if len(texts) <= CHUNK:
        return some(0)
    with ThreadPoolExecutor(os.cpu_count(), "lmssl-bpe") as pool:
        return [ids for part in pool.map(some, range(0, len(texts), CHUNK)) for ids in part]
