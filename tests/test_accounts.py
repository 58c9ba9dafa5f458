"""The numbers that a run, a plan and a report tell are those of the run."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import lmssl
from lmssl import arguments as settings
from lmssl import checkpoints, evaluation, likelihood, plan, report, statistics, tokenization
from lmssl.data.stream import Stream
from lmssl.objectives import MaskedTokens
from lmssl.recipe import PretrainRecipe
from lmssl.runs import assemble, check, pretrain
from lmssl.watch import Progress
from tests.helpers import SMALL, small_model, token_set
from tests.test_trainer import recipe_of, trainer_of


def test_runs_of_every_seed_are_measured_by_the_same_masks(shared_dir):
    one, other = (evaluation.held_out_stream(Stream(token_set(shared_dir), MaskedTokens(), 32, seed, 1), 32, None) for seed in (0, 7))
    assert all(np.array_equal(one[i]["labels"], other[i]["labels"]) for i in range(len(one)))


def test_the_held_out_loss_of_a_result_is_of_the_final_model(corpus_file, tmp_path):
    """Of a run that is measured before its first step, as a continued checkpoint is."""
    metrics = pretrain(recipe_of(corpus_file, tmp_path, eval_on_start=True, learning_rate=1e-2), quiet=True)
    points = {c["step"]: c["held_out_loss"] for c in metrics["curve"] if "held_out_loss" in c}
    assert list(points) == [0, 4]
    assert metrics["held_out"]["loss"] == points[4] < points[0]


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_bits_per_byte_along_the_way_are_of_the_tokens_that_were_asked(architecture, shared_dir, tmp_path):
    trainer = trainer_of(architecture, token_set(shared_dir), tmp_path, max_steps=1)
    trainer.run()
    labels = np.concatenate([trainer.train_dataset[i]["labels"] for i in trainer.items(0)])
    labels = labels[labels != -100]
    size = trainer.train_dataset.vocab.token_bytes[labels].sum()
    assert trainer.curve[0]["bits_per_byte"] == pytest.approx(trainer.curve[0]["loss"] * len(labels) / math.log(2) / size, abs=1e-3)


def progress_of(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Progress))


def test_speed_counts_from_where_a_run_went_on(shared_dir, tmp_path):
    tokens, keys = token_set(shared_dir), {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_of("bert", tokens, tmp_path, **keys).run()
    facts = checkpoints.facts(tmp_path / "checkpoint-2")
    resumed = trainer_of("bert", tokens, tmp_path, **keys | {"max_steps": 3})
    resumed.run(resumed.resume_point())
    assert facts["seconds"] > 0
    assert progress_of(resumed).begun == (facts["seconds"], facts["tokens"], 2)
    assert resumed.metrics()["seconds"] > facts["seconds"]


def test_the_speed_of_several_processes_is_of_all_of_them(shared_dir, tmp_path, monkeypatch):
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path)
    progress = progress_of(trainer)
    trainer._tokens += 1000
    trainer.clock.training, trainer.state.global_step = 2.0, 1
    progress.begun = (0.0, 0, 1)
    progress.on_log(SimpleNamespace(world_size=1), trainer.state, trainer.control, {"loss": 1.0})
    assert "tokens_per_second" not in trainer.curve[-1], "the first step compiled"
    progress.begun = (0.0, 0, 0)
    for world, speed in ((1, 500.0), (4, 2000.0)):
        progress.on_log(SimpleNamespace(world_size=world), trainer.state, trainer.control, {"loss": 1.0})
        assert trainer.curve[-1]["tokens_per_second"] == speed


def test_evaluation_and_saving_are_no_training(shared_dir, tmp_path):
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path, max_steps=1, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.run()
    assert trainer.clock.other["evaluation"] > 0 < trainer.clock.other["saving"]


def test_an_epoch_is_every_row_of_the_objective_s_own_length(corpus_file, tmp_path):
    made = {
        "data": {"text": str(corpus_file), "tokenizer": "tokenizer_assets/bpe-8k", "seq_length": 64, "held_out": 0.1},
        "model": {"architecture": "t5", **SMALL["t5"]},
        "objective": {"name": "span_corruption"},
        "trainer": {"output_dir": str(tmp_path), "num_train_epochs": 1, "per_device_train_batch_size": 1, "torch_compile": False},
    }
    recipe = PretrainRecipe.of(made)
    trainer, values = assemble(recipe, *check(recipe), settings.resolve(recipe.trainer, settings.pretrain_defaults()), True)
    assert values["max_steps"] == trainer.train_dataset.rows


def test_a_warm_up_is_a_tenth_and_a_hundred_steps_at_most():
    assert [settings.usual_warmup(n) for n in (5, 400, 10_000)] == [0, 40, 100]


def test_a_last_part_of_an_epoch_is_a_step_and_four_checkpoints_are_saved():
    values = {"per_device_train_batch_size": 4}
    assert settings.with_steps(values | {"num_train_epochs": 2}, 9)["max_steps"] == 5
    assert settings.with_steps(values | {"max_steps": 10_000}, 9)["save_steps"] == 2500


def test_the_table_of_t_is_students():
    for freedom in range(1, 41):
        assert statistics.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=1e-3), freedom


def test_a_hair_s_breadth_is_a_tie_and_more_is_none():
    found = likelihood.preferred(np.array([-1.0, -1.0]), np.array([-1.000001, -1.001]), ["a", "a"])
    assert (found["ties"], found["accuracy"]) == (1, 0.75)


def test_without_bos_a_text_is_read_behind_eos(shared_dir):
    words = dataclasses.replace(token_set(shared_dir).vocab(), bos=None)
    model, ids = small_model("gpt2", words, 64).eval(), words.ordinary[:9]
    (value,) = likelihood.log_likelihoods(model, "decoder", [ids], words)
    row = torch.tensor([[words.eos, *ids.tolist()]])
    assert value == pytest.approx(-model(input_ids=row, labels=row).loss.item() * len(ids), rel=1e-5)


def test_epochs_of_a_dry_run_are_passes_of_its_text(corpus_file, tmp_path):
    recipe = recipe_of(corpus_file, tmp_path / "run", max_steps=500)
    found = plan.cost(recipe)
    assert found.save_steps == 2
    assert found.lines()[-1].startswith("saves    every 2 steps, about ")
    assert dataclasses.replace(found, save_steps=0).lines()[-1] == "saves    none on the way"
    text = lmssl.prepare(str(corpus_file), tokenization.load("tokenizer_assets/bpe-8k"), 0.1, quiet=True)
    assert found.epochs == pytest.approx(found.tokens / text.tokens, rel=0.05)


def test_the_tests_of_a_curve_take_time_too():
    assert plan.CurveCost(2, 10, 0.5, 3, 4.0).seconds == 17


class Axes:
    """What is drawn, by its label."""

    def __init__(self):
        self.drawn = {}
        self.figure = self.xaxis = self

    def plot(self, x, y, *style, label=None, **keys):
        if label:
            self.drawn[label] = (list(x), list(y))

    def __getattr__(self, name):
        return lambda *args, **keys: self


def test_curves_of_a_report_are_those_of_the_run():
    curve = [{"step": 1, "loss": 5.0, "bits_per_byte": 3.0}, {"step": 2, "loss": 4.0, "bits_per_byte": 2.0}, {"step": 2, "held_out_loss": 4.5, "bits_per_byte": 2.5}]
    axes = Axes()
    report._draw_loss(axes, curve, {})
    assert axes.drawn == {"training": ([1, 2], [5.0, 4.0]), "held out": ([2], [4.5])}
    results = [
        {"labels": n, "init": init, "seed": 0, "score": score} for n, init, score in [(10, "scratch", 0.5), (10, "pretrained", 0.6), (20, "scratch", 0.7), (20, "pretrained", 0.8)]
    ]
    axes = Axes()
    report._draw_labels(axes, {"results": results, "metric": "accuracy"})
    assert axes.drawn == {"scratch": ([10, 20], [50.0, 70.0]), "pretrained": ([10, 20], [60.0, 80.0])}


def test_the_time_of_a_run_is_told_in_minutes(tmp_path):
    metrics = {"seconds": 600.0, "tokens_per_second": 1000.0, "curve": [], "held_out": {"loss": 1.0, "bits_per_byte": 1.0}}
    assert "10.0 minutes, 1,000 tokens/s" in report.page([(tmp_path, metrics)], "x")
