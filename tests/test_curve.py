"""Nine cells: three tasks, three families, each with its twin, its saved checkpoint and its predictions."""

import json
import logging
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers

from lmssl import config, tokenization
from lmssl.arguments import OWNED_BY_TASKS, finetune_defaults, resolve
from lmssl.cli import run
from lmssl.errors import UserError
from lmssl.predict import predict
from lmssl.recipe import FinetuneRecipe
from lmssl.runs import curve_of, finetune
from lmssl.tasks import base, baseline, curve, make_task
from lmssl.tasks.base import Task
from lmssl.tasks.curve import Run
from lmssl.tasks.sentiment import Labelled, Sentiment
from tests.helpers import saved_backbone, token_set

ARCHITECTURE = {"decoder": "llama", "encoder": "bert", "encoder-decoder": "t5"}
LENGTH = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file for each task, made of the small vocabulary of the tests."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    things, kinds = ["film", "story", "plot", "actor", "scene", "ending", "music"], ["good", "bad", "dull", "warm", "slow", "weak"]
    rows = {"sentiment": [], "translation": [], "qa": []}
    for n in range(160):
        picks = [(things[rng.integers(7)], kinds[rng.integers(6)]) for _ in range(int(rng.integers(2, 9)))]
        text = " ".join(f"the {t} {n} was {k}." for t, k in picks)
        rows["sentiment"].append({"text": f"{text} {'good' if n % 2 else 'bad'}", "label": n % 2})
        rows["translation"].append({"source": " ".join(f"{k} {t}" for t, k in picks[:2]) + f" {n}", "target": " ".join(f"{t} {k}" for t, k in picks[:2])})
        thing, kind = picks[-1]
        start = text.rindex(kind)
        rows["qa"].append({"id": f"q{n}", "context": text, "question": f"how was the {thing}", "answers": {"text": [kind], "answer_start": [start]}})
    paths = {}
    for task, some in rows.items():
        paths[task] = folder / f"{task}.jsonl"
        paths[task].write_text("".join(json.dumps(row) + "\n" for row in some))
    return paths


@pytest.fixture(scope="module")
def backbones(shared_dir, tmp_path_factory):
    tokens, made = token_set(shared_dir), {}
    for family, architecture in ARCHITECTURE.items():
        made[family] = tmp_path_factory.mktemp(family)
        saved_backbone(architecture, tokens, made[family], LENGTH)
    return made


def sections(task, source, data, out, **fields):
    return {
        "task": {"name": task, "labels": [20], "seeds": 2, **({"max_new_tokens": 8} if task == "translation" else {}), **fields},
        "data": {"train": str(data[task]), "test": 12, "max_length": LENGTH},
        "model": {"from": str(source)},
        "trainer": {"output_dir": str(out), "max_steps": 2, "learning_rate": 1e-3, "bf16": False, "per_device_train_batch_size": 4},
    }


@dataclass(frozen=True)
class Topic(Sentiment):
    """A task of one's own; `score` is what its evaluation says."""

    name: ClassVar[str] = "topic"
    score: ClassVar[Any] = None

    def evaluate(self, model, backbone, examples, batch, compiled=False):
        scores, outputs = super().evaluate(model, backbone, examples, batch, compiled)
        return (scores, outputs) if type(self).score is None else type(self).score(scores, outputs)


@dataclass(frozen=True)
class Unfinished(Task):
    """No method of it is there yet."""


def test_a_task_of_one_s_own_is_named_by_its_module(data, backbones, tmp_path, monkeypatch, capsys):
    wanted = sections("sentiment", backbones["encoder"], data, tmp_path / "out", seeds=1)
    wanted["task"]["name"] = f"{__name__}:Topic"
    assert finetune(FinetuneRecipe.of(wanted), quiet=True)["task"] == "topic"
    assert config.of_folder(tmp_path / "out")["task"]["name"] == f"{__name__}:Topic"
    (tmp_path / "x.txt").write_text("a film\n")
    capsys.readouterr()
    assert run(["predict", str(tmp_path / "out"), str(tmp_path / "x.txt")]) == 0
    assert "label" in json.loads(capsys.readouterr().out)
    for name, message in (
        (f"{__name__}:Unfinished", r"is no task yet: it has no classes, collator, column, encode, evaluate"),
        (f"{__name__}:sections", "is no task: a frozen dataclass"),
    ):
        with pytest.raises(UserError, match=message):
            make_task({"name": name})
    gave = r"task: evaluate of 'topic' gave accuracy=.* outputs for 12 examples"
    for score, message in (
        (lambda scores, outputs: (scores | {"accuracy": 50.0}, outputs), gave),
        (lambda scores, outputs: ({}, outputs), gave),
        (lambda scores, outputs: (scores, outputs[:-2]), gave),
        (lambda scores, outputs: 1 / 0, r"task.name: evaluate of 'topic': ZeroDivisionError: division by zero .*test_curve.py"),
    ):
        monkeypatch.setattr(Topic, "score", staticmethod(score))
        with pytest.raises(UserError, match=message):
            finetune(FinetuneRecipe.of(wanted | {"trainer": wanted["trainer"] | {"output_dir": str(tmp_path / "bad")}}), overwrite=True, quiet=True)


