"""Where text is read from: folders, links, globs, and columns that nobody asked for."""

import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lmssl
from lmssl.data import corpus
from lmssl.data.formats import BadRecords
from lmssl.errors import UserError
from lmssl.recipe import FinetuneRecipe, PretrainRecipe
from tests.helpers import sentences, tokenizer


def texts(name, **more):
    return [text for text, _ in corpus.documents(corpus.resolve(str(name)), **more)]


def test_a_folder_is_read_through_links_and_once(tmp_path):
    (tmp_path / "text" / "real").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text" / "real" / "1.txt").write_text("one\n")
    (tmp_path / "elsewhere" / "2.txt").write_text("two\n")
    (tmp_path / "text" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text" / "real" / "round").symlink_to(tmp_path / "text")
    assert sorted(texts(tmp_path / "text")) == ["one", "two"]


def test_folders_that_a_glob_matches_are_spoken_of(tmp_path, caplog):
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "x.txt").write_text("inside\n")
    with pytest.raises(UserError, match="matches folders alone"):
        corpus.resolve(str(tmp_path / "*"))
    (tmp_path / "a.txt").write_text("beside\n")
    assert texts(tmp_path / "*") == ["beside"]
    assert "also matches folders, which are not read" in caplog.text
    caplog.clear()
    assert texts(tmp_path / "**" / "*") == ["beside", "inside"]
    assert texts(tmp_path / "*.txt") == ["beside"]
    assert not caplog.text


@pytest.mark.parametrize("name", ["", "::text"])
def test_nothing_is_not_this_folder(name, tmp_path, monkeypatch):
    """An unset variable of the shell."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("here\n")
    with pytest.raises(UserError, match=r"data\.text: is empty"):
        corpus.resolve(name)


def test_what_is_wrong_with_a_file_is_said_of_that_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + "{\n" * 6)
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n' * 3)
    with pytest.raises(UserError, match=r"b\.jsonl: none of its 3 records.*b\.jsonl:3: no column 'text'; did you mean|b\.jsonl:3: no column 'text'"):
        texts(tmp_path / "*.jsonl", bad=BadRecords(True))


def test_other_columns_are_not_read(tmp_path):
    """Pictures and sound need libraries of their own, and memory."""
    picture = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    broken = datasets.Dataset.from_dict({"text": ["a", "b"], "picture": [{"bytes": b"no picture", "path": None}] * 2}, features=picture)
    broken.save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved") == ["a", "b"]
    (source,) = corpus.resolve(str(tmp_path / "saved"))
    assert [record["picture"]["bytes"] for record, _ in corpus.records(source)] == [b"no picture"] * 2
    for kind in ("numpy", "torch"):
        plain = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).with_format(kind, columns=["label"])
        plain.save_to_disk(str(tmp_path / kind))
        assert texts(tmp_path / kind) == ["a"]
        (source,) = corpus.resolve(str(tmp_path / kind))
        assert [type(record["label"]) for record, _ in corpus.labelled(source)] == [int]


def test_the_memory_of_parquet_is_the_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"], "weights": pa.array([np.zeros(3).tobytes()] * 2)}), tmp_path / "x.parquet")
    (source,) = corpus.resolve(str(tmp_path / "x.parquet"))
    assert [sorted(record) for record, _ in corpus.records(source, only="text")] == [["text"]] * 2
    assert [sorted(record) for record, _ in corpus.records(source, only="missing")] == [["text", "weights"]] * 2
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"y\.parquet: two columns are called 'text'"):
        texts(tmp_path / "y.parquet")


def test_a_long_folder_does_not_delay_a_refusal(tmp_path, monkeypatch):
    for number in range(1500):
        (tmp_path / f"{number}.jsonl").touch()
    asked = []
    monkeypatch.setattr(corpus, "did_you_mean", lambda name, choices: asked.append(len(list(choices))) or "")
    with pytest.raises(UserError, match="no such file"):
        corpus.resolve(os.fspath(tmp_path / "x.jsonl"))
    assert asked == [1000]


def test_a_header_may_begin_with_a_hash(tmp_path):
    """MRPC's does."""
    (tmp_path / "x.tsv").write_text("#1 String\t#2 String\none\ttwo\n")
    assert texts(f"{tmp_path}/x.tsv::#1 String") == ["one"]
    assert texts(f"{tmp_path}/x.tsv::#2") == ["#2 String", "two"]


def test_a_mark_of_byte_order_and_bytes(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf[{"text": "one"}]')
    assert texts(tmp_path / "x.json") == ["one"]
    pq.write_table(pa.table({"text": [b"one"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="column 'text' holds bytes, expected text"):
        texts(tmp_path / "x.parquet")


def test_splits_of_a_saved_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    some = {name: datasets.Dataset.from_dict({"text": [f"{name} {n}" for n in range(3)]}) for name in ("dev", "test")}
    datasets.DatasetDict(some).save_to_disk("both")
    some["dev"].save_to_disk("one")
    for name in ("both@test", f"{tmp_path}/both@test", "./both/@test"):
        assert texts(name) == ["test 0", "test 1", "test 2"]
    prints = {name: corpus.resolve(name)[0].fingerprint() for name in ("both@test", "both@dev", "one")}
    assert len(set(prints.values())) == 3
    for name, message in (("both", "holds no split 'train' but dev, test; name one: both@dev"), ("one@test", "one@test: is one dataset without splits; leave @test out")):
        with pytest.raises(UserError, match=message):
            texts(name)
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match=r"plain is a folder here, and @test chooses among the splits of a dataset; name the files: plain/\*\*/test\*"):
        texts("plain@test")


def test_a_path_is_a_source(tmp_path):
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    assert corpus.resolve(tmp_path / "x.txt") == corpus.resolve([tmp_path / "x.txt"]) == corpus.resolve(str(tmp_path / "x.txt"))


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sections = {"data": {"text": "x", "tokenizer": "~/t", "seq_length": 8}, "model": {"from": "~/m"}, "objective": {"name": "masked"}, "trainer": {"output_dir": "o"}}
    recipe = PretrainRecipe.of(sections)
    assert (recipe.data.tokenizer, recipe.continued) == (f"{tmp_path}/t", f"{tmp_path}/m")
    sections = {"task": {"name": "sentiment"}, "data": {"train": "x"}, "model": {"from": "~/m"}, "trainer": {"output_dir": "o"}}
    assert FinetuneRecipe.of(sections).source == f"{tmp_path}/m"


def test_another_column_is_another_text(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"a": f"a film {n}", "b": f"the plot {n}"}) + "\n" for n in range(20)))
    one, other = (set(lmssl.prepare(f"{tmp_path / 'x.jsonl'}::{column}", tokenizer(), 0.1, quiet=True).texts()) for column in "ab")
    assert not one & other


def test_a_file_of_another_kind_is_another_text(tmp_path):
    """The same bytes under another name are read otherwise."""
    content = "".join(json.dumps({"text": text}) + "\n" for text in sentences(30))
    found = []
    for name in ("d.txt", "d.jsonl"):
        (tmp_path / name).write_text(content)
        found.append(next(iter(lmssl.prepare(str(tmp_path / name), tokenizer(), 0.2, quiet=True).texts())))
    assert found[0].startswith("{")
    assert not found[1].startswith("{")


def test_a_file_that_is_one_document_may_be_read_as_several(tmp_path):
    (tmp_path / "all.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"data.text: .*all.txt: no document to train on: the only one is held out .*FILE::paragraph"):
        lmssl.prepare(f"{tmp_path / 'all.txt'}::file", tokenizer(), 0.5, quiet=True)
