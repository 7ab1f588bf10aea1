"""What a run says on the way: one line at a time, printed by the first process alone.

The others keep it in a log of their own.
"""

from __future__ import annotations

import sys

import jax

from blindvalm_jax import process_log


def is_first() -> bool:
    """Whether this is the first process of the run: the one that writes and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line on the first process."""
    if is_first():
        print(text, flush=True)
    else:
        process_log.write(text)


def say_here(text: str) -> None:
    """Prints a line that concerns this process: on stderr, with its number, where not the first."""
    if is_first():
        say(text)
    else:
        print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True)
        process_log.write(text)


def warn(text: str) -> None:
    """Prints a warning as one line on stderr, on the first process."""
    line = f"warning: {' '.join(text.split())}"
    if is_first():
        print(line, file=sys.stderr, flush=True)
    else:
        process_log.write(line)
