"""The folder of a run: what in it is whose, what a new run may take away, and that one run at a time writes there."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lmssl import cards, checkpoints, config, ranks
from lmssl.data.preparation import cache_folder
from lmssl.data.tokens import content_hash
from lmssl.errors import UserError

log = logging.getLogger("lmssl")

MODEL = ("config.json", "generation_config.json", "model*.safetensors*")
"""The files of a model."""
PATIENCE = 10.0
"""Seconds to wait for another run's end: of one that was killed, workers may live for some."""


def lock_of(folder: Path, what: str, timeout: float = -1) -> FileLock:
    """A lock for what is done in a folder, beside the prepared text: it leaves nothing there, and ends with its process.

    Raises:
        OSError: no such place can be made.
    """
    place = cache_folder() / "locks"
    place.mkdir(parents=True, exist_ok=True)
    return FileLock(place / f"{content_hash(str(folder.resolve())):016x}.{what}", timeout=timeout)


@contextlib.contextmanager
def alone(out: Any) -> Iterator[None]:
    """Inside, no other run writes into a folder, of those of this user on this machine; held by the first process of several.

    Args:
        out: `trainer.output_dir` of a recipe, whatever it is.

    Raises:
        UserError: another one does.
    """
    ranks.check_slurm()
    if not out or not ranks.first_process():
        yield
        return
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock_of(Path(str(out)).expanduser(), "run", PATIENCE))
        except Timeout:
            raise UserError(f"trainer.output_dir: another run is writing into {out}; wait for its end, or name another folder") from None
        except OSError as error:  # no cache to write into, which fine-tuning has no other need of
            log.warning("%s cannot be locked: %s; begin no other run in it", out, error.strerror or error)
        yield


def holds_run(out: Path, *marks: str) -> bool:
    """Whether a run of lmssl left something in a folder: its recipe, a checkpoint on the way, or one of the files named."""
    return bool(config.of_folder(out) or checkpoints.all_of(out) or any((out / name).exists() for name in marks))


def check_moved(recipe: str, out: Path) -> None:
    """Say so where a recipe lies in the folder of a run and names another as that of its own: the run was copied or moved."""
    folder = Path(recipe).parent
    if Path(recipe).name == "recipe.yaml" and holds_run(folder) and folder.resolve() != out.expanduser().resolve():
        log.warning("%s belongs to the run in %s, its trainer.output_dir, where this goes on; trainer.output_dir=%s for the run beside it", recipe, out, folder)


def leavings(out: Path, *more: str) -> list[Path]:
    """What an earlier run left in its folder: results, checkpoints and model, of which nothing may be taken for a later run's."""
    return found(out, ("metrics.json", "recipe.yaml", *more, "checkpoint-*", *MODEL, "README.md"))


def found(out: Path, names: Sequence[str]) -> list[Path]:
    """What lies in a folder under some names, of which each may be a pattern."""
    return [path for name in names for path in sorted(out.glob(name))]


def check_free(out: Path, present: list[Path], source: str | None, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that is the backbone itself, whose old run holds it, or in which something stands that is not to be lost.

    Args:
        present: of `leavings`.
        source: the checkpoint that the run begins from.
        resume: whether the run that is there goes on.
        overwrite: whether what is there is given up.
    """
    taken = [] if resume else present
    if source is not None and (Path(source).resolve() == out.resolve() or any(Path(source).resolve().is_relative_to(path.resolve()) for path in taken)):
        raise UserError(f"trainer.output_dir: {source}, the backbone in model.from, would be overwritten in {out}; name another folder")
    if overwrite or resume or not present:
        return
    if present[0].name != "README.md":
        held, way_out = (
            ("a run", "--resume continues it, --overwrite begins anew") if holds_run(out) else ("no run that could go on", "name another folder (--overwrite removes it)")
        )
        raise UserError(f"trainer.output_dir: {out} holds {held} ({present[0].name}); {way_out}")
    if not present[0].read_bytes().startswith(cards.HEAD.encode()):
        raise UserError(f"trainer.output_dir: {present[0]} is not lmssl's and would be replaced; name another folder (--overwrite replaces it)")


def check_kind(out: Path, section: str, overwrite: bool) -> None:
    """Refuse a folder that holds a run of the other kind: pretraining's recipe has an `objective`, fine-tuning's a `task`."""
    sections = config.of_folder(out)
    if sections and not overwrite and section not in sections:
        held = "pretrained model" if section == "task" else "fine-tuned model"
        raise UserError(f"trainer.output_dir: {out} holds a {held}; name another folder (--overwrite removes it)")


def remove(paths: list[Path]) -> None:
    """Files, folders and links (not what they lead to)."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def make(out: Path) -> None:
    """The folder itself."""
    if out.exists() and not out.is_dir():
        raise UserError(f"trainer.output_dir: {out} is a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"trainer.output_dir: {out} cannot be made: {error.strerror}") from None
