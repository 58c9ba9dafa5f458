"""Choices that are measured: made once, written down, read on resume, never over what a recipe says."""

import pytest
import transformers
from transformers import PreTrainedModel

from lmssl import arguments, config, machine, probe, runs
from lmssl.errors import Stopped, UserError
from lmssl.recipe import PRETRAIN, PretrainRecipe
from lmssl.runs import pretrain
from lmssl.scoring import evaluate
from tests.helpers import SMALL, token_set

KIND = "activation_checkpointing" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient_checkpointing"
"""What transformers calls it, since 5.2x and before."""


@pytest.fixture
def sections(corpus_file, tmp_path):
    return {
        "data": {"text": str(corpus_file), "tokenizer": "tokenizer_assets/bpe-8k", "seq_length": 32, "held_out": 0.1},
        "model": {"architecture": "gpt2", **SMALL["gpt2"]},
        "objective": {"name": "next_token"},
        "trainer": {"output_dir": str(tmp_path / "run"), "max_steps": 4, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "save_steps": 2},
    }


def run(sections, **keys):
    """The trainer section as the run wrote it down."""
    pretrain(PretrainRecipe.of(sections), quiet=True, **keys)
    return config.load(f"{sections['trainer']['output_dir']}/recipe.yaml", (), PRETRAIN)["trainer"]


@pytest.fixture
def speeds(monkeypatch):
    """Seconds a row by micro-batch, given by the test; what was asked for."""
    given, asked = {}, []

    def pass_seconds(model, batch, loss, call, repeats=3):
        rows = len(batch["input_ids"])
        asked.append(rows)
        if isinstance(given[rows], Exception):
            raise given[rows]
        return given[rows] * rows

    monkeypatch.setattr(machine, "pass_seconds", pass_seconds)
    monkeypatch.setattr(probe, "SMALLEST", 8 * 32)
    return given, asked


def test_the_fastest_micro_batch_is_taken_and_kept_on_resume(sections, speeds):
    given, asked = speeds
    given |= {32: 1.0, 16: 0.5, 8: 0.49}
    sections["trainer"]["batch"] = "auto"
    made = run(sections)
    assert (made["per_device_train_batch_size"], made["gradient_accumulation_steps"], made["batch"]) == (16, 2, "given"), "8 is not faster by enough"
    assert asked == [32, 16, 8]
    given |= {16: 2.0}
    sections["trainer"] |= {"max_steps": 6, "torch_compile": False}
    assert run(sections, resume=True)["per_device_train_batch_size"] == 16
    assert asked == [32, 16, 8], "nothing was measured again"
    sections["trainer"] |= {"gradient_accumulation_steps": 1, "max_steps": 8}
    given |= {4: 1.0}
    with pytest.raises(UserError, match=r"batch changed: .* has 32, this run 16"):
        run(sections, resume=True)


def test_a_micro_batch_that_does_not_fit_is_passed_over(sections, speeds, monkeypatch):
    import torch

    given, asked = speeds
    given |= {32: RuntimeError("DefaultCPUAllocator: can't allocate memory"), 16: torch.OutOfMemoryError("16"), 8: torch.OutOfMemoryError("8"), 4: 1.0}
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    sections["trainer"]["batch"] = "auto"
    assert run(sections)["per_device_train_batch_size"] == 4
    assert asked[:4] == [32, 16, 8, 4]
    given |= {n: torch.OutOfMemoryError() for n in (4, 2, 1)}
    with pytest.raises(Stopped, match="not even one row fits"):
        run(sections, overwrite=True)


def test_an_odd_number_of_rows_is_divided_until_it_fits(sections, speeds, monkeypatch):
    import torch

    given, asked = speeds
    given |= {18: torch.OutOfMemoryError(), 9: torch.OutOfMemoryError(), 3: 1.0, 1: 1.0}
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    sections["trainer"] |= {"batch": "auto", "per_device_train_batch_size": 9}
    assert run(sections)["per_device_train_batch_size"] == 3
    assert asked[:3] == [18, 9, 3]


@pytest.mark.parametrize(("seconds", "compiler", "compiled"), [(0.001, "sh", False), (100.0, "sh", True), (100.0, "no/such/compiler", False)])
def test_compiled_where_it_pays(seconds, compiler, compiled, sections, speeds, monkeypatch):
    """Measured on the real recipe; the training itself is stopped before it would compile."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("CC", compiler)
    speeds[0][16] = seconds / 16
    objective, tokenizer = runs.check(wanted := PretrainRecipe.of(sections))
    values = arguments.resolve(wanted.trainer, arguments.pretrain_defaults())
    trainer, done = runs.assemble(wanted, objective, tokenizer, values, True)
    assert done["torch_compile"] is trainer.args.torch_compile is compiled
    values["torch_compile"] = not compiled
    assert runs.assemble(wanted, objective, tokenizer, values, True)[1]["torch_compile"] is not compiled, "what a recipe says wins"


def test_a_real_pass_leaves_no_gradient(sections):
    """The probe unpatched, on a real model: the run is the one that a recipe with its choices written out gives."""
    import torch
    from safetensors.torch import load_file

    folder = sections["trainer"]["output_dir"]
    made = run(sections)
    first = load_file(f"{folder}/model.safetensors")
    assert made["torch_compile"] is False
    sections["trainer"] = made
    run(sections, overwrite=True)
    again = load_file(f"{folder}/model.safetensors")
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert probe.recorded(sections["trainer"]["output_dir"] + "/nothing", {}) == {}


@pytest.mark.parametrize("continued", [False, True])
def test_what_is_measured_is_a_step_of_training(continued, sections, monkeypatch):
    """With dropout, which a checkpoint is loaded without, and with checkpointed activations where the run has them; afterwards as before."""
    measured, pass_seconds = [], machine.pass_seconds

    def look(model, *args):
        measured.append((model.training, getattr(model, f"is_{KIND}")))
        return pass_seconds(model, *args)

    monkeypatch.setattr(machine, "pass_seconds", look)
    if continued:
        run(sections)
        sections["model"] = {"from": sections["trainer"]["output_dir"]}
        sections["trainer"] |= {"output_dir": sections["trainer"]["output_dir"] + "-on", KIND: True}
        measured.clear()
    wanted = PretrainRecipe.of(sections)
    objective, tokenizer = runs.check(wanted)
    values = arguments.resolve(wanted.trainer, arguments.pretrain_defaults(continued))
    trainer, _ = runs.assemble(wanted, objective, tokenizer, values, True)
    assert set(measured) == {(True, continued)}
    assert (trainer.model.training, getattr(trainer.model, f"is_{KIND}")) == (not continued, False)


def test_an_architecture_that_takes_no_mask_is_refused_before_it_is_timed(sections, corpus_file, shared_dir, tmp_path):
    """With nothing given that the probe would choose; and where a checkpoint of it is scored."""
    sections["model"] = {"architecture": "deberta-v2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sections["objective"]["name"] = "masked"
    with pytest.raises(UserError, match="'deberta-v2' cannot read a row of packed documents"):
        pretrain(PretrainRecipe.of(sections), quiet=True)
    tokens = token_set(shared_dir)
    small = transformers.BloomConfig(vocab_size=tokens.vocab().size, hidden_size=32, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(small).save_pretrained(tmp_path / "bloom")
    tokens.tokenizer.save(tmp_path / "bloom")
    with pytest.raises(UserError, match="documents packed into one row see each other in 'bloom'"):
        evaluate(str(tmp_path / "bloom"), [f"data.text={corpus_file}", "data.seq_length=32"])