@pytest.mark.parametrize("family", ARCHITECTURE)
@pytest.mark.parametrize("task", ["sentiment", "translation", "qa"])
def test_cell(task, family, data, backbones, tmp_path):
    out = tmp_path / "out"
    metrics = finetune(FinetuneRecipe.of(sections(task, backbones[family], data, out)), quiet=True)
    assert len(metrics["results"]) == 2 * 2
    assert all(0 <= r["score"] <= 1 for r in metrics["results"])
    assert metrics["summary"][0]["gain"]["error"] is not None
    assert metrics["leaks"] == {"checked": False, "reason": f"{backbones[family]} has no recipe.yaml of lmssl, so its text is not known"}
    assert len(list((out / "predictions").glob("*-*-*.*"))) == 4
    writer = "AutoModelForCausalLM" if family == "decoder" else "AutoModelForSeq2SeqLM"
    auto = {"sentiment": "AutoModelForSequenceClassification", "qa": "AutoModelForQuestionAnswering", "translation": writer}[task]
    _, info = getattr(transformers, auto).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # Predicting from the saved folder repeats what the run wrote of its test examples.
    chosen = metrics["test_examples"]
    file = next((out / "predictions").glob("20-pretrained-0.*"))
    written = json.loads(file.read_text()).values() if task == "qa" else file.read_text().splitlines()
    rows = list(predict(str(out), [str(data[task])], batch=8))
    _, test = curve.labelled(make_task({"name": task}), str(data[task]), 12)
    places = {e.where for e in test}
    answers = [next(row[k] for k in ("label", "translation", "answer") if k in row) for row in rows if row["where"] in places]
    assert len(answers) == chosen
    assert answers == list(written)
    if task == "qa":
        assert list(json.loads(file.read_text())) == [e.id for e in test]
    if task == "translation":
        beside = [(file.parent / f"{name}.txt").read_text().splitlines() for name in ("sources", "references")]
        assert beside == [[e.text for e in test], [e.target for e in test]]
    namespace = {}
    card = (out / "README.md").read_text()
    exec(card.split("```python\n")[1].split("```")[0].replace("print(", "shown = ("), namespace)
    assert "shown" in namespace
    if task == "qa":
        (tmp_path / "one.jsonl").write_text(json.dumps({"question": "Who wrote it?", "context": "It was written by Ada Lovelace in 1843."}))
        (row,) = predict(str(out), [str(tmp_path / "one.jsonl")])
        assert namespace["shown"] == row["answer"].strip(), "the best span of all, no longer than the recipe says"
    if task == "translation":
        (tmp_path / "one.jsonl").write_text(json.dumps({"source": "A text to work on."}))
        (row,) = predict(str(out), [str(tmp_path / "one.jsonl")])
        assert [" ".join(text.split()) for text in namespace["shown"]] == [row["translation"]], "no prompt, and as many tokens as the recipe says"


