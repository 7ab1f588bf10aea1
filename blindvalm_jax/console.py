"""What a run says on the way: one line at a time, from the first process alone."""

from __future__ import annotations

import jax


def say(text: str) -> None:
    """Prints a line on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)
