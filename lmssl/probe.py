"""Choices that are measured once, before step 0: micro-batch and compilation.

They are written into the run's recipe, where a resumed run reads them (`recorded`), so that it goes on as it began. What
a recipe says itself is never measured.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel, TrainingArguments

from lmssl import activations, config, forward, machine, ranks
from lmssl.arguments import FEWER_ROWS
from lmssl.data.stream import Collator, Stream
from lmssl.errors import Stopped, fitting, out_of_memory
from lmssl.objectives.cross_entropy import token_loss

log = logging.getLogger("lmssl")

WORTH = 300.0
"""Seconds of training from which on compilation, a minute at most and a third of every step, pays."""
BETTER = 0.9
"""Of the time of larger micro-batches that a smaller one must need less than: fewer parts are preferred, and on a busy machine timings differ by as much."""
SMALLEST = 1024
"""Tokens of a micro-batch below which matrix products are too small to be worth a try, unless nothing larger fits."""


def recorded(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a run chose of what the trainer section leaves open; nothing where its recipe cannot be read, and no split of another batch.

    Args:
        folder: of the run.
        values: the trainer section as it is now, of `arguments.resolve`.
    """
    then = config.of_folder(folder).get("trainer")
    if not then:
        return {}
    names = [] if "torch_compile" in values else ["torch_compile"]
    size, parts = "per_device_train_batch_size", "gradient_accumulation_steps"
    if values["batch"] == "auto" and then.get(size, 0) * then.get(parts, 1) == values[size] * values.get(parts, 1):
        names += ["batch", size, parts]
    return {name: then[name] for name in names if name in then}


def choose(values: Mapping[str, Any], args: TrainingArguments, model: PreTrainedModel, stream: Stream, collator: Collator) -> dict[str, Any]:
    """The trainer section with everything decided, the same on every rank.

    Args:
        values: of `arguments.with_steps`.
        args: built from it.
        model: not moved to its device yet; it is as it was afterwards.
    """
    done = dict(values)
    if done["batch"] == "given" and "torch_compile" in done:
        return done
    forward.check_isolated(forward.prepare(model), stream.vocab, stream.row_length)  # what is timed takes a mask
    parts = done.get("gradient_accumulation_steps", 1)
    rows = done["per_device_train_batch_size"] * parts
    seconds: dict[int, float] = {}
    if done["batch"] == "auto":
        best, seconds = fastest(args, model, stream, collator, rows)
        done["per_device_train_batch_size"] = min(gather_object([best]))  # of the ranks' GPUs one may have less room
        done["gradient_accumulation_steps"] = rows // done["per_device_train_batch_size"]
        done["batch"] = "given"
        log.info("trainer.batch: %s", "; ".join(f"{rows // n} x {n} rows {s:.3f} s" for n, s in seconds.items()))
    if "torch_compile" not in done:
        size, parts, steps = done["per_device_train_batch_size"], done.get("gradient_accumulation_steps", 1), done["max_steps"]
        with fitting(f"a pass of {size} rows", f"{FEWER_ROWS}, or trainer.batch=auto"):
            step = seconds.get(size) or step_seconds(args, model, stream, collator, size, parts, 1)
            if step * steps > WORTH and size not in seconds:  # a first pass may only have been slow to start
                step = step_seconds(args, model, stream, collator, size, parts)
        done["torch_compile"] = step * steps > WORTH and machine.compiles(args.device.type)
        log.info("trainer.torch_compile: %s; %d steps would take %.0f s without", str(done["torch_compile"]).lower(), steps, step * steps)
    return ranks.as_the_first(done)


def fastest(args: TrainingArguments, model: PreTrainedModel, stream: Stream, collator: Collator, rows: int) -> tuple[int, dict[int, float]]:
    """The micro-batch, `rows` halved some times, that goes through a step's rows fastest; and the seconds of each that was tried."""
    seconds: dict[int, float] = {}
    size, best = rows, rows
    while True:
        try:
            seconds[size] = step_seconds(args, model, stream, collator, size, rows // size)
        except Exception as error:
            if not out_of_memory(error):
                raise
            model.zero_grad()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        if seconds.get(size, float("inf")) < BETTER * seconds.get(best, float("inf")):
            best = size
        slower = size in seconds and seconds[size] > 1.2 * seconds[best]
        if slower or size == 1 or (seconds and (size % 2 or size // 2 * stream.row_length < SMALLEST)):
            break
        size = next(n for n in range(size // 2, 0, -1) if rows % n == 0)  # half, where it can be halved
    if not seconds:
        raise Stopped(f"trainer.batch: not even one row fits into memory (of {rows}); take a smaller model or shorter rows")
    return best, seconds


def step_seconds(args: TrainingArguments, model: PreTrainedModel, stream: Stream, collator: Collator, size: int, parts: int = 1, repeats: int = 3) -> float:
    """Seconds of the passes of a step of so many micro-batches of `size` rows, not compiled, as the trainer makes them."""
    machine.keep_memory(args.device.type)  # as the trainer will
    activations.quicker(model, args.device.type)
    batch = {k: v.to(args.device) for k, v in collator([stream[i] for i in range(min(size, len(stream)))]).items()}
    prepared = forward.prepare(model.to(args.device), collator.most_documents is not None)
    call = partial(forward.output_for_loss, prepared, forward.head_for_loss(prepared, stream.vocab, args))
    with machine.autocast(args), forward.as_trained(prepared, args):
        return parts * machine.pass_seconds(prepared, batch, token_loss, call, repeats)
