"""The trainer section of a recipe: `TrainingArguments` fields, typed, checked and completed with lmssl's own defaults."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib.util
import logging
import math
import os
import typing
from collections.abc import Mapping
from typing import Any, Literal

from lmssl import config
from lmssl.errors import UserError, did_you_mean, refused
from lmssl.ranks import processes, processes_here

if typing.TYPE_CHECKING:
    from transformers import TrainingArguments

log = logging.getLogger("lmssl")

FEWER_ROWS = "a smaller trainer.per_device_train_batch_size (gradient_accumulation_steps makes up for it)"
WHOLE = "every process holds the whole model"
OWNED = {
    "ignore_data_skip": "a resumed run must skip what it consumed",
    "train_sampling_strategy": "the stream decides the order",
    "auto_find_batch_size": "the batch is part of the experiment",
    "remove_unused_columns": "the stream has no unused columns",
    "data_seed": "trainer.seed decides the order",
    "save_total_limit": "lmssl keeps the two newest verified checkpoints",
    "save_only_model": "a checkpoint without its optimizer cannot be resumed",
    "save_on_each_node": "output_dir is one folder for all machines",
    "enable_jit_checkpoint": "a signal saves at the end of its step",
    "logging_nan_inf_filter": "lmssl stops at a non-finite loss",
    "label_smoothing_factor": "the loss is lmssl's own",
    "resume_from_checkpoint": "use --resume, which verifies first",
    "load_best_model_at_end": "the final model is the last one",
    "metric_for_best_model": "the final model is the last one",
    "dataloader_in_order": "the stream decides the order",
    "bf16_full_eval": "held-out text is measured in float32",
    "fp16_full_eval": "held-out text is measured in float32",
    "push_to_hub": "publish the finished folder with `hf upload`, without checkpoint-*, and without metrics.json and report.html, which show rows of the text",
    "include_num_input_tokens_seen": "lmssl counts the tokens",
    "average_tokens_across_devices": "the loss is exact over all processes",
    "disable_tqdm": "there is a bar where a terminal reads it, and nowhere else",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the command says what is done"),
    **dict.fromkeys(
        ("prediction_loss_only", "eval_accumulation_steps", "batch_eval_metrics", "include_for_metrics", "eval_do_concat_batches"), "lmssl measures the held-out loss itself"
    ),
    "greater_is_better": "the final model is the last one",
    "group_by_length": "the stream decides the order",
    "fsdp": WHOLE,
    "fsdp_config": WHOLE,
    "deepspeed": WHOLE,
    "parallelism_config": WHOLE,
}
"""Fields that lmssl sets itself, and why."""

OWNED_BY_TASKS = OWNED | {
    "seed": "task.seeds counts the seeds: 0, 1, ...",
    "eval_strategy": "each run is scored once, when it ends",
    "eval_steps": "each run is scored once, when it ends",
    "eval_on_start": "each run is scored once, when it ends",
    "eval_delay": "each run is scored once, when it ends",
    "report_to": "the results of all runs stand in metrics.json",
    **dict.fromkeys(("logging_strategy", "logging_steps", "logging_first_step"), "a run is one line, its result"),
    "batch": "a few labelled examples need no split; per_device_train_batch_size is theirs",
}
"""The same for fine-tuning."""

OWNED_BY_STREAM = {
    "split_batches": "item i of the stream belongs to one place in the batch",
    "dispatch_batches": "item i of the stream belongs to one place in the batch",
    "gradient_accumulation_kwargs": "trainer.gradient_accumulation_steps says how a step is split",
}
"""The same for what stands in `accelerator_config`."""

UNUSABLE = (
    "save_only_model",
    "save_on_each_node",
    "load_best_model_at_end",
    "label_smoothing_factor",
    "auto_find_batch_size",
    "enable_jit_checkpoint",
    "bf16_full_eval",
    "fp16_full_eval",
)
"""Of `OWNED`, what a caller from Python might ask for, and would not get."""

OURS = {"optimizer": Literal["adamw", "muon"], "batch": Literal["given", "auto"], "on_spike": Literal["ignore", "warn", "stop"], "worker_timeout": float}
"""Fields beside those of TrainingArguments (see lmssl.trainer.ExactTrainer and, for `batch`, lmssl.probe)."""

POSITIVE = (
    "worker_timeout",
    "learning_rate",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "logging_steps",
    "save_steps",
    "eval_steps",
)
CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop", "context_fn", "every_n_layers", "offload")
"""What says how activations are checkpointed."""
NOT_NEGATIVE = ("weight_decay", "warmup_steps", "max_grad_norm", "seed", "dataloader_num_workers", "adam_epsilon", "neftune_noise_alpha")
BELOW_ONE = ("adam_beta1", "adam_beta2")


def own(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a resolved section that ExactTrainer takes itself."""
    return {k: values[k] for k in OURS if k != "batch"}


