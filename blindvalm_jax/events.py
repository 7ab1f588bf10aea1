"""What happens to a run besides its steps: events.jsonl, one JSON object a line.

Each has "time" (local, with its offset), "step" (updates done then) and "event"; the rest depends
on the event (docs/training.md). The file is the history of a run: nothing is ever taken out of it,
also not the lines of updates that are done again. The first process alone writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from blindvalm_jax.console import is_first, say

FILE = "events.jsonl"


def record(workdir: Path, event: str, *, step: int, **details: Any) -> None:
    """Appends an event; numbers that are not finite are written as null.

    A file that cannot be written is said on the console: it is no reason to end a run.
    """
    if not is_first():
        return
    known = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, "event": event}
    line = json.dumps({**known, **{name: _plain(value) for name, value in details.items()}})
    try:
        with (workdir / FILE).open("ab+") as file:
            if _broken_off(file):  # where a process was killed while it wrote
                line = f"\n{line}"
            file.write(f"{line}\n".encode())
    except OSError as error:
        say(f"note: {workdir / FILE} cannot be written ({error.strerror}); not in it: {line}")


def read(workdir: Path) -> list[dict[str, Any]]:
    """All events of a run, in order; lines that were broken off are left out."""
    try:
        lines = (workdir / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and {"time", "step", "event"} <= entry.keys():
                found.append(entry)
    return found


def _broken_off(file: Any) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
