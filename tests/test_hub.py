"""Datasets of the hub, as the library keeps them in its cache: what is read where there is no network."""

import datasets
import pytest
from datasets.arrow_writer import ArrowWriter

from lmssl.data import corpus
from lmssl.errors import UserError

LABEL = datasets.ClassLabel(names=["neg", "pos"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """`org/name` with two configurations, downloaded before."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for config, texts in {"plain": ["one", "two"], "long": ["three", "four", "five"]}.items():
        folder = tmp_path / "org___name" / config / "0.0.0" / "0123abc"
        folder.mkdir(parents=True)
        features = datasets.Features({"text": datasets.Value("string"), "review": datasets.Value("string"), "label": LABEL})
        splits = []
        for split in ("train", "test"):
            with ArrowWriter(path=str(folder / f"name-{split}.arrow"), features=features) as writer:
                for number, text in enumerate(texts):
                    writer.write({"text": f"{split} {text}", "review": text, "label": number % 2})
                writer.finalize()
            splits.append({"name": split, "num_examples": len(texts), "num_bytes": 1, "dataset_name": "name"})
        datasets.DatasetInfo(features=features, builder_name="parquet", dataset_name="name", config_name=config, version="0.0.0", splits=splits).write_to_directory(str(folder))


def texts(name):
    return [text for text, _ in corpus.documents(corpus.resolve(name))]


def test_a_configuration_a_split_and_a_column_are_named():
    assert texts("org/name:plain") == ["train one", "train two"]
    assert texts("org/name:plain@test") == ["test one", "test two"]
    assert texts("org/name:long@train::review") == ["three", "four", "five"]
    assert texts(["org/name:plain@test", "org/name:plain@test", "org/name:long@test::review"]) == ["test one", "test two", "three", "four", "five"]
    (source,) = corpus.resolve("org/name:plain", "data.train")
    assert [(record["text"], record["label"], where) for record, where in corpus.labelled(source)] == [("train one", 0, "org/name:1"), ("train two", 1, "org/name:2")]


def test_each_has_a_fingerprint_of_its_own():
    names = ["org/name", "org/name@test", "org/name:plain", "org/name:plain@test", "org/name:long"]
    assert len({corpus.resolve(name)[0].fingerprint() for name in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/name", "org/name is no file or folder here and cannot be had from the hub: .*plain.*one of several configurations: org/name:CONFIG@train"),
        ("org/name:short@test", "'short'.*org/name:CONFIG@test"),
        ("org/name:plain@validation", "validation"),
        ("org/nothing", "org/nothing is no file or folder here"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(name, message):
    with pytest.raises(UserError, match=message) as caught:
        texts(name)
    assert "\n" not in str(caught.value)