def check_own(**values: Any) -> None:
    """Refuse values that the fields of `OURS` do not have."""
    for name, value in values.items():
        config.convert(value, OURS[name], name)


def resolve(section: Mapping[str, Any], defaults: Mapping[str, Any], owned: Mapping[str, str] = OWNED) -> dict[str, Any]:
    """The section with every value of its declared type and every default filled in.

    Args:
        section: `TrainingArguments` fields and `OURS`.
        defaults: lmssl's own values for what is unset.
        owned: fields that are not to be set, and why.

    Raises:
        UserError: unknown keys, wrong types, senseless values, owned fields, no output_dir.
    """
    from transformers import TrainingArguments

    from lmssl.machine import native_bf16

    hints = typing.get_type_hints(TrainingArguments)
    fields = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    config.check_keys({name: None for name in section if name not in owned}, [*(fields - set(owned)), *OURS], "trainer")
    section = {name: value for name, value in section.items() if value is not None}  # null: as if it were not there
    for name in section:
        if name in owned and not (name in defaults and section[name] == defaults[name]):  # a resolved recipe says what it is
            raise UserError(f"trainer.{name}: not to be set: {owned[name]}")
    if type(section.get("output_dir")) in (int, float):
        section["output_dir"] = str(section["output_dir"])  # a folder may be called by a number
    values = {k: _converted(k, v, OURS.get(k) or hints[k]) for k, v in section.items()}
    if not str(values.get("output_dir") or "").strip():
        raise UserError("trainer.output_dir: missing; name the folder of the run")
    values["output_dir"] = os.path.expanduser(values["output_dir"])  # as TrainingArguments does
    _check_ranges(values)
    _check_strategies(values)
    how = next((name for name in ("torch_compile_mode", "torch_compile_backend") if name in values), None)  # either makes transformers compile
    if how and not values.setdefault("torch_compile", True):
        raise UserError(f"trainer.{how}: says how to compile, and trainer.torch_compile=false that nothing is compiled; keep one of them")
    if {**defaults, **values}.get("optimizer") == "muon" and (unused := [name for name in ("optim", "optim_args") if name in values]):
        raise UserError(f"trainer.{unused[0]}: configures AdamW and its kin, but the optimizer is muon; to use it: trainer.optimizer=adamw")
    if str(values.get("optim", "")).startswith("schedule_free"):
        raise UserError("trainer.optim: schedule-free optimizers train other weights than they mean to be judged by, and lmssl judges and saves those that train; use adamw_torch")
    if values.get("use_cpu") and not defaults.get("use_cpu"):  # a GPU's precision and workers are none of the CPU's
        defaults = {k: v for k, v in defaults.items() if k not in ("tf32", "dataloader_num_workers")} | {"bf16": native_bf16("cpu"), "use_cpu": True}
    if values.get("fp16") and "bf16" not in values:  # one of two
        defaults = {k: v for k, v in defaults.items() if k != "bf16"}
    if "num_train_epochs" in values:
        if "max_steps" in values:
            raise UserError("trainer.num_train_epochs: max_steps is set as well; keep one of them")
        defaults = {k: v for k, v in defaults.items() if k != "max_steps"}
    return {**defaults, **values}


def _converted(name: str, value: Any, hint: Any) -> Any:
    """A value of its declared type: of named choices one that there is, of steps a whole number where it is one."""
    value = config.convert(value, hint, f"trainer.{name}")
    for kind in typing.get_args(hint) or (hint,):
        if isinstance(kind, type) and issubclass(kind, enum.Enum) and value is not None and value not in (names := [choice.value for choice in kind]):
            raise UserError(f"trainer.{name}: nothing is called '{value}'; {did_you_mean(value, names)}")
    return int(value) if name.endswith("_steps") and isinstance(value, float) and value.is_integer() else value


def _check_strategies(values: Mapping[str, Any]) -> None:
    for name in ("save_strategy", "logging_strategy", "eval_strategy"):
        if getattr(values.get(name), "value", values.get(name)) in ("epoch", "best"):
            raise UserError(f"trainer.{name}: a run is one pass of max_steps, so this would act only at its end; use steps, and {name.partition('_')[0]}_steps")


