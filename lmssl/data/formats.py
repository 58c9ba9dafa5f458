"""Files read strictly: bytes -> records, each with the `file:line` where it stands; what is wrong with one is said there."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from typing import IO, Any

from lmssl.errors import UserError, said

MAX_LINE = 16 * 2**20
"""Bytes: a longer line is a mistake (or a whole corpus without line ends), and would be held in memory."""
MAX_RECORD_LINES = 100_000
"""Lines of one record of a table."""
FREE_BYTES, MAX_RATIO = 2**20, 200
"""gzip data may unpack to so many bytes, or to this many times its own size."""

Record = tuple[dict[str, Any], str]
"""A record and where it stands, as `file:line`."""


class BadRecords:
    """What becomes of a record that is not what it claims to be.

    Args:
        skip: leave it out and count it; otherwise the first one stops the reading.
        way_out: what the error says of how to skip.

    Attributes:
        count: records left out.
        first: what was wrong with the first few of them, each with its `file:line`.
        last: what was wrong with the last.
    """

    def __init__(self, skip: bool = False, way_out: str = ""):
        self.skip, self.way_out, self.count, self.first, self.last = skip, way_out, 0, list[str](), ""

    def __call__(self, error: UserError) -> None:
        """Raise the error, or count it."""
        if not self.skip:
            raise UserError(f"{error} ({self.way_out})") if self.way_out else error
        self.count += 1
        self.last = str(error)
        if len(self.first) < 5:
            self.first.append(self.last)


def type_in_words(value: Any) -> str:
    """What a value is that should have been text, or an object."""
    return {type(None): "nothing (null)", list: "a list", dict: "an object", bool: "true or false", str: "text", bytes: "bytes"}.get(type(value), f"a number ({value!r})")


class _Counted(io.FileIO):
    """A file that reports what is read of it."""

    def __init__(self, path: str, on_bytes: Callable[[int], None] | None):
        super().__init__(path)
        self._report = on_bytes

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer)
        if self._report and size:
            self._report(size)
        return size


def opened(path: str, on_bytes: Callable[[int], None] | None) -> IO[bytes]:
    """A file, unpacked where it is gzip; what contradicts its name is refused."""
    try:
        raw = io.BufferedReader(_Counted(path, on_bytes), 2**17)
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


def _lines(stream: IO[bytes], path: str) -> Iterator[tuple[int, str, UserError | None]]:
    """Lines without their ends, decoded, each with its number and what is wrong with it; split at LF alone (CR LF included), never at U+2028."""
    for number in count(1):
        try:
            line = stream.readline(MAX_LINE + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}:{number}: the gzip data is damaged: {error}") from None
        if not line:
            return
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{path}:1: is UTF-16; convert it to UTF-8")
            if line.startswith(codecs.BOM_UTF8):
                line = line[3:] if line.endswith(b"\n") else line[3:] + stream.readline(3)  # as long a line as any other
        text, wrong = "", None
        try:
            text = "" if line == b"\n" else _text_of(line, f"{path}:{number}")  # blank ones may come by the million
        except UserError as error:
            wrong = error
            # Its quotes still tell a table where the record ends that it spoils.
            text = line.decode("utf-8", "replace").strip("\r\n") if len(line) <= MAX_LINE else ""
        yield number, text, wrong
        while len(line) > MAX_LINE and not line.endswith(b"\n"):  # what is left of it, where it was skipped
            line = stream.readline(MAX_LINE + 1)


def _text_of(line: bytes, where: str) -> str:
    if len(line) > MAX_LINE:
        raise UserError(f"{where}: longer than {MAX_LINE // 2**20} MiB; one document a line, please")
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x}); convert the file to UTF-8") from None
    if "\0" in text:
        raise UserError(f"{where}: holds a NUL character: this is not text")
    return text


def txt(stream: IO[bytes], path: str, unit: str, bad: BadRecords) -> Iterator[Record]:
    """Documents of a text file, by line, file or paragraph."""
    held: list[str] = []
    begin = size = 0
    spoilt = False  # a bad line spoils the document that it stands in, once
    for number, line, wrong in _lines(stream, path):
        if "\r" in line and not wrong:
            wrong = UserError(f"{path}:{number}: a carriage return inside the line; convert the line ends to LF")
        if wrong and not spoilt:
            bad(wrong)
        if unit == "line":
            if line and not wrong:
                yield {"text": line}, f"{path}:{number}"
            continue
        if unit == "paragraph" and (not wrong or "\r" in line) and not line.strip():
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


def jsonl(stream: IO[bytes], path: str, bad: BadRecords) -> Iterator[Record]:
    """A JSON object on each line."""
    for number, line, wrong in _lines(stream, path):
        if wrong:
            bad(wrong)
        if wrong or not line.strip():
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
                bad(UserError(f"{where}: expected a JSON object with a column for the text, got {type_in_words(record)}"))


def json_file(stream: IO[bytes], path: str, bad: BadRecords) -> Iterator[Record]:
    """A JSON document: a list of records, or the questions of SQuAD, each with its context."""
    try:
        whole = json.loads(b"".join(iter(lambda: stream.read(2**20), b"")).decode("utf-8-sig"))  # by pieces, each of which is weighed
    except (UnicodeDecodeError, ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        hint = "; a JSON object on each line belongs into a .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{path}: not valid JSON: {error}{hint}") from None
    if isinstance(whole, list):
        for number, record in enumerate(whole):
            where = f"{path}:[{number}]"
            if isinstance(record, dict):
                yield record, where
            else:
                bad(UserError(f"{where}: expected a JSON object with a column for the text, got {type_in_words(record)}"))
        return
    try:
        for a, article in enumerate(whole["data"]):
            for p, paragraph in enumerate(article["paragraphs"]):
                for q, question in enumerate(paragraph["qas"]):
                    yield {"context": paragraph["context"], "title": article.get("title", ""), **question}, f"{path}:data[{a}].paragraphs[{p}].qas[{q}]"
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: neither a list of records nor SQuAD JSON (data, paragraphs, qas, context): {error!r}") from None


def table(stream: IO[bytes], path: str, delimiter: str, headless: bool, bad: BadRecords) -> Iterator[Record]:
    """CSV with quotes; TSV without (a quote there is a character). The first line names the columns, unless headless."""
    csv.field_size_limit(MAX_LINE)
    line_number, begin = 0, 1

    def lines() -> Iterator[str]:
        nonlocal line_number
        for line_number, line, wrong in _lines(stream, path):
            if wrong:
                bad(wrong)
            if line_number - begin > MAX_RECORD_LINES:
                raise UserError(f"{path}:{begin}: a quoted field runs over more than {MAX_RECORD_LINES:,} lines; is its closing quote missing?")
            yield line + ("\0\n" if wrong else "\n")

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
                raise UserError(f"{path}:{begin}: the header cannot be read; {bad.last}")
            continue
        if header is None and headless:
            header = [f"#{k + 1}" for k in range(len(row))]
        if header is None:
            header = [name.strip() for name in row]
            if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), None)):
                means = "a comma (.csv)" if delimiter == "," else "a tab (.tsv)"
                raise UserError(f"{path}:{begin}: the columns seem to be divided by {other!r}; what divides them here is {means}; .jsonl has no such choice")
            if len(set(header)) < len(header):
                raise UserError(f"{path}:{begin}: the header names a column twice: {', '.join(header)}")
            continue
        if len(row) != len(header):
            bad(UserError(f"{path}:{begin}: {len(row)} fields, where the {'first line' if headless else 'header'} has {len(header)}"))
            continue
        yield dict(zip(header, row, strict=True)), f"{path}:{begin}"


def parquet(stream: IO[bytes], path: str, only: str | None = None) -> Iterator[Record]:
    """The rows of a parquet file; of one column where it is named and there."""
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
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"{path}: two columns are called '{twice[0]}'")
            for batch in file.iter_batches(batch_size=1024, columns=[only] if only in names else None):
                for record in batch.to_pylist():
                    number += 1
                    yield record, f"{path}:{number}"
        except (pa.ArrowException, OSError, EOFError, zlib.error, ValueError, OverflowError) as error:  # text that is not UTF-8, a date that Python has none for
            raise UserError(f"{path}: not a readable parquet file behind record {number}: {said(error)}") from None
