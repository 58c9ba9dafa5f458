"""What a run goes on from, and with: the item of the stream, the settings of today, a folder whose old run is removed in time."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback

import lmssl
from lmssl import arguments as sections
from lmssl import checkpoints, models
from lmssl.cli import run
from lmssl.data.stream import Stream
from lmssl.errors import Stopped, UserError
from lmssl.history import leak_check
from lmssl.objectives import Infilling, MaskedTokens, denoising
from lmssl.pretraining import PretrainTrainer
from lmssl.runs import pretrain
from lmssl.tasks.base import Example
from tests.helpers import SMALL, arguments, small_model, token_set
from tests.test_trainer import LENGTH, At, recipe_of, trainer_of, weights

SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("how", [str, lambda point: point, lambda point: True], ids=["text", "path", "true"])
def test_a_checkpoint_is_entered_at_its_item_however_it_is_named(how, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    whole = trainer_of("bert", tokens, tmp_path / "whole", max_steps=4)
    whole.run()
    first = trainer_of("bert", tokens, tmp_path / "cut", max_steps=4, **SAVING)
    first.add_callback(At(2, lambda control: setattr(control, "should_training_stop", True)))
    first.run()
    second = trainer_of("bert", tokens, tmp_path / "cut", max_steps=4, **SAVING)
    second.train(resume_from_checkpoint=how(second.resume_point()))
    assert all(torch.equal(value, second.model.state_dict()[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize("rows", [2, 8])
def test_another_batch_goes_on_at_the_next_item(rows, shared_dir, tmp_path, monkeypatch):
    """Three times as many steps as before, none of the stream read twice and none left out; and again behind that."""
    tokens, read = token_set(shared_dir), list[int]()
    monkeypatch.setattr(Stream, "__getitem__", lambda self, i, get=Stream.__getitem__: read.append(i) or get(self, i) if self.shuffled else get(self, i))
    trainer_of("bert", tokens, tmp_path, max_steps=2, per_device_train_batch_size=4, **SAVING).run()
    other = trainer_of("bert", tokens, tmp_path, max_steps=6, per_device_train_batch_size=rows, **SAVING)
    other.run(other.resume_point(("batch",)))
    assert sorted(set(read)) == list(range(2 * 4 + 4 * rows))
    assert len(read) == 2 * 4 + 4 * rows
    read.clear()
    last = trainer_of("bert", tokens, tmp_path, max_steps=8, per_device_train_batch_size=rows, **SAVING)
    last.run(last.resume_point())
    assert read == list(range(2 * 4 + 4 * rows, 2 * 4 + 6 * rows))
    items = last.items(6)
    assert items == range(2 * 4 + 4 * rows, 2 * 4 + 5 * rows)
    assert last.guard._replay(6) == f"its rows: lmssl show {tmp_path / 'recipe.yaml'} --at-item {items.start} --rows {rows}", "the rows that the step read"


def test_a_checkpoint_that_is_named_is_compared_too(shared_dir, tmp_path):
    """By its path as by `resume_point`: what differs is refused, and what was counted before is counted."""
    tokens = token_set(shared_dir)
    whole = trainer_of("bert", tokens, tmp_path / "a", max_steps=4, save_steps=2, **{k: v for k, v in SAVING.items() if k != "save_steps"})
    whole.run()
    for keys, message in (({"seed": 7}, "seed changed"), ({"per_device_train_batch_size": 2}, "batch changed"), ({"learning_rate": 5e-4}, "learning_rate changed")):
        for way in ("train", "run"):
            other = trainer_of("bert", tokens, tmp_path / "a", **({"max_steps": 4} | SAVING | keys))
            with pytest.raises(UserError, match=message):
                getattr(other, way)(str(tmp_path / "a" / "checkpoint-2"))
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    other = trainer_of("bert", tokens, tmp_path / "b", max_steps=4, **SAVING)
    other.train(str(tmp_path / "b" / "checkpoint-2"))
    assert other.metrics()["tokens"] == whole.metrics()["tokens"]
    for way in ("train", "run"):
        with pytest.raises(UserError, match="is no checkpoint"):
            getattr(trainer_of("bert", tokens, tmp_path / "b", max_steps=4, **SAVING), way)(str(tmp_path / "none"))
    again = trainer_of("bert", tokens, tmp_path / "b", max_steps=4, **SAVING)
    again.run(True)
    assert again.state.global_step == 4
    weights = tmp_path / "b" / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model.safetensors has .* bytes.*resume_point\(\) finds the newest whole one"):
        trainer_of("bert", tokens, tmp_path / "b", max_steps=4, **SAVING).run(tmp_path / "b" / "checkpoint-2")


def test_settings_are_those_of_the_run_that_goes_on(shared_dir, tmp_path):
    tokens, seen = token_set(shared_dir), []
    keys = {"lr_scheduler_type": "constant", "optimizer": "muon", "max_steps": 2, **SAVING}
    trainer_of("bert", tokens, tmp_path, learning_rate=1e-3, weight_decay=0.1, **keys).run()
    keys |= {"max_steps": 4, "learning_rate": 5e-4, "weight_decay": 0.0, "save_steps": 1}
    other = trainer_of("bert", tokens, tmp_path, **keys)
    with pytest.raises(UserError, match=r"learning_rate changed: checkpoint-2 has 0\.001, this run 0\.0005; --accept learning_rate"):
        other.resume_point()
    other.add_callback(
        type("See", (TrainerCallback,), {"on_step_end": lambda self, a, s, c, optimizer, **k: seen.append([(g["lr"], g["weight_decay"]) for g in optimizer.param_groups])})()
    )
    other.run(other.resume_point(("learning_rate", "weight_decay")))
    assert len(seen) == 2
    assert {pair for groups in seen for pair in groups} == {(5e-4, 0.0), (5e-4 * models.SLOW, 0.0)}, "BERT's positions are slow"
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["checkpoint-4", "checkpoint-3"], "saved at every step, as this run asks"


def test_whatever_decides_the_bits_of_a_run_is_compared(shared_dir, tmp_path):
    """Each alone is refused by its name, and can be accepted by it."""
    tokens = token_set(shared_dir)
    trainer_of("bert", tokens, tmp_path, max_steps=1, **SAVING | {"save_steps": 1}).run()
    of_the_text, of_the_run = {"data", "tokenizer", "tokens", "objective", "model", "batch", "seq_length"}, {"seed", "threads", "bf16", "fp16", "torch_compile"}
    of_the_steps = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "optim_args"}
    of_the_steps |= {"lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"}
    other = trainer_of("bert", tokens, tmp_path, max_steps=2, **SAVING)
    assert other.identity.keys() == {"optimizer"} | of_the_text | of_the_run | of_the_steps
    for key, value in other.identity.items():
        other.identity[key] = "another"
        with pytest.raises(UserError, match=f"{key} changed: checkpoint-1 has "):
            other.resume_point()
        if key not in ("optimizer", "model"):
            assert other.resume_point((key,)).name == "checkpoint-1"
        other.identity[key] = value
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert trainer_of("bert", tokens, tmp_path, max_steps=2).identity["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


def test_another_optimizer_is_one_line(shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    trainer_of("bert", tokens, tmp_path, "adamw", max_steps=2, **SAVING).run()
    other = trainer_of("bert", tokens, tmp_path, "muon", max_steps=4, **SAVING)
    with pytest.raises(UserError, match=r"optimizer changed: .*adamw_torch.*, this run muon; its state is of no use to this one; --overwrite begins anew"):
        other.resume_point()
    with pytest.raises(UserError, match="nothing is called 'optimizer'"):
        other.resume_point(("optimizer",))


def test_a_warm_up_that_follows_from_the_steps_may_change_with_them(shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    told = [trainer_of("bert", tokens, tmp_path, max_steps=n, warmup_steps=w).identity["warmup_steps"] for n, w in ((20, 2), (400, 40), (400, 0), (400, 100))]
    assert told == [None, None, None, 100]


def test_an_optimizer_of_one_s_own_is_told_from_others(shared_dir, tmp_path):
    """The run goes by the name of lmssl's own; the checkpoint knows better."""
    tokens = token_set(shared_dir)
    first = trainer_of("bert", tokens, tmp_path, max_steps=2, **SAVING)
    first.optimizer = torch.optim.SGD(first.model.parameters(), lr=0.1)
    first.run()
    other = trainer_of("bert", tokens, tmp_path, max_steps=4, **SAVING)
    with pytest.raises(UserError, match=r"checkpoint-2: its optimizer is another: SGD, this run's is AdamW"):
        other.run(other.resume_point())
    again = trainer_of("bert", tokens, tmp_path, max_steps=4, **SAVING)
    again.optimizer = torch.optim.SGD(again.model.parameters(), lr=0.1)
    again.run(again.resume_point())
    assert again.state.global_step == 4


