"""A profiler trace of chosen steps, for TensorBoard or Perfetto."""

from __future__ import annotations

from pathlib import Path

import jax

from blindvalm_jax.console import say


class Profile:
    """Traces the steps from a first to a last one into a directory; none without steps.

    Tracing slows steps down: whoever times them leaves out those of `any_in`.
    """

    def __init__(self, directory: Path, steps: tuple[int, ...]) -> None:
        """steps: (first, last), counted from 1, or nothing."""
        self._directory = directory
        self._first, self._last = steps or (0, 0)
        self._on = False

    def any_in(self, first: int, last: int) -> bool:
        """Whether one of these steps is traced."""
        return 0 < self._first <= last and first <= self._last

    def before(self, step: int) -> None:
        """Begins where a traced step is next: also in the middle, where a run was resumed there."""
        if self.any_in(step, step) and not self._on:
            jax.profiler.start_trace(str(self._directory))
            self._on = True

    def ends_at(self, step: int) -> bool:
        """Whether a step is the last one traced."""
        return self._on and step >= self._last

    def close(self) -> None:
        """Ends a trace that is under way; the steps must be done."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
            say(f"profile of steps {self._first} to {self._last}: {self._directory}")
