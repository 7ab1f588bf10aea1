"""Errors that users are told of in one line, and the exit codes that mean more than failure."""

from __future__ import annotations

from absl import flags

# Exit codes. LEFT: other processes of the run are gone, or go on without this one; it is also what
# a shell reports of the abort that JAX may be faster with.
PREEMPTED, DIVERGED, LEFT = 42, 43, 134


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, expected and got, what to do."""


class Preempted(BaseException):
    """SIGTERM ends this process (see `survival.preemption`); the message says what is saved.

    No `except Exception` takes it for a failure of what it interrupts.
    """


def first_line(error: BaseException) -> str:
    """The first line of what a library says of an error; of a long one its beginning and end.

    At most 500 characters: long paths stand in the middle, the cause behind them.
    """
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= 500 else f"{line[:245]} ... {line[-250:]}"


def logs_are_wanted() -> bool:
    """Whether --verbosity was given: what libraries log is shown then."""
    return "verbosity" in flags.FLAGS and bool(flags.FLAGS["verbosity"].present)
