"""The command line as a user meets it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from lmssl.cli import run
from lmssl.data.tokens import TokenSet
from tests.helpers import sentences

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))  # accelerate/ holds hardware
PRETRAIN = [p for p in RECIPES if p.parent.name == "pretrain"]
QUICKSTART = ROOT / "recipes" / "pretrain" / "quickstart.yaml"
FINETUNE_QUICKSTART = ROOT / "recipes" / "finetune" / "quickstart.yaml"
FINETUNE = [p for p in RECIPES if p.parent.name == "finetune"]


def lmssl(*args, **env):
    return subprocess.run([sys.executable, "-m", "lmssl", *map(str, args)], capture_output=True, text=True, cwd=ROOT, env=os.environ | env, timeout=240)


def test_help_imports_nothing_heavy():
    code = "import json, sys; from lmssl import cli\ntry: cli.run(['--help'])\nexcept SystemExit: print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()[-1])
    assert not {"torch", "transformers", "datasets", "numpy", "yaml", "pydantic"} & set(loaded)
    result = lmssl("--help")
    assert all(verb in result.stdout for verb in ("tokenizer", "prepare", "show", "pretrain", "finetune", "predict", "evaluate", "report"))


def test_prepare_needs_neither_torch_nor_transformers(corpus_file, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"data: {{text: {corpus_file}, tokenizer: tokenizer_assets/bpe-8k}}\nmodel: {{architecture: bert}}\nobjective: {{name: masked}}\ntrainer: {{output_dir: {tmp_path}}}\n"
    )
    code = "import sys; from lmssl.cli import run; s = run(['prepare', sys.argv[1]]); assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(s)"
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "exact duplicates dropped" in done.stdout
    folder = Path(done.stdout.strip().splitlines()[-1].rpartition(" in ")[2])
    assert TokenSet(folder).documents > 300


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda p: p.stem)
def test_every_pretraining_recipe_runs_two_steps(path, corpus_file, tmp_path, capsys):
    out = tmp_path / "run"
    data = [f"data.text={corpus_file}", "data.tokenizer=tokenizer_assets/bpe-8k", "data.held_out=0.05", "data.seq_length=32"]
    if "decontaminate" in path.read_text():
        data.append("data.decontaminate=true")
    status = run(["pretrain", str(path), *data, "trainer.max_steps=2", f"trainer.output_dir={out}"])
    assert status == 0, capsys.readouterr().err
    assert json.loads((out / "metrics.json").read_text())["steps"] == 2
    assert len(path.read_text().splitlines()) <= 20


def labelled_file(task, folder):
    """Labelled examples with the columns that a recipe names, and how many of them test."""
    rows = []
    for number, text in enumerate(sentences(60, seed=3)):
        word = text.split()[-1]
        if task["name"] == "sentiment":
            rows.append({"text": text, "label": number % 2})
        elif task["name"] == "translation":
            rows.append({task["source"]: f"{text} {number}", task["target"]: text.upper()})
        else:
            rows.append({"context": f"{text} {number}", "question": "which word", "answers": {"text": [word], "answer_start": [text.rindex(word)]}})
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, 20


@pytest.fixture(scope="module")
def backbone(corpus_file, tmp_path_factory):
    """One step of the quickstart."""
    out = tmp_path_factory.mktemp("backbone") / "run"
    assert run(["pretrain", str(QUICKSTART), f"data.text={corpus_file}", "data.held_out=0.05", "data.seq_length=32", "trainer.max_steps=1", f"trainer.output_dir={out}"]) == 0
    return out


@pytest.mark.parametrize("path", FINETUNE, ids=lambda p: p.stem)
def test_every_finetuning_recipe_runs_two_steps(path, backbone, tmp_path, capsys):
    task = yaml.safe_load(path.read_text())["task"]
    labelled, test = labelled_file(task, tmp_path)
    overrides = [
        "task.labels=[6]",
        "task.seeds=2",
        "task.scratch_labels=[]",
        "task.learning_rates=[]",
        f"data.train={labelled}",
        f"data.test={test}",
        "data.max_length=null",
        f"model.from={backbone}",
        "trainer.max_steps=2",
        f"trainer.output_dir={tmp_path / 'ft'}",
    ]
    assert run(["finetune", str(path), *overrides]) == 0
    assert "| labels | scratch | pretrained | gain |" in capsys.readouterr().out
    assert run(["report", str(tmp_path), "--png"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "over one seed" not in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("https://matplotlib.org", "").replace("http://creativecommons.org", "")
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("objective", ["next_token", "masked", "span_corruption", "infilling"])
def test_show(objective, corpus_file, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    data = f"data: {{text: {corpus_file}, tokenizer: tokenizer_assets/bpe-8k, seq_length: 48}}"
    recipe.write_text(f"{data}\nmodel: {{architecture: t5}}\nobjective: {{name: {objective}}}\ntrainer: {{output_dir: x}}\n")
    assert run(["show", str(recipe), "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("item ") == 2
    assert {"masked": "<mask>", "infilling": "target", "span_corruption": "<extra_id_0>", "next_token": "labels"}[objective] in shown


def test_show_on_a_terminal_without_the_letters(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("".join(f"\u6771\u4eac \u00fcber alles, {n}\n" for n in range(20)), encoding="utf-8")
    data = f"data: {{text: {tmp_path / 'x.txt'}, tokenizer: tokenizer_assets/bpe-8k, seq_length: 48}}"
    (tmp_path / "r.yaml").write_text(f"{data}\nmodel: {{architecture: llama}}\nobjective: {{name: next_token}}\ntrainer: {{output_dir: x}}\n")
    terminal = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run(["show", str(tmp_path / "r.yaml"), "--rows", "1"]) == 0
    terminal.seek(0)
    assert "\\u6771\\u4eac \u00fcber" in terminal.read()


def test_tokenizer_verb(corpus_file, tmp_path, capsys):
    assert run(["tokenizer", str(corpus_file), "--out", str(tmp_path / "t"), "--size", "460"]) == 0
    assert "460 ids" in capsys.readouterr().out
    assert run(["tokenizer", str(corpus_file), "--out", str(tmp_path / "t")]) == 2
    assert "holds a tokenizer already" in capsys.readouterr().err
    assert run(["tokenizer", str(corpus_file), "--out", str(tmp_path / "v"), "--held-out", "1.5"]) == 2
    assert "--held-out: 1.5 must be" in capsys.readouterr().err
    assert run(["tokenizer", "--from", str(tmp_path / "t"), "--out", str(tmp_path / "u")]) == 0
    assert "added 0" in capsys.readouterr().out
    for option in (["--kind", "bpe"], ["--size", "460"], ["--held-out", "0"], ["--skip-bad-records"]):
        assert run(["tokenizer", "--from", str(tmp_path / "t"), "--out", str(tmp_path / "w"), *option]) == 2
        assert capsys.readouterr().err == f"lmssl: error: {option[0]}: is for training, and --from trains nothing; leave it out\n"


def test_overrides_may_stand_behind_options(corpus_file, tmp_path):
    args = [str(QUICKSTART), "--overwrite", f"data.text={corpus_file}", "data.held_out=0.05", "data.seq_length=32", "trainer.max_steps=1", f"trainer.output_dir={tmp_path / 'x'}"]
    assert run(["pretrain", *args]) == 0


THRICE = """
import json, pathlib, sys
from lmssl import ranks
from lmssl.cli import run

