"""Which files of a run belong in a store, and which of its checkpoints are there to the end."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import TypeVar

Entry = TypeVar("Entry")
LAST = "_CHECKPOINT_METADATA"  # Orbax's, in each step: sent when all else of the step is there
# What is never sent: locks, notes, what is being written, and a step that Orbax has not finished.
UNFINISHED = re.compile(
    r"\.lock$|\.partial$|^\.sent\.json$|(^|/)checkpoints/[^/]*[^/0-9][^/]*/",
)


def is_last(name: str) -> bool:
    """Whether a file is the one that makes a step whole."""
    return name.startswith("checkpoints/") and name.endswith(f"/{LAST}")


def whole(name: str, among: Collection[str]) -> bool:
    """Whether a file is of no step of which the last file is missing."""
    step = _step(name)
    return step is None or f"checkpoints/{step}/{LAST}" in among


def to_read(found: Mapping[str, Entry]) -> dict[str, Entry]:
    """The files of a directory that whoever reads it needs: of a run its newest whole checkpoint.

    found: by their names in the directory.
    """
    if not {"run.json", "config.json"} <= found.keys():
        return dict(found)
    steps = {name: step for name in found if (step := _step(name)) is not None}
    newest = max((int(x) for x in steps.values() if _sent(x, found)), default=None)
    return {
        name: entry
        for name, entry in found.items()
        if not UNFINISHED.search(name) and (name not in steps or steps[name] == str(newest))
    }


def _sent(step: str, found: Collection[str]) -> bool:
    return step.isdecimal() and f"checkpoints/{step}/{LAST}" in found


def _step(name: str) -> str | None:
    parts = PurePosixPath(name).parts
    return parts[1] if len(parts) > 2 and parts[0] == "checkpoints" else None