def test_learning_rates_are_chosen_on_the_few_labels_alone(data, backbones, tmp_path, monkeypatch):
    """Both inits, every count, the whole grid; seed 0; never a test example."""
    asked = []
    monkeypatch.setattr(curve.Curve, "_loss", lambda self, model, trainer, items: asked.append(items) or len(asked) % 3)
    fields = {"labels": [8, 20], "learning_rates": [1e-4, 1e-3, 1e-2], "scratch_labels": [40], "seeds": 1}
    metrics = finetune(FinetuneRecipe.of(sections("sentiment", backbones["decoder"], data, tmp_path / "out", **fields)), quiet=True)
    assert {(t["labels"], t["init"]) for t in metrics["tuning"]} == {(8, "scratch"), (8, "pretrained"), (20, "scratch"), (20, "pretrained"), (40, "scratch")}
    assert len(metrics["tuning"]) == 5 * 3
    assert {len(items) for items in asked} == {2, 4, 10}, "a quarter of each of the two classes, rounded down"
    recipe = FinetuneRecipe.of(sections("sentiment", backbones["decoder"], data, tmp_path / "again", **fields))
    made = curve_of(recipe, resolve(recipe.trainer, finetune_defaults(), OWNED_BY_TASKS), True)
    ids = lambda items: {tuple(item["input_ids"].tolist()) for item in items}  # noqa: E731
    held = ids(item for items in asked for item in items)
    assert held <= ids(item for shot in made._few(0) for item in shot.items)
    assert not held & ids(item for items in made.task.encode(made.backbone, made.test) for item in items)
    for labels, init in {(t["labels"], t["init"]) for t in metrics["tuning"]}:
        best = min((t for t in metrics["tuning"] if (t["labels"], t["init"]) == (labels, init)), key=lambda t: t["validation_loss"])
        assert {r["learning_rate"] for r in metrics["results"] if (r["labels"], r["init"]) == (labels, init)} == {best["learning_rate"]}
    assert {r["labels"] for r in metrics["results"] if r["init"] == "scratch"} == {8, 20, 40}
    assert {r["labels"] for r in metrics["results"] if r["init"] == "pretrained"} == {8, 20}
    assert {row["labels"] for row in metrics["equivalence"]} == {8, 20}
    assert {row["labels"] for row in metrics["baselines"]["tf-idf"]} == {8, 20}
    assert run(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "tf-idf" in page
    assert "equivalent" in page


def test_a_result_goes_by_macro_f1_where_that_is_asked(data, backbones, tmp_path, capsys):
    recipe = sections("sentiment", backbones["encoder"], data, tmp_path / "out", metric="macro_f1", seeds=1)
    metrics = finetune(FinetuneRecipe.of(recipe), quiet=True)
    assert metrics["metric"] == "macro_f1"
    assert all(r["score"] == r["macro_f1"] and "accuracy" in r for r in metrics["results"])
    train, test = curve.labelled(make_task({"name": "sentiment"}), str(data["sentiment"]), 12)
    rare = [e for e in test if e.label == "0"][:1] + [e for e in test if e.label == "1"]
    by_class, plain = (baseline.tfidf(train[:20], rare, make_task({"name": "sentiment", "metric": metric}))["score"] for metric in ("macro_f1", "accuracy"))
    assert by_class != plain, "one example of the rare class is half of it"
    assert run(["report", str(tmp_path / "out")]) == 0
    assert "macro_f1 in percent" in (tmp_path / "out" / "report.html").read_text()


def test_validation_split():
    """A quarter of every class, the rest to train on; at least one in all."""
    labels = ["a", "b"] * 10 + ["a"] * 20
    train, held = base.split_validation(labels, 0.25)
    assert sorted(train + held) == list(range(40))
    assert sorted(labels[i] for i in held) == ["a"] * 7 + ["b"] * 2
    assert base.split_validation([""] * 20, 0.25)[1] == [3, 7, 11, 15, 19]
    assert base.split_validation(["a", "b"], 0.25) == ([0], [1])
    for share in (0.1, 0.4, 0.6):
        assert abs(len(base.split_validation(["x"] * 100, share)[1]) - 100 * share) <= 1


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_every_class_stands_on_both_sides_of_the_validation_split(classes):
    examples = [base.Example(f"text {n}", str(n % classes), "") for n in range(400)]
    for count in (20, 100):
        labels = [examples[i].label for i in base.nested(examples, 0)[:count]]
        for places in base.split_validation(labels, 0.25):
            assert len({labels[i] for i in places}) == classes


def test_classes_too_small_for_a_share_make_it_up_together():
    labels = [str(n % 10) for n in range(20)]
    train, held = base.split_validation(labels, 0.25)
    assert len(held) == 5, "a quarter of all"
    assert len({labels[i] for i in held}) == 5
    assert {labels[i] for i in train} == set(labels), "no class is held out whole"


def test_missing_packages_are_named_before_anything_is_trained(data, backbones, tmp_path, monkeypatch):
    monkeypatch.setattr(curve.Curve, "run", lambda self: pytest.fail("trained"))
    for task, package, fields in [("translation", "sacrebleu", {}), ("sentiment", "peft", {"method": "lora"})]:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"{package}; pip install 'lmssl\[tasks\]'"):
            finetune(FinetuneRecipe.of(sections(task, backbones["encoder"], data, tmp_path / task, **fields)), quiet=True)


