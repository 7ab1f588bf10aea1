"""What a metrics.jsonl holds, and how the time of updates is taken."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from blindvalm_jax import files


def names_at(workdir: Path, step: int) -> set[str]:
    """Metrics that a run has of a step."""
    lines = records(workdir / "metrics.jsonl")
    return {name for record in lines if record["step"] == step for name in record}


def records(path: Path) -> list[dict[str, Any]]:
    """What the lines of a metrics.jsonl hold; none where there is no file."""
    return [record for _, record in _lines(path)] if path.exists() else []


def drop_after(path: Path, step: int) -> None:
    """Takes the lines of later steps out of a metrics.jsonl, if there is one."""
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
