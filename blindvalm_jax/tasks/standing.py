"""What stands in a directory before an evaluation writes to it, and the one rule for that.

A directory has the results of one model under one protocol. Other results that stand there are put
aside to before/NAME below it, and are taken back when they are asked for again. What no
results.json there accounts for is not written over, moved or deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from blindvalm_jax import files
from blindvalm_jax.errors import UserError
from blindvalm_jax.tasks import catalog, entries, identity, places

_BEFORE, _DAMAGED, _LOCK = "before", "damaged", ".evaluation.lock"


@dataclasses.dataclass(frozen=True)
class Standing:
    """What a results.json holds.

    files: those that it accounts for, itself last. head: all but its tasks. sound: entries that can
    be used; wrong: by task what is wrong with the others. damaged: why nothing of it can be used,
    "" if something can.
    """

    files: list[str]
    head: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sound: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wrong: Mapping[str, str] = dataclasses.field(default_factory=dict)
    damaged: str = ""

    @property
    def of(self) -> dict[str, Any]:
        """Model and protocol."""
        protocols = sorted({entry["protocol"] for entry in self.sound.values()})
        return {**self.head, "protocol": ", ".join(protocols) or "unknown"}

    def differs(self, of: Mapping[str, Any]) -> str:
        """In what it is of another model or protocol, see `identity.differences`."""
        told = of if self.sound else {name: of[name] for name in of if name != "protocol"}
        return identity.differences(self.of, told)


def tell(text: str) -> None:
    """A line on stderr."""
    print(f"note: {' '.join(text.split())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Makes a directory and keeps other evaluations out of it.

    Raises:
      UserError: another one writes there, or it cannot be made.
    """
    path = directory / _LOCK
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        stream = path.open("w")
    with stream:
        if not _is_mine(stream, path):
            raise UserError(
                f"another evaluation is writing to {directory}: wait until it has ended"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_mine(stream: IO[str], path: Path) -> bool:
    """Locks a file if no other process has; one that was opened is gone if its holder has ended."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be locked: {error.strerror}") from error


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Files that cannot be written, as on a full disk, are one line."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"results cannot be written to {directory}: {why}") from error


def everywhere(directory: Path) -> list[Path]:
    """Where results may lie: the directory, and those below it to which some were put aside."""
    return [directory, *sorted((directory / _BEFORE).glob("*"))]


def read(directory: Path, names: Sequence[str] = ()) -> Standing | None:
    """What results.json in a directory holds, None if there is none.

    names: of tasks beside the catalogue's whose files count as those of a damaged one.
    """
    path = directory / places.RESULTS
    if not path.exists():
        return None
    any_task = places.written([*catalog.TASKS, *catalog.TEXTS, *names], page=True)
    try:
        head = files.read_object(path)
        tasks = head.pop("tasks", None)
        if not isinstance(tasks, dict):
            raise UserError(f"{path} has no table of tasks")
        json.dumps(head, allow_nan=False)
    except UserError as error:
        return Standing(any_task, damaged=str(error))
    except ValueError:
        return Standing(any_task, damaged=f"{path} holds numbers that are not finite")
    problems = {task: entries.problem(task, entry) for task, entry in tasks.items()}
    wrong = {task: why for task, why in problems.items() if why}
    sound = {task: entry for task, entry in tasks.items() if task not in wrong}
    named = [task for task in tasks if entries.is_name(task)]
    return Standing(places.written(named, page=True), head, sound, wrong)


def settle(
    directory: Path,
    head: Mapping[str, Any],
    *,
    protocol: str,
    names: Sequence[str],
    in_training: bool,
) -> dict[str, Any]:
    """Leaves a directory to one model and protocol, for tasks of these names to be written to.

    head: the model, as `identity.about` describes it. in_training: no page will be written, and
    what training alone has written of an earlier step goes. All that is moved is said on stderr.

    Returns the entries that it has of that model and protocol.

    Raises:
      UserError: something would be written over that no results.json there accounts for, or files
        cannot be moved.
    """
    of = {**head, "protocol": protocol}
    aside = directory / _BEFORE / identity.name(of)
    there, back = read(directory, names), read(aside)
    if back is not None and (back.damaged or back.differs(of)):
        back = None
    wanted = places.written(names, page=not in_training)
    _check_free(directory, [*wanted, *(back.files if back else ())], there)
    with writing(directory):
        if there is not None and not _stays(directory, there, of, in_training=in_training):
            there = None
        if there is None and back is not None:
            _move(aside, directory, back.files[::-1])
            tell(f"what was asked in {aside} before is in {directory} again")
            there = back
        if there is not None and there.wrong:
            _leave_out(directory, there)
    return {} if there is None else dict(there.sound)


def _check_free(directory: Path, wanted: Sequence[str], there: Standing | None) -> None:
    """Refuses to write over what is no file that results.json accounts for."""
    for name in wanted:
        path = directory / name
        mine = there is not None and name in there.files
        above = path.parent if path.parent.exists() and not path.parent.is_dir() else path
        if above != path or path.is_dir() or (path.exists() and not mine):
            raise UserError(
                f"{above} would be written over, and no {places.RESULTS} in {directory} says that "
                "an evaluation wrote it: move it, or have the results written elsewhere"
            )


def _stays(directory: Path, there: Standing, of: Mapping[str, Any], *, in_training: bool) -> bool:
    """Whether results are of this model and protocol; others are put aside."""
    if there.damaged:
        aside = _put_aside(directory, _DAMAGED, there.files)
        tell(f"{there.damaged}: it is in {aside} now, and so are the files of tasks")
        return False
    other = there.differs(of)
    if not other:
        return True
    alone = all("in_training" in entry for entry in there.sound.values()) and not there.wrong
    if in_training and alone and not (directory / places.PAGE).exists():
        for name in there.files:
            (directory / name).unlink(missing_ok=True)
        return False
    aside = _put_aside(directory, identity.name(there.of), there.files)
    named = ", ".join([*there.sound, *there.wrong]) or "no task"
    tell(f"{directory} held {named} of {other}: they are in {aside} now")
    return False


def _put_aside(directory: Path, name: str, names: Sequence[str]) -> Path:
    """Moves files below the directory; gives where they are."""
    aside = _free(directory, name, names)
    _move(directory, aside, names)
    return aside


def _free(directory: Path, name: str, names: Sequence[str]) -> Path:
    """before/NAME, or NAME_2, ... where that has files of these names already."""
    there = [own for own in names if (directory / own).exists()]
    numbered = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    found = (directory / _BEFORE / own for own in numbered)
    return next(place for place in found if not any((place / own).exists() for own in there))


def _move(source: Path, target: Path, names: Sequence[str]) -> None:
    """Moves those files that there are, in their order; directories that it empties go.

    results.json is the last to leave a directory that is written to, and the first to come back:
    what stands there is accounted for also after a move that broke off.
    """
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).replace(target / name)
    for place in (source / places.FIGURES, source, source.parent):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _leave_out(directory: Path, there: Standing) -> None:
    """Writes results.json without entries that cannot be used.

    As it was it is put aside, with the files of those entries.
    """
    lost = [task for task in there.wrong if entries.is_name(task)]
    own = [*map(places.lines, lost), *map(places.figure, lost)]
    path = directory / places.RESULTS
    aside = _free(directory, _DAMAGED, [*own, places.RESULTS])
    aside.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, aside / places.RESULTS)
    _move(directory, aside, own)
    files.write_json(path, {"tasks": there.sound, **there.head})
    for why in there.wrong.values():
        tell(f"{path} {why}: the entry is left out, and is in {aside} now")
