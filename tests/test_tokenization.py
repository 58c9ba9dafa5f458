"""Tokenizers of three kinds: made, saved, loaded, completed, refused."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import transformers

import lmssl
from lmssl import tokenization
from lmssl.data import preparation
from lmssl.errors import UserError
from lmssl.objectives import MaskedTokens, NextToken, SpanCorruption
from lmssl.objectives.base import Row
from lmssl.recipe import PretrainRecipe
from lmssl.tasks.base import Backbone
from tests.helpers import sentences, small_model, tokenizer

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


def by_words(vocab, ids):
    """Numbers of the tokens that begin a word."""
    ends = np.append(True, vocab.word_end[ids][:-1])
    return np.flatnonzero(vocab.word_start[ids] | ends).tolist()


@pytest.mark.parametrize("kind", tokenization.KINDS)
def test_scripts_without_spaces_have_words_and_sentences(kind):
    texts = ["今天天气很好。我们去公园！", "วันนี้อากาศดี", "好的 film 很好。"] * 20
    made = tokenization.train(texts, kind, 700)
    vocab, (ids, spans) = made.vocab(), made.spans(texts[:1])[0]
    known = [n for n, i in enumerate(ids) if not vocab.special[i]]  # <unk> of a wordpiece
    assert set(known) <= {n for n in known if vocab.word_start[ids[n]] or texts[0][spans[n, 0]] in "。！"}
    assert [texts[0][spans[n, 1] - 1] for n in np.flatnonzero(vocab.sentence_end[ids])] == ["。", "！"]


def test_bytes_of_scripts_without_spaces_are_counted_without_them():
    texts = ["今天天气很好", "the film was 很好"]
    made = tokenization.train(texts * 20, "wordpiece", 400)
    for text in texts:
        counted = int(made.vocab().token_bytes[made.encode([text])[0]].sum())
        assert abs(counted - len(text.encode())) <= 1, text


def test_a_byte_of_a_vocabulary_of_pieces_is_a_byte():
    """As Llama's: "<0xE4>" stands for one, not for six."""
    from tokenizers import Tokenizer, decoders, models

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁film", -1.0), ("<0xE4>", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, 0, byte_fallback=False))
    backend.decoder = decoders.Metaspace()
    vocab = tokenization.Tokenizer(backend, {"eos": "</s>"}, []).vocab()
    assert vocab.token_bytes.tolist() == [0, 0, 5, 1]


def test_what_is_added_is_known_at_once():
    made = tokenization.Tokenizer(tokenization.train(sentences(50), "bpe", 380).backend, {"eos": "</s>"}, [])
    assert made.vocab().mask is None
    made.complete()
    assert made.vocab().mask is not None


def test_a_part_of_a_letter_begins_no_word():
    made = tokenization.load(ASSET)
    ids = made.encode(["one мир señor — two"])[0][1:-1]
    starts = [made.backend.id_to_token(int(i)) for i in ids[made.vocab().word_start[ids]]]
    assert len(ids) > 12
    assert [token[0] for token in starts] == ["Ġ"] * 4


@pytest.mark.parametrize("byte_level", [False, True])
def test_marks_at_the_end_of_words(byte_level):
    """GPT's, and CLIP's, which are bytes too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder(suffix="</w>")
    if byte_level:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([backend.pre_tokenizer, pre_tokenizers.ByteLevel(False, use_regex=False)]), decoders.ByteLevel()
    special = ["<unk>", "<pad>", "<s>", "</s>", "<mask>"]
    backend.train_from_iterator(sentences(50, seed=1), trainers.BpeTrainer(vocab_size=120, special_tokens=special, end_of_word_suffix="</w>", show_progress=False))
    made = tokenization.Tokenizer(backend, {"pad": "<pad>", "eos": "</s>", "mask": "<mask>"}, [])
    vocab, text = made.vocab(), "the film was good. a slow story"
    ids, spans = made.spans([text])[0]
    assert [int(spans[n, 0]) for n in by_words(vocab, ids)] == [0, 4, 9, 13, 17, 19, 21, 26]
    assert len(ids) > 8
    assert abs(int(vocab.token_bytes[ids].sum()) - len(text)) <= 1
    row = Row(np.append(ids, vocab.eos).astype(np.int32), np.ones(len(ids) + 1, np.int32))
    for seed in range(20):
        hidden = np.flatnonzero(MaskedTokens(rate=0.5, unit="word")(row, vocab, np.random.default_rng(seed))["labels"] != -100)
        assert len(hidden)
        whole = [set(range(a, b)) for a, b in pairwise([*by_words(vocab, ids), len(ids)])]
        assert set(hidden.tolist()) == set().union(*(w for w in whole if w & set(hidden.tolist())))


def test_a_tokenizer_without_eos_gets_one_when_its_checkpoint_is_continued(tmp_path):
    made = tokenizer()
    bare = tokenization.Tokenizer(made.backend, {role: text for role, text in made.roles.items() if role != "eos"}, made.sentinels)
    bare.save(tmp_path)
    sections = {"data": {"text": "x"}, "model": {"from": str(tmp_path)}, "objective": {"name": "next_token"}, "trainer": {}}
    assert tokenization.load(tmp_path).id("eos") is None
    assert PretrainRecipe.of(sections).tokenizer().id("eos") is not None
    small_model("bert", made.vocab()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no eos token; lmssl pretrain with model.from=.* adds one"):
        Backbone.load(str(tmp_path))


SPELT = "the </s> film<mask> <extra_id_3> <unk><s> PAD was good"


@pytest.mark.parametrize("kind", tokenization.KINDS)
def test_specials_spelt_in_text_are_text(kind, tmp_path):
    made = tokenization.train([*sentences(300), SPELT.replace("<", " < ").replace(">", " > ").replace("/", " / ").replace("_3", " _ 3 ")], kind, 480)
    vocab, decoded = made.vocab(), " ".join(made.round_trip([SPELT])[0].split())
    assert decoded.replace(" ", "").lower() == SPELT.replace(" ", "").lower()
    made.save(tmp_path)
    for again in (made, tokenization.load(tmp_path)):
        ids = again.encode([SPELT])[0]
        assert vocab.special[ids[1:-1]].sum() == vocab.special[again.spans([SPELT])[0][0]].sum() == 0
        assert (ids[0], ids[-1]) == (vocab.bos, vocab.eos)
    assert vocab.special[made.template("</s><extra_id_3>")].sum() == 2


def test_a_special_token_without_a_bracket_is_text_too(tmp_path):
    """A vocabulary of words holds it as one; what is ordinary stays what it was."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"PAD": 0, "[UNK]": 1, "EOS": 2, "good": 3, "bad": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["PAD", "[UNK]", "EOS"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="PAD", unk_token="[UNK]", eos_token="EOS").save_pretrained(tmp_path)
    made = tokenization.load(tmp_path)
    assert made.encode(["good EOS bad PAD other"])[0].tolist() == [3, 1, 4, 1, 1, 2]
    assert made.unknown() == 1
    plain = bert_like(tmp_path / "plain")
    assert plain.reader is plain.backend, "nothing spells its special tokens"


