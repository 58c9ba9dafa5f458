"""Pretraining: the exact trainer with an objective, the stream that it makes, and held-out text to judge by."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from lmssl import arguments, forward, machine, models, output, packing
from lmssl.arguments import FEWER_ROWS
from lmssl.data.stream import Collator, Stream, generator, two_lengths
from lmssl.data.tokens import TokenSet
from lmssl.errors import Diverged, UserError, fitting
from lmssl.evaluation import held_out, held_out_stream
from lmssl.objectives import MEMBERS, fields_of
from lmssl.objectives.base import IGNORE, Family, Objective, beyond, fault
from lmssl.objectives.cross_entropy import token_loss
from lmssl.trainer import ExactTrainer
from lmssl.watch import of_the_data

log = logging.getLogger("lmssl")

LOOK = 4
"""Items that an objective is judged by before the run."""


class PretrainTrainer(ExactTrainer):
    """Pretrain a model with an objective on a token set.

    Args:
        model: a decoder, encoder or encoder-decoder with its language-modelling head.
        objective: e.g. `lmssl.MaskedTokens(rate=0.3)`.
        train_dataset: a `TokenSet`; its held-out documents are the evaluation set.
        args: TrainingArguments; `max_steps` must be set.
        seq_length: tokens the model reads; None takes the positions of the model.
        optimizer: "adamw" or "muon".
        on_spike, worker_timeout: as `ExactTrainer`.

    Raises:
        UserError: a model of a family that the objective cannot train, a tokenizer that lacks what it needs, a
            vocabulary larger than the model's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        train_dataset: TokenSet,
        args: TrainingArguments,
        seq_length: int | None = None,
        optimizer: str = "adamw",
        quiet: bool = False,
        on_spike: str = "warn",
        worker_timeout: float = 300,
    ):
        _check_kinds(model, objective, train_dataset)
        section = output.plain(fields_of(objective))
        family = models.check_family(model.config, objective, section["name"])
        tokenizer = train_dataset.tokenizer
        tokenizer.check(objective, section["name"])
        self.saved_tokenizer = tokenizer.for_prompts() if family == "decoder" else tokenizer
        self.objective = objective
        self.seq_length = length = _checked_length(model, train_dataset, args, seq_length, objective)
        self.start = models.decoder_start(model.config)
        batch = arguments.global_batch(vars(args))
        stream = Stream(train_dataset, objective, length, args.seed, args.max_steps * batch, self.start)
        check_items(stream, family)
        if args.get_warmup_steps(args.max_steps) >= args.max_steps > 1:
            log.warning(
                "trainer.warmup_steps: %g of %d steps, so that the learning rate is never reached; a number below 1 is a share of the steps", args.warmup_steps, args.max_steps
            )
        collator = packing.collator(stream, length, family, args.device, two_lengths(stream, length))
        kernel = collator.most_documents is not None
        if doubt := getattr(objective, "doubt", lambda *_: None)(length, stream.vocab):
            log.warning(doubt)
        rows_of = {} if stream.row_length == length else {"row_length": stream.row_length}
        identity = train_dataset.identity | {"objective": section | rows_of, "batch": batch, "seq_length": length} | _identity(args, optimizer)
        self.held_out_stream = held_out_stream(stream, length, self.start)
        if not any((item["labels"] != IGNORE).any() for item in map(self.held_out_stream.__getitem__, range(len(self.held_out_stream)))):
            raise UserError(f"data.held_out: {section['name']} asks for no token of the held-out text; it is too short to judge a run by, hold out more")
        super().__init__(forward.prepare(model, kernel), args, stream, collator, optimizer, identity, quiet, on_spike, worker_timeout, self.held_out_stream)
        forward.check_isolated(self.model, stream.vocab, length, kernel and bool(args.bf16))
        self.head = forward.head_for_loss(self.model, stream.vocab, args)
        self.held_out_collator = Collator(objective.held_out(), length, family, stream.vocab.pad)
        self.token_bytes = torch.from_numpy(stream.vocab.token_bytes).to(args.device)
        self.asked = torch.zeros(2, dtype=torch.int64, device=args.device)
        """Labelled tokens of this process since the last log line, and their bytes of text."""
        self.measured: tuple[int, dict[str, float]] = -1, {}
        """The step after which `evaluate` was last called, and what it found."""

    fewer_rows = f"{FEWER_ROWS}, or, in a run begun anew, trainer.batch=auto"

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        labels = inputs["labels"].to(self.args.device)
        asked = labels != IGNORE
        self.asked += torch.stack([asked.sum(), torch.where(asked, self.token_bytes[labels.clamp(min=0)], 0).sum()])
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if self.head is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        loss = self.compute_loss_func(forward.output_for_loss(model, self.head, inputs), labels, num_items_in_batch=num_items_in_batch)  # type: ignore[misc]
        return loss if num_items_in_batch is None else loss * self.args.world_size  # DDP takes the mean of what the ranks' labels share

    def bits_per_byte(self, loss: float) -> float | None:
        """Of a training loss, over the labels since this was last asked; None where they stand for no text."""
        labels, size = self.summed(self.asked.cpu().double()).tolist()
        self.asked.zero_()
        return loss * labels / math.log(2) / size if size else None

    @contextlib.contextmanager
    def _plain(self) -> Iterator[None]:
        """The model without what accelerate puts around its forward pass under fp16, also when the training is over."""
        wrapped = self.model.__dict__.pop("forward", None)
        try:
            yield
        finally:
            if wrapped is not None:
                self.model.forward = wrapped

    def evaluate(self, eval_dataset: Any = None, **kwargs: Any) -> dict[str, float]:  # type: ignore[override]
        """Held-out loss and bits per byte of the model as it stands, in float32.

        Raises:
            UserError: a dataset; `lmssl evaluate RUN data.text=PATH` measures on other text.
        """
        if eval_dataset is not None:
            raise UserError("eval_dataset: a run is judged by the held-out part of its own token set; other text: lmssl evaluate RUN data.text=PATH")
        with self.clock.paused("evaluation"), self._plain():
            values = held_out(
                self.model,
                self.held_out_stream,
                self.held_out_collator,
                self.args.per_device_eval_batch_size,
                self.args.device,
                (self.args.process_index, self.args.world_size),
                self.summed,
            )
        metrics = {"eval_loss": values["loss"], "eval_bits_per_byte": values["bits_per_byte"]}
        self.measured = self.state.global_step, metrics
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def complete(self, folder: Path) -> None:
        """The tokenizer, and the recipe where there is one: a checkpoint can be fine-tuned and scored like the final model."""
        self.saved_tokenizer.save(folder)
        if (recipe := Path(self.args.output_dir) / "recipe.yaml").is_file():
            shutil.copyfile(recipe, folder / "recipe.yaml")

    def measure(self) -> None:
        if self.quiet or self.peak or not isinstance(self.train_dataset, Stream):
            return
        self.peak = machine.matmul_peak(str(self.args.device), machine.precision(self.args), torch.get_num_threads())
        batch = {k: v.to(self.args.device) for k, v in self.data_collator([self.train_dataset[0]]).items()}
        with self.compute_loss_context_manager():
            self.flops = machine.step_flops(self.accelerator.unwrap_model(self.model), batch, token_loss)

    def metrics(self) -> dict[str, Any]:
        """What metrics.json says of a finished run; held-out loss is measured in float32."""
        seconds, tokens = self.clock.seconds, self._total_tokens()
        timed = tokens - self.untimed[0]
        share = self.peak_share(self.state.global_step - self.untimed[1], seconds)
        step, values = self.measured
        if step != self.state.global_step:
            with fitting("the held-out text", "--resume with a smaller trainer.per_device_eval_batch_size", self.stopped):
                values = self.evaluate()
        if not math.isfinite(values["eval_loss"]):
            raise self.stopped("the held-out loss is not finite", Diverged)
        return {
            "objective": fields_of(self.objective)["name"],
            "family": models.family_of(self.model.config),
            "architecture": self.model.config.model_type,
            "parameters": models.parameters(self.model),
            "seed": self.args.seed,
            "steps": self.state.global_step,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(timed / seconds, 1) if seconds else 0.0,
            "matmul_share": share and round(share, 4),
            "held_out": {"loss": values["eval_loss"], "bits_per_byte": values["eval_bits_per_byte"]},
            "other_seconds": {k: round(v, 3) for k, v in self.clock.other.items()},
            "curve": self.curve,
            **({"earlier_data": self.earlier_data} if self.earlier_data else {}),
        }


