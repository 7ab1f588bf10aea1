"""A directory that `prepare` writes: claimed by a marker, held by one process.

Nothing is deleted but files of the names given here, in a directory that carries the marker.
"""

from __future__ import annotations

import contextlib
import fcntl
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from blindvalm_jax.errors import UserError

MARKER = ".blindvalm_windows"
LOCK = ".lock"
SHARDS = "windows-*.array_record"
_WORK = ("*-*.npz", "*.array_record.json", "plan.txt", "*.partial")


def claim(out: Path, sources: Iterable[Path]) -> None:
    """Makes `out` a directory of `prepare`, which may write and delete its own files there.

    Raises:
      UserError: `out` holds something else, or one of the sources, or cannot be made.
    """
    whole = out.resolve()
    for source in sources:
        if source.resolve().is_relative_to(whole):
            raise UserError(
                f"the text {source} lies under {out}, where windows are to be written: choose "
                "another directory for them"
            )
    _check_own(out)
    if not (out / MARKER).exists():
        with locked(out):
            _check_own(out)
            try:
                (out / MARKER).write_text("Files here are written and deleted by prepare.\n")
            except OSError as error:
                raise UserError(f"cannot write to the directory {out}: {error}") from error


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Makes `out` and keeps other processes from writing it; released when a process dies."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = (out / LOCK).open("w")
    except OSError as error:
        raise UserError(f"cannot make the directory {out}, or write to it: {error}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: another process prepares {out}", file=sys.stderr, flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def remove_shards(directory: Path) -> None:
    """Deletes the shards in the directory of a split; whatever else is there stays."""
    for path in directory.glob(SHARDS):
        path.unlink()


def remove_work(work: Path) -> None:
    """Deletes the unfinished and intermediate files, and their directory if nothing is left."""
    for pattern in _WORK:
        for path in work.glob(pattern):
            path.unlink()
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def _check_own(out: Path) -> None:
    try:
        # The listing comes first: another process may write the marker and go on meanwhile.
        names = [path.name for path in out.iterdir()] if out.exists() else []
        own = (out / MARKER).exists()
    except OSError as error:
        raise UserError(f"cannot use the directory {out}: {error}") from error
    others = sorted(set(names) - {LOCK})
    if others and not own:
        raise UserError(
            f"{out} is not empty and was not made by prepare (it holds {others[0]}, and no "
            f"{MARKER}): choose a new or an empty directory"
        )
