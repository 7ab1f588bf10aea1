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

# A minute or more of reading, against 3 s and 310 MB to write a million hashes (all are written).
_BYTES_BETWEEN_SAVES = 1 << 35


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileHash:
    """Size and content of a file."""

    bytes: int
    sha256: str


def file_hashes(paths: Sequence[Path], *, known: Path | None = None) -> list[FileHash]:
    """Hashes of files; `known` is a file that keeps them, None: each is read.

    They are kept now and then while files are read, and before an error or an interrupt leaves.

    Raises:
      UserError: a file cannot be read.
    """
    kept = _load(known)
    entries = []
    unsaved = 0
    try:
        for path in paths:
            name, entry, read = _hash(path, kept)
            kept[name] = entry
            entries.append(entry)
            unsaved += read
            if unsaved > _BYTES_BETWEEN_SAVES:
                _save(known, kept)
                unsaved = 0
    finally:
        if unsaved:
            _save(known, kept)
    return [FileHash(bytes=int(entry[0]), sha256=str(entry[2])) for entry in entries]


def _hash(path: Path, kept: dict[str, list[int | str]]) -> tuple[str, list[int | str], int]:
    """The name that a file is kept under, what is kept of it, and a cost: 0 if it was kept."""
    with readable(path):
        name, state = str(path.resolve()), path.stat()
        stamp: list[int | str] = [state.st_size, state.st_mtime_ns]
        entry = kept.get(name)
        if entry is not None and entry[:2] == stamp:
            return name, entry, 0
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return name, [*stamp, digest], state.st_size + 1  # an empty file is kept too


def _save(known: Path | None, kept: dict[str, list[int | str]]) -> None:
    if known is not None:
        with contextlib.suppress(OSError):  # a read-only cache only costs time
            known.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(known, kept, compact=True)


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
