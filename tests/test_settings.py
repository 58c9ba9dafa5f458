"""What a recipe sets reaches what it decides: a field, a folder's own settings, the text that is judged."""

import json

import numpy as np
import pytest
import torch

import lmssl
from lmssl import arguments as settings
from lmssl import evaluation, models, predict, scoring
from lmssl.data import preparation
from lmssl.data.stream import generator
from lmssl.errors import UserError
from lmssl.objectives import MaskedTokens, SpanCorruption
from lmssl.objectives.base import Row
from lmssl.objectives.toy import vocab as toy_vocab
from lmssl.optimizers import muon_groups
from lmssl.tasks import baseline, generation, ledger, squad
from lmssl.tasks.base import Backbone
from lmssl.tasks.qa import Question, QuestionAnswering
from lmssl.tasks.sentiment import Labelled, Sentiment
from lmssl.tasks.translation import Pair, Translation, bleu_and_chrf
from tests.helpers import SMALL, arguments, saved_backbone, sentences, small_model, token_set, tokenizer
from tests.test_trainer import trainer_of

VOCAB = toy_vocab(1000, 100)


@pytest.fixture(scope="module")
def writers(shared_dir, tmp_path_factory):
    made = {}
    for architecture in ("gpt2", "t5", "bert"):
        folder = tmp_path_factory.mktemp(architecture)
        saved_backbone(architecture, token_set(shared_dir), folder, 64, dropout=True)
        made[architecture] = Backbone.load(str(folder), 64, ["0", "1"])
    return made


@pytest.mark.parametrize(
    ("architecture", "task", "example"),
    [
        ("bert", Sentiment(), Labelled("the film was good", "1", "x:1")),
        ("bert", QuestionAnswering(), Question("the film was good", "", "x:1", "how was it", "1")),
        ("t5", Translation(beams=1, max_new_tokens=8), Pair("the film was good", "", "x:1", "x")),
    ],
    ids=["sentiment", "qa", "translation"],
)
def test_no_dropout_in_what_is_scored(architecture, task, example, writers):
    """As training leaves the model."""
    model = task.model(writers[architecture], True, 0).train()
    first = task.predictions(model, writers[architecture], [example], 1)
    assert not model.training
    assert first == task.predictions(model.eval(), writers[architecture], [example], 1)


