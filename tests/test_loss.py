"""The one loss: equal to independent implementations, and to itself however a batch is split."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lmssl
from lmssl import forward, models
from lmssl.data.stream import Collator, Stream
from lmssl.objectives import cross_entropy
from lmssl.objectives.cross_entropy import FEWEST, linear_cross_entropy, summed_cross_entropy, token_loss
from tests.helpers import OBJECTIVE, SMALL, apart, arguments, first_step, small_model, token_set
from tests.one_step import SENTIMENT, save_backbones, sentiment_step
from tests.one_step import main as one_step

ROOT = Path(__file__).parent.parent
LENGTH = 32
CHUNK, PROJECTED = cross_entropy.CHUNK["cpu"], cross_entropy.PROJECTED["cpu"]


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def way(request, monkeypatch):
    """The arithmetic of a CPU, and that which a GPU compiles, not compiled."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(cross_entropy, "_fused", lambda tensor: True)
        monkeypatch.setattr(cross_entropy, "_compiled", lambda function: function)
        monkeypatch.setitem(cross_entropy.ALIGNED, "cpu", cross_entropy.ALIGNED["cuda"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_equals_torch(dtype, way):
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


@pytest.mark.parametrize("size", [1, 100])
def test_large_logits_do_not_overflow(size, way):
    """exp(89) is more than float32 holds."""
    columns = PROJECTED // FEWEST + 1
    hidden, weight, labels = torch.randn(FEWEST + 3, 16) * size, torch.randn(columns, 16), torch.randint(0, columns, (FEWEST + 3,))
    made = []
    for loss in (lambda h: linear_cross_entropy(h, weight, None, labels), lambda h: F.cross_entropy(h @ weight.T, labels, reduction="sum")):
        leaf = hidden.clone().requires_grad_()
        made += [total := loss(leaf), *torch.autograd.grad(total, leaf)]
    assert made[0].item() == pytest.approx(made[2].item(), rel=1e-5)
    assert apart(made[1].double(), made[3].double()) < 5e-5


def test_cross_entropy_gradient_numerically():
    logits = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 2, -100, 4, 10, 0])
    assert torch.autograd.gradcheck(lambda x: summed_cross_entropy(x, labels), logits, atol=1e-3, eps=1e-2)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in (made if isinstance(made, tuple | list) else [made]) if isinstance(t, torch.Tensor))])
        return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_equals_torch(dtype, bias, way):
    """Loss and all gradients, with labels that ask nothing, over more rows than go at a time; and no logits of all rows anywhere."""
    columns = PROJECTED // FEWEST + 1
    values = [torch.randn(2 * FEWEST + 3, 16), torch.randn(columns, 16) / 4, *([torch.randn(columns)] if bias else [])]
    labels = torch.randint(0, columns, (len(values[0]),))
    labels[::5] = -100

    def of(loss):
        leaves = [v.clone().requires_grad_() for v in values]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), Largest() as largest:
            total = loss(leaves[0], leaves[1], leaves[2] if bias else None) / 7
            return total.item(), torch.autograd.grad(total, leaves), largest.numbers

    ours, ours_grads, held = of(lambda *v: linear_cross_entropy(*v, labels))
    theirs, theirs_grads, whole = of(lambda *v: F.cross_entropy(F.linear(*v).float(), labels, reduction="sum"))
    assert ours == pytest.approx(theirs, rel=1e-6 if dtype == torch.float32 else 1e-4)
    for mine, expected in zip(ours_grads, theirs_grads, strict=True):
        assert mine.dtype == expected.dtype
        assert apart(mine.double(), expected.double()) < (1e-6 if dtype == torch.float32 else 1e-2)
    if bias:  # summed in float32, whatever is multiplied
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            probabilities = F.linear(*values).float().softmax(-1) - F.one_hot(labels.clamp(min=0), columns)
        assert apart(ours_grads[2].double(), probabilities[labels != -100].double().sum(0) / 7) < (1e-6 if dtype == torch.float32 else 5e-4)
    assert whole == len(labels) * columns
    assert held < whole / 2
    with torch.no_grad():
        assert linear_cross_entropy(values[0], values[1], None, labels).item() > 0


