import gc
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_collection_finish():
    """What is imported by now stays: accelerate collects garbage whenever a training begins, a quarter of a second each time over all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    """Each test draws the same whichever ran before it."""
    from transformers import set_seed

    set_seed(0)


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory):
    """One folder for what several tests prepare."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    os.environ["LMSSL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """A small corpus with labels, as a JSONL file."""
    import json

    from tests.helpers import sentences

    path = tmp_path_factory.mktemp("corpus") / "reviews.jsonl"
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(sentences(400, seed=3))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
