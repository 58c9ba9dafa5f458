"""The trainer: transformers' own, with one exact loss, whole checkpoints, measured time and a stop before any NaN."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from lmssl import activations, arguments, checkpoints, lookups, machine, models, ranks
from lmssl.arguments import FEWER_ROWS, WHOLE
from lmssl.data.stream import Onwards, Stream, count_tokens
from lmssl.errors import Interrupted, Stopped, UserError, fitting, refused, said, written
from lmssl.objectives.cross_entropy import token_loss
from lmssl.optimizers import MuonAdamW, muon_groups, sizes_of
from lmssl.watch import Clock, Guard, Progress, of_the_data, spare_worker

log = logging.getLogger("lmssl")

OWN = ("lr", "initial_lr", "weight_decay", "betas", "eps")
"""What a resumed run takes from its own recipe and not from the checkpoint's optimizer."""
SILENT = 16
"""Steps without any label after which a run is refused."""


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
        eval_dataset: what `evaluate` measures; without one, `eval_strategy` stays "no".
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
        eval_dataset: Any = None,
    ):
        arguments.decide(args)
        arguments.check_own(optimizer=optimizer, on_spike=on_spike)
        if optimizer == "muon" and (args.optim_args or not args.optim.value.startswith("adamw_torch")):
            raise UserError(f"optim: {args.optim.value} configures AdamW and its kin, but the optimizer is muon; to use it: optimizer='adamw'")
        models.keep_names(model)
        machine.keep_memory(args.device.type)
        with refused("trainer"):
            super().__init__(model, args, data_collator, train_dataset, eval_dataset, compute_loss_func=token_loss)  # type: ignore[arg-type]
        self._refuse_parts()
        for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
            self.remove_callback(callback)
        activations.quicker(model, args.device.type)
        if args.torch_compile:
            machine.same_bits(args.device.type)
            machine.clear_half_built()
            if args.device.type == "cuda":
                lookups.in_order(model)
        # Measured now: a resumed run gets its optimizer when it already has its trained weights.
        self._sizes = sizes_of(model) if optimizer == "muon" else {}
        self.optimizer_kind, self.identity, self.quiet = optimizer, {**(identity or {}), "model": models.description(model.config, model)}, quiet
        self.on_spike, self.worker_timeout = on_spike, worker_timeout
        self.clock, self.curve = Clock(args.device), list[dict[str, float]]()
        self._tokens, self._tokens_before = torch.zeros((), dtype=torch.int64, device=args.device), 0  # since this process began; of all ranks before
        self.untimed = [0, 0]
        """Tokens and steps whose time stands beside the training time: of first steps, which compile."""
        self.flops, self.peak = 0.0, 0.0  # of an item, forward and backward; of the machine, a second
        self._stage: Path | None = None
        self._sealer = ThreadPoolExecutor(1, "lmssl-seal")
        self._sealing: Future[None] | None = None
        self._begin = (0, 0)  # step and item that this process begins with
        self._unasked = 0  # steps without a label so far; -1 once there was one
        self.earlier_data: list[Any] = []
        """What the identity of the run said of its text before another took its place (`--accept data`)."""
        self._known_good: set[str] = set()
        self._approved: Path | None = None  # the checkpoint that `resume_point` found to be of this run
        self.guard = Guard(self)
        self.add_callback(self.guard)
        self.add_callback(Progress(self))

    fewer_rows = FEWER_ROWS
    """The way out where a step does not fit into memory."""
    optimizer: Any
    control: Any
    gradient_norm: Any
    """Of the last step, before clipping."""

    @property
    def global_batch(self) -> int:
        """Items in one optimizer step over all ranks."""
        return arguments.global_batch(vars(self.args))

    def _refuse_parts(self) -> None:
        """Refuse what `accelerate launch` was told of a model in parts (decision 0020)."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(f"accelerate's configuration: FSDP and DeepSpeed are not supported: {WHOLE}; DDP is")
        if any(getattr(getattr(self.accelerator, "parallelism_config", None), f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp", "dp_shard")):
            raise UserError(f"accelerate's configuration: a model in parts is not supported: {WHOLE}; DDP is")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.optimizer_kind == "muon":
            groups = muon_groups(self.model, self.args.weight_decay, self.args.learning_rate, self._sizes)
            self.optimizer = MuonAdamW(groups, self.args.learning_rate, (self.args.adam_beta1, self.args.adam_beta2), self.args.adam_epsilon)
        with refused("trainer.optim"):
            return super().create_optimizer(model) if self.optimizer is None else self.optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with refused("trainer.lr_scheduler_type"):
            return super().create_scheduler(*args, **kwargs)

    def items(self, step: int) -> range:
        """The items of the stream that an optimizer step, counted from 0, reads over all ranks."""
        begun, first = self._begin
        first += (step - begun) * self.global_batch
        return range(first, first + self.global_batch)

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
        if batches and self._unasked >= 0:
            # Of a token set and an objective that never ask anything, no loss would ever say so; of a few short rows one may ask nothing by chance.
            self._unasked = -1 if count else self._unasked + 1
            if self._unasked >= min(SILENT, self.args.max_steps):
                raise UserError(f"data: no label of {self._unasked} steps asks anything (all are -100)")
        return batches, count.to(device).clamp(min=1)

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; the stream is entered at the checkpoint's item by arithmetic, not read up to it.

        Args:
            resume_from_checkpoint: a folder; True: of `resume_point`.
        """
        found = self.resume_point() if resume_from_checkpoint is True else resume_from_checkpoint
        folder, self._begin = Path(found) if found else None, (0, 0)
        if folder is not None and not (folder / "trainer_state.json").is_file():
            raise UserError(f"resume_from_checkpoint: {folder} is no checkpoint of a training")
        if folder is not None and folder != self._approved and (folder / checkpoints.MANIFEST).is_file():  # others' say nothing that could be compared
            self.resume_point(folder=folder)
        if folder is not None:
            step = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
            manifest = checkpoints.facts(folder)
            made_with = manifest.get("identity", {})
            self.earlier_data = self.earlier_data or manifest.get("earlier_data", [])
            self.args.eval_on_start = False  # that was before step 0
            self._begin = (step, manifest.get("items", step * made_with.get("batch", self.global_batch)))
            # A batch of another size, accepted on resuming, may need more items than the steps of the whole run have.
            if (end := self.items(self.args.max_steps).start) > len(self.train_dataset):  # type: ignore[arg-type]
                self.train_dataset.length = end  # type: ignore[union-attr]
        try:
            result = super().train(resume_from_checkpoint=str(folder) if folder else None, **kwargs)
            self.guard.look()
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._settle()
            raise
        self._settle()
        self.accelerator.wait_for_everyone()
        return result

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        end = min(self.items(self.args.max_steps).start, len(self.train_dataset))  # type: ignore[arg-type]
        return Onwards(self._begin[1], end, self.args.max_steps * self.global_batch)  # type: ignore[return-value]

    def get_train_dataloader(self) -> Any:
        with refused("trainer.dataloader"):
            loader = super().get_train_dataloader()
        if self.args.dataloader_num_workers:
            base = getattr(loader, "base_dataloader", loader)
            base.timeout, base.worker_init_fn = self.worker_timeout, partial(spare_worker, base.worker_init_fn, os.getpid())
        return loader

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        stack.enter_context(machine.autocast(self.args))
        return stack

    @property
    def tokens_seen(self) -> int:
        """Of this process, and of all before it was resumed. Asking waits for a GPU to catch up."""
        return self._tokens_before + int(self._tokens)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._tokens += self.count(inputs).to(self._tokens.device)
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

    def count(self, inputs: dict[str, Any]) -> Tensor:
        """Non-padding input tokens of a micro-batch."""
        return count_tokens(inputs) if "segments" in inputs else inputs["attention_mask"].sum()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    # Checkpoints: the stock save writes into a staging folder, which then becomes checkpoint-N in one rename.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage) if self._stage else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.clock.paused("saving"):
            self.guard.look()
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
            self._hashes.begin(Path(output_dir), "*.safetensors")  # other ranks may be writing their random state
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        own = [{k: group[k] for k in OWN if k in group} for group in self.optimizer.param_groups]
        made_by = checkpoints.facts(Path(checkpoint)).get("optimizer") if checkpoint else None
        if made_by and made_by != self._optimizer_class():
            raise UserError(f"{checkpoint}: its optimizer is another: {made_by}, this run's is {self._optimizer_class()}")
        if self.args.device == torch.device("cpu", 0):
            # Of several processes on CPUs accelerate calls it that, and torch before 2.13 puts no state there.
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        with refused(f"{checkpoint}: its optimizer is another"):
            super()._load_optimizer_and_scheduler(checkpoint)
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if checkpoint and isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            # The state is the checkpoint's; the rates are this run's, and so is its schedule, which may be longer than the saved
            # one: at that one's end the rate is 0.
            schedule.base_lrs = [group["initial_lr"] for group in own]
            for group, values, factor in zip(self.optimizer.param_groups, own, schedule.lr_lambdas, strict=True):
                group |= values | {"lr": values["initial_lr"] * factor(schedule.last_epoch)}
            schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what progress shows

    def _optimizer_class(self) -> str:
        """Its name: a caller may have set one of their own."""
        return type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__  # accelerate puts one around it

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        with models.quietly():  # of tied weights it says that they are missing; lmssl looks for itself
            super()._issue_warnings_after_load(load_result)

    def _seal(self, staged: Path, facts: dict[str, Any]) -> None:
        root = staged.parent.parent
        try:
            (staged / "training_args.bin").unlink(missing_ok=True)
            self.complete(staged)
            checkpoints.seal(staged, facts, self._hashes)
            try:
                checkpoints.read_signed(staged / checkpoints.MANIFEST)  # before older ones are given up for it
            except checkpoints.Damaged as error:
                raise OSError(errno.EIO, str(error)) from error
            checkpoints.publish(staged, root / staged.name)
            self._known_good.add(staged.name)
            checkpoints.rotate(root, self._known_good)
        finally:
            shutil.rmtree(staged.parent, ignore_errors=True)

    def complete(self, folder: Path) -> None:
        """Put into a checkpoint what else its users look for, beside the training."""

    def _settle(self) -> None:
        """Wait until the last checkpoint is whole and in its place."""
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            with written("the last checkpoint", self.stopped):
                sealing.result()

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "items": self.items(self.state.global_step).start,
            "identity": self.identity,
            "optimizer": self._optimizer_class(),
            "tokens": self._total_tokens(),
            "untimed": self.untimed,
            "seconds": self.clock.seconds,
            # Copies: the training goes on while these are written.
            "other_seconds": dict(self.clock.other),
            "curve": list(self.curve),
            "norms": list(self.guard.norms),
            "earlier_data": self.earlier_data,
        }

    def _total_tokens(self) -> int:
        return self._tokens_before + int(self.summed(torch.tensor([float(self._tokens)], dtype=torch.float64)).item())

    def summed(self, value: Tensor) -> Tensor:
        """A float64 tensor summed over ranks."""
        if self.args.world_size == 1:
            return value
        return self.accelerator.reduce(value.to(self.args.device), "sum").cpu()

    def stopped(self, reason: str, kind: type[Stopped] = Stopped) -> Stopped:
        """The exception for a run that lmssl ends itself, naming the last good checkpoint."""
        with contextlib.suppress(Exception):
            self._settle()
        # The first rank seals, and knows which are whole; to the others those in their place are.
        found, first = checkpoints.all_of(Path(self.args.output_dir)), self.is_world_process_zero()
        whole = [p for p in found if (p.name in self._known_good if first else checkpoints.facts(p))]
        last = f"the last good checkpoint is {whole[0]}" if whole else "no checkpoint was completed before"
        return kind(f"{reason}; {last}")

    def _fits(self, folder: Path, manifest: dict[str, Any]) -> None:
        if manifest["identity"].get("model") == self.identity["model"]:
            self._check_weights(folder)

    def _check_weights(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        state = {name: value for name, value in model.state_dict().items() if name not in unsaved}
        memory: dict[int, list[str]] = {}
        for name, value in state.items():
            memory.setdefault(value.data_ptr(), []).append(name)
        checkpoints.fits(folder, {k: v.shape for k, v in state.items()}, {k: memory[v.data_ptr()] for k, v in state.items()})

    def resume_point(self, accept: tuple[str, ...] = (), folder: Path | None = None) -> Path | None:
        """The newest whole checkpoint of this run; None where none was ever completed.

        Args:
            accept: keys of the identity that may differ.
            folder: this checkpoint, not the newest.

        Raises:
            UserError: checkpoints, but none whole; or one whose run differs from this (seed, data, ...), unless
                the difference is named in `accept`.
        """
        root = Path(self.args.output_dir)
        checkpoints.check_accepted(accept, self.identity.keys() - {"optimizer"} | {"threads"})
        path, manifest, rejected = checkpoints.newest(root, self._fits) if folder is None else checkpoints.only(folder, self._fits)
        for reason in rejected:
            log.warning("passed over: %s", reason)
        ranks.check_same_folder(root, manifest["step"] if path else None)
        if path is None:
            log.info("--resume: no checkpoint was completed in %s; starting at step 0", root)
            return None
        if manifest["step"] > self.args.max_steps:
            raise UserError(f"trainer.max_steps: {self.args.max_steps}, but {path.name} has more behind it; a shorter run begins anew in a folder of its own")
        then = manifest["identity"]
        changed = [key for key, now in self.identity.items() if key in then and then[key] != now and key not in accept]
        if changed:
            key, way_out = changed[0], f"{' '.join(f'--accept {key}' for key in changed)} goes on all the same"
            if "optimizer" in changed:
                key, way_out = "optimizer", "its state is of no use to this one; --overwrite begins anew"
            raise UserError(f"--resume: {key} changed: {path.name} has {_short(then[key])}, this run {_short(self.identity[key])}; {way_out}")
        try:
            self._check_weights(path)
        except checkpoints.Damaged as error:
            raise UserError(f"--accept model: {error}; the weights must be the same, whatever else of the model is another") from error
        if rejected:
            self.accelerator.wait_for_everyone()  # no rank looks any more
            if self.is_world_process_zero():
                checkpoints.set_aside(root, manifest["step"])
        self.accelerator.wait_for_everyone()
        self._known_good.add(path.name)
        self._approved = path
        self._tokens_before, self.untimed = manifest["tokens"], manifest.get("untimed", [0, 0])
        self.clock.training, self.clock.other, self.curve = manifest["seconds"], manifest["other_seconds"], manifest["curve"]
        self.guard.norms.extend(manifest["norms"])
        before, now = ([identity.get(key) for key in ("data", "tokens")] for identity in (manifest["identity"], self.identity))
        self.earlier_data = [*manifest.get("earlier_data", []), *([before] if before != now else [])]
        return path

    def run(self, resume: Path | str | bool | None = None) -> None:
        """Train to the end.

        Args:
            resume: a checkpoint; True: of `resume_point`.

        Raises:
            Stopped: a non-finite value, a full disk.
            Interrupted: a signal, after saving.
            UserError: a run that begins where checkpoints of another lie, of which only the newest would be kept.
        """
        resume = self.resume_point() if resume is True else Path(resume) if resume else None
        if resume is not None and not resume.is_dir():
            raise UserError(f"run: {resume} is no checkpoint folder")
        beside = ranks.as_the_first(checkpoints.all_of(Path(self.args.output_dir))) if self.args.save_strategy != "no" else []
        if beside and resume is None:
            raise UserError(
                f"output_dir: {self.args.output_dir} holds checkpoints of an earlier run ({beside[0].name}); run(resume_point()) goes on with it, another folder begins anew"
            )
        at = next((k for k, folder in enumerate(beside) if resume and folder.samefile(resume)), 0)
        if newer := ", ".join(folder.name for folder in beside[:at]):
            log.warning("%s: newer checkpoints lie beside it (%s), which the next --resume takes; move them elsewhere to go back for good", resume, newer)
        with self.guard.signals():
            try:
                with fitting("a training step", self.fewer_rows, self.stopped):
                    self.train(resume_from_checkpoint=str(resume) if resume else None)
            except RuntimeError as error:
                # torch's handler for a worker that died raises wherever the main thread happens to be.
                if self.args.world_size > 1 and (isinstance(error, torch.distributed.DistError) or " peer" in str(error)):
                    raise self.stopped(f"another process of this run ended, or cannot be reached: {said(error, 150)}") from error
                if "DataLoader worker" not in str(error):
                    if not self.guard.signum:
                        raise
                    # The compiler, for one, is a process of its own, which the same signal ends.
                    what = f"{signal.Signals(self.guard.signum).name}: step {self.state.global_step + 1} could not be finished"
                    raise Interrupted(f"{what}: {said(error, 150)}; --resume continues from the last checkpoint", self.guard.signum) from error
                raise self.stopped(f"the data of step {self.state.global_step + 1} cannot be made: {of_the_data(error)}") from error
            except AssertionError as error:
                if "EarlyStopping" not in str(error):
                    raise
                raise UserError(f"callbacks: {said(error)}; of TrainingArguments: metric_for_best_model='loss', eval_strategy='steps', eval_steps=100") from error
            except pickle.UnpicklingError as error:
                raise UserError(f"{resume}: holds a pickle of more than tensors, which is not loaded: {said(error, 200)}") from error
        if self.guard.acted:
            name = signal.Signals(self.guard.signum).name
            where = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            raise Interrupted(f"{name}: saved {where}; --resume continues there", self.guard.signum)
        if self.guard.signum:  # behind the last step, whose end could not save any more: as if it came now
            signal.raise_signal(self.guard.signum)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
