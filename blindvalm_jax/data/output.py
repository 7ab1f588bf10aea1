"""A directory that is written in parts: claimed by a marker, held by one process, gone on with.

Nothing is deleted but files of the names given here, in a directory that carries the marker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.errors import UserError

MARKER = ".blindvalm_windows"
LOCK = ".lock"
SHARDS = "windows-*.array_record"
_PLAN = "plan.json"
_WORK = (
    *("*-*.npz", "*.array_record.json", "*.npy.json", "*.jsonl.json"),
    *("plan.txt", _PLAN, "*.partial"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What a directory is for: its marker, who writes it, and what it holds, as messages say it."""

    marker: str
    maker: str
    content: str


WINDOWS = Kind(marker=MARKER, maker="prepare", content="windows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A finished file: its name in its directory, size and hash."""

    file: str
    bytes: int
    sha256: str


def claim(out: Path, sources: Iterable[Path], *, kind: Kind = WINDOWS) -> None:
    """Makes `out` a directory of a kind, whose maker may write and delete its own files there.

    Raises:
      UserError: `out` holds something else, or one of the sources, or cannot be made.
    """
    whole = out.resolve()
    for source in sources:
        if source.resolve().is_relative_to(whole):
            raise UserError(
                f"the text {source} lies under {out}, where {kind.content} are to be written: "
                "choose another directory for them"
            )
    _check_own(out, kind)
    if not (out / kind.marker).exists():
        with locked(out):
            _check_own(out, kind)
            try:
                (out / kind.marker).write_text(
                    f"Files here are written and deleted by {kind.maker}.\n"
                )
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


@contextlib.contextmanager
def writing(out: Path) -> Iterator[Path]:
    """Holds a claimed directory, gives its work directory; files that fail are one line."""
    try:
        with locked(out):
            yield out / "work"
    except OSError as error:
        raise UserError(
            f"cannot finish {out}: {error}; run the same again when that is mended, it goes on "
            "where it stopped"
        ) from error


def keep_plan(
    work: Path, plan: Mapping[str, Any], rounding: Mapping[str, Any] | None = None
) -> None:
    """Writes what determines the files of a directory, or checks it where a run was broken off.

    rounding: what decides how the numbers in them are rounded; until a file is finished it may
    change, as nothing holds the old one. What an older plan does not say of it is not compared.

    Raises:
      UserError: what was begun there is of another plan.
    """
    path = work / _PLAN
    if path.exists() and not any(work.glob("*.npy.json")):
        check_same(plan, files.read_object(path), directory=work.parent)
        path.unlink()
    whole = {**plan, **(rounding or {})}
    if path.exists():
        there = files.read_object(path)
        unknown = [name for name in rounding or {} if name not in there]
        if unknown:
            print(
                f"note: {path} does not say {', '.join(unknown)} of what is finished there; that "
                "is not compared",
                file=sys.stderr,
                flush=True,
            )
        known = {name: value for name, value in whole.items() if name not in unknown}
        check_same(known, there, directory=work.parent)
        return
    work.mkdir(exist_ok=True)
    files.write_json(path, whole)


def check_same(wanted: Mapping[str, Any], found: Mapping[str, Any], *, directory: Path) -> None:
    """Refuses a directory whose record differs from `wanted`, with the first field that does.

    Of a field that is a table, what the record lacks or has as None is not compared: it is older.

    Raises:
      UserError: a field of `wanted` is missing in `found` or has another value there.
    """
    for name, value in wanted.items():
        there = compared = found.get(name)
        if isinstance(value, dict) and isinstance(there, dict):
            compared = {**value, **{key: x for key, x in there.items() if x is not None}}
        if json.dumps(compared, sort_keys=True) != json.dumps(value, sort_keys=True):
            raise UserError(
                f"{directory} was made with {name} {there!r}, expected {value!r}: choose another "
                "directory or delete it"
            )


def find_file(path: Path, work: Path) -> FileRecord | None:
    """What `write_file` recorded of a file that is there, whole as far as its size tells."""
    try:
        found = FileRecord(**json.loads((work / f"{path.name}.json").read_bytes()))
        return found if path.stat().st_size == found.bytes else None
    except (OSError, ValueError, TypeError):
        return None


def write_file(path: Path, work: Path, content: bytes | memoryview) -> FileRecord:
    """Writes a file, which appears whole, and a record of it in `work`."""
    digest = hashlib.sha256(content).hexdigest()
    found = FileRecord(file=path.name, bytes=len(content), sha256=digest)
    with files.replacing(path, work=work) as partial:
        partial.write_bytes(content)
        files.write_json(work / f"{path.name}.json", dataclasses.asdict(found))
    return found


def npy(values: np.ndarray) -> memoryview:
    """An array as the content of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=False)
    return stream.getbuffer()


def check_files(directory: Path, records: Iterable[FileRecord], *, content: bool = False) -> None:
    """Refuses a directory in which a recorded file is missing or of another size.

    content: read every file and compare its hash too.
    """
    for record in records:
        path = directory / record.file
        if not path.is_file():
            raise UserError(f"{path} is missing: delete {directory} and make it again")
        if path.stat().st_size != record.bytes:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {record.bytes}: "
                f"delete {directory} and make it again"
            )
        if content:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != record.sha256:
                raise UserError(
                    f"{path} has sha256 {found}, the manifest says {record.sha256}: delete "
                    f"{directory} and make it again"
                )


def remove_shards(directory: Path) -> None:
    """Deletes the shards in the directory of a split; whatever else is there stays."""
    for path in directory.glob(SHARDS):
        path.unlink()


def remove_work(work: Path) -> None:
    """Deletes the unfinished and intermediate files, and their directory if nothing is left.

    Another process that found the work finished may be deleting the same files.
    """
    with contextlib.suppress(FileNotFoundError):  # the directory is gone
        for pattern in _WORK:
            for path in work.glob(pattern):
                path.unlink(missing_ok=True)
        if not any(work.iterdir()):
            work.rmdir()


def _check_own(out: Path, kind: Kind) -> None:
    try:
        # The listing comes first: another process may write the marker and go on meanwhile.
        names = [path.name for path in out.iterdir()] if out.exists() else []
        own = (out / kind.marker).exists()
    except OSError as error:
        raise UserError(f"cannot use the directory {out}: {error}") from error
    others = sorted(set(names) - {LOCK})
    if others and not own:
        raise UserError(
            f"{out} is not empty and was not made by {kind.maker} (it holds {others[0]}, and no "
            f"{kind.marker}): choose a new or an empty directory"
        )
