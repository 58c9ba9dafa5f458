"""What a run leaves in its folder: whole files, plain values, and the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from lmssl.errors import UserError
from lmssl.ranks import processes


def write(path: Path, text: str) -> None:
    """Whole or not there: written beside, then renamed."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8", errors="backslashreplace")  # a folder's name need not be UTF-8
    beside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write` of indented JSON."""
    write(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file, None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def plain(value: Any) -> Any:
    """Nested mappings of JSON types: enums to their values, tuples to lists."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if isinstance(value, int | float | bool | type(None)) else str(getattr(value, "value", value))


def has_all_letters() -> bool:
    """Whether standard output takes any text; elsewhere what is to be read again needs escapes of its own."""
    return (sys.stdout.encoding or "utf-8").lower() in ("utf-8", "utf8")


def environment(device: Any) -> dict[str, Any]:
    """What was measured on what machine. `device`: of the run."""
    import torch
    import transformers

    from lmssl import __version__

    return {
        "lmssl": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": _name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "processes": processes(),
    }


def _name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else f"{device.type} of {_processor()}"


def _processor() -> str:
    """Name, cores, and the vector instructions that torch uses: two of one name may differ eightfold in bfloat16."""
    import torch

    from lmssl.machine import native_bf16

    kind = torch.backends.cpu.get_cpu_capability() + (" with bfloat16" if native_bf16("cpu") else "")
    try:
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores, {kind}"
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {kind}"
