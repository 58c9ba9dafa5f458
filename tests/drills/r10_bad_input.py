"""R10: files that are not what they claim to be, each through `lmssl prepare`: one line with file and line, or a
documented rule; no traceback, under 2 s of processor time and 300 MB, and neither torch nor transformers imported."""

import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from tests.drills.common import ROOT, Drill, Tally

GOOD = "".join(json.dumps({"text": f"review number {n} of a film"}) + "\n" for n in range(30)).encode()
LINES = "".join(f"review number {n} of a film\n" for n in range(30)).encode()
TABLE = b"text,label\n" + b"".join(b"review %d of a film,1\n" % n for n in range(30))


def packed(content: bytes, make: Callable) -> bytes:
    stream = io.BytesIO()
    make(stream, content)
    return stream.getvalue()


def zipped(stream, content):
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.txt", content)


def tarred(stream, content):
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        info = tarfile.TarInfo("../../x.txt")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))


def parquet(**columns) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def bomb() -> bytes:
    squeeze = zlib.compressobj(9, wbits=31)
    return b"".join(squeeze.compress(b"\n" * 2**20) for _ in range(600)) + squeeze.flush()


def cases() -> dict[str, tuple[bytes | Callable[[], bytes], str]]:
    """File name -> (content, what the line must say). "" stands for a rule under which the file is fine."""
    line2 = GOOD + b"%s\n"
    return {
        "utf8.jsonl": (line2 % b'{"text": "\xff"}', r":31: not UTF-8"),
        "utf8.txt": (LINES + b"caf\xe9\n", r":31: not UTF-8"),
        "utf8.csv": (TABLE + b"caf\xe9,1\n", r":32: not UTF-8"),
        "utf8.tsv": (b"text\n" + LINES + b"caf\xe9\n", r":32: not UTF-8"),
        "overlong.txt": (LINES + b"\xc0\xaf\n", r":31: not UTF-8"),
        "cut-character.txt": (LINES + "ünï".encode()[:-1] + b"\n", r":31: not UTF-8"),
        "utf16.txt": ("hello there\n".encode("utf-16"), r":1: is UTF-16"),
        "utf16.jsonl": (GOOD.decode().encode("utf-16"), r":1: is UTF-16"),
        "utf16be.csv": (b"\xfe\xff" + TABLE.decode().encode("utf-16-be"), r":1: is UTF-16"),
        "utf32.txt": ("hello".encode("utf-32-le"), r":1: holds a NUL"),
        "bom.jsonl": (b"\xef\xbb\xbf" + GOOD, ""),
        "bom.csv": (b"\xef\xbb\xbf" + TABLE, ""),
        "nul.txt": (LINES + b"a\0b\n", r":31: holds a NUL"),
        "nul.jsonl": (line2 % b'{"text": "a\\u0000b"}', r":31: holds a NUL"),
        "nul.csv": (TABLE + b"a\0b,1\n", r":32: holds a NUL"),
        "nul.parquet": (lambda: parquet(text=["a", "b\0"]), r":2: holds a NUL"),
        "surrogate.jsonl": (line2 % b'{"text": "\\ud800"}', r":31: holds half of a surrogate"),
        "pair.jsonl": (line2 % b'{"text": "\\ud83d\\ude00"}', ""),
        "huge.txt": (b"a" * (17 * 2**20) + b"\n", r":1: longer than 16 MiB"),
        "huge.jsonl": (GOOD + b'{"text": "' + b"a" * (17 * 2**20) + b'"}\n', r":31: longer than 16 MiB"),
        "huge.csv": (TABLE + b'"' + b"a\n" * (9 * 2**20) + b'",1\n', r":32: a quoted field runs over more than 100,000 lines"),
        "no-ends.txt": (b"word " * (4 * 2**20), r":1: longer than 16 MiB"),
        "broken.jsonl": (line2 % b'{"text": "a"', r":31: not valid JSON"),
        "comma.jsonl": (line2 % b'{"text": "a",}', r":31: not valid JSON"),
        "single.jsonl": (line2 % b"{'text': 'a'}", r":31: not valid JSON"),
        "two.jsonl": (line2 % b'{"text": "a"} {"text": "b"}', r":31: not valid JSON"),
        "pretty.jsonl": (json.dumps({"text": "a"}, indent=1).encode(), r":1: not valid JSON"),
        "control.jsonl": (line2 % b'{"text": "a\x01b"}', r":31: not valid JSON"),
        "deep.jsonl": (line2 % (b'{"text": ' + b"[" * 200_000), r":31: (nested too deeply|not valid JSON)"),
        "deep-object.jsonl": (line2 % (b'{"a":' * 200_000), r":31: (nested too deeply|not valid JSON)"),
        "nan.jsonl": (line2 % b'{"text": NaN}', r":31: column 'text' holds a number"),
        "big-number.jsonl": (line2 % (b'{"text": ' + b"9" * 5000 + b"}"), r":31: not valid JSON"),
        "array.jsonl": (line2 % b'["a"]', r":31: expected a JSON object"),
        "array.json": (b'[{"text": "a"}]', r"no document to train on: the only one is held out"),
        "object.json": (b'{"rows": []}', r"neither a list of records nor SQuAD JSON"),
        "string.jsonl": (line2 % b'"a"', r":31: expected a JSON object"),
        "null-line.jsonl": (line2 % b"null", r":31: expected a JSON object"),
        "column.jsonl": (b'{"texts": "a"}\n', r":1: no column 'text'; did you mean 'texts'"),
        "column-later.jsonl": (line2 % b'{"body": "a"}', r":31: no column 'text'"),
        "column.csv": (b"txt,label\na,1\n", r":2: no column 'text'; did you mean 'txt'"),
        "column.parquet": (lambda: parquet(body=["a"]), r":1: no column 'text'"),
        "null.jsonl": (line2 % b'{"text": null}', r":31: column 'text' holds nothing"),
        "null.parquet": (lambda: parquet(text=["a", None]), r":2: column 'text' holds nothing"),
        "list.jsonl": (line2 % b'{"text": ["a"]}', r":31: column 'text' holds a list"),
        "list-as-text.parquet": (lambda: parquet(text=[["a"], ["b"]]), r":1: column 'text' holds a list"),
        "object.jsonl": (line2 % b'{"text": {"a": 1}}', r":31: column 'text' holds an object"),
        "number.jsonl": (line2 % b'{"text": 3}', r":31: column 'text' holds a number"),
        "true.jsonl": (line2 % b'{"text": true}', r":31: column 'text' holds true or false"),
        "disguise.txt": (gzip.compress(LINES), r"is gzip data; name it"),
        "plain.txt.gz": (LINES, r"is not gzip data"),
        "empty.txt.gz": (b"", r"is not gzip data"),
        "cut.txt.gz": (gzip.compress(random.Random(0).randbytes(3000).hex().encode())[:900], r":\d+: the gzip data is damaged"),
        "flipped.jsonl.gz": (flipped(gzip.compress(GOOD * 40)), r":\d+: (the gzip data is damaged|not valid JSON|not UTF-8)"),
        "bomb.txt.gz": (bomb, r"more than 200 to 1"),
        "zip.txt": (packed(LINES, zipped), r"is a zip archive"),
        "tar.tar.gz": (packed(LINES, tarred), r"no reader for this kind of file"),
        "cr.txt": (b"one\rtwo\rthree\n", r":1: a carriage return inside"),
        "crlf.txt": (LINES.replace(b"\n", b"\r\n"), ""),
        "separators.txt": ("a\u2028b\u2029c\x85d\x0be\x0cf\n".encode() + LINES, ""),
        "empty.jsonl": (b"", r"no document to train on"),
        "blank.txt": (b"\n \n\t\n", r"no document to train on"),
        "one.txt": (b"only one document\n", r"no document to train on: the only one is held out"),
        "fields.csv": (TABLE + b"a\n", r":32: 1 fields, where the header has 2"),
        "more-fields.tsv": (b"text\tlabel\na\t1\t2\n", r":2: 3 fields, where the header has 2"),
        "twice.csv": (b"text,text\na,b\n", r":1: the header names a column twice"),
        "quote.csv": (TABLE + b'"open,1\n', r":32: not valid CSV"),
        "stray.csv": (TABLE + b'"a"b,1\n', r":32: not valid CSV"),
        "fake.parquet": (b"PAR1 nothing of the kind PAR1", r"not a readable parquet file"),
        "cut.parquet": (lambda: parquet(text=["a"] * 100)[:-30], r"not a readable parquet file"),
        "elf.txt": (b"\x7fELF\x02\x01\x01\0\0\0", r":1: holds a NUL"),
        "word.doc": (LINES, r"no reader for this kind of file"),
    }  # fmt: skip


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :]