out, recipe, *tuning = sys.argv[1:]
out = pathlib.Path(out)

def finetuned(*how):
    assert run(["finetune", recipe, *how, *tuning]) == 0
    ranks.wait()
    return json.loads((out / "metrics.json").read_text())["results"]

def alone(act):
    ranks.wait()
    if ranks.first_process():
        act()
    ranks.wait()

first = finetuned()
assert len(first) == 2
alone(lambda: (out / "checkpoints" / "8-scratch-0" / "checkpoint-1").mkdir(parents=True))
again = finetuned("--overwrite")
assert [r["score"] for r in again] == [r["score"] for r in first]
alone((out / "metrics.json").unlink)
assert finetuned("--resume") == again
"""
"""A label curve, overwritten over one that was interrupted, and resumed."""


@pytest.mark.parametrize("launcher", [["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]], ids=["torchrun"])
def test_two_processes_by_the_command_line(launcher, corpus_file, tmp_path):
    overrides = [f"data.text={corpus_file}", "data.held_out=0.05", "data.seq_length=32", "trainer.max_steps=2", "trainer.per_device_train_batch_size=2", "trainer.use_cpu=true"]
    command = [sys.executable, "-m", *launcher]

    def launched(command, *args):
        done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]

    launched([*command, "-m", "lmssl"], "pretrain", QUICKSTART, *overrides, f"trainer.output_dir={tmp_path / 'two'}")
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["environment"]["processes"] == 2
    assert metrics["tokens"] == 2 * 2 * 2 * 32
    tuning = [f"model.from={tmp_path / 'two'}", f"data.train={corpus_file}", "data.test=20", "task.labels=[8]", "task.seeds=1"]
    tuning += ["trainer.max_steps=2", "trainer.per_device_train_batch_size=2", "trainer.use_cpu=true", f"trainer.output_dir={tmp_path / 'two' / 'curve'}"]
    (tmp_path / "thrice.py").write_text(THRICE)
    launched([*command, str(tmp_path / "thrice.py")], tmp_path / "two" / "curve", FINETUNE_QUICKSTART, *tuning)


def test_accelerate_launch(corpus_file, tmp_path):
    overrides = [f"data.text={corpus_file}", "data.held_out=0.05", "data.seq_length=32", "trainer.max_steps=1", f"trainer.output_dir={tmp_path / 'a'}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "lmssl", "pretrain", str(QUICKSTART), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "a" / "model.safetensors").is_file()


def test_a_curve_of_one_number_of_labels_shows_mean_and_spread():
    """There is no line to draw; equal scores of both inits must not hide each other."""
    from matplotlib.figure import Figure

    from lmssl import report

    results = [{"labels": 40, "init": init, "seed": seed, "score": 0.5 + 0.1 * seed} for init in ("scratch", "pretrained") for seed in (0, 1)]
    ax = Figure().subplots()
    report._draw_labels(ax, {"metric": "accuracy", "results": results})
    bars = [container.lines[0].get_xydata()[0].tolist() for container in ax.containers]
    assert [y for _, y in bars] == [pytest.approx(55), pytest.approx(55)]
    assert bars[0][0] < 40 < bars[1][0]


def test_report_below_a_folder_called_checkpoint(tmp_path):
    (tmp_path / "checkpoint-study" / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "checkpoint-study" / "run" / "metrics.json").write_text('{"objective": "masked", "held_out": {}, "curve": []}')
    (tmp_path / "checkpoint-study" / "run" / "checkpoint-5" / "metrics.json").write_text("no run")
    assert run(["report", str(tmp_path / "checkpoint-study")]) == 0


@pytest.mark.parametrize("text", ['{"evaluated": {}}', '{"objective": "reg:linear", "parameters": {"depth": 6}}'])
def test_report_of_what_was_only_scored(text, tmp_path, capsys):
    """Or of another program."""
    (tmp_path / "metrics.json").write_text(text)
    assert run(["report", str(tmp_path)]) == 2
    assert "only of checkpoints that were scored" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[1, 2]", '{"results": []}'])
def test_report_of_somebody_else_s_metrics(text, tmp_path, capsys):
    (tmp_path / "metrics.json").write_text(text)
    assert run(["report", str(tmp_path)]) == 2
    assert "metrics.json: is not of a run of lmssl" in capsys.readouterr().err


def test_report_of_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9port"))
    folder.mkdir()
    (folder / "metrics.json").write_text('{"objective": "masked", "held_out": {}, "curve": []}')
    assert run(["report", str(folder)]) == 0
    assert "r\\udce9port" in (folder / "report.html").read_text()


def test_report_refuses_what_is_no_run(tmp_path, capsys):
    assert run(["report", str(tmp_path)]) == 2
    assert "no metrics.json" in capsys.readouterr().err


def test_show_at_step_is_what_the_run_read(corpus_file, tmp_path, monkeypatch, capsys):
    from lmssl.data.stream import Stream
    from lmssl.recipe import PretrainRecipe
    from lmssl.runs import pretrain, preview

    keys = [f"data.text={corpus_file}", "data.held_out=0.05", "data.seq_length=32", "trainer.max_steps=6", f"trainer.output_dir={tmp_path}"]
    keys += ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2", "trainer.seed=3"]
    recipe = PretrainRecipe.load(QUICKSTART, keys)
    read: dict = {}
    with monkeypatch.context() as patch:
        original = Stream.__getitem__
        patch.setattr(Stream, "__getitem__", lambda self, i: read.setdefault(i, original(self, i)) if len(self) == 24 else original(self, i))
        pretrain(PretrainRecipe.load(QUICKSTART, [*keys, "trainer.save_strategy=no", "trainer.bf16=false"]), quiet=True)
    stream, _, items = preview(recipe, at_step=3)
    assert items == range(8, 12)
    assert all(np.array_equal(stream[i][name], read[i][name]) for i in items for name in read[i])
    assert run(["show", str(QUICKSTART), "--at-step", "3", *keys]) == 0
    shown = capsys.readouterr().out
    assert [f"item {i} " in shown for i in range(7, 13)] == [False, True, True, True, True, False]
    whole = preview(recipe, rows=24)[0]
    assert all(np.array_equal(stream[i][name], whole[i][name]) for i in items for name in whole[i])
    assert run(["show", str(QUICKSTART), "--at-step", "2", "--batch", "8", "--rows", "1", *keys]) == 0
    assert "item 8 " in capsys.readouterr().out
    assert run(["show", str(QUICKSTART), "--at-step", "7", *keys]) == 2
    assert "--at-step: 7 is not a step of this run; it has steps 1 to 6" in capsys.readouterr().err


def test_accept_goes_with_resume(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {text: x.jsonl, tokenizer: t, seq_length: 32}\nmodel: {architecture: bert}\nobjective: {name: masked}\ntrainer: {output_dir: out, max_steps: 1}\n")
    for more in ([], ["--overwrite"]):
        assert run(["pretrain", str(recipe), "--accept", "seed", *more]) == 2
        assert "--accept seed: means something with --resume alone" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_more_characters_than_ids(kind, tmp_path, capsys):
    """Thousands of Chinese characters."""
    text = tmp_path / "x.txt"
    text.write_text("".join("".join(chr(0x4E00 + 10 * n + k) for k in range(10)) + "\n" for n in range(300)))
    assert run(["tokenizer", str(text), "--kind", kind, "--size", "1000", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "size: " in error
    assert "kind bpe" in error
    assert run(["tokenizer", str(text), "--size", "1000", "--out", str(tmp_path / "out")]) == 0


def test_a_tokenizer_that_is_not_made_leaves_no_folder(tmp_path, capsys):
    (tmp_path / "own").mkdir()
    for out in ("new", "own"):
        assert run(["tokenizer", str(tmp_path / "none.txt"), "--out", str(tmp_path / out)]) == 2
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "own").is_dir(), "which was there before"


def test_a_tokenizer_that_cannot_be_written_is_refused_before_its_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("lmssl.tokenization.train", lambda *_: pytest.fail("trained in vain"))
    for out in ("file", "file/tokenizer"):
        assert run(["tokenizer", str(tmp_path / "x.txt"), "--out", str(tmp_path / out)]) == 2
        assert f"--out: {tmp_path / out} cannot be written" in capsys.readouterr().err
