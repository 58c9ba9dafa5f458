"""Few labels: nested subsets, honest splits, three families, and a checkpoint that stock transformers loads."""

import json

import numpy as np
import pytest
import transformers

from lmssl import models
from lmssl.data.tokens import below, content_hash
from lmssl.errors import UserError
from lmssl.recipe import FinetuneRecipe, finetune
from lmssl.tasks import base
from lmssl.tasks.base import Example
from lmssl.tasks.sentiment import Sentiment
from tests.helpers import sentences, small_model, token_set, tokenizer

EXAMPLES = [Example(text, "good" if n % 3 else "bad", f"x:{n}") for n, text in enumerate(dict.fromkeys(sentences(300)))]


@pytest.mark.parametrize("seed", range(3))
def test_subsets_are_nested_and_stratified(seed):
    order = base.nested(EXAMPLES, seed)
    assert sorted(order) == list(range(len(EXAMPLES)))
    share = sum(e.label == "good" for e in EXAMPLES) / len(EXAMPLES)
    for n in (6, 20, 99, 200):
        assert abs(sum(EXAMPLES[i].label == "good" for i in order[:n]) - share * n) <= 1
    assert order != base.nested(EXAMPLES, seed + 1)


def test_test_split_by_content():
    train, test = base.split_test(EXAMPLES, 50)
    assert len(test) == 50
    assert max(content_hash(e.text) for e in test) < min(content_hash(e.text) for e in train)
    _, fraction = base.split_test(EXAMPLES, 0.2)
    assert all(content_hash(e.text) < below(0.2) for e in fraction)
    assert not {e.text for e in train} & {e.text for e in test}


