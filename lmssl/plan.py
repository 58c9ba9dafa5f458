"""What a run will cost before it starts, and what some minutes of this machine buy.

`cost` runs a few steps of a recipe, for real, and leaves nothing behind. `plan` measures a ladder of sizes of the
recipe's own architecture and takes the one whose loss, by the scaling law of Hoffmann et al. 2022 (2203.15556),
is lowest at the tokens that the minutes buy at its measured speed; repeated text counts for less (Muennighoff et al.
2023, 2305.16264). The batch follows the law of DeepSeek LLM (2401.02954).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from lmssl import arguments, forward, machine, models, output, packing, probe, runs
from lmssl.data.stream import Stream, count_tokens
from lmssl.errors import Interrupted, Stopped, UserError, out_of_memory
from lmssl.objectives.cross_entropy import token_loss
from lmssl.optimizers import outer_parameters
from lmssl.recipe import DataSection, FinetuneRecipe, PretrainRecipe, prepared

WARM, TIMED = 2, 5
"""Steps that are not counted, and steps that are."""

EXPONENT_N, EXPONENT_D, FACTOR_N, FACTOR_D, FLOOR = 0.34, 0.28, 406.4, 410.7, 1.69
"""Loss = FLOOR + FACTOR_N / N^EXPONENT_N + FACTOR_D / D^EXPONENT_D (2203.15556, equation 10): its exponents and factors
decide the size; the loss itself is that of its authors' text and tokenizer."""
REPEATS = 15.4
"""Epochs after which further repetition is worth 1/e of new text (2305.16264, section 5)."""

WIDTHS = ("hidden_size", "d_model", "n_embd", "intermediate_size", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "hidden_dim", "moe_intermediate_size")
HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
STEPS_OF_THE_LADDER = tuple(2 ** (k / 2) for k in range(-2, 9))
"""Widths tried, as multiples of the recipe's; depth goes with the root of it."""


class _Steps(TrainerCallback):
    """When each step began and ended; ends the run after the last that is timed."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.ended.append(time.perf_counter())
        control.should_training_stop |= len(self.ended) == WARM + TIMED


@dataclass(frozen=True)
class Cost:
    """What a pretraining run takes, measured on a few of its steps.

    Attributes:
        parameters: of the model, tied ones once.
        steps: of the run.
        tokens: input tokens of the whole run.
        epochs: how often it reads its text.
        step_seconds: median of the timed steps.
        first_seconds: of the first step, compilation included.
        peak_share: of the machine's matmul peak.
        memory: bytes, the largest so far of the process or of the accelerator.
        text: the data in words.
        save_steps: steps from one checkpoint to the next; 0: none is saved.
    """

    parameters: int
    steps: int
    tokens: int
    epochs: float
    step_seconds: float
    first_seconds: float
    peak_share: float | None
    memory: int
    text: str
    save_steps: int = 0

    @property
    def seconds(self) -> float:
        """Training wall-clock of the whole run, its first step included."""
        return self.first_seconds + self.steps * self.step_seconds

    def lines(self) -> list[str]:
        """For a terminal."""
        share = "" if self.peak_share is None else f", {self.peak_share:.0%} of the matmul peak"
        speed = self.tokens / self.steps / self.step_seconds
        return [
            f"text     {self.text}",
            f"model    {self.parameters:,} parameters",
            f"step     {self.step_seconds:.3f} s, {speed:,.0f} tokens/s{share} (median of {TIMED}); the first one {self.first_seconds:.1f} s",
            f"memory   {self.memory / 2**30:.2f} GiB so far",
            f"run      {self.steps:,} steps, {self.tokens:,} tokens, {self.epochs:.2f} epochs: about {duration(self.seconds)} without evaluation and saving",
            f"saves    every {self.save_steps:,} steps, about {duration(self.save_steps * self.step_seconds)} apart" if self.save_steps else "saves    none on the way",
        ]


@dataclass(frozen=True)
class CurveCost:
    """What a label curve takes, measured on a few steps of its largest run and a few test examples.

    Attributes:
        runs: fine-tuning runs, those that choose a learning rate included.
        steps: of all of them.
        step_seconds: median of the timed steps.
        tests: how often the test set is read.
        test_seconds: for the whole test set once.
    """

    runs: int
    steps: int
    step_seconds: float
    tests: int
    test_seconds: float

    @property
    def seconds(self) -> float:
        """Wall-clock of the whole curve."""
        return self.steps * self.step_seconds + self.tests * self.test_seconds

    def lines(self) -> list[str]:
        """For a terminal."""
        return [
            f"step     {self.step_seconds:.3f} s (median of {TIMED})",
            f"test     {self.test_seconds:.1f} s, read {self.tests} times",
            f"curve    {self.runs} runs, {self.steps:,} steps: about {duration(self.seconds)} without loading and saving",
        ]


def duration(seconds: float) -> str:
    """
    >>> duration(42), duration(605), duration(9000)
    ('42 s', '10 min', '2 h 30 min')
    """
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def _thrown_away() -> Iterator[str]:
    """A folder for a run that nobody keeps; a signal ends it without a word about what it saved."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield folder
        except Interrupted as error:
            name = signal.Signals(error.exit_code - 128).name
            raise Interrupted(f"{name}: the dry run was stopped; nothing of it is kept", error.exit_code - 128) from None


