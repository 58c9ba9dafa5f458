"""Documents -> a token set (see `lmssl.data.tokens`): exact duplicates dropped, a fraction held out, leaks left out.

Memory does not grow with the text, but for some 18 bytes a document: what finds exact duplicates, and where each begins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lmssl import tokenization
from lmssl.data import contamination, corpus
from lmssl.data.contamination import Grams
from lmssl.data.tokens import DATA, FORMAT, TokenSet, below, content_hash
from lmssl.errors import UserError, written
from lmssl.tokenization import Tokenizer

log = logging.getLogger("lmssl")

BATCH_CHARACTERS = 2**21


class _Seen:
    """Content hashes met so far: a sorted array and a small set that is merged into it."""

    def __init__(self) -> None:
        self._sorted, self._recent = np.empty(0, np.uint64), set[int]()

    def add(self, value: int) -> bool:
        """True where the value is new."""
        if value in self._recent:
            return False
        at = int(np.searchsorted(self._sorted, np.uint64(value)))
        if at < len(self._sorted) and int(self._sorted[at]) == value:
            return False
        self._recent.add(value)
        if len(self._recent) >= 2**16 + len(self._sorted) // 32:
            self._sorted = np.concatenate([self._sorted, np.fromiter(self._recent, np.uint64)])
            self._sorted.sort()  # in place: np.sort would hold a second copy
            self._recent.clear()
        return True


class _Writer:
    """One split on its way to disk: an ordinary `datasets` folder.

    Written without `datasets`, whose import takes longer than preparing a small text, and whose save_to_disk would copy
    a large one once more.

    Attributes:
        leaks: documents left out, since they share an n-gram with `tests`.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, tests: Grams | None = None):
        import pyarrow as pa

        self._folder, self._tokenizer, self._tests = folder, tokenizer, tests
        self._ids = pa.uint16() if tokenizer.size <= 2**16 else pa.int32()
        self._schema = pa.schema({"input_ids": pa.list_(self._ids), "bytes": pa.int64()})
        folder.mkdir(parents=True)
        self._stream = pa.ipc.new_stream(str(folder / DATA), self._schema)
        self._texts: list[str] = []
        self._held = 0
        self.documents = self.tokens = self.bytes = self.leaks = self.unknown = 0
        self._unknown = tokenizer.unknown()

    def add(self, text: str) -> None:
        self._texts.append(text)
        self._held += len(text)
        if self._held >= BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        texts, self._texts, self._held = self._texts, [], 0
        if self._tests is not None:
            met = self._tests.any_in(texts)
            texts = [text for text, leaks in zip(texts, met, strict=True) if not leaks]
            self.leaks += int(met.sum())
        if not texts:
            return
        encoded = self._tokenizer.encode(texts)
        sizes = np.array([len(t.encode()) for t in texts], np.int64)
        offsets = np.concatenate([[0], np.cumsum([len(e) for e in encoded])]).astype(np.int32)
        values = np.concatenate(encoded).astype(self._ids.to_pandas_dtype())

        lists = pa.ListArray.from_arrays(_array(pa.int32(), offsets), _array(self._ids, values))
        self._stream.write_batch(pa.record_batch([lists, _array(pa.int64(), sizes)], schema=self._schema))
        self.documents += len(texts)
        self.tokens += int(offsets[-1])
        self.bytes += int(sizes.sum())
        if self._unknown is not None:
            self.unknown += int(np.count_nonzero(values == self._unknown))

    def close(self) -> dict[str, int]:
        """Finish; returns the counts."""
        self._flush()
        self._stream.close()
        state: dict[str, Any] = {"_data_files": [{"filename": DATA}], "_fingerprint": os.urandom(8).hex(), "_format_columns": None, "_format_kwargs": {}, "_format_type": None}
        (self._folder / "state.json").write_text(json.dumps(state | {"_output_all_columns": False, "_split": None}, indent=1) + "\n", encoding="utf-8")
        (self._folder / "dataset_info.json").write_text("{}\n", encoding="utf-8")  # the features follow from the Arrow schema
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes} | ({"unknown": self.unknown} if self.unknown else {})