def _check_kinds(model: Any, objective: Any, token_set: Any) -> None:
    """Refuse what is none of the things that a trainer is made of, saying what makes one."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model: expected a model of transformers, got {type(model).__name__}; lmssl.build_model makes one")
    if isinstance(objective, type) or not all(hasattr(objective, name) for name in MEMBERS):
        given = f"the class {objective.__name__}" if isinstance(objective, type) else f"{objective!r:.40}"
        raise UserError(f"objective: expected an objective, got {given}; for example lmssl.MaskedTokens(rate=0.3)")
    if not isinstance(token_set, TokenSet):
        raise UserError(f"train_dataset: expected a token set, got {type(token_set).__name__}; lmssl.prepare or lmssl.from_iterable makes one")


def check_items(stream: Stream, family: Family | None = None) -> None:
    """Refuse an objective whose first items are not what `Objective.__call__` promises.

    Args:
        family: of the model, where it is known: the first token of a decoder's row cannot be asked.
    """
    objective, length = stream.objective, stream.seq_length
    name = f"objective.name: '{fields_of(objective)['name']}'"
    try:
        bounds, most = objective.lengths(length), objective.most_labels(length)
        if not all(isinstance(bounds.get(kind), tuple | list) and bounds[kind] for kind in ("input_ids", "labels")):
            raise UserError(f"{name}: lengths must give a tuple for input_ids and one for labels, not {bounds!r}")
        held = objective.held_out()
        if lacking := [member for member in MEMBERS if not hasattr(held, member)]:
            raise UserError(f"{name}: held_out must give an objective ({lacking[0]} is missing)")
        numbers = range(min(LOOK, len(stream)))
        items, again = ([objective(stream.row(i), stream.vocab, generator(stream.seed, i)) for i in numbers] for _ in range(2))
    except UserError:
        raise
    except Exception as error:  # anybody's own code
        raise UserError(f"{name}: {of_the_data(error)}") from error
    for number, item in enumerate(items):
        if wrong := fault(item, stream.vocab.size, family) or beyond(item, bounds, most):
            raise UserError(f"{name}: item {number}: {wrong}")
        if any(not np.array_equal(array, again[number][key]) for key, array in item.items()):
            raise UserError(f"{name}: item {number} is another the second time; what is random is to be drawn from the generator that is given, so that any row can be made again")


def _checked_length(model: PreTrainedModel, token_set: TokenSet, args: TrainingArguments, seq_length: int | None, objective: Objective) -> int:
    """Tokens of a row, once model, tokens and arguments are found to fit together."""
    rows, ids = model.get_input_embeddings().weight.shape[0], token_set.manifest["vocabulary"]
    if ids > rows:
        raise UserError(f"the tokenizer has {ids} ids, the model {rows} embeddings; models.build takes the size from the tokenizer")
    if args.max_steps <= 0:
        raise UserError(f"trainer.max_steps: {args.max_steps} must be at least 1 optimizer step (from Python epochs are not counted: a run has a length in steps)")
    if not token_set.manifest["held_out"]["documents"]:
        raise UserError("train_dataset: no document is held out, and a run is judged by held-out text; prepare it with held_out above 0")
    positions = models.max_length(model.config)
    length = positions if seq_length is None else seq_length
    if length is None:
        raise UserError("seq_length: this model has no fixed number of positions; say how many tokens a row has")
    if length < 8:
        raise UserError(f"seq_length: {length} must be at least 8 tokens")
    needed = max(n for lengths in objective.lengths(length).values() for n in lengths)
    if positions is not None and needed > positions:
        raise UserError(f"seq_length: {length} needs {needed} positions, the model has {positions}")
    return length


def _identity(args: TrainingArguments, optimizer: str) -> dict[str, Any]:
    """What of the arguments decides a run's bits, beside its data and batch: resuming compares it. A warm-up that follows from the steps changes with them."""
    usual = (0, arguments.usual_warmup(args.max_steps))
    return {
        "seed": args.seed,
        # Which torchrun sets otherwise for one process than for several, and of which a GPU's results are not made.
        **({"threads": torch.get_num_threads()} if args.device.type == "cpu" else {}),
        "bf16": bool(args.bf16),
        "fp16": bool(args.fp16),
        "torch_compile": bool(args.torch_compile),
        "optimizer": optimizer if optimizer == "muon" else args.optim.value.removesuffix("_fused"),
        **{name: getattr(args, name) for name in ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")},
        **{name: getattr(args, name) for name in ("neftune_noise_alpha", "optim_args")},
        "lr_scheduler_type": args.lr_scheduler_type.value,
        "lr_scheduler_kwargs": args.lr_scheduler_kwargs or None,
        "warmup_steps": None if args.warmup_steps in usual else args.warmup_steps,
    }
