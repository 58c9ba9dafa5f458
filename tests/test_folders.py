"""The folder of a run: nothing of somebody else's is lost in it, and one run at a time writes there."""

import dataclasses
import json
import shutil
import threading

import pytest

from lmssl import cards, folders
from lmssl.cli import run
from lmssl.errors import UserError
from lmssl.recipe import FinetuneRecipe, PretrainRecipe
from lmssl.runs import finetune, pretrain
from tests.helpers import saved_backbone, sentences, small_model, token_set
from tests.test_trainer import recipe_of


@pytest.fixture
def curve(shared_dir, tmp_path):
    """A fine-tuning recipe for an output folder."""
    saved_backbone("bert", token_set(shared_dir), tmp_path / "backbone")
    rows = [{"text": text, "label": n % 2} for n, text in enumerate(dict.fromkeys(sentences(40, seed=3)))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(out, source="backbone"):
        return FinetuneRecipe.of(
            {
                "task": {"name": "sentiment", "labels": [8], "seeds": 1},
                "data": {"train": str(tmp_path / "rows.jsonl"), "test": 10},
                "model": {"from": str(tmp_path / source)},
                "trainer": {"output_dir": str(out), "max_steps": 1, "bf16": False},
            }
        )

    return make


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_model_of_somebody_s_is_not_replaced(kind, resume, curve, corpus_file, shared_dir, tmp_path):
    """`--resume` also begins a first run, and so must not be a way around."""
    out = tmp_path / "theirs"
    small_model("bert", token_set(shared_dir).vocab()).save_pretrained(out)
    before = content(out)
    with pytest.raises(UserError, match=r"theirs holds no run that could go on \(config.json\); name another folder"):
        pretrain(recipe_of(corpus_file, out), resume=resume, quiet=True) if kind == "pretrain" else finetune(curve(out), resume=resume, quiet=True)
    assert content(out) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_backbone_is_not_its_own_output(resume, curve, corpus_file, tmp_path):
    source, recipe = tmp_path / "backbone", recipe_of(corpus_file, tmp_path / "backbone")
    before = content(source)
    with pytest.raises(UserError, match="would be overwritten"):
        finetune(curve(source), resume=resume, quiet=True)
    with pytest.raises(UserError, match="would be overwritten"):
        pretrain(PretrainRecipe(dataclasses.replace(recipe.data, tokenizer=None), {"from": str(source)}, recipe.objective, recipe.trainer), resume=resume, quiet=True)
    assert content(source) == before


def test_a_readme_of_one_s_own_stays(curve, corpus_file, tmp_path):
    for name, begin in (("p", lambda out: pretrain(recipe_of(corpus_file, out), quiet=True)), ("f", lambda out: finetune(curve(out), quiet=True))):
        out = tmp_path / name
        out.mkdir()
        (out / "README.md").write_text("# My project\n")
        with pytest.raises(UserError, match=r"README.md is not lmssl's and would be replaced"):
            begin(out)
        assert (out / "README.md").read_text() == "# My project\n"
        (out / "README.md").write_text(f"{cards.HEAD}, masked]\n---\n")
        begin(out)
        assert "```python" in (out / "README.md").read_text()


def test_checkpoints_of_somebody_s_stay_beside_a_curve(curve, tmp_path):
    out = tmp_path / "project"
    (out / "checkpoints" / "mine").mkdir(parents=True)
    (out / "checkpoints" / "mine" / "weights.bin").write_text("precious")
    for keys in ({}, {"resume": True}, {"overwrite": True}):
        shutil.rmtree(out / "predictions", ignore_errors=True)
        for path in folders.leavings(out, "progress.json"):
            path.unlink()
        finetune(curve(out), quiet=True, **keys)
        assert content(out / "checkpoints") == {"mine/weights.bin": b"precious"}
    (out / "checkpoints" / "8-scratch-0-0.0005").mkdir()
    shutil.rmtree(out / "checkpoints" / "mine")
    (out / "metrics.json").unlink()
    finetune(curve(out), resume=True, quiet=True)
    assert not (out / "checkpoints").exists()


def test_a_checkpoint_that_is_a_link_is_unlinked(corpus_file, tmp_path):
    """Moved to another disk, for room."""
    pretrain(recipe_of(corpus_file, tmp_path / "run", save_steps=1), quiet=True)
    (moved,) = list((tmp_path / "run").glob("checkpoint-*"))[:1]
    moved.rename(tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    pretrain(recipe_of(corpus_file, tmp_path / "run"), overwrite=True, quiet=True)
    assert not (tmp_path / "run" / moved.name).is_symlink()
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()


def test_a_recipe_of_a_run_that_was_moved_says_so(corpus_file, tmp_path, caplog):
    """Its recipe still names the first folder, in which it would begin anew."""
    pretrain(recipe_of(corpus_file, tmp_path / "run"), quiet=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    recipe = str(tmp_path / "moved" / "recipe.yaml")
    assert run(["pretrain", recipe, "--resume", f"trainer.output_dir={tmp_path / 'moved'}"]) == 0
    assert "belongs to the run in" not in caplog.text
    assert run(["pretrain", recipe]) == 0
    assert f"{recipe} belongs to the run in {tmp_path / 'run'}, its trainer.output_dir" in caplog.text


def test_one_run_at_a_time(corpus_file, tmp_path, monkeypatch):
    """Two that share a folder would remove each other's checkpoints."""
    monkeypatch.setattr(folders, "PATIENCE", 0.1)
    with folders.alone(tmp_path / "run"), pytest.raises(UserError, match=r"another run is writing into .*run; wait for its end"):
        pretrain(recipe_of(corpus_file, tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()
    with folders.alone(tmp_path / "other"):
        pretrain(recipe_of(corpus_file, tmp_path / "run"), quiet=True)
    monkeypatch.setattr(folders, "PATIENCE", 30.0)
    held, free = threading.Event(), threading.Event()

    def other() -> None:
        with folders.alone(tmp_path / "run"):
            held.set()
            free.wait(0.3)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    pretrain(recipe_of(corpus_file, tmp_path / "run"), resume=True, quiet=True)  # waits
    thread.join()


def test_where_nothing_can_be_locked_a_run_goes_on(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMSSL_CACHE", str(tmp_path / "file" / "cache"))
    with folders.alone(tmp_path / "run"):
        pass
    assert "cannot be locked" in caplog.text
