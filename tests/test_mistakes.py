"""What a newcomer types: each mistake is one line with a way out, and what they may expect to work works."""

import importlib.util
import json
import os
import re
import shutil
import sys

import pytest

import lmssl
from lmssl import PretrainTrainer, arguments, config, models
from lmssl.cli import run
from lmssl.config import apply_overrides
from lmssl.errors import UserError, said
from lmssl.objectives import NextToken
from lmssl.tasks import curve
from lmssl.tasks.sentiment import Sentiment
from tests import helpers
from tests.helpers import sentences, small_model, token_set
from tests.test_trainer import recipe_of


def written(recipe, path):
    """A typed recipe as a file."""
    sections = {"data": {"text": recipe.data.text, "tokenizer": recipe.data.tokenizer, "seq_length": 32, "held_out": 0.1}, "model": recipe.model, "objective": recipe.objective}
    path.write_text(json.dumps(sections | {"trainer": recipe.trainer}))
    return str(path)


def refusal(capsys, *args):
    assert run([str(a) for a in args]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("lmssl: error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("trainer.save_strategy=best", "trainer.save_strategy: a run is one pass"),
        ("trainer.neftune_noise_alpha=-1", "trainer.neftune_noise_alpha: -1.0 must be at least 0"),
        ("trainer.gradient_checkpointing_kwargs=x", "checkpointing_kwargs: "),
        ("trainer.gradient_checkpointing_kwargs.foo=1", "checkpointing_kwargs.foo: unknown key"),
        ("trainer.gradient_checkpointing_kwargs.every_n_layers=0", "checkpointing_kwargs: every_n_layers=0 must be a whole number above 0"),
        ("trainer.gradient_checkpointing_kwargs.every_n_layers=x", "checkpointing_kwargs: every_n_layers=x must be a whole number above 0"),
        ("trainer.lr_scheduler_type=cosine_with_restarts trainer.lr_scheduler_kwargs.num_cycles=a", "trainer.lr_scheduler_type: cosine_with_restarts .*"),
        ("trainer.lr_scheduler_type=cosin", "trainer.lr_scheduler_type: nothing is called 'cosin'; did you mean 'cosine'"),
        ("trainer.torch_compile_mode=fast", "trainer.torch_compile_mode: Unrecognized mode=fast"),
        ("trainer.use_liger_kernel=true", "trainer.use_liger_kernel: the package is missing"),
        ("model.chunk_size_feed_forward=7", "model: this 'bert' cannot read a row of packed documents: .*chunk"),
        ("model.architecture=mra", "'mra': its attention is a CUDA kernel of its own"),
        ("trainer.save_strategy=epoch", "use steps, and save_steps"),
        ("trainer.logging_strategy=epoch", "use steps, and logging_steps"),
        ("trainer.lr_scheduler_type=cosine_with_min_lr", "trainer.lr_scheduler_type: cosine_with_min_lr .*min_lr"),
        ("trainer.lr_scheduler_type=warmup_stable_decay", "trainer.lr_scheduler_type: warmup_stable_decay .*num_decay_steps"),
        ("trainer.optim=sgd", "trainer.optim: configures AdamW and its kin, but the optimizer is muon"),
        ("trainer.max_step=null", "trainer.max_step: unknown key; did you mean 'max_steps'"),
        ("data.seq_lenth=null", "data.seq_lenth: unknown key; did you mean 'seq_length'"),
        ("data.text=null", "data.text: missing"),
        ("trainer.data_seed=7", "trainer.data_seed: not to be set"),
        ("trainer.save_only_model=true", "cannot be resumed"),
        ("trainer.dataloader_in_order=false", "not to be set: the stream decides the order"),
        ("trainer.bf16_full_eval=true", "not to be set: held-out text is measured in float32"),
        ("trainer.metric_for_best_model=accuracy", "not to be set: the final model is the last one"),
        ("trainer.dataloader_persistent_workers=true", "trainer.dataloader_persistent_workers: there are no workers"),
        ("model.architecture=qwen2 objective.name=next_token", "transformers reads every tokenizer of a 'qwen2'"),
        ("trainer.fsdp=full_shard", "every process holds the whole model"),
        ("trainer.optimizer=adamw trainer.optim=adamw_bnb_8bit", "trainer.optim: .*bitsandbytes"),
        ("trainer.fp16=true trainer.bf16=false", "trainer.fp16: half precision needs a GPU"),
        ("trainer.torch_compile_mode=default trainer.torch_compile=false", "trainer.torch_compile_mode: says how to compile"),
        ("trainer.accelerator_config={gradient_accumulation_kwargs:{num_steps:4}}", "gradient_accumulation_kwargs is not to be set"),
        ("trainer.report_to=wandb", "trainer: .*(?i:wandb)"),
        ("data.held_out=SHORT", "data.held_out: masked asks for no token of the held-out text"),
        ("data.tokenizer=runs/tokenizer", "train one with: lmssl tokenizer TEXT --out runs/tokenizer"),
    ],
)
def test_settings_that_cannot_work_are_one_line(overrides, message, corpus_file, tmp_path, capsys):
    if any(setting in overrides and importlib.util.find_spec(package) for setting, package in (("wandb", "wandb"), ("bnb", "bitsandbytes"), ("liger", "liger_kernel"))):
        pytest.skip("installed here")
    recipe = written(recipe_of(corpus_file, tmp_path / "run"), tmp_path / "r.yaml")
    (tmp_path / "short.txt").write_text("a\n")
    assert re.search(message, refusal(capsys, "pretrain", recipe, *overrides.replace("SHORT", str(tmp_path / "short.txt")).split()))


