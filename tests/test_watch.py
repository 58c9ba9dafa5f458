"""Signals, spikes, and what is left out: the guard of a run."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from lmssl.errors import Interrupted, Stopped
from lmssl.optimizers import leaves_out
from tests.helpers import token_set
from tests.test_trainer import At, trainer_of, weights


@pytest.fixture(autouse=True)
def _ctrl_c():
    """What is begun in the background of a shell ignores SIGINT, and hands that down."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("mine", "total", "expected"), [(0, 0.0, 0), (0, 2.0, signal.SIGTERM), (0, 15.0, signal.SIGTERM), (2, 2.0, signal.SIGINT)])
def test_a_signal_to_one_of_many_ranks_stops_them_all(mine, total, expected, shared_dir, tmp_path, monkeypatch):
    trainer = trainer_of("llama", token_set(shared_dir), tmp_path)
    trainer.guard.signum = mine
    monkeypatch.setattr(trainer, "summed", lambda value: torch.tensor([total]))
    ranks = SimpleNamespace(world_size=64)
    trainer.guard.on_step_end(ranks, trainer.state, trainer.control)
    assert trainer.guard.signum == expected
    assert trainer.control.should_save is trainer.control.should_training_stop is bool(expected)


def test_a_second_signal_of_the_same_kind_ends_at_once(shared_dir, tmp_path):
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path, max_steps=6)
    trainer.add_callback(At(2, lambda control: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("on_spike", ["ignore", "warn", "stop"])
def test_a_spike_is_said_or_stops_before_its_update(on_spike, shared_dir, tmp_path, caplog):
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path)
    trainer.create_optimizer()
    trainer.on_spike, trainer.gradient_norm = on_spike, torch.tensor(21.0)
    trainer.guard.norms.extend([1.0] * 16)
    look = lambda: trainer.guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)  # noqa: E731
    if on_spike == "stop":
        with pytest.raises(Stopped, match=r"21 times the usual.*no update was made"):
            look()
    else:
        look()
        assert ("21 times the usual" in caplog.text) == (on_spike == "warn")


def test_of_a_few_steps_nothing_is_usual(shared_dir, tmp_path):
    """A gradient of the warm-up is compared with 16 before it, or with none."""
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path)
    trainer.create_optimizer()
    trainer.on_spike, trainer.gradient_norm = "stop", torch.tensor(21.0)
    trainer.guard.norms.extend([1.0] * 15)
    trainer.guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    with pytest.raises(Stopped, match="times the usual"):
        trainer.guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)


def test_steps_without_a_label_are_no_measure_of_a_gradient(shared_dir, tmp_path):
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path)
    trainer.create_optimizer()
    for norm in [0.0] * 20 + [1.0] * 3 + [0.0]:
        trainer.gradient_norm = torch.tensor(norm)
        trainer.guard.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    assert [*trainer.guard.norms] == [1.0] * 3


def test_a_signal_behind_the_last_step_is_not_said_to_have_saved(shared_dir, tmp_path):
    class End(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)

    trainer = trainer_of("bert", token_set(shared_dir), tmp_path, max_steps=2)
    trainer.add_callback(End())
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_whether_an_optimizer_leaves_a_step_out_is_asked_of_its_groups():
    """A checkpoint brings its own groups, whatever the optimizer was made with."""
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)], fused=True)
    assert leaves_out(optimizer)
    optimizer.param_groups[0]["fused"] = None
    assert not leaves_out(optimizer)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_at_the_step_boundary(signum, shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    trainer = trainer_of("bert", tokens, tmp_path, max_steps=6, save_strategy="steps", save_steps=100)
    trainer.add_callback(At(2, lambda control: os.kill(os.getpid(), signum)))
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught:
        trainer.run()
    assert caught.value.exit_code == 128 + signum
    assert signal.getsignal(signum) == before
    resumed = trainer_of("bert", tokens, tmp_path, max_steps=6, save_strategy="steps", save_steps=100)
    resumed.run(resumed.resume_point())
    whole = trainer_of("bert", tokens, tmp_path / "whole", max_steps=6)
    whole.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values()))


GROUP = """
import multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path
from lmssl.errors import Interrupted
from tests.helpers import token_set
from tests.test_trainer import At, trainer_of

def everybody(control):
    for child in multiprocessing.active_children():
        for name in ("TERM", "INT"):
            subprocess.run(["kill", f"-{name}", str(child.pid)], check=True)  # whose sender is not the parent
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)

folder = Path(sys.argv[1])
trainer = trainer_of("bert", token_set(folder), folder / "run", max_steps=6, dataloader_num_workers=1)
trainer.add_callback(At(2, everybody))
try:
    trainer.run()
except Interrupted as error:
    print(error, "children left:", len(multiprocessing.active_children()))
"""


def test_a_signal_to_the_whole_group_is_acted_on_by_the_training_process(tmp_path):
    """A terminal's Ctrl-C and a scheduler's SIGTERM reach the data workers too, which the step still needs. In a process of its own, which has no workers of other tests."""
    found = subprocess.run([sys.executable, "-c", GROUP, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert f"SIGTERM: saved {tmp_path / 'run' / 'checkpoint-3'}; --resume continues there children left: 0" in found.stdout, found.stderr[-2000:]
    assert (tmp_path / "run" / "checkpoint-3" / "lmssl-manifest.json").is_file()


def test_an_echo_of_a_signal_is_not_a_second_one(shared_dir, tmp_path, monkeypatch):
    """torchrun passes on what the scheduler had sent to each rank already."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    trainer = trainer_of("bert", token_set(shared_dir), tmp_path, max_steps=6)
    trainer.add_callback(At(2, lambda control: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]))
    with pytest.raises(Interrupted, match="SIGTERM: saved"):
        trainer.run()


def test_a_step_that_a_signal_broke_off_is_an_interruption(shared_dir, tmp_path):
    """A scheduler's reaches the compiler too, in the middle of the first step."""

    def broken(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("CppCompileError: C++ compile error")

    trainer = trainer_of("bert", token_set(shared_dir), tmp_path)
    trainer.model.register_forward_pre_hook(broken)
    with pytest.raises(Interrupted, match=r"SIGTERM: step 1 could not be finished: CppCompileError.*; --resume continues from the last checkpoint") as caught:
        trainer.run()
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_every_step_rank_and_seed_draws_its_own_dropout(shared_dir, tmp_path):
    trainer, draws = trainer_of("bert", token_set(shared_dir), tmp_path), set()
    for step, rank, seed in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        trainer.state.global_step = step
        trainer.guard.on_step_begin(SimpleNamespace(seed=seed, process_index=rank, device=torch.device("cpu")), trainer.state, trainer.control)
        draws.add(torch.rand(1).item())
    assert len(draws) == 4
