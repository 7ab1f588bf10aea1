"""A checkpoint as the command line names it: RUN, its newest, or RUN@STEP."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from blindvalm_jax.checkpoints import layout
from blindvalm_jax.errors import UserError


class Named(NamedTuple):
    """A checkpoint of a run."""

    run: Path
    step: int

    @property
    def path(self) -> Path:
        """Its directory."""
        return layout.directory(self.run) / str(self.step)

    def __str__(self) -> str:
        """As the command line names it."""
        return f"{self.run}@{self.step}"


def run(text: str) -> tuple[Path, list[int]]:
    """A run, and the updates done in its checkpoints.

    Raises:
      UserError: it is no run's directory.
    """
    path = Path(text).expanduser()
    if not layout.directory(path).is_dir():
        raise UserError(f"{path} is no run's directory: it has no checkpoints/")
    return path, layout.steps(path)


def checkpoint(text: str) -> Named:
    """RUN or RUN@STEP.

    Raises:
      UserError: there is no such run or checkpoint.
    """
    name, at, number = text.rpartition("@")
    named = bool(at) and number.isdecimal()
    path, steps = run(name if named else text)
    if not steps:
        raise UserError(f"{path} has no checkpoint")
    step = int(number) if named else steps[-1]
    if step not in steps:
        raise UserError(f"{path} has no checkpoint of step {step}: it has {steps}")
    return Named(path, step)
