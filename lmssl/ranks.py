"""The processes of a run: how many there are, whether this one speaks for all, and that they see the same."""

from __future__ import annotations

import os
from typing import Any

from lmssl.errors import UserError


def first_process() -> bool:
    """Whether this is the process that writes and speaks for all of a run's."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """Ranks of this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_here() -> int:
    """Ranks of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_same_folder(folder: Any, seen: Any) -> None:
    """Refuse a folder in which the processes of a run see different things: each machine would go on from somewhere else.

    Every process must ask. Args:
        seen: what this process sees there; compared, and sent as a pickle.
    """
    if processes() == 1:
        return
    from accelerate.utils import gather_object

    found = gather_object([seen])
    if any(other != found[0] for other in found):
        raise UserError(f"trainer.output_dir: not all processes see the same in {folder}; it must be one folder for all machines")


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