RUN = """
import re, sys
from lmssl import cli
code = cli.run(sys.argv[1:])
print("heavy", [m for m in ("torch", "transformers") if m in sys.modules])
print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def ours(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    slowest, largest, stopped = 0.0, 0, 0
    todo = sorted(cases().items())
    for name, (content, message) in draw.sample(todo, min(count, len(todo))):
        path = folder / name
        path.write_bytes(content() if callable(content) else content)
        recipe = folder / "r.yaml"
        recipe.write_text(
            f"data: {{text: {path}, tokenizer: {ROOT / 'tokenizer_assets' / 'bpe-8k'}, seq_length: 32, held_out: 0.1}}\n"
            f"model: {{architecture: gpt2}}\nobjective: {{name: next_token}}\ntrainer: {{output_dir: {folder / 'out'}}}\n"
        )
        seconds, memory, code, text = measured([sys.executable, "-c", RUN, "prepare", str(recipe)])
        errors = [line for line in text.splitlines() if line.startswith("lmssl: error")]
        if message:
            stopped += 1
            right = code == 2 and len(errors) == 1 and name in errors[0] and bool(re.search(message, errors[0]))
        else:
            right = code == 0
        light = "heavy []" in text
        slowest, largest = max(slowest, seconds), max(largest, memory)
        held = right and light and "Traceback" not in text and memory < 300 * 2**20 and seconds < 2
        tally(held, f"{name}: exit {code}, {seconds:.1f} s, {memory >> 20} MB, light {light}: {text[-300:]}")
        path.unlink()
    tally.more = {"stopped": stopped, "slowest_seconds": round(slowest, 2), "most_memory_mb": largest >> 20}


def measured(words: list[str]) -> tuple[float, int, int, str]:
    """Seconds of processor time, bytes of peak memory, exit status and output of a command."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = re.search(r"^peak (\d+)$", text, re.MULTILINE)
    return usage.ru_utime + usage.ru_stime, int(peak[1]) * 1024 if peak else 2**40, process.returncode, text


