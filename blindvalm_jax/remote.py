"""A run whose directory is in an object store: worked on here, kept there.

    python -m blindvalm_jax.remote gs://BUCKET/RUN    # brings it, prints where it is then

fsspec knows the stores. Orbax, locks, renames and appended lines need a file system, so the run is
a directory of this machine that is brought first, and sent while it is trained and at its end.

A file of that directory notes what was sent of it and what the store said of that. So what this
machine has not sent yet, and what another one has sent since, are known, and neither is lost.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import jax

from blindvalm_jax import files, runs
from blindvalm_jax.checkpoints import quarantine
from blindvalm_jax.errors import UserError, first_line, run_main
from blindvalm_jax.survival import preemption

SCHEMES = ("gs", "s3")  # of the stores that are known
_LAST = "_CHECKPOINT_METADATA"  # Orbax's, in each step: sent when all else of the step is there
_SECONDS = 60.0  # between two sendings
_NOTES = ".sent.json"  # by name: what the store says of the file, its time of change and size here
# What is never sent: locks, notes, what is being written, and a step that Orbax has not finished.
_UNFINISHED = re.compile(
    r"\.lock$|\.partial$|^\.sent\.json$|(^|/)checkpoints/[^/]*[^/0-9][^/]*/",
)
# By what stores tell one content from another; the first that there is.
_MARKS = ("generation", "ETag", "etag", "mtime", "created")


def directory_of(address: str) -> Path:
    """Where the run of an address is worked on: the same place on every machine, under TMPDIR.

    Raises:
      UserError: it is no directory of a store that is known.
    """
    scheme, _, place = address.partition("://")
    known = scheme in SCHEMES and re.fullmatch("[^/]+/.+", place)
    if not known or ".." in PurePosixPath(address).parts:
        raise UserError(
            f"--workdir={address}: expected gs://BUCKET/DIRECTORY, s3://BUCKET/DIRECTORY or a path"
        )
    return Path(tempfile.gettempdir()) / "blindvalm" / scheme / place.strip("/")


@contextlib.contextmanager
def kept(address: str, *, seconds: float = _SECONDS) -> Iterator[Path]:
    """Brings a run here, sends what becomes of it every so often, and at the end.

    Nothing keeps a second machine from the same address.

    Raises:
      UserError: the store cannot be reached, read or written, or this is one of several processes.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"--workdir={address}: several processes write their checkpoints to one directory: "
            "mount the bucket on all of their machines (gcsfuse, mount-s3) and give the path"
        )
    store = Store(address)
    with store.held():
        if store.bring():
            print(f"what was not sent of {store.directory} is sent first", flush=True)
            with preemption.kept():
                store.send()
        print(f"{address} is worked on in {store.directory}", flush=True)
        with _sending(store, seconds):
            yield store.directory


@contextlib.contextmanager
def _sending(store: Store, seconds: float) -> Iterator[None]:
    """Sends every so often, and at the end, however that comes."""
    stop = threading.Event()

    def send_now_and_then() -> None:
        while not stop.wait(seconds):
            try:
                store.send()
            except UserError as error:  # it may come back: what is here is sent then
                print(f"warning: {error}; tried again in {seconds:g} s", flush=True)

    sender = threading.Thread(target=send_now_and_then, daemon=True)
    sender.start()
    try:
        yield
    finally:
        with preemption.kept():
            stop.set()
            sender.join()
            store.send()


