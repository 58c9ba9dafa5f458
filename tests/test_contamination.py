"""Overlap between pretraining text and tests: found, counted, dropped."""

import json
import random
import re
import unicodedata

import numpy as np
import pytest

import lmssl
from lmssl import tokenization
from lmssl.cli import run
from lmssl.data import contamination, preparation
from lmssl.data.contamination import GRAM, Grams
from lmssl.errors import UserError
from lmssl.history import leak_check
from lmssl.recipe import PretrainRecipe
from lmssl.runs import pretrain
from lmssl.tasks.base import Example
from tests.helpers import SMALL, sentences, tokenizer


def words(count, seed):
    draw = random.Random(seed)
    return [f"w{draw.randrange(10**6)}" for _ in range(count)]


def naive(tests, documents):
    """The same rule, by sets of tuples of words."""
    seen = set()
    for document in documents:
        found = re.findall(r"\w+", document.lower())
        for n in range(contamination.SHORTEST, GRAM + 1):
            seen |= {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}
    hit = []
    for k, test in enumerate(tests):
        found = re.findall(r"\w+", test.lower())
        n = min(GRAM, len(found))
        if n >= contamination.SHORTEST and any(tuple(found[i : i + n]) in seen for i in range(len(found) - n + 1)):
            hit.append(k)
    return hit


@pytest.mark.parametrize("block", [1, contamination.BLOCK])
def test_equals_a_naive_search(block, monkeypatch):
    monkeypatch.setattr(contamination, "BLOCK", block)
    documents = sentences(60, seed=4)
    tests = sentences(60, seed=5)
    for k in range(0, 60, 3):  # plant pieces of 5 to 20 words
        source = documents[k].split()
        tests[k] = " ".join([*words(4, k), *source[: 5 + k % 16], *words(4, -k)])
    for k in range(1, 60, 7):
        tests[k] = documents[k].upper().replace(" ", " - ")
    expected = naive(tests, documents)
    assert contamination.leaked(tests, documents) == expected
    assert 10 < len(expected) < 60


def test_a_hash_is_of_one_word():
    """As many as there are words, equal where the words are, in ASCII and beyond it, short and long."""
    draw = random.Random(0)
    letters = "aAbB_09 .,'\n\t\x00\x7f" + "éÉßµ²½İ東กिः’\u00a0\U0001d400"
    texts = ["".join(draw.choices(letters[: 14 if k % 2 else None], k=draw.randrange(40))) for k in range(400)]
    texts += [("w" * n + " ") * 2 + "w" * (n - 1) + "v" for n in range(1, 70)]
    hashes, owners = contamination._hashed(texts)
    split = [contamination.words(text) for text in texts]
    assert np.bincount(owners, minlength=len(texts)).tolist() == [len(found) for found in split]
    named = {}
    for word, value in zip([word for found in split for word in found], hashes.tolist(), strict=True):
        assert named.setdefault(word, value) == value
    assert len(set(named.values())) == len(named) > 500


def test_thirteen_words_are_needed():
    text = words(40, 0)
    grams = Grams([" ".join(text)])
    assert grams.found_in([" ".join(["x", *text[5 : 5 + GRAM], "y"])]).tolist() == [0]
    assert not len(grams.found_in([" ".join(["x", *text[5 : 4 + GRAM], "y"])]))


@pytest.mark.parametrize(
    ("letters", "space"),
    [("हिन्दीभाषा", " "), ("東京都市場経済新聞社", ""), ("กขคงจฉชซฌญ", "")],
    ids=["marks inside words", "Chinese", "Thai"],
)
def test_words_of_other_scripts(letters, space):
    draw = random.Random(3)
    text = ["".join(draw.choices(letters, k=5)) if space else draw.choice(letters) for _ in range(40)]
    grams = Grams([space.join(text)])
    assert grams.found_in([space.join(text[5 : 5 + GRAM]) + "。"]).tolist() == [0]
    assert not len(grams.found_in([space.join(text[5 : 4 + GRAM])]))


def test_composed_and_decomposed_accents_are_one():
    text = "où étaient les élèves déjà arrivés à la fête du lycée cet été là"
    assert Grams([text]).found_in([unicodedata.normalize("NFD", text)]).tolist() == [0]


def test_where_every_document_leaks_it_says_so(tmp_path):
    text = " ".join(f"w{n}" for n in range(20))
    (tmp_path / "text.txt").write_text("".join(f"{text} {n}\n" for n in range(9)))
    (tmp_path / "tests.txt").write_text(text + "\n")
    with pytest.raises(UserError, match=r"data.decontaminate: 8 documents share 13 words in a row with the tests, and none is left to train on"):
        preparation.prepare(str(tmp_path / "text.txt"), tokenizer(), 1e-9, str(tmp_path / "tests.txt"))


