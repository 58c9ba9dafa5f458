"""Figures that a user reads, each against arithmetic of its own."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lmssl import evaluation, evidence, forward, likelihood, machine, plan, report, statistics, tokenization, watch
from lmssl.data import preparation
from lmssl.data.stream import Collator, Stream
from lmssl.objectives import MaskedTokens
from lmssl.recipe import FinetuneRecipe, PretrainRecipe
from lmssl.runs import finetune, pretrain
from lmssl.scoring import evaluate
from lmssl.tasks.sentiment import Sentiment
from tests.helpers import SMALL, saved_backbone, sentences, small_model, token_set
from tests.test_statistics import results_of
from tests.test_trainer import recipe_of, trainer_of


def clock(monkeypatch, module, step=None, times=()):
    """Have a module's `time.perf_counter` say some times, or each time a step more."""
    told = iter(times) if times else iter(np.arange(0, 10**6) * step)
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(told)))


def test_what_is_paused_is_no_training_and_what_was_before_stays(monkeypatch):
    clock(monkeypatch, watch, times=[10, 13, 13, 18, 18, 20])
    watched = watch.Clock(torch.device("cpu"))
    watched.start()
    with watched.paused("saving"):
        pass
    watched.stop()
    assert (watched.training, watched.other["saving"]) == (5, 5)


def test_the_peak_is_two_operations_a_number(monkeypatch):
    clock(monkeypatch, machine, step=0.01)
    size = max(machine.SIZES["cpu"])
    assert machine.matmul_peak("cpu", torch.float32, 1, 0.0321) == pytest.approx(2 * size**3 / 0.01)


def test_the_share_of_several_processes_is_of_all_their_peaks(shared_dir, tmp_path, monkeypatch):
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path)
    trainer.flops, trainer.peak = 100.0, 50.0
    one, batch = trainer.peak_share(4, 2.0), trainer.global_batch
    monkeypatch.setattr(type(trainer), "global_batch", batch)
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 4))
    assert trainer.peak_share(4, 2.0) == pytest.approx(one / 4)


def test_each_rank_measures_its_own_held_out_rows(shared_dir):
    made, objective = token_set(shared_dir), MaskedTokens()
    model = forward.prepare(small_model("bert", made.vocab()))
    stream = evaluation.held_out_stream(Stream(made, objective, 32, 0, 1), 32, None)
    collate = Collator(objective, 32, "encoder", made.vocab().pad)
    assert len(stream) > 2
    whole, *parts = (evaluation.held_out(model, stream, collate, 1, share=share) for share in ((0, 1), (0, 2), (1, 2)))
    for key in ("rows", "labels"):
        assert sum(part[key] for part in parts) == whole[key]
    assert sum(part["loss"] * part["labels"] for part in parts) / whole["labels"] == pytest.approx(whole["loss"], rel=1e-6)


def test_a_run_is_measured_as_all_are_and_reported_so(corpus_file, tmp_path):
    """Whatever rate it trained at; no part of another text is held out of its measurement; the report shows what was found."""
    run = tmp_path / "run"
    held = pretrain(dataclasses.replace(recipe_of(corpus_file, run), objective={"name": "masked", "rate": 0.4}), quiet=True)["held_out"]
    assert f"{held['loss']:.4f} nats a token, {held['bits_per_byte']:.4f} bits per byte" in report.write([run]).read_text()
    assert evaluate(str(run), [])["loss"] == pytest.approx(held["loss"], rel=1e-6)
    (tmp_path / "one.txt").write_text(" ".join(sentences(30)) + "\n")
    assert evaluate(str(run), [f"data.text={tmp_path / 'one.txt'}"])["loss"] > 0, "a document that could not be divided"


def test_phenomena_count_alike_whatever_their_size():
    found = likelihood.preferred(np.array([-1.0, -1.0, -1.0, -9.0]), np.array([-2.0, -2.0, -2.0, -2.0]), ["a", "a", "a", "b"])
    assert (found["accuracy"], found["mean_by_phenomenon"]) == (0.75, 0.5)


def gained():
    """The result of a curve of two counts and five seeds."""
    results = results_of({10: [0.5] * 5, 20: [0.6] * 5}, {10: [0.6, 0.62, 0.61, 0.6, 0.63], 20: [0.7, 0.71, 0.7, 0.72, 0.7]})
    for result in results:
        result["learning_rate"] = {"scratch": 1e-3, "pretrained": 2e-4}[result["init"]]
    return {"task": "sentiment", "metric": "accuracy", "results": results, "summary": statistics.summary(results), "learning_rate": 1e-3}


def test_a_baseline_stands_beside_its_own_number_of_labels():
    baseline = {"tf-idf": [{"labels": n, "seed": s, "score": v} for n, v in ((10, 0.5), (20, 0.9)) for s in range(2)]}
    _, ten, twenty = evidence.label_rows(gained() | {"baselines": baseline})
    assert (ten[4], twenty[4]) == ("50.0 ± 0.0", "90.0 ± 0.0")