def test_settings_that_work(corpus_file, tmp_path, capsys):
    recipe = written(recipe_of(corpus_file, tmp_path / "run"), tmp_path / "r.yaml")
    stable = "trainer.lr_scheduler_type=warmup_stable_decay trainer.lr_scheduler_kwargs.num_decay_steps=1"
    epochs = "trainer.max_steps=null trainer.num_train_epochs=0.02"
    for overrides in (
        stable,
        epochs,
        "data.held_out=null model.pad_token_id=null model.init=null model.initializer_range=null model.attn_implementation=null trainer.report_to=null trainer.optim=null",
        "trainer.lr_scheduler_type=cosine trainer.lr_scheduler_kwargs.num_cycles=null",
        "trainer.adam_epsilon=0.1",
    ):
        assert run(["pretrain", recipe, "--overwrite", *overrides.split()]) == 0, capsys.readouterr().err
    large = json.loads((tmp_path / "run" / "metrics.json").read_text())["held_out"]["loss"]
    assert run(["pretrain", recipe, "--overwrite"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["held_out"]["loss"] != large, "epsilon counts under muon too"


@pytest.fixture(scope="module")
def sentiment(corpus_file, tmp_path_factory):
    """A pretrained and a fine-tuned model, both of a few steps, and its labelled rows."""
    folder = tmp_path_factory.mktemp("tuned")
    recipe = written(recipe_of(corpus_file, folder / "run"), folder / "r.yaml")
    assert run(["pretrain", recipe]) == 0
    rows = [(text, "good" if n % 2 else "bad") for n, text in enumerate(dict.fromkeys(sentences(60, seed=5)))]
    (folder / "rows.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    task = "task: {name: sentiment, labels: [8], seeds: 1}\n"
    (folder / "f.yaml").write_text(
        task + f"data: {{train: '{folder / 'rows.tsv'}::#', test: 20}}\nmodel: {{from: {folder / 'run'}}}\ntrainer: {{output_dir: {folder / 'sent'}, max_steps: 2}}\n"
    )
    assert run(["finetune", str(folder / "f.yaml"), "task.text=#1", "task.label=#2"]) == 0
    return folder


def test_a_fine_tuned_model_is_scored_on_labelled_files(sentiment, capsys):
    capsys.readouterr()
    rows = [line.split("\t") for line in (sentiment / "rows.tsv").read_text().splitlines()][:30]
    (sentiment / "new.csv").write_text("review,class\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    names = ["task.text=review", "task.label=class"]
    assert run(["evaluate", str(sentiment / "sent"), f"data.test={sentiment / 'new.csv'}", *names]) == 0
    said = capsys.readouterr().out
    assert run(["predict", str(sentiment / "sent"), str(sentiment / "new.csv"), names[0]]) == 0
    guesses = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    right = sum(guess == label for guess, (_, label) in zip(guesses, rows, strict=True)) / len(rows)
    assert said.startswith(f"accuracy {100 * right:.2f}, macro_f1 ")
    saved = json.loads((sentiment / "sent" / "metrics.json").read_text())
    assert saved["evaluated"][str(sentiment / "new.csv")]["accuracy"] == pytest.approx(right)
    assert len(saved["results"]) == 2
    assert "data.test: missing; " in refusal(capsys, "evaluate", sentiment / "sent")
    assert "data.test: 0.2 names no file; " in refusal(capsys, "evaluate", sentiment / "sent", "data.test=0.2")
    for made in ("sent", "run"):
        assert "trainer.per_device_eval_batchsize: unknown key; did you mean" in refusal(capsys, "evaluate", sentiment / made, "trainer.per_device_eval_batchsize=8")
    assert "--out: no such folder: " in refusal(capsys, "predict", sentiment / "sent", sentiment / "new.csv", "--out", sentiment / "none" / "x.jsonl")
    (sentiment / "other.csv").write_text("review,class\nfine,neutral\n")
    assert "other.csv:2: the class 'neutral' is none of the model's (bad, good)" in refusal(capsys, "evaluate", sentiment / "sent", f"data.test={sentiment / 'other.csv'}", *names)


@pytest.mark.parametrize(("verb", "made", "section"), [("predict", "sent", "task"), ("evaluate", "sent", "task"), ("evaluate", "run", "objective")])
def test_code_that_a_checkpoint_names_is_not_run(verb, made, section, sentiment, tmp_path, monkeypatch, capsys):
    """Unless the command line names it too: checkpoints are handed around, with whatever lies in their folder."""
    shutil.copytree(sentiment / made, tmp_path / f"from_{made}_{verb}")
    folder, mark = tmp_path / f"from_{made}_{verb}", tmp_path / "mark"
    (folder / "helper.py").write_text(f"open({str(mark)!r}, 'w')\n")
    name = f"{folder.name}.helper:X"
    (folder / "recipe.yaml").write_text(config.dump(sections := config.of_folder(folder)).replace(f"name: {sections[section]['name']}", f"name: {name}"))
    (tmp_path / "new.csv").write_text("#1,#2\na film,good\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    rest = ["new.csv"] if verb == "predict" else ["data.test=new.csv"] if made == "sent" else []
    assert f"{folder.name}: its recipe.yaml asks for code outside of lmssl, '{name}'; if you trust it: {section}.name={name}" in refusal(capsys, verb, folder.name, *rest)
    assert not mark.exists()
    assert f"{section}.name: '{name}' cannot be imported: AttributeError" in refusal(capsys, verb, folder.name, *rest, f"{section}.name={name}")
    assert mark.exists()


def test_a_task_of_one_s_own_may_be_named_by_an_option(sentiment, tmp_path, capsys):
    """That is the command line's word, too."""
    shutil.copytree(sentiment / "sent", tmp_path / "own")
    text = (tmp_path / "own" / "recipe.yaml").read_text()
    (tmp_path / "own" / "recipe.yaml").write_text(text.replace("name: sentiment", "name: lmssl.tasks.sentiment:Sentiment"))
    (tmp_path / "new.csv").write_text("#1\na film\n")
    assert run(["predict", str(tmp_path / "own"), str(tmp_path / "new.csv"), "--task", "lmssl.tasks.sentiment:Sentiment"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("bad", "good")


def test_a_column_behind_a_labelled_file_is_refused(sentiment, capsys):
    """Not read: a wrong column would be taken without a word."""
    (sentiment / "two.csv").write_text("text,review,label\n" + "".join(f"{text},x,{n % 2}\n" for n, text in enumerate(sentences(40))))
    for args in (
        ("finetune", sentiment / "f.yaml", "--overwrite", f"data.train={sentiment / 'two.csv'}::review"),
        ("predict", sentiment / "sent", f"{sentiment / 'two.csv'}::review"),
        ("evaluate", sentiment / "run", "--pairs", f"{sentiment / 'two.csv'}::review"),
    ):
        assert "two.csv::review: a column is not to be named here" in refusal(capsys, *args)
    assert (sentiment / "sent" / "metrics.json").is_file()


def test_predictions_replace_a_file_when_they_are_whole(sentiment, capsys):
    out = sentiment / "labels.jsonl"
    out.write_text("mine\n")
    (sentiment / "late.jsonl").write_text('{"#1": "a film"}\n' * 600 + '{"#1": 3}\n')
    said = refusal(capsys, "predict", sentiment / "sent", sentiment / "late.jsonl", "--out", out)
    assert "late.jsonl:601" in said
    assert f"the predictions before it are in {out}.part" in said
    assert out.read_text() == "mine\n"
    assert all("label" in json.loads(line) for line in (sentiment / "labels.jsonl.part").read_text().splitlines())
    (sentiment / "late.jsonl").write_text('{"#1": "a film"}\n' * 600)
    assert run(["predict", str(sentiment / "sent"), str(sentiment / "late.jsonl"), "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 600
    assert not list(sentiment.glob("*.part"))
    link, elsewhere = sentiment / "link.jsonl", sentiment / "elsewhere.jsonl"
    link.symlink_to(elsewhere)
    assert run(["predict", str(sentiment / "sent"), str(sentiment / "late.jsonl"), "--out", str(link)]) == 0
    assert link.is_symlink()
    assert elsewhere.read_text() == out.read_text()
    assert run(["predict", str(sentiment / "sent"), str(sentiment / "late.jsonl"), "--out", os.devnull]) == 0
    assert not os.path.isfile(os.devnull)


def test_bad_records_are_left_out_wherever_text_is_read(sentiment, tmp_path, capsys):
    (tmp_path / "mixed.txt").write_bytes("\n".join(sentences(300)).encode() + b"\ncaf\xe9\n")
    asked = refusal(capsys, "tokenizer", tmp_path / "mixed.txt", "--out", tmp_path / "tok", "--size", "600")
    assert "convert the file to UTF-8 (--skip-bad-records leaves such records out)" in asked
    assert run(["tokenizer", str(tmp_path / "mixed.txt"), "--out", str(tmp_path / "tok"), "--size", "600", "--skip-bad-records"]) == 0
    assert "1 bad records skipped, the first" in capsys.readouterr().out
    other = ("evaluate", sentiment / "run", f"data.text={tmp_path / 'mixed.txt'}")
    assert "data.on_bad_record=skip leaves such records out" in refusal(capsys, *other)
    assert run([*map(str, other), "data.on_bad_record=skip"]) == 0


def test_a_run_of_the_other_kind_is_not_resumed(sentiment, corpus_file, tmp_path, capsys):
    shutil.copytree(sentiment / "run", tmp_path / "run")
    shutil.copytree(sentiment / "sent", tmp_path / "sent")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")}
    columns = ("task.text=#1", "task.label=#2")
    for more in ((), ("--resume",)):
        assert "holds a pretrained model; name another folder" in refusal(
            capsys, "finetune", sentiment / "f.yaml", f"model.from={sentiment / 'run'}", f"trainer.output_dir={tmp_path / 'run'}", *columns, *more
        )
        assert "holds a fine-tuned model; name another folder" in refusal(capsys, "pretrain", sentiment / "r.yaml", f"trainer.output_dir={tmp_path / 'sent'}", *more)
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    gone = refusal(capsys, "pretrain", sentiment / "r.yaml", f"trainer.output_dir={tmp_path / 'run'}", "trainer.max_steps=9", "--resume")
    assert "is finished at step 4, and its checkpoints are gone" in gone
    assert all(p.read_bytes() == content for p, content in before.items() if p.exists())


def test_what_was_scored_stays(sentiment, tmp_path, capsys):
    shutil.copytree(sentiment / "sent", tmp_path / "sent")
    args = [str(sentiment / "f.yaml"), f"trainer.output_dir={tmp_path / 'sent'}", "task.text=#1", "task.label=#2"]
    assert run(["evaluate", str(tmp_path / "sent"), f"data.test={sentiment / 'rows.tsv'}::#"]) == 0
    before = json.loads((tmp_path / "sent" / "metrics.json").read_text())["evaluated"]
    assert run(["finetune", *args, "--resume"]) == 0
    assert json.loads((tmp_path / "sent" / "metrics.json").read_text())["evaluated"] == before
    assert run(["finetune", *args, "--resume", "task.labels=[8,16]"]) == 0
    assert "evaluated" not in json.loads((tmp_path / "sent" / "metrics.json").read_text()), "another model lies there now"
    assert "has changed since" not in capsys.readouterr().err


def test_a_text_that_changed_is_not_measured_in_its_place(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("\n".join(sentences(120)))
    recipe = written(recipe_of(tmp_path / "x.txt", tmp_path / "run"), tmp_path / "r.yaml")
    assert run(["pretrain", recipe]) == 0
    before = (tmp_path / "run" / "metrics.json").read_text()
    (tmp_path / "x.txt").write_text("\n".join(sentences(130, seed=7)))
    assert "the text of" in refusal(capsys, "evaluate", tmp_path / "run")
    assert (tmp_path / "run" / "metrics.json").read_text() == before


def test_white_space_of_a_value_stays():
    made = apply_overrides({}, ["task.cue= Overall, it was", "task.separator= ", "task.n= 3", 'task.quoted=" x"', "task.empty=''", "task.list=[ a]"], ("task",))["task"]
    assert made == {"cue": " Overall, it was", "separator": " ", "n": 3, "quoted": " x", "empty": "", "list": ["a"]}
    with pytest.raises(UserError, match=r"'data\.test=': an empty value; data\.test=null takes the default"):
        apply_overrides({}, ["data.test="], ("data",))


@pytest.mark.parametrize("text", [" #sentiment", " It was #1", " # ", " | ", " Sentiment:", " the verdict: ", "*.jsonl", "file.csv::#1"])
def test_a_cue_means_what_it_says(text):
    """What YAML would read as a comment, a block or a mapping."""
    assert apply_overrides({"task": {"cue": "another"}}, [f"task.cue={text}"], ("task",))["task"]["cue"] == text
    assert apply_overrides({}, ['objective.a={b: "x: #y"}'], ("objective",))["objective"]["a"] == {"b": "x: #y"}


def test_fine_tuning_a_fine_tuned_model_says_so(sentiment, tmp_path, capsys):
    rows = [f"{text}\t{'abc'[n % 3]}\n" for n, text in enumerate(dict.fromkeys(sentences(60, seed=5)))]
    (tmp_path / "three.tsv").write_text("".join(rows))
    args = [str(sentiment / "f.yaml"), f"model.from={sentiment / 'sent'}", f"trainer.output_dir={tmp_path / 'out'}", "task.text=#1", "task.label=#2"]
    assert run(["finetune", *args]) == 0
    assert "was fine-tuned, and what it has seen since its pretraining is not known" in json.loads((tmp_path / "out" / "metrics.json").read_text())["leaks"]["reason"]
    assert "of a head for other classes" in refusal(capsys, "finetune", *args, "--overwrite", f"data.train={tmp_path / 'three.tsv'}::#")


def test_nothing_is_removed_for_a_backbone_that_cannot_be_loaded(sentiment, capsys):
    spoilt = sentiment / "spoilt"
    shutil.copytree(sentiment / "run", spoilt)
    (spoilt / "model.safetensors").write_bytes(b"no weights")
    assert "the weights cannot be loaded" in refusal(capsys, "finetune", sentiment / "f.yaml", "--overwrite", f"model.from={spoilt}", "task.text=#1", "task.label=#2")
    assert (sentiment / "sent" / "metrics.json").is_file()
    assert (sentiment / "sent" / "model.safetensors").is_file()


def test_texts_that_stand_twice(tmp_path, caplog):
    from lmssl.data import corpus

    caplog.set_level("INFO", "lmssl")
    (tmp_path / "x.csv").write_text("text,label\na film,pos\na film,neg\na film,pos\nanother,neg\n")
    assert [e.label for e in Sentiment().read(corpus.resolve(str(tmp_path / "x.csv")))] == ["pos", "neg"]
    assert "2 examples whose text stands twice dropped" in caplog.text
    assert "1 texts stand twice with different classes; the first counts: " in caplog.text


def test_texts_without_a_word_have_no_baseline(sentiment, caplog):
    rows = [(" ".join("ACGT"[(n >> k) % 4] for k in range(0, 12, 2)), n % 2) for n in range(200)]
    (sentiment / "chars.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    args = [f"data.train={sentiment / 'chars.csv'}", f"trainer.output_dir={sentiment / 'chars'}", "data.test=20"]
    assert run(["finetune", str(sentiment / "f.yaml"), *args]) == 0
    assert "no TF-IDF baseline: " in caplog.text
    assert "baselines" not in json.loads((sentiment / "chars" / "metrics.json").read_text())


def test_an_objective_in_the_working_folder(corpus_file, tmp_path, monkeypatch):
    (tmp_path / "my_objective.py").write_text(
        "from dataclasses import dataclass\nfrom lmssl.objectives import MaskedTokens\n\n\n@dataclass(frozen=True, slots=True)\nclass Mine(MaskedTokens):\n    pass\n"
    )
    recipe = written(recipe_of(corpus_file, tmp_path / "run", max_steps=1), tmp_path / "r.yaml")
    tokenizer = os.path.abspath("tokenizer_assets/bpe-8k")
    monkeypatch.chdir(tmp_path)
    assert run(["pretrain", recipe, "objective.name=my_objective:Mine", f"data.tokenizer={tokenizer}"]) == 0


def test_a_mistake_is_said_once_a_machine(corpus_file, tmp_path, monkeypatch, capsys):
    """What is wrong may be wrong on the second machine alone, whose ranks begin at 4."""
    recipe = written(recipe_of(corpus_file, tmp_path / "run"), tmp_path / "r.yaml")
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "no such folder" in refusal(capsys, "pretrain", recipe, "data.tokenizer=./nowhere")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(["pretrain", recipe, "data.tokenizer=./nowhere"]) == 2
    assert not capsys.readouterr().err


def test_the_backbone_is_not_removed_with_the_old_run(corpus_file, sentiment, tmp_path, capsys):
    recipe = recipe_of(corpus_file, tmp_path / "run", save_strategy="steps", save_steps=2)
    assert run(["pretrain", written(recipe, tmp_path / "r.yaml")]) == 0
    backbone = tmp_path / "run" / "checkpoint-2"
    args = ["--overwrite", f"model.from={backbone}", f"trainer.output_dir={tmp_path / 'run'}"]
    assert "the backbone in model.from, would be overwritten" in refusal(capsys, "finetune", sentiment / "f.yaml", *args)
    assert (backbone / "model.safetensors").is_file()


def test_more_processes_than_gpus(corpus_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    overrides = [f"data.text={corpus_file}", f"trainer.output_dir={tmp_path / 'run'}"]
    line = refusal(capsys, "pretrain", "recipes/pretrain/quickstart.yaml", *overrides, "trainer.use_cpu=false")
    assert "trainer: 2 processes were started on a machine with 1 GPU: torchrun --nproc-per-node 1 (accelerate launch --num_processes 1), or trainer.use_cpu=true" in line


def test_what_an_exception_says():
    assert said(ValueError("one\ntwo")) == "one"
    assert said(AssertionError()) == "AssertionError"
    assert said(ValueError("x" * 500), 20) == "x" * 20


def test_weights_that_are_not_those_that_train_are_refused():
    with pytest.raises(UserError, match=r"trainer\.optim: schedule-free"):
        arguments.resolve({"output_dir": "x", "max_steps": 1, "optimizer": "adamw", "optim": "schedule_free_adamw"}, arguments.pretrain_defaults(False))


def test_a_folder_may_be_called_by_a_number():
    assert arguments.resolve({"output_dir": 2024, "max_steps": 1}, arguments.pretrain_defaults(False))["output_dir"] == "2024"


def test_no_labelled_example_is_said():
    with pytest.raises(UserError, match=r"data\.train: no labelled example"):
        curve.check(Sentiment(), [], [])


def test_a_recipe_may_be_named_by_its_file(corpus_file, tmp_path):
    recipe = written(recipe_of(corpus_file, tmp_path / "run"), tmp_path / "r.yaml")
    assert lmssl.pretrain(recipe, quiet=True)["steps"] == 4


def test_a_resumed_run_is_not_shorter_than_what_is_done(corpus_file, tmp_path, capsys):
    """Its recipe would say fewer steps than the model has had."""
    recipe, out = written(recipe_of(corpus_file, tmp_path / "run"), tmp_path / "r.yaml"), tmp_path / "run"
    assert run(["pretrain", recipe, "trainer.max_steps=4", "trainer.save_steps=2"]) == 0
    assert "save_steps: 2\n" in (out / "recipe.yaml").read_text()
    (out / "metrics.json").unlink()  # as if it had been stopped
    said = (out / "recipe.yaml").read_text()
    assert "trainer.max_steps: 3, but checkpoint-4 has more behind it" in refusal(capsys, "pretrain", recipe, "--resume", "trainer.max_steps=3")
    assert (out / "recipe.yaml").read_text() == said


def test_a_decoder_that_sees_what_comes_is_refused(tmp_path):
    """There is nothing to predict for it; what makes it see is one flag of its configuration."""
    tokens = token_set(tmp_path)
    section = {"architecture": "gemma3_text", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    for seeing in (False, True):
        model = models.build(section | {"use_bidirectional_attention": seeing}, tokens.vocab(), NextToken(), 32, 0)
        if seeing:
            with pytest.raises(UserError, match="tokens see later ones in this 'gemma3_text'"):
                PretrainTrainer(model, NextToken(), tokens, helpers.arguments(tmp_path / "out"), 32, quiet=True)
        else:
            PretrainTrainer(model, NextToken(), tokens, helpers.arguments(tmp_path / "out"), 32, quiet=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pad_token_id": 7}, "model.pad_token_id: 7, but the tokenizer says 0; leave it out"),
        ({"eos_token_id": 9}, "model.eos_token_id: 9, but the tokenizer says "),
        ({"attn_implementation": "flex_attention"}, "flex_attention cannot be trained on a CPU"),
    ],
)
def test_a_model_section_that_would_mean_something_else(keys, message, shared_dir):
    with pytest.raises(UserError, match=message):
        small_model("bert", token_set(shared_dir).vocab(), **keys)
