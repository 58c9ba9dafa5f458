"""Unusual inputs: pairs about few topics, scripts without spaces, tokenizers that lack a pad token, folders used twice."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import lmssl
from lmssl import PretrainTrainer, forward, likelihood, machine, models, predict, tokenization
from lmssl.arguments import OWNED_BY_TASKS, finetune_defaults, resolve
from lmssl.cli import run
from lmssl.errors import UserError
from lmssl.history import leak_check
from lmssl.objectives import Infilling, MaskedTokens, SpanCorruption
from lmssl.objectives.base import Row
from lmssl.objectives.toy import vocab as toy
from lmssl.recipe import FinetuneRecipe
from lmssl.runs import curve_of, finetune
from lmssl.tasks import baseline, generation, make_task, squad, translation
from lmssl.tasks.base import Backbone, Example
from lmssl.tasks.curve import labelled
from lmssl.tasks.sentiment import Labelled
from tests.helpers import OBJECTIVE, SMALL, apart, arguments, saved_backbone, small_model, token_set, tokenizer

LENGTH = 32


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- splits --------------------------------------------------------------------------------------------------------


def test_pairs_about_a_few_topics_are_split_by_both_texts(tmp_path, caplog):
    """Of stances to two topics, each topic is the first text of half of all examples."""
    rows = [{"text_a": f"topic {n % 2}", "text_b": f"post {n}", "label": n % 3} for n in range(60)]
    train, test = lines(tmp_path / "train.jsonl", rows), lines(tmp_path / "test.jsonl", rows[:10])
    task = make_task({"name": "sentiment", "text_a": "text_a", "text_b": "text_b"})
    with caplog.at_level(logging.INFO, "lmssl"):
        left, held = labelled(task, str(train), str(test))
    assert (len(left), len(held)) == (50, 10)
    assert "10 examples of data.train are in data.test, too" in caplog.text
    left, held = labelled(task, str(train), 12)
    assert (len(left), len(held)) == (48, 12)
    assert {e.text for e in held} == {"topic 0", "topic 1"}
    assert Example("one text", "", "").group() == Labelled("one text", "", "").group(), "as pretraining holds texts out"


@pytest.fixture(scope="module")
def backbone(shared_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    saved_backbone("llama", token_set(shared_dir), folder, 64)
    return folder


def recipe(backbone, train, test, out, **task):
    trainer = {"output_dir": str(out), "max_steps": 2, "bf16": False, "per_device_train_batch_size": 4}
    return FinetuneRecipe.of(
        {
            "task": {"name": "sentiment", "labels": [8], "seeds": 1, **task},
            "data": {"train": str(train), "test": str(test), "max_length": 64},
            "model": {"from": str(backbone)},
            "trainer": trainer,
        }
    )


@pytest.fixture
def files(tmp_path):
    made = [[{"text": f"the film {name} {n} was {('bad', 'good')[n % 2]}", "label": n % 2} for n in range(30)] for name in ("a", "b", "c")]
    return [lines(tmp_path / f"{name}.jsonl", rows) for name, rows in zip(("train", "test", "other"), made, strict=True)]


def test_runs_are_not_scored_on_two_test_sets(backbone, files, tmp_path):
    """More seeds on another test set would be paired and averaged with what the first one gave."""
    train, test, other = files
    finetune(recipe(backbone, train, test, tmp_path / "out"), quiet=True)
    for accept in ((), ("data.test",)):
        with pytest.raises(UserError, match=r"data\.test changed: the finished runs were scored by"):
            finetune(recipe(backbone, train, other, tmp_path / "out", seeds=2), resume=True, accept=accept, quiet=True)
    with pytest.raises(UserError, match=r"task\.metric changed"):
        finetune(recipe(backbone, train, test, tmp_path / "out", metric="macro_f1"), resume=True, accept=("task.metric",), quiet=True)
    assert len(finetune(recipe(backbone, train, test, tmp_path / "out", seeds=2), resume=True, quiet=True)["results"]) == 4
    (tmp_path / "out" / "progress.json").unlink()
    again = finetune(recipe(backbone, train, other, tmp_path / "out", seeds=2, metric="macro_f1"), resume=True, quiet=True)
    assert again["metric"] == "macro_f1", "metrics.json alone does not say of which recipe it is"


def test_a_backbone_with_another_tokenizer_or_dropout_is_another(backbone, files, tmp_path):
    import shutil

    train, test, _ = files
    folder = tmp_path / "backbone"
    shutil.copytree(backbone, folder)
    finetune(recipe(folder, train, test, tmp_path / "out"), quiet=True)
    path = folder / "config.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"attention_dropout": 0.5}))
    with pytest.raises(UserError, match=r"model\.settings changed"):
        finetune(recipe(folder, train, test, tmp_path / "out", seeds=2), resume=True, quiet=True)
    path.write_text(json.dumps(json.loads(whole) | {"transformers_version": "5.99"}))
    finetune(recipe(folder, train, test, tmp_path / "out", seeds=2), resume=True, quiet=True)


def test_questions_without_ids_may_move(backbone, tmp_path):
    rows = [{"context": f"the film {n} was good", "question": "how was it", "answers": {"text": ["good"], "answer_start": [len(f"the film {n} was ")]}} for n in range(24)]
    (tmp_path / "moved").mkdir()

    def identity(path):
        made = FinetuneRecipe.of(
            {
                "task": {"name": "qa", "labels": [4]},
                "data": {"train": str(lines(path, rows)), "test": 4, "max_length": 64},
                "model": {"from": str(backbone)},
                "trainer": {"output_dir": "x"},
            }
        )
        return curve_of(made, resolve(made.trainer, finetune_defaults(), OWNED_BY_TASKS), True).ledger.identity

    assert identity(tmp_path / "a.jsonl") == identity(tmp_path / "moved" / "b.jsonl")


def test_texts_too_short_to_be_looked_for_are_counted(corpus_file, tmp_path):
    made = {
        "data": {"text": str(corpus_file), "tokenizer": "tokenizer_assets/bpe-8k", "seq_length": 32, "held_out": 0.1},
        "model": {"architecture": "llama", **SMALL["llama"]},
        "objective": {"name": "next_token"},
        "trainer": {"output_dir": str(tmp_path / "run"), "max_steps": 1},
    }
    lmssl.pretrain(lmssl.PretrainRecipe.of(made), quiet=True)
    short, long = Example("book a table", "", "a:1"), Example(" ".join(f"word{n}" for n in range(9)), "", "a:2")
    assert leak_check(str(tmp_path / "run"), [short, long])["short"] == 1
    told = leak_check(str(tmp_path / "run"), [short, short])
    assert not told["checked"]
    assert "fewer than 8 words" in told["reason"]


# --- scripts without spaces ----------------------------------------------------------------------------------------


def test_the_baseline_reads_text_without_spaces():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    examples = [Labelled("".join(rng.choice(list("这部电影的故事和音乐"), 12)) + ("很好看" if n % 2 else "真无聊") + "。", str(n % 2), f"x:{n}") for n in range(80)]
    assert baseline.tfidf(examples[:30], examples[30:], make_task({"name": "sentiment"}))["score"] > 0.95


def test_translations_and_answers_without_spaces_are_judged_by_characters():
    pytest.importorskip("sacrebleu")
    close, far = (translation.bleu_and_chrf([text], ["这部电影的故事很好"]) for text in ("这部电影的故事真好", "天气预报明天有雨吗"))
    assert close["bleu"] > 0.4 > far["bleu"]
    assert "tok:char" in close["bleu_signature"]
    assert "tok:13a" in translation.bleu_and_chrf(["a film"], ["a film"])["bleu_signature"]
    assert squad.f1("北京市", ["北京"]) == pytest.approx(0.8)
    assert squad.f1("the film", ["a film"]) == 1.0


# --- predictions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(shared_dir, tmp_path_factory):
    """A classifier that somebody else made."""
    tokens, folder = token_set(shared_dir), tmp_path_factory.mktemp("classifier")
    small_model("bert", tokens.vocab(), LENGTH).save_pretrained(folder / "backbone")
    AutoModelForSequenceClassification.from_pretrained(folder / "backbone", id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}).save_pretrained(folder / "model")
    for name in ("backbone", "model"):
        tokens.tokenizer.save(folder / name)
    return folder / "model"


@pytest.mark.parametrize("batch", ["1", "8"])
def test_predictions_before_a_bad_record_are_kept(classifier, batch, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"film {n}"}) + "\n" for n in range(21)) + "{bad\n")
    assert run(["predict", str(classifier), str(path), "--task", "sentiment", "--batch", batch, "--out", str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "x.jsonl:22" in error
    assert "the predictions before it are in" in error
    assert len((tmp_path / "out.jsonl.part").read_text().splitlines()) == 21


@pytest.mark.parametrize(("keys", "what"), [({"problem_type": "multi_label_classification"}, "any number of classes"), ({"problem_type": "regression"}, "a number")])
def test_what_no_single_class_answers_is_refused(classifier, keys, what, tmp_path, capsys):
    import shutil

    shutil.copytree(classifier, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    (tmp_path / "x.txt").write_text("a film\n")
    assert run(["predict", str(tmp_path / "model"), str(tmp_path / "x.txt"), "--task", "sentiment"]) == 2
    assert f"answers with {what}" in capsys.readouterr().err


def test_a_head_of_classes_says_so(classifier):
    task = make_task({"name": "sentiment"})
    loaded = Backbone.load(str(classifier.parent / "backbone"), classes=("bad", "good"))
    loaded.config.problem_type = "multi_label_classification"
    assert task.model(loaded, True, 0).config.problem_type == "single_label_classification"


def test_how_a_decoder_of_somebody_else_s_is_asked_is_not_guessed(backbone, tmp_path, capsys):
    (tmp_path / "x.txt").write_text("a film\n")
    assert run(["predict", str(backbone), str(tmp_path / "x.txt"), "--task", "translation"]) == 2
    assert "cannot know what stands between an input and its answer" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot know"):
        predict.load(str(backbone), "translation")


def test_overrides_of_minimal_pairs_are_refused(backbone, tmp_path, capsys):
    path = lines(tmp_path / "pairs.jsonl", [{"sentence_good": "a film", "sentence_bad": "film a"}])
    assert run(["evaluate", str(backbone), "--pairs", str(path), "trainer.x=1"]) == 2
    assert "would change nothing" in capsys.readouterr().err


def test_likelihoods_do_not_depend_on_the_batch(shared_dir, monkeypatch):
    tokens = token_set(shared_dir)
    ids = [tokens.vocab().ordinary[begin : begin + 3 + begin % 5] for begin in range(0, 60, 4)]
    for architecture in ("llama", "bert", "t5", "bart"):
        model = small_model(architecture, tokens.vocab())
        family, by = models.family_of(model.config), "mask" if architecture == "bart" else "sentinel"
        found = []
        for most in (2**28, 16 * tokens.vocab().size, 1):
            monkeypatch.setattr(likelihood, "LOGITS", most)
            rows = []
            found.append(likelihood.log_likelihoods(model, family, ids, tokens.vocab(), by, rows.append))
            assert most > 1 or set(rows) == {1}
        for other in found[1:]:
            assert np.allclose(found[0], other, atol=1e-4), architecture


# --- models and tokenizers -----------------------------------------------------------------------------------------


def test_twins_of_neighbouring_seeds_share_no_weights(shared_dir, tmp_path):
    saved_backbone("bert", token_set(shared_dir), tmp_path, 64)
    loaded = Backbone.load(str(tmp_path))
    first, second = (generation.model(loaded, False, seed, 1) for seed in (0, 1))
    ours, theirs = first.decoder.get_input_embeddings().weight, second.encoder.get_input_embeddings().weight
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("init", ["default", "local"])
def test_a_token_that_is_also_padding_learns(init, shared_dir):
    """Of a tokenizer without pad, padding is eos: with bos the same, the token that begins every document."""
    vocab = dataclasses.replace(token_set(shared_dir).vocab(), pad=token_set(shared_dir).vocab().eos)
    model = small_model("llama", vocab, init=init)
    table = model.get_input_embeddings()
    assert table.weight[vocab.eos].norm() > 0.2 * table.weight.norm(dim=1).median()
    model(input_ids=torch.tensor([[vocab.eos, 300, vocab.eos]])).logits.square().sum().backward()
    assert table.weight.grad[vocab.eos].abs().sum() > 0
    real = small_model("llama", token_set(shared_dir).vocab(), init=init)
    assert real.get_input_embeddings().padding_idx == token_set(shared_dir).vocab().pad


def test_fine_tuning_trains_it_too(shared_dir, tmp_path):
    vocab = dataclasses.replace(token_set(shared_dir).vocab(), pad=token_set(shared_dir).vocab().eos)
    small_model("llama", vocab).save_pretrained(tmp_path)
    token_set(shared_dir).tokenizer.save(tmp_path)
    loaded = Backbone.load(str(tmp_path), classes=("a", "b"))
    assert loaded.config.pad_token_id == vocab.eos
    for pretrained in (True, False):
        assert make_task({"name": "sentiment"}).model(loaded, pretrained, 0).get_input_embeddings().padding_idx is None


def test_mpnet_counts_positions_as_transformers_does(shared_dir):
    vocab = token_set(shared_dir).vocab()
    section = {"architecture": "mpnet", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = models.build(section, vocab, MaskedTokens(), LENGTH, 0).eval()
    assert models.position_offset(model) == 2
    assert models.max_length(model.config) == LENGTH
    ids = torch.from_numpy(vocab.ordinary[None, :LENGTH]).long()
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
        ours = forward.prepare(model)(input_ids=ids, segments=torch.ones_like(ids)).logits
    assert apart(ours, theirs) < 1e-5
    with pytest.raises(UserError, match="numbers positions from the pad id on, which is 300"):
        models.build({"architecture": "roberta", **SMALL["roberta"]}, dataclasses.replace(vocab, pad=300), OBJECTIVE["roberta"], LENGTH, 0)


def test_marian_goes_on_from_its_checkpoint(shared_dir, tmp_path):
    """Its positions are parameters that are never saved."""
    section = SMALL["bart"] | {"architecture": "marian"}
    keys = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    tokens, done = token_set(shared_dir), []
    for resume in (False, True):
        model = models.build(section, tokens.vocab(), Infilling(), LENGTH, 0)
        trainer = PretrainTrainer(model, Infilling(), tokens, arguments(tmp_path, **keys), LENGTH, quiet=True)
        if resume:
            (tmp_path / "checkpoint-4").rename(tmp_path / "away")
        trainer.run(trainer.resume_point() if resume else None)
        done.append(model.state_dict())
    assert all(torch.equal(value, done[1][name]) for name, value in done[0].items())


def test_a_tokenizer_without_eos_is_refused_from_python(tmp_path):
    plain = tokenization.Tokenizer(tokenizer().backend, {k: v for k, v in tokenizer().roles.items() if k != "eos"}, [], {}, "mine")
    with pytest.raises(UserError, match="mine has no eos token"):
        lmssl.from_iterable(["a film"], plain, tmp_path / "tokens", 0.0)


# --- objectives ----------------------------------------------------------------------------------------------------


def test_a_document_of_more_spans_than_sentinels_is_corrupted_all_over():
    vocab, length = toy(sentinels=10), 600
    row = Row(np.full(length, 7), np.ones(length, int))
    out = SpanCorruption()(row, vocab, np.random.default_rng(0))
    at = np.flatnonzero(np.isin(out["input_ids"], vocab.sentinels))
    assert len(at) == 10
    assert at[0] < length / 4
    assert at[-1] > len(out["input_ids"]) * 3 / 4
    assert len(out["input_ids"]) + len(out["labels"]) == length + 2 * 10 + 1
    assert "30 spans, the tokenizer 10 sentinels: 67%" in SpanCorruption().doubt(SpanCorruption().expected(600)[0], vocab)
    assert SpanCorruption().doubt(128, toy(size=200, sentinels=100)) is None


def test_a_run_of_such_rows_is_warned_of(shared_dir, tmp_path, caplog):
    tokens = token_set(shared_dir)
    PretrainTrainer(small_model("t5", tokens.vocab(), 64), SpanCorruption(rate=0.5, mean_span=1.0), tokens, arguments(tmp_path), 64, quiet=True)
    assert "sentinels" not in caplog.text
    PretrainTrainer(small_model("t5", tokens.vocab(), 512), SpanCorruption(rate=0.5, mean_span=1.0), tokens, arguments(tmp_path), 512, quiet=True)
    assert "100 sentinels" in caplog.text


def test_a_document_is_never_deleted_whole():
    vocab = toy()
    row = Row(np.array([7, 8, 9, 1, 10, 11, 1]), np.array([1, 1, 1, 1, 2, 2, 2]))
    out = Infilling(rate=0.0, permute=0.0, delete_rate=1.0)(row, vocab, np.random.default_rng(0))
    assert out["input_ids"].tolist() == [7, 1, 10, 1]
    assert set(out["segments"].tolist()) == {1, 2}


@dataclasses.dataclass(frozen=True)
class Mixed(MaskedTokens):
    """Somebody's own objective, with a field that JSON does not have."""

    mix: tuple[float, float] = (0.5, 0.5)


def test_fields_of_an_objective_of_one_s_own_survive_a_resume(shared_dir, tmp_path):
    tokens, keys = token_set(shared_dir), {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}

    def made():
        return PretrainTrainer(small_model("bert", tokens.vocab()), Mixed(), tokens, arguments(tmp_path, **keys), LENGTH, quiet=True)

    made().run()
    again = made()
    assert again.resume_point().name == "checkpoint-2"
    with pytest.raises(UserError, match="holds checkpoints of an earlier run"):
        again.run()


# --- random numbers ------------------------------------------------------------------------------------------------


def test_dropout_draws_what_torch_would_draw():
    torch.manual_seed(2**40 + 3)
    expected = torch.rand(5)
    machine.draw_from(2**40 + 3, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)