def test_text_cleaned_by_an_older_rule_is_prepared_again(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("\n".join(sentences(30)))
    prepared = lambda: preparation.prepare(str(tmp_path / "text.txt"), tokenizer(), 0.1, True).folder  # noqa: E731
    before = prepared()
    assert prepared() == before
    monkeypatch.setattr(contamination, "RULE", 0)
    assert prepared() != before


def test_a_test_that_cannot_be_read_is_never_skipped(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(sentences(30)))
    (tmp_path / "tests.jsonl").write_text('{"text": "a film"}\noops\n')
    with pytest.raises(UserError, match=r"tests.jsonl:2: not valid JSON"):
        preparation.prepare(str(tmp_path / "text.txt"), tokenizer(), 0.1, str(tmp_path / "tests.jsonl"), on_bad_record="skip")


def test_preparation_drops_the_offenders(tmp_path):
    """`decontaminate` with a file, and with true against the held-out documents."""
    own = [" ".join(words(30, k)) for k in range(50)]
    leaks = [f"{own[k]} {' '.join(words(5, 1000 + k))}" for k in range(10)]
    (tmp_path / "train.txt").write_text("\n".join([*own[10:], *leaks]))
    (tmp_path / "test.txt").write_text("\n".join(own[:10]))
    made = preparation.prepare(str(tmp_path / "train.txt"), tokenizer(), 0.1, str(tmp_path / "test.txt"), quiet=True)
    assert made.manifest["decontaminated"] + made.manifest["held_out"]["documents"] >= 10
    assert contamination.leaked(own[:10], made.texts()) == []
    (tmp_path / "other.txt").write_text("\n".join(own[20:30]))
    other = preparation.prepare(str(tmp_path / "train.txt"), tokenizer(), 0.1, str(tmp_path / "other.txt"), quiet=True)
    assert contamination.leaked(own[20:30], other.texts()) == [], "other tests are looked for anew"
    plain = preparation.prepare(str(tmp_path / "train.txt"), tokenizer(), 0.1, quiet=True)
    assert contamination.leaked(own[:10], plain.texts())
    (tmp_path / "both.txt").write_text("\n".join([*own, *(f"again {text}" for text in own)]))
    made = preparation.prepare(str(tmp_path / "both.txt"), tokenizer(), 0.3, True, quiet=True)
    assert made.manifest["decontaminated"]
    assert contamination.leaked(made.held_out().texts(), made.texts()) == []


def test_the_documents_that_are_held_out_are_those_that_nothing_may_overlap(tmp_path):
    """Of files of their own; and the one of the smallest hash, where the fraction is too small to hold any."""
    own = [" ".join(words(30, k)) for k in range(20)]
    (tmp_path / "held.txt").write_text("\n".join(own[:3]))
    (tmp_path / "text.txt").write_text("\n".join([*own[3:], *(f"again {text}" for text in own[:3])]))
    made = preparation.prepare(str(tmp_path / "text.txt"), tokenizer(), str(tmp_path / "held.txt"), True, quiet=True)
    assert (made.manifest["decontaminated"], made.manifest["train"]["documents"]) == (3, 17)
    (tmp_path / "few.txt").write_text("\n".join([*own[:5], *(f"again {text}" for text in own[:5])]))
    made = preparation.prepare(str(tmp_path / "few.txt"), tokenizer(), 1e-9, True, quiet=True)
    assert [made.manifest[name] for name in ("decontaminated", "duplicates")] == [1, 0]
    assert (made.manifest["held_out"]["documents"], made.manifest["train"]["documents"]) == (1, 8)
    assert contamination.leaked(made.held_out().texts(), made.texts()) == []


def test_documents_come_back_as_text(tmp_path):
    texts = sentences(700, seed=6)
    made = preparation.from_iterable(texts, tokenizer(), tmp_path / "t", 0.0)
    assert list(made.texts()) == list(dict.fromkeys(texts))


def test_the_check_of_a_result(tmp_path, capsys):
    """What the backbone was trained on is checked, not what its recipe held out."""
    rows = [" ".join(words(30, k)) for k in range(80)]
    (tmp_path / "text.txt").write_text("\n".join(rows))
    recipe = tmp_path / "r.yaml"
    sections = {
        "data": {"text": str(tmp_path / "text.txt"), "tokenizer": "tokenizer_assets/bpe-8k", "seq_length": 32, "held_out": 0.2},
        "model": {"architecture": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1},
        "objective": {"name": "next_token"},
        "trainer": {"output_dir": str(tmp_path / "run"), "max_steps": 1},
    }
    recipe.write_text(json.dumps(sections))
    assert run(["pretrain", str(recipe)]) == 0, capsys.readouterr().err
    found = leak_check(str(tmp_path / "run"), [Example(text, "", f"t:{k}") for k, text in enumerate([*rows, *sentences(5)])])
    held = preparation.prepare(str(tmp_path / "text.txt"), tokenization.load("tokenizer_assets/bpe-8k"), 0.2, quiet=True).manifest["held_out"]["documents"]
    assert found["checked"]
    assert found["leaked"] == 80 - held
    (tmp_path / "text.txt").unlink()
    assert "not at hand" in leak_check(str(tmp_path / "run"), [Example("a", "", "")])["reason"]


def test_a_backbone_that_drops_case_hides_no_leak(tmp_path):
    """Its documents come back in small letters; what is looked for is made so too."""
    texts = [" ".join(words(30, k)) for k in range(40)]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    lower = tokenization.train(texts, "wordpiece", 500)
    lower.save(tmp_path / "lower")
    sections = {
        "data": {"text": str(tmp_path / "text.txt"), "tokenizer": str(tmp_path / "lower"), "seq_length": 32, "held_out": 0.2},
        "model": {"architecture": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
        "objective": {"name": "masked"},
        "trainer": {"output_dir": str(tmp_path / "run"), "max_steps": 1},
    }
    pretrain(PretrainRecipe.of(sections), quiet=True)
    found = leak_check(str(tmp_path / "run"), [Example(text.upper(), "", f"t:{k}") for k, text in enumerate(texts)])
    held = preparation.prepare(str(tmp_path / "text.txt"), lower, 0.2, quiet=True).manifest["held_out"]["documents"]
    assert found["leaked"] == 40 - held > 0


def test_a_tokenizer_that_drops_case_and_accents_hides_no_leak():
    """Documents are compared as the tokenizer gives them back; so are the test texts."""
    texts = ["Für die Übung Über die Brücke mit vielen Wörtern die lang genug sind damit es reicht"]
    lower = tokenization.train(texts * 3, "wordpiece", 400)
    assert lower.round_trip(texts)[0] == lower.round_trip(lower.round_trip(texts))[0] != texts[0]
    assert contamination.leaked(lower.round_trip(texts), lower.round_trip(texts)) == [0]


def test_a_bad_path_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"data\.decontaminate: no such file"):
        preparation.prepare(str(tmp_path), tokenizer(), 0.1, str(tmp_path / "x.txt"))


def test_texts_too_short_to_be_looked_for_are_counted(corpus_file, tmp_path):
    made = {
        "data": {"text": str(corpus_file), "tokenizer": "tokenizer_assets/bpe-8k", "seq_length": 32, "held_out": 0.1},
        "model": {"architecture": "llama", **SMALL["llama"]},
        "objective": {"name": "next_token"},
        "trainer": {"output_dir": str(tmp_path / "run"), "max_steps": 1},
    }
    lmssl.pretrain(lmssl.PretrainRecipe.of(made), quiet=True)
    short, long = Example("book a table", "", "a:1"), Example(" ".join(f"word{n}" for n in range(9)), "", "a:2")
    assert leak_check(str(tmp_path / "run"), [short, long])["short"] == 1
    told = leak_check(str(tmp_path / "run"), [short, short])
    assert not told["checked"]
    assert "fewer than 8 words" in told["reason"]


def test_what_every_text_shares_is_found_once(monkeypatch):
    """A signature under all test texts, and under all documents: each is found, and then no longer looked for."""
    signature = " ".join(f"sign{k}" for k in range(20))
    tests, documents = [f"{text} {signature}" for text in sentences(30)], [f"{text} {signature}" for text in sentences(50, seed=1)]
    own = " ".join(f"own{k}" for k in range(20))
    for many in (0, 100):
        monkeypatch.setattr(contamination, "MANY", many)
        assert contamination.leaked([*tests, own, "w " * 20], [*documents, own]) == list(range(31))
    grams = Grams(tests)
    some = [*documents, *sentences(50, seed=2), own, tests[3], ""]
    assert grams.any_in(some).tolist() == [bool(len(grams.found_in([text]))) for text in some]
    grams.forget(np.arange(29))
    assert grams.found_in(documents[:1]).tolist() == [29]
