"""The ways a run ends early, each with the exit status the command line gives it."""

import contextlib
import difflib
import re
import signal
from collections.abc import Callable, Iterable, Iterator


class UserError(Exception):
    """A user's mistake: one line that says what, where and the way out. Exit status 2, never a traceback."""

    exit_code = 2

    def __init__(self, message: str):
        # A column or a path may have a line break in its own name.
        super().__init__(" ".join(str(message).splitlines()))


class Stopped(Exception):
    """lmssl stopped the run itself (non-finite loss, disk full). Exit status 3; names the last good checkpoint."""

    exit_code = 3


class Diverged(Stopped):
    """The loss or the gradient is no longer finite, or spiked where that stops a run."""


class Interrupted(Exception):
    """The run was asked to stop by a signal, saved, and left. Exit status 128 + signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum

    @classmethod
    def by(cls, error: KeyboardInterrupt, what: str) -> "Interrupted":
        """Of Python's exception for a signal, which has SIGTERM's name where it is that one (lmssl.cli)."""
        return cls(f"{str(error) or 'SIGINT'}: {what}", signal.SIGTERM if str(error) else signal.SIGINT)


@contextlib.contextmanager
def written(what: str, stop: Callable[[str], Exception] = Stopped) -> Iterator[None]:
    """Turn whatever a full or failing disk raises inside into one line: "WHAT cannot be written: REASON".

    torch.save says RuntimeError and safetensors an error of its own where Python says OSError.
    """
    try:
        yield
    except OSError as error:
        at = f": {error.filename}" if error.filename else ""
        raise stop(f"{what} cannot be written: {error.strerror or error}{at}") from error
    except Exception as error:
        text = " ".join(str(error).split())
        foreign = type(error).__module__.startswith("safetensors") or isinstance(error, RuntimeError)
        if foreign and "inline_container" in text:  # torch.save counts bytes and names no reason
            text = "the file is shorter than what was written to it; the disk or a limit on file size is full"
            raise stop(f"{what} cannot be written: {text}") from error
        if foreign and re.search(r"\b(writ(e|ing|ten)|space|too large|os error)\b", text.lower()):
            raise stop(f"{what} cannot be written: {text[:200]}") from error
        raise


def said(error: BaseException, most: int = 300) -> str:
    """What an exception says in its first line; the name of its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:most]


def out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator, or the allocator of a CPU, had no room left."""
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in ("can't allocate memory", "MPS backend out of memory"))


@contextlib.contextmanager
def fitting(what: str, advice: str, stop: Callable[[str], Exception] = Stopped) -> Iterator[None]:
    """Turn memory that does not suffice inside into one line: "WHAT does not fit into memory: ADVICE"."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise stop(f"{what} does not fit into memory: {advice}") from error
        raise


@contextlib.contextmanager
def refused(where: str) -> Iterator[None]:
    """Turn what a library says of settings that it cannot work with into one line: "WHERE: REASON"."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, NotADirectoryError, FileExistsError) as error:
        if out_of_memory(error) or "CUDA" in str(error):
            raise
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """The tail of a refusal: the nearest valid name, or all of them where none is near."""
    names = sorted(set(choices))
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    shown = ", ".join(names[:24]) + (", ..." if len(names) > 24 else "")
    return f"choose from: {shown}"
