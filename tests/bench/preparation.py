"""Text to packed rows, MB/s: lmssl and stock (`map(tokenize)`, then `map(group_texts)`), the same number of processors.

    python -m tests.bench.preparation [speed] [memory] [codepoints] [--text FILES]

speed: fresh processes in turns, an empty cache each. memory: the peak of `lmssl prepare` at 100 MB and 2 GB of text.
codepoints: every code point of Unicode through fastokens and the tokenizers library.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.common import REVIEWS, ROOT, TOKENIZER, report, texts

OURS = "import sys, lmssl; lmssl.prepare(sys.argv[1], lmssl.load_tokenizer(sys.argv[2]), quiet=True)"
STOCK = """
import sys, datasets
from transformers import AutoTokenizer
from tests.bench.common import group_texts
datasets.disable_progress_bars()
tokenizer, processes = AutoTokenizer.from_pretrained(sys.argv[2]), int(sys.argv[3])
data = datasets.load_dataset("json", data_files=sys.argv[1], split="train")
data = data.map(lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]}, batched=True, remove_columns=data.column_names, num_proc=processes)
data.map(lambda batch: group_texts(batch, 256), batched=True, num_proc=processes)
"""
MEASURED = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"


def python(code: str, *args: str, cache: str) -> tuple[float, int]:
    """(seconds, peak bytes) of a fresh interpreter with an empty cache."""
    env = os.environ | {"LMSSL_CACHE": cache, "HF_DATASETS_CACHE": f"{cache}/datasets", "HF_HUB_OFFLINE": "1"}
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURED, sys.executable, "-c", code, *args], cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    return time.perf_counter() - begun, int(done.stdout.split()[-1]) * 1024


def written(path: Path, source: str, size: int) -> int:
    """A JSONL file of at least so many bytes of different documents; its size."""

    def numbered() -> Iterator[str]:
        for turn in range(10**6):
            for number, text in enumerate(texts(source)):
                yield f"{turn}.{number} {text}" if turn else text

    done = 0
    with path.open("w", encoding="utf-8") as stream:
        for text in numbered():
            done += stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if done >= size:
                return path.stat().st_size
    raise AssertionError


def speed(folder: Path, source: str, pairs: int) -> None:
    path, processes = folder / "text.jsonl", os.cpu_count() or 1
    size = written(path, source, 150_000_000)
    spent: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        for k in (0, 1) if number % 2 else (1, 0):
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                code, more = (OURS, []) if k == 0 else (STOCK, [str(processes)])
                spent[k].append(python(code, str(path), TOKENIZER, *more, cache=cache)[0])
    report("preparation", *spent, megabytes=size // 10**6, processes=processes, ours_mb_per_second=round(size / 1e6 / sorted(spent[0])[pairs // 2], 1))


def memory(folder: Path, source: str) -> None:
    peaks = {}
    for size in (100_000_000, 2_000_000_000):
        path = folder / "text.jsonl"
        written(path, source, size)
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            seconds, peak = python(OURS, str(path), TOKENIZER, cache=cache)
        peaks[f"{size // 10**6} MB"] = {"peak_mb": peak >> 20, "seconds": round(seconds, 1)}
    print(json.dumps({"bench": "preparation memory", **peaks}), flush=True)


def codepoints() -> None:
    from lmssl import byte_pairs, load_tokenizer

    backend = load_tokenizer(TOKENIZER).backend
    fast, odd, tried = byte_pairs.encoder(backend), 0, 0
    forms = ("{0}", "a{0}b1{0}2", "!{0}?{0} x", " {0} {0}\n{0}  {0}a")
    for begin in range(0, 0x110000, 0x4000):
        some = [chr(c) for c in range(begin, begin + 0x4000) if not 0xD800 <= c < 0xE000]
        for form in forms:
            lines = [form.format(c) for c in some]
            slow = backend.encode_batch_fast(lines, add_special_tokens=False)
            tried += len(lines)
            odd += sum(a.tolist() != b.ids for a, b in zip(byte_pairs.encode(fast, backend, lines), slow, strict=True))
    print(json.dumps({"bench": "code points", "tried": tried, "different": odd}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", default=["speed"])
    parser.add_argument("--text", default=REVIEWS)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for what in options.what:
            {"speed": lambda: speed(Path(name), options.text, options.pairs), "memory": lambda: memory(Path(name), options.text), "codepoints": codepoints}[what]()


if __name__ == "__main__":
    main()
