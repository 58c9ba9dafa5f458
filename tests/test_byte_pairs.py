"""The ids of fastokens are those of the tokenizers library, or it is not used."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from lmssl import byte_pairs, tokenization
from lmssl.errors import UserError
from tests import helpers
from tests.test_tokenization import ASSET

MADE = tokenization.load(ASSET)
FAST = byte_pairs.encoder(MADE.backend)


def slow(texts, backend=MADE.backend):
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def quick(texts, backend=MADE.backend):
    fast = FAST if backend is MADE.backend else byte_pairs.encoder(backend)
    return [ids.tolist() for ids in byte_pairs.encode(fast, backend, texts)]


def test_the_asset_and_new_tokenizers_have_one():
    assert FAST is not None
    assert byte_pairs.encoder(helpers.tokenizer("bpe").backend) is not None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab .,'s\n\t 12"), max_size=4))
def test_any_text_has_the_same_ids(texts):
    assert quick(texts) == slow(texts)


def test_code_points_are_split_alike():
    """A sample of all of them, between letters, digits, spaces and punctuation; tests/bench/preparation.py takes every one."""
    draw = np.random.default_rng(0).choice(np.r_[0:0xD800, 0xE000:0x110000], 20_000, replace=False)
    texts = [f"a{chr(c)}b{chr(c)}1 {chr(c)} {chr(c)}\n{chr(c)}!" for c in draw]
    assert quick(texts) == slow(texts)


def test_long_ones():
    texts = [" " * 10**6, "a" * 10**5, "\n" * 10**5, "é" * 10**5, "", "x"]
    assert quick(texts) == slow(texts)
    assert quick([]) == []


def test_specials_spelt_in_a_text_are_text_and_the_ends_are_marked():
    texts = ["a </s> b <mask> <extra_id_3>", "<s></s>", "a <s"]
    for ids, text in zip(MADE.encode(texts), texts, strict=True):
        assert ids.dtype == np.int32
        assert ids[1:-1].tolist() == slow([text])[0]
        assert not {*ids[1:-1].tolist()} & {MADE.id("bos"), MADE.id("eos"), MADE.id("mask")}
        assert (ids[0], ids[-1]) == (MADE.id("bos"), MADE.id("eos"))


def test_without_it_text_has_the_same_ids(monkeypatch):
    texts = ["two thirds of a film", "", "é </s>\n  x"]
    monkeypatch.setitem(sys.modules, "fastokens", None)
    made = tokenization.load(ASSET)
    assert byte_pairs.encoder(made.backend) is None
    assert [ids.tolist() for ids in made.encode(texts)] == [ids.tolist() for ids in MADE.encode(texts)]


def test_an_older_one_is_left_alone(monkeypatch):
    monkeypatch.setattr(byte_pairs.metadata, "version", lambda name: "0.3.4")
    assert byte_pairs.encoder(MADE.backend) is None
    monkeypatch.setattr(byte_pairs.metadata, "version", lambda name: "1.0.0")
    assert byte_pairs.encoder(MADE.backend) is not None


def test_other_ids_are_noticed():
    """A later fastokens that splits or merges otherwise."""
    other = byte_pairs.encoder(helpers.tokenizer("bpe").backend)
    with pytest.raises(UserError, match="pip uninstall fastokens"):
        byte_pairs.encode(other, MADE.backend, ["two thirds of a film"])


def backend(merges, **changes):
    """A byte-level BPE of the 256 bytes and some merges."""
    letters = sorted(byte_pairs.alphabet())
    vocab = {text: i for i, text in enumerate([*letters, *("".join(m) for m in merges)])}
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spec = json.loads(made.to_str())
    spec["model"] |= changes.pop("model", {})
    spec |= changes
    return Tokenizer.from_str(json.dumps(spec))


def test_merges_are_those_of_the_list():
    """abc is listed as a + bc, but ab is merged before bc can be: what joins neighbours by their union's id would join ab and c."""
    odd = backend([("a", "b"), ("b", "c"), ("a", "bc")])
    assert len(slow(["abc"], odd)[0]) == 2
    assert quick(["abc"], odd) == slow(["abc"], odd)
    passed_over = backend([("a", "b"), ("b", "c"), ("a", "bc")], model={"ignore_merges": True})
    assert len(slow(["abc"], passed_over)[0]) == 1
    assert quick(["abc abcabc"], passed_over) == slow(["abc abcabc"], passed_over)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=12), st.lists(st.text("abc ", max_size=12), max_size=6), st.booleans())
def test_any_list_of_merges_makes_the_same_ids(drawn, texts, ignore):
    made, merges = ["a", "b", "c"], []
    for left, right in drawn:
        pair = made[left % len(made)], made[right % len(made)]
        if "".join(pair) not in made:
            merges.append(pair)
            made.append("".join(pair))
    some = backend(merges, model={"ignore_merges": ignore})
    assert quick(texts, some) == slow(texts, some)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"dropout": 0.1}},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"added_tokens": [{"id": 900, "content": "abab", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}]},
    ],
)
def test_what_is_no_plain_byte_level_bpe_is_left_to_its_own_library(changes):
    assert byte_pairs.encoder(backend([("a", "b")], **changes)) is None


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_other_kinds_are_left_to_their_own_library(kind):
    assert byte_pairs.encoder(helpers.tokenizer(kind).backend) is None


def split_by(pattern):
    """A regular expression in front of ByteLevel."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


@pytest.mark.parametrize(
    "pattern", [r"\p{N}{1,3}|\p{L}+|[^\p{L}\p{N}]+", r" ?[^(\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+", r"\w+|[^\w\s]+|\s+"], ids=["digits", "BLOOM", "words"]
)
def test_a_pattern_that_was_not_tried(pattern):
    """Is left to the tokenizers library: the two take other characters for `\\w`."""
    assert byte_pairs.encoder(backend([("a", "b")], pre_tokenizer=split_by(pattern))) is None


@pytest.mark.parametrize("pattern", byte_pairs.PATTERNS, ids=["GPT-2", "Llama 3", "Qwen2"])
def test_a_pattern_of_its_own(pattern):
    """In front of ByteLevel."""
    made = backend([("a", "b"), ("1", "2"), ("12", "3"), ("123", "4")], pre_tokenizer=split_by(pattern))
    texts = ["abab 12345 ab!!", "1234a", "ab, ab.\nab", "It's\r\n\n  THEY'LL  \u2026\u3002 \u00e9\u0301 \U0001f600", ""]
    texts += ["\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902", "a\u180eb \u180e c", "\u24b6 \u24d0'\u017f'S \u2028\u2029\x85 \x1c"]
    assert byte_pairs.encoder(made) is not None
    assert quick(texts, made) == slow(texts, made)
    tokenizer = tokenization.Tokenizer(made, {"eos": "a"}, [])
    assert [ids[:-1].tolist() for ids in tokenizer.encode(texts)] == slow(texts, made)