def test_encode_keeps_the_end_and_the_specials():
    task, made = Sentiment(), tokenizer()
    text = sentences(1, seed=2)[0] * 3
    whole = made.encode([text])[0]
    (item,) = task.encode(made, "encoder", [Example(text, "1", "")], ["0", "1"], 16)
    assert item["input_ids"].tolist() == [whole[0], *whole[-15:]]
    (item,) = task.encode(made, "decoder", [Example(text, "1", "")], ["0", "1"], 16)
    assert item["input_ids"].tolist() == [whole[0], *whole[-16:-1]], "decoders pool the last token: no eos behind it"
    (item,) = Sentiment(keep="start").encode(made, "encoder", [Example(text, "1", "")], ["0", "1"], 16)
    assert item["input_ids"].tolist() == [*whole[:15], whole[-1]]


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Reviews whose class is plain to see, so that learning shows in a few steps."""
    path = tmp_path_factory.mktemp("easy") / "labelled.jsonl"
    rows = []
    for n, text in enumerate(sentences(240, seed=8)):
        words = [w for w in text.split() if w.strip(".,") not in ("good", "bad")][:12]
        rows.append({"review": " ".join([*words, "good" if n % 2 else "bad"]), "verdict": "pro" if n % 2 else "contra"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert", "roberta", "modernbert", "t5", "bart"])
def test_every_family(architecture, easy, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    small_model(architecture, tokens.vocab(), 32).save_pretrained(tmp_path / "backbone")
    tokens.tokenizer.save(tmp_path / "backbone")
    recipe = FinetuneRecipe.of(
        {
            "task": {"name": "sentiment", "text": "review", "label": "verdict", "labels": [8, 120], "seeds": 1},
            "data": {"train": str(easy), "test": 60},
            "model": {"from": str(tmp_path / "backbone")},
            "trainer": {"output_dir": str(tmp_path / "out"), "max_steps": 12, "learning_rate": 5e-3, "bf16": False},
        }
    )
    metrics = finetune(recipe, quiet=True)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert {(r["labels"], r["init"]) for r in metrics["results"]} == {(n, i) for n in (8, 120) for i in ("scratch", "pretrained")}
    assert all(0 <= r["score"] <= 1 and {"labels", "init", "seed", "score"} <= set(r) for r in metrics["results"])
    assert (metrics["task"], metrics["metric"], metrics["test_examples"]) == ("sentiment", "accuracy", 60)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.id2label == {0: "contra", 1: "pro"}


def test_it_learns_and_scratch_differs(easy, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    small_model("llama", tokens.vocab(), 32).save_pretrained(tmp_path / "backbone")
    tokens.tokenizer.save(tmp_path / "backbone")
    recipe = FinetuneRecipe.of(
        {
            "task": {"name": "sentiment", "text": "review", "label": "verdict", "labels": [160], "seeds": 2},
            "data": {"train": str(easy), "test": 60},
            "model": {"from": str(tmp_path / "backbone")},
            "trainer": {"output_dir": str(tmp_path / "out"), "max_steps": 60, "learning_rate": 5e-3, "bf16": False},
        }
    )
    scores = [r["score"] for r in finetune(recipe, quiet=True)["results"]]
    assert min(scores) > 0.9
    task = recipe.task
    small_model("llama", tokens.vocab(), 32, seed=7).save_pretrained(tmp_path / "backbone")
    twin, reused = (task.model(s, str(tmp_path / "backbone"), ["a", "b"], 0) for s in (None, str(tmp_path / "backbone")))
    backbone = models.AUTO["decoder"].from_pretrained(tmp_path / "backbone")
    assert (reused.get_input_embeddings().weight == backbone.get_input_embeddings().weight).all()
    assert not (twin.get_input_embeddings().weight == reused.get_input_embeddings().weight).all()
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in reused.parameters())


def test_summary_is_paired():
    results = [{"labels": 10, "init": i, "seed": s, "score": v} for i, values in (("scratch", [0.5, 0.6, 0.7]), ("pretrained", [0.6, 0.7, 0.8])) for s, v in enumerate(values)]
    (row,) = base.summary(results)
    assert row["gain"]["mean"] == pytest.approx(0.1)
    assert row["gain"]["error"] == pytest.approx(0.0, abs=1e-12)
    assert row["scratch"]["std"] == pytest.approx(0.1)
    from scipy import stats

    assert base.t_quantile(4) == pytest.approx(stats.t.ppf(0.975, 4), abs=1e-3)


def test_macro_f1_equals_scikit_learn():
    from sklearn.metrics import f1_score

    from lmssl.tasks.sentiment import macro_f1

    rng = np.random.default_rng(0)
    truth, guesses = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    assert macro_f1(truth, guesses) == pytest.approx(f1_score(truth, guesses, average="macro"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {"text": "reviw"}}, r":1: no column 'reviw'; did you mean 'review'"),
        ({"task": {"labels": [10_000]}}, "10000 labels asked for, 180 examples"),
        ({"task": {"labels": [1]}}, "cannot hold one example of each"),
        ({"task": {"labels": []}}, "labels=.. must be different"),
        ({"task": {"seeds": 0}}, "seeds=0"),
        ({"task": {"name": "sentimnt"}}, "did you mean 'sentiment'"),
        ({"task": {"label": "review"}}, "labels cannot hold one example"),
        ({"data": {"max_length": 9999}}, "the backbone has 32 positions"),
        ({"data": {"test": 1000}}, "leave some to train on"),
        ({"model": {"from": "nowhere/at/all"}}, "no checkpoint folder"),
        ({"model": {"form": "x"}}, "did you mean 'from'"),
    ],
)
def test_refusals(change, message, easy, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    small_model("bert", tokens.vocab(), 32).save_pretrained(tmp_path / "backbone")
    tokens.tokenizer.save(tmp_path / "backbone")
    sections = {
        "task": {"name": "sentiment", "text": "review", "label": "verdict", "labels": [8], "seeds": 1},
        "data": {"train": str(easy), "test": 60},
        "model": {"from": str(tmp_path / "backbone")},
        "trainer": {"output_dir": str(tmp_path / "out"), "max_steps": 1},
    }
    for section, values in change.items():
        sections[section] |= values
    with pytest.raises(UserError, match=message):
        finetune(FinetuneRecipe.of(sections), quiet=True)