def test_parts_of_a_projection_on_a_gpu_are_alike():
    """Where the number of rows allows it, since each other shape is compiled anew; never more logits than the bound."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for rows, columns in [(16_384, 50_257), (8_192, 8_192), (5_000, 50_257), (7_919, 131_072), (1, 100), (3, 10**9)]:
        size = cross_entropy._rows_at_a_time(rows, columns, gpu)
        assert size <= max(FEWEST, cross_entropy.PROJECTED["cuda"] // columns)
        assert rows % size == 0 or rows == 7_919, "a prime number of rows has no equal parts"
        assert cross_entropy._rows_at_a_time(rows, columns, cpu) == min(rows, max(FEWEST, PROJECTED // columns))


@pytest.mark.parametrize("architecture", SMALL)
def test_a_loss_that_projects_is_the_same_loss(architecture, shared_dir, tmp_path):
    """The first step of a run, against one whose model projects itself."""
    tokens, results = token_set(shared_dir), []
    for alone in (True, False):
        trainer = lmssl.PretrainTrainer(
            small_model(architecture, tokens.vocab(), LENGTH), OBJECTIVE[architecture], tokens, arguments(tmp_path, max_steps=1, max_grad_norm=0.0), LENGTH, quiet=True
        )
        assert (trainer.head is None) == (architecture == "bart")  # which adds a number to each logit
        trainer.head = trainer.head if alone else None
        results.append(first_step(trainer))
    assert_same_step(results)


def test_logits_that_are_bent_or_scaled_are_left_to_the_model(shared_dir, tmp_path):
    vocab, args = token_set(shared_dir).vocab(), arguments(tmp_path)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    for architecture, keys, plain in [("gemma2", {"head_dim": 16}, False), ("granite", {"logits_scaling": 3.0}, False), ("granite", {"logits_scaling": 1.0}, True)]:
        model = forward.prepare(models.build({"architecture": architecture, **small, **keys}, vocab, OBJECTIVE["llama"], LENGTH, 0))
        assert (forward.head_for_loss(model, vocab, args) is not None) == plain, architecture
    assert forward.head_for_loss(model, vocab, arguments(tmp_path, fp16=True)) is None
    assert forward.head_for_loss(model.to(torch.bfloat16), vocab, args) is None, "its parts would be summed rounded"


def test_a_copy_projects_by_its_own_weights(shared_dir):
    vocab = token_set(shared_dir).vocab()
    model = forward.prepare(small_model("llama", vocab, LENGTH))
    other, ids = copy.deepcopy(model), torch.arange(300, 308)[None]
    before = other(input_ids=ids).logits
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert torch.equal(other(input_ids=ids).logits, before)
    assert other(input_ids=ids, skip_logits=True).logits.shape == (1, 8, 32)
    assert model(input_ids=ids).logits.shape == (1, 8, vocab.size)


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
        ours = token_loss(forward.prepare(model)(**batch), labels)
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


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_a_traced_model_is_the_same_model(architecture, shared_dir, tmp_path):
    """What compilation captures, without the time that its kernels take."""
    tokens, results = token_set(shared_dir), []
    for keys in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=8, max_grad_norm=0.0, **keys)
        results.append(first_step(lmssl.PretrainTrainer(small_model(architecture, tokens.vocab(), LENGTH), OBJECTIVE[architecture], tokens, args, LENGTH, quiet=True)))
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


def test_two_processes_equal_one(shared_dir, tmp_path):
    """torchrun with two processes (asserted) against one, which accelerate wraps for a group too, for every architecture and for sentiment on each
    family; and that one against one of no group, where the head has a bias of its own (bert) or is not tied (llama)."""
    save_backbones(shared_dir)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for count in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(ROOT / "tests" / "one_step.py")]
        subprocess.run([*launcher, str(shared_dir), ",".join(SMALL), str(tmp_path / str(count)), str(8 // count)], check=True, env=environment, timeout=240)
    one_step(str(shared_dir), "bert,llama", str(tmp_path / "alone"), "8")
    one, two, alone = (torch.load(tmp_path / name, weights_only=True) for name in ("1", "2", "alone"))
    assert (one["world"], two["world"]) == (1, 2)
    assert one["refused"] == [""] * 4
    told = ["not all processes see the same", "data: process 1 has text False, process 0 text True", "process 1 does not see what process 0 writes", "nothing can be written into"]
    assert all(words in refused for words, refused in zip(told, two["refused"], strict=True)), two["refused"]
    assert not two["left"], "what was looked for"
    assert set(one["steps"]) == set(two["steps"])
    assert len(one["steps"]) == len(SMALL) + 3
    for name, step in one["steps"].items():
        assert_same_step([step, two["steps"][name], *([alone["steps"][name]] if name in alone["steps"] else [])])
