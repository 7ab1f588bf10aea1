"""Files that are there whole or not at all, JSON in them, and files that one process holds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from blindvalm_jax.errors import UserError

_held: set[Path] = set()


class HeldError(UserError):
    """Another process holds what this one needs."""


@contextlib.contextmanager
def replacing(path: Path, *, work: Path | None = None) -> Iterator[Path]:
    """Gives a path to write to; then `path` is all of that, or what it was, also after a crash.

    `work` is a directory of the same file system for what is unfinished; None: beside `path`.
    """
    partial = (work or path.parent) / f"{path.name}.{os.getpid()}.partial"
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(directory: Path, *, what: str) -> None:
    """Tries to make a file in a directory, and leaves none there.

    Raises:
      UserError: it cannot be made; `what` is how the message calls the place.
    """
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror}") from error


def check_possible(directory: Path, *, what: str) -> None:
    """Checks that a directory can be made, or written to where it is; makes none.

    Raises:
      UserError: something else is there or above it, or it cannot be written.
    """
    try:
        there = next(place for place in (directory, *directory.parents) if place.exists())
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror}") from error
    if not there.is_dir():
        raise UserError(f"{what} cannot be written: {there} is no directory")
    check_writable(there, what=what)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, see `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value: Any, *, compact: bool = False) -> None:
    """Writes a JSON file, see `replacing`; compact: on one line, in half the time and memory.

    Raises:
      ValueError: a number is not finite, which JSON has no word for.
    """
    layout: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 1}
    write_bytes(path, (json.dumps(value, allow_nan=False, **layout) + "\n").encode())


def read_json(path: Path, *, hint: str = "") -> Any:
    """What a JSON file holds.

    Raises:
      UserError: it is missing (`hint` says what to do then) or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing{hint and f': {hint}'}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def read_object(path: Path, *, hint: str = "") -> dict[str, Any]:
    """The object that a JSON file holds; raises as `read_json`."""
    content = read_json(path, hint=hint)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file for a moment, behind whoever holds it, in this process or another.

    Raises:
      UserError: the file system knows no locks.
      OSError: the file cannot be opened for writing.
    """
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{path} cannot be locked ({error.strerror}): workers share a directory on a file "
                "system with locks alone"
            ) from error
        yield


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds a lock file, which says who does; the lock ends with this process at the latest.

    This process may hold it already. Where the file system knows no locks, that is said, and
    nothing keeps others out.

    Raises:
      HeldError: another process holds it (which, where, since when).
      UserError: it cannot be written.
    """
    place = path.resolve()
    if place in _held:
        yield
        return
    try:
        stream = path.open("a+", encoding="utf-8")  # what another has written there stays
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HeldError(
                f"{path.parent} is in use by {_holder(stream)}: wait until that has ended, or take "
                "another directory"
            ) from error
        except OSError as error:
            print(
                f"note: {path} cannot be locked ({error.strerror}): nothing keeps a second process "
                f"out of {path.parent}",
                file=sys.stderr,
                flush=True,
            )
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        stream.truncate(0)
        stream.write(json.dumps(holder) + "\n")
        stream.flush()
        _held.add(place)
        try:
            yield
        finally:
            _held.remove(place)
            stream.truncate(0)


def _holder(stream: IO[str]) -> str:
    """Who holds a lock file, in words."""
    try:
        stream.seek(0)
        found = json.loads(stream.read())
        return f"process {found['process']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun
        return "another process"