def test_widths_stay_within_the_positions():
    rows = [np.arange(98), np.arange(3)]
    assert base.padded(rows, 0, 64).shape == (2, 128)
    assert base.padded(rows, 0, 64, most=100).shape == (2, 100)
    assert base.padded(rows, 0, 64, most=32).shape == (2, 98)


@pytest.mark.parametrize("multiple", [1, 8])
def test_padding(multiple):
    rows = [np.array([1, 2, 3]), np.array([4])]
    right, left = base.padded(rows, 9, multiple), base.padded(rows, 9, multiple, left=True)
    assert right.shape == left.shape == (2, 3 if multiple == 1 else 8)
    assert right[1].tolist()[:3] == [4, 9, 9]
    assert left[1].tolist()[-3:] == [9, 9, 4]
    assert right.dtype == torch.int64


def test_resolved_recipe_repeats_the_run(data, backbones, tmp_path):
    first = finetune(FinetuneRecipe.of(sections("qa", backbones["encoder"], data, tmp_path / "a")), quiet=True)
    again = FinetuneRecipe.load(tmp_path / "a" / "recipe.yaml", [f"trainer.output_dir={tmp_path / 'b'}"])
    assert finetune(again, quiet=True)["results"] == first["results"]
    assert tokenization.load(tmp_path / "a").settings["model_max_length"] == LENGTH


def test_an_epoch_is_all_that_is_trained_on(data, backbones, tmp_path):
    """A long context is several windows, and an epoch reads each."""
    values = sections("qa", backbones["encoder"], data, tmp_path, stride=8)
    values["data"]["max_length"] = 32
    values["trainer"] |= {"num_train_epochs": 2}
    del values["trainer"]["max_steps"]
    recipe = FinetuneRecipe.of(values)
    curve = curve_of(recipe, resolve(recipe.trainer, finetune_defaults(), OWNED_BY_TASKS), True)
    windows = sum(len(shot.items) for shot in curve._few(0)[:20])
    assert windows > 20
    assert curve.steps(Run(20, "scratch", 0)) == -(-2 * windows // 4)


def test_pairs_about_a_few_topics_are_split_by_both_texts(tmp_path, caplog):
    """Of stances to two topics, each topic is the first text of half of all examples."""
    rows = [{"text_a": f"topic {n % 2}", "text_b": f"post {n}", "label": n % 3} for n in range(60)]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    for path, some in ((train, rows), (test, rows[:10])):
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
    task = make_task({"name": "sentiment", "text_a": "text_a", "text_b": "text_b"})
    with caplog.at_level(logging.INFO, "lmssl"):
        left, held = curve.labelled(task, str(train), str(test))
    assert (len(left), len(held)) == (50, 10)
    assert "10 examples to train on are in the test set, too" in caplog.text
    left, held = curve.labelled(task, str(train), 12)
    assert (len(left), len(held)) == (48, 12)
    assert {e.text for e in held} == {"topic 0", "topic 1"}
    assert base.Example("one text", "", "").group() == Labelled("one text", "", "").group(), "as pretraining holds texts out"


@pytest.mark.parametrize("test", [0.2, 40])
@pytest.mark.parametrize("name", ["sentiment", "translation", "qa"])
def test_what_differs_from_a_test_text_in_white_space_is_not_trained_on(name, test, tmp_path):
    rows = []
    for n in range(100):
        for text in (f"film number {n}", f"film number {n} "):
            question = {"context": text, "question": f"which of {len(rows)}?", "answers": {"text": ["film"], "answer_start": [0]}, "id": f"q{len(rows)}"}
            rows.append({"text": text, "label": n % 2, "source": text, "target": "x"} | question)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held = curve.labelled(make_task({"name": name}), str(tmp_path / "rows.jsonl"), test)
    assert held
    assert train
    assert not {" ".join(e.group().split()) for e in train} & {" ".join(e.group().split()) for e in held}
