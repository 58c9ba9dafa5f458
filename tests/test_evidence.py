"""What a label curve compares: which weights, which examples, which numbers. A mistake here would read as a finding."""

import dataclasses
import json
import math
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

from lmssl import tasks
from lmssl.data import corpus
from lmssl.errors import Interrupted, Stopped, UserError
from lmssl.recipe import FinetuneRecipe
from lmssl.runs import finetune
from lmssl.tasks import baseline, curve
from lmssl.tasks.base import Backbone, Few
from lmssl.tasks.sentiment import Labelled, Sentiment
from tests.helpers import saved_backbone, sentences, token_set

LENGTH = 32


@pytest.fixture
def recipe(shared_dir, tmp_path):
    """A small backbone, sixty reviews, and the sections of a recipe over them."""
    tokens, folder = token_set(shared_dir), tmp_path / "backbone"
    saved_backbone("bert", tokens, folder, LENGTH, seed=7)  # no seed that a twin is drawn from
    rows = [{"text": f"{text} {'good' if n % 2 else 'bad'}", "label": n % 2} for n, text in enumerate(dict.fromkeys(sentences(60, seed=9)))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(source=folder, test=12, trainer=(), **fields):
        return FinetuneRecipe.of(
            {
                "task": {"name": "sentiment", "labels": [8, 20], "seeds": 2, **fields},
                "data": {"train": str(tmp_path / "data.jsonl"), "test": test, "max_length": LENGTH},
                "model": {"from": str(source)},
                "trainer": {"output_dir": str(tmp_path / "out"), "max_steps": 2, "bf16": False, "per_device_train_batch_size": 4, **dict(trainer)},
            }
        )

    return made


@dataclasses.dataclass
class Begun:
    """A run as its trainer received it."""

    embeddings: torch.Tensor
    head: torch.Tensor
    seed: int
    order: list[str]
    places: set[str]
    warmup: float


@pytest.fixture
def begun(monkeypatch):
    """The runs of curves, in the order in which they begin."""
    found = []

    class Watched(curve.ExactTrainer):
        def __init__(self, model, args, stream, *rest, **keys):
            embeddings = model.get_input_embeddings().weight.detach().clone()
            head = model.classifier.weight.detach().clone()
            found.append(Begun(embeddings, head, args.seed, [stream.where(i) for i in range(len(stream))], set(stream.places), args.warmup_steps))
            super().__init__(model, args, stream, *rest, **keys)

    monkeypatch.setattr(curve, "ExactTrainer", Watched)
    return found


def test_each_run_has_its_own_weights_examples_and_seed(recipe, begun):
    finetune(recipe(), quiet=True)
    own = transformers.AutoModelForMaskedLM.from_pretrained(recipe().source).get_input_embeddings().weight
    assert [len(run.places) for run in begun] == [8, 8, 20, 20] * 2
    assert [torch.equal(run.embeddings, own) for run in begun] == [False, True] * 4, "scratch, pretrained, scratch, ..."
    assert [run.seed for run in begun] == [0] * 4 + [1] * 4
    for scratch, pretrained in zip(begun[::2], begun[1::2], strict=True):
        assert scratch.order == pretrained.order, "twins read the same examples in the same order"
    for few, more in ((begun[0], begun[2]), (begun[4], begun[6])):
        assert few.places < more.places, "fewer labels are a part of the more"
        assert torch.equal(few.embeddings, more.embeddings)
    first, second = begun[0], begun[4]
    assert first.places != second.places
    assert not torch.equal(first.embeddings, second.embeddings), "each seed draws its own twin"
    assert not torch.equal(begun[1].head, begun[5].head), "and its own head on the backbone"


def test_each_run_warms_up_for_a_tenth_of_its_own_steps(recipe, begun):
    """16 + 8 sqrt(8) = 39 steps, and 52 of 20 labels."""
    finetune(recipe(trainer={"max_steps": None}, seeds=1), quiet=True)
    assert [run.warmup for run in begun] == [3, 3, 5, 5]


def test_the_share_that_judges_a_learning_rate_is_the_recipe_s(recipe, monkeypatch):
    asked = []
    monkeypatch.setattr(curve.Curve, "_loss", lambda self, model, trainer, items: asked.append(len(items)) or 1.0)
    finetune(recipe(labels=[20], seeds=1, learning_rates=[1e-3], validation=0.5), quiet=True)
    assert set(asked) == {10}


def test_each_seed_has_its_own_order(recipe, monkeypatch):
    orders, few = [], curve.Few
    monkeypatch.setattr(curve, "Few", lambda *of: orders.append([few(*of)._at(i) for i in range(8)]) or few(*of))
    finetune(recipe(labels=[8]), quiet=True)
    assert orders[0] == orders[1] != orders[2] == orders[3]


def test_a_learning_rate_is_judged_by_examples_that_it_did_not_train_on(recipe, monkeypatch):
    trained, held = [], []
    train, loss = curve.Curve._trained, curve.Curve._loss

    def spied_train(self, run, few, rate, *rest):
        trained.append({id(item) for shot in few[: run.labels] for item in shot.items})
        return train(self, run, few, rate, *rest)

    def spied_loss(self, model, trainer, items):
        held.append((trained[-1], {id(item) for item in items}))
        value, batch = loss(self, model, trainer, items), self.collate(list(items))
        labels = batch.pop("labels")
        with torch.no_grad():
            assert value == pytest.approx(functional.cross_entropy(model.eval()(**batch).logits, labels).item(), rel=1e-4)
        return value

    monkeypatch.setattr(curve.Curve, "_trained", spied_train)
    monkeypatch.setattr(curve.Curve, "_loss", spied_loss)
    finetune(recipe(labels=[20], learning_rates=[1e-4, 1e-3], seeds=1), quiet=True)
    assert len(held) == 2 * 2
    for seen, judged in held:
        assert judged
        assert not seen & judged
        assert len(seen | judged) == 20


def test_the_baseline_sees_as_many_labels_as_the_models(recipe, monkeypatch):
    pytest.importorskip("sklearn")
    asked, tfidf = [], baseline.tfidf
    monkeypatch.setattr(baseline, "tfidf", lambda train, test, task: asked.append([e.where for e in train]) or tfidf(train, test, task))
    finetune(recipe(), quiet=True)
    assert [len(places) for places in asked] == [8, 20, 8, 20]
    assert set(asked[0]) < set(asked[1])
    assert set(asked[0]) != set(asked[2])


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_finished_curve_is_told_as_it_is(recipe, tmp_path, monkeypatch):
    """Resumed where there is no scikit-learn, it keeps its baseline, and everything else."""
    made = recipe(labels=[8], seeds=1)
    metrics = finetune(made, quiet=True)
    before = files_of(tmp_path / "out")
    monkeypatch.setattr(baseline, "available", lambda: False)
    assert finetune(made, resume=True, quiet=True)["results"] == metrics["results"]
    assert files_of(tmp_path / "out") == before
    assert len(finetune(recipe(labels=[8], seeds=2), resume=True, quiet=True)["results"]) == 2 * 2


def test_nothing_is_removed_or_trained_for_what_cannot_begin(recipe, tmp_path, monkeypatch):
    finetune(recipe(labels=[8], seeds=1), quiet=True)
    before = files_of(tmp_path / "out")
    monkeypatch.setattr(curve.ExactTrainer, "training_step", lambda *args, **keys: pytest.fail("trained"))
    with pytest.raises(UserError, match="leave no room for a text beside the cue"):
        finetune(recipe(cue=" what of the film" * 20), overwrite=True, quiet=True)
    assert files_of(tmp_path / "out") == before
    with pytest.raises(UserError, match="finds nothing to train"):
        finetune(recipe(source=tmp_path / "out", method="probe", trainer={"output_dir": str(tmp_path / "probe")}), quiet=True)


def test_guessing_the_largest_class_is_scored_as_the_models_are(recipe, tmp_path):
    metrics = pytest.importorskip("sklearn.metrics")
    rows = [{"text": f"film {n}", "label": int(n < 2)} for n in range(12)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    truth = [row["label"] for row in rows]
    for metric, expected in (("accuracy", 10 / 12), ("macro_f1", metrics.f1_score(truth, [0] * 12, average="macro", zero_division=0))):
        made = recipe(test=str(tmp_path / "test.jsonl"), trainer={"output_dir": str(tmp_path / metric)}, labels=[8], seeds=1, metric=metric)
        assert finetune(made, quiet=True)["majority"] == pytest.approx(expected)
    told = [json.loads(line) for line in (tmp_path / "macro_f1" / "predictions" / "examples.jsonl").read_text().splitlines()]
    guessed = (tmp_path / "macro_f1" / "predictions" / "8-pretrained-0.txt").read_text().splitlines()
    assert len(told) == len(guessed) == 12
    assert {row["where"]: row["label"] for row in told} == {f"{tmp_path / 'test.jsonl'}:{n + 1}": str(int(n < 2)) for n in range(12)}


def test_a_run_that_was_begun_under_other_settings_begins_anew(recipe, tmp_path, monkeypatch):
    """Only finished runs are kept where a change was accepted."""
    fields = {"labels": [8], "seeds": 1}
    made = recipe(trainer={"max_steps": 4, "save_steps": 2}, **fields)
    backbone, step, seen = Path(made.source) / "model.safetensors", curve.ExactTrainer.training_step, []

    def interrupted(self, *args, **keys):
        seen.append(1)
        if len(seen) == 4 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(curve.ExactTrainer, "training_step", interrupted)
        with pytest.raises(Interrupted):
            finetune(made, quiet=True)
    assert list((tmp_path / "out" / "checkpoints").glob("8-pretrained-0-*/checkpoint-*"))
    save_file({name: value * 0.5 for name, value in load_file(backbone).items()}, backbone, metadata={"format": "pt"})
    finetune(made, resume=True, accept=("model.from",), quiet=True)
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    finetune(recipe(trainer={"max_steps": 4, "save_steps": 2, "output_dir": str(tmp_path / "fresh")}, **fields), quiet=True)
    fresh = load_file(tmp_path / "fresh" / "model.safetensors")
    assert all(torch.equal(value, fresh[name]) for name, value in resumed.items())


def test_a_trained_head_keeps_the_order_of_its_classes():
    names = {0: "pos", 1: "neg"}
    config = transformers.BertConfig(id2label=names, label2id={"pos": 0, "neg": 1}, architectures=["BertForSequenceClassification"])
    assert curve.in_order_of(config, ["neg", "pos"]) == ["pos", "neg"]
    assert curve.in_order_of(config, ["bad", "good"]) == ["bad", "good"]
    config.architectures = ["BertForMaskedLM"]
    assert curve.in_order_of(config, ["neg", "pos"]) == ["neg", "pos"]


def test_scoring_that_does_not_fit_into_memory_is_one_line(recipe, monkeypatch):
    monkeypatch.setattr(Sentiment, "evaluate", lambda *args, **keys: (_ for _ in ()).throw(torch.OutOfMemoryError("x")))
    with pytest.raises(Stopped, match=r"the test set does not fit into memory: --resume with a smaller trainer\.per_device_eval_batch_size"):
        finetune(recipe(labels=[8], seeds=1), quiet=True)


def test_a_rate_whose_validation_loss_is_not_finite_loses(recipe, monkeypatch):
    losses = iter([math.nan, 0.5] * 4)
    monkeypatch.setattr(curve.Curve, "_loss", lambda self, model, trainer, items: next(losses))
    metrics = finetune(recipe(labels=[8], learning_rates=[1e-4, 1e-3], seeds=1), quiet=True)
    assert {r["learning_rate"] for r in metrics["results"]} == {1e-3}


def test_rates_that_no_trained_class_can_judge_are_warned_of(caplog):
    examples = [Labelled(f"text {n}", str(n % 20), "") for n in range(100)]
    task = Sentiment(labels=[20], learning_rates=[1e-4, 1e-3])
    curve.check(task, examples, examples[:5])
    assert "with 20 labels learning rates are validated on 1 classes that are not trained on" in caplog.text
    caplog.clear()
    curve.check(dataclasses.replace(task, labels=[80]), examples, examples[:5])
    assert "validated on" not in caplog.text


@pytest.mark.parametrize(("label", "message"), [("\ud83d", "half of a surrogate pair"), ("a\nb", "a class of several lines")])
def test_a_class_is_a_line_of_text(label, message, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a film", "label": label}) + "\n")
    with pytest.raises(UserError, match=rf"x\.jsonl:1: .*{message}"):
        Sentiment().read(corpus.resolve(str(tmp_path / "x.jsonl")))


def test_answers_are_for_classes_however_their_accents_are_spelt():
    composed, apart = "n\u00e9gatif", "ne\u0301gatif"
    task = Sentiment(cue=" the film was", answers={apart: [" bad"], "positif": [" good"]})
    examples = [Labelled("a", composed, ""), Labelled("b", "positif", "")]
    assert task.fitted(examples, examples) is task


def test_a_task_of_ones_own_has_a_card(recipe, monkeypatch, tmp_path):
    class Topics(Sentiment):
        name = "topics"

    monkeypatch.setitem(tasks.TASKS, "topics", Topics)
    finetune(recipe(name="topics", labels=[8], seeds=1), quiet=True)
    assert "lmssl predict" in (tmp_path / "out" / "README.md").read_text()


def test_an_epoch_of_few_examples_is_shuffled_anew():
    few = Few([{}] * 20, [str(n) for n in range(20)], 3, 60)
    epochs = [[few.where(i) for i in range(20 * epoch, 20 * epoch + 20)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [Few([{}] * 20, few.places, 4, 60).where(i) for i in range(20)]


def test_whole_numbers_are_the_rows_of_the_head(caplog):
    """12 classes of a ClassLabel: output 2 is the class 2, not "10"; and what the test set has none of is said."""
    examples = [Labelled(f"text {n}", str(n % 12), "") for n in range(240)]
    task = Sentiment(labels=[60], seeds=1)
    assert curve.check(task, examples, examples[:120]) == [str(n) for n in range(12)]
    assert not caplog.text
    assert curve.check(task, examples, examples[:10]) == [str(n) for n in range(12)]
    assert "of 12 classes 2 have no test example, and no score tells of them: 10, 11" in caplog.text
    assert "data.test: 10 examples are few to judge by: each is 10.0 points" in caplog.text
    assert curve.counted(examples).startswith("240 examples (0: 20, 1: 20, 2: 20")


def test_a_rare_class_does_not_keep_the_baseline_from_being_tuned(monkeypatch):
    pytest.importorskip("sklearn")
    examples = [Labelled(f"a {'good' if n % 2 else 'bad'} film {n}", str(n % 2), f"x:{n}") for n in range(40)]
    examples[0] = Labelled("a film of another kind", "2", "x:0")
    asked = []
    monkeypatch.setattr(baseline, "GRID", [0.01, 7.0])
    for some in (examples, examples[:2]):
        asked.append(baseline.tfidf(some, examples, tasks.make_task({"name": "sentiment"}))["C"])
    assert asked[0] in baseline.GRID
    assert asked[1] == 1.0, "of two examples nothing can be held back"


def test_the_twin_of_a_bert_begins_as_its_pretraining_began(shared_dir, tmp_path):
    """Positions that look near by need no text: they are not what pretraining brings."""
    saved_backbone("bert", token_set(shared_dir), tmp_path, 64)
    task = tasks.make_task({"name": "sentiment"})
    for section, local in (({"architecture": "bert"}, True), ({"architecture": "bert", "init": "default"}, False), ({"from": "somewhere"}, False)):
        (tmp_path / "recipe.yaml").write_text(json.dumps({"model": section}))
        twin = task.model(Backbone.load(str(tmp_path), 32, ["0", "1"]), False, 0)
        attention, table = twin.bert.encoder.layer[0].attention.self, twin.bert.embeddings.position_embeddings.weight
        assert torch.equal(attention.query.weight, attention.key.weight) == local
        assert not hasattr(table, "lmssl_rate"), "the other has no rate of its own"


def test_the_twin_of_a_continued_bert_begins_as_the_first_pretraining_began(shared_dir, tmp_path):
    saved_backbone("bert", token_set(shared_dir), tmp_path / "b", 64)
    for section, local in (({"architecture": "bert"}, True), ({"architecture": "bert", "init": "default"}, False), ({"from": str(tmp_path / "b")}, False)):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / "recipe.yaml").write_text(json.dumps({"model": section}))
        (tmp_path / "b" / "recipe.yaml").write_text(json.dumps({"model": {"from": str(tmp_path / "a")}}))
        assert Backbone.load(str(tmp_path / "b"), 32, ["0", "1"]).began_local() == local


def test_the_baseline_reads_text_without_spaces():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    examples = [Labelled("".join(rng.choice(list("这部电影的故事和音乐"), 12)) + ("很好看" if n % 2 else "真无聊") + "。", str(n % 2), f"x:{n}") for n in range(80)]
    assert baseline.tfidf(examples[:30], examples[30:], tasks.make_task({"name": "sentiment"}))["score"] > 0.95


@pytest.mark.filterwarnings("ignore:The least populated class")
def test_the_baseline_equals_scikit_learns_own_search():
    """Words are counted once for all folds: what a fold's training texts lack is not known there."""
    text, linear, choice, line = (pytest.importorskip(f"sklearn.{name}") for name in ("feature_extraction.text", "linear_model", "model_selection", "pipeline"))
    draw, chosen = random.Random(0), set()
    for count, classes in ((12, 2), (40, 3), (40, 2)):
        labels = [str(min(int(draw.random() ** 2 * classes), classes - 1)) for _ in range(count + 60)]
        texts = [" ".join(f"w{draw.randrange(60)}" if draw.random() < 0.8 else f"c{c}x{draw.randrange(6)}" for _ in range(12)) for c in labels]
        pipe = line.make_pipeline(text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), linear.LogisticRegression(max_iter=2000))
        folds = choice.StratifiedKFold(5, shuffle=True, random_state=0)
        search = choice.GridSearchCV(pipe, {"logisticregression__C": baseline.GRID}, cv=folds).fit(texts[:count], labels[:count])
        expected = {"score": search.score(texts[count:], labels[count:]), "C": search.best_params_["logisticregression__C"]}
        examples = [Labelled(text, label, "") for text, label in zip(texts, labels, strict=True)]
        assert baseline.tfidf(examples[:count], examples[count:], tasks.make_task({"name": "sentiment"})) == expected
        chosen.add(expected["C"])
    assert len(chosen) > 1
