"""Resume to the same bits, stop before a NaN, save on a signal, learn."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import lmssl
from lmssl import arguments as sections
from lmssl import checkpoints, machine
from lmssl.data.stream import Collator, Stream, count_tokens
from lmssl.errors import Stopped, UserError
from lmssl.evaluation import held_out
from lmssl.objectives import MaskedTokens, NextToken, SpanCorruption
from lmssl.objectives.base import Row
from lmssl.objectives.toy import vocab as toy_vocab
from lmssl.optimizers import MuonAdamW, muon_groups, orthogonalised, sizes_of
from lmssl.recipe import PretrainRecipe
from lmssl.runs import pretrain
from lmssl.watch import Guard, of_the_data
from tests.helpers import OBJECTIVE, SMALL, apart, arguments, small_model, token_set

LENGTH, VOCAB = 32, toy_vocab()


def trainer_of(architecture, tokens, folder, optimizer="adamw", objective=None, **keys):
    model = small_model(architecture, tokens.vocab(), LENGTH, dropout=True)
    return lmssl.PretrainTrainer(model, objective or OBJECTIVE[architecture], tokens, arguments(folder, **keys), LENGTH, optimizer, quiet=True)


def weights(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


def test_embeddings_of_unit_variance_take_steps_of_their_size(shared_dir):
    """T5's are 50 times the usual ones: the same relative step, the same decay; no other architecture's rate is changed."""
    vocab = token_set(shared_dir).vocab()
    for architecture in SMALL:
        model = small_model(architecture, vocab, LENGTH)
        (embeddings,) = (g for g in muon_groups(model, 0.1, 1e-3) if any(p is model.get_input_embeddings().weight for p in g["params"]))
        rate = embeddings.get("lr", 1e-3)
        assert rate == pytest.approx(1e-3 * (50 if architecture == "t5" else 1))
        assert rate * embeddings["weight_decay"] == pytest.approx(1e-4)


def test_groups_are_those_of_the_new_model(shared_dir):
    """A matrix that grew past a border in training keeps the group that it began in: a resumed run builds its groups after loading."""
    model = small_model("llama", token_set(shared_dir).vocab(), LENGTH)
    sizes, shape = sizes_of(model), lambda groups: [(len(g["params"]), g.get("lr")) for g in groups]
    before = shape(muon_groups(model, 0.1, 1e-3, sizes))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(100)
    assert shape(muon_groups(model, 0.1, 1e-3, sizes)) == before
    assert shape(muon_groups(model, 0.1, 1e-3)) != before


def test_resume_after_embeddings_grew(shared_dir, tmp_path):
    def grow(control):
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight.mul_(100)

    tokens, folder = token_set(shared_dir), tmp_path / "run"
    trainer = trainer_of("llama", tokens, folder, "muon", max_steps=4, save_strategy="steps", save_steps=2)
    trainer.add_callback(At(1, grow))
    trainer.run()
    again = trainer_of("llama", tokens, folder, "muon", max_steps=4, save_strategy="steps", save_steps=2)
    shutil.rmtree(folder / "checkpoint-4")
    again.run(again.resume_point())
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer).values(), weights(again).values(), strict=True))


@pytest.mark.parametrize("rate", [0.05, 0.12])
def test_noise_below_the_held_out_rate(rate, shared_dir, tmp_path):
    """Held-out text is masked at a rate of its own, above this one's: its labels need their own bound."""
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path, objective=MaskedTokens(rate=rate), max_steps=1, per_device_eval_batch_size=1)
    trainer.run()
    assert trainer.metrics()["held_out"]["loss"] > 0


def test_logits_of_held_out_text_are_bounded(shared_dir, tmp_path, monkeypatch):
    trainer = trainer_of("llama", token_set(shared_dir), tmp_path)
    whole = trainer.evaluate()["eval_loss"]
    seen = []
    trainer.model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    most = 3 * LENGTH * trainer.model.config.vocab_size
    monkeypatch.setattr("lmssl.evaluation.LOGITS", most)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-6)
    assert len(seen) > 1
    assert max(seen) <= most


