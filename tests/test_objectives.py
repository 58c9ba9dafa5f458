"""Laws that hold for every objective, and what each paper promises, measured on 100k tokens."""

import dataclasses
import itertools
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmssl
from lmssl import from_iterable, load_tokenizer
from lmssl.data.stream import Collator, Stream, generator, two_lengths
from lmssl.errors import UserError
from lmssl.objectives import OBJECTIVES, Infilling, MaskedTokens, NextToken, SpanCorruption, fields_of, make
from lmssl.objectives.base import Row
from lmssl.objectives.denoising import ROOM
from lmssl.objectives.toy import vocab
from lmssl.pretraining import PretrainTrainer
from lmssl.tasks import make_task
from tests.helpers import arguments, small_model, token_set

VOCAB = vocab(1000, 100)
ALL = [
    NextToken(), MaskedTokens(), MaskedTokens(rate=0.4, unit="word"), MaskedTokens(rate=0.3, unit="span"), SpanCorruption(), SpanCorruption(rate=0.5, mean_span=8.0),
    Infilling(), Infilling(rate=0.0, permute=0.0, delete_rate=0.2), Infilling(rate=0.1, mask_rate=0.2, delete_rate=0.1, rotate=0.5),
]  # fmt: skip
LENGTH = 128


def row_of(documents: list[int], length: int, seed: int) -> Row:
    """A row of documents with these numbers of tokens, each closed by eos, cut at `length`, padded behind."""
    rng = np.random.default_rng(seed)
    ids, segments = np.zeros(length, np.int32), np.zeros(length, np.int32)
    at = 0
    for number, size in enumerate(documents):
        text = np.append(rng.choice(VOCAB.ordinary, size), VOCAB.eos)[: length - at]
        ids[at : at + len(text)], segments[at : at + len(text)] = text, number + 1
        at += len(text)
    return Row(ids, segments)


rows = st.builds(row_of, st.lists(st.integers(1, 90), max_size=40), st.just(LENGTH), st.integers(0, 10**6))


@pytest.mark.parametrize("objective", ALL, ids=str)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_laws(objective, data):
    length = objective.row_length(LENGTH)
    documents = data.draw(st.lists(st.integers(1, 90), max_size=60))
    row = row_of(documents, length, data.draw(st.integers(0, 10**6)))
    before = row.ids.copy()
    item = data.draw(st.integers(0, 10**9))
    out = objective(row, VOCAB, generator(1, item))
    again = objective(row, VOCAB, generator(1, item))
    assert np.array_equal(row.ids, before), "the row itself is never written to"
    assert all(np.array_equal(out[k], again[k]) for k in out), "a pure function of (row, seed, i)"
    limits = objective.lengths(LENGTH)
    assert len(out["input_ids"]) <= limits["input_ids"][-1]
    assert len(out["labels"]) <= limits["labels"][-1]
    assert (out["labels"] != -100).sum() <= objective.most_labels(LENGTH)
    assert set(np.unique(out["segments"])) <= set(np.unique(row.segments))
    asked = out["labels"][out["labels"] != -100]
    assert ((asked >= 0) & (asked < VOCAB.size)).all()
    assert VOCAB.pad not in asked
    if "decoder_input_ids" in out:
        assert len(out["decoder_input_ids"]) == len(out["labels"]) == len(out["decoder_segments"])
        starts = np.flatnonzero(np.diff(out["decoder_segments"], prepend=0))
        assert (out["decoder_input_ids"][starts] == VOCAB.start).all(), "each document's decoder starts anew"
        inner = np.setdiff1d(np.arange(len(out["labels"])), starts)
        assert np.array_equal(out["decoder_input_ids"][inner], out["labels"][inner - 1]), "the decoder reads its labels, shifted"
    else:
        assert not VOCAB.special[asked].any() or isinstance(objective, NextToken), "specials are never asked for by noise"
        assert (out["labels"][row.segments == 0] == -100).all()


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_collator_keeps_every_label(objective):
    family = next(iter(objective.families))
    collator = Collator(objective, LENGTH, family, VOCAB.pad)
    items = [objective(row_of([3] * 60, objective.row_length(LENGTH), s), VOCAB, generator(0, s)) for s in range(4)]
    batch = collator(items)
    flat = batch["input_ids"].shape[0] * (batch.get("decoder_input_ids", batch["input_ids"]).shape[1])
    assert batch["label_positions"].max() < flat
    assert (batch["labels"] != -100).sum() == sum((i["labels"] != -100).sum() for i in items)