def peer(tally: Tally, count: int, draw: random.Random, folder: Path) -> None:
    """`datasets.load_dataset` and a tokenizing map, as the stock scripts read text."""
    from tests.drills.common import Child

    kinds = {"jsonl": "json", "json": "json", "txt": "text", "csv": "csv", "tsv": "csv", "parquet": "parquet"}
    todo = sorted(cases().items())
    for name, (content, message) in draw.sample(todo, min(count, len(todo))):
        path = folder / name
        path.write_bytes(content() if callable(content) else content)
        kind = name.removesuffix(".gz").rpartition(".")[2]

        def read(path=path, kind=kind):
            import datasets
            import transformers

            tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tokenizer_assets" / "bpe-8k")
            keys = {"delimiter": "\t"} if kind == "tsv" else {}
            data = datasets.load_dataset(kinds.get(kind, "text"), data_files=str(path), split="train", cache_dir=str(folder / "hf"), **keys)
            column = "text" if "text" in data.column_names else data.column_names[0]
            data.map(lambda batch: tokenizer(batch[column]), batched=True, remove_columns=data.column_names)

        child = Child(read, folder)
        code, text = child.wait(60), child.text()
        last = text.strip().splitlines()[-1] if text.strip() else ""
        line = message.partition(":")[2].partition(":")[0] if message.startswith(":") else ""
        held = code == 0 if not message else code != 0 and name in text and (not line.isdigit() or f"{line}" in last)
        tally(held, f"{name}: exit {code}: {last[:120]}")
        path.unlink()


DRILL = Drill("R10 bad input", ours, peer, (30, 999), (30, 999), slice=4)

if __name__ == "__main__":
    DRILL.main()
