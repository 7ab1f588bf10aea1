"""Inputs that lie in an object store, brought to this machine before they are read.

Each address has a directory of its own here, so that two of them never share a file:

    .notes.json   by name: what the store said of a file when it was brought, its time and size here
    .lock         held while files are brought; others wait, and find what they need
    .reading      shared by the processes that read them: what changed at the address is brought
                  once they have ended
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from blindvalm_jax import files
from blindvalm_jax.data import output
from blindvalm_jax.errors import UserError
from blindvalm_jax.stores import downloads, places, steps
from blindvalm_jax.stores.connection import Connection, Found, MissingError

_NOTES, _READING, _WORK = ".notes.json", ".reading", ".work"
_SECONDS = 5.0  # between two writings of the notes: what a kill may cost
_TRIES = 3
_read: dict[Path, IO[str]] = {}  # held until this process ends: it reads whenever it likes

Notes = dict[str, list[str | int]]


def bring(address: str, *, glob: bool = False) -> str:
    """Brings what an address names, as far as it is not here; returns its path on this machine.

    glob: the address is a file's, or a glob of files, which is one here too. Otherwise a file's or
    a directory's, all of which is brought; of a run its newest checkpoint.

    Raises:
      UserError: it names nothing, the store cannot be read, or this machine has no room or no
        right to write; or it was changed, and another process here still reads what it was.
    """
    directory, name = places.of_input(address)
    store = Connection(address)
    try:
        with output.locked(directory), _sharing(directory):
            _bring(store, directory, name, glob=glob)
    except OSError as error:
        raise UserError(
            f"{address} cannot be brought to {directory}: {error.strerror or error}; "
            f"{places.VARIABLE} may name another place"
        ) from error
    return str(directory / name)


def _bring(store: Connection, directory: Path, name: str, *, glob: bool) -> None:
    scheme = name.partition("/")[0]
    notes = _noted(directory)
    for _ in range(_TRIES):
        there = _there(store, glob=glob)
        here = _here(directory, scheme)
        lacking = {
            path: found
            for path, found in there.items()
            if not found.mark or notes.get(path) != [found.mark, *here.get(path, ())]
        }
        gone = (here.keys() & notes.keys()) - there.keys()  # FAISS's index, say, was made here
        if not lacking and not gone:
            return
        _keep_readers_out(store, directory)
        for path in gone:
            (directory / scheme / path).unlink()
            del notes[path]
        if lacking:
            _fetch(store, lacking, notes, directory, scheme)
        if all(found.mark for found in there.values()):
            continue  # what was changed while it was brought is brought again
        return
    raise UserError(f"{store.address} is changed faster than it is brought: wait for its writer")


def _there(store: Connection, *, glob: bool) -> dict[str, Found]:
    """The files that the address names, by the library's names."""
    found: dict[str, Found] = {}
    with contextlib.suppress(MissingError):  # there is no such bucket
        if glob:
            found = store.matching()
            if not found and store.is_directory():
                raise UserError(
                    f"{store.address} is a directory: name the files in it, as in "
                    f"{store.address}/*.txt"
                )
        else:
            below = steps.to_read(store.below())
            root = store.root.strip("/")
            found = {f"{root}/{name}".rstrip("/"): of for name, of in below.items()}
    if not found:
        raise UserError(
            f"{store.address} names nothing: there is no such file, directory or bucket"
        )
    for name in found:
        if ".." in Path(name).parts:
            raise UserError(f"{store.address} holds {name}, which is no name of a file here")
    return found


def _fetch(
    store: Connection, lacking: Mapping[str, Found], notes: Notes, directory: Path, scheme: str
) -> None:
    print(f"{store.address}: {_described(lacking)} to {directory}", flush=True)
    notes |= {path: [found.mark, 0, 0] for path, found in lacking.items()}
    files.write_json(directory / _NOTES, notes, compact=True)  # so that none is forgotten
    last = time.monotonic()

    def done(path: str) -> None:
        nonlocal last
        notes[path] = [lacking[path].mark, *_kind(directory / scheme / path)]
        if time.monotonic() - last > _SECONDS:
            files.write_json(directory / _NOTES, notes, compact=True)
            last = time.monotonic()

    try:
        downloads.bring(
            store,
            lacking,
            to=lambda path: directory / scheme / path,
            work=directory / _WORK,
            done=done,
        )
    finally:
        files.write_json(directory / _NOTES, notes, compact=True)


def _described(lacking: Mapping[str, Found]) -> str:
    size = sum(found.size for found in lacking.values())
    return f"{len(lacking)} file{'s' * (len(lacking) > 1)}, {size / 1e6:,.1f} MB,"


def _noted(directory: Path) -> Notes:
    """What is noted of the files; nothing where that was damaged: they are brought again."""
    with contextlib.suppress(UserError):
        return files.read_object(directory / _NOTES)
    return {}


def _here(directory: Path, scheme: str) -> dict[str, tuple[int, int]]:
    """Time of change and size of the files that are here, by the library's names."""
    top = directory / scheme
    return {
        path.relative_to(top).as_posix(): _kind(path) for path in top.rglob("*") if path.is_file()
    }


def _kind(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_mtime_ns, state.st_size


def _keep_readers_out(store: Connection, directory: Path) -> None:
    """Takes the files for this process alone.

    Raises:
      UserError: another process reads them.
    """
    stream = _stream(directory)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{store.address} was changed, and another process on this machine still reads it as "
            f"it was, in {directory}: wait until that has ended, or name another place with "
            f"{places.VARIABLE}"
        ) from error


@contextlib.contextmanager
def _sharing(directory: Path) -> Iterator[None]:
    """Keeps others from changing the files afterwards, until this process ends or releases them."""
    held = directory in _read
    done = False
    try:
        yield
        done = True
    finally:
        if held or done:
            fcntl.flock(_stream(directory), fcntl.LOCK_SH)
        elif directory in _read:
            _read.pop(directory).close()


def _stream(directory: Path) -> IO[str]:
    if directory not in _read:
        _read[directory] = (directory / _READING).open("a")
    return _read[directory]


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Lets go of all that was brought inside."""
    before = set(_read)
    try:
        yield
    finally:
        for directory in set(_read) - before:
            _read.pop(directory).close()
