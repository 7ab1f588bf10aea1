"""Files that are there whole or not at all, and JSON in them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blindvalm_jax.errors import UserError


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
