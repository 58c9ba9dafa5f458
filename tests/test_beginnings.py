"""Embeddings that begin by the company that tokens keep: the counts, the factorisation, and what becomes of a model."""

import numpy as np
import pytest
import torch

import lmssl
from lmssl import beginnings
from tests.helpers import SMALL, small_model, token_set, tokenizer


def counted(documents, size):
    """The table by loops over every pair of a document."""
    table = np.zeros((size, size))
    for ids in documents:
        for i, a in enumerate(ids):
            for j, b in enumerate(ids):
                if 0 < abs(i - j) <= beginnings.WINDOW:
                    table[a, b] += 1 / abs(i - j)
    return table


def documents_of(tokens):
    """The training documents, as ids with bos and eos."""
    return [np.array(ids) for ids in tokenizer().encode(list(tokens.texts()))]


@pytest.mark.parametrize("block", [64, 2**16])
def test_counts_are_those_of_plain_loops(block, shared_dir, monkeypatch):
    """Never across two documents; a border between blocks loses the few pairs that span it."""
    monkeypatch.setattr(beginnings, "BLOCK", block)
    monkeypatch.setattr(beginnings, "MOST_BLOCKS", 10**6)
    tokens = token_set(shared_dir)
    size = tokens.vocab().size
    counts, total = beginnings.cooccurrences(tokens, size)
    order = total.argsort(descending=True, stable=True).numpy()
    expected = counted(documents_of(tokens), size)[:, order]
    assert total.sum() == tokens.tokens
    if block > tokens.tokens:
        assert np.allclose(counts, expected, atol=1e-3)
    else:
        assert (counts.numpy() <= expected + 1e-3).all()
        assert 0.8 < counts.sum() / expected.sum() < 1


def test_of_a_large_text_all_parts_are_counted(shared_dir, monkeypatch):
    monkeypatch.setattr(beginnings, "BLOCK", 64)
    monkeypatch.setattr(beginnings, "MOST_BLOCKS", 4)
    tokens, asked = token_set(shared_dir), []
    row = type(tokens).row
    monkeypatch.setattr(type(tokens), "row", lambda self, k, *rest: asked.append(k) or row(self, k, *rest))
    beginnings.cooccurrences(tokens, tokens.vocab().size)
    assert len(asked) == 4
    assert max(asked) >= tokens.rows(64) * 3 // 4


def test_a_large_vocabulary_has_the_columns_of_its_most_frequent_tokens(shared_dir, monkeypatch):
    tokens = token_set(shared_dir)
    size = tokens.vocab().size
    whole, total = beginnings.cooccurrences(tokens, size)
    monkeypatch.setattr(beginnings, "CELLS", 20 * size + 5)
    part, same = beginnings.cooccurrences(tokens, size)
    assert part.shape == (size, 20)
    assert torch.equal(part, whole[:, :20])
    assert torch.equal(same, total)


def test_the_factorisation_is_that_of_the_whole_matrix():
    """Cosines between rows, against numpy's singular value decomposition of the matrix written out."""
    draw = np.random.default_rng(0)
    counts = draw.poisson(2.0, (60, 60)) * draw.gamma(1.0, 1.0, (60, 1)) * draw.gamma(1.0, 1.0, (1, 60))
    rows, columns = counts.sum(1, keepdims=True), counts.sum(0, keepdims=True) ** beginnings.SMOOTHING
    with np.errstate(divide="ignore"):
        pmi = np.maximum(np.log(counts / rows / (columns / columns.sum())), 0)
    u, s, _ = np.linalg.svd(pmi)
    expected = u * np.sqrt(s)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = beginnings.embeddings(torch.tensor(counts, dtype=torch.float32), 60, 0).numpy()
    assert np.allclose(np.square(found).mean(1), 1, atol=1e-4)
    assert np.allclose(found @ found.T / 60, expected @ expected.T, atol=1e-3)


def test_tokens_that_keep_one_company_are_alike(tmp_path):
    """Two words that stand in the same places, never near each other, against one that stands elsewhere."""
    draw = np.random.default_rng(0)
    films = [f"the old {draw.choice(['film', 'plot'])} was {draw.choice(['good', 'bad'])}" for _ in range(4000)]
    others = [f"one bright actor felt {draw.choice(['weak', 'warm'])}" for _ in range(4000)]
    told = draw.permutation(films + others).reshape(400, 20)
    tokens = lmssl.from_iterable(map(" ".join, told), tokenizer(), tmp_path / "t", 0.05)
    model = small_model("llama", tokens.vocab())
    beginnings.begin_from_text(model, tokens)
    rows = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=1)
    weak, warm, actor, plot = (rows[tokenizer().encode([f" {word}"])[0][1]] for word in ("weak", "warm", "actor", "plot"))
    assert weak @ warm > 0.7
    assert weak @ warm > max(weak @ actor, weak @ plot, actor @ plot) + 0.3


@pytest.mark.parametrize("architecture", SMALL)
def test_a_model_has_the_usual_scale_and_keeps_what_the_text_does_not_hold(architecture, shared_dir):
    tokens = token_set(shared_dir)
    before, model, again = (small_model(architecture, tokens.vocab()) for _ in range(3))
    for one in (model, again):
        beginnings.begin_from_text(one, tokens, seed=1)
    old, new, same = (m.get_input_embeddings().weight.detach() for m in (before, model, again))
    assert torch.equal(new, same)
    seen = torch.zeros(len(old), dtype=torch.bool)
    seen[np.unique(np.concatenate(documents_of(tokens)))] = True
    size = old.square().mean().sqrt()
    wanted = max(size.item(), beginnings.MOST_SIZE)  # of models this narrow
    assert torch.allclose(old[~seen] * (wanted / size), new[~seen])
    assert not torch.isclose(old[seen], new[seen]).all(1).any()
    assert torch.allclose(new[seen].square().mean(1).sqrt(), torch.tensor(wanted), rtol=1e-3)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        assert bias[seen].min() > bias[~seen].max()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, dict(before.named_parameters())[n])]
    assert len(changed) == 1 + (bias is not None), "nothing else is touched"


def test_recipes_begin_there_unless_they_say_otherwise(corpus_file, tmp_path):
    from safetensors.torch import load_file

    from lmssl.recipe import PretrainRecipe
    from lmssl.runs import pretrain

    tokenizer().save(tmp_path / "tokenizer")

    def trained(init):
        sections = {
            "data": {"text": str(corpus_file), "tokenizer": str(tmp_path / "tokenizer"), "seq_length": 32},
            "model": {"architecture": "llama", **SMALL["llama"], **({"init": init} if init else {})},
            "objective": {"name": "next_token"},
            "trainer": {"output_dir": str(tmp_path / str(init)), "max_steps": 1, "learning_rate": 1e-9, "torch_compile": False},
        }
        pretrain(PretrainRecipe.of(sections), quiet=True)
        return load_file(tmp_path / str(init) / "model.safetensors")

    unset, text, local = (trained(init) for init in (None, "text", "local"))
    name = "model.embed_tokens.weight"
    assert torch.equal(unset[name], text[name])
    assert not torch.allclose(text[name], local[name], atol=1e-3)
