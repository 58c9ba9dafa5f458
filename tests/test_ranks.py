"""Several processes on a cluster, as far as one process can tell; two of them meet in tests/one_step.py."""

import errno
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from filelock import FileLock

import lmssl
from lmssl import arguments, checkpoints, folders, pretraining
from lmssl.cli import run
from lmssl.data import preparation
from tests import helpers


def test_prepared_text_is_read_without_waiting(corpus_file):
    """By many processes, each of which reads all of it: one after another they would outlast what the others wait."""
    made = lmssl.prepare(str(corpus_file), helpers.tokenizer(), 0.1, quiet=True)
    found = []
    with FileLock(f"{made.folder}.lock"):
        thread = threading.Thread(target=lambda: found.append(lmssl.prepare(str(corpus_file), helpers.tokenizer(), 0.1, quiet=True).folder), daemon=True)
        thread.start()
        thread.join(30)
    assert found == [made.folder]


def test_one_prepares_and_the_others_take_it(corpus_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LMSSL_CACHE", str(tmp_path / "cache"))
    written, write = [], preparation.write

    def slow(*args):
        written.append(threading.get_ident())
        time.sleep(0.2)
        return write(*args)

    monkeypatch.setattr(preparation, "write", slow)
    tokenizer = helpers.tokenizer()
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: lmssl.prepare(str(corpus_file), tokenizer, 0.1, quiet=True).folder, range(4)))
    assert (len(set(made)), len(written)) == (1, 1)


def test_tasks_of_slurm_that_do_not_know_of_each_other(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for world, here, told in (("4", "4", 1), ("8", "4", 0)):
        caplog.clear()
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        with folders.alone(tmp_path):
            assert caplog.text.count("SLURM started 2 tasks, each of which is a run of its own") == told


def test_a_launcher_is_told_what_was_wrong(tmp_path, monkeypatch, capsys):
    """Of another process than the first of its machine, which prints nothing."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert run(["pretrain", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such recipe" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert not capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    assert run(["pretrain", str(tmp_path / "none.yaml")]) == 2


def test_a_folder_that_its_file_system_does_not_sync(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")

    def refused(handle):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refused)
    checkpoints.sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        checkpoints.sync(tmp_path / "file")


def test_workers_are_of_the_cores_that_a_job_has(monkeypatch):
    for cores, here, workers in ((16, 1, 4), (16, 4, 2), (4, 4, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        assert arguments.workers() == workers


def test_threads_decide_the_bits_of_a_cpu_alone(tmp_path, monkeypatch):
    args = helpers.arguments(tmp_path)
    assert pretraining._identity(args, "muon")["threads"] == torch.get_num_threads()
    monkeypatch.setattr(transformers.TrainingArguments, "device", torch.device("cuda"))
    assert "threads" not in pretraining._identity(args, "muon")