def test_unknown_text_is_refused_or_warned_of(tmp_path, caplog):
    made = tokenization.train(sentences(100), "wordpiece", 400)
    for texts, said in ((["\u4e2d\u6587\u5f88\u597d"] * 3, "error"), ([*sentences(20), *["\u4e2d\u6587 good"] * 20], "warning"), (sentences(20), "")):
        (tmp_path / "x.txt").write_text("\n".join(f"{text} {n}" for n, text in enumerate(texts)))
        for _ in range(2):  # prepared, and found prepared
            caplog.clear()
            if said == "error":
                with pytest.raises(UserError, match=r"data.text: \d+ of \d+ tokens are unknown to the tokenizer .*lmssl tokenizer TEXT"):
                    preparation.prepare(tmp_path / "x.txt", made, 0.2, quiet=True)
            else:
                preparation.prepare(tmp_path / "x.txt", made, 0.2, quiet=True)
            assert ("tokens are unknown to" in caplog.text) == (said == "warning")
    assert tokenizer().unknown() is None
    assert tokenizer("unigram").unknown() == tokenizer("unigram").backend.token_to_id("<unk>")


def test_a_decoder_s_tokenizer_leaves_a_prompt_open(tmp_path):
    """Behind eos there is nothing to generate."""
    made = tokenizer()
    made.for_prompts().save(tmp_path)
    plain, vocab = transformers.AutoTokenizer.from_pretrained(tmp_path), made.vocab()
    ids = plain("the film")["input_ids"]
    assert ids == made.encode(["the film"])[0][:-1].tolist()
    assert plain("the", "film")["input_ids"].count(vocab.eos) == 1
    again = tokenization.load(tmp_path)
    assert again.for_prompts() is again
    assert again.encode(["the film"])[0][-1] == vocab.eos, "documents still end in it"


def test_a_checkpoint_that_transformers_misreads_is_warned_of(caplog):
    config = transformers.Qwen2Config(vocab_size=8192)
    tokenization.load(ASSET).check_architecture(config, trained=True)
    assert "transformers reads every tokenizer of a 'qwen2' by rules of that architecture's own" in caplog.text
    caplog.clear()
    tokenization.load(ASSET).check_architecture(transformers.LlamaConfig(), trained=True)
    assert not caplog.text


def test_a_fine_tuned_model_s_tokenizer_pads(tmp_path):
    """Where there is no token for it, with what the model is padded with: a pipeline cannot batch otherwise."""
    made = tokenization.load(ASSET)
    del made.roles["pad"]
    made.for_inputs(16).save(tmp_path)
    plain = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert plain.pad_token_id == made.vocab().eos == made.vocab().pad
    assert plain(["the film", "film"], padding=True)["input_ids"][1][-1] == plain.pad_token_id


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


def test_a_tokenizer_without_eos_is_refused_from_python(tmp_path):
    plain = tokenization.Tokenizer(tokenizer().backend, {k: v for k, v in tokenizer().roles.items() if k != "eos"}, [], {}, "mine")
    with pytest.raises(UserError, match="mine has no eos token"):
        lmssl.from_iterable(["a film"], plain, tmp_path / "tokens", 0.0)


def test_a_checkpoint_without_a_tokenizer_is_not_given_an_empty_one(tmp_path):
    """As `save_pretrained` of a model alone leaves it: transformers makes one of the architecture's class that knows no word."""
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer: neither tokenizer"):
        tokenization.load(tmp_path)
