"""What the drills share: children forked from a parent that has the stack imported, a tiny run, and the JSON line.

The parent imports torch and transformers once and computes nothing, so a fork of it is a fresh process that starts in
milliseconds; what runs in it is lmssl's own command line or trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.helpers import SMALL, sentences

ROOT = Path(__file__).parent.parent.parent
KINDS = {"next_token": "gpt2", "masked": "bert", "span_corruption": "t5"}


class Tally:
    """What a drill tried, and what it missed."""

    def __init__(self) -> None:
        self.tried, self.failed, self.misses, self.more = 0, 0, list[str](), dict[str, Any]()

    def __call__(self, held: bool, miss: str = "") -> bool:
        self.tried += 1
        if not held:
            self.failed += 1
            self.misses.append(miss[:300])
        return held


Work = Callable[[Tally, int, random.Random, Path], None]
"""(tally, how many, the draw, a folder)"""


@dataclass(frozen=True)
class Drill:
    """One row of docs/reliability.md.

    Attributes:
        name: "R1 resume".
        ours, stock: the drill on lmssl, and on the stock Trainer, reader or collator.
        counts: how many cases, reduced and full.
        peer_counts: the same for the stock twin; unset: `counts`.
        slice: how many in the ordinary tests.
    """

    name: str
    ours: Work
    stock: Work
    counts: tuple[int, int]
    peer_counts: tuple[int, int] | None = None
    slice: int = 1

    def main(self) -> None:
        """The drill from the command line."""
        parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
        parser.add_argument("--count", type=int, help="cases to try")
        parser.add_argument("--full", action="store_true", help=f"{self.counts[1]} cases instead of {self.counts[0]}")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--peer", choices=["stock"], help="the same drill on the stock stack")
        options = parser.parse_args()
        warm()
        line = self.run(options.count or self.count(options.full, options.peer), options.seed, options.peer)
        print(json.dumps(line), flush=True)
        sys.exit(int(not line["held"]))

    def count(self, full: bool, peer: str | None) -> int:
        return ((self.peer_counts if peer else None) or self.counts)[full]

    def run(self, count: int, seed: int = 0, peer: str | None = None) -> dict[str, Any]:
        """Run it, in a process that is `warm`; the JSON line."""
        tally, begun = Tally(), time.time()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["LMSSL_CACHE"] = str(folder / "cache")
            (folder / "text.txt").write_text("\n".join(sentences(600)))
            (folder / "little.txt").write_text("\n".join(sentences(24)))
            (self.stock if peer else self.ours)(tally, count, random.Random(seed), folder)
        line = {"drill": self.name, "held": not tally.failed and tally.tried > 0, "tried": tally.tried, "failed": tally.failed, "seconds": round(time.time() - begun, 1)}
        return line | ({"peer": peer} if peer else {}) | tally.more | ({"misses": tally.misses[:5]} if tally.misses else {})


def warm() -> None:
    """Import what children need; start no thread and compute nothing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in ("torch._dynamo", "datasets", "lmssl.runs", "lmssl.pretraining", *(f"transformers.models.{name}.modeling_{name}" for name in KINDS.values())):
        import_module(name)


class Child:
    """A forked process that does `work` and exits with what it returns; its output goes to a file."""

    number = 0

    def __init__(self, work: Callable[[], Any], folder: Path, environment: dict[str, str] | None = None):
        Child.number += 1
        self.log, self.code = folder / f"child-{Child.number}.log", None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code: Any = 1
        try:
            handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.environ |= environment or {}
            code = work() or 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def kill(self, signum: int = signal.SIGKILL) -> None:
        os.kill(self.pid, signum)

    def ended(self) -> bool:
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, timeout: float = 120) -> int:
        """The exit status, minus the signal that ended it; killed, and -9, after the timeout."""
        deadline = time.time() + timeout
        while not self.ended():
            if time.time() > deadline:
                self.kill()
            time.sleep(0.01)
        return self.code

    def until(self, text: str, timeout: float = 60) -> bool:
        """Wait until the output holds `text`; False where the process ended before."""
        deadline = time.time() + timeout
        while text not in self.text():
            if self.ended() or time.time() > deadline:
                return text in self.text()
            time.sleep(0.004)  # a parent that polls harder takes a core from the child's threads
        return True


