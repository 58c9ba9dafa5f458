"""tiktoken's ids are those of the tokenizers library, or it is not used."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from lmssl import byte_pairs, tokenization
from tests import helpers
from tests.test_tokenization import ASSET

MADE = tokenization.load(ASSET)
FAST = byte_pairs.encoder(MADE.backend)


def slow(texts, backend=MADE.backend):
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def test_the_asset_and_new_tokenizers_have_one():
    assert FAST is not None
    assert byte_pairs.encoder(helpers.tokenizer("bpe").backend) is not None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab .,'s\n\t 12"), max_size=4))
def test_any_text_has_the_same_ids(texts):
    assert [ids.tolist() for ids in byte_pairs.encode(FAST, texts)] == slow(texts)


def test_code_points_are_split_alike():
    """A sample of all of them, between letters, digits, spaces and punctuation; tests/bench/preparation.py takes every one."""
    draw = np.random.default_rng(0).choice(np.r_[0:0xD800, 0xE000:0x110000], 20_000, replace=False)
    texts = [f"a{chr(c)}b{chr(c)}1 {chr(c)} {chr(c)}\n{chr(c)}!" for c in draw]
    assert [ids.tolist() for ids in byte_pairs.encode(FAST, texts)] == slow(texts)


def test_specials_spelt_in_a_text_are_text_and_the_ends_are_marked():
    (ids,) = MADE.encode(["a </s> b <mask> <extra_id_3>"])
    assert ids.dtype == np.int32
    assert ids[1:-1].tolist() == slow(["a </s> b <mask> <extra_id_3>"])[0]
    assert (ids[0], ids[-1]) == (MADE.id("bos"), MADE.id("eos"))


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


def test_a_token_that_its_merges_do_not_reach_is_refused():
    """abc is listed as a + bc, but ab is merged before bc can be: tiktoken would join ab and c."""
    assert byte_pairs.encoder(backend([("a", "b"), ("a", "c")])) is not None
    odd = backend([("a", "b"), ("b", "c"), ("a", "bc")])
    assert len(slow(["abc"], odd)[0]) == 2
    assert byte_pairs.encoder(odd) is None


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


def test_a_pattern_of_its_own():
    """Llama 3 and Qwen split by a regular expression in front of ByteLevel."""
    made = backend([("a", "b"), ("1", "2"), ("12", "3"), ("123", "4")], pre_tokenizer=split_by(r"\p{N}{1,3}|\p{L}+|[^\p{L}\p{N}]+"))
    fast, texts = byte_pairs.encoder(made), ["abab 12345 ab!!", "1234a"]
    assert [ids.tolist() for ids in byte_pairs.encode(fast, texts)] == slow(texts, made)


def test_a_pattern_that_leaves_text_out_loses_none():
    """BLOOM's: punctuation stands between its matches, which tiktoken would drop."""
    made = backend([("a", "b")], pre_tokenizer=split_by(r" ?[^(\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"))
    texts = ["ab, ab.\nab", "ab ab"]
    tokenizer = tokenization.Tokenizer(made, {"eos": "a"}, [])
    assert [ids[:-1].tolist() for ids in tokenizer.encode(texts)] == slow(texts, made)
    assert [ids.tolist() for ids in byte_pairs.encode(byte_pairs.encoder(made), ["ab ab"])] == slow(["ab ab"], made)
    with pytest.raises(ValueError, match="unmatched"):
        byte_pairs.encode(byte_pairs.encoder(made), texts)


def test_merges_that_are_passed_over_are_left_to_their_own_library():
    assert byte_pairs.encoder(backend([("a", "b"), ("b", "c"), ("a", "bc")], model={"ignore_merges": True})) is None
