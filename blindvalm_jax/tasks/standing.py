"""Results that stand in a directory already: damaged ones, another protocol's, another model's."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from blindvalm_jax import files
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import entries

_PAGE = ("report.md", "figures")


def tell(text: str) -> None:
    """A line on stderr."""
    print(f"note: {' '.join(text.split())}", file=sys.stderr, flush=True)


def read(directory: Path) -> dict[str, Any]:
    """What results.json in a directory holds that can be used; its "tasks" are sound; {} if none.

    A file that is no such JSON is moved aside to results.json.damaged, and entries that lack
    something are left out; both are said on stderr.

    Raises:
      UserError: it cannot be moved.
    """
    path = directory / "results.json"
    try:
        found = files.read_object(path) if path.exists() else {"tasks": {}}
        if not isinstance(found.get("tasks"), dict):
            raise UserError(f"{path} has no table of tasks")
    except UserError as error:
        aside = path.with_name(f"{path.name}.damaged")
        try:
            path.replace(aside)
        except OSError as other:
            raise UserError(f"{error}, nor can it be moved: {other.strerror}") from other
        tell(f"{error}: it is moved to {aside}")
        return {}
    sound = {}
    for task, entry in found["tasks"].items():
        if wrong := entries.problem(task, entry):
            tell(f"{path} {wrong}: the entry is left out")
        else:
            sound[task] = entry
    return {**found, "tasks": sound}


def make_room(directory: Path, protocol: str) -> None:
    """A directory has the results of one protocol; those of the other lie below it, by its name.

    What stands there of the other is moved below, and what lies below of this one is taken back:
    both are said on stderr.

    Raises:
      UserError: they cannot be moved.
    """
    there = {entry["protocol"] for entry in read(directory).get("tasks", {}).values()}
    if len(there) == 1 and protocol not in there:
        [other] = there
        put_aside(directory, other)
        tell(f"what was asked in {directory} under {other} is in {directory / other} now")
    below = directory / protocol
    if (below / "results.json").exists() and not (directory / "results.json").exists():
        _move(below, directory)
        tell(f"what was asked in {below} before is in {directory} again")


def put_aside(directory: Path, name: str) -> Path:
    """Moves the results of a directory, with lines and page, to one below it, in place of others.

    Raises:
      UserError: they cannot be moved.
    """
    aside = directory / name
    _move(directory, aside)
    return aside


def _move(source: Path, target: Path) -> None:
    """Moves what an evaluation wrote, and nothing else, in place of what another wrote there.

    results.json comes last, so that a move that breaks off is seen to be unfinished.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path in _written(target):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in _written(source):
            path.replace(target / path.name)
        if not any(source.iterdir()):
            source.rmdir()
    except OSError as error:
        raise UserError(f"results in {source} cannot be moved to {target}: {error}") from error


def _written(directory: Path) -> list[Path]:
    """Files and figures that an evaluation wrote into a directory, results.json last."""
    lines = [f"{task}.jsonl" for task in read(directory).get("tasks", {})]
    names = (*_PAGE, *lines, "results.json") if (directory / "results.json").exists() else ()
    return [directory / name for name in names if (directory / name).exists()]