def answer(work: Callable[[], Any], folder: Path, timeout: float = 600, environment: dict[str, str] | None = None) -> Any:
    """What `work` returns in a forked process (as JSON); raises with its output where it fails."""
    path = folder / f"answer-{Child.number + 1}.json"

    def run() -> None:
        path.write_text(json.dumps(work()))

    child = Child(run, folder, environment)
    if child.wait(timeout) or not path.exists():
        raise RuntimeError(f"exit {child.code}: {child.text()[-3000:]}")
    return json.loads(path.read_text())


def ranks(count: int, work: Callable[[], Any], folder: Path, timeout: float = 120, environment: dict[str, str] | None = None) -> list[Any]:
    """What `work` returns on each of `count` processes of one group; the size of the group is asserted."""
    if count == 1:
        return [answer(work, folder, timeout, environment)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children, paths = [], [folder / f"rank-{Child.number}-{rank}.json" for rank in range(count)]
    for rank, path in enumerate(paths):

        def run(path: Path = path) -> None:
            import torch.distributed

            value = work()
            assert torch.distributed.get_world_size() == count
            path.write_text(json.dumps(value))
            torch.distributed.destroy_process_group()

        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children.append(Child(run, folder, (environment or {}) | own))
    for child in children:
        if child.wait(timeout):
            raise RuntimeError(f"exit {child.code}: {child.text()[-3000:]}")
    return [json.loads(path.read_text()) for path in paths]


def recipe(folder: Path, kind: str, out: Path, text: str = "text.txt", **trainer: Any) -> Path:
    """A recipe file of a tiny run with dropout on."""
    keys = ", ".join(f"{k}: {v}" for k, v in SMALL[KINDS[kind]].items())
    values = {"output_dir": out, "max_steps": 40, "save_steps": 7, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "logging_steps": 1, "bf16": "false"}
    path = folder / f"{out.name}.yaml"
    path.write_text(
        f"data: {{text: {folder / text}, tokenizer: {ROOT / 'tokenizer_assets' / 'bpe-8k'}, seq_length: 32, held_out: 0.1}}\n"
        f"model: {{architecture: {KINDS[kind]}, {keys}}}\nobjective: {{name: {kind}}}\n"
        f"trainer: {{{', '.join(f'{k}: {v}' for k, v in (values | trainer).items())}}}\n"
    )
    return path


def command(*words: Any) -> Callable[[], int]:
    """lmssl's command line in this process; returns the exit status."""

    def run() -> int:
        from lmssl import cli

        return cli.run([str(w) for w in words])

    return run


def lmssl(folder: Path, *words: Any) -> None:
    """Run a command of lmssl that must succeed."""
    child = Child(command(*words), folder)
    if child.wait():
        raise RuntimeError(f"lmssl {' '.join(map(str, words))}: exit {child.code}: {child.text()[-2000:]}")


def same(a: Path, b: Path) -> bool:
    """The same final weights, bit for bit."""
    return (a / "model.safetensors").exists() and (b / "model.safetensors").exists() and (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def tokens_of(folder: Path, count: int = 300) -> Any:
    """The token set of the tests, made once by a child."""
    from tests import helpers

    if not (folder / f"tokens-{count}").exists():
        answer(lambda: helpers.token_set(folder, count).documents, folder)
    return helpers.token_set(folder, count)


def trainer(architecture: str, tokens: Any, out: Path, *, optimizer: str = "adamw", length: int = 32, width: dict[str, int] | None = None, **keys: Any) -> Any:
    """A pretraining trainer of the tests' models, dropout on."""
    from lmssl import PretrainTrainer
    from tests import helpers

    own = {k: keys.pop(k) for k in ("on_spike", "worker_timeout") if k in keys}
    model = helpers.small_model(architecture, tokens.vocab(), length, dropout=True, **(width or {}))
    return PretrainTrainer(model, helpers.OBJECTIVE[architecture], tokens, helpers.arguments(out, **keys), length, optimizer, quiet=True, **own)


def stop_at(step: int, save: bool = False) -> Any:
    """A callback that ends a run after a step, as a scheduler would."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= step:
                control.should_training_stop, control.should_save = True, control.should_save or save

    return Stop()


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path
