"""Few labels: nested subsets, honest splits, three families, and a checkpoint that stock transformers loads."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from lmssl import models, predict, tokenization
from lmssl.data.tokens import below, content_hash
from lmssl.errors import UserError
from lmssl.recipe import FinetuneRecipe
from lmssl.runs import finetune
from lmssl.tasks import adapters, base, generation
from lmssl.tasks.base import Backbone, Example
from lmssl.tasks.curve import in_order_of, labelled
from lmssl.tasks.sentiment import Labelled, Sentiment
from lmssl.tasks.translation import Translation
from tests.helpers import saved_backbone, sentences, small_model, token_set, tokenizer

EXAMPLES = [Example(text, "good" if n % 3 else "bad", f"x:{n}") for n, text in enumerate(dict.fromkeys(sentences(300)))]


@pytest.mark.parametrize("seed", range(3))
def test_subsets_are_nested_and_stratified(seed):
    order = base.nested(EXAMPLES, seed)
    assert sorted(order) == list(range(len(EXAMPLES)))
    share = sum(e.label == "good" for e in EXAMPLES) / len(EXAMPLES)
    for n in (6, 20, 99, 200):
        assert abs(sum(EXAMPLES[i].label == "good" for i in order[:n]) - share * n) <= 1
    assert order != base.nested(EXAMPLES, seed + 1)


def test_test_split_by_content():
    train, test = base.split_test(EXAMPLES, 50)
    assert len(test) == 50
    assert max(content_hash(e.text) for e in test) < min(content_hash(e.text) for e in train)
    _, fraction = base.split_test(EXAMPLES, 0.2)
    assert all(content_hash(e.text) < below(0.2) for e in fraction)
    assert not {e.text for e in train} & {e.text for e in test}


@pytest.fixture(scope="module")
def backbones(shared_dir, tmp_path_factory):
    """A loaded backbone of each family."""
    tokens, made = token_set(shared_dir), {}
    for family, architecture in {"decoder": "llama", "encoder": "modernbert", "encoder-decoder": "t5"}.items():
        folder = tmp_path_factory.mktemp(family)
        saved_backbone(architecture, tokens, folder, 32)
        made[family] = Backbone.load(str(folder), 16, ["0", "1"])
    return made


def ids_of(task, backbone, *examples):
    return [item["input_ids"].tolist() for (item,) in task.encode(backbone, examples)]


def test_encode_keeps_the_end_and_the_specials(backbones):
    text = sentences(1, seed=2)[0] * 3
    whole = tokenizer().encode([text])[0]
    example = Labelled(text, "1", "")
    assert ids_of(Sentiment(), backbones["encoder"], example) == [[whole[0], *whole[-15:]]]
    assert ids_of(Sentiment(), backbones["decoder"], example) == [[whole[0], *whole[-16:-1]]], "decoders pool the last token: no eos behind it"
    assert ids_of(Sentiment(keep="start"), backbones["encoder"], example) == [[*whole[:15], whole[-1]]]


def test_a_cue_stands_behind_every_text_and_is_never_cut(backbones):
    long, short = sentences(1, seed=2)[0] * 3, "a film"
    task = Sentiment(cue=" the plot was")
    for family, backbone in backbones.items():
        (cue,), eos = backbone.ids([task.cue]), [] if family == "decoder" else [backbone.tokenizer.id("eos")]
        for row in ids_of(task, backbone, Labelled(long, "1", ""), Labelled(short, "0", ""), Labelled(long, "1", "", short)):
            assert row[len(row) - len(eos) - len(cue) :] == [*cue.tolist(), *eos]
            assert len(row) <= backbone.length


@pytest.mark.parametrize("pair", [{}, {"text_a": "a", "text_b": "b"}])
def test_a_cue_that_leaves_no_room_is_refused(backbones, pair):
    decoder = dataclasses.replace(backbones["decoder"], length=8)
    with pytest.raises(UserError, match=r"data\.max_length: 8 tokens leave no room for a text beside the cue"):
        Sentiment(cue=" overall this film was rather good" * 2, **pair).encode(decoder, [Labelled("some text", "", "x:1", "more" if pair else None)])


def test_a_cue_may_name_special_tokens_and_a_text_may_not(backbones):
    """The sentinel in a cue is the token that spans were replaced by; spelt in a review it is text. plain transformers reads the cue so too."""
    backbone, made = backbones["encoder-decoder"], tokenizer()
    sentinel = made.backend.token_to_id("<extra_id_0>")
    (row,) = ids_of(Sentiment(cue=" It was<extra_id_0>"), backbone, Labelled("<extra_id_0>", "1", ""))
    assert row[-2:] == [sentinel, made.id("eos")]
    assert row.count(sentinel) == 1
    assert made.encode(["<extra_id_0>"])[0].tolist().count(sentinel) == 0, "the tokenizer is as it was"


def test_answers_begin_as_what_the_language_model_says(backbones):
    """Before any step the classifier's scores are the language model's own logits of the answers behind the cue."""
    backbone, text = backbones["decoder"], Labelled("a film", "1", "")
    task = Sentiment(cue=" It was", answers={"0": [" bad"], "1": [" good", " great"]})
    (row,) = ids_of(task, backbone, text)
    ids = torch.tensor([row])
    for pretrained in (True, False):
        logits = backbone.build(models.AUTO["decoder"], pretrained, 7)(input_ids=ids).logits[0, -1]
        bad, good, great = (logits[backbone.ids([a])[0][0]] for a in (" bad", " good", " great"))
        got = task.model(backbone, pretrained, 7).eval()(input_ids=ids).logits[0]
        assert torch.allclose(got, torch.stack([bad, (good + great) / 2]), atol=1e-5)
    for family in ("encoder", "encoder-decoder"):
        with pytest.raises(UserError, match="leave answers out"):
            task.model(backbones[family], True, 0)


def test_encode_pairs(backbones):
    """bos a eos b eos; of a pair that is too long the longer text is cut first."""
    made, task = tokenizer(), Sentiment(text_a="a", text_b="b", keep="start")
    short, long = sentences(1, seed=2)[0][:12], sentences(1, seed=2)[0] * 3
    bos, eos = made.id("bos"), made.id("eos")
    first, second = (ids[1:-1].tolist() for ids in made.encode([short, long]))
    (row,) = ids_of(task, backbones["encoder"], Labelled(short, "0", "", long))
    assert row == [bos, *first, eos, *second[: 16 - 3 - len(first)], eos]
    (row,) = ids_of(task, backbones["encoder"], Labelled(long, "0", "", short))
    assert row == [bos, *second[: 16 - 3 - len(first)], eos, *first, eos]
    (row,) = ids_of(task, backbones["decoder"], Labelled(long, "0", "", long))
    assert len(row) == 16
    assert row.count(eos) == 1


def test_the_saved_tokenizer_makes_the_same_inputs(backbones, tmp_path):
    """Plain transformers, from the fine-tuned folder, reads what training read: a lone text and a pair, cut and whole."""
    texts = [sentences(1, seed=2)[0] * 3, "the film was good"]
    for family, backbone in backbones.items():
        for keep in ("start", "end"):
            task = Sentiment(keep=keep)
            task.finish(backbone).save(tmp_path / family / keep)
            plain = transformers.AutoTokenizer.from_pretrained(tmp_path / family / keep)
            assert plain(texts, truncation=True)["input_ids"] == ids_of(task, backbone, *(Labelled(t, "0", "") for t in texts)), (family, keep)
            spelt = "It ended. </s> and <mask> more"
            assert plain([spelt], truncation=True)["input_ids"] == ids_of(task, backbone, Labelled(spelt, "0", "")), "special tokens in a text are text"
            assert set(plain("a")) == {"input_ids", "attention_mask"}
        pair = Sentiment(text_a="a", text_b="b")
        plain = transformers.AutoTokenizer.from_pretrained(tmp_path / family / "start")
        assert plain("a film", "a plot")["input_ids"] == ids_of(pair, backbone, Labelled("a film", "0", "", "a plot"))[0]


@pytest.mark.parametrize("cue", ["", " It was"])
@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder-decoder"])
def test_a_long_pair_is_cut_as_plain_transformers_cuts_it(family, cue, backbones, tmp_path):
    words, task = " ".join(sentences(3)).split(), Sentiment(text_a="a", text_b="b", cue=cue)
    eos = tokenizer().id("eos")
    older = tuple(map(int, tokenizers.__version__.split(".")[:3])) < (0, 23, 3)  # gives an odd token to the shorter text where both are far too long
    for length in (31, 32):
        backbone = dataclasses.replace(backbones[family], length=length)
        task.finish(backbone).save(tmp_path / str(length))
        plain = transformers.AutoTokenizer.from_pretrained(tmp_path / str(length))
        for first in range(1, 20, 2):
            for second in range(1, 20, 2):
                a, b = " ".join(words[:first]), " ".join(words[20 : 20 + second])
                theirs, (ours,) = plain(a, f"{b}{cue}", truncation=True)["input_ids"], ids_of(task, backbone, Labelled(a, "0", "", b))
                odd = older and len(theirs) == len(ours) and abs(theirs.index(eos, 1) - ours.index(eos, 1)) == 1
                assert theirs == ours or odd, (length, first, second)


def test_texts_that_differ_in_white_space_are_one(tmp_path, caplog):
    """Else a copy of a test text is trained on."""
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text, "label": "ab"[n % 2]}) + "\n" for n in range(30) for text in (f"the film {n}", f" the  film {n}\n")))
    train, test = labelled(Sentiment(), str(tmp_path / "x.jsonl"), 0.3)
    assert len(train) + len(test) == 30
    (tmp_path / "y.jsonl").write_text("".join(json.dumps({"text": f"the film {n} ", "label": "ab"[n % 2]}) + "\n" for n in range(10)))
    train, test = labelled(Sentiment(), str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl"))
    assert (len(train), len(test)) == (20, 10)


def test_a_head_for_other_classes_is_spoken_of(backbones, caplog):
    config = transformers.BertConfig(architectures=["BertForSequenceClassification"], id2label={0: "pos", 1: "neg"})
    assert in_order_of(config, ["neg", "pos"]) == ["pos", "neg"]
    assert not caplog.text
    assert in_order_of(config, ["bad", "good"]) == ["bad", "good"]
    assert "was trained for pos, neg; its rows are taken for bad, good, in this order" in caplog.text
    assert in_order_of(transformers.BertConfig(), ["bad", "good"]) == ["bad", "good"]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_a_cue_and_a_separator_are_what_they_are_behind_a_text(kind, tmp_path):
    """A tokenizer may read them as other tokens there than alone; plain transformers reads text and cue as one."""
    own = tokenizer() if kind == "bpe" else tokenization.train(sentences(400), kind, 700)
    small_model("llama", own.vocab(), 40).save_pretrained(tmp_path / "backbone")
    own.save(tmp_path / "backbone")
    backbone = Backbone.load(str(tmp_path / "backbone"), 24, ["0", "1"])
    texts = ["the film was good.", "a plot ", sentences(1, seed=2)[0] * 4]
    task = Sentiment(cue=" Overall, it was")
    task.finish(backbone).save(tmp_path / "tuned")
    plain = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert plain([f"{text}{task.cue}" for text in texts], truncation=True)["input_ids"] == ids_of(task, backbone, *(Labelled(t, "0", "") for t in texts))
    pair, backbone = Sentiment(text_a="a", text_b="b", cue=task.cue), dataclasses.replace(backbone, length=40)
    assert plain("a film", f"a plot{task.cue}")["input_ids"] == ids_of(pair, backbone, Labelled("a film", "0", "", "a plot"))[0]
    for separator in (" =>", " to: "):
        Translation(separator=separator).finish(backbone).save(tmp_path / "writer")
        plain = transformers.AutoTokenizer.from_pretrained(tmp_path / "writer")
        made = generation.prompts(backbone, texts, separator, 24)
        assert plain([f"{text}{separator}" for text in texts[:2]])["input_ids"] == [row.tolist() for row in made[:2]]
        assert len(made[2]) == 24
        assert made[2][-len(backbone.ids([separator])[0]) :].tolist() == backbone.ids([separator])[0].tolist()


def test_answers_are_what_they_are_behind_the_cue(tmp_path):
    """A tokenizer that puts a sign for a space before every text (Llama 2's) begins each answer by it when alone."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["bad", "good"] * 40 + [word for text in sentences(200) for word in text.split()], trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}')
    own = tokenization.load(tmp_path)
    small_model("llama", own.vocab(), 40).save_pretrained(tmp_path)
    backbone = Backbone.load(str(tmp_path), None, ["0", "1"])
    assert len({int(backbone.ids([answer])[0][0]) for answer in (" bad", " good")}) == 1
    model = Sentiment(cue=" it was", answers={"0": [" bad"], "1": [" good"]}).model(backbone, True, 0)
    assert not torch.equal(model.score.weight[0], model.score.weight[1])
    with pytest.raises(UserError, match="the answers of two classes begin with the same tokens"):
        Sentiment(cue=" it was", answers={"0": [" bad"], "1": [" bad"]}).model(backbone, True, 0)


