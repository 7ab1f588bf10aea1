"""Hashes of files; known ones are kept by path, size and time of change."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from blindvalm_jax import files
from blindvalm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileHash:
    """Size and content of a file."""

    bytes: int
    sha256: str


def file_hashes(paths: Sequence[Path], *, known: Path | None = None) -> list[FileHash]:
    """Hashes of files; `known` is a file that keeps them, None: each is read.

    Raises:
      UserError: a file cannot be read.
    """
    kept = _load(known)
    found: dict[str, list[int | str]] = {}
    for path in paths:
        with readable(path):
            name, state = str(path.resolve()), path.stat()
            stamp = [state.st_size, state.st_mtime_ns]
            entry = kept.get(name)
            if entry is None or entry[:2] != stamp:
                with path.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                entry = [*stamp, digest]
            found[name] = entry
    if known is not None and not found.items() <= kept.items():
        with contextlib.suppress(OSError):  # a read-only cache only costs time
            known.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(known, {**kept, **found})
    entries = [found[str(path.resolve())] for path in paths]
    return [FileHash(bytes=int(entry[0]), sha256=str(entry[2])) for entry in entries]


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what the system says of a file that cannot be read into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _load(known: Path | None) -> dict[str, list[int | str]]:
    """What is kept; nothing if there is no such file or it is damaged."""
    try:
        values = json.loads(known.read_bytes()) if known is not None else {}
        return {
            name: [int(size), int(time), str(digest)]
            for name, (size, time, digest) in values.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
