"""A profiler trace of chosen steps, for TensorBoard or Perfetto."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from blindvalm_jax.console import say, warn
from blindvalm_jax.errors import first_line


class Profile:
    """Traces the steps from a first to a last one into a directory; none without steps.

    Tracing slows steps down: whoever times them leaves out those of `any_in`. A trace that fails
    is said once, and no further one is begun.
    """

    def __init__(self, directory: Path, steps: tuple[int, ...]) -> None:
        """steps: (first, last), counted from 1, or nothing."""
        self._directory = directory
        self._first, self._last = steps or (0, 0)
        self._traced: list[int] = []  # steps of the trace that is under way
        self._failed = False

    def any_in(self, first: int, last: int) -> bool:
        """Whether one of these steps is traced."""
        return 0 < self._first <= last and first <= self._last

    def before(self, step: int) -> None:
        """Begins where a traced step is next: also in the middle, where a run was resumed there."""
        if not self.any_in(step, step) or self._failed:
            return
        if not self._traced:
            with self._warned(f"no profile from step {step} on"):
                jax.profiler.start_trace(str(self._directory))
        if not self._failed:
            self._traced.append(step)

    def ends_at(self, step: int) -> bool:
        """Whether a step is the last one traced."""
        return bool(self._traced) and step >= self._last

    def close(self) -> None:
        """Ends a trace that is under way; the steps must be done."""
        if not self._traced:
            return
        steps = f"profile of steps {self._traced[0]} to {self._traced[-1]}"
        self._traced = []
        with self._warned(f"no {steps}, and what stands there of it is not whole"):
            jax.profiler.stop_trace()
        if not self._failed:
            say(f"{steps}: {self._directory}")

    @contextlib.contextmanager
    def _warned(self, lacking: str) -> Iterator[None]:
        """Says what cannot be traced or written: it is no reason to end a run."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # JAX's own are RuntimeErrors
            self._failed = True
            warn(f"{self._directory} cannot be written ({first_line(error)}): {lacking}")