def test_another_process_that_ended_is_one_line(shared_dir, tmp_path, monkeypatch):
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path, max_steps=2)

    def gone(*args, **keys):
        monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
        raise RuntimeError("[/pytorch/third_party/gloo] Connection closed by peer [127.0.1.1]:1")

    monkeypatch.setattr(trainer, "train", gone)
    with pytest.raises(Stopped, match=r"another process of this run ended, or cannot be reached: .*closed by peer.*; no checkpoint was completed before"):
        trainer.run()


def test_a_log_line_while_a_checkpoint_is_sealed_spoils_nothing(shared_dir, tmp_path, monkeypatch):
    """The manifest is written beside the training, whose curve grows meanwhile."""
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path, max_steps=2, **SAVING)
    real = json.dumps

    def dumps(value, **keys):
        if isinstance(value, dict) and "curve" in value:
            trainer.curve.append({"step": 99, "loss": 1.0})
            trainer.clock.other["saving"] += 1.0
        return real(value, **keys)

    monkeypatch.setattr(checkpoints.json, "dumps", dumps)
    trainer.run()
    manifest = checkpoints.verify(tmp_path / "checkpoint-2")
    assert all(entry["step"] <= 2 for entry in manifest["curve"])
    assert manifest["items"] == 2 * trainer.global_batch


