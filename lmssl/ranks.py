"""The processes of a run: how many there are, whether this one speaks for all, and that they see the same."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmssl.errors import UserError

log = logging.getLogger("lmssl")


def first_process() -> bool:
    """Whether this is the process that writes and speaks for all of a run's."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """Ranks of this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_here() -> int:
    """Ranks of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_slurm() -> None:
    """Say so where SLURM started several tasks and none knows of the others: each is a run of its own."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and first_process() and processes() == processes_here():
        log.warning("SLURM started %s tasks, each of which is a run of its own; one run of all: srun --ntasks-per-node=1 torchrun --nnodes $SLURM_NNODES (README)", tasks)


def check_same_folder(folder: Any, seen: Any) -> None:
    """Refuse a folder in which the processes of a run see different things: each machine would go on from somewhere else.

    Every process must ask. Args:
        seen: what this process sees there; compared, and sent as a pickle.
    """
    found = _gathered(seen)
    if any(other != found[0] for other in found):
        raise UserError(f"trainer.output_dir: not all processes see the same in {folder}; it must be one folder for all machines")


def check_one_folder(folder: Path) -> None:
    """Refuse a folder that is not the same one for all processes of a run, or in which nothing can be written.

    A name that nobody has asked for is looked up, since a network's file system may remember what was not there. Every process must ask.
    """
    if processes() == 1:
        return
    name, failed = f".seen-{uuid.uuid4().hex}", ""
    if first_process():
        try:
            (folder / name).touch()
        except OSError as error:
            failed = error.strerror or str(error)
    name, failed = as_the_first((name, failed))
    blind = [rank for rank, sees in enumerate(_gathered(not failed and (folder / name).exists())) if not sees]
    if first_process():
        (folder / name).unlink(missing_ok=True)
    if failed:
        raise UserError(f"trainer.output_dir: nothing can be written into {folder}: {failed}")
    if blind:
        raise UserError(f"trainer.output_dir: process {blind[0]} does not see what process 0 writes into {folder}; it must be one folder for all machines")


def check_same(facts: Mapping[str, Any]) -> None:
    """Refuse a run of which the processes have read different text, or settings: each would train on other rows than the rest take for granted.

    Every process must ask. Args:
        facts: by what they are called in the refusal; compared, but for `threads`, of which machines may have more or fewer, and sent as a pickle.
    """
    found = _gathered({key: value for key, value in facts.items() if key != "threads"})
    for rank, other in enumerate(found):
        if differing := [key for key in found[0] if other[key] != found[0][key]]:
            theirs, first = (f"{facts[differing[0]]!s:.60}" for facts in (other, found[0]))
            raise UserError(f"{differing[0]}: process {rank} has {theirs}, process 0 {first}; all processes of a run must read the same text and settings")


def _gathered(value: Any) -> list[Any]:
    """What each process has, by rank."""
    if processes() == 1:
        return [value]
    from accelerate.utils import gather_object

    found: list[Any] = gather_object([value])
    return found


def as_the_first(value: Any) -> Any:
    """What the first process has; every process must ask."""
    if processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def wait() -> None:
    """For every process of the run to come here."""
    if processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
