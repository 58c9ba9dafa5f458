"""A label curve that is interrupted goes on: the same results, bit for bit, and nothing run twice."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lmssl import checkpoints
from lmssl.arguments import OWNED_BY_TASKS, finetune_defaults, resolve
from lmssl.cli import run
from lmssl.errors import Diverged, Interrupted, UserError
from lmssl.recipe import FinetuneRecipe
from lmssl.runs import curve_of, finetune
from lmssl.tasks import ledger
from lmssl.tasks.curve import Curve
from lmssl.trainer import ExactTrainer
from tests.helpers import saved_backbone, token_set

LENGTH = 32


@pytest.fixture(scope="module")
def sections(shared_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ledger")
    tokens = token_set(shared_dir)
    saved_backbone("bert", tokens, folder / "backbone", LENGTH)
    rows = [{"text": f"the film {n} was {'good' if n % 2 else 'bad'}", "label": n % 2} for n in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def make(out, **fields):
        trainer = {"output_dir": str(out), "max_steps": 4, "bf16": False, "per_device_train_batch_size": 4}
        task = {"name": "sentiment", "labels": [8], "seeds": 2, "learning_rates": [1e-3, 3e-3]}
        return {
            "task": task | {k: v for k, v in fields.items() if k in ("seeds", "learning_rates")},
            "data": {"train": str(folder / "data.jsonl"), "test": 10, "max_length": LENGTH},
            "model": {"from": str(folder / "backbone")},
            "trainer": trainer | {k: v for k, v in fields.items() if k in ("learning_rate", "save_steps", "optimizer")},
        }

    return make


def scores(metrics):
    return [(r["labels"], r["init"], r["seed"], r["learning_rate"], r["score"]) for r in metrics["results"]], metrics["tuning"]


@pytest.fixture(scope="module")
def whole(sections, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return finetune(FinetuneRecipe.of(sections(out)), quiet=True), (out / "model.safetensors").read_bytes()


def kill_at(monkeypatch, step, signum=signal.SIGTERM):
    """Send the signal during the n-th micro-step from now; returns the count of all."""
    original, seen = ExactTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), signum)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ExactTrainer, "training_step", training_step)
    return seen


@pytest.mark.parametrize("step", [2, 11, 18, 22])
def test_a_signal_in_any_run(step, sections, whole, tmp_path, monkeypatch):
    recipe = FinetuneRecipe.of(sections(tmp_path))
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Interrupted, match=r"SIGTERM: saved .*checkpoint-\d; --resume continues there"):
            finetune(recipe, quiet=True)
    assert list(tmp_path.glob("checkpoints/*/checkpoint-*"))
    with pytest.raises(UserError, match="--resume continues it, --overwrite begins anew"):
        finetune(recipe, quiet=True)
    with monkeypatch.context() as patch:
        seen = kill_at(patch, 0)
        metrics = finetune(recipe, resume=True, quiet=True)
    assert len(seen) == 32 - step  # 4 tuning runs and 4 runs of 4 steps, none of them twice
    assert scores(metrics) == scores(whole[0])
    assert (tmp_path / "model.safetensors").read_bytes() == whole[1]
    assert not (tmp_path / "checkpoints").exists()


def test_a_kill_between_checkpoints(sections, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        original = Curve._scored
        patch.setattr(Curve, "_scored", lambda self, *of: (_ for _ in ()).throw(KeyboardInterrupt) if of[-1].seed else original(self, *of))
        with pytest.raises(KeyboardInterrupt):
            finetune(FinetuneRecipe.of(sections(tmp_path)), quiet=True)
    assert scores(finetune(FinetuneRecipe.of(sections(tmp_path)), resume=True, quiet=True)) == scores(whole[0])


def test_what_is_trained_is_kept_until_its_score_is(sections, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Curve, "_scored", lambda *of: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(FinetuneRecipe.of(sections(tmp_path, save_steps=2)), quiet=True)
    assert list(tmp_path.glob("checkpoints/8-scratch-0-*/checkpoint-*")), "set up"
    seen = kill_at(monkeypatch, 0)
    finetune(FinetuneRecipe.of(sections(tmp_path, save_steps=2)), resume=True, quiet=True)
    assert len(seen) == 32 - 4 * 2 - 4, "two tuning runs and the run whose score was lost are not trained again"
    assert not (tmp_path / "checkpoints").exists()


def test_a_damaged_checkpoint_begins_that_run_anew(sections, whole, tmp_path, monkeypatch, caplog):
    recipe = FinetuneRecipe.of(sections(tmp_path))
    with monkeypatch.context() as patch:
        kill_at(patch, 18)
        with pytest.raises(Interrupted):
            finetune(recipe, quiet=True)
    saved = next(tmp_path.glob("checkpoints/*/checkpoint-*/model.safetensors"))
    saved.write_bytes(saved.read_bytes()[:-1])
    assert scores(finetune(recipe, resume=True, quiet=True)) == scores(whole[0])
    assert "model.safetensors has" in caplog.text
    assert "this run begins anew" in caplog.text


def test_weights_that_cannot_be_loaded_are_refused_before_the_twin_trains(sections, tmp_path, monkeypatch):
    values = sections(tmp_path / "out", learning_rates=[])
    shutil.copytree(values["model"]["from"], tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    seen = kill_at(monkeypatch, 0)
    with pytest.raises(UserError, match="the weights cannot be loaded"):
        finetune(FinetuneRecipe.of(values | {"model": {"from": str(tmp_path / "broken")}}), quiet=True)
    assert not seen


def test_what_is_resumed_before_any_run_is_finished_is_compared_too(sections, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(Interrupted):
            finetune(FinetuneRecipe.of(sections(tmp_path)), quiet=True)
    assert list(tmp_path.glob("checkpoints/*/checkpoint-*")), "of the run that was under way"
    with pytest.raises(UserError, match=r"trainer\.learning_rate changed"):
        finetune(FinetuneRecipe.of(sections(tmp_path, learning_rate=2e-3)), resume=True, quiet=True)


def test_the_number_of_processes_is_part_of_a_curve(sections, tmp_path, monkeypatch):
    """Each step takes as many examples more."""
    finetune(FinetuneRecipe.of(sections(tmp_path, seeds=1, learning_rates=[])), quiet=True)
    monkeypatch.setattr(ledger, "processes", lambda: 2)
    with pytest.raises(UserError, match="processes changed: the finished runs have None, this recipe 2"):
        finetune(FinetuneRecipe.of(sections(tmp_path, learning_rates=[])), resume=True, quiet=True)


def test_the_card_names_the_labels_of_the_model_that_lies_there(sections, tmp_path):
    values = sections(tmp_path, seeds=1, learning_rates=[])
    values["task"]["labels"] = [8, 16]
    finetune(FinetuneRecipe.of(values), quiet=True)
    values["task"]["labels"] = [8]
    metrics = finetune(FinetuneRecipe.of(values), resume=True, quiet=True)
    assert {r["labels"] for r in metrics["results"]} == {8}
    assert metrics["saved_labels"] == 16
    assert "on 16 labelled examples" in " ".join((tmp_path / "README.md").read_text().split())


def test_more_seeds_add_runs(sections, whole, tmp_path, monkeypatch):
    finetune(FinetuneRecipe.of(sections(tmp_path, seeds=1)), quiet=True)
    seen = kill_at(monkeypatch, 0)
    assert scores(finetune(FinetuneRecipe.of(sections(tmp_path)), resume=True, quiet=True)) == scores(whole[0])
    assert len(seen) == 2 * 4
    finetune(FinetuneRecipe.of(sections(tmp_path)), resume=True, quiet=True)
    assert len(seen) == 2 * 4, "a finished curve runs nothing"


def test_changes_are_refused(sections, tmp_path):
    finetune(FinetuneRecipe.of(sections(tmp_path, seeds=1, learning_rates=[])), quiet=True)
    changed = FinetuneRecipe.of(sections(tmp_path, learning_rates=[], learning_rate=2e-3))
    with pytest.raises(UserError, match=r"--resume: trainer.learning_rate changed: the finished runs have 0.0005, this recipe 0.002; --accept trainer.learning_rate goes on"):
        finetune(changed, resume=True, quiet=True)
    assert len(finetune(changed, resume=True, accept=("trainer.learning_rate",), quiet=True)["results"]) == 4
    with pytest.raises(UserError, match=r"--accept: nothing is called 'trainer.learning_rat'; did you mean 'trainer.learning_rate'"):
        finetune(changed, resume=True, accept=("trainer.learning_rat",), quiet=True)
    text = (tmp_path / "progress.json").read_text()
    (tmp_path / "progress.json").write_text(text.replace('"score": 0', '"score": 1', 1))
    with pytest.raises(UserError, match=r"progress.json differs from its own sha256; --overwrite begins anew"):
        finetune(changed, resume=True, quiet=True)
    assert len(finetune(FinetuneRecipe.of(sections(tmp_path, seeds=1)), overwrite=True, quiet=True)["results"]) == 2


def test_a_diverging_rate_is_not_chosen_and_a_diverging_run_stops(sections, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr("lmssl.watch.Guard.on_pre_optimizer_step", diverging(monkeypatch, rate=3e-3))
    metrics = finetune(FinetuneRecipe.of(sections(tmp_path / "grid", seeds=1)), quiet=True)
    assert {r["learning_rate"] for r in metrics["results"]} == {1e-3}
    assert [t["validation_loss"] is None for t in metrics["tuning"]] == [False, True, False, True]
    with pytest.raises(Diverged, match=r"the loss of step 1 .*is not finite; no update was made; its examples: .*data.jsonl:\d+, .*no checkpoint was completed"):
        finetune(FinetuneRecipe.of(sections(tmp_path / "alone", learning_rates=[], learning_rate=3e-3)), quiet=True)
    with pytest.raises(Diverged, match=r"task.learning_rates: with 8 labels, scratch, none of 0.003 gave a finite loss"):
        finetune(FinetuneRecipe.of(sections(tmp_path / "none", learning_rates=[3e-3])), quiet=True)
    assert not list(tmp_path.glob("*/model.safetensors"))[1:]


def diverging(monkeypatch, rate):
    """The guard, before which the losses of runs with this rate become NaN."""
    from lmssl.watch import Guard

    original = Guard.on_pre_optimizer_step

    def on_pre_optimizer_step(self, args, *rest, **kwargs):
        if args.learning_rate == rate:
            self.losses[0] = self.losses[0] * float("nan")
        return original(self, args, *rest, **kwargs)

    return on_pre_optimizer_step


def test_the_command_line(sections, tmp_path, monkeypatch, capsys):
    import yaml

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(sections(tmp_path / "out", learning_rates=[])))
    with monkeypatch.context() as patch:
        kill_at(patch, 6, signal.SIGINT)
        assert run(["finetune", str(tmp_path / "r.yaml")]) == 130
    assert run(["finetune", str(tmp_path / "r.yaml")]) == 2
    assert run(["finetune", str(tmp_path / "r.yaml"), "--resume"]) == 0
    assert len(checkpoints.read_signed(tmp_path / "out" / "progress.json")["results"]) == 4


def test_a_curve_does_not_go_on_with_other_weights_or_other_data(sections, tmp_path):
    """What changed in its place, under the same names."""
    recipe = sections(tmp_path / "out", seeds=1)
    folder, data = tmp_path / "backbone", tmp_path / "data.jsonl"
    shutil.copytree(recipe["model"]["from"], folder)
    rows = Path(recipe["data"]["train"]).read_text().splitlines()
    data.write_text("\n".join(rows))
    recipe["model"]["from"], recipe["data"]["train"] = str(folder), str(data)
    finetune(FinetuneRecipe.of(recipe), quiet=True)
    again = lambda: finetune(FinetuneRecipe.of(recipe), resume=True, quiet=True)  # noqa: E731
    path = folder / "model.safetensors"
    before = path.read_bytes()
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.from changed"):
        again()
    path.write_bytes(before)
    data.write_text("\n".join([*rows, json.dumps({"text": "one more film", "label": 1})]))
    with pytest.raises(UserError, match=r"data\.train changed|data\.test changed"):
        again()
    data.write_text("\n".join(rows))
    again()


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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


def test_fewer_labels_of_another_recipe_train_their_model(backbone, files, tmp_path, monkeypatch):
    """The model in the folder was that of more labels, by the older recipe."""
    train, test, _ = files
    finetune(recipe(backbone, train, test, tmp_path / "out", labels=[8, 12]), quiet=True)
    fewer = recipe(backbone, train, test, tmp_path / "out", labels=[8], cue=" It was")
    original = Curve._result
    monkeypatch.setattr(Curve, "_result", lambda self, run: pytest.fail("not yet"))
    with pytest.raises(pytest.fail.Exception):
        finetune(fewer, resume=True, accept=("task.cue",), quiet=True)
    assert not (tmp_path / "out" / "model.safetensors").exists(), "what nothing describes any more"
    monkeypatch.setattr(Curve, "_result", original)
    assert finetune(fewer, resume=True, accept=("task.cue",), quiet=True)["saved_labels"] == 8
    finetune(recipe(backbone, train, test, tmp_path / "fresh", labels=[8], cue=" It was"), quiet=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "fresh" / "model.safetensors").read_bytes()


def test_all_differences_are_named_at_once(backbone, files, tmp_path):
    """What follows from another key (the number of the inputs' kind) comes last."""
    train, test, _ = files
    finetune(recipe(backbone, train, test, tmp_path / "out"), quiet=True)
    with pytest.raises(UserError, match=r"task.cue changed: .* --accept task.cue --accept task.learning_rates --accept inputs goes on all the same"):
        finetune(recipe(backbone, train, test, tmp_path / "out", cue=" It", learning_rates=[1e-3, 2e-3]), resume=True, quiet=True)
    with pytest.raises(UserError, match="inputs changed: the finished runs are of an lmssl that made other inputs"):
        finetune(recipe(backbone, train, test, tmp_path / "out", learning_rates=[1e-3, 2e-3]), resume=True, accept=("task.learning_rates",), quiet=True)
    with pytest.raises(UserError, match=r"task.metric changed: the finished runs were scored by accuracy"):
        finetune(recipe(backbone, train, test, tmp_path / "out", metric="macro_f1"), resume=True, quiet=True)


def test_the_saved_model_is_of_the_recipe_beside_it(backbone, files, tmp_path):
    """Another cue that is accepted: the model that `predict` gives the cue to was trained with it."""
    train, test, _ = files
    finetune(recipe(backbone, train, test, tmp_path / "out"), quiet=True)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    metrics = finetune(recipe(backbone, train, test, tmp_path / "out", cue=" It was"), resume=True, accept=("task.cue",), quiet=True)
    assert len(metrics["results"]) == 2
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert "task.cue was '', is ' It was'" in (tmp_path / "out" / "README.md").read_text()
    finetune(recipe(backbone, train, test, tmp_path / "fresh", cue=" It was"), quiet=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "fresh" / "model.safetensors").read_bytes()