def test_a_checkpoint_is_read_again_before_older_ones_go(shared_dir, tmp_path, monkeypatch):
    trainer_of("bert", token_set(shared_dir), tmp_path, max_steps=2, **SAVING).run()
    other = trainer_of("bert", token_set(shared_dir), tmp_path, max_steps=8, **SAVING)
    point = other.resume_point()
    monkeypatch.setattr(checkpoints, "_signed", lambda body, signed=checkpoints._signed: signed(body).replace('"step": 4', '"step": 5', 1) if body["step"] == 4 else signed(body))
    with pytest.raises(Stopped, match=r"the last checkpoint cannot be written: .*differs from its own sha256.*the last good checkpoint is .*checkpoint-2"):
        other.run(point)
    monkeypatch.undo()
    assert checkpoints.verify(tmp_path / "checkpoint-2")
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["checkpoint-2"]


def test_memory_that_does_not_suffice_names_the_checkpoint(shared_dir, tmp_path):
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path, max_steps=4, **SAVING)

    def full(control):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.add_callback(At(3, full))
    with pytest.raises(Stopped, match=r"a training step does not fit into memory: a smaller trainer.per_device_train_batch_size.*checkpoint-2"):
        trainer.run()


def test_the_held_out_loss_along_the_way_changes_nothing(corpus_file, tmp_path):
    plain = pretrain(recipe_of(corpus_file, tmp_path / "plain"), quiet=True)
    watched = pretrain(recipe_of(corpus_file, tmp_path / "watched", eval_strategy="steps", eval_steps=2), quiet=True)
    assert watched["held_out"] == plain["held_out"]
    points = [c for c in watched["curve"] if "held_out_loss" in c]
    assert [c["step"] for c in points] == [2, 4], "the final model is measured once"
    assert points[-1]["held_out_loss"] == watched["held_out"]["loss"]


def test_overwriting_begins_when_nothing_is_left_to_refuse(corpus_file, tmp_path, capsys):
    out = tmp_path / "run"
    pretrain(recipe_of(corpus_file, out), quiet=True)
    before = {p: p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.is_file()}
    recipe = out / "recipe.yaml"
    for wrong in (
        "data.text=nowhere.jsonl",
        "data.held_out=0.9999",
        "trainer.lr_scheduler_type=cosine_with_min_lr",
        "trainer.optimizer=adamw trainer.optim=adamw_bnb_8bit",
        f"model.from={out}",
    ):
        extra = [f"model.{key}=null" for key in recipe_of(corpus_file, out).model] if "from" in wrong else []
        assert run(["pretrain", str(recipe), "--overwrite", *wrong.split(), *extra]) == 2, wrong
        assert "Traceback" not in capsys.readouterr().err
        assert before == {p: p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.is_file()}, wrong


