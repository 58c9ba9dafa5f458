"""Mutation fuzzing, guided by coverage, of the reader and of the recipe loader: a UserError or a result, nothing else.

    python -m tests.drills.fuzz reader --minutes 10
    python -m tests.drills.fuzz recipes --minutes 10

An input that reaches a new pair of lines in the module under test joins the corpus of inputs to mutate. One JSON line;
an input that fails is written beside, to be kept as a regression test.
"""

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from lmssl import config
from lmssl.data import corpus
from lmssl.errors import UserError

TOKENS = [
    b"\0",
    b"\xff",
    b"\xc3",
    b"\r",
    b"\n",
    b"\r\n",
    b'"',
    b'""',
    b",",
    b"\t",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"null",
    b"1e999",
    b"-",
    b"\\ud800",
    b"\\u0000",
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
]
TOKENS += [
    b"text",
    b"&a ",
    b"*a",
    b"!!x ",
    b"!!python/object:os.system",
    b"|\n",
    b"- ",
    b"? ",
    b"<<: ",
    b"%YAML 9\n",
    b"---\n",
    b"...",
    b"0x1f",
    b".nan",
    b"1_0",
    b"'",
    b"#",
    b"@",
    b"`",
    b" " * 40,
]


class Coverage:
    """Pairs of lines of one file that an input runs through, one after the other."""

    def __init__(self, file: str):
        self.file, self.seen, self.now, self.last = file, set[tuple[int, int]](), set[tuple[int, int]](), 0

    def trace(self, frame, event, _):
        if frame.f_code.co_filename != self.file:
            return None
        if event == "line":
            self.now.add((self.last, frame.f_lineno))
            self.last = frame.f_lineno
        return self.trace

    def run(self, work: Callable[[], None]) -> bool:
        """Whether `work` went where no input had gone."""
        self.now, self.last = set(), 0
        sys.settrace(self.trace)
        try:
            work()
        finally:
            sys.settrace(None)
            new = not self.now <= self.seen
            self.seen |= self.now
        return new


def mutated(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """One to four edits: bits, tokens, cuts, repeats, and pieces of another input."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(len(out) + 1), draw.randrange(7)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            out[at:at] = draw.choice(TOKENS)
        elif kind == 2:
            del out[at : at + draw.choice([1, 2, 8, 64])]
        elif kind == 3:
            out[at:at] = out[at : at + draw.choice([1, 4, 32])] * draw.choice([1, 2, 20])
        elif kind == 4:
            other = draw.choice(others)
            begin = draw.randrange(len(other) + 1)
            out[at:at] = other[begin : begin + draw.choice([4, 16, 100])]
        elif kind == 5:
            del out[at:]
        else:
            out[at : at + 1] = bytes([draw.randrange(256)])
    return bytes(out[: 2**16])


def reader(folder: Path) -> tuple[dict[str, list[bytes]], Callable[[str, bytes], None], str]:
    """Inputs by file name, what is done with one, and the file whose lines count."""
    from tests.drills.r10_bad_input import cases

    inputs: dict[str, list[bytes]] = {}
    for name, (content, _) in cases().items():
        data = content() if callable(content) else content
        if len(data) < 2**16:
            suffix = name.partition(".")[2] if not name.endswith((".doc", ".tar.gz")) else "txt"
            inputs.setdefault(f"x.{suffix}", []).append(data)
    inputs["x.txt::paragraph"] = inputs["x.txt::file"] = [b"a\nb\n\nc\n"]
    inputs["x.csv::#"] = inputs["x.tsv::#2"] = [b'a,b\n1,"2\n3"\n', b"a\tb\n1\t2\n"]
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "a film", "qas": [{"id": "1", "question": "q", "answers": [{"text": "film", "answer_start": 2}]}]}]}]}
    inputs.setdefault("x.json::context", []).append(json.dumps(squad).encode())

    def work(name: str, data: bytes) -> None:
        (folder / name.partition("::")[0]).write_bytes(data)
        source = str(folder / name)
        for bad in (corpus.BadRecords(), corpus.BadRecords(skip=True)):
            try:
                for text, where in corpus.documents(corpus.resolve(source), None, bad):
                    assert isinstance(text, str), "a document is text"
                    assert text.strip(), "with something in it"
                    assert "\0" not in text, "and no NUL"
                    assert str(folder) in where, "and stands somewhere"
                    text.encode()
            except UserError as error:
                one_line(error)

    return inputs, work, corpus.__file__


def recipes(folder: Path) -> tuple[dict[str, list[bytes]], Callable[[str, bytes], None], str]:
    from lmssl.recipe import FINETUNE, PRETRAIN, DataSection, FinetuneData

    root = Path(__file__).parent.parent.parent / "recipes"
    inputs = {f"{kind}.yaml": [p.read_bytes() for p in sorted((root / kind).glob("*.yaml"))] for kind in ("pretrain", "finetune")}

    def work(name: str, data: bytes) -> None:
        path = folder / name
        path.write_bytes(data)
        sections, cls = (PRETRAIN, DataSection) if name.startswith("pretrain") else (FINETUNE, FinetuneData)
        try:
            loaded = config.load(path, ("trainer.max_steps=3",), sections)
            again = folder / "again.yaml"
            again.write_text(config.dump(loaded), encoding="utf-8")
            assert same(config.load(again, (), sections), loaded), "what is dumped is read back"
            config.build(cls, loaded.get("data", {}), "data")
        except UserError as error:
            one_line(error)

    return inputs, work, config.__file__


def one_line(error: UserError) -> None:
    assert len(str(error).splitlines()) == 1, "one line"


def same(a, b) -> bool:
    """Equal, NaN included."""
    return a == b or repr(a) == repr(b)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["reader", "recipes"])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, tried, failures = random.Random(options.seed), 0, dict[str, str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs, work, file = {"reader": reader, "recipes": recipes}[options.what](folder)
        coverage, everything = Coverage(file), [data for some in inputs.values() for data in some]
        for target, some in inputs.items():
            for data in some:
                coverage.run(lambda t=target, d=data: work(t, d))
        begun, first = time.time(), len(coverage.seen)
        while time.time() - begun < 60 * options.minutes:
            target = draw.choice(list(inputs))
            data = mutated(draw.choice(inputs[target]), everything, draw)
            tried += 1
            try:
                if coverage.run(lambda t=target, d=data: work(t, d)):
                    inputs[target].append(data)
            except Exception:
                last = traceback.format_exc().strip().splitlines()
                key = last[-1][:120] + next((line for line in reversed(last) if "/lmssl/" in line), "")
                if key not in failures:
                    failures[key] = f"{target} {data[:200]!r}"
    line = {"drill": f"fuzz {options.what}", "held": not failures, "tried": tried, "failed": len(failures), "minutes": options.minutes}
    line |= {"line_pairs": [first, len(coverage.seen)], "inputs_kept": sum(map(len, inputs.values()))}
    print(json.dumps(line | ({"misses": [f"{k}: {v}" for k, v in failures.items()][:8]} if failures else {})), flush=True)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