def test_probabilities_are_the_model_s(writers):
    task, text = Sentiment(), Labelled("the film was good", "", "x:1")
    model = task.model(writers["bert"], True, 0).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(100)
    (item,) = task.encode(writers["bert"], [text])[0]
    expected = model(input_ids=torch.tensor(item["input_ids"])[None].long()).logits.softmax(-1)[0]
    (row,) = task.predictions(model, writers["bert"], [text], 1)
    assert list(row["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_every_gold_answer_counts_in_a_result(monkeypatch):
    asked = Question("the film was good", "", "x:1", "what", "1", (("the film", 0), ("film was", 4)))
    monkeypatch.setattr(QuestionAnswering, "predict", lambda self, *of: ["film was"])
    scores, _ = QuestionAnswering().evaluate(None, None, [asked], 1)
    assert (scores["exact_match"], scores["f1"]) == (1.0, 1.0)


def test_a_decoder_is_started_as_its_model_says(shared_dir, tmp_path, monkeypatch):
    """T5's own is its pad token, whatever the tokenizer would begin with: in training, in what is held out, in scoring and in fine-tuning."""
    made, seen = token_set(shared_dir), []
    model = small_model("t5", made.vocab(), 64)
    assert made.vocab().start != 7, "set up"
    model.config.decoder_start_token_id = 7
    trainer = lmssl.PretrainTrainer(model, SpanCorruption(), made, arguments(tmp_path), 64, quiet=True)
    seen += [trainer.train_dataset[0], trainer.held_out_stream[0]]
    model.save_pretrained(tmp_path / "t5")
    made.tokenizer.save(tmp_path / "t5")
    (tmp_path / "x.txt").write_text("\n".join(sentences(20)))
    monkeypatch.setattr(evaluation, "held_out", lambda model, stream, *rest: seen.append(stream[0]) or {"loss": 1.0, "bits_per_byte": 1.0, "labels": 1})
    scoring.evaluate(str(tmp_path / "t5"), [f"data.text={tmp_path / 'x.txt'}", "data.seq_length=64"])
    assert [item["decoder_input_ids"][0] for item in seen] == [7, 7, 7]
    backbone = Backbone.load(str(tmp_path / "t5"), 64)
    assert generation.collator(backbone, 8)(generation.encode(backbone, ["a film"], ["a plot"], ""))["decoder_input_ids"][0, 0] == 7


def test_what_ends_a_source_in_training_ends_it_in_the_test(writers, monkeypatch):
    asked = []
    monkeypatch.setattr(generation, "generate", lambda made, backbone, sources, separator, batch: asked.append((sources, separator)) or [""])
    Translation(separator=" =>").predict(None, writers["gpt2"], [Pair("a film", "", "x:1")], 1)
    QuestionAnswering(separator=" ?", answer="text").predict(None, writers["gpt2"], [Question("a film", "", "x:1", "what")], 1)
    assert asked == [(["a film"], " =>"), (["what ?a film"], " ?")]


def test_a_fine_tuned_model_predicts_as_many_tokens_as_it_was_trained_on(shared_dir, tmp_path):
    saved_backbone("bert", token_set(shared_dir), tmp_path / "backbone", 64)
    loaded, task = Backbone.load(str(tmp_path / "backbone"), 16, ["0", "1"]), Sentiment()
    task.model(loaded, True, 0).save_pretrained(tmp_path / "tuned")
    task.finish(loaded).save(tmp_path / "tuned")
    (tmp_path / "tuned" / "recipe.yaml").write_text(json.dumps({"task": {"name": "sentiment"}}))
    assert predict.load(str(tmp_path / "tuned"), None)[1].length == 16


def test_the_law_of_a_span_is_the_recipe_s():
    lengths = []
    for i in range(200):
        row = Row(np.full(4000, 700, np.int32), np.ones(4000, np.int32))
        flags = np.concatenate([[0], MaskedTokens(rate=0.02, unit="span", span_p=0.8, span_max=5)(row, VOCAB, generator(0, i))["labels"] != -100, [0]])
        edges = np.flatnonzero(np.diff(flags.astype(int)))
        lengths += (edges[1::2] - edges[::2]).tolist()
    law = 0.2 ** np.arange(5) / sum(0.2 ** np.arange(5))
    assert np.mean(lengths) == pytest.approx(law @ np.arange(1, 6), abs=0.1)


@pytest.mark.parametrize(("mask", "random"), [(0.5, 0.5), (0.6, 0.0), (0.0, 0.3)])
def test_of_what_is_selected_the_recipe_s_shares_are_masked_and_drawn(mask, random):
    row = Row(np.tile(np.arange(700, 900, dtype=np.int32), 100), np.ones(20_000, np.int32))
    out = MaskedTokens(rate=0.5, mask=mask, random=random)(row, VOCAB, generator(0, 0))
    asked = out["labels"] != -100
    masked, same = (out["input_ids"][asked] == VOCAB.mask).mean(), (out["input_ids"] == row.ids)[asked].mean()
    assert (masked, same) == pytest.approx((mask, 1 - mask - random), abs=0.02)


def test_a_modernbert_reads_the_mean_of_all_tokens(shared_dir, tmp_path):
    saved_backbone("modernbert", token_set(shared_dir), tmp_path, 32)
    for pretrained in (True, False):
        assert Sentiment().model(Backbone.load(str(tmp_path), 32, ["0", "1"]), pretrained, 0).config.classifier_pooling == "mean"


def test_another_tokenizer_in_the_folder_of_a_backbone_is_noticed(shared_dir, tmp_path):
    saved_backbone("bert", token_set(shared_dir), tmp_path, 32)
    before, path = ledger._settings(Backbone.load(str(tmp_path))), tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    assert ledger._settings(Backbone.load(str(tmp_path))) != before


def test_a_changed_label_is_another_text_to_train_on():
    assert ledger._content([Labelled("a film", "0", "x:1")]) != ledger._content([Labelled("a film", "1", "x:1")])


def test_whatever_decides_a_run_of_a_curve_is_compared(shared_dir, tmp_path):
    saved_backbone("bert", token_set(shared_dir), tmp_path, 32)
    backbone, values = Backbone.load(str(tmp_path)), settings.resolve({"output_dir": "x"}, settings.finetune_defaults(), settings.OWNED_BY_TASKS)
    others = {"learning_rate": 1.0, "weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 0.1, "max_grad_norm": 0.1, "lr_scheduler_type": "constant"}
    others |= {
        "warmup_steps": 7,
        "optimizer": "muon",
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "num_train_epochs": 2,
        "torch_compile": True,
    }
    plain = ledger.identity_of(Sentiment(), backbone, [], [], values, 1)
    for name, value in others.items():
        assert ledger.identity_of(Sentiment(), backbone, [], [], values | {name: value}, 1) != plain, name
    for name in ("save_steps", "per_device_eval_batch_size", "output_dir"):
        assert ledger.identity_of(Sentiment(), backbone, [], [], values | {name: 7}, 1) == plain, name


def test_text_with_bad_records_left_out_is_not_taken_for_whole_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"".join(b'{"text": "number %d"}\n' % n for n in range(20)) + b"oops\n")
    preparation.prepare(str(tmp_path / "x.jsonl"), tokenizer(), 0.1, on_bad_record="skip")
    with pytest.raises(UserError, match=r"x.jsonl:21: not valid JSON"):
        preparation.prepare(str(tmp_path / "x.jsonl"), tokenizer(), 0.1)


def test_a_reference_that_was_read_in_pretraining_has_leaked():
    assert Pair("a source", "", "x:1", "its target").texts() == ("a source", "its target")


def test_the_baseline_reads_both_texts_of_a_pair():
    pytest.importorskip("sklearn")
    examples = [Labelled(f"topic {n % 3}", str(n % 2), f"x:{n}", f"a {'good' if n % 2 else 'bad'} film") for n in range(60)]
    assert baseline.tfidf(examples[:30], examples[30:], Sentiment(text_a="a", text_b="b"))["score"] == 1.0


def test_what_is_written_is_judged_by_the_reference(monkeypatch):
    pytest.importorskip("sacrebleu")
    monkeypatch.setattr(Translation, "predict", lambda self, *of: ["a film of five"])
    scores, written = Translation().evaluate(None, None, [Pair("x", "", "", "a film of five words and more")], 1)
    assert written == ["a film of five"]
    assert scores == bleu_and_chrf(["a film of five"], ["a film of five words and more"])


def test_a_long_pair_keeps_its_beginnings(writers):
    long = " ".join(sentences(10))
    for architecture in ("gpt2", "t5"):
        backbone = writers[architecture]
        (item,), (whole,) = generation.encode(backbone, [long], [long], "\n"), backbone.ids([long])
        end = len(backbone.ids(["\n"])[0]) if architecture == "gpt2" else 1
        for part in (item["input_ids"][len(backbone.begin()) : -end], item["target"][:-1]):
            assert part.tolist() == whole[: len(part)].tolist()


def test_a_search_is_as_wide_and_as_long_as_the_recipe_says(writers):
    for task in (Translation(beams=2, max_new_tokens=3), QuestionAnswering(answer="text", beams=2, longest=3)):
        made = task.model(writers["t5"], True, 0).generation_config
        assert (made.num_beams, made.max_new_tokens) == (2, 3)


def test_a_chosen_answer_is_no_longer_than_the_recipe_says(writers):
    backbone, task = writers["bert"], QuestionAnswering(longest=1)
    some = [Question(text, "", f"x:{n}", "what", str(n)) for n, text in enumerate(sentences(4))]
    spans = [{tuple(span) for w in windows for span in w.spans.tolist()} for windows in task.windows(backbone, some)]
    for found, (best, _) in zip(spans, task.n_best_of(task.model(backbone, True, 0), backbone, some, 4), strict=True):
        assert {(s.begin, s.end) for s in best} <= found


def test_a_long_question_loses_its_end():
    context = np.arange(50, 60)
    window, *_ = squad.windows(np.arange(10, 40), context, np.array([[k, k + 1] for k in range(10)]), None, length=24, stride=4, bos=[0], eos=1, null_last=False)
    assert window.ids[: window.first].tolist() == [0, *range(10, 18), 1]


def test_slow_positions_do_not_decay():
    model = models.build({"architecture": "bert", **SMALL["bert"]}, toy_vocab(64), MaskedTokens(), 32, 0)
    table = model.base_model.embeddings.position_embeddings.weight
    (group,) = (g for g in muon_groups(model, 0.1, 1e-3) if any(p is table for p in g["params"]))
    assert group["weight_decay"] == 0.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_are_those_of_the_run_that_goes_on(optimizer, shared_dir, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer_of("bert", token_set(shared_dir), tmp_path, optimizer, **keys).run()
    other = trainer_of("bert", token_set(shared_dir), tmp_path, optimizer, **keys | {"max_steps": 2}, adam_beta2=0.5, adam_epsilon=1e-3)
    other.run(other.resume_point(("adam_beta2", "adam_epsilon")))
    groups = [g for g in other.optimizer.param_groups if "betas" in g]
    assert {(g["betas"][1], g["eps"]) for g in groups} == {(0.5, 1e-3)}
