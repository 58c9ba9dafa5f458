"""Embeddings of lmssl.lookups: the gradient of torch's, to rounding, in any model and compiled."""

import copy
import io
import shutil

import pytest
import torch
from torch import nn

from lmssl.lookups import InOrder, in_order
from tests.helpers import SMALL, apart, small_model, token_set


class Scaled(nn.Embedding):
    """As Gemma's: what is looked up is scaled."""

    def forward(self, ids):
        return super().forward(ids) * 3.0


class Tables(nn.Module):
    """An embedding tied to a projection, with padding; a scaled one; one of a single row, as BERT's token types are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.scaled, self.types = nn.Embedding(50, 8, padding_idx=0), Scaled(9, 8), nn.Embedding(2, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.words(ids) + self.scaled(ids % 9) + self.types(torch.zeros_like(ids))))


def gradients(model, ids, call=None):
    model.zero_grad()
    (model if call is None else call)(ids).float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"))])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_gradient_is_torchs(bf16, compiled):
    plain = Tables()
    ours = copy.deepcopy(plain)
    in_order(ours)
    ids = torch.randint(0, 50, (4, 33))
    ids[0, :5] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected, found = (gradients(m, ids, torch.compile(m, fullgraph=True) if compiled else None) for m in (plain, ours))
        assert torch.equal(plain(ids), ours(ids))
    for name, value in expected.items():
        assert apart(found[name], value) < 1e-6, name


def test_a_model_stays_what_it_was():
    """Names of the weights, types that others ask for, copies, files; and once is enough."""
    model = Tables()
    names = list(model.state_dict())
    in_order(model)
    before = [type(m) for m in model.modules()]
    in_order(model)
    assert [type(m) for m in model.modules()] == before
    assert list(model.state_dict()) == names
    assert isinstance(model.scaled, Scaled)
    assert isinstance(model.scaled, InOrder)
    assert type(model.words) is InOrder
    assert copy.deepcopy(model).head.weight.shape == (50, 8)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    Tables().load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("keys", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_what_it_does_not_do_is_left_to_torch(keys):
    plain = nn.Embedding(7, 4, **keys)
    ours = copy.deepcopy(plain)
    in_order(ours)
    ids = torch.tensor([1, 1, 3])
    (expected,), (found,) = (gradients(m, ids).values() for m in (plain, ours))
    assert torch.equal(expected.to_dense(), found.to_dense())


@pytest.mark.parametrize("architecture", SMALL)
def test_every_architecture(architecture, shared_dir):
    tokens = token_set(shared_dir)
    plain = small_model(architecture, tokens.vocab())
    ours = copy.deepcopy(plain)
    in_order(ours)
    ids = torch.from_numpy(tokens.vocab().ordinary[None, :24].repeat(2, 0)).long()
    more = {"decoder_input_ids": ids} if plain.config.is_encoder_decoder else {}
    expected, found = (gradients(m, ids, lambda ids, m=m: m(input_ids=ids, **more).logits) for m in (plain, ours))
    assert sum(isinstance(m, InOrder) for m in ours.modules()) == sum(isinstance(m, nn.Embedding) for m in plain.modules()) > 0
    for name, value in expected.items():
        assert apart(found[name], value) < 1e-5, name