def test_a_loss_scale_may_overflow(shared_dir, tmp_path, monkeypatch):
    """With fp16 a gradient that is not finite makes the scaler skip the step; a loss that is not finite still ends the run."""
    trainer = trainer_of("llama", token_set(shared_dir), tmp_path)
    trainer.gradient_norm = torch.tensor(math.inf)
    state, control = trainer.state, trainer.control
    with pytest.raises(Stopped, match="the gradient of step 1"):
        trainer.guard.on_pre_optimizer_step(trainer.args, state, control)
    monkeypatch.setattr(trainer.accelerator, "scaler", object())
    trainer.guard.on_pre_optimizer_step(trainer.args, state, control)
    trainer.guard.losses.append(torch.tensor(math.nan))
    with pytest.raises(Stopped, match="the loss of step 1"):
        trainer.guard.on_pre_optimizer_step(trainer.args, state, control)


def test_one_process_takes_one_gpu(shared_dir, tmp_path, caplog):
    tokens = token_set(shared_dir)
    sections._say_gpus.cache_clear()
    args = arguments(tmp_path)
    assert args.n_gpu == 0, "set up"
    args._n_gpu = 4
    with caplog.at_level("WARNING", "lmssl"):
        trainer = lmssl.PretrainTrainer(small_model("llama", tokens.vocab(), LENGTH), NextToken(), tokens, args, LENGTH, quiet=True)
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == args.per_device_train_batch_size
    args._n_gpu = 4
    sections.check(args)
    assert caplog.text.count("torchrun --nproc-per-node 4") == 1


def test_muon_is_torchs_own(monkeypatch):
    """Matrices of one shape taken together end where torch.optim.Muon takes them one by one; and so does AdamW beside it."""
    monkeypatch.setattr(machine, "native_bf16", lambda device: True)
    shapes = [(32, 32), (64, 32), (32, 32), (32, 64), (64, 32), (100, 32), (32,)]
    ours, theirs = ([torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(n))) for n, s in enumerate(shapes)] for _ in range(2))
    groups = [{"params": ours[:5], "muon": True, "weight_decay": 0.1}, {"params": ours[5:], "muon": False, "weight_decay": 0.0}]
    together = MuonAdamW(groups, lr=1e-2)
    muon = torch.optim.Muon(theirs[:5], lr=1e-2, weight_decay=0.1, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[5:], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        ours[0].grad = theirs[0].grad = None  # a matrix that no loss reaches is left alone
        for optimizer in (together, muon, adamw):
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("native", [True, False])
def test_orthogonalised_is_near_the_polar_factor(native, monkeypatch):
    """In float32 where there is no bfloat16 in hardware: the iteration pulls every singular value into 0.7 to 1.2."""
    monkeypatch.setattr(machine, "native_bf16", lambda device: native)
    matrices = torch.randn(3, 48, 20, generator=torch.Generator().manual_seed(0))
    done = orthogonalised(matrices, (3.4445, -4.775, 2.0315), 5, 1e-7)
    assert done.dtype == (torch.bfloat16 if native else torch.float32)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.diagonal(u.mT @ done.float() @ v.mT)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.allclose(done.float(), u @ torch.diag_embed(values) @ v, atol=0.02), "the singular vectors are kept"


def test_a_worker_killed_while_it_hands_a_batch_over_is_named():
    """Found by drill R14 (kill at item 40): the pipe breaks before torch sees that the worker is dead."""
    from multiprocessing import Pipe

    ours, theirs = Pipe()
    theirs.close()
    with pytest.raises(EOFError) as error:
        ours.recv()
    assert "worker exited unexpectedly or was killed by signal" in of_the_data(error.value)
    with pytest.raises(ConnectionError) as error:
        raise ConnectionError("no network")
    assert "no network" in of_the_data(error.value), "an error of the data's own keeps its words"


@pytest.mark.parametrize(("architecture", "optimizer"), [("gpt2", "adamw"), ("bert", "muon"), ("t5", "muon"), ("bart", "adamw")])
def test_resume_is_bit_identical(architecture, optimizer, shared_dir, tmp_path):
    """Dropout on, two micro-batches a step, resumed in the middle of everything; a longer look-ahead changes nothing."""
    tokens = token_set(shared_dir)
    keys = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole = trainer_of(architecture, tokens, tmp_path / "whole", optimizer, **keys)
    whole.run()
    first = trainer_of(architecture, tokens, tmp_path / "cut", optimizer, **keys)

    def stop(control):
        raise KeyboardInterrupt

    first.add_callback(At(3, stop))
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = trainer_of(architecture, tokens, tmp_path / "cut", optimizer, **keys)
    point = second.resume_point()
    assert point.name == "checkpoint-2"
    second.run(point)
    for name, value in weights(whole).items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert second.tokens_seen == whole.tokens_seen
    assert [c["loss"] for c in second.curve] == [c["loss"] for c in whole.curve]
    assert list(second.guard.norms) == list(whole.guard.norms), "what a spike is measured by"


def test_workers_change_nothing(shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    runs = [trainer_of("bert", tokens, tmp_path / str(n), dataloader_num_workers=n, max_steps=4) for n in (0, 2)]
    for run in runs:
        run.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(runs[0]).values(), weights(runs[1]).values()))


