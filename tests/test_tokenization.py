"""Tokenizers of three kinds: made, saved, loaded, completed, refused."""

from pathlib import Path

import numpy as np
import pytest
import transformers

from lmssl import tokenization
from lmssl.errors import UserError
from lmssl.objectives import MaskedTokens, NextToken, SpanCorruption
from tests.helpers import sentences, tokenizer

ASSET = "tokenizer_assets/bpe-8k"


@pytest.mark.parametrize("kind", tokenization.KINDS)
def test_trained_kinds_serve_every_objective(kind, tmp_path):
    made = tokenizer(kind)
    made.save(tmp_path)
    loaded = tokenization.load(tmp_path)
    assert loaded.hash == made.hash
    vocab = loaded.vocab()
    assert len(vocab.sentinels) == 100
    assert None not in (vocab.bos, vocab.mask)
    assert vocab.special[[vocab.pad, vocab.bos, vocab.eos, vocab.mask, *vocab.sentinels]].all()
    for objective in (NextToken(), MaskedTokens(), SpanCorruption()):
        loaded.check(objective, "x")
    text = sentences(1, seed=5)[0]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == loaded.encode([text])[0].tolist()


@pytest.mark.parametrize("kind", tokenization.KINDS)
def test_vocabulary_facts(kind):
    made, vocab = tokenizer(kind), tokenizer(kind).vocab()
    text = "the film was good. a slow story"
    ids = made.encode([text])[0][1:-1]
    starts = vocab.word_start[ids].copy()
    starts[0] = True
    words = (
        "".join("|" + made.backend.id_to_token(int(i)) if s else made.backend.id_to_token(int(i)) for i, s in zip(ids, starts)).replace("Ġ", "").replace("##", "").replace("▁", "")
    )
    assert [w for w in words.replace("|.", ".").split("|") if w] == text.split()
    assert vocab.sentence_end[ids].sum() == 1
    assert abs(int(vocab.token_bytes[ids].sum()) - len(text)) <= 1
    assert not vocab.token_bytes[vocab.special].any()


def test_specials_spelt_in_text_are_text():
    ids = tokenizer().encode(["a </s> b <mask> <extra_id_3>"])[0]
    vocab = tokenizer().vocab()
    assert vocab.special[ids[1:-1]].sum() == 0
    assert (ids[0], ids[-1]) == (vocab.bos, vocab.eos)


def test_bytes_of_a_byte_level_vocabulary_are_exact():
    made = tokenization.load(ASSET)
    for text in ["plain words here", "naïve café — “quotes”", "日本語 🙂"]:
        assert made.vocab().token_bytes[made.encode([text])[0]].sum() == len(text.encode())


def test_asset_is_what_its_readme_says():
    made = tokenization.load(ASSET)
    assert made.size == 8192
    assert made.hash in Path(ASSET, "README.md").read_text()
    for objective in (NextToken(), MaskedTokens(), SpanCorruption()):
        made.check(objective, "x")


def bert_like(tmp_path):
    """A tokenizer without mask and sentinels, whose specials are called cls and sep."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "good": 4, "bad": 5}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]").save_pretrained(tmp_path)
    return tokenization.load(tmp_path)


def test_foreign_tokenizer_is_refused_with_the_fix_and_completed(tmp_path):
    foreign = bert_like(tmp_path)
    assert (foreign.roles["bos"], foreign.roles["eos"]) == ("[CLS]", "[SEP]")
    with pytest.raises(UserError, match=r"has no mask token.*lmssl tokenizer --from"):
        foreign.check(MaskedTokens(), "masked")
    with pytest.raises(UserError, match="has no sentinels"):
        foreign.check(SpanCorruption(), "span_corruption")
    foreign.check(NextToken(), "next_token")
    before = foreign.encode(["good bad"])[0]
    assert len(bert_like(tmp_path).complete(sentinels=False)) == 1, "the mask alone"
    added = foreign.complete()
    assert len(added) == 101
    assert np.array_equal(foreign.encode(["good bad"])[0], before), "old ids stay"
    foreign.save(tmp_path / "new")
    again = tokenization.load(tmp_path / "new")
    again.check(MaskedTokens(), "masked")
    again.check(SpanCorruption(), "span_corruption")
    assert again.size == 6 + 101
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "new").mask_token_id == again.id("mask")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tokenization.train(["a"], "bpee"), "did you mean 'bpe'"),
        (lambda: tokenization.train(["a"], "bpe", 100), "use at least"),
        (lambda: tokenization.train([], "bpe"), "no document"),
        (lambda: tokenization.load("tokenizer_assets/bpe-9k/x"), "no such folder"),
        (lambda: tokenization.load("pyproject.toml"), "is a file"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(UserError, match=message):
        call()
