"""What a run costs before it starts, and what some minutes buy."""

import json
import math
import os
import signal

import pytest
import torch

import lmssl
from lmssl import config, models, plan, tokenization
from lmssl.cli import run
from lmssl.errors import UserError, fitting
from lmssl.objectives import NextToken, toy
from lmssl.recipe import PRETRAIN, PretrainRecipe
from tests.helpers import SMALL

SECTIONS = {name: {"architecture": name, **keys} for name, keys in SMALL.items()}


@pytest.fixture
def recipe(corpus_file, tmp_path):
    path = tmp_path / "small.yaml"
    sections = {
        "data": {"text": str(corpus_file), "tokenizer": "tokenizer_assets/bpe-8k", "seq_length": 32, "held_out": 0.05},
        "model": SECTIONS["llama"],
        "objective": {"name": "next_token"},
        "trainer": {"output_dir": str(tmp_path / "run"), "max_steps": 500, "per_device_train_batch_size": 8},
    }
    path.write_text(config.dump(sections))
    return path


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("factor", [0.5, 1, 2, 3])
def test_scaled_sections_are_buildable(name, factor):
    """Every architecture, wider and narrower; heads keep their size, and a factor of 1 keeps the model."""
    section = SECTIONS[name]
    before = models.config_of(section)
    after = models.config_of(plan.scaled(section, before, factor))
    width = next(n for n in plan.WIDTHS if hasattr(before, n))
    heads = next(n for n in plan.HEADS if hasattr(before, n))
    assert getattr(after, width) / getattr(after, heads) == getattr(before, width) / getattr(before, heads)
    assert getattr(after, width) == round(getattr(before, heads) * factor) * getattr(before, width) // getattr(before, heads)
    if factor == 1:
        assert after.to_dict() == before.to_dict()


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (8, 1), (8, 2), (6, 3), (1, 1)])
@pytest.mark.parametrize("factor", plan.STEPS_OF_THE_LADDER[:6])
def test_grouped_heads_stay_in_whole_groups(heads, groups, factor):
    section = SECTIONS["llama"] | {"num_attention_heads": heads, "num_key_value_heads": groups, "hidden_size": 8 * heads}
    made = plan.scaled(section, models.config_of(section), factor)
    assert made["num_attention_heads"] // made["num_key_value_heads"] == heads // groups or groups == 1
    assert made["num_key_value_heads"] == 1 or heads == 1 or groups > 1
    model = models.build(made, toy.vocab(50), NextToken(), 16, 0)
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()


def test_a_size_is_tried_once(recipe, monkeypatch):
    monkeypatch.setattr(plan.machine, "pass_seconds", lambda *args: 1.0)
    wanted = PretrainRecipe.load(recipe, ["model.num_attention_heads=1", "model.num_key_value_heads=1", "model.num_hidden_layers=1", "model.hidden_size=16"])
    rungs = list(plan.ladder(wanted, 1))
    assert len({rung.inner for rung in rungs}) == len(rungs) > 1
    assert "the smallest size that was tried" in plan.table(rungs, rungs[0])
    assert "that was tried" not in plan.table(rungs, rungs[1]) or len(rungs) == 2


def test_a_plan_takes_rows_that_fit(recipe, monkeypatch):
    """What does not is halved, but for rows that the recipe names, of which it takes no more."""
    wanted, asked, cost = PretrainRecipe.load(recipe, ["trainer.per_device_train_batch_size=null", "trainer.torch_compile=false"]), [], plan.cost

    def small(made):
        asked.append(made.trainer["per_device_train_batch_size"])
        if asked[-1] > 4:
            with fitting("a step", "less"):
                raise torch.OutOfMemoryError("no more")
        return cost(made)

    monkeypatch.setattr(plan, "cost", small)
    trainer = plan.plan(wanted, 0.05)[2]["trainer"]
    assert asked == [asked[0] >> k for k in range(len(asked))]
    assert (asked[-1], trainer["per_device_train_batch_size"]) == (4, 4)
    assert trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] == asked[0]
    asked.clear()
    plan.plan(PretrainRecipe.load(recipe, ["trainer.per_device_train_batch_size=2", "trainer.torch_compile=false"]), 0.05)
    assert asked == [2]


def test_repeated_text_is_worth_less():
    assert plan.expected_loss(1e6, 1e7, 1e7) < plan.expected_loss(1e6, 1e7, 1e6) < plan.expected_loss(1e6, 1e6, 1e6)