def cost(wanted: PretrainRecipe) -> Cost:
    """Run a few steps of a recipe in a folder that is thrown away.

    Raises:
        UserError: what `pretrain` would refuse.
    """
    objective, tokenizer = runs.check(wanted)
    steps = _Steps()
    with _thrown_away() as folder:
        values = arguments.resolve(wanted.trainer, arguments.pretrain_defaults(wanted.continued is not None))
        saves = values.get("save_strategy") != "no"
        values |= {"output_dir": folder, "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "report_to": "none", "eval_on_start": False}
        trainer, values = runs.assemble(wanted, objective, tokenizer, values, quiet=False)
        trainer.add_callback(steps)
        trainer.run()
    done, timed = len(steps.ended), [b - a for a, b in zip(steps.begun, steps.ended, strict=True)]
    step = statistics.median(timed[min(WARM, done - 1) :])
    memory = torch.accelerator.max_memory_allocated() if trainer.args.device.type == "cuda" else machine.most_memory()
    total = trainer.args.max_steps
    rows = trainer.train_dataset.rows
    return Cost(
        parameters=models.parameters(trainer.model),
        steps=total,
        tokens=round(trainer.tokens_seen * trainer.args.world_size / done * total),
        epochs=total * trainer.global_batch / rows,
        step_seconds=step,
        first_seconds=timed[0],
        peak_share=trainer.peak_share(1, step),
        memory=memory,
        text=runs.data_in_words(trainer.train_dataset.tokens, rows),
        save_steps=int(values["save_steps"]) if saves else 0,
    )


def curve_cost(wanted: FinetuneRecipe) -> CurveCost:
    """Run a few steps and a few tests of a label curve in a folder that is thrown away.

    Raises:
        UserError: what `finetune` would refuse.
    """
    with _thrown_away() as folder:
        values = arguments.resolve(wanted.trainer, arguments.finetune_defaults(), arguments.OWNED_BY_TASKS)
        curve = runs.curve_of(wanted, values | {"output_dir": folder, "save_strategy": "no"}, quiet=True)
        few = curve.test[:64]
        # A twin from scratch trains everything, whatever the method.
        watches = {init: _Steps() for init in (("scratch", "pretrained") if curve.task.method != "full" else ("pretrained",))}
        for init, watch in watches.items():
            model, trainer = curve.sample(watch, init)
        begun = time.perf_counter()
        with trainer.compute_loss_context_manager():
            curve.task.evaluate(model, curve.backbone, few, curve.args.per_device_eval_batch_size)
        test_seconds = (time.perf_counter() - begun) / len(few) * len(curve.test)
    todo = curve.todo()
    tuned = {(run.init, run.labels): run for run in todo} if curve.task.learning_rates else {}
    steps = sum(map(curve.steps, todo)) + len(curve.task.learning_rates) * sum(map(curve.steps, tuned.values()))
    timed = [[b - a for a, b in zip(watch.begun, watch.ended, strict=True)] for watch in watches.values()]
    step = statistics.mean(statistics.median(some[min(WARM, len(some) - 1) :]) for some in timed)
    count = len(todo) + len(curve.task.learning_rates) * len(tuned)
    return CurveCost(count, steps, step, len(todo), test_seconds)


# --- plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """One size of the ladder.

    Attributes:
        model: the recipe section of this size.
        inner: parameters outside the embeddings and the vocabulary projection.
        tokens_per_second: forward and backward, measured.
        peak_share: of the machine's matmul peak.
        tokens: that the minutes buy.
        epochs: of the text.
        loss: by the scaling law.
    """

    model: dict[str, Any]
    inner: int
    tokens_per_second: float
    peak_share: float
    tokens: float
    epochs: float
    loss: float


def expected_loss(inner: float, tokens: float, unique: float) -> float:
    """The scaling law at N parameters and D tokens, of which `unique` are different.

    >>> round(expected_loss(70e9, 1.4e12, 1.4e12), 2)  # Chinchilla
    1.94
    """
    extra = max(tokens / unique - 1, 0.0)
    worth = min(tokens, unique) + unique * REPEATS * (1 - math.exp(-extra / REPEATS))
    return FLOOR + FACTOR_N / inner**EXPONENT_N + FACTOR_D / worth**EXPONENT_D


def batch_tokens(flops: float) -> float:
    """Tokens of a batch for a compute budget in FLOPs: 0.292 C^0.3271 (2401.02954, equation 1)."""
    return 0.292 * flops**0.3271


def scaled(section: dict[str, Any], config: PretrainedConfig, factor: float) -> dict[str, Any]:
    """A model section `factor` times as wide and its root times as deep, heads of the same size, widths multiples of 32."""
    known = {n: getattr(config, n) for n in (*WIDTHS, *HEADS, *DEPTHS) if isinstance(getattr(config, n, None), int) and n in models.known_keys(type(config))}
    heads = next((known[n] for n in HEADS if n in known), 1)
    # Grouped heads stay in whole groups.
    group = max((known[n] for n in HEADS if n in known and heads % known[n] == 0 and known[n] < heads), default=1)
    group = heads // group if group > 1 else 1
    made = max(1, round(heads * factor / group)) * group
    new: dict[str, Any] = {}
    for name, value in known.items():
        if name in DEPTHS:
            new[name] = max(1, round(value * math.sqrt(factor)))
        elif name in HEADS:
            new[name] = 1 if value == 1 < heads else max(1, round(value * made / heads))  # one head of keys for all stays one
        elif name in WIDTHS[:3]:
            new[name] = value * made // heads
        else:
            new[name] = max(32, round(value * made / heads / 32) * 32)
    return section | new


def inner_parameters(model: PreTrainedModel) -> int:
    """Parameters outside the embeddings and the vocabulary projection: the N of scaling laws."""
    outer = outer_parameters(model)
    return sum(p.numel() for p in model.parameters() if id(p) not in outer)


def ladder(wanted: PretrainRecipe, minutes: float) -> Iterator[Rung]:
    """Every size, measured, smallest first; ends two sizes behind the best, or where memory ends."""
    objective, tokenizer = runs.check(wanted)
    if wanted.continued:
        raise UserError("model.from: a checkpoint has its size already; plan sizes a new model (model.architecture)")
    values = arguments.resolve(wanted.trainer, arguments.pretrain_defaults())
    args, config = arguments.build(values), models.config_of(wanted.model)
    token_set = prepared(wanted.data, tokenizer)
    length = wanted.data.seq_length
    stream = Stream(token_set, objective, length, args.seed, 10**9)
    collator = packing.collator(stream, length, models.family_of(config), args.device)
    rows = min(args.per_device_train_batch_size, 16)
    batch = {k: v.to(args.device) for k, v in collator([stream[i] for i in range(rows)]).items()}
    peak = machine.matmul_peak(str(args.device), machine.precision(args), torch.get_num_threads())
    unique, seen = stream.rows * int(count_tokens(batch)) / rows, list[Rung]()
    for factor in STEPS_OF_THE_LADDER:
        section = scaled(wanted.model, config, factor)
        if seen and section == seen[-1].model:  # of few heads or layers
            continue
        model = forward.prepare(models.build(section, stream.vocab, objective, length, args.seed), collator.most_documents is not None)
        if not seen:
            forward.check_isolated(model, stream.vocab, length)
        inner = inner_parameters(model)
        try:
            seconds = probe.step_seconds(args, model, stream, collator, rows)
            with machine.autocast(args):
                flops = machine.step_flops(model, batch, token_loss)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if not seen:
                raise UserError(f"trainer.per_device_train_batch_size: not even the smallest model fits into memory with {rows} rows; take fewer or shorter rows") from None
            return
        speed = int(count_tokens(batch)) / seconds
        tokens = speed * minutes * 60
        seen.append(Rung(section, inner, speed, flops / seconds / peak, tokens, tokens / unique, expected_loss(inner, tokens, unique)))
        yield seen[-1]
        if len(seen) > 2 and min(seen, key=lambda r: r.loss) is seen[-3]:
            return


def plan(wanted: PretrainRecipe, minutes: float) -> tuple[list[Rung], Rung, dict[str, dict[str, Any]], Cost]:
    """The ladder, the best of it, the recipe that uses the minutes, and what that recipe costs."""
    rungs = list(ladder(wanted, minutes))
    best = min(rungs, key=lambda r: r.loss)
    length = wanted.data.seq_length
    budget = 6 * best.inner * best.tokens
    rows = max(8, 2 ** round(math.log2(batch_tokens(budget) / length)))
    micro = min(rows, int(wanted.trainer.get("per_device_train_batch_size") or 64))  # the ladder has refused what is no number
    rows -= rows % micro
    trainer = {k: v for k, v in wanted.trainer.items() if k not in ("max_steps", "num_train_epochs", "gradient_accumulation_steps")}
    # As many steps as the run will have, near enough, since they decide whether it compiles; `cost` takes the first few.
    expected = max(WARM + TIMED, round(best.tokens / rows / length))
    while True:
        trainer |= {"per_device_train_batch_size": micro} | ({"gradient_accumulation_steps": rows // micro} if rows > micro else {})
        try:
            measured = cost(dataclasses.replace(wanted, model=best.model, trainer=trainer | {"max_steps": expected}))
            break
        except Stopped as error:
            if micro % 2 or error.__cause__ is None or not out_of_memory(error.__cause__):
                raise
            micro //= 2
    steps = max(1, int((minutes * 60 - measured.first_seconds) / measured.step_seconds))
    trainer["max_steps"] = steps
    per_step = measured.tokens / measured.steps
    saves = int(arguments.with_steps(trainer, 1)["save_steps"]) if measured.save_steps else 0
    measured = dataclasses.replace(measured, steps=steps, tokens=round(per_step * steps), epochs=measured.epochs / measured.steps * steps, save_steps=saves)
    sections = {
        "data": {k: v for k, v in dataclasses.asdict(wanted.data).items() if v != getattr(DataSection, k, None)},
        "model": best.model,
        "objective": wanted.objective,
        "trainer": trainer,
    }
    return rungs, best, output.plain(sections), measured


def table(rungs: list[Rung], best: Rung) -> str:
    """The ladder for a terminal."""
    rows = [f"  {'parameters':>12} {'tokens/s':>10} {'of peak':>8} {'tokens':>13} {'epochs':>7} {'loss*':>7}"]
    for rung in rungs:
        mark = ">" if rung is best else " "
        rows.append(f"{mark} {rung.inner:>12,} {rung.tokens_per_second:>10,.0f} {rung.peak_share:>8.0%} {rung.tokens:>13,.0f} {rung.epochs:>7.2f} {rung.loss:>7.3f}")
    if best in (rungs[0], rungs[-1]):
        rows.append(f"the {'smallest' if best is rungs[0] else 'largest'} size that was tried; a recipe of another may do better")
    return "\n".join([*rows, "parameters outside the embeddings; * by the scaling law, comparable within this table alone"])
