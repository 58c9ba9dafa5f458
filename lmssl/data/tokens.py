"""A token set, read: a memory-mapped Hugging Face `Dataset` on disk, its manifest and its tokenizer.

    FOLDER/manifest.json    sources with sha256, tokenizer hash, counts
    FOLDER/tokenizer/       the tokenizer that made it
    FOLDER/train/           load_from_disk: input_ids (with bos and eos), bytes of text
    FOLDER/held_out/        the same for the held-out documents

`lmssl.data.preparation` makes them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lmssl import tokenization
from lmssl.errors import UserError
from lmssl.objectives.base import Row, Vocab
from lmssl.tokenization import Tokenizer

FORMAT = 2
"""Raised where the same text and tokenizer come to mean other ids, so that text is prepared again."""
DATA = "data-00000-of-00001.arrow"


def content_hash(text: str) -> int:
    """The first 64 bits of the text's sha256: what splits and finds duplicates, wherever the text came from."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def below(fraction: float) -> int:
    """Documents whose `content_hash` lies below this are the held-out (or test) fraction."""
    return int(fraction * 2**64)


class TokenSet:
    """A prepared token set; rows are cut from its documents laid end to end.

    Attributes:
        folder: where it lies.
        split: "train" or "held_out".
        manifest: counts, sources, tokenizer hash.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder, self.split = Path(folder), split
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            files = json.loads((self.folder / split / "state.json").read_text(encoding="utf-8"))["_data_files"] if self.manifest[split]["documents"] else []
            # Zero-copy views of the memory-mapped Arrow buffers, and the running number of each document's first token.
            self._values: list[np.ndarray] = []
            self._starts = np.empty(self.manifest[split]["documents"], np.int64)
            self.documents = self.tokens = 0
            for chunk in chain.from_iterable(_chunks(self.folder / split / f["filename"]) for f in files):
                offsets, after = _numbers(chunk.offsets), self.documents + len(chunk)
                np.add(offsets[:-1], self.tokens - int(offsets[0]), out=self._starts[self.documents : after], dtype=np.int64)
                self._values.append(_numbers(chunk.flatten()))
                self.documents, self.tokens = after, self.tokens + len(self._values[-1])
            if self.documents < len(self._starts):
                raise ValueError(f"{split} has {self.documents} documents of {len(self._starts)}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: not a token set (made by `lmssl prepare`): {error}") from None
        self._chunk_starts = np.concatenate([[0], np.cumsum([len(v) for v in self._values])]).astype(np.int64)

    def __len__(self) -> int:
        return self.tokens

    def __reduce__(self) -> tuple[Any, ...]:
        # A data worker that is not a fork maps the files itself, instead of taking a copy of every token.
        return TokenSet, (self.folder, self.split)

    def held_out(self) -> TokenSet:
        """The held-out documents of the same text."""
        return TokenSet(self.folder, "held_out")

    def texts(self) -> Iterator[str]:
        """Each document, decoded."""
        tokenizer, bounds = self.tokenizer, [*self._starts.tolist(), self.tokens]
        backend, at = tokenizer.backend, 0
        while at < self.documents:
            until = min(at + 256, self.documents)
            block = self._slice(bounds[at], bounds[until])
            cuts = [b - bounds[at] for b in bounds[at : until + 1]]
            yield from backend.decode_batch([block[a:b].tolist() for a, b in pairwise(cuts)], skip_special_tokens=True)
            at = until

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made it."""
        return tokenization.load(self.folder / "tokenizer")

    def vocab(self, start: int | None = None) -> Vocab:
        """What objectives see of the tokenizer."""
        return self.tokenizer.vocab(start)

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        return {"data": [s["sha256"] for s in self.manifest["sources"]], "tokenizer": self.manifest["tokenizer"], "tokens": self.manifest["train"]["tokens"]}

    def rows(self, length: int) -> int:
        """Number of rows of `length` tokens; the last may be shorter."""
        return -(-self.tokens // length)

    def most_documents(self, length: int) -> int:
        """Documents in a row of `length` tokens, at most, those that the row cuts and padding behind the last included."""
        begun = np.bincount(self._starts // length) if len(self._starts) else np.zeros(1, int)
        return int(begun.max()) + 2  # one goes on from the row before; padding counts as one

    def row(self, k: int, length: int, pad: int) -> Row:
        """Row k: tokens [k * length, (k + 1) * length) of the documents laid end to end, padded behind the last."""
        begin, end = k * length, min((k + 1) * length, self.tokens)
        ids, segments = np.full(length, pad, np.int32), np.zeros(length, np.int32)
        ids[: end - begin] = self._slice(begin, end)
        first = int(np.searchsorted(self._starts, begin, "right"))
        inside = self._starts[first : int(np.searchsorted(self._starts, end, "left"))] - begin
        segments[: end - begin] = 1
        np.add.at(segments, inside, 1)
        segments[: end - begin] = np.cumsum(segments[: end - begin]) - np.arange(end - begin)
        return Row(ids, segments)

    def _slice(self, begin: int, end: int) -> np.ndarray:
        """Tokens [begin, end), int32."""
        parts, at = [], begin
        chunk = int(np.searchsorted(self._chunk_starts, begin, "right")) - 1
        while at < end:
            base, stop = int(self._chunk_starts[chunk]), min(end, int(self._chunk_starts[chunk + 1]))
            parts.append(self._values[chunk][at - base : stop - base].astype(np.int32))
            at, chunk = stop, chunk + 1
        return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _chunks(path: Path) -> Iterator[Any]:
    """The `input_ids` of each batch of a file, as a list array over the mapped file.

    Reading a batch maps the pages around it (64 KiB or more), which count as this process's memory; for a large text that is more than all
    the rest. They are released now and then, and mapped again when they are read.
    """
    import pyarrow as pa

    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for number, batch in enumerate(pa.ipc.open_stream(pa.py_buffer(mapped))):
        if batch.num_rows:
            yield batch.column("input_ids")
        if number % 16 == 15 and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def _numbers(array: Any) -> np.ndarray:
    """The way back: a view of an Arrow array without nulls; its own to_numpy would import pandas."""
    return np.frombuffer(array.buffers()[1], array.type.to_pandas_dtype())[array.offset : array.offset + len(array)]