def test_an_old_model_is_not_taken_for_the_new_run_s(corpus_file, tmp_path):
    pretrain(recipe_of(corpus_file, tmp_path / "run"), quiet=True)
    with pytest.raises(Stopped):
        pretrain(recipe_of(corpus_file, tmp_path / "run", learning_rate=1e30), overwrite=True, quiet=True)
    assert not {p.name for p in (tmp_path / "run").iterdir()} & {"model.safetensors", "config.json", "metrics.json", "README.md"}


def test_a_run_by_epochs_is_finished_when_it_is(corpus_file, tmp_path):
    keys = {"num_train_epochs": 1, "save_strategy": "no"}
    recipe = recipe_of(corpus_file, tmp_path / "run", **keys)
    recipe.trainer.pop("max_steps")
    recipe.trainer["per_device_train_batch_size"] = 64
    first = pretrain(recipe, quiet=True)
    when = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    assert pretrain(recipe, resume=True, quiet=True) == first
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == when


def test_the_leak_check_knows_what_came_before(corpus_file, tmp_path):
    """Of a continued checkpoint the text of the first counts too; text that has changed is not taken for what was read."""
    texts = [json.loads(line)["text"] for line in corpus_file.read_text().splitlines()]
    first, other = tmp_path / "first.txt", tmp_path / "other.txt"
    first.write_text("\n".join(f"{text} {text}" for text in texts[:200]))
    other.write_text("\n".join(f"{n} is a number of its own, and so is {n + 1}; neither is a text that anybody else has" for n in range(200)))
    test = [Example(f"{text} {text}", "", f"t:{n}") for n, text in enumerate(texts[:50])]
    one = recipe_of(first, tmp_path / "one")
    pretrain(one, quiet=True)
    two = recipe_of(other, tmp_path / "two")
    two.model.clear()
    two.model["from"] = str(tmp_path / "one")
    pretrain(two, quiet=True)
    assert leak_check(str(tmp_path / "one"), test)["leaked"] >= 40
    assert leak_check(str(tmp_path / "two"), test)["leaked"] == leak_check(str(tmp_path / "one"), test)["leaked"]
    (tmp_path / "one" / "recipe.yaml").rename(tmp_path / "aside")
    assert "one has no recipe.yaml" in leak_check(str(tmp_path / "two"), test)["reason"]
    (tmp_path / "aside").rename(tmp_path / "one" / "recipe.yaml")
    (tmp_path / "two" / "recipe.yaml").write_text((tmp_path / "two" / "recipe.yaml").read_text().replace(str(tmp_path / "one"), str(tmp_path / "two")))
    assert "two was continued from what has been replaced since" in leak_check(str(tmp_path / "two"), test)["reason"]
    (tmp_path / "two" / "recipe.yaml").write_text((tmp_path / "two" / "recipe.yaml").read_text().replace(f"from: {tmp_path / 'two'}", f"from: {tmp_path / 'one'}"))
    first.write_text("\n".join(f"{n} stands here now, where {n + 1} stood before, and nobody will find it again" for n in range(200)))
    for folder in ("one", "two"):
        assert "one has changed since" in leak_check(str(tmp_path / folder), test)["reason"]


