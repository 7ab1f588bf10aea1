"""Where the numbers of a run go: metrics.jsonl, the console, TensorBoard on request."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blindvalm_jax import files
from blindvalm_jax.console import warn
from blindvalm_jax.errors import UserError


class MetricWriter:
    """Appends one JSON object a line; keys are `part/name`, see docs/training.md.

    Lines past `resume_step` come from a run that was cut off and are dropped: the updates they
    describe are done again. Only the first process writes.
    """

    def __init__(self, workdir: Path, *, resume_step: int, tensorboard: bool, active: bool) -> None:
        """Opens the file; `active` is False on all processes but the first."""
        self._file: io.FileIO | None = None
        self._events: Any = None
        self._before = b""  # what begins a new line where the last one was broken off
        if not active:
            return
        path = workdir / "metrics.jsonl"
        _drop_after(path, resume_step)
        self._file = io.FileIO(path, "a")
        if tensorboard:
            writer = import_tensorboard()
            self._events = writer(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step; numbers that are not finite are written as null.

        A disk that is full is no reason to end a run: the line is left out, which is said.
        """
        if self._file is None:
            return
        finite = {k: float(v) if math.isfinite(v) else None for k, v in scalars.items()}
        line = self._before + json.dumps({"step": step, **finite}).encode() + b"\n"
        try:
            whole, reason = self._file.write(line) == len(line), "it was cut off"
        except OSError as error:
            whole, reason = False, str(error.strerror)
        if not whole and not self._before:
            warn(f"metrics.jsonl cannot be written ({reason}): it lacks lines from step {step} on")
        self._before = b"" if whole else b"\n"
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def names_at(workdir: Path, step: int) -> set[str]:
    """Metrics that a run has of a step."""
    lines = records(workdir / "metrics.jsonl")
    return {name for record in lines if record["step"] == step for name in record}


def records(path: Path) -> list[dict[str, Any]]:
    """What the lines of a metrics.jsonl hold; none where there is no file."""
    return [record for _, record in _lines(path)] if path.exists() else []


def import_tensorboard() -> Any:
    """The class that writes TensorBoard events.

    Raises:
      UserError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "log.tensorboard needs tensorboardX: pip install 'blindvalm_jax[tensorboard]'"
        ) from error
    return SummaryWriter


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line, record in _lines(path) if record["step"] <= step]
        files.write_bytes(path, "".join(f"{line}\n" for line in kept).encode())


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line with what it holds, without one that was being written when the run was cut off."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                found.append((line, record))
    return found


class StepTimer:
    """Seconds spent on updates; pauses (evaluation, checkpoints) are left out."""

    def __init__(self) -> None:
        """Starts now."""
        self._begin = time.perf_counter()
        self._paused = 0.0

    def pause(self, seconds: float) -> None:
        """Leaves out a span that was no update."""
        self._paused += seconds

    def lap(self) -> float:
        """Seconds of updates since the last lap, or the start."""
        now = time.perf_counter()
        spent = now - self._begin - self._paused
        self._begin, self._paused = now, 0.0
        return spent


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