def test_each_init_is_told_with_its_own_rates():
    tuning = [{"labels": n, "init": init, "learning_rate": rate} for n in (10, 20) for init in ("scratch", "pretrained") for rate in (1e-3, 2e-4)]
    said = evidence.rates_in_words(gained() | {"tuning": tuning})
    assert said == "of 0.0002, 0.001 by validation loss on the few labels of seed 0: scratch 0.001 (10), 0.001 (20); pretrained 0.0002 (10), 0.0002 (20)"


def test_two_epochs_are_worth_nearly_two():
    """Of the second 15.4 (1 - exp(-1/15.4)) = 0.968 (2305.16264)."""
    worth = 1e6 * (1 + 15.4 * (1 - math.exp(-1 / 15.4)))
    assert plan.expected_loss(1e6, 2e6, 1e6) == pytest.approx(plan.expected_loss(1e6, worth, worth), rel=1e-9)


def test_a_dry_run_counts_the_tokens_of_the_whole_run(corpus_file, tmp_path):
    recipe = recipe_of(corpus_file, tmp_path / "run", max_steps=500)
    cost = plan.cost(recipe)
    rows = 500 * recipe.trainer["per_device_train_batch_size"]
    assert cost.steps == 500
    assert 0.9 * rows * 32 < cost.tokens <= rows * 32


def test_the_time_of_a_test_counts_for_every_example(shared_dir, tmp_path, monkeypatch):
    saved_backbone("bert", token_set(shared_dir), tmp_path / "backbone")
    rows = [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(dict.fromkeys(sentences(400, seed=4)))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"task": {"name": "sentiment", "labels": [8], "seeds": 1}, "data": {"train": str(tmp_path / "rows.jsonl"), "test": 160}}
    sections |= {"model": {"from": str(tmp_path / "backbone")}, "trainer": {"output_dir": str(tmp_path / "out"), "max_steps": 3, "bf16": False}}
    monkeypatch.setattr(Sentiment, "evaluate", lambda self, model, backbone, few, batch: time.sleep(len(few) / 640))
    assert plan.curve_cost(FinetuneRecipe.of(sections)).test_seconds == pytest.approx(160 / 640, rel=0.3)


def test_seeds_differ_in_every_weight_that_is_drawn(corpus_file, tmp_path):
    """Of matrices and of embeddings that begin from the text: else the spread over seeds would be too small."""
    made = []
    for seed in (0, 1):
        recipe = recipe_of(corpus_file, tmp_path / str(seed), seed=seed, learning_rate=1e-9, max_steps=1)
        pretrain(dataclasses.replace(recipe, model={"architecture": "llama", **SMALL["llama"]}, objective={"name": "next_token"}), quiet=True)
        made.append(load_file(tmp_path / str(seed) / "model.safetensors"))
    seen = np.unique(np.concatenate(tokenization.load("tokenizer_assets/bpe-8k").encode(sentences(50))))  # the others keep what they were drawn as
    for name, rows in (("model.layers.0.mlp.up_proj.weight", slice(None)), ("model.embed_tokens.weight", seen)):
        assert ((made[0][name] - made[1][name])[rows].abs().amax(1) > 1e-3).all()


def test_the_leaks_of_a_result_are_those_of_its_test(tmp_path):
    """Texts of the backbone's stand in the test set alone."""
    texts = [" ".join(f"w{k}x{n}" for n in range(20)) for k in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(texts[:30]))
    sections = {"data": {"text": str(tmp_path / "text.txt"), "tokenizer": "tokenizer_assets/bpe-8k", "seq_length": 32, "held_out": 0.1}}
    sections |= {"model": {"architecture": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}, "objective": {"name": "next_token"}}
    pretrain(PretrainRecipe.of(sections | {"trainer": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "bf16": False}}), quiet=True)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text, "label": "ab"[n % 2]}) + "\n" for n, text in enumerate(texts[30:])))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": text, "label": "ab"[n % 2]}) + "\n" for n, text in enumerate([*texts[:30], *sentences(6)])))
    data = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    tuned = {"task": {"name": "sentiment", "labels": [8], "seeds": 1}, "data": data, "model": {"from": str(tmp_path / "run")}}
    found = finetune(FinetuneRecipe.of(tuned | {"trainer": {"output_dir": str(tmp_path / "out"), "max_steps": 1, "bf16": False}}), quiet=True)
    held = preparation.prepare(str(tmp_path / "text.txt"), tokenization.load("tokenizer_assets/bpe-8k"), 0.1, quiet=True).manifest["held_out"]["documents"]
    assert found["leaks"]["leaked"] == 30 - held
    assert found["leaks"]["test_examples"] == found["test_examples"]
