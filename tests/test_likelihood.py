"""Likelihoods: equal to the model's own numbers, however they are batched; ties are half."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmssl import likelihood, models, scoring
from lmssl.cli import run
from tests.helpers import saved_backbone, sentences, small_model, token_set, tokenizer

TEXTS = [" ".join(t.split()[: 3 + n]) for n, t in enumerate(sentences(8, seed=4))]


def ids_of(texts):
    return [ids[1:-1] for ids in tokenizer().encode(texts)]


def test_decoder_equals_the_models_loss(shared_dir):
    vocab = token_set(shared_dir).vocab()
    model = small_model("gpt2", vocab, 64).eval()
    values = likelihood.log_likelihoods(model, "decoder", ids_of(TEXTS), vocab)
    for ids, value in zip(ids_of(TEXTS), values, strict=True):
        row = torch.tensor([[vocab.bos, *ids.tolist()]])
        assert value == pytest.approx(-model(input_ids=row, labels=row).loss.item() * len(ids), rel=1e-5)


@pytest.mark.parametrize(("architecture", "by"), [("bert", ""), ("modernbert", ""), ("t5", "sentinel"), ("bart", "mask")])
def test_pseudo_likelihood_one_token_at_a_time(architecture, by, shared_dir):
    vocab = token_set(shared_dir).vocab()
    model = small_model(architecture, vocab, 64).eval()
    family = models.family_of(model.config)
    values = likelihood.log_likelihoods(model, family, ids_of(TEXTS), vocab, by)
    for ids, value in zip(ids_of(TEXTS)[:3], values, strict=False):
        total, whole = 0.0, [vocab.bos, *ids.tolist(), vocab.eos]
        for i in range(1, len(whole) - 1):
            hole = int(vocab.sentinels[0]) if by == "sentinel" else vocab.mask
            inputs = {"input_ids": torch.tensor([[*whole[:i], hole, *whole[i + 1 :]]])}
            at = i
            if family == "encoder-decoder":
                decoder = [vocab.start, hole] if by == "sentinel" else [vocab.start, *whole[:-1]]
                inputs["decoder_input_ids"], at = torch.tensor([decoder]), 1 if by == "sentinel" else i
            with torch.no_grad():
                total += model(**inputs).logits[0, at].log_softmax(-1)[whole[i]].item()
        assert value == pytest.approx(total, abs=1e-4)


def test_ties_are_half_and_never_right():
    found = likelihood.preferred(np.array([-1.0, -2.0, -3.0, -4.0]), np.array([-1.0, -3.0, -2.0, -5.0]), ["a", "a", "b", "b"])
    assert found["accuracy"] == 0.625
    assert found["by_phenomenon"] == {"a": 0.75, "b": 0.5}
    assert (found["ties"], found["mean_by_phenomenon"]) == (1, 0.625)


@pytest.mark.parametrize(
    ("architecture", "objective", "by"),
    [("gpt2", None, "sentinel"), ("t5", None, "sentinel"), ("bart", None, "mask"), ("bart", "span_corruption", "sentinel"), ("t5", "infilling", "mask")],
)
def test_the_likelier_sentence_is_the_right_one(architecture, objective, by, shared_dir, tmp_path, monkeypatch):
    """Each is scored without bos and eos, and a model by its own kind of hole; here the shorter one is the likelier."""
    tokens, asked = token_set(shared_dir), []
    saved_backbone(architecture, tokens, tmp_path, 64)
    if objective:
        (tmp_path / "recipe.yaml").write_text(json.dumps({"data": {}, "model": {}, "objective": {"name": objective}, "trainer": {}}))
    good, bad = "a film", "a film was warm"
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"sentence_good": good, "sentence_bad": bad}) + "\n")

    def log_likelihoods(model, family, ids, vocab, way, progress):
        asked.extend([way, *(i.tolist() for i in ids)])
        return -np.array([len(i) for i in ids], float)

    monkeypatch.setattr(likelihood, "log_likelihoods", log_likelihoods)
    assert scoring.minimal_pairs(str(tmp_path), str(tmp_path / "pairs.jsonl"))["accuracy"] == 1.0
    assert asked == [by, *(ids.tolist() for ids in ids_of([good, bad]))]


def test_the_command(shared_dir, tmp_path, capsys):
    tokens = token_set(shared_dir)
    saved_backbone("bert", tokens, tmp_path, 64)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"sentence_good": a, "sentence_bad": b, "UID": "x"}) + "\n" for a, b in zip(TEXTS[:4], TEXTS[4:], strict=True)))
    assert run(["evaluate", str(tmp_path), "--pairs", str(pairs)]) == 0
    assert "of 4 minimal pairs right" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["minimal_pairs"]["pairs"] == 4
    pairs.write_text(json.dumps({"sentence_good": "a film " * 99, "sentence_bad": "a"}) + "\n")
    assert run(["evaluate", str(tmp_path), "--pairs", str(pairs)]) == 2
    assert "pairs.jsonl:1: a sentence of" in capsys.readouterr().err
    pairs.write_text(json.dumps({"sentence_good": "a"}) + "\n")
    assert run(["evaluate", str(tmp_path), "--pairs", str(pairs)]) == 2
    error = capsys.readouterr().err
    assert ":1: no column 'sentence_bad'" in error
    assert "columns of BLiMP" in error


def test_broken_weights_have_no_score(shared_dir, tmp_path, capsys):
    saved_backbone("bert", token_set(shared_dir), tmp_path / "b", 64)
    weights = load_file(tmp_path / "b" / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][:] = float("nan")
    save_file(weights, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"sentence_good": "a film", "sentence_bad": "a story", "UID": "x"}) + "\n")
    (tmp_path / "x.txt").write_text("\n".join(TEXTS))
    for args in (["--pairs", str(tmp_path / "pairs.jsonl")], [f"data.text={tmp_path / 'x.txt'}", "data.seq_length=32"]):
        assert run(["evaluate", str(tmp_path / "b"), *args]) == 2
        assert "is not finite; its weights are broken" in capsys.readouterr().err
    assert not (tmp_path / "b" / "metrics.json").exists()


def test_overrides_of_minimal_pairs_are_refused(shared_dir, tmp_path, capsys):
    backbone, path = tmp_path / "backbone", tmp_path / "pairs.jsonl"
    saved_backbone("llama", token_set(shared_dir), backbone, 64)
    path.write_text(json.dumps({"sentence_good": "a film", "sentence_bad": "film a"}) + "\n")
    assert run(["evaluate", str(backbone), "--pairs", str(path), "trainer.x=1"]) == 2
    assert "would change nothing" in capsys.readouterr().err


def test_likelihoods_do_not_depend_on_the_batch(shared_dir, monkeypatch):
    tokens = token_set(shared_dir)
    ids = [tokens.vocab().ordinary[begin : begin + 3 + begin % 5] for begin in range(0, 60, 4)]
    for architecture in ("llama", "bert", "t5", "bart"):
        model = small_model(architecture, tokens.vocab())
        family, by = models.family_of(model.config), "mask" if architecture == "bart" else "sentinel"
        found = []
        for most in (2**28, 16 * tokens.vocab().size, 1):
            monkeypatch.setattr(likelihood, "LOGITS", most)
            rows = []
            found.append(likelihood.log_likelihoods(model, family, ids, tokens.vocab(), by, rows.append))
            assert most > 1 or set(rows) == {1}
        for other in found[1:]:
            assert np.allclose(found[0], other, atol=1e-4), architecture


def test_scores_of_several_evaluations_at_once_are_all_kept(tmp_path):
    """Each process reads metrics.json, adds its own and writes it again."""

    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)

    def note(number):
        together.wait()
        for k in range(40):
            scoring._note(tmp_path, "evaluated", {f"{number}.{k}": {}})

    running = [context.Process(target=note, args=(number,)) for number in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert len(json.loads((tmp_path / "metrics.json").read_text())["evaluated"]) == 120


def test_a_score_that_cannot_be_noted_is_not_lost(tmp_path, caplog):
    (tmp_path / "metrics.json.part").mkdir()
    scoring._note(tmp_path, "evaluated", {"x": {"loss": 1.0}})
    assert "metrics.json cannot be written, so this score stands nowhere else" in caplog.text
