"""What only a GPU can show: the kernels, the same loss, documents apart, the same bits after a resume. Elsewhere these are left out."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, TrainerCallback

import lmssl
from lmssl import arguments as sections
from lmssl import forward, machine, models, packing
from lmssl.data.stream import Stream
from lmssl.errors import Stopped
from lmssl.objectives.cross_entropy import ALIGNED, PROJECTED, linear_cross_entropy, summed_cross_entropy, token_loss
from tests.helpers import OBJECTIVE, SMALL, apart, arguments, first_step, small_model, token_set

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTH = 64
ONE_SIDED = [name for name in SMALL if name not in ("t5", "bart")]


def trainer_of(architecture, tokens, folder, optimizer="adamw", dropout=False, **keys):
    model = small_model(architecture, tokens.vocab(), LENGTH, dropout=dropout)
    keys = {"use_cpu": False, "bf16": True} | keys
    return lmssl.PretrainTrainer(model, OBJECTIVE[architecture], tokens, arguments(folder, **keys), LENGTH, optimizer, quiet=True)


def batch_of(architecture, tokens, rows=4):
    objective, family = OBJECTIVE[architecture], models.family_of(small_model(architecture, tokens.vocab(), LENGTH).config)
    stream = Stream(tokens, objective, LENGTH, 0, 100)
    collate = packing.collator(stream, LENGTH, family, torch.device("cuda"))
    return {k: v.cuda() for k, v in collate([stream[i] for i in range(rows)]).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [8192, 50_257])
def test_the_loss_equals_torch(dtype, columns):
    """Loss and all gradients, with a bias and labels that ask nothing, over more rows than go at a time, against float64."""
    rows = 2 * PROJECTED["cuda"] // columns + 3
    values = [torch.randn(rows, 32, device="cuda"), torch.randn(columns, 32, device="cuda") / 4, torch.randn(columns, device="cuda")]
    labels = torch.randint(0, columns, (rows,), device="cuda")
    labels[::5] = -100

    def of(loss, wide=False):
        leaves = [(v.double() if wide else v.clone()).requires_grad_() for v in values]
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16 and not wide):
            total = loss(*leaves) / 7
        return total.item(), torch.autograd.grad(total, leaves)

    assert columns % ALIGNED["cuda"] or columns == 8192
    theirs, expected = of(lambda *v: F.cross_entropy(F.linear(*v), labels, reduction="sum"), wide=True)
    for loss in (lambda *v: linear_cross_entropy(*v, labels), lambda *v: summed_cross_entropy(F.linear(*v), labels)):
        ours, gradients = of(loss)
        assert ours == pytest.approx(theirs, rel=1e-5 if dtype == torch.float32 else 1e-3)
        for mine, other in zip(gradients, expected, strict=True):
            assert apart(mine.double(), other) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("architecture", ONE_SIDED)
def test_no_document_sees_another_in_the_kernel(architecture, shared_dir):
    """Changing one document's tokens moves no other's logits; and the kernel computes what the mask does."""
    tokens = token_set(shared_dir)
    model = forward.prepare(small_model(architecture, tokens.vocab(), LENGTH).cuda(), True).eval()
    batch = batch_of(architecture, tokens)
    del batch["labels"], batch["label_positions"]
    segments = batch["segments"]
    assert segments.max() > 2

    def logits(**changed):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return model(**{k: v for k, v in (batch | changed).items() if v is not None}).logits.float()

    changed = torch.where(segments == 2, batch["input_ids"].flip(0), batch["input_ids"])
    base, moved = logits(), (logits(input_ids=changed) - logits()).abs().amax(-1)
    assert moved[segments != 2].max() == 0
    assert moved[segments == 2].max() > 1e-3, "the test sees what it changes"
    assert apart(base, logits(borders=None)) < 2e-2, "another kernel, the same attention"


@pytest.mark.parametrize("architecture", SMALL)
def test_a_step_is_the_same_however_it_is_split_and_attended(architecture, shared_dir, tmp_path):
    """Gradient of a first step: whole, in four parts, and in float32 on the CPU."""
    tokens, keys = token_set(shared_dir), {"max_steps": 1, "max_grad_norm": 0.0}
    whole = first_step(trainer_of(architecture, tokens, tmp_path, **keys))
    parts = first_step(trainer_of(architecture, tokens, tmp_path, **keys, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    exact = first_step(trainer_of(architecture, tokens, tmp_path, **keys, use_cpu=True, bf16=False))
    assert whole[0] == pytest.approx(parts[0], rel=1e-3)
    assert whole[0] == pytest.approx(exact[0], rel=1e-2)
    assert apart(whole[1].cpu(), parts[1].cpu()) < 3e-2
    assert apart(whole[1].cpu(), exact[1].cpu()) < 5e-2


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("architecture", "optimizer"), [("gpt2", "muon"), ("bert", "muon"), ("t5", "adamw")])
def test_a_resumed_run_ends_with_the_same_bits(architecture, optimizer, compiled, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "dropout": True, "torch_compile": compiled}
    whole, again = (trainer_of(architecture, tokens, tmp_path / name, optimizer, **keys) for name in ("whole", "again"))
    whole.run()
    again.run()
    second = trainer_of(architecture, tokens, tmp_path / "again", optimizer, **keys)
    (tmp_path / "again" / "checkpoint-6").rename(tmp_path / "away")
    point = second.resume_point()
    assert point.name == "checkpoint-4"
    second.run(point)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), f"run again: {name}"
        assert torch.equal(value, second.model.state_dict()[name]), f"resumed: {name}"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer, shared_dir, tmp_path):
    """Nobody waits for it: its update is left out on the GPU, and the run ends a step later."""
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path, optimizer, max_steps=6, save_strategy="steps", save_steps=2)
    before = {}

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                before.update({k: v.clone() for k, v in trainer.model.state_dict().items()})
                trainer.model.get_input_embeddings().weight.register_hook(lambda g: g * float("inf"))

    trainer.add_callback(Spoil())
    with pytest.raises(Stopped, match=r"the gradient of step 3 .*no update was made.*checkpoint-2"):
        trainer.run()
    assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_flops_of_the_kernel_are_those_of_the_documents(architecture, shared_dir):
    """Beside those of a model that masks: attention over each document alone, half of it where a token sees what stands before it."""
    tokens = token_set(shared_dir)
    model = forward.prepare(small_model(architecture, tokens.vocab(), LENGTH).cuda(), True)
    batch = batch_of(architecture, tokens)
    with torch.autocast("cuda", torch.bfloat16):
        kernel, mask = (machine.step_flops(model, b, token_loss) for b in (batch, {k: v for k, v in batch.items() if k != "borders"}))
    lengths = batch["borders"].diff().double()
    ours, theirs = (2 * (2 + 5) * model.config.hidden_size * 2 * squares for squares in (lengths.square().sum().item(), batch["segments"].numel() * LENGTH))
    assert mask - kernel == pytest.approx(theirs - ours / (2 if architecture == "gpt2" else 1), rel=1e-6)


def test_a_run_on_a_gpu_is_an_ordinary_checkpoint(corpus_file, tmp_path):
    """With the defaults of a GPU, from a recipe, without waiting workers left behind; the peak's share is counted."""
    recipe = {
        "data": {"text": str(corpus_file), "tokenizer": "tokenizer_assets/bpe-8k", "seq_length": 64, "held_out": 0.1},
        "model": {"architecture": "llama", **SMALL["llama"]},
        "objective": {"name": "next_token"},
        "trainer": {"output_dir": str(tmp_path / "run"), "max_steps": 8},
    }
    metrics = lmssl.pretrain(lmssl.PretrainRecipe.of(recipe))
    assert metrics["environment"]["device"] == torch.cuda.get_device_name(0)
    assert 0 <= metrics["matmul_share"] < 1
    assert sections.pretrain_defaults()["dataloader_num_workers"] == sections.workers()
    assert AutoModel.from_pretrained(tmp_path / "run").config.hidden_size == 32
