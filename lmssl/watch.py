"""What watches a run: its clock, its progress, and the guard that stops it before a bad update and at a signal."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import statistics
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lmssl import machine
from lmssl.data.stream import mix
from lmssl.errors import Diverged
from lmssl.optimizers import leaves_out

if TYPE_CHECKING:
    from lmssl.trainer import ExactTrainer

log = logging.getLogger("lmssl")

SPIKE = 20.0
"""A gradient norm this many times the median of the last 64 steps is a spike; 16 steps must have been seen."""


class Clock:
    """Training wall-clock: runs between start and stop, but not inside `paused`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.training, self.other = 0.0, {"evaluation": 0.0, "saving": 0.0, "first_step": 0.0}
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            self.training += time.perf_counter() - self._since
        self._since = None

    @property
    def seconds(self) -> float:
        return self.training + (time.perf_counter() - self._since if self._since is not None else 0.0)

    @contextlib.contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Time spent inside counts as `kind`, not as training; what a GPU has still to do of the training counts as training."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        running, begin = self._since is not None, time.perf_counter()
        self.stop()
        try:
            yield
        finally:
            self.other[kind] += time.perf_counter() - begin
            if running:
                self.start()


class Guard(TrainerCallback):
    """Seeds each step's dropout, stops at what is not finite, and turns signals into a save at the step's end.

    On a GPU nobody waits for a step's numbers: its own update is left out there where they are not finite, and they are looked at when
    the next step's are on their way, before a checkpoint and at the end.
    """

    def __init__(self, trainer: ExactTrainer):
        self.trainer, self.losses = trainer, list[Tensor]()
        self.signum, self.acted = 0, False
        """The signal that came, and whether a step has ended with it."""
        self._underway: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self.norms: deque[float] = deque(maxlen=64)
        """Gradient norms of the last steps, before clipping."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # a checkpoint's state brings the intervals of its own run

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.losses.clear()
        machine.draw_from(mix(args.seed, state.global_step, args.process_index) >> 1, args.device)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The norm before clipping: after it, one that overflowed has become zeros.
        norm = torch.as_tensor(self.trainer.gradient_norm, dtype=torch.float32)
        values = torch.stack([norm, *(loss.float().reshape(()).to(norm.device) for loss in self.losses)])
        self.look()
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        # Under fp16 a gradient that overflows is how the loss scale finds its size: its scaler skips the update by itself.
        scaled = self.trainer.accelerator.scaler is not None
        if self.trainer.on_spike == "stop" or scaled or args.world_size > 1 or not self._later(values) or not leaves_out(optimizer):
            self._look_at(values.cpu(), state.global_step, scaled)
            return
        optimizer.found_inf = (~torch.isfinite(values)).any().float()  # type: ignore[attr-defined]
        there = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        there.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event() if values.is_cuda else None
        if arrived is not None:
            arrived.record()
        self._underway = state.global_step, there, arrived

    @staticmethod
    def _later(values: Tensor) -> bool:
        return values.is_cuda

    def look(self) -> None:
        """At the numbers of the last step, where they are still on their way from the GPU."""
        if self._underway is not None:
            (step, values, arrived), self._underway = self._underway, None
            if arrived is not None:
                arrived.synchronize()
            self._look_at(values, step, False)

    def _look_at(self, values: Tensor, step: int, scaled: bool) -> None:
        """At the gradient norm and the losses of a step: stop before its update, or warn."""
        bad = (~torch.isfinite(values[1:] if scaled else values)).any().double().reshape(1)
        if self.trainer.summed(bad).item():
            what = "the loss" if not torch.isfinite(values[1:]).all() else "the gradient"
            raise self.trainer.stopped(f"{what} of {self._step(step)} is not finite; no update was made; {self._replay(step)}", Diverged)
        size = float(values[0])
        if not math.isfinite(size):
            return
        usual = statistics.median(self.norms) if len(self.norms) >= 16 else math.inf
        if size > 0:  # 0 of a step without a label
            self.norms.append(size)
        if size > SPIKE * usual and self.trainer.on_spike != "ignore":
            what = f"the gradient of {self._step(step)} is {size / usual:.0f} times the usual ({size:.3g} against {usual:.3g})"
            if self.trainer.on_spike == "stop":
                raise self.trainer.stopped(f"{what}; no update was made; {self._replay(step)}", Diverged)
            log.warning("%s; %s", what, self._replay(step))

    def _step(self, step: int) -> str:
        items = self.trainer.items(step)
        return f"step {step + 1} (items {items.start} to {items.stop - 1} of the stream)"

    def _replay(self, step: int) -> str:
        if where := getattr(self.trainer.train_dataset, "where", None):
            names = list(dict.fromkeys(where(i) for i in self.trainer.items(step)))
            return f"its examples: {', '.join(names[:16])}" + (f" and {len(names) - 16} more" if len(names) > 16 else "")
        batch, items = self.trainer.global_batch, self.trainer.items(step)
        show = f"its rows: lmssl show {Path(self.trainer.args.output_dir) / 'recipe.yaml'}"
        if items.start != step * batch:  # the batch was another before
            return f"{show} --at-item {items.start} --rows {batch}"
        return f"{show} --at-step {step + 1}" + (f" --batch {batch}" if self.trainer.args.world_size > 1 else "")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        signum = self.signum  # read once: a signal that comes while the ranks compare is seen by all of them a step later
        if args.world_size > 1 and self.trainer.summed(torch.tensor([float(signum)], dtype=torch.float64)).item():
            signum = signum or signal.SIGTERM
        if signum:
            self.signum, self.acted, control.should_save, control.should_training_stop = signum, True, True, True

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT set a flag; a second one of the same kind ends the process the ordinary way."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        came: dict[int, float] = {}
        # torchrun passes on to its ranks what a scheduler had sent to each process already.
        echo = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ or self.trainer.args.world_size > 1 else 0.0

        def remember(signum: int, frame: Any) -> None:
            if signum not in came:
                self.signum, came[signum] = signum, time.monotonic()
                log.warning("%s: saving at the end of this step", signal.Signals(signum).name)
            elif time.monotonic() - came[signum] >= echo:
                signal.signal(signum, before[signal.Signals(signum)])
                signal.raise_signal(signum)

        before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for s in before:
            signal.signal(s, remember)
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def spare_worker(then: Callable[[int], None] | None, trains: int, worker: int) -> None:
    """In a data worker, as `worker_init_fn`: a signal that a whole group of processes gets (Ctrl-C, a scheduler's SIGTERM) is the training
    process's to act on, which needs its workers until the end of the step. What the training process itself sends still ends them.

    Args:
        then: what else is to be called.
        trains: the training process's id; the worker's parent may be a fork server.
        worker: its number.
    """

    def end_with_training() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trains:
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot say who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_training, daemon=True).start()
    if then is not None:
        then(worker)


class Progress(TrainerCallback):
    """Loss, tokens a second and time left; a bar on a terminal, lines elsewhere. Keeps the curve for the report."""

    def __init__(self, trainer: ExactTrainer):
        self.trainer, self.begun, self.compiling = trainer, (0.0, 0, 0), True
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        from tqdm import tqdm

        self.trainer.measure()
        self.begun = (self.trainer.clock.seconds, self.trainer.tokens_seen, state.global_step)
        self.trainer.clock.start()
        if state.is_world_process_zero and not self.trainer.quiet:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, disable=None, unit="step", leave=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        clock = self.trainer.clock
        if args.torch_compile and self.compiling:
            self.compiling = False
            # The first step compiles; its time stands beside the training time, not in it.
            spent = clock.seconds - self.begun[0]
            clock.training -= spent
            clock.other["first_step"] += spent
            tokens, steps = self.trainer.untimed
            self.trainer.untimed = [tokens + (self.trainer.tokens_seen - self.begun[1]) * args.world_size, steps + 1]
            self.begun = (clock.seconds, self.trainer.tokens_seen, state.global_step)
        if self.bar:
            self.bar.update(1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs, trainer = logs or {}, self.trainer
        seconds, tokens = trainer.clock.seconds - self.begun[0], trainer.tokens_seen - self.begun[1]
        speed = tokens * args.world_size / seconds if seconds > 0 else 0.0
        if "loss" in logs:
            loss, steps = float(logs["loss"]), state.global_step - self.begun[2]
            bits, share = trainer.bits_per_byte(loss), trainer.peak_share(steps, seconds)
            # Behind a step that compiled there is no speed yet.
            point = {"step": state.global_step, "loss": loss} | ({"tokens_per_second": round(speed, 1)} if steps else {})
            trainer.curve.append(point | ({} if bits is None else {"bits_per_byte": round(bits, 4)}))
            said = [f"loss {loss:.4f}", *([f"{bits:.4f} bits per byte"] if bits is not None else []), f"lr {logs.get('learning_rate', 0):.2e}"]
            if steps:
                left = (state.max_steps - state.global_step) * seconds / steps
                said += [f"{speed:,.0f} tokens/s", *([f"{share:.0%} of the matmul peak"] if share is not None else []), f"{_minutes(left)} left"]
            self._say(state, "  ".join(said))
        elif "eval_loss" in logs:
            bits = logs.get("eval_bits_per_byte")
            trainer.curve.append({"step": state.global_step, "held_out_loss": logs["eval_loss"]} | ({} if bits is None else {"bits_per_byte": bits}))
            self._say(state, f"held-out loss {logs['eval_loss']:.4f}" + ("" if bits is None else f"  {bits:.4f} bits per byte"))

    def _say(self, state: TrainerState, text: str) -> None:
        if not state.is_world_process_zero or self.trainer.quiet:
            return
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(text)
        else:
            log.info("step %d/%d  %s", state.global_step, state.max_steps, text)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.clock.stop()
        if self.bar:
            self.bar.close()


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


def of_the_data(error: Exception) -> str:
    """What went wrong in the stream or one of its workers: what, and where in the code."""
    if isinstance(error, ConnectionError | EOFError) and any("multiprocessing" in f.filename for f in traceback.extract_tb(error.__traceback__)):
        # torch names a dead worker unless it is so freshly dead that it still counts as alive.
        return f"a data worker exited unexpectedly or was killed by signal while it handed a batch over ({type(error).__name__})"
    lines = [line.strip() for line in str(error).strip().splitlines()]
    inside = [line for line in lines if line.startswith("File ")]
    if not inside:
        at = traceback.extract_tb(error.__traceback__)[-1]
        inside = [f'File "{at.filename}", line {at.lineno}']
    text = lines[-1] if lines else type(error).__name__
    if "timed out" in text:
        return f"{text}: a data worker hangs (trainer.worker_timeout sets the seconds to wait)"
    if "exited unexpectedly" in text or "killed by signal" in text:
        return text
    return f"{text if type(error).__name__ in text else f'{type(error).__name__}: {text}'} ({inside[-1].removesuffix(', in fetch')})"