def test_a_trained_head_is_not_replaced_by_the_answers(backbones, tmp_path):
    """Predictions of a fine-tuned model are its own, not those of the words that its head began as."""
    task = Sentiment(cue=" It was", answers={"0": [" bad"], "1": [" good", " great"]})
    model = task.model(backbones["decoder"], True, 0)
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(tmp_path)
    task.finish(backbones["decoder"]).save(tmp_path)
    (tmp_path / "recipe.yaml").write_text(json.dumps({"task": {"name": "sentiment"} | dataclasses.asdict(task)}))
    _, _, loaded = predict.load(str(tmp_path), None)
    assert torch.equal(loaded.score.weight.cpu(), model.score.weight)


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Reviews whose class is plain to see, so that learning shows in a few steps."""
    path = tmp_path_factory.mktemp("easy") / "labelled.jsonl"
    rows = []
    for n, text in enumerate(sentences(240, seed=8)):
        words = [w for w in text.split() if w.strip(".,") not in ("good", "bad")][:12]
        rows.append({"review": " ".join([*words, "good" if n % 2 else "bad"]), "verdict": "pro" if n % 2 else "contra"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert", "roberta", "modernbert", "t5", "bart"])
def test_every_family(architecture, easy, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    saved_backbone(architecture, tokens, tmp_path / "backbone", 32)
    recipe = FinetuneRecipe.of(
        {
            "task": {"name": "sentiment", "text": "review", "label": "verdict", "labels": [8, 120], "seeds": 1},
            "data": {"train": str(easy), "test": 60},
            "model": {"from": str(tmp_path / "backbone")},
            "trainer": {"output_dir": str(tmp_path / "out"), "max_steps": 12, "learning_rate": 5e-3, "bf16": False},
        }
    )
    metrics = finetune(recipe, quiet=True)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert {(r["labels"], r["init"]) for r in metrics["results"]} == {(n, i) for n in (8, 120) for i in ("scratch", "pretrained")}
    assert all(0 <= r["score"] <= 1 and {"labels", "init", "seed", "score"} <= set(r) for r in metrics["results"])
    assert (metrics["task"], metrics["metric"], metrics["test_examples"]) == ("sentiment", "accuracy", 60)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.id2label == {0: "contra", 1: "pro"}


def test_it_learns_and_scratch_differs(easy, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    saved_backbone("llama", tokens, tmp_path / "backbone", 32)
    recipe = FinetuneRecipe.of(
        {
            "task": {"name": "sentiment", "text": "review", "label": "verdict", "labels": [160], "seeds": 2},
            "data": {"train": str(easy), "test": 60},
            "model": {"from": str(tmp_path / "backbone")},
            "trainer": {"output_dir": str(tmp_path / "out"), "max_steps": 60, "learning_rate": 5e-3, "bf16": False},
        }
    )
    scores = [r["score"] for r in finetune(recipe, quiet=True)["results"]]
    assert min(scores) > 0.9
    small_model("llama", tokens.vocab(), 32, seed=7).save_pretrained(tmp_path / "backbone")
    loaded = Backbone.load(str(tmp_path / "backbone"), None, ["a", "b"])
    twin, reused = (recipe.task.model(loaded, pretrained, 0) for pretrained in (False, True))
    backbone = models.AUTO["decoder"].from_pretrained(tmp_path / "backbone")
    assert (reused.get_input_embeddings().weight == backbone.get_input_embeddings().weight).all()
    assert not (twin.get_input_embeddings().weight == reused.get_input_embeddings().weight).all()
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in reused.parameters())


@pytest.mark.parametrize("method", ["probe", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_probe_and_lora(method, architecture, easy, shared_dir, tmp_path, monkeypatch):
    """A probe trains the head alone; low-rank updates leave a checkpoint without a trace of peft; the twin trains everything."""
    tokens = token_set(shared_dir)
    saved_backbone(architecture, tokens, tmp_path / "backbone", 32)
    backbone = Backbone.load(str(tmp_path / "backbone"), None, ["contra", "pro"])
    untouched = Sentiment().model(backbone, True, 0).state_dict()
    model = adapters.apply(Sentiment().model(backbone, True, 0), method, 4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {"llama": {"score.weight"}, "bert": {"classifier", "pooler"}, "t5": {"classification_head"}}[architecture]
    assert trained
    assert all(any(h in name for h in heads) or (method == "lora" and "lora_" in name) for name in trained)
    assert all(module.scaling == {"default": 2.0} for module in model.modules() if hasattr(module, "lora_A"))
    recipe = FinetuneRecipe.of(
        {
            "task": {"name": "sentiment", "text": "review", "label": "verdict", "labels": [40], "seeds": 1, "method": method, "lora_rank": 4},
            "data": {"train": str(easy), "test": 60},
            "model": {"from": str(tmp_path / "backbone")},
            "trainer": {"output_dir": str(tmp_path / "out"), "max_steps": 4, "learning_rate": 1e-2, "bf16": False},
        }
    )
    methods, apply = [], adapters.apply
    monkeypatch.setattr(adapters, "apply", lambda model, method, rank: methods.append(method) or apply(model, method, rank))
    assert finetune(recipe, quiet=True)["method"] == method
    assert methods.pop(0) == method, "tried out before anything is trained"
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, untouched[name])}
    assert moved
    if method == "probe":
        assert moved <= trained
    else:
        inside = [name for name in moved if not any(h in name for h in heads)]
        assert any("attn" in name or "attention" in name.lower() for name in inside)
        for name in inside:
            assert torch.linalg.matrix_rank((model.state_dict()[name] - untouched[name]).double(), rtol=1e-4) <= 4, name
    assert methods == ["full", method], "the twin trains everything"


def test_macro_f1_equals_scikit_learn():
    from sklearn.metrics import f1_score

    from lmssl.tasks.sentiment import macro_f1

    rng = np.random.default_rng(0)
    truth, guesses = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    assert macro_f1(truth, guesses) == pytest.approx(f1_score(truth, guesses, average="macro"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {"text": "reviw"}}, r":1: no column 'reviw'; did you mean 'review'"),
        ({"task": {"labels": [10_000]}}, "10000 labels asked for, 180 examples"),
        ({"task": {"labels": [1]}}, "cannot hold one example of each"),
        ({"task": {"labels": []}}, "labels=.. must be different"),
        ({"task": {"seeds": 0}}, "seeds=0"),
        ({"task": {"text_a": "review"}}, "must both be named"),
        ({"task": {"method": "lore"}}, "one of full, probe, lora"),
        ({"task": {"learning_rates": [0]}}, "numbers above 0"),
        ({"task": {"cue": " It was", "keep": "start"}}, "which keep=start cuts off"),
        ({"task": {"answers": {"good": [" good"]}}}, "answers need a cue"),
        ({"task": {"cue": " It was", "answers": {"good": []}}}, "'good' has an empty one"),
        ({"task": {"cue": " It was", "answers": {"1": [" good"]}}}, "task.answers: for the classes 1; the examples have contra, pro"),
        ({"task": {"validation": 1.0}}, "above 0 and below 1"),
        ({"task": {"scratch_labels": [9999]}}, "task.scratch_labels: 9999 labels asked for"),
        ({"task": {"name": "sentimnt"}}, "did you mean 'sentiment'"),
        ({"task": {"label": "review"}}, "labels cannot hold one example"),
        ({"data": {"max_length": 9999}}, "the backbone has 32 positions"),
        ({"data": {"test": 1000}}, "leave some to train on"),
        ({"data": {"test": "THE SAME"}}, "holds every example of data.train"),
        ({"model": {"from": "nowhere/at/all"}}, "no checkpoint folder"),
        ({"model": {"form": "x"}}, "did you mean 'from'"),
    ],
)
def test_refusals(change, message, easy, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    saved_backbone("bert", tokens, tmp_path / "backbone", 32)
    sections = {
        "task": {"name": "sentiment", "text": "review", "label": "verdict", "labels": [8], "seeds": 1},
        "data": {"train": str(easy), "test": 60},
        "model": {"from": str(tmp_path / "backbone")},
        "trainer": {"output_dir": str(tmp_path / "out"), "max_steps": 1},
    }
    for section, values in change.items():
        sections[section] |= {k: str(easy) if v == "THE SAME" else v for k, v in values.items()}
    with pytest.raises(UserError, match=message):
        finetune(FinetuneRecipe.of(sections), quiet=True)


def test_an_encoder_decoder_without_a_pad_token_is_refused(shared_dir, tmp_path):
    """Its classifier reads each text at its eos, and would count padding."""
    tokens = token_set(shared_dir)
    saved_backbone("t5", tokens, tmp_path)
    own = tokenization.load(tmp_path)
    own.roles.pop("pad")
    own.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": own.eos()}))
    with pytest.raises(UserError, match="has no pad token, and would pad with eos"):
        Sentiment().model(Backbone.load(str(tmp_path), 32, ["0", "1"]), True, 0)
