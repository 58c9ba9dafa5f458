"""What this machine can do, and what a step asks of it: the measured matmul peak, and the matmul FLOPs that are executed.

Their quotient is the model FLOPs utilisation (MFU; Chowdhery et al. 2022, 2204.02311, appendix B), here against what the
machine reaches in a bare matrix product in the same precision, not against a data sheet; the same lines on CPU and GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._triton import has_triton

SIZES = {"cpu": (1024, 2048), "other": (4096, 8192)}
"""Edges of the square matrices that the peak is measured with."""
TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Numbers of mallopt's parameters, from glibc's malloc.h."""


@functools.cache
def keep_memory(device: str) -> bool:
    """Have this process keep the memory that it frees, for its next training step on a CPU; whether that could be arranged.

    glibc gives a large block back to the system as soon as it is freed. A training step frees and asks for the same
    blocks again and again, and the system clears them page by page each time: a sixth of a step of a small model on a CPU
    (docs/log.md). Left alone where the environment already says how to allocate, and where the C library is another.
    """
    if device != "cpu" or sys.platform != "linux" or any(key == "GLIBC_TUNABLES" or key.startswith("MALLOC_") for key in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1))


def same_bits(device: str) -> None:
    """Have compiled code add in a fixed order, so that two runs end with the same bits.

    On a CPU its scatters otherwise add in the order that threads arrive in. On a GPU, too, but there torch's switch for that costs every matrix product
    (docs/decisions/0023), and lmssl.lookups does what is needed; what remains is how many numbers a thread adds up, which torch.compile otherwise
    chooses by what was faster when it tried.
    """
    if device == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        return
    from torch._inductor import config

    config.deterministic = True


def draw_from(seed: int, device: torch.device) -> None:
    """As `torch.manual_seed`, for the CPU and one kind of device. That of torch also asks each kind that is not there, which takes time of every step."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        of_its_kind = torch.get_device_module(device)
        getattr(of_its_kind, "manual_seed_all", of_its_kind.manual_seed)(seed)


def device() -> str:
    """Where a finished model is asked: the GPU where torch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def most_memory() -> int:
    """Bytes that this process has held at most."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@functools.cache
def native_bf16(device: str) -> bool:
    """Whether a kind of device ("cpu", "cuda", ...) multiplies bfloat16 in hardware.

    Where a CPU does not, a product in bfloat16 takes some hundred times as long as one in float32.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return any(getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return False


def precision(args: Any) -> torch.dtype:
    """What a run's matrix products are in. `args`: TrainingArguments."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def autocast(args: Any) -> torch.autocast:
    """The context in which a run's forward passes are made."""
    dtype = precision(args)
    return torch.autocast(args.device.type, None if dtype == torch.float32 else dtype, enabled=dtype != torch.float32)


def compiles(device: str) -> bool:
    """Whether torch can generate code for a kind of device here: for a CPU it needs a C++ compiler, for a GPU Triton and a C compiler."""
    if device == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    return has_triton() and any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "clang"))  # which asks for the GPU's generation, too


def clear_half_built() -> None:
    """Remove from torch's cache of compiled code what a compiler that was killed left there.

    It writes a library in the place where every later run looks for it, so that half of one ends them all ("file too short"). A folder beside it is
    there for as long as it is being built; torch's own lock says whether by a process that lives (torch 2.11 to 2.13; not needed where it writes beside and renames).
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for build in Path(cache_dir()).glob("*/*_CxxBuild"):
        if ".optimized" in build.name:  # whose lock has another name; torch makes none by default
            continue
        with contextlib.suppress(Timeout, OSError), FileLock(Path(cache_dir(), "locks", f"{build.name.partition('.')[0]}.lock"), timeout=0):
            for left in build.parent.glob(f"{build.name.removesuffix('_CxxBuild')}.*"):
                if left.suffix in (".so", ".o"):
                    left.unlink()
            shutil.rmtree(build)


@functools.cache
def matmul_peak(device: str, dtype: torch.dtype, threads: int, seconds: float = 0.2) -> float:
    """FLOP/s of a square matrix product: the best of the repetitions that fit into some seconds.

    Args:
        device: "cpu", "cuda:0", ...
        dtype: of the operands.
        threads: of the CPU; a part of the key, since the peak depends on it.
        seconds: to measure for, over all sizes.
    """
    best = 0.0
    on_cpu = torch.device(device).type == "cpu"
    sizes = SIZES["cpu" if on_cpu else "other"]
    for size in sizes:
        # Drawn at random: a GPU that multiplies equal numbers needs less power, and is faster than it ever is on a model's.
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        end = time.perf_counter() + seconds / len(sizes)
        for repeat in range(1000):
            begun = time.perf_counter()
            torch.mm(a, b)
            if not on_cpu:
                torch.accelerator.synchronize()
            spent = time.perf_counter() - begun
            if repeat:  # the first one packs, plans and allocates
                best = max(best, 2 * size**3 / spent)
            if repeat and begun + spent > end:
                break
    return best


def _attention_forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return flop_counter.sdpa_backward_flop_count(grad, query, key, value)


# torch 2.13 counts the fused attention of GPUs alone; these are removable once its registry knows the one of the CPU.
COUNTED: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Kernels whose FLOPs torch's counter does not know; lmssl.packing adds its own."""


def step_flops(model: nn.Module, batch: Mapping[str, Tensor], loss: Any) -> int:
    """FLOPs of the matrix products that forward and backward of a micro-batch execute, counted by torch while they run.

    The gradients are thrown away: no `.grad` is touched, no hook on one is called.

    Args:
        model: not compiled; on the device of the batch.
        batch: what the collator made, `labels` among it.
        loss: `token_loss`, or what takes its place.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")
    parameters = [p for p in model.parameters() if p.requires_grad]
    with flop_counter.FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.compiler.set_stance("force_eager"):
        torch.autograd.grad(loss(model(**inputs), labels), parameters, allow_unused=True)
    return counter.get_total_flops()


def pass_seconds(model: nn.Module, batch: Mapping[str, Tensor], loss: Any, call: Callable[[dict[str, Any]], Any], repeats: int = 3) -> float:
    """Seconds of forward and backward of a micro-batch, the best of some; no gradient is left behind.

    Args:
        model, batch, loss: as `step_flops`.
        call: calls the model: of a batch without its labels, what the loss takes.
    """
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        inputs = dict(batch)
        labels = inputs.pop("labels")
        loss(call(inputs), labels).backward()
        if labels.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - begun)
        model.zero_grad()
    return min(times)