def _check_ranges(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not math.isfinite(value):
            raise UserError(f"trainer.{name}: {value} is not a finite number")
        if (name in POSITIVE and value <= 0) or (name in NOT_NEGATIVE and value < 0) or (name in BELOW_ONE and not 0 <= value < 1):
            bound = "above 0" if name in POSITIVE else "at least 0" if name in NOT_NEGATIVE else "at least 0 and below 1"
            raise UserError(f"trainer.{name}: {value} must be {bound}")
        if isinstance(value, int) and not -(2**31) <= value < 2**32:
            raise UserError(f"trainer.{name}: {value} must lie between -2^31 and 2^32")


def global_batch(values: Mapping[str, Any]) -> int:
    """Items of one optimizer step over all ranks."""
    return processes() * values["per_device_train_batch_size"] * values.get("gradient_accumulation_steps", 1)


def with_steps(values: Mapping[str, Any], items: int) -> dict[str, Any]:
    """A resolved section whose run has a length: `max_steps` and what follows from it, unless set.

    Args:
        values: of `resolve`.
        items: rows or examples of one epoch, which `num_train_epochs` counts in.
    """
    done = dict(values)
    epochs = done.pop("num_train_epochs", None)
    if epochs is not None:
        done["max_steps"] = max(1, math.ceil(epochs * items / global_batch(values)))
    steps = done["max_steps"]
    return {"logging_steps": max(1, steps // 100), "save_steps": max(1, steps // 4), "warmup_steps": usual_warmup(steps), **done}


def usual_warmup(steps: int) -> int:
    """Steps of warm-up of a run of so many, where it does not say."""
    return min(100, steps // 10)


def build(values: Mapping[str, Any]) -> TrainingArguments:
    """TrainingArguments of a resolved section.

    Raises:
        UserError: what transformers refuses; more processes on this machine than it has GPUs for.
    """
    import torch
    from transformers import TrainingArguments

    here, gpus = processes_here(), torch.cuda.device_count()
    if here > gpus > 0 and not values.get("use_cpu"):
        way_out = f"torchrun --nproc-per-node {gpus} (accelerate launch --num_processes {gpus}), or trainer.use_cpu=true"
        raise UserError(f"trainer: {here} processes were started on a machine with {gpus} GPU{'s' if gpus > 1 else ''}: {way_out}")
    with refused("trainer"):
        args = TrainingArguments(**{k: v for k, v in values.items() if k not in OURS})
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UserError("trainer.dataloader_persistent_workers: there are no workers; trainer.dataloader_num_workers=2 has some")
    _try(args, values)
    check(args)
    if not args.use_cpu and args.world_size > 1 and args.device.type == "cpu":
        args.use_cpu = True
    return args


def check(args: TrainingArguments) -> None:
    """Refuse what would train something else than was asked for, or end in a traceback; of several GPUs in sight one is taken."""
    if args.fp16 and args.device.type == "cpu":
        raise UserError("trainer.fp16: half precision needs a GPU; on a CPU use trainer.bf16=true, where it has bfloat16")
    _check_strategies(vars(args))
    for name in UNUSABLE:
        if getattr(args, name, None):
            raise UserError(f"trainer.{name}: not to be set: {OWNED[name]}")
    for name, why in OWNED_BY_STREAM.items():
        if getattr(args.accelerator_config, name, None):
            raise UserError(f"trainer.accelerator_config: {name} is not to be set: {why}")
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        kwargs = getattr(args, name, None) or {}
        if not isinstance(kwargs, dict):
            raise UserError(f"trainer.{name}: expected a mapping, got {kwargs!r}")
        if kwargs.get("use_reentrant"):
            raise UserError(f"trainer.{name}: use_reentrant=true is not supported, the FLOPs of a step are counted through torch.autograd.grad; leave it out")
        config.check_keys(kwargs, CHECKPOINTING, f"trainer.{name}")
        if not isinstance(every := kwargs.get("every_n_layers", 1), int) or every < 1:
            raise UserError(f"trainer.{name}: every_n_layers={every} must be a whole number above 0")
    if args.world_size != processes():
        way_out = "trainer.use_cpu=true trains on the CPUs" if args.device.type != "cuda" else "start them with torchrun or accelerate launch"
        raise UserError(f"trainer: {processes()} processes were started (WORLD_SIZE), of which {args.world_size} can train together on this device: {way_out}")
    if args.n_gpu > 1:
        # transformers would split each batch over threads of this process, and average what is summed here.
        _say_gpus(args.n_gpu)
        args._n_gpu = 1


def decide(args: TrainingArguments) -> None:
    """Set what lmssl decides by itself, whatever a caller or `accelerate launch` said; refuse what would contradict it."""
    check(args)
    args.train_sampling_strategy = "sequential"
    args.remove_unused_columns = args.logging_nan_inf_filter = False
    args.dataloader_in_order = True
    args.ignore_data_skip = True  # the sampler begins where a checkpoint ended
    args.save_total_limit, args.average_tokens_across_devices = None, True
    args.disable_tqdm = True
    if args.log_level_replica == "warning":  # the default; the first process has said it
        args.log_level_replica = "error"
    # accelerate's bf16 widens every output to float32: at a vocabulary of 8k that copy costs a quarter of the
    # step. lmssl casts around the forward pass itself.
    args.mixed_precision = "fp16" if args.fp16 else "no"
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"  # with torch_compile transformers says it itself
    if args.device.type == "cuda" and args.dataloader_pin_memory:
        args.accelerator_config.non_blocking = True  # a batch goes over while the GPU is at work


@functools.cache
def _say_gpus(count: int) -> None:
    """Once, however often arguments are built."""
    log.warning("%d GPUs are visible and one is used; all of them: torchrun --nproc-per-node %d -m lmssl ...", count, count)


def _try(args: TrainingArguments, values: Mapping[str, Any]) -> None:
    """Make the schedule and look the optimizer up: what transformers would otherwise refuse when the run has begun."""
    import torch
    from transformers import Trainer, get_scheduler

    with refused(f"trainer.lr_scheduler_type: {values.get('lr_scheduler_type', 'linear')} (trainer.lr_scheduler_kwargs)"):
        nothing = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        # Without warm-up, in which its settings are not looked at.
        get_scheduler(args.lr_scheduler_type, nothing, num_warmup_steps=0, num_training_steps=max(2, args.max_steps), scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    if args.torch_compile and args.torch_compile_mode and args.torch_compile_backend == "inductor":
        from torch._inductor import list_mode_options

        with refused("trainer.torch_compile_mode"):
            list_mode_options(args.torch_compile_mode)
    if args.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise UserError("trainer.use_liger_kernel: the package is missing (pip install liger-kernel); lmssl's own loss needs none")
    if "optim" in values:
        with refused("trainer.optim"):
            Trainer.get_optimizer_cls_and_kwargs(args)


def hardware_defaults() -> dict[str, Any]:
    """bf16 where the hardware has it natively; the CPU where there is no accelerator."""
    import torch

    from lmssl.machine import native_bf16

    if torch.cuda.is_available():
        # transformers would switch TF32 on with compilation, for what is to be float32 as well.
        return {"bf16": native_bf16("cuda"), "use_cpu": False, "tf32": False}
    if torch.backends.mps.is_available():
        return {"bf16": False, "use_cpu": False}
    return {"bf16": native_bf16("cpu"), "use_cpu": True}


def workers() -> int:
    """Processes that make batches while a GPU trains: in the training process itself they would keep it waiting."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # a job's share of a machine
    return min(4, cores // (2 * processes_here()))


def pretrain_defaults(continued: bool = False) -> dict[str, Any]:
    """What an unset trainer field is in pretraining; never the Trainer's own 5e-5.

    Args:
        continued: from a checkpoint (`model.from`), which a new model's learning rate would undo, and whose own held-out loss is measured first.
    """
    from lmssl.machine import device

    return {
        "optimizer": "muon",
        "batch": "given",
        "on_spike": "warn",
        "worker_timeout": 300.0,
        "learning_rate": 1e-4 if continued else 3e-3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.99,
        "max_grad_norm": 1.0,
        "max_steps": 10_000,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "seed": 0,
        "report_to": "none",
        **hardware_defaults(),
        **({"eval_on_start": True} if continued else {}),
        **({"dataloader_num_workers": workers()} if device() == "cuda" else {}),
    }


def finetune_defaults() -> dict[str, Any]:
    """What an unset trainer field is in fine-tuning; the number of steps follows from the number of labels.

    A run that knows its few examples by heart has tiny gradients but for the odd one, so a spike says nothing there.
    """
    return {
        "optimizer": "adamw",
        "on_spike": "ignore",
        "worker_timeout": 300.0,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "save_steps": 500,
        "logging_strategy": "no",
        "report_to": "none",
        **hardware_defaults(),
    }
