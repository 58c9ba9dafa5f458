"""Readers, token sets and the stream."""

import csv
import gzip
import json
import pickle
import shutil
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lmssl
from lmssl.data import corpus, formats, preparation, tokens
from lmssl.data.stream import Stream, borders, generator, permuted
from lmssl.errors import UserError
from lmssl.objectives import MaskedTokens, NextToken
from tests.helpers import sentences, token_set, tokenizer

TEXTS = ["first review, with a comma", 'second "quoted"', "third\twith ünïcödé \u2028 inside"]


def write(folder, kind, packed):
    path = folder / f"x.{kind}{'.gz' if packed else ''}"
    plain = folder / f"plain.{kind}"
    texts = [t.replace("\t", " ") for t in TEXTS] if kind == "tsv" else TEXTS
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts, "n": [1, 2, 3]}), plain)
    elif kind == "jsonl":
        plain.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
    elif kind == "txt":
        plain.write_text("\n".join(texts) + "\n")
    elif kind == "tsv":
        plain.write_text("text\tlabel\n" + "".join(f"{t}\t1\n" for t in texts))
    else:
        with plain.open("w", newline="") as stream:
            csv.writer(stream).writerows([["text", "label"], *([t, 1] for t in texts)])
    path.write_bytes(gzip.compress(plain.read_bytes()) if packed else plain.read_bytes())
    return path, texts


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", corpus.KINDS)
def test_every_kind_reads(tmp_path, kind, packed):
    path, texts = write(tmp_path, kind, packed)
    assert [t for t, _ in corpus.documents(corpus.resolve(str(path)))] == texts


