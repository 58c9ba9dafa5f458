"""The one loss: equal to independent implementations, and to itself however a batch is split."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lmssl
from lmssl import models
from lmssl.data.stream import Collator, Stream
from lmssl.objectives.base import token_loss
from lmssl.objectives.cross_entropy import CHUNK, summed_cross_entropy
from tests.helpers import OBJECTIVE, SMALL, apart, arguments, first_step, small_model, token_set
from tests.one_step import SENTIMENT, save_backbones, sentiment_step

ROOT = Path(__file__).parent.parent
LENGTH = 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_equals_torch(dtype):
    torch.manual_seed(0)
    columns = 4099
    logits = torch.randn(2 * CHUNK // columns + 3, columns).to(dtype).requires_grad_()
    labels = torch.randint(0, columns, (len(logits),))
    labels[::5] = -100
    ours = summed_cross_entropy(logits, labels)
    (grad,) = torch.autograd.grad(ours, logits)
    theirs = F.cross_entropy(logits.float(), labels, reduction="sum")
    (expected,) = torch.autograd.grad(theirs, logits)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert apart(grad.double(), expected.double()) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_cross_entropy_gradient_numerically():
    logits = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 2, -100, 4, 10, 0])
    assert torch.autograd.gradcheck(lambda x: summed_cross_entropy(x, labels), logits, atol=1e-3, eps=1e-3)


@pytest.mark.parametrize("architecture", SMALL)
def test_equals_the_models_own_loss(architecture, shared_dir):
    """`model(**batch).loss` of transformers, on one document per row, is the independent implementation."""
    tokens, objective = token_set(shared_dir), OBJECTIVE[architecture]
    model = small_model(architecture, tokens.vocab(), LENGTH).eval()
    stream = Stream(tokens, objective, LENGTH, seed=0, length=400)
    single = [stream[i] for i in range(400) if stream.row(i).segments.max() == 1 and stream.row(i).segments.min() == 1][:1]
    single = single if "decoder_input_ids" in single[0] else [stream[i] for i in range(400) if (stream.row(i).segments == 1).all()][:4]
    plain = {k: torch.stack([torch.as_tensor(row[k]).long() for row in single]) for k in single[0] if not k.endswith("segments")}
    with torch.no_grad():
        theirs = model(**plain).loss
        batch = Collator(objective, LENGTH, models.family_of(model.config), stream.vocab.pad)(single)
        labels = batch.pop("labels")
        ours = token_loss(models.prepare(model)(**batch), labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-6)


@pytest.mark.parametrize("architecture", SMALL)
def test_split_of_the_batch_changes_nothing(architecture, shared_dir, tmp_path):
    """8x1, 4x2 and 1x8 (micro-batch x accumulation): same loss, same gradient."""
    tokens, results = token_set(shared_dir), []
    for micro, accumulate in [(8, 1), (4, 2), (1, 8)]:
        model = small_model(architecture, tokens.vocab(), LENGTH)
        args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate, max_grad_norm=0.0)
        results.append(first_step(lmssl.PretrainTrainer(model, OBJECTIVE[architecture], tokens, args, LENGTH, quiet=True)))
    assert_same_step(results)


@pytest.mark.parametrize("family", SENTIMENT)
def test_split_of_a_fine_tuning_batch_changes_nothing(family, shared_dir):
    """The same for the classifier of each family."""
    save_backbones(shared_dir)
    assert_same_step([sentiment_step(micro, shared_dir / family, accumulate) for micro, accumulate in [(8, 1), (4, 2), (1, 8)]])


def assert_same_step(results):
    for loss, grad in results[1:]:
        assert abs(loss - results[0][0]) / results[0][0] < 1e-6
        assert apart(grad, results[0][1]) < 1e-6


@pytest.mark.parametrize("architectures", [["gpt2", "llama", "bert", "roberta", "modernbert", "t5", "bart"]], ids=["all"])
def test_two_processes_equal_one(architectures, shared_dir, tmp_path):
    """torchrun with two processes (asserted) against one, for every architecture and for sentiment on each family."""
    save_backbones(shared_dir)
    script = [str(ROOT / "tests" / "one_step.py"), str(shared_dir), ",".join(architectures)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *script, str(tmp_path / "one"), "8"], check=True, env=environment, timeout=240)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29711"]
    subprocess.run([*launcher, *script, str(tmp_path / "two"), "4"], check=True, env=environment, timeout=240)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert two["world"] == 2
    assert set(one["steps"]) == set(two["steps"])
    assert len(one["steps"]) == len(architectures) + 3
    for name, (loss, grad) in one["steps"].items():
        assert abs(two["steps"][name][0] - loss) / loss < 1e-6, name
        assert apart(two["steps"][name][1], grad) < 1e-6, name
    print(json.dumps({name: [abs(two["steps"][name][0] - v[0]) / v[0], apart(two["steps"][name][1], v[1])] for name, v in one["steps"].items()}))
