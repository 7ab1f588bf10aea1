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
# What a process that works apart sends though it is not the first: pieces of arrays, and its log.
_PIECE = re.compile(r"^checkpoints/\d+/(state|guard)/(?!d/)[^/]+/\d+(\.\d+)*$")
_LOG = re.compile(r"^logs/process-(\d+)\.txt$")


def is_piece(name: str) -> bool:
    """Whether a file is a piece of an array of a checkpoint that processes wrote apart."""
    return _PIECE.search(name) is not None


def is_log(name: str, *, process: int | None = None) -> bool:
    """Whether a file is the log of a process other than the first, or of this one."""
    found = _LOG.search(name)
    return found is not None and (process is None or int(found[1]) == process)


def is_last(name: str) -> bool:
    """Whether a file is the one that makes a step whole."""
    return name.startswith("checkpoints/") and name.endswith(f"/{LAST}")


def whole(name: str, among: Collection[str]) -> bool:
    """Whether a file is of no step of which the last file is missing."""
    step = step_of(name)
    return step is None or last_of(step) in among


def last_of(step: str) -> str:
    """The file that makes a step whole."""
    return f"checkpoints/{step}/{LAST}"


def number(name: str) -> int:
    """The step whose checkpoint a file is of, which has one."""
    return int(step_of(name) or 0)


def to_read(found: Mapping[str, Entry]) -> dict[str, Entry]:
    """The files of a directory that whoever reads it needs: of a run its newest whole checkpoint.

    found: by their names in the directory.
    """
    if not {"run.json", "config.json"} <= found.keys():
        return dict(found)
    steps = {name: step for name in found if (step := step_of(name)) is not None}
    newest = max((int(x) for x in steps.values() if _sent(x, found)), default=None)
    return {
        name: entry
        for name, entry in found.items()
        if not UNFINISHED.search(name) and (name not in steps or steps[name] == str(newest))
    }


def _sent(step: str, found: Collection[str]) -> bool:
    return step.isdecimal() and last_of(step) in found


def step_of(name: str) -> str | None:
    """The step whose checkpoint a file is of, as its directory is named."""
    parts = PurePosixPath(name).parts
    return parts[1] if len(parts) > 2 and parts[0] == "checkpoints" else None