@given(row=rows, seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_span_corruption_loses_nothing(row, seed):
    """Putting the decoder's spans back in the place of the sentinels restores the text."""
    out = SpanCorruption(rate=0.3, mean_span=2.0)(row, VOCAB, generator(seed, 0))
    sentinels = set(VOCAB.sentinels.tolist())
    restored = []
    for number in np.unique(row.segments[row.segments > 0]):
        spans, current = {}, None
        for token in out["labels"][out["decoder_segments"] == number].tolist()[:-1]:
            if token in sentinels:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        for token in out["input_ids"][out["segments"] == number].tolist():
            restored += spans[token] if token in sentinels else [token]
    assert restored == row.ids[row.segments > 0].tolist()


@given(row=rows, seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_infilling_target_is_the_original(row, seed):
    out = Infilling()(row, VOCAB, generator(seed, 0))
    assert np.array_equal(out["labels"], row.ids[row.segments > 0])


def stream_of(objective, count=800):
    """100k tokens: documents of 40 to 400 tokens, cut into rows."""
    rng = np.random.default_rng(0)
    for i in range(count):
        row = row_of(rng.integers(40, 400, 5).tolist(), objective.row_length(LENGTH), i)
        yield row, objective(row, VOCAB, generator(7, i))


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_masked_statistics(rate, unit):
    """BERT: the share selected, and 80/10/10 of it."""
    maskable = asked = masked = same = drawn = 0
    for row, out in stream_of(MaskedTokens(rate=rate, unit=unit)):
        at = out["labels"] != -100
        maskable += int((~VOCAB.special[row.ids] & (row.segments > 0)).sum())
        asked += int(at.sum())
        masked += int((out["input_ids"][at] == VOCAB.mask).sum())
        same += int((out["input_ids"][at] == row.ids[at]).sum())
        drawn += int(VOCAB.special[out["input_ids"][at & (out["input_ids"] != VOCAB.mask)]].sum())
        assert np.array_equal(out["input_ids"][~at], row.ids[~at])
    assert maskable > 100_000 * 0.9
    assert asked / maskable == pytest.approx(rate, abs=0.003)
    assert masked / asked == pytest.approx(0.8, abs=0.025 if unit == "span" else 0.012)
    assert same / asked == pytest.approx(0.1, abs=0.02 if unit == "span" else 0.01)
    assert drawn == 0


def test_whole_words_are_whole():
    words = vocab(1000, 100, every_word=False)
    for i in range(50):
        row = row_of([100], LENGTH, i)
        out = MaskedTokens(rate=0.3, unit="word")(row, words, generator(0, i))
        asked = out["labels"] != -100
        inside = ~words.word_start[row.ids] & ~words.special[row.ids] & (row.segments > 0)
        inside[0] = False
        at = np.flatnonzero(inside)
        at = at[~words.special[row.ids[at - 1]]]
        assert np.array_equal(asked[at], asked[at - 1]), "a piece shares the fate of the piece before it"


def test_a_span_has_one_fate():
    """SpanBERT: all of its tokens become [MASK], or stay, or are drawn at random; BERT's words are decided token by token."""
    torn = {"span": 0, "word": 0}
    words = dataclasses.replace(VOCAB, word_start=VOCAB.word_start & (np.arange(VOCAB.size) % 5 == 0))
    for unit, marks in (("span", VOCAB), ("word", words)):
        for i in range(100):
            row = Row(np.tile(np.arange(700, 705, dtype=np.int32), 200), np.ones(1000, np.int32))
            out = MaskedTokens(rate=0.02, unit=unit, mask=0.5, random=0.0)(row, marks, generator(0, i))
            fates = np.where(out["labels"] == -100, 0, np.where(out["input_ids"] == VOCAB.mask, 1, 2))
            torn[unit] += int(((fates[1:] != fates[:-1]) & (fates[1:] > 0) & (fates[:-1] > 0)).sum())
    assert torn["span"] < 20 < torn["word"], "neighbouring spans may differ"


def runs_of(flags):
    """Lengths of the runs of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(flags, int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


def test_span_lengths_are_geometric():
    """SpanBERT: p = 0.2 among 1 to 10 words, mean 3.8. Few spans in a long row, so that hardly any meet and one alone runs out of budget."""
    lengths = []
    for i in range(600):
        row = Row(np.full(4000, 700, np.int32), np.ones(4000, np.int32))
        lengths += runs_of(MaskedTokens(rate=0.02, unit="span")(row, VOCAB, generator(0, i))["labels"] != -100)
    law = 0.8 ** np.arange(10) / sum(0.8 ** np.arange(10))
    assert np.mean(lengths) == pytest.approx(law @ np.arange(1, 11), abs=0.15)
    assert [lengths.count(n) / len(lengths) for n in range(1, 11)] == pytest.approx(law, abs=0.02)


@pytest.mark.parametrize("unit", ["word", "span"])
def test_what_is_selected_together_is_of_one_document(unit):
    """No token but the first carries a word's mark, so that each document is one word: whole or not at all, whatever its neighbours are."""
    marks = dataclasses.replace(VOCAB, word_start=np.zeros(VOCAB.size, bool))
    for i in range(200):
        row = Row(np.full(24, 700, np.int32), np.repeat([1, 2, 3], 8).astype(np.int32))
        asked = (MaskedTokens(rate=0.4, unit=unit)(row, marks, generator(0, i))["labels"] != -100).reshape(3, 8).sum(1)
        assert sorted(asked.tolist()) == [0, 0, 8]
    # Where every word is a document of its own no span can be longer, and twelve of 24 stand as chance has them.
    row = Row(np.full(24, 700, np.int32), np.arange(1, 25, dtype=np.int32))
    found = [len(runs_of(MaskedTokens(rate=0.5, unit=unit)(row, VOCAB, generator(0, i))["labels"] != -100)) for i in range(200)]
    assert np.mean(found) == pytest.approx(12 * 13 / 24, abs=0.5)


def test_span_corruption_statistics():
    """T5: 15% noise, mean span 3, no two spans adjacent."""
    noise = maskable = spans = 0
    for row, out in stream_of(SpanCorruption()):
        maskable += int((~VOCAB.special[row.ids] & (row.segments > 0)).sum())
        sentinels = np.isin(out["labels"], VOCAB.sentinels)
        spans += int(sentinels.sum())
        noise += int((~sentinels & (out["labels"] != VOCAB.eos)).sum())
        encoder = np.isin(out["input_ids"], VOCAB.sentinels)
        assert not (encoder[1:] & encoder[:-1] & (out["segments"][1:] == out["segments"][:-1])).any()
    assert noise / maskable == pytest.approx(0.15, abs=0.003)
    assert noise / spans == pytest.approx(3.0, abs=0.15)


def test_span_corruption_arithmetic_is_t5s():
    for length, raw, target in [(512, 568, 114), (256, 284, 58), (128, 141, 29)]:
        objective = SpanCorruption()
        assert objective.expected(raw) == (length, target)
        # A row leaves room for borders of documents.
        assert objective.expected(objective.row_length(length))[0] == length - ROOM
        assert objective.expected(objective.row_length(length) + 1)[0] > length - ROOM


@pytest.mark.parametrize("words", [4, 300])
def test_a_run_pads_to_what_its_text_needs(shared_dir, words):
    """Span corruption of short and of long documents: little padding, the bound behind it, and the same for who asks again."""
    texts = (" ".join(f"word{i * k % 97}" for k in range(words)) for i in range(1, 2000 // words + 20))
    tokens = from_iterable(texts, load_tokenizer("tokenizer_assets/bpe-8k"), shared_dir / f"pads-{words}", 0.02)
    stream = Stream(tokens, SpanCorruption(), LENGTH, 0, 64)
    chosen, offered = two_lengths(stream, LENGTH), SpanCorruption().lengths(LENGTH)
    items = [stream[i] for i in range(64)]
    for name, arrays in (("input_ids", ("input_ids", "segments")), ("labels", ("labels", "decoder_input_ids", "decoder_segments"))):
        longest = max(len(item[array]) for item in items for array in arrays)
        first, last = chosen[name]
        assert last == offered[name][-1]
        assert first == offered[name][0] or longest < first <= longest + 8, "with a token to spare"
    assert chosen == two_lengths(stream, LENGTH)
    narrow = chosen["labels"][0]
    assert Collator(SpanCorruption(), LENGTH, "encoder-decoder", 0, lengths=chosen)(items[:3])["decoder_input_ids"].shape == (3, narrow)
    assert (narrow > offered["labels"][0]) == (words == 4), "each document closes a decoder part of its own"


def test_one_full_document_has_exactly_the_expected_lengths():
    objective = SpanCorruption()
    raw = objective.row_length(LENGTH)
    row = row_of([raw + 5], raw, 0)  # cut before its eos
    out = objective(row, VOCAB, generator(0, 0))
    assert len(out["input_ids"]) + 1 == objective.expected(raw)[0]
    assert len(out["labels"]) == objective.expected(raw)[1]


def test_infilling_statistics():
    """BART: 30% of the tokens covered, Poisson(3) lengths with zero-length insertions."""
    objective = Infilling(permute=0.0)
    text = masks = kept = 0
    for row, out in stream_of(objective):
        text += int((~VOCAB.special[row.ids] & (row.segments > 0)).sum())
        masks += int((out["input_ids"] == VOCAB.mask).sum())
        kept += int((~VOCAB.special[out["input_ids"]]).sum())
    assert 1 - kept / text == pytest.approx(0.3, abs=0.004)
    # A Poisson(3) span covers 3 tokens in the mean and leaves one mask, empty ones too; the last of a document is cut.
    assert (text - kept) / masks == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize("mean_span", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("share", [0.05, 0.4, 0.75])
def test_infilling_never_outgrows_its_row(share, mean_span):
    """Unknown tokens are special and are not covered; a page in another script holds little else."""
    objective, covered, ordinary = Infilling(rate=0.3, mean_span=mean_span, permute=0.0), 0, 0
    for i in range(300):
        draw = generator(1, i)
        ids = np.where(draw.random(128) < share, 3, draw.integers(6, 30, 128)).astype(np.int32)
        assert VOCAB.special[3]
        out = objective(Row(ids, np.ones(128, np.int32)), VOCAB, generator(0, i))["input_ids"]
        assert len(out) <= 128
        assert (out == 3).sum() == (ids == 3).sum()
        covered += (ids != 3).sum() - ((out != 3) & (out != VOCAB.mask)).sum()
        ordinary += (ids != 3).sum()
    assert covered / ordinary == pytest.approx(0.3, abs=0.01)


def test_zero_length_spans_insert_masks():
    """Where masks stand side by side with all text kept between them, nothing was covered: an insertion."""
    objective, inserted, spans = Infilling(rate=0.1, permute=0.0), 0, 0
    for i in range(600):
        row = Row(np.append(np.arange(5, 105), VOCAB.eos).astype(np.int32), np.ones(101, np.int32))  # tokens in ascending order show what is gone
        out = objective(row, VOCAB, generator(0, i))["input_ids"].tolist()
        expected = 5
        run = 0
        for token in [*out[:-1], 105]:
            if token == VOCAB.mask:
                run += 1
                continue
            spans += run
            inserted += run if run and token == expected else 0
            expected, run = token + 1, 0
    assert inserted / spans == pytest.approx(np.exp(-3), abs=0.02)


def test_sentence_permutation_moves_whole_sentences():
    row = Row(np.array([6, 7, 10, 8, 15, 11, 12, 20, 1], np.int32), np.ones(9, np.int32))  # 10, 15, 20 end sentences
    seen = {tuple(Infilling(rate=0.0)(row, VOCAB, generator(0, i))["input_ids"].tolist()) for i in range(200)}
    pieces = [(6, 7, 10), (8, 15), (11, 12, 20)]
    assert seen == {(*itertools.chain(*order), 1) for order in itertools.permutations(pieces)}


def test_a_mask_is_inserted_anywhere():
    """Behind the last token, too: spans are drawn that cover none."""
    row, objective, last = Row(np.append(np.arange(6, 16), VOCAB.eos).astype(np.int32), np.ones(11, np.int32)), Infilling(rate=0.3, permute=0.0), 0
    for i in range(1000):
        out = objective(row, VOCAB, generator(0, i))["input_ids"]
        last += out[-2] == VOCAB.mask and out[-3] == 15
    assert last


def test_marks_side_by_side_end_one_sentence():
    row = Row(np.array([6, 7, 10, 15, 8, 20, 1], np.int32), np.ones(7, np.int32))  # 10 and 15, as in "?!"
    seen = {tuple(Infilling(rate=0.0)(row, VOCAB, generator(0, i))["input_ids"].tolist()) for i in range(50)}
    assert seen == {(6, 7, 10, 15, 8, 20, 1), (8, 20, 6, 7, 10, 15, 1)}


def test_masks_are_not_deleted():
    row = Row(np.append(np.arange(6, 26), VOCAB.eos).astype(np.int32), np.ones(21, np.int32))
    out = Infilling(rate=0, permute=0, mask_rate=1.0, delete_rate=0.5)(row, VOCAB, generator(0, 0))["input_ids"]
    assert (out == VOCAB.mask).sum() == 20


def test_rotation_and_deletion():
    row = Row(np.array([6, 7, 8, 9, 1], np.int32), np.ones(5, np.int32))
    turned = {tuple(Infilling(rate=0, permute=0, rotate=1.0)(row, VOCAB, generator(0, i))["input_ids"].tolist()) for i in range(100)}
    assert turned == {(7, 8, 9, 6, 1), (8, 9, 6, 7, 1), (9, 6, 7, 8, 1)}
    sizes = [len(Infilling(rate=0, permute=0, delete_rate=0.25)(row, VOCAB, generator(0, i))["input_ids"]) - 1 for i in range(4000)]
    assert np.mean(sizes) == pytest.approx(3.0, abs=0.05)
    changed = [Infilling(rate=0, permute=0, rotate=0.25)(row, VOCAB, generator(0, i))["input_ids"].tolist() != row.ids.tolist() for i in range(4000)]
    assert np.mean(changed) == pytest.approx(0.25, abs=0.03)
    masks = [(Infilling(rate=0, permute=0, mask_rate=0.1)(row, VOCAB, generator(0, i))["input_ids"] == VOCAB.mask).sum() for i in range(4000)]
    assert np.mean(masks) == pytest.approx(4 * 0.1, abs=0.04)


def test_a_share_of_the_sentences_is_shuffled():
    """Of twenty sentences a tenth is two: they change places, or stay."""
    row = Row(np.append(np.arange(6, 106), VOCAB.eos).astype(np.int32), np.ones(101, np.int32))  # a sentence ends at each multiple of five
    for i in range(50):
        out = Infilling(rate=0, permute=0.1)(row, VOCAB, generator(0, i))["input_ids"]
        moved = (out != row.ids).sum()
        assert moved <= 2 * 5
        assert sorted(out.tolist()) == sorted(row.ids.tolist())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_recipe_section_round_trip(name):
    objective = make({"name": name})
    assert make(fields_of(objective)) == objective


def test_plugin():
    assert isinstance(make({"name": "lmssl.objectives.masked:MaskedTokens", "rate": 0.2}), MaskedTokens)


def test_a_plugin_names_what_it_lacks():
    with pytest.raises(UserError, match=r"'tests\.test_objectives:Half' is not an objective: .* \(needs, lengths, most_labels, held_out, __call__ is missing\)"):
        make({"name": "tests.test_objectives:Half"})


@dataclasses.dataclass(frozen=True)
class Half:
    families = frozenset({"decoder"})

    def row_length(self, model_length):
        return model_length


class Copy(NextToken):
    """What a newcomer writes first; `change` is the mistake."""

    change: ClassVar[Any] = None

    def __call__(self, row, vocab, rng):
        return type(self).change(NextToken.__call__(self, row, vocab, rng))


COUNT = itertools.count()
MISTAKES = {
    "the first token of a document is asked": lambda item: item | {"labels": item["input_ids"].copy()},
    "the first token of a document is asked, and nothing of it": lambda item: (
        item | {"labels": np.where(np.arange(32) > 0, item["input_ids"], -100), "segments": np.arange(32) // 8 + 1}
    ),
    "labels holds -1; ids are 0 to": lambda item: item | {"labels": np.where(item["labels"] == -100, -1, item["labels"])},
    "labels has 29 entries, input_ids 32": lambda item: item | {"labels": item["labels"][:-3]},
    "input_ids must be a one-dimensional array of whole numbers, not float": lambda item: item | {"input_ids": item["input_ids"].astype(float)},
    "labels must be a one-dimensional array of whole numbers, not list": lambda item: item | {"labels": item["labels"].tolist()},
    "input_ids holds 420": lambda item: item | {"input_ids": item["input_ids"] * 0 + 420},
    "no segments": lambda item: {name: item[name] for name in ("input_ids", "labels")},
    "expected arrays by name, got NoneType": lambda item: None,
    "ZeroDivisionError: division by zero": lambda item: 1 / 0,
    "input_ids of 64 exceeds the bound 32 that lengths promised": lambda item: {name: np.tile(array, 2) for name, array in item.items()},
    "item 0 is another the second time": lambda item: item | {"input_ids": item["input_ids"] * 0 + next(COUNT)},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_an_objective_of_one_s_own_returns_is_looked_at(message, shared_dir, tmp_path, monkeypatch):
    tokens = token_set(shared_dir)
    monkeypatch.setattr(Copy, "change", staticmethod(MISTAKES[message]))
    with pytest.raises(UserError, match=rf"objective.name: 'tests.test_objectives:Copy': .*{message}"):
        lmssl.PretrainTrainer(small_model("llama", tokens.vocab()), Copy(), tokens, arguments(tmp_path), 32, quiet=True)


@pytest.mark.parametrize(("text", "message"), [("x = ", "SyntaxError"), ("1 / 0", "ZeroDivisionError: division by zero"), ("", "AttributeError")])
def test_a_module_that_fails_is_one_line(text, message, tmp_path, monkeypatch):
    name = f"broken_{message[:4].lower()}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for make_one, key in ((make, "objective"), (make_task, "task")):
        with pytest.raises(UserError, match=rf"{key}.name: '{name}:Mine' cannot be imported: {message}"):
            make_one({"name": f"{name}:Mine"})


@pytest.mark.parametrize("fields", [{"rate": 0.0}, {"rate": 1.5}, {"rate": float("nan")}, {"mask": 0.8, "random": 0.3}, {"span_max": 0}, {"span_p": 0.0}])
def test_senseless_values_are_refused(fields):
    with pytest.raises(ValueError):
        MaskedTokens(**fields)


def test_a_document_of_more_spans_than_sentinels_is_corrupted_all_over():
    small, length = vocab(sentinels=10), 600
    row = Row(np.full(length, 7), np.ones(length, int))
    out = SpanCorruption()(row, small, np.random.default_rng(0))
    at = np.flatnonzero(np.isin(out["input_ids"], small.sentinels))
    assert len(at) == 10
    assert at[0] < length / 4
    assert at[-1] > len(out["input_ids"]) * 3 / 4
    assert len(out["input_ids"]) + len(out["labels"]) == length + 2 * 10 + 1
    assert "30 spans, the tokenizer 10 sentinels: 67%" in SpanCorruption().doubt(SpanCorruption().expected(600)[0], small)
    assert SpanCorruption().doubt(128, vocab(size=200, sentinels=100)) is None


def test_a_run_of_such_rows_is_warned_of(shared_dir, tmp_path, caplog):
    tokens = token_set(shared_dir)
    PretrainTrainer(small_model("t5", tokens.vocab(), 64), SpanCorruption(rate=0.5, mean_span=1.0), tokens, arguments(tmp_path), 64, quiet=True)
    assert "sentinels" not in caplog.text
    PretrainTrainer(small_model("t5", tokens.vocab(), 512), SpanCorruption(rate=0.5, mean_span=1.0), tokens, arguments(tmp_path), 512, quiet=True)
    assert "100 sentinels" in caplog.text


def test_held_out_masks_are_of_the_run_s_own_unit():
    assert MaskedTokens(rate=0.4, unit="word").held_out() == MaskedTokens(unit="word")


def test_a_document_is_never_deleted_whole():
    row = Row(np.array([7, 8, 9, 1, 10, 11, 1]), np.array([1, 1, 1, 1, 2, 2, 2]))
    out = Infilling(rate=0.0, permute=0.0, delete_rate=1.0)(row, vocab(), np.random.default_rng(0))
    assert out["input_ids"].tolist() == [7, 1, 10, 1]
    assert set(out["segments"].tolist()) == {1, 2}