def write(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    out: str | Path,
    held_out: float | Iterable[str] = 0.01,
    sources: list[dict[str, Any]] | None = None,
    tests: Grams | None = None,
    bad: corpus.BadRecords | None = None,
) -> TokenSet:
    """Tokenize documents into a token set at `out`; complete or not there at all.

    Args:
        texts: documents; exact duplicates are dropped and counted.
        held_out: a fraction chosen by content hash (never fewer than one document; 0 holds nothing out), or documents
            of their own, which are then dropped from `texts`.
        sources: what the manifest says of the text's origin.
        tests: training documents that share 13 words in a row with these are dropped and counted.
        bad: of the reader that yields `texts`; what it skipped is counted in the manifest.

    Raises:
        UserError: no document, or so few that none is left to train on; a folder that holds something else.
    """
    if isinstance(held_out, str) or (isinstance(held_out, int | float) and not 0 <= held_out < 1):
        raise UserError(f"held_out: {held_out!r} must be a fraction of 0 or more and below 1, or documents of their own")
    with _staged(Path(out)) as stage:
        train, held = _Writer(stage / "train", tokenizer, tests), _Writer(stage / "held_out", tokenizer)
        duplicates = _divide(texts, held_out, train, held)
        counts = {"train": train.close(), "held_out": held.close()}
        if not counts["train"]["documents"]:
            raise _nothing_to_train_on(sources or [], counts["held_out"]["documents"], train.leaks, bad)
        tokenizer.save(stage / "tokenizer")
        manifest = {"format": FORMAT, "tokenizer": tokenizer.hash, "vocabulary": tokenizer.size, "sources": sources or [], "duplicates": duplicates, **counts}
        manifest["crc32"] = {split: _crc32(stage / split / DATA) for split in ("train", "held_out")}
        manifest |= {"decontaminated": train.leaks, "tests_too_short": tests.short} if tests is not None else {}
        if bad and bad.skip:
            manifest["bad_records"] = {"skipped": bad.count, "first": bad.first}
        (stage / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return TokenSet(out)


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, and is gone where that is not reached."""
    if out.exists() and not _is_token_set(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: holds something that is not a token set, which it would replace; name another folder")
    stage = out.with_name(f"{out.name}.part-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        yield stage
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        stage.rename(out)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _divide(texts: Iterable[str], held_out: float | Iterable[str], train: _Writer, held: _Writer) -> int:
    """Each document into one of the two; how many duplicates were in neither."""
    seen, duplicates = _Seen(), 0
    fraction, own = (held_out, ()) if isinstance(held_out, int | float) else (0.0, held_out)
    for text in own:
        if seen.add(content_hash(text)):
            held.add(text)

    def new() -> Iterator[tuple[int, str]]:
        nonlocal duplicates
        for text in texts:
            value = content_hash(text)
            if seen.add(value):
                yield value, text
            else:
                duplicates += 1

    for text, is_held in _marked(new(), fraction):
        (held if is_held else train).add(text)
    return duplicates


def _marked(documents: Iterable[tuple[int, str]], fraction: float) -> Iterator[tuple[str, bool]]:
    """Each (content hash, text) as (text, whether it is held out): those below the fraction's limit, or the one of the smallest hash where none is."""
    limit, any_held = below(fraction), False
    waiting: tuple[int, str] | None = None  # the smallest hash so far
    for value, text in documents:
        if value < limit:
            any_held = True
            yield text, True
        elif not limit or any_held or (waiting and value > waiting[0]):
            yield text, False
        else:
            if waiting:
                yield waiting[1], False
            waiting = value, text
    if waiting:
        yield waiting[1], not any_held


def _nothing_to_train_on(sources: list[dict[str, Any]], held_back: int, leaks: int, bad: corpus.BadRecords | None) -> UserError:
    if bad and bad.count:
        return UserError(f"data.text: {bad.count:,} bad records, and no other document to train on: {bad.first[0]}")
    if leaks:
        way_out = "and none is left to train on (smaller documents: FILE::paragraph)"
        return UserError(f"data.decontaminate: {leaks:,} documents share {contamination.GRAM} words in a row with the tests, {way_out}")
    why = "the only one is held out" if held_back == 1 else f"all {held_back:,} are held out"
    if not sources:  # of a Python iterable
        return UserError(f"texts: no document to train on{f': {why} (a smaller held_out)' if held_back else ''}")
    way_out = f": {why} (a smaller data.held_out; a .txt file as several documents: FILE::paragraph)" if held_back else "; is the text empty?"
    return UserError(f"data.text: {', '.join(s['path'] for s in sources[:3])}: no document to train on{way_out}")


def _is_token_set(folder: Path) -> bool:
    try:
        return {"format", "tokenizer", "sources"} <= set(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False


def cache_folder() -> Path:
    """Where prepared text is kept: $LMSSL_CACHE, or ~/.cache/lmssl."""
    return Path(os.environ.get("LMSSL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmssl")


def prepare(
    text: str | list[str], tokenizer: Tokenizer, held_out: float | str = 0.01, decontaminate: bool | str | list[str] = False, *, on_bad_record: str = "stop", quiet: bool = False
) -> TokenSet:
    """The token set of a recipe's text: found by content hash where it was prepared before, made otherwise.

    Several processes may call it at once; one prepares, the others wait.

    Args:
        decontaminate: files whose texts no training document may overlap; True: the held-out documents.
        on_bad_record: "stop" at the first, or "skip" and count them in the manifest.
    """
    from filelock import FileLock

    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"tokenizer: expected lmssl's own, got {type(tokenizer).__name__}; lmssl.load_tokenizer(FOLDER) makes one")
    train = corpus.resolve(text)
    held = corpus.resolve(held_out, "data.held_out") if isinstance(held_out, str) else []
    described = [{"path": s.path, "kind": s.kind, "column": s.column, "bytes": s.bytes, "sha256": s.fingerprint()} for s in train]
    tests = corpus.resolve(decontaminate, "data.decontaminate") if not isinstance(decontaminate, bool) else []
    identity = [FORMAT, tokenizer.hash, [(s["sha256"], s["kind"], s["column"]) for s in described]]
    identity += [[(s.fingerprint(), s.kind, s.column) for s in held] or held_out]
    identity += [[(s.fingerprint(), s.kind, s.column) for s in tests] or True, contamination.RULE] if decontaminate else []
    skip = on_bad_record == "skip"
    identity += ["skip"] if skip else []
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / "tokens" / key
    folder.parent.mkdir(parents=True, exist_ok=True)

    def made() -> TokenSet:
        for left in (folder, *folder.parent.glob(f"{key}.part-*")):  # damaged, or of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with _progress(sum(s.bytes for s in [*train, *held]), quiet) as bar:
            grams = _grams(tests, held, train, held_out, skip) if decontaminate else None
            bad = corpus.BadRecords(skip, "data.on_bad_record=skip leaves such records out")
            texts, own = ((text for text, _ in corpus.documents(sources, bar.update, bad)) for sources in (train, held))
            found = write(texts, tokenizer, folder, own if held else float(held_out), described, grams, bad)
        if bad.count:
            log.warning("%d bad records skipped, the first: %s", bad.count, bad.first[0])
        return found

    while True:
        # Looked at without the lock, behind which the processes of a run would read all of it one after another.
        seen = _stamp(folder)
        if kept := _whole(folder):
            return _known(kept, tokenizer)
        with FileLock(f"{folder}.lock"), written(f"the token set {folder}"):
            if _stamp(folder) == seen:  # nobody has made it meanwhile
                return _known(made(), tokenizer)


def _grams(tests: list[corpus.Source], held: list[corpus.Source], train: list[corpus.Source], held_out: float | str, skip: bool) -> Grams:
    """What no training document may overlap: the tests, or the held-out documents."""
    # A test that cannot be read would not be looked for, which nobody would notice.
    found = (text for text, _ in corpus.documents(tests or held or train, None, corpus.BadRecords(skip and not tests)))
    if not (tests or held):
        found = (text for text, is_held in _marked(((content_hash(text), text) for text in found), float(held_out)) if is_held)
    return Grams(found)


def _known(token_set: TokenSet, tokenizer: Tokenizer) -> TokenSet:
    """A token set, refused where its text is mostly unknown to its tokenizer."""
    counts = token_set.manifest["train"]
    if counts.get("unknown"):
        tokenizer.check_known(counts["unknown"], counts["tokens"], "data.text")
    return token_set


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Which token set lies in a folder: another one has another stamp."""
    try:
        found = (folder / "manifest.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _whole(folder: Path) -> TokenSet | None:
    """The token set of a cache; None where there is none, or a damaged one, which can be made again."""
    if not (folder / "manifest.json").is_file():
        return None
    try:
        found = TokenSet(folder)
        found.held_out()
        if found.tokenizer.hash != found.manifest["tokenizer"]:
            raise UserError(f"{folder}: its tokenizer is another")
        for split, value in found.manifest.get("crc32", {}).items():
            if _crc32(folder / split / DATA) != value:
                raise UserError(f"{folder}: {split} is not what was written")
        return found
    except (UserError, OSError) as error:  # gone while it was read, as another process's to make again
        log.warning("%s; it is prepared again", error)
        return None


def _crc32(path: Path) -> int:
    """Of a file, which a disk may have changed."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def _progress(total: int, quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=quiet or None, leave=False)


def _array(kind: Any, numbers: np.ndarray) -> Any:
    """An Arrow array over numbers of that type; pa.array would import pandas."""
    import pyarrow as pa

    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


def from_iterable(texts: Iterable[str], tokenizer: Tokenizer, out: str | Path, held_out: float | Iterable[str] = 0.01) -> TokenSet:
    """A token set from any Python iterable of documents, made anew at each call.

    Args:
        texts: documents; blank ones are left out, exact duplicates dropped.
        out: folder of the token set; one that is there is replaced, anything else is not.
        held_out: fraction of the documents held out, by content hash; or documents of their own.
    """

    def checked() -> Iterator[str]:
        for number, text in enumerate(texts):
            where = f"document {number + 1}"
            if not isinstance(text, str):
                raise UserError(f"{where}: expected text, got {type(text).__name__}")
            corpus.check_text(text, where)
            if text.strip():
                yield text

    tokenization.check_texts(texts)
    documents = checked()
    first = next(documents, None)
    if first is None:
        raise UserError("no document with text in it")
    return write(chain([first], documents), tokenizer, out, held_out)
