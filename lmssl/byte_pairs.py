"""Byte-level BPE by fastokens (extra `fast`): the ids of the `tokenizers` library, more than ten times as fast.

It reads the same tokenizer.json and merges by the same list. Of what it says nothing about, nothing is asked of it: `encoder` takes it for plain
byte-level BPE alone. That the two agree was tried for every code point, and is looked at again while text is prepared: of every batch one text goes
through both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from lmssl.errors import UserError

FIRST = (0, 3, 5)
"""The version that was tried; 0.3.2 makes other ids where a list joins tokens in more ways than one."""


PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""Of GPT-2, Llama 3 and Qwen2. Others are not read alike by both libraries: combining marks are no part of fastokens' `\\w`."""


def alphabet() -> dict[str, int]:
    """The letter that a byte-level vocabulary writes for each byte -> the byte.

    >>> len(alphabet()), alphabet()["Ġ"], alphabet()["A"]
    (256, 32, 65)
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


def encoder(backend: Any) -> Any | None:
    """The `fastokens.Tokenizer` of a `tokenizers.Tokenizer`; None where that is no plain byte-level BPE, or fastokens is missing or older."""
    try:
        import fastokens
    except ImportError:
        return None
    spec = json.loads(backend.to_str())
    if not _plain(spec) or tuple(int(n) for n in metadata.version("fastokens").split(".")[:3] if n.isdigit()) < FIRST:
        return None
    try:
        return fastokens.Tokenizer.from_json_str(json.dumps(spec | {"post_processor": None, "truncation": None, "padding": None}))
    except Exception:  # of what it does not read
        return None


def _plain(spec: dict[str, Any]) -> bool:
    """Whether text is split (by ByteLevel's own pattern, or one of `PATTERNS` before it), written as bytes and merged, and nothing else."""
    model, steps = spec["model"], spec["pre_tokenizer"] or {}
    *before, last = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")
    if spec["normalizer"] or model["type"] != "BPE" or any(model.get(k) for k in unusual) or not all(t["special"] for t in spec["added_tokens"]):
        return False
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(before) > 1 or bool(before) == last.get("use_regex", True):
        return False
    split = all(s.get("type") == "Split" and s["behavior"] == "Isolated" and not s["invert"] and s["pattern"].get("Regex") in PATTERNS for s in before)
    return split and alphabet().keys() <= model["vocab"].keys()


def encode(fast: Any, backend: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text, uint32; a special token spelt in a text is text.

    Args:
        fast: of `encoder`.
        backend: what it was made of; its ids of the first text are compared.

    Raises:
        UserError: they differ.
        ValueError: a text is more than its regular expressions hold.
    """
    if not texts:
        return []
    packed, ends = fast.encode_batch_flat(list(texts), False, True)
    ids = np.split(np.frombuffer(packed, np.uint32), np.frombuffer(ends, np.uint64)[1:-1].astype(np.int64))
    if ids[0].tolist() != backend.encode(texts[0], add_special_tokens=False).ids:
        raise UserError("data.tokenizer: fastokens makes other ids of a text than the tokenizers library; do without it (pip uninstall fastokens), and please report this")
    return ids
