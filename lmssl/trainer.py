"""The trainer: transformers' own, with one exact loss, whole checkpoints, measured time and a stop before any NaN."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from lmssl import checkpoints, machine, models
from lmssl.data.stream import Collator, Stream, count_tokens
from lmssl.data.tokens import TokenSet
from lmssl.errors import Diverged, Interrupted, Stopped, UserError, written
from lmssl.evaluation import held_out, held_out_stream
from lmssl.objectives import fields_of
from lmssl.objectives.base import IGNORE, Objective, token_loss
from lmssl.optimizers import MuonAdamW, muon_groups, sizes_of
from lmssl.watch import Clock, Guard, Progress, of_the_data

log = logging.getLogger("lmssl")


class ExactTrainer(transformers.Trainer):  # type: ignore[misc]
    """What pretraining and fine-tuning share.

    * One loss (`token_loss`), divided by the labels of the whole optimizer step over all ranks.
    * Item i of `train_dataset` is item i of the run: read in order, skipped by arithmetic on resume.
    * Dropout keyed by (seed, step, rank): a resumed step draws what the uninterrupted one drew.
    * A non-finite loss or gradient stops the run before the update; SIGTERM and SIGINT save at the step's end.
    * Checkpoints by lmssl.checkpoints.

    Args:
        model: any PreTrainedModel.
        args: TrainingArguments; `max_steps` set.
        train_dataset: map-style, as long as the run.
        data_collator: items -> tensors with `labels`.
        optimizer: "adamw" (TrainingArguments' `optim`) or "muon".
        identity: what a resumed run must find unchanged.
        quiet: no progress.
        on_spike: "warn" of a gradient that is `SPIKE` times the usual, "stop" before it is applied, or "ignore" it.
        worker_timeout: seconds without a batch after which a data worker counts as hanging.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Dataset[Any] | Stream,
        data_collator: Callable[[list[Any]], dict[str, Tensor]],
        optimizer: str = "adamw",
        identity: dict[str, Any] | None = None,
        quiet: bool = False,
        on_spike: str = "warn",
        worker_timeout: float = 300,
    ):
        args.train_sampling_strategy = "sequential"
        args.remove_unused_columns = args.logging_nan_inf_filter = False
        args.ignore_data_skip = True  # the sampler begins where a checkpoint ended
        args.save_total_limit, args.average_tokens_across_devices = None, True
        args.disable_tqdm = True
        # accelerate's bf16 widens every output to float32: at a vocabulary of 8k that copy costs a quarter of the
        # step. lmssl casts around the forward pass itself; sharded training keeps accelerate's own way.
        self.autocast = bool(args.bf16 and not args.fsdp and not args.deepspeed)
        if self.autocast:
            args.mixed_precision = "no"
        if args.n_gpu > 1:
            # transformers would split each batch over threads of this process, and average what is summed here.
            log.warning("%d GPUs are visible and one is used; all of them: torchrun --nproc-per-node %d -m lmssl ...", args.n_gpu, args.n_gpu)
            args._n_gpu = 1
        machine.keep_memory(args.device.type)
        super().__init__(model, args, data_collator, train_dataset, compute_loss_func=token_loss)  # type: ignore[arg-type]
        for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
            self.remove_callback(callback)
        if args.torch_compile and args.device.type == "cpu":
            # Compiled scatters otherwise add in the order that threads arrive in: no two runs end with the same bits.
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        # Measured now: a resumed run gets its optimizer when it already has its trained weights.
        self._sizes = sizes_of(model) if optimizer == "muon" else {}
        self.optimizer_kind, self.identity, self.quiet = optimizer, {**(identity or {}), "model": models.description(model.config, model)}, quiet
        self.on_spike, self.worker_timeout = on_spike, worker_timeout
        self.clock, self.tokens_seen, self.curve = Clock(), 0, list[dict[str, float]]()
        self._tokens_before = 0  # counted by all ranks before this resume
        self.flops, self.peak = 0.0, 0.0  # of an item, forward and backward; of the machine, a second
        self._stage: Path | None = None
        self._sealer = ThreadPoolExecutor(1, "lmssl-seal")
        self._sealing: Future[None] | None = None
        self._begin, self._any_label = 0, False
        self._known_good: set[str] = set()
        self.guard = Guard(self)
        self.add_callback(self.guard)
        self.add_callback(Progress(self))

    optimizer: Any
    control: Any
    gradient_norm: Any
    """Of the last step, before clipping."""

    @property
    def global_batch(self) -> int:
        """Items in one optimizer step over all ranks."""
        return self.args.world_size * self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.optimizer_kind == "muon":
            groups = muon_groups(self.model, self.args.weight_decay, self.args.learning_rate, self._sizes)
            self.optimizer = MuonAdamW(groups, lr=self.args.learning_rate, betas=(self.args.adam_beta1, self.args.adam_beta2))
        return super().create_optimizer(model) if self.optimizer is None else self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step, and the number of labels in all of them on all ranks."""
        try:
            batches = list(islice(epoch_iterator, num_batches))
        except (UserError, Stopped):
            raise
        except Exception as error:
            raise self.stopped(f"the data of step {self.state.global_step + 1} cannot be made: {of_the_data(error)}") from error
        count = torch.stack([(b["labels"] != -100).sum() for b in batches]).sum() if batches else torch.tensor(0)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count.to(device)).sum()
        if batches and not self._any_label:
            # Of a token set and an objective that never ask anything, no loss would ever say so.
            if not count:
                raise UserError(f"data: none of the {sum(b['labels'].numel() for b in batches)} labels of the first step asks anything (all are -100)")
            self._any_label = True
        return batches, count.to(device).clamp(min=1)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; the stream is entered at the checkpoint's step by arithmetic, not read up to it."""
        self._begin = 0
        if isinstance(resume_from_checkpoint, str):
            self._begin = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json")).global_step * self.global_batch
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._settle()
            raise
        self._settle()
        self.accelerator.wait_for_everyone()
        return result

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return _Onwards(self._begin, len(self.train_dataset))  # type: ignore[arg-type]

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if self.args.dataloader_num_workers:
            getattr(loader, "base_dataloader", loader).timeout = self.worker_timeout
        return loader

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        if self.autocast:
            stack.enter_context(torch.autocast(self.args.device.type, torch.bfloat16))
        return stack

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.tokens_seen += self.count(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self.gradient_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.gradient_norm

    def bits_per_byte(self, loss: float) -> float | None:
        """Of a training loss; None where labels are no text."""
        return None

    def measure(self) -> None:
        """Set `flops` and `peak`, once, before the first step; only where somebody looks at the share of the peak."""

    def peak_share(self, steps: int, seconds: float) -> float | None:
        """Executed matmul FLOP/s over so many steps, as a share of what the machine reaches in a bare matrix product."""
        if not self.peak or not self.flops or seconds <= 0:
            return None
        return self.flops * self.global_batch * steps / seconds / (self.peak * self.args.world_size)

    def count(self, inputs: dict[str, Any]) -> int:
        """Non-padding input tokens of a micro-batch."""
        return count_tokens(inputs) if "segments" in inputs else int(inputs["attention_mask"].sum())

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    # Checkpoints: the stock save writes into a staging folder, which then becomes checkpoint-N in one rename.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage) if self._stage else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.clock.paused("saving"):
            self._settle()
            self._stage = Path(self.args.output_dir) / f".staging-{self.state.global_step}"
            try:
                with written(f"checkpoint {self.state.global_step}", self.stopped):
                    self._staged_save(model, trial)
            except BaseException:
                if self.is_world_process_zero():
                    shutil.rmtree(self._stage, ignore_errors=True)
                raise
            finally:
                self._stage = None

    def _staged_save(self, model: Any, trial: Any) -> None:
        assert self._stage is not None
        if self.is_world_process_zero():
            shutil.rmtree(self._stage, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._hashes = checkpoints.Hashes()
        with checkpoints.without_crc():
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        facts = self._facts()  # sums over ranks, so every rank must ask
        if self.is_world_process_zero():
            # The files are complete and nobody writes to them: hashes, syncs and the rename need not hold the training up.
            self._sealing = self._sealer.submit(self._seal, self._stage / f"checkpoint-{self.state.global_step}", facts)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_world_process_zero():  # the weights are written: their hash need not wait for the optimizer
            (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle; the recipe says it all
            self._hashes.begin(Path(output_dir))
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if checkpoint and isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            # Of this run's schedule, which may be longer than the saved one: at that one's end the rate is 0.
            for group, rate, factor in zip(self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = rate * factor(schedule.last_epoch)

    def _seal(self, staged: Path, facts: dict[str, Any]) -> None:
        root = staged.parent.parent
        try:
            (staged / "training_args.bin").unlink(missing_ok=True)
            checkpoints.seal(staged, facts, self._hashes)
            checkpoints.publish(staged, root / staged.name)
            self._known_good.add(staged.name)
            checkpoints.rotate(root, self._known_good)
        finally:
            shutil.rmtree(staged.parent, ignore_errors=True)

    def _settle(self) -> None:
        """Wait until the last checkpoint is whole and in its place."""
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            with written("the last checkpoint", self.stopped):
                sealing.result()

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "identity": self.identity,
            "tokens": self._total_tokens(),
            "seconds": self.clock.seconds,
            "other_seconds": self.clock.other,
            "curve": self.curve,
            "norms": list(self.guard.norms),
        }

    def _total_tokens(self) -> int:
        mine = self.tokens_seen - self._tokens_before
        return self._tokens_before + int(self._sum(torch.tensor([float(mine)], dtype=torch.float64)).item())

    def _sum(self, value: Tensor) -> Tensor:
        """A float64 tensor summed over ranks."""
        if self.args.world_size == 1:
            return value
        return self.accelerator.reduce(value.to(self.args.device), "sum").cpu()

    def stopped(self, reason: str, kind: type[Stopped] = Stopped) -> Stopped:
        """The exception for a run that lmssl ends itself, naming the last good checkpoint."""
        with contextlib.suppress(Exception):
            self._settle()
        whole = [p for p in checkpoints.all_of(Path(self.args.output_dir)) if p.name in self._known_good]
        last = f"the last good checkpoint is {whole[0]}" if whole else "no checkpoint was completed before"
        return kind(f"{reason}; {last}")

    def _fits(self, folder: Path, manifest: dict[str, Any]) -> None:
        if manifest["identity"].get("model") == self.identity["model"]:
            state = self.accelerator.unwrap_model(self.model).state_dict()
            memory: dict[int, list[str]] = {}
            for name, value in state.items():
                memory.setdefault(value.data_ptr(), []).append(name)
            checkpoints.fits(folder, {k: v.shape for k, v in state.items()}, {k: memory[v.data_ptr()] for k, v in state.items()})

    def resume_point(self, accept: tuple[str, ...] = ()) -> Path | None:
        """The newest whole checkpoint of this run; None where none was ever completed.

        Raises:
            UserError: checkpoints, but none whole; or one whose run differs from this (seed, data, ...), unless
                the difference is named in `accept`.
        """
        root = Path(self.args.output_dir)
        checkpoints.check_accepted(accept, self.identity)
        path, manifest, rejected = checkpoints.newest(root, self._fits)
        for reason in rejected:
            log.warning("passed over: %s", reason)
        if path is None:
            log.info("--resume: no checkpoint was completed in %s; starting at step 0", root)
            return None
        for key, now in self.identity.items():
            then = manifest["identity"].get(key)
            if then != now and key not in accept:
                raise UserError(f"--resume: {key} changed: {path.name} has {_short(then)}, this run {_short(now)}; --accept {key} goes on all the same")
        if rejected and self.is_world_process_zero():
            checkpoints.set_aside(root, manifest["step"])
        self.accelerator.wait_for_everyone()
        self._known_good.add(path.name)
        self.tokens_seen = self._tokens_before = manifest["tokens"]
        self.clock.training, self.clock.other, self.curve = manifest["seconds"], manifest["other_seconds"], manifest["curve"]
        self.guard.norms.extend(manifest["norms"])
        return path

    def run(self, resume: Path | None = None) -> None:
        """Train to the end.

        Raises:
            Stopped: a non-finite value, a full disk.
            Interrupted: a signal, after saving.
        """
        with self.guard.signals():
            try:
                self.train(resume_from_checkpoint=str(resume) if resume else None)
            except RuntimeError as error:
                # torch's handler for a worker that died raises wherever the main thread happens to be.
                if "DataLoader worker" not in str(error):
                    raise
                raise self.stopped(f"the data of step {self.state.global_step + 1} cannot be made: {of_the_data(error)}") from error
            except pickle.UnpicklingError as error:
                raise UserError(f"{resume}: holds a pickle of more than tensors, which is not loaded: {str(error).splitlines()[0][:200]}") from error
        if self.guard.signum:
            name = signal.Signals(self.guard.signum).name
            where = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            raise Interrupted(f"{name}: saved {where}; --resume continues there", self.guard.signum)


class _Onwards(torch.utils.data.Sampler[int]):
    """Items `begin`, `begin` + 1, ... of a stream; its length is the whole stream's, from which steps are counted."""

    def __init__(self, begin: int, length: int):
        self.begin, self.length = begin, length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.begin, self.length))

    def __len__(self) -> int:
        return self.length


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
        section = fields_of(objective)
        family = models.check_family(model.config, objective, section["name"])
        train_dataset.tokenizer.check(objective, section["name"])
        rows, ids = model.get_input_embeddings().weight.shape[0], train_dataset.manifest["vocabulary"]
        if ids > rows:
            raise UserError(f"the tokenizer has {ids} ids, the model {rows} embeddings; models.build takes the size from the tokenizer")
        if args.max_steps <= 0:
            raise UserError(f"trainer.max_steps: {args.max_steps} must be at least 1 optimizer step")
        if not train_dataset.manifest["held_out"]["documents"]:
            raise UserError("train_dataset: no document is held out, and a run is judged by held-out text; prepare it with held_out above 0")
        length = seq_length or models.max_length(model.config)
        if length is None:
            raise UserError("seq_length: this model has no fixed number of positions; say how many tokens a row has")
        self.seq_length, self.objective = length, objective
        self.start = getattr(model.config, "decoder_start_token_id", None)
        world = int(os.environ.get("WORLD_SIZE", 1))
        batch = world * args.per_device_train_batch_size * args.gradient_accumulation_steps
        stream = Stream(train_dataset, objective, length, args.seed, args.max_steps * batch, self.start)
        collator = Collator(objective, length, family, stream.vocab.pad)
        identity = train_dataset.identity | {"objective": section, "seed": args.seed, "batch": batch, "seq_length": length, "threads": torch.get_num_threads()}
        identity |= {"bf16": bool(args.bf16), "torch_compile": bool(args.torch_compile)}
        super().__init__(models.prepare(model), args, stream, collator, optimizer, identity, quiet, on_spike, worker_timeout)
        if not (args.fsdp or args.deepspeed):  # no rank holds the whole model there
            models.check_isolated(self.model, stream.vocab, length)
        self.head = models.head_for_loss(self.model, stream.vocab, args)
        self.held_out_stream = held_out_stream(stream, length, self.start)
        self.held_out_collator = Collator(objective.held_out(), length, family, stream.vocab.pad)
        self.token_bytes = torch.from_numpy(stream.vocab.token_bytes).to(args.device)
        self.asked = torch.zeros(2, dtype=torch.int64, device=args.device)
        """Labelled tokens of this process since the last log line, and their bytes of text."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        labels = inputs["labels"].to(self.args.device)
        labels = labels[labels != IGNORE]
        self.asked += torch.stack([torch.tensor(labels.numel(), device=labels.device), self.token_bytes[labels].sum()])
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if self.head is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        return self.compute_loss_func(models.output_for_loss(model, self.head, inputs), labels, num_items_in_batch=num_items_in_batch)  # type: ignore[misc]

    def bits_per_byte(self, loss: float) -> float | None:
        """Of a training loss, over the labels since this was last asked; None where they stand for no text."""
        labels, size = self.asked.tolist()
        self.asked.zero_()
        return loss * labels / math.log(2) / size if size else None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # type: ignore[override]
        """Held-out loss and bits per byte of the model as it stands."""
        with self.clock.paused("evaluation"):
            values = held_out(
                self.model,
                self.held_out_stream,
                self.held_out_collator,
                self.args.per_device_eval_batch_size,
                self.args.device,
                (self.args.process_index, self.args.world_size),
                self._sum,
            )
        metrics = {"eval_loss": values["loss"], "eval_bits_per_byte": values["bits_per_byte"]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self) -> None:
        if self.quiet or self.peak or not isinstance(self.train_dataset, Stream):
            return
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        self.peak = machine.matmul_peak(str(self.args.device), dtype, torch.get_num_threads())
        if self.args.fsdp or self.args.deepspeed:
            return  # the parameters are not whole here
        batch = {k: v.to(self.args.device) for k, v in self.data_collator([self.train_dataset[0]]).items()}
        with self.compute_loss_context_manager():
            self.flops = machine.step_flops(self.accelerator.unwrap_model(self.model), batch, token_loss)

    def metrics(self) -> dict[str, Any]:
        """What metrics.json says of a finished run; held-out loss is measured in float32."""
        seconds, tokens = self.clock.seconds, self._total_tokens()
        share = self.peak_share(self.state.global_step, seconds)
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
            "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
            "matmul_share": share and round(share, 4),
            "held_out": {"loss": values["eval_loss"], "bits_per_byte": values["eval_bits_per_byte"]},
            "other_seconds": {k: round(v, 3) for k, v in self.clock.other.items()},
            "curve": self.curve,
        }