def test_dry_run_measures_and_leaves_nothing(recipe, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert run(["pretrain", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("500 steps", "tokens/s", "GiB"))
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_answers_with_a_recipe_that_runs(recipe, tmp_path, capsys):
    made = tmp_path / "planned.yaml"
    assert run(["plan", str(recipe), "--minutes", "0.05", "--out", str(made)]) == 0, capsys.readouterr().err
    sections = config.load(made, (), PRETRAIN)
    assert sections["trainer"]["max_steps"] >= 1
    assert PretrainRecipe.load(made).model["architecture"] == "llama"
    assert run(["pretrain", str(made), "trainer.max_steps=2"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 2
    assert run(["plan", str(recipe), "--minutes", "1", "--out", str(made)]) == 2


def test_plan_refuses_where_it_cannot_write_before_it_measures(recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(plan, "plan", lambda *args: pytest.fail("measured"))
    assert run(["plan", str(recipe), "--minutes", "1", "--out", str(tmp_path / "new" / "x.yaml")]) == 2
    assert f"--out: no such folder: {tmp_path / 'new'}" in capsys.readouterr().err


def test_plan_measures_the_run_that_it_plans(recipe, monkeypatch):
    """Compilation is chosen by the length of the run: what is measured must have it too."""
    measured, cost = [], plan.cost
    monkeypatch.setattr(plan, "cost", lambda wanted: measured.append(wanted) or cost(wanted))
    _, best, sections, _ = plan.plan(PretrainRecipe.load(recipe, ["trainer.torch_compile=false"]), 0.1)
    trainer = measured[0].trainer
    assert trainer["max_steps"] * trainer["per_device_train_batch_size"] * trainer.get("gradient_accumulation_steps", 1) * 32 == pytest.approx(best.tokens, rel=0.2)
    assert sections["trainer"]["max_steps"] < 20 * trainer["max_steps"]


def test_the_ladder_ends_where_memory_does(recipe, monkeypatch):
    calls, seconds = [], plan.machine.pass_seconds

    def small_memory(*args):
        calls.append(args)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("no more")
        return seconds(*args)

    monkeypatch.setattr(plan.machine, "pass_seconds", small_memory)
    assert len(list(plan.ladder(PretrainRecipe.load(recipe), 1))) == 2
    calls += [None] * 2
    with pytest.raises(UserError, match="not even the smallest model"):
        list(plan.ladder(PretrainRecipe.load(recipe), 1))


def test_a_checkpoint_is_not_continued_with_another_tokenizer(recipe, corpus_file, tmp_path, capsys):
    """Its rows of embeddings would mean other tokens. Nor is it overwritten by what is fine-tuned from it."""
    assert run(["pretrain", str(recipe), "trainer.max_steps=2"]) == 0
    assert run(["tokenizer", str(corpus_file), "--out", str(tmp_path / "other"), "--size", "420"]) == 0
    own = tmp_path / "run"
    sections = config.load(recipe, (), PRETRAIN) | {"model": {"from": str(own)}}
    recipe.write_text(config.dump(sections | {"trainer": {"output_dir": str(tmp_path / "on"), "max_steps": 1}}))
    capsys.readouterr()
    assert run(["pretrain", str(recipe), f"data.tokenizer={tmp_path / 'other'}"]) == 2
    assert "gives other ids than the tokenizer of" in capsys.readouterr().err
    assert run(["pretrain", str(recipe)]) == 0, capsys.readouterr().err  # bpe-8k, its own
    assert run(["finetune", "recipes/finetune/quickstart.yaml", f"data.train={corpus_file}", f"model.from={own}", f"trainer.output_dir={own}", "--overwrite"]) == 2
    assert "the backbone in model.from, would be overwritten" in capsys.readouterr().err


def test_dry_run_of_a_label_curve(recipe, corpus_file, tmp_path, capsys):
    assert run(["pretrain", str(recipe), "trainer.max_steps=2"]) == 0
    out = tmp_path / "curve"
    made = ["data.test=0.2", "task.labels=[8,16]", "task.seeds=2", "task.learning_rates=[1e-3,1e-4]", f"model.from={tmp_path / 'run'}", f"trainer.output_dir={out}"]
    capsys.readouterr()
    assert run(["finetune", "recipes/finetune/quickstart.yaml", f"data.train={corpus_file}", *made, "--dry-run"]) == 0, capsys.readouterr().err
    # 2 counts x 2 inits x 2 seeds, and 2 rates for each count and init; 39 and 48 steps each.
    assert "16 runs, 696 steps" in capsys.readouterr().out
    assert not out.exists()


def test_a_signal_ends_a_dry_run_without_a_word_of_what_it_saved(recipe, monkeypatch, capsys):
    begun = plan._Steps.on_step_begin
    monkeypatch.setattr(plan._Steps, "on_step_begin", lambda self, *args, **keys: (self.begun or os.kill(os.getpid(), signal.SIGTERM), begun(self, *args, **keys))[1])
    assert run(["pretrain", str(recipe), "--dry-run"]) == 143
    assert capsys.readouterr().err.strip().splitlines()[-1] == "lmssl: SIGTERM: the dry run was stopped; nothing of it is kept"


def test_a_plan_is_what_the_minutes_buy(recipe, monkeypatch):
    """Its batch by the law of 2401.02954, its steps by the time that they were measured to take."""
    wanted = PretrainRecipe.load(recipe)
    rung = plan.Rung(wanted.model, 10**6, 1e4, 0.5, 6e6, 1.0, 3.0)
    monkeypatch.setattr(plan, "ladder", lambda *of: iter([rung]))
    monkeypatch.setattr(plan, "cost", lambda of: plan.Cost(10**6, 50, 5000, 2.0, 0.5, 10.0, None, 1, "", 12))
    _, _, sections, cost = plan.plan(wanted, 10)
    tokens = 0.292 * (6 * 10**6 * 6e6) ** 0.3271
    trainer = sections["trainer"]
    assert trainer["per_device_train_batch_size"] * trainer.get("gradient_accumulation_steps", 1) == 2 ** round(math.log2(tokens / 32)) == 256
    assert (trainer["max_steps"], cost.tokens, cost.epochs) == (1180, 118_000, pytest.approx(47.2))
    assert cost.seconds == 600
    assert cost.lines()[-1] == "saves    every 295 steps, about 2 min apart"


def test_a_size_is_judged_by_the_tokens_that_its_speed_buys(recipe, corpus_file, monkeypatch):
    monkeypatch.setattr(plan.machine, "pass_seconds", lambda *args: 1.0)
    rung = next(plan.ladder(PretrainRecipe.load(recipe), 2))
    held = lmssl.prepare(str(corpus_file), tokenization.load("tokenizer_assets/bpe-8k"), 0.05, quiet=True)
    assert rung.tokens == pytest.approx(120 * rung.tokens_per_second)
    assert rung.epochs == pytest.approx(rung.tokens / held.tokens, rel=0.1)
