"""Properties over arbitrary documents, lengths, vocabularies, rates and layouts: packing, stream, objectives.

LMSSL_EXAMPLES sets the number of cases of each, default 25.
"""

import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import lmssl
from lmssl.data.stream import Collator, Stream, generator, permuted
from lmssl.objectives import Infilling, MaskedTokens, NextToken, SpanCorruption
from lmssl.objectives.base import Row
from lmssl.objectives.toy import vocab
from tests.helpers import tokenizer

cases = settings(max_examples=int(os.environ.get("LMSSL_EXAMPLES", "25")), deadline=None)
shares = st.floats(0.01, 0.9)
OBJECTIVES = st.one_of(
    st.builds(NextToken),
    st.builds(
        MaskedTokens,
        rate=shares,
        unit=st.sampled_from(["token", "word", "span"]),
        mask=st.sampled_from([0.0, 0.5, 0.8]),
        random=st.sampled_from([0.0, 0.1, 0.2]),
        span_max=st.integers(1, 20),
    ),
    st.builds(SpanCorruption, rate=shares, mean_span=st.floats(1.0, 20.0)),
    st.builds(
        Infilling,
        rate=shares,
        permute=st.sampled_from([0.0, 0.5, 1.0]),
        mask_rate=st.sampled_from([0.0, 0.1]),
        delete_rate=st.sampled_from([0.0, 0.1]),
        rotate=st.sampled_from([0.0, 1.0]),
    ),
)
texts = st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=80).filter(str.strip), min_size=4, max_size=30)


@cases
@given(documents=texts, length=st.integers(8, 70))
def test_packing_keeps_every_token_once(documents, length):
    """Rows laid end to end are the documents laid end to end, each between its bos and eos, duplicates once."""
    with tempfile.TemporaryDirectory() as folder:
        if len(set(documents)) < 2:
            return
        tokens = lmssl.from_iterable([*documents, *(f"a document more, {n}" for n in range(40))], tokenizer(), Path(folder) / "set", 0.2)
        counted = 0
        for part in (tokens, tokens.held_out()):
            rows = [part.row(k, length, tokens.vocab().pad) for k in range(part.rows(length))]
            ids = [i for row in rows for i in row.ids[row.segments > 0].tolist()]
            assert len(ids) == part.tokens
            eos = tokens.vocab().eos
            assert sum(i == eos for i in ids) == part.documents, "an eos spelt in a text is text"
            counted += part.documents
            for row in rows[:-1]:
                assert (row.segments > 0).all(), "padding stands behind the last row alone"
            for row in rows:
                used = row.segments[row.segments > 0]
                assert (np.diff(used) >= 0).all()
                inside = row.ids[row.segments > 0][:-1] == eos
                assert np.array_equal(np.diff(used) > 0, inside), "a document ends at its eos and nowhere else"
        assert counted == len({*documents, *(f"a document more, {n}" for n in range(40))})


@cases
@given(
    objective=OBJECTIVES,
    ordinary=st.integers(1, 300),
    sentinels=st.integers(100, 100),
    length=st.integers(16, 200),
    sizes=st.lists(st.integers(0, 90), max_size=40),
    seed=st.integers(0, 2**63),
    i=st.integers(0, 2**63 - 1),
)
def test_objectives_keep_their_bounds(objective, ordinary, sentinels, length, sizes, seed, i):
    """Any rate, vocabulary, row and noise: inside the bounds that compiled shapes rest on, and all that was hidden asked."""
    words = vocab(ordinary + 120, sentinels)
    wide = objective.row_length(length)
    ids, segments, at = np.full(wide, words.pad, np.int32), np.zeros(wide, np.int32), 0
    rng = np.random.default_rng(seed)
    for number, size in enumerate(sizes):
        text = np.append(rng.choice(words.ordinary, size), words.eos)[: wide - at]
        ids[at : at + len(text)], segments[at : at + len(text)] = text, number + 1
        at += len(text)
    out = objective(Row(ids, segments), words, generator(seed % 2**64, i))
    limits = objective.lengths(length)
    assert len(out["input_ids"]) <= limits["input_ids"][-1]
    assert len(out["labels"]) <= limits["labels"][-1]
    assert (out["labels"] != -100).sum() <= objective.most_labels(length)
    for name, values in out.items():
        assert np.issubdtype(values.dtype, np.integer), name
    assert ((out["input_ids"] >= 0) & (out["input_ids"] < words.size)).all()
    family = next(iter(objective.families))
    batch = Collator(objective, length, family, words.pad)([out, out])
    assert (batch["labels"] != -100).sum() == 2 * (out["labels"] != -100).sum(), "the collator loses no label"
    if at == 0:
        assert (out["labels"] == -100).all(), "nothing is asked of an empty row"


@cases
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(permuted(k, n, seed, epoch) for k in range(n)) == list(range(n))


@cases
@given(seed=st.integers(0, 2**32), objective=OBJECTIVES)
def test_an_epoch_reads_each_row_once(seed, objective, shared_dir):
    from tests.helpers import token_set

    tokens = token_set(shared_dir)
    stream = Stream(tokens, objective, 32, seed, 10**12)
    first = 3 * stream.rows
    epoch = Counter(stream.index(i)[1] for i in range(first, first + stream.rows))
    assert set(epoch.values()) == {1}
    a, b = stream[first], Stream(tokens, objective, 32, seed, 10**12)[first]
    assert all(np.array_equal(a[name], b[name]) for name in a)