def test_a_text_that_took_another_s_place_is_no_proof_of_a_clean_test(corpus_file, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(corpus_file.read_text())
    pretrain(recipe_of(text, tmp_path / "run", save_strategy="steps", save_steps=2), quiet=True)
    assert leak_check(str(tmp_path / "run"), [Example("a film of eight words or some more", "", "")])["checked"]
    told = (tmp_path / "run" / "metrics.json").read_text()
    facts = json.loads(told)
    facts["data"]["tokens"] += 50  # what an older rule of `decontaminate` had left in
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(facts))
    assert "has changed since" in leak_check(str(tmp_path / "run"), [Example("a", "", "")])["reason"]
    (tmp_path / "run" / "metrics.json").write_text(told)
    text.write_text("".join(corpus_file.read_text().splitlines(True)[:-1]))
    longer = recipe_of(text, tmp_path / "run", max_steps=6, save_strategy="steps", save_steps=2)
    with pytest.raises(UserError, match="--accept data --accept tokens goes on all the same"):
        pretrain(longer, resume=True, quiet=True)
    metrics = pretrain(longer, resume=True, accept=("data", "tokens"), quiet=True)
    assert len(metrics["earlier_data"]) == 1
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-6"):
        assert "was another before the run was resumed" in leak_check(str(folder), [Example("a", "", "")])["reason"]
    longest = recipe_of(text, tmp_path / "run", max_steps=8, save_strategy="steps", save_steps=2)
    assert pretrain(longest, resume=True, quiet=True)["earlier_data"] == metrics["earlier_data"]


def test_a_checkpoint_along_the_way_is_used_like_the_final_model(corpus_file, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text(corpus_file.read_text())
    pretrain(recipe_of(text, tmp_path / "run", save_strategy="steps", save_steps=2), quiet=True)
    early = tmp_path / "run" / "checkpoint-2"
    assert AutoTokenizer.from_pretrained(early)("a film").input_ids == AutoTokenizer.from_pretrained(tmp_path / "run")("a film").input_ids
    assert run(["evaluate", str(early)]) == 0
    assert json.loads((early / "metrics.json").read_text())["held_out"]["loss"] > 0
    assert checkpoints.verify(early), "what was noted beside it is none of its files"
    assert leak_check(str(early), [Example("a film of eight words or some more", "", "")])["checked"]
    onwards = recipe_of(text, tmp_path / "onwards")
    onwards.model.clear()
    onwards.model["from"] = str(early)
    assert pretrain(onwards, quiet=True)["steps"] == 4
    text.write_text("".join(corpus_file.read_text().splitlines(True)[1:]))
    assert "has changed since" in leak_check(str(early), [Example("a film of eight words or some more", "", "")])["reason"]
    assert run(["evaluate", str(early)]) == 2
    assert "has changed since" in capsys.readouterr().err


def test_items_of_a_run(shared_dir, tmp_path):
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path, max_steps=5)
    assert [trainer.items(step).start for step in (0, 1, 5)] == [0, trainer.global_batch, 5 * trainer.global_batch]
    assert len(trainer.items(3)) == trainer.global_batch
    assert trainer.seq_length == LENGTH


def test_half_precision_is_part_of_what_a_run_is(shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    trainer_of("bert", tokens, tmp_path, max_steps=2, **SAVING).run()
    other = trainer_of("bert", tokens, tmp_path, max_steps=2, **SAVING)
    other.identity["fp16"] = True  # as on a GPU
    with pytest.raises(UserError, match="fp16 changed: checkpoint-2 has False, this run True"):
        other.resume_point()
    with pytest.raises(UserError, match=r"trainer.fp16: half precision needs a GPU"):
        trainer_of("bert", tokens, tmp_path, max_steps=2, fp16=True, **SAVING)


def test_what_a_launcher_was_told_changes_no_run(shared_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "true")
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path)
    assert trainer.accelerator.mixed_precision == "no"
    plugin = trainer.accelerator.state.dynamo_plugin
    assert (plugin.backend.value, plugin.mode, plugin.fullgraph) == ("NO", "default", False)