def test_only_files_that_this_rank_has_finished_are_hashed_early(shared_dir, tmp_path, monkeypatch):
    seen = []
    original = checkpoints.Hashes.begin
    monkeypatch.setattr(checkpoints.Hashes, "begin", lambda self, folder, *names: seen.append(names) or original(self, folder, *names))
    trainer_of("bert", token_set(shared_dir), tmp_path, max_steps=1, save_strategy="steps", save_steps=1).run()
    assert seen[0] == ("*.safetensors",), "beside the training"
    assert seen[1:] == [()], "the rest when every rank is done"


@pytest.mark.parametrize("key", ["seed", "batch", "objective"])
def test_resume_refuses_another_run(key, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer_of("bert", tokens, tmp_path, **keys).run()
    changed = {"seed": {"seed": 5}, "batch": {"per_device_train_batch_size": 2}, "objective": {"objective": MaskedTokens(rate=0.2)}}[key]
    other = trainer_of("bert", tokens, tmp_path, **{**keys, **changed})
    with pytest.raises(UserError, match=f"{key} changed: .*--accept {key}"):
        other.resume_point()
    assert other.resume_point((key,)).name == "checkpoint-2"
    with pytest.raises(UserError, match="--accept: nothing is called 'sed'; did you mean 'seed'"):
        other.resume_point((key, "sed"))


def test_an_accepted_model_must_have_the_same_weights(shared_dir, tmp_path):
    tokens, keys = token_set(shared_dir), {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer_of("bert", tokens, tmp_path, **keys).run()
    wider = small_model("bert", tokens.vocab(), LENGTH, dropout=True, hidden_size=64)
    with pytest.raises(UserError, match=r"--accept model: .*has shape .* the weights must be the same"):
        lmssl.PretrainTrainer(wider, OBJECTIVE["bert"], tokens, arguments(tmp_path, **keys), LENGTH, quiet=True).resume_point(("model",))
    other = small_model("bert", tokens.vocab(), LENGTH, dropout=True, hidden_dropout_prob=0.3)
    resumed = lmssl.PretrainTrainer(other, OBJECTIVE["bert"], tokens, arguments(tmp_path, **keys), LENGTH, quiet=True)
    with pytest.raises(UserError, match="model changed"):
        resumed.resume_point()
    assert resumed.resume_point(("model",)).name == "checkpoint-2"


def test_a_longer_run_goes_on_at_the_rate_of_its_own_schedule(shared_dir, tmp_path):
    """A cosine that has come to its end has the rate 0; the first step behind it must not."""
    tokens, rates = token_set(shared_dir), []
    keys = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "cosine"}
    trainer_of("bert", tokens, tmp_path, max_steps=4, **keys).run()
    longer = trainer_of("bert", tokens, tmp_path, max_steps=8, **keys)

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    longer.add_callback(Rates())
    longer.run(longer.resume_point())
    assert len(rates) == 4
    expected = [longer.args.learning_rate * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(4, 8)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("later", "max_steps", "save_steps"), [(False, 5, 1), (True, 5, 1), (True, 5, 2), (True, 3, 2)])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_the_update(where, later, max_steps, save_steps, optimizer, shared_dir, tmp_path, monkeypatch):
    """At once, or, as on a GPU, a step later, before a checkpoint, or at the end: the update is not made."""
    tokens = token_set(shared_dir)
    monkeypatch.setattr(Guard, "_later", staticmethod(lambda values: later))
    trainer = trainer_of("bert", tokens, tmp_path, optimizer, max_steps=max_steps, save_strategy="steps", save_steps=save_steps)
    seen = {}

    def spoil(control):
        seen["before"] = weights(trainer)
        target = trainer.model.get_input_embeddings().weight
        if where == "gradient":
            target.register_hook(lambda g: g * float("inf"))
        else:
            trainer.compute_loss_func = lambda *a, **k: lmssl.token_loss(*a, **k) * float("nan")

    trainer.add_callback(At(2, spoil))
    with pytest.raises(Stopped, match=rf"the {where} of step 3 \(items 8 to 11 .*is not finite; no update.*--at-step 3; .*checkpoint-2") as caught:
        trainer.run()
    assert caught.value.exit_code == 3
    assert all(torch.equal(a, b) for a, b in zip(seen["before"].values(), weights(trainer).values()))
    checkpoints.verify(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-3").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_finite_run_is_the_same_whether_its_numbers_are_waited_for(optimizer, shared_dir, tmp_path, monkeypatch):
    tokens, runs = token_set(shared_dir), []
    for later in (False, True):
        monkeypatch.setattr(Guard, "_later", staticmethod(lambda values, later=later: later))
        runs.append(trainer_of("bert", tokens, tmp_path / str(later), optimizer, max_steps=4))
        runs[-1].run()
    for a, b in zip(*(weights(run).values() for run in runs)):
        assert apart(b.double(), a.double()) < 1e-7  # weight decay is rounded once more
    assert list(runs[0].guard.norms) == pytest.approx(list(runs[1].guard.norms), rel=1e-5)


@pytest.mark.parametrize("architecture", SMALL)
def test_it_learns(architecture, shared_dir, tmp_path):
    """Forty steps on a text of 36 words bring the held-out loss well below that of the untrained model."""
    tokens = token_set(shared_dir)
    trainer = trainer_of(architecture, tokens, tmp_path, "muon", max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=10)
    before = trainer.evaluate()["eval_loss"]
    trainer.run()
    assert trainer.evaluate()["eval_loss"] < before - 0.8


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_held_out_loss_does_not_depend_on_the_batch(architecture, shared_dir, tmp_path):
    trainer = trainer_of(architecture, token_set(shared_dir), tmp_path)
    values = [held_out(trainer.model, trainer.held_out_stream, trainer.data_collator, batch) for batch in (1, 3, 64)]
    for value in values[1:]:
        assert value["loss"] == pytest.approx(values[0]["loss"], rel=1e-6)
        assert value["bits_per_byte"] == pytest.approx(values[0]["bits_per_byte"], rel=1e-6)
        assert (value["labels"], value["rows"]) == (values[0]["labels"], values[0]["rows"])


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_bits_per_byte_are_of_the_labels_and_their_text(architecture, shared_dir, tmp_path):
    trainer = trainer_of(architecture, token_set(shared_dir), tmp_path)
    stream, values = trainer.held_out_stream, held_out(trainer.model, trainer.held_out_stream, trainer.held_out_collator, 4)
    size = sum(int(stream.vocab.token_bytes[labels[labels != -100]].sum()) for labels in (stream[i]["labels"] for i in range(len(stream))))
    bits = values["loss"] * values["labels"] / math.log(2)
    assert values["bits_per_byte"] == pytest.approx(bits / size)
    trainer.asked += torch.tensor([values["labels"], size])
    assert trainer.bits_per_byte(values["loss"]) == pytest.approx(bits / size)


def test_held_out_loss_asks_no_device_for_float64():
    """Apple's GPUs have none."""

    class There(torch.Tensor):
        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    class Model(torch.nn.Module):
        def forward(self, **inputs):
            return SimpleNamespace(logits=torch.zeros(4 * LENGTH, VOCAB.size).as_subclass(There))

    class Rows(list):
        vocab = VOCAB

    row = Row(np.full(LENGTH, 7, np.int32), np.ones(LENGTH, np.int32))
    found = held_out(Model(), Rows([NextToken()(row, VOCAB, None)] * 4), Collator(NextToken(), LENGTH, "decoder", VOCAB.pad), 4)
    assert found["loss"] == pytest.approx(math.log(VOCAB.size))


def test_tokens_are_what_encoder_and_decoder_read(shared_dir):
    tokens, vocab = token_set(shared_dir), token_set(shared_dir).vocab()
    for architecture in ("llama", "t5"):
        stream = Stream(tokens, OBJECTIVE[architecture], LENGTH, 0, 8)
        family = next(iter(OBJECTIVE[architecture].families))
        batch = Collator(OBJECTIVE[architecture], LENGTH, family, vocab.pad)([stream[i] for i in range(8)])
        read = sum((stream[i][name] > 0).sum() for i in range(8) for name in ("segments", "decoder_segments") if name in stream[i])
        assert count_tokens(batch).item() == read


def test_muon_takes_the_recipes_numbers(shared_dir, tmp_path):
    trainer = trainer_of("llama", token_set(shared_dir), tmp_path, "muon", weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, learning_rate=0.02)
    groups = trainer.create_optimizer().param_groups
    assert {g["weight_decay"] for g in groups} == {0.3, 0.0}
    assert {g["weight_decay"] for g in groups if g["muon"]} == {0.3}
    assert {g["lr"] for g in groups} == {0.02}
    assert {(g["betas"], g["eps"]) for g in groups if not g["muon"]} == {((0.8, 0.95), 1e-6)}


def test_held_out_rate_is_fixed(shared_dir, tmp_path):
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path, objective=MaskedTokens(rate=0.5))
    assert trainer.held_out_stream.objective.rate == 0.15


def test_wrong_combinations_are_refused(shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    with pytest.raises(UserError, match="'gpt2' is a decoder"):
        lmssl.PretrainTrainer(small_model("gpt2", tokens.vocab()), SpanCorruption(), tokens, arguments(tmp_path))
    with pytest.raises(UserError, match="420 ids, the model 64 embeddings"):
        lmssl.PretrainTrainer(small_model("gpt2", toy_vocab(64)), NextToken(), tokens, arguments(tmp_path))
    with pytest.raises(UserError, match="max_steps"):
        lmssl.PretrainTrainer(small_model("gpt2", tokens.vocab()), NextToken(), tokens, arguments(tmp_path, max_steps=-1))


# --- the whole spine by recipe -------------------------------------------------------------------------------------


def recipe_of(corpus_file, out, **trainer):
    return PretrainRecipe.of(
        {
            "data": {"text": str(corpus_file), "tokenizer": "tokenizer_assets/bpe-8k", "seq_length": 32, "held_out": 0.1},
            "model": {"architecture": "bert", **SMALL["bert"]},
            "objective": {"name": "masked"},
            "trainer": {"output_dir": str(out), "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "bf16": False, **trainer},
        }
    )


def test_pretrain_folder_and_metrics(corpus_file, tmp_path):
    out = tmp_path / "run"
    metrics = pretrain(recipe_of(corpus_file, out), quiet=True)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert {"objective", "family", "architecture", "parameters", "seed", "steps", "tokens", "seconds", "tokens_per_second", "held_out"} <= set(metrics)
    assert (metrics["steps"], metrics["family"], metrics["tokens"]) == (4, "encoder", 4 * 4 * 32)
    assert {p.name for p in out.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "README.md", "checkpoint-2", "checkpoint-4"}
    final, last = load_file(out / "model.safetensors"), load_file(out / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(final[k], last[k]) for k in final)
    assert not list(out.rglob("*.bin")), "nothing pickled beside the optimizer's state"
    # Feeding the resolved recipe back repeats the run.
    again = PretrainRecipe.load(out / "recipe.yaml", [f"trainer.output_dir={tmp_path / 'again'}"])
    assert pretrain(again, quiet=True)["held_out"] == metrics["held_out"]


def test_existing_folders(corpus_file, tmp_path):
    out, recipe = tmp_path / "run", recipe_of(corpus_file, tmp_path / "run")
    first = pretrain(recipe, resume=True, quiet=True)  # nothing there yet: starts at step 0
    with pytest.raises(UserError, match=r"holds a run.*--resume.*--overwrite"):
        pretrain(recipe, quiet=True)
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert pretrain(recipe, resume=True, quiet=True) == first
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp, "a finished run is left alone"
    longer = pretrain(recipe_of(corpus_file, out, max_steps=6), resume=True, quiet=True)
    assert (longer["steps"], longer["tokens"]) == (6, 6 * 4 * 32)
    assert pretrain(recipe, overwrite=True, quiet=True)["held_out"] == first["held_out"]


def test_damaged_checkpoints(corpus_file, tmp_path):
    out, recipe = tmp_path / "run", recipe_of(corpus_file, tmp_path / "run")
    first = pretrain(recipe, quiet=True)
    (out / "metrics.json").unlink()
    with (out / "checkpoint-4" / "optimizer.pt").open("r+b") as stream:
        stream.seek(100)
        stream.write(b"\xff\x00\xff")
    assert pretrain(recipe, resume=True, quiet=True)["held_out"] == first["held_out"]
    assert (out / "damaged-checkpoint-4").is_dir()
    (out / "metrics.json").unlink()
    for name in ("checkpoint-2", "checkpoint-4"):
        (out / name / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole.*model.safetensors is missing"):
        pretrain(recipe, resume=True, quiet=True)


def test_evaluate_repeats_the_final_number(corpus_file, tmp_path):
    from lmssl.scoring import evaluate

    metrics = pretrain(recipe_of(corpus_file, tmp_path / "run"), quiet=True)
    again = evaluate(str(tmp_path / "run"), ["trainer.per_device_eval_batch_size=3"])
    assert again["loss"] == pytest.approx(metrics["held_out"]["loss"], rel=1e-6)
    other = evaluate(str(tmp_path / "run"), [f"data.text={corpus_file}"])
    assert other["loss"] != metrics["held_out"]["loss"]
    saved = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert saved["held_out"] == again, "another text does not take the place of the run's own"
    assert saved["evaluated"] == {f"data.text={corpus_file}": other}
    evaluate(str(tmp_path / "run"), ["data.seq_length=16"])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["held_out"] == again
    with pytest.raises(UserError, match="what this checkpoint was trained on would be measured"):
        evaluate(str(tmp_path / "run"), ["data.held_out=0.5"])


def test_continue_from_a_checkpoint(corpus_file, tmp_path):
    """`from:` alone: the tokenizer comes with it, and the loss goes on from where it was."""
    first = pretrain(recipe_of(corpus_file, tmp_path / "first", max_steps=30, learning_rate=1e-2), quiet=True)
    second = PretrainRecipe.of(
        {
            "data": {"text": str(corpus_file), "seq_length": 32, "held_out": 0.1},
            "model": {"from": str(tmp_path / "first")},
            "objective": {"name": "masked"},
            "trainer": {"output_dir": str(tmp_path / "second"), "max_steps": 1, "learning_rate": 1e-9, "bf16": False},
        }
    )
    assert pretrain(second, quiet=True)["held_out"]["loss"] == pytest.approx(first["held_out"]["loss"], abs=1e-3)


def test_python_api_without_a_recipe(shared_dir, tmp_path):
    """Without `begin_from_text`, a sequence length or an optimizer."""
    tokens = token_set(shared_dir)
    model = lmssl.build_model({"architecture": "bert", **SMALL["bert"]}, tokens.vocab(), MaskedTokens(rate=0.3), seq_length=32, seed=0)
    trainer = lmssl.PretrainTrainer(model, objective=MaskedTokens(rate=0.3), train_dataset=tokens, args=arguments(tmp_path))
    trainer.run()
    assert trainer.metrics()["held_out"]["loss"] > 0