def test_sources(tmp_path):
    for name in ("b.jsonl", "sub/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name, "other": "o"}) + "\n")
    (tmp_path / "poem.txt").write_text("one\ntwo\n\nthree\n")
    read = lambda source: [t for t, _ in corpus.documents(corpus.resolve(source))]  # noqa: E731
    assert read(str(tmp_path / "**/*.jsonl")) == ["b.jsonl", "sub/a.jsonl"]
    assert read(f"{tmp_path / 'b.jsonl'}::other") == ["o"]
    assert read(f"{tmp_path / 'poem.txt'}::paragraph") == ["one\ntwo", "three"]
    assert read(f"{tmp_path / 'poem.txt'}::file") == ["one\ntwo\n\nthree"]
    assert read(str(tmp_path / "poem.txt")) == ["one", "two", "three"]
    assert read(str(tmp_path)) == ["b.jsonl", "one", "two", "three", "sub/a.jsonl"]


def test_tables_without_a_header(tmp_path):
    (tmp_path / "pairs.tsv").write_text("Hi.\tHallo!\nRun!\tLauf!\n")
    name = str(tmp_path / "pairs.tsv")
    assert [t for t, _ in corpus.documents(corpus.resolve(f"{name}::#2"))] == ["Hallo!", "Lauf!"]
    assert [t for t, _ in corpus.documents(corpus.resolve([f"{name}::#1", f"{name}::#2"]))] == ["Hi.", "Run!", "Hallo!", "Lauf!"]
    assert next(iter(corpus.records(corpus.resolve(f"{name}::#")[0]))) == ({"#1": "Hi.", "#2": "Hallo!"}, f"{name}:1")
    with pytest.raises(UserError, match=r"no column '#3'.*FILE::#"):
        list(corpus.documents(corpus.resolve(f"{name}::#3")))


@pytest.mark.parametrize("length", [8, 32, 1000, 100_000])
def test_the_most_documents_of_a_row_is_a_bound(length, shared_dir):
    """Padding counts as one; where documents begin and end is what the segments say."""
    made = token_set(shared_dir)
    rows = np.stack([made.row(k, length, 0).segments for k in range(made.rows(length))])
    counts = [len(np.unique(row)) for row in rows]
    assert max(counts) <= made.most_documents(length) <= max(counts) + 2
    found = borders(rows, made.most_documents(length))
    assert len(found) == len(rows) * made.most_documents(length) + 1
    assert (found[0], found[-1]) == (0, rows.size)
    for begin, end in pairwise(found.tolist()):
        assert begin == end or (len(np.unique(rows.reshape(-1)[begin:end])) == 1 and begin // length == (end - 1) // length)
    assert len(set(found.tolist())) - 1 == sum(counts)
    assert len(borders(rows, 1)) > rows.shape[0], "more than were promised: longer, not wrong"


def test_a_list_of_records(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    assert list(corpus.documents(corpus.resolve(str(tmp_path / "list.json")))) == [(text, f"{tmp_path}/list.json:[{n}]") for n, text in enumerate(TEXTS)]


def test_a_json_file_made_to_fill_the_memory(tmp_path):
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b"[" + b" " * 300_000_000 + b"]"))
    with pytest.raises(UserError, match=r"more than 200 to 1: this is not text"):
        list(corpus.documents(corpus.resolve(str(tmp_path / "x.json.gz"))))


def test_a_changed_byte_in_a_cache_is_noticed(tmp_path, monkeypatch, caplog):
    """As disks make them: the file is as long as before, and reads."""
    monkeypatch.setenv("LMSSL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.txt").write_text("\n".join(sentences(30)))
    made = preparation.prepare(str(tmp_path / "x.txt"), tokenizer(), 0.1)
    path = made.folder / "train" / tokens.DATA
    whole = path.read_bytes()
    ids = made.row(0, 16, 0).ids.astype("<u2").tobytes()
    assert ids in whole
    path.unlink()
    path.write_bytes(whole.replace(ids, bytes([ids[0], ids[1], ids[2] ^ 1]) + ids[3:]))
    again = preparation.prepare(str(tmp_path / "x.txt"), tokenizer(), 0.1)
    assert "train is not what was written; it is prepared again" in caplog.text
    assert (again.folder / "train" / tokens.DATA).read_bytes() == whole


def test_a_folder_of_somebody_s_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for taken in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(UserError, match="holds something that is not a token set"):
            lmssl.from_iterable(TEXTS, tokenizer(), taken)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    (tmp_path / "mine" / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(UserError, match="holds something that is not a token set"):
        lmssl.from_iterable(TEXTS, tokenizer(), tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert lmssl.from_iterable(TEXTS, tokenizer(), tmp_path / "empty").documents


@pytest.mark.parametrize("damaged", ["manifest.json", f"train/{tokens.DATA}", f"held_out/{tokens.DATA}", "tokenizer/tokenizer.json"])
def test_a_damaged_cache_is_made_anew(damaged, tmp_path, monkeypatch):
    monkeypatch.setenv("LMSSL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.txt").write_text("\n".join(sentences(30)))
    made = preparation.prepare(str(tmp_path / "x.txt"), tokenizer(), 0.1)
    whole = (made.folder / damaged).read_bytes()
    (made.folder / damaged).unlink()
    (made.folder / damaged).write_bytes(whole[: len(whole) // 2])  # by another inode: the first one is still mapped
    killed = made.folder.with_name(f"{made.folder.name}.part-1")
    killed.mkdir()
    again = preparation.prepare(str(tmp_path / "x.txt"), tokenizer(), 0.1)
    assert again.tokenizer.hash == tokenizer().hash
    assert [again.tokens, again.held_out().tokens] == [made.tokens, made.manifest["held_out"]["tokens"]]
    assert not killed.exists()


def test_a_worker_that_is_no_fork_gets_the_folder_not_the_tokens(shared_dir):
    made = token_set(shared_dir)
    for split in (made, made.held_out()):
        sent = pickle.dumps(split)
        again = pickle.loads(sent)  # noqa: S301 - its own
        assert len(sent) < 500
        assert (again.split, again.tokens) == (split.split, split.tokens)
        assert (again.row(0, 16, 0).ids == split.row(0, 16, 0).ids).all()


def test_saved_dataset(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    (source,) = corpus.resolve(str(tmp_path / "saved"))
    assert [t for t, _ in corpus.documents([source])] == TEXTS
    before = source.fingerprint()
    datasets.load_from_disk(str(tmp_path / "saved")).filter(lambda record: "first" in record["text"])
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    assert source.fingerprint() == before


BAD = {
    "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', r"utf8.jsonl:2: not UTF-8"),
    "nul.txt": (b"ab\0c\n", r"nul.txt:1: holds a NUL"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken.jsonl:2: not valid JSON"),
    "list.jsonl": (b'["a"]\n', r"list.jsonl:1: expected a JSON object"),
    "string.jsonl": (b'"a"\n', r"string.jsonl:1: expected a JSON object"),
    "column.jsonl": (b'{"texts": "a"}\n', r"column.jsonl:1: no column 'text'; did you mean 'texts'"),
    "null.jsonl": (b'{"text": null}\n', r"null.jsonl:1: column 'text' holds nothing"),
    "inner.jsonl": (b'{"text": ["a"]}\n', r"inner.jsonl:1: column 'text' holds a list"),
    "number.jsonl": (b'{"text": 3}\n', r"number.jsonl:1: column 'text' holds a number"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", r"deep.jsonl:1: n(ested too deeply|ot valid JSON)"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', r"surrogate.jsonl:1: holds half of a surrogate"),
    "disguise.txt": (gzip.compress(b"a\n"), r"disguise.txt: is gzip data; name it"),
    "plain.txt.gz": (b"hello\n", r"plain.txt.gz: is not gzip data"),
    "cut.txt.gz": (gzip.compress(b"hello world\n" * 500)[:40], r"cut.txt.gz:\d+: the gzip data is damaged"),
    "utf16.txt": ("hello".encode("utf-16"), r"utf16.txt:1: (is UTF-16|holds a NUL)"),
    "fields.csv": (b"text,label\na,1\nb\n", r"fields.csv:3: 1 fields, where the header has 2"),
    "twice.csv": (b"text,text\na,b\n", r"twice.csv:1: the header names a column twice"),
    "quote.csv": (b'text\n"a\n', r"quote.csv:2: not valid CSV"),
    "fake.parquet": (b"not parquet at all", r"fake.parquet: not a readable parquet file"),
    "cr.txt": (b"a\rb\rc\n", r"cr.txt:1: a carriage return inside"),
    "lines.json": (b'{"text": "a"}\n{"text": "b"}\n', r"lines.json: not valid JSON: .*on each line belongs into a .jsonl"),
    "strings.json": (b'["a"]', r"strings.json:\[0\]: expected a JSON object with a column for the text, got text"),
    "object.json": (b'{"rows": []}', r"object.json: neither a list of records nor SQuAD JSON"),
    "semicolon.csv": (b"text;label\na;1\n", r"semicolon.csv:1: the columns seem to be divided by ';'; what divides them here is a comma"),
    "all.txt::file": (b"one\ntwo\n", r"no document to train on: the only one is held out"),
    "zip.jsonl": (b"PK\x03\x04rest", r"zip.jsonl: is a zip archive"),
    "long.txt": (b"a" * (formats.MAX_LINE + 5), r"long.txt:1: longer than 16 MiB"),
    "mark.txt": (b"\xef\xbb\xbf" + b"a" * (formats.MAX_LINE + 5) + b"\nb\n", r"mark.txt:1: longer than 16 MiB"),
    "break.csv": (b'zz,"2\n3"\nt,u\n', r"break.csv:3: no column 'text'; choose from: 2 3, zz"),
    "empty.jsonl": (b"", r"no document to train on"),
    "blank.txt": (b"\n  \n\n", r"no document to train on"),
}


def test_a_date_that_python_has_none_for(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "when": pa.array([10**17], pa.timestamp("ms"))}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet: not a readable parquet file behind record 0: "):
        list(corpus.records(corpus.resolve(str(tmp_path / "x.parquet"))[0]))
    assert [text for text, _ in corpus.documents(corpus.resolve(str(tmp_path / "x.parquet")))] == ["a"], "other columns are not read"


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_file_and_line(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name.partition("::")[0]).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        preparation.write((text for text, _ in corpus.documents(corpus.resolve(str(tmp_path / name)))), tokenizer(), tmp_path / "out", 0.5 if "::" in name else 0.0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "nothing half-made is left"


SOME_BAD = {
    "x.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n{"text": \n{"texts": "b"}\n["c"]\n{"text": null}\n{"text": "\\ud800"}\n{"text": "d"}\n', ["a", "d"], 6),
    "x.csv": (b'text,n\na,1\nb\n"c\xff\nd",2\n"e"x,3\ng\0,4\nh,5\n', ["a", "h"], 4),
    "x.tsv": (b"text\tn\na\t1\nb\n\xff\t3\nd\t4\n", ["a", "d"], 2),
    "line.txt": (b"a\n\xffb\nc\rd\ne\0\nf\n", ["a", "f"], 3),
    "x.txt::paragraph": (b"a\nb\n\nc\n\xff\nd\n\ne\n", ["a\nb", "e"], 1),
    "mark.txt": (b"\xef\xbb\xbf" + b"b" * (formats.MAX_LINE * 2 + 5) + b"\nc\n", ["c"], 1),
    "long.txt": (b"a\n" + b"b" * (formats.MAX_LINE * 2 + 5) + b"\nc\n", ["a", "c"], 1),
}


@pytest.mark.parametrize("name", SOME_BAD)
def test_bad_records_are_skipped_and_counted_when_asked(tmp_path, name):
    content, texts, count = SOME_BAD[name]
    (tmp_path / name.partition("::")[0]).write_bytes(content)
    source = corpus.resolve(str(tmp_path / name))
    with pytest.raises(UserError, match=r":\d+: "):
        list(corpus.documents(source))
    bad = corpus.BadRecords(skip=True)
    assert [text for text, _ in corpus.documents(source, None, bad)] == texts
    assert bad.count == count
    assert len(bad.first) == min(count, 5)


@pytest.mark.parametrize("name", ["utf16.txt", "cut.txt.gz", "twice.csv", "quote.csv", "fake.parquet", "disguise.txt", "column.jsonl", "long.txt"])
def test_what_is_wrong_with_a_whole_file_is_never_skipped(tmp_path, name):
    (tmp_path / name).write_bytes(BAD[name][0])
    with pytest.raises(UserError, match=name):
        list(corpus.documents(corpus.resolve(str(tmp_path / name)), None, corpus.BadRecords(skip=True)))


def test_a_bad_text_that_is_one_record_is_skipped_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b"three\nf\xffour\nf\xffive\ns\rix\n")
    bad = corpus.BadRecords(skip=True)
    assert [text for text, _ in corpus.documents(corpus.resolve(f"{tmp_path}/*.txt::file"), None, bad)] == ["one\ntwo"]
    assert bad.count == 1
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"1 bad records, and no other document to train on: .*b.txt:2: not UTF-8"):
        preparation.prepare(f"{tmp_path}/*.txt::file", tokenizer(), 0.1, on_bad_record="skip")
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="none of its 1 records can be read"):
        list(corpus.documents(corpus.resolve(f"{tmp_path}/c.jsonl::file"), None, bad))


def test_a_folder_of_several_splits_is_read_and_said_to_be(tmp_path, caplog):
    """As `hf download` leaves a dataset."""
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl", "testimony.jsonl"):
        (tmp_path / "data" / name).write_text('{"text": "a film"}\n')
    assert len(corpus.resolve(str(tmp_path))) == 4
    assert f"holds files of train, test, and all are read; of the first alone: '{tmp_path}/**/train*'" in caplog.text
    caplog.clear()
    assert len(corpus.resolve(f"{tmp_path}/**/train*")) == 2
    (tmp_path / "data" / "test-00000-of-00001.jsonl").unlink()
    assert len(corpus.resolve(str(tmp_path))) == 3
    assert not caplog.text


def test_skipped_records_stand_in_the_manifest(tmp_path, caplog):
    (tmp_path / "x.jsonl").write_bytes(b"".join(b'{"text": "number %d"}\n' % n for n in range(20)) + b"oops\n")
    with pytest.raises(UserError, match=r"x.jsonl:21: not valid JSON"):
        preparation.prepare(str(tmp_path / "x.jsonl"), tokenizer(), 0.1)
    made = preparation.prepare(str(tmp_path / "x.jsonl"), tokenizer(), 0.1, on_bad_record="skip")
    assert made.manifest["bad_records"]["skipped"] == 1
    assert "x.jsonl:21: not valid JSON" in made.manifest["bad_records"]["first"][0]
    assert "1 bad records skipped" in caplog.text
    assert made.manifest["train"]["documents"] + made.manifest["held_out"]["documents"] == 20


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "no such file"),
        ("x/*.jsonl", "nothing matches"),
        ("file.xyz", "no such file|no reader"),
        ("package://no_such_pkg/x.csv", "not installed"),
        ("package:///x.csv", "not installed"),
        ("package://csv/x.csv", "'csv' is a module|has no file"),
        ("~nobody-of-this-name/x.txt", "no such file"),
        ("packed.jsonl.zst", "of compressed files only .gz is read"),
    ],
)
def test_sources_that_are_none(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packed.jsonl.zst").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        corpus.resolve(source)


def test_token_set_holds_every_document_once(tmp_path):
    texts = sentences(200)
    made = lmssl.from_iterable([*texts, *texts[:30]], tokenizer(), tmp_path / "t", 0.1)
    unique = len(set(texts))
    counts = made.manifest
    assert counts["train"]["documents"] + counts["held_out"]["documents"] == unique
    assert counts["duplicates"] == 230 - unique
    assert counts["train"]["bytes"] + counts["held_out"]["bytes"] == sum(len(t.encode()) for t in set(texts))
    decoded = set()
    for split in ("train", "held_out"):
        part = lmssl.TokenSet(tmp_path / "t", split)
        ids = np.concatenate([part.row(k, 50, 0).ids for k in range(part.rows(50))])[: part.tokens]
        for piece in np.split(ids, np.flatnonzero(ids == tokenizer().id("eos")) + 1)[:-1]:
            decoded.add(tokenizer().decode(piece[1:-1]))
    assert decoded == set(texts)


def test_a_token_set_is_an_ordinary_datasets_folder_either_way(tmp_path):
    import datasets

    texts = sentences(300)
    made = lmssl.from_iterable(texts, tokenizer(), tmp_path / "t", 0.1)
    for split in ("train", "held_out"):
        read = datasets.load_from_disk(str(tmp_path / "t" / split))
        assert len(read) == made.manifest[split]["documents"]
        assert sum(read["bytes"]) == made.manifest[split]["bytes"]
        part = lmssl.TokenSet(tmp_path / "t", split)
        assert np.array_equal(np.concatenate(read["input_ids"]), part._slice(0, part.tokens))
        # What datasets has written again, in shards, is still a token set.
        shutil.rmtree(tmp_path / "t2", ignore_errors=True)
        shutil.copytree(tmp_path / "t", tmp_path / "t2")
        read.save_to_disk(str(tmp_path / "t2" / split), num_shards=3)
        again = lmssl.TokenSet(tmp_path / "t2", split)
        assert (again.documents, again.tokens) == (part.documents, part.tokens)
        assert all(np.array_equal(again.row(k, 32, 0).ids, part.row(k, 32, 0).ids) for k in range(part.rows(32)))


def test_held_out_is_by_content_and_never_empty(tmp_path):
    texts = sentences(100)
    first = lmssl.from_iterable(texts, tokenizer(), tmp_path / "a", 0.2)
    second = lmssl.from_iterable(reversed(texts), tokenizer(), tmp_path / "b", 0.2)
    assert first.manifest["held_out"] == second.manifest["held_out"]
    tiny = lmssl.from_iterable(texts[:5], tokenizer(), tmp_path / "c", 1e-9)
    assert tiny.manifest["held_out"]["documents"] == 1
    assert tiny.manifest["train"]["documents"] == 4


def test_prepare_finds_it_again(corpus_file):
    first = lmssl.prepare(str(corpus_file), tokenizer(), 0.1, quiet=True)
    stamp = (first.folder / "manifest.json").stat().st_mtime_ns
    again = lmssl.prepare(str(corpus_file), tokenizer(), 0.1, quiet=True)
    assert (again.folder, (again.folder / "manifest.json").stat().st_mtime_ns) == (first.folder, stamp)
    assert lmssl.prepare(str(corpus_file), tokenizer(), 0.2, quiet=True).folder != first.folder
    other = lmssl.train_tokenizer(sentences(300, seed=9), size=tokenizer().size)
    assert other.size == tokenizer().size
    assert lmssl.prepare(str(corpus_file), other, 0.1, quiet=True).folder != first.folder, "another tokenizer makes other ids"


def test_held_out_file(tmp_path, corpus_file):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(corpus_file.read_text().splitlines(keepends=True)[:20]))
    made = lmssl.prepare(str(corpus_file), tokenizer(), str(held), quiet=True)
    assert made.manifest["held_out"]["documents"] == 20
    assert made.manifest["duplicates"] >= 20
    held.write_text("".join(corpus_file.read_text().splitlines(keepends=True)[20:40]))
    assert set(lmssl.prepare(str(corpus_file), tokenizer(), str(held), quiet=True).held_out().texts()).isdisjoint(made.held_out().texts())


def test_segments_follow_the_documents(shared_dir):
    made = token_set(shared_dir)
    eos, bos = tokenizer().id("eos"), tokenizer().id("bos")
    for k in range(made.rows(40)):
        row = made.row(k, 40, 0)
        used = row.segments > 0
        assert (row.segments[used][0], row.segments.dtype) == (1, np.int32)
        steps = np.diff(row.segments[used])
        assert set(steps.tolist()) <= {0, 1}
        starts = np.flatnonzero(steps) + 1
        assert (row.ids[starts] == bos).all()
        assert (row.ids[starts - 1] == eos).all()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64, 65, 1000])
def test_permuted_is_a_permutation(n):
    orders = [tuple(permuted(k, n, seed, epoch) for k in range(n)) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 10 or len(set(orders)) == 4


def test_permuted_is_even():
    """Every row stands at every place about equally often."""
    n = 8
    counts = np.zeros((n, n))
    for seed in range(4000):
        for k in range(n):
            counts[k, permuted(k, n, seed, 0)] += 1
    assert abs(counts / 4000 - 1 / n).max() < 0.03


def test_every_row_once_an_epoch(shared_dir):
    stream = Stream(token_set(shared_dir), NextToken(), 32, seed=3, length=10**6)
    for epoch in (0, 1, 5):
        rows = [stream.index(i)[1] for i in range(epoch * stream.rows, (epoch + 1) * stream.rows)]
        assert sorted(rows) == list(range(stream.rows))


def test_items_are_pure_functions_of_seed_and_number(shared_dir):
    made = token_set(shared_dir)
    a, b = (Stream(made, MaskedTokens(), 32, seed=1, length=n) for n in (100, 10**7))
    for i in (99, 0, 50):
        assert all(np.array_equal(a[i][k], b[i][k]) for k in a[i])
    other = Stream(made, MaskedTokens(), 32, seed=2, length=100)
    assert any(not np.array_equal(a[i]["input_ids"], other[i]["input_ids"]) for i in range(5))
    assert len({generator(0, i).random() for i in range(1000)}) == 1000


@pytest.mark.parametrize("damage", [(b"b\xc3\xa4d", b"b\x86\xa4d"), (b"text", b"te\xbft")], ids=["text", "name"])
def test_parquet_that_is_not_utf8_is_refused(damage, tmp_path):
    """Found by fuzzing: arrow decodes texts and column names only when they become Python's."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", "b\u00e4d"]}), path, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    assert damage[0] in whole
    path.write_bytes(whole.replace(*damage))
    with pytest.raises(UserError, match=r"x.parquet: not a readable parquet file behind record 0: "):
        list(corpus.records(corpus.resolve(str(path))[0]))


def test_ids_beyond_sixteen_bits(tmp_path):
    """Llama 3, Qwen and mT5 have more than 65,536."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = ["<pad>", "</s>", "<unk>", *(f"w{n}" for n in range(70_000))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocab)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(vocab[:3])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "</s>"}))
    texts = [f"w{n} w{69_999 - n}" for n in range(40)]
    made = lmssl.from_iterable(texts, lmssl.load_tokenizer(str(tmp_path)), tmp_path / "tokens", 0.0)
    assert list(made.texts()) == texts


def test_text_that_is_written_in_many_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 500)
    texts = list(dict.fromkeys(sentences(200)))
    made = lmssl.from_iterable(texts, tokenizer(), tmp_path / "tokens", 0.0)
    assert list(made.texts()) == texts
    assert made.manifest["train"] == {"documents": len(texts), "tokens": made.tokens, "bytes": sum(len(t.encode()) for t in texts)}


def test_duplicates_are_remembered_for_good():
    seen = preparation._Seen()
    assert all(seen.add(value) for value in range(0, 400_000, 2))
    assert not any(seen.add(value) for value in range(0, 400_000, 2))
    assert all(seen.add(value) for value in range(1, 1000, 2))


def test_epochs_and_seeds_have_their_own_order_and_noise(shared_dir):
    made = token_set(shared_dir)

    def order(seed, epoch):
        stream = Stream(made, NextToken(), 32, seed, 10**6)
        return [stream.index(i)[1] for i in range(epoch * stream.rows, (epoch + 1) * stream.rows)]

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    stream, other = (Stream(made, MaskedTokens(), 32, seed, 10**6) for seed in (1, 2))
    later = next(i for i in range(stream.rows, 2 * stream.rows) if stream.index(i)[1] == stream.index(0)[1])
    assert not np.array_equal(stream[0]["labels"], stream[later]["labels"]), "a row is masked anew in each epoch"
    same = next(i for i in range(other.rows) if other.index(i)[1] == stream.index(i)[1])
    assert not np.array_equal(stream[same]["labels"], other[same]["labels"]), "and by each seed"


def test_a_bad_record_of_a_list_is_skipped_alone(tmp_path):
    (tmp_path / "x.json").write_text('[{"text": "first"}, 5, {"text": "last"}]')
    source = corpus.resolve(str(tmp_path / "x.json"))
    bad = corpus.BadRecords(True)
    assert [text for text, _ in corpus.documents(source, None, bad)] == ["first", "last"]
    assert bad.count == 1
    with pytest.raises(UserError, match=r"x\.json:\[1\]: expected a JSON object"):
        list(corpus.documents(source))