@pytest.mark.parametrize("field", ["save_only_model", "label_smoothing_factor", "bf16_full_eval"])
def test_from_python_too_what_would_not_be_given_is_refused(field, shared_dir, tmp_path):
    with pytest.raises(UserError, match=f"{field}: not to be set: "):
        trainer_of("bert", token_set(shared_dir), tmp_path, **{field: 0.1 if "factor" in field else True})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "gradient_accumulation_kwargs is not to be set"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches is not to be set"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=true is not supported"),
    ],
)
def test_from_python_too_what_would_be_another_run_is_refused(keys, message, shared_dir, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer_of("bert", token_set(shared_dir), tmp_path, **keys)


def test_processes_that_no_group_holds_together_are_refused(shared_dir, tmp_path, monkeypatch):
    """A Mac, or a GPU run's recipe on CPUs: each process would be the first of a run of its own, all in one folder."""
    tokens, args = token_set(shared_dir), arguments(tmp_path)
    model = small_model("bert", tokens.vocab(), LENGTH)
    monkeypatch.setenv("WORLD_SIZE", "2")  # no group is begun: the arguments are there already
    with pytest.raises(UserError, match=r"2 processes were started \(WORLD_SIZE\), of which 1 can train together on this device: trainer.use_cpu=true"):
        sections.check(args)
    with pytest.raises(UserError, match="2 processes were started"):
        lmssl.PretrainTrainer(model, MaskedTokens(), tokens, args, LENGTH, quiet=True)


def test_bits_per_byte_are_of_all_ranks(shared_dir, tmp_path, monkeypatch):
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path)
    monkeypatch.setattr(trainer, "summed", lambda value: value + torch.tensor([10.0, 90.0], dtype=torch.float64))
    trainer.asked[:] = torch.tensor([10, 10])
    assert trainer.bits_per_byte(1.0) == pytest.approx(20 / math.log(2) / 100)
    assert trainer.asked.tolist() == [0, 0]


def test_a_run_is_judged_by_its_own_held_out_text(shared_dir, tmp_path):
    """In float32, whatever accelerate has put around the forward pass."""
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path)
    expected = trainer.evaluate()["eval_loss"]
    trainer.model.forward = wrapped = lambda **inputs: pytest.fail("asked")
    assert trainer.evaluate()["eval_loss"] == expected
    assert trainer.model.forward is wrapped
    with pytest.raises(UserError, match="eval_dataset: "):
        trainer.evaluate(eval_dataset=[])


def test_ranks_that_do_not_seal_know_the_last_checkpoint_too(shared_dir, tmp_path, monkeypatch):
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path, max_steps=2, **SAVING)
    trainer.run()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer._known_good.clear()
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-2'}" in str(trainer.stopped("nothing"))


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


def test_rows_of_another_length_are_another_run(shared_dir, tmp_path, monkeypatch):
    """As of a checkpoint from before span corruption's rows left room for borders: what is called the same objective reads other tokens."""
    tokens, keys = token_set(shared_dir), {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    with monkeypatch.context() as before:
        before.setattr(denoising, "ROOM", 0)
        trainer_of("t5", tokens, tmp_path, **keys).run()
    with pytest.raises(UserError, match=r"objective changed: .*--accept objective"):
        trainer_of("t5", tokens, tmp_path, **keys).resume_point()


def test_going_back_to_an_older_checkpoint_is_warned_of(shared_dir, tmp_path, caplog):
    tokens, keys = token_set(shared_dir), {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer_of("bert", tokens, tmp_path, **keys).run()
    trainer = trainer_of("bert", tokens, tmp_path, **keys)
    trainer.run(tmp_path / "checkpoint-2")
    assert "checkpoint-2: newer checkpoints lie beside it (checkpoint-3), which the next --resume takes" in caplog.text


def test_what_is_timed_is_what_counts(shared_dir, tmp_path):
    """Tokens a second of a compiled run: the first step's time and its tokens are left out, over a resume too."""
    tokens, keys = token_set(shared_dir), {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = trainer_of("bert", tokens, tmp_path, **keys)
    trainer.args.torch_compile = True  # as the watch sees it; nothing is compiled
    trainer.run()
    assert trainer.untimed == [trainer._total_tokens() // 4, 1]
    trainer.flops, trainer.peak = 1.0, 3 * trainer.global_batch / trainer.clock.seconds
    assert trainer.metrics()["matmul_share"] == pytest.approx(1.0, abs=1e-3)
    assert trainer.metrics()["tokens_per_second"] == pytest.approx(trainer._total_tokens() * 3 / 4 / trainer.clock.seconds, rel=0.01)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = trainer_of("bert", tokens, tmp_path, **keys)
    resumed.args.torch_compile = resumed.args.eval_on_start = True
    resumed.run(resumed.resume_point())
    assert resumed.untimed == [resumed._total_tokens() // 2, 2]
    assert not any("held_out_loss" in point for point in resumed.curve), "what is measured before the first step is not measured again"
