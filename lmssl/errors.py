"""The three ways a run ends early, each with the exit status the command line gives it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake: one line that says what, where and the way out. Exit status 2, never a traceback."""

    exit_code = 2


class Stopped(Exception):
    """lmssl stopped the run itself (non-finite loss, disk full). Exit status 3; names the last good checkpoint."""

    exit_code = 3


class Interrupted(Exception):
    """The run was asked to stop by a signal, saved, and left. Exit status 128 + signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """The tail of a refusal: the nearest valid name, or all of them where none is near."""
    names = sorted(set(choices))
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    shown = ", ".join(names[:24]) + (", ..." if len(names) > 24 else "")
    return f"choose from: {shown}"