class Store:
    """A directory of an object store, and what is there of the one here."""

    def __init__(self, address: str) -> None:
        """Connects.

        Raises:
          UserError: the library of the store or what it needs to log in is missing.
        """
        self.directory = directory_of(address)
        self._address = address.rstrip("/")
        scheme = self._address.partition(":")[0]
        with self._failing("reached"):
            try:
                self._files = fsspec.filesystem(scheme)
            except ImportError as error:
                raise UserError(
                    f"{scheme}:// needs a library: pip install 'blindvalm_jax[{scheme}]'"
                ) from error
        self._root = str(self._files._strip_protocol(self._address))
        self._sent: dict[str, tuple[str, int, int]] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes of this machine out: what they bring would take our place.

        Raises:
          UserError: another process is there.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with files.held(self.directory / runs.LOCK):
            yield

    def bring(self) -> list[str]:
        """Makes the directory here what is there, without steps that were not sent to the end.

        Only what differs travels. What is left of such steps there goes when next is sent. If
        nothing was changed there since the last sending, what was not sent stays, and its names are
        returned; otherwise it is moved aside.

        Raises:
          UserError: the store cannot be read.
        """
        with self._failing("read"):
            there, here, sent = self._there(), _contents(self.directory), self._noted()
            unsent = [name for name, kind in here.items() if _kind(sent, name) != kind]
            changed = any(
                not there.get(name) or name not in sent or there[name] != sent[name][0]
                for name in there.keys() | (sent.keys() & here.keys())
            )
            if changed:
                self._move_aside(unsent if there else here)
                unsent, here = [], _contents(self.directory)
                for name in here.keys() - there.keys():
                    (self.directory / name).unlink()
            self._sent = {name: known for name, known in sent.items() if name in there}
            for name, mark in there.items():
                if name in here and name in sent and sent[name][0] == mark:
                    continue
                if _whole(name, there):
                    self._fetch(name, mark)
                else:
                    self._note(name, (mark, 0, 0))
        for step in (self.directory / "checkpoints").glob("*"):
            if step.is_dir() and not (step / _LAST).exists():
                shutil.rmtree(step)
        return unsent

    def _fetch(self, name: str, mark: str) -> None:
        """Brings a file; what was brought is noted, so that another try goes on from there."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as partial:
            self._files.get_file(f"{self._root}/{name}", str(partial))
        self._note(name, (mark, path.stat().st_mtime_ns, path.stat().st_size))

    def _move_aside(self, names: Iterable[str]) -> None:
        """Moves files, and all of the steps they are of, to a directory beside this one."""
        tops = {
            "/".join(name.split("/")[:2]) if name.startswith("checkpoints/") else name
            for name in names
        }
        if not tops:
            return
        place = self.directory.with_name(
            f"{self.directory.name}.unsent-{time.strftime('%Y%m%dT%H%M%S')}"
        )
        count = 1
        while (aside := place if count == 1 else Path(f"{place}.{count}")).exists():
            count += 1
        for top in sorted(tops):
            (aside / top).parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.directory / top, aside / top)
        print(
            f"warning: {self._address} was written by another machine or emptied, and is brought "
            f"as it is; what was here and is not there was moved to {aside}",
            file=sys.stderr,
            flush=True,
        )

    def _there(self) -> dict[str, str]:
        """The marks of the files there."""
        self._files.invalidate_cache()
        found = self._files.find(self._root, detail=True)
        start = len(self._root.strip("/")) + 1
        marks = {name.strip("/")[start:]: _mark(info) for name, info in found.items()}
        return {name: mark for name, mark in marks.items() if name and not _UNFINISHED.search(name)}

    def _noted(self) -> dict[str, tuple[str, int, int]]:
        """What the directory notes of what was sent or brought; nothing where it was emptied."""
        path = self.directory / _NOTES
        if not path.exists():
            return {}
        return {name: tuple(known) for name, known in files.read_object(path).items()}

    def _note(self, name: str, known: tuple[str, int, int] | None) -> None:
        """Notes that a file is the same here and there, or on neither side."""
        self._sent.pop(name, None)
        if known is not None:
            self._sent[name] = known
        files.write_json(self.directory / _NOTES, self._sent, compact=True)

    def send(self) -> None:
        """Sends what is new or changed, and removes there what is gone here.

        Raises:
          UserError: it cannot be written.
        """
        with self._failing("written"):
            here = _contents(self.directory)
            here = {name: kind for name, kind in here.items() if _whole(name, here)}
            self._put(here)
            # first what makes a step whole
            gone = self._sent.keys() - here.keys()
            for name in sorted(gone, key=lambda name: (not _is_last(name), name)):
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(f"{self._root}/{name}")
                self._note(name, None)

    def add(self, names: Collection[str]) -> None:
        """Sends these files as far as they are new or changed, and removes nothing there.

        Raises:
          UserError: they cannot be written.
        """
        with self._failing("written"):
            here = _contents(self.directory)
            self._put({n: kind for n, kind in here.items() if n in names and _whole(n, here)})

    def _put(self, here: Mapping[str, tuple[int, int]]) -> None:
        new = [name for name, kind in here.items() if _kind(self._sent, name) != kind]
        for name in sorted(new, key=_order):
            if name == quarantine.RECORD and not any(map(_is_last, (*here, *self._sent))):
                continue  # the step that it tells of was finished since: both are sent next time
            try:
                self._files.put_file(str(self.directory / name), f"{self._root}/{name}")
            except FileNotFoundError:  # a checkpoint that is kept no longer
                if (self.directory / name).exists():
                    raise
            else:
                mark = _mark(self._files.info(f"{self._root}/{name}"))
                self._note(name, (mark, *here[name]))

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Turns what the store says into one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each library has its own, down to those of the network
            raise UserError(
                f"{self._address} cannot be {what}: {type(error).__name__}: {first_line(error)}. "
                "Is the bucket there, and this machine logged in (gs: gcloud auth "
                f"application-default login, s3: aws configure)? What is here is in "
                f"{self.directory}, and the same command sends it"
            ) from error


def _mark(info: Mapping[str, Any]) -> str:
    """What differs as soon as a file there is written again; empty where the store does not say."""
    key, value = next(((key, info[key]) for key in _MARKS if info.get(key)), ("", ""))
    if isinstance(value, datetime.datetime):  # of one file; in a list the same as a number
        value = value.timestamp()
    return f"{key} {value}" if key else ""


def _kind(known: Mapping[str, tuple[str, int, int]], name: str) -> tuple[int, int] | None:
    """Time of change and size here, when a file was sent or brought."""
    return known[name][1:] if name in known else None


def _is_last(name: str) -> bool:
    return name.startswith("checkpoints/") and name.endswith(f"/{_LAST}")


def _order(name: str) -> tuple[bool, bool, str]:
    """In which files are sent: what makes a step whole late, what tells that there is one last."""
    return name == quarantine.RECORD, _is_last(name), name


def _contents(directory: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of what is to be kept, by its name in the directory."""
    found = {}
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        with contextlib.suppress(FileNotFoundError):  # gone since
            if path.is_file() and not _UNFINISHED.search(name):
                found[name] = (path.stat().st_mtime_ns, path.stat().st_size)
    return found


def _whole(name: str, among: Mapping[str, Any]) -> bool:
    """Whether a file is of no step of which the last file is missing."""
    parts = PurePosixPath(name).parts
    if len(parts) < 3 or parts[0] != "checkpoints":
        return True
    return f"checkpoints/{parts[1]}/{_LAST}" in among


def main(argv: Sequence[str]) -> int:
    """Brings the run that the command line names."""
    if len(argv) != 2:
        raise UserError(f"one address is needed, gs://... or s3://..., got {len(argv) - 1}")
    store = Store(argv[1])
    with store.held():
        unsent = store.bring()
        try:
            store.add(unsent)
        except UserError as error:  # reading alone may be allowed
            print(f"warning: {error}", file=sys.stderr, flush=True)
    if not (store.directory / "run.json").exists():
        raise UserError(f"{argv[1]} holds no run: there is no run.json")
    print(store.directory)
    return 0


if __name__ == "__main__":
    run_main(main, takes_addresses=["argument"])
