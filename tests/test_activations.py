"""GELU of lmssl.activations: transformers' own, to rounding, compiled or not."""

import copy
import shutil

import pytest
import torch
from torch import nn
from transformers.activations import GELUTanh, NewGELUActivation

from lmssl.activations import KINDS, Gelu, _Gelu, quicker
from lmssl.trainer import ExactTrainer
from tests.helpers import SMALL, apart, arguments, small_model, token_set


def both(module, x):
    """What it makes of x, and the gradient."""
    x = x.clone().requires_grad_()
    out = module(x)
    out.float().square().sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_it_is_the_same_function(kind, dtype, close):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -0.0, 0.0, 1e4])]).to(dtype)
    for module in (Gelu(), _Gelu.apply):
        for found, expected in zip(both(module, x), both(kind(), x), strict=True):
            assert found.dtype == dtype
            assert apart(found, expected) < close


def test_its_gradient_is_its_own():
    x = torch.linspace(-4, 4, 50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Gelu.apply, (x,))
    assert torch.autograd.gradgradcheck(_Gelu.apply, (x,))
    assert _Gelu.apply(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize(("bf16", "close"), [(False, 1e-5), (True, 0.02)])
def test_compiled(bf16, close):
    """The loss is linear in the output: the gradient of one bias would else hang on a sum that may be near zero."""
    plain = nn.Sequential(nn.Linear(8, 16), NewGELUActivation(), nn.Linear(16, 16), GELUTanh(), nn.Linear(16, 1))
    ours, x = copy.deepcopy(plain), torch.randn(32, 8)
    quicker(ours, "cuda")
    assert [type(m) for m in ours] == [type(m) for m in plain]
    quicker(ours, "cpu")
    assert [type(m) for m in ours] == [nn.Linear, Gelu, nn.Linear, Gelu, nn.Linear]
    call = torch.compile(ours, fullgraph=True)
    plain(x).sum().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        call(x).float().sum().backward()
    for (name, found), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert apart(found.grad, expected.grad) < close, name


@pytest.mark.parametrize("architecture", SMALL)
def test_a_trained_model_has_it_and_says_the_same(architecture, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    model = small_model(architecture, tokens.vocab()).eval()
    ids = torch.from_numpy(tokens.vocab().ordinary[None, :24].repeat(2, 0)).long()
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    before, had = model(input_ids=ids, **more).logits.detach(), sum(type(m) in KINDS for m in model.modules())
    ExactTrainer(model, arguments(tmp_path), [], lambda items: {})
    model.eval()
    assert sum(type(m) is Gelu for m in model.modules()) == had
    assert not any(type(m) in KINDS for m in model.modules())
    assert apart(model(input_ids=ids, **more).logits.detach(), before) < 1e-5
