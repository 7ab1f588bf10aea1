"""A directory of an object store and the one of this machine that is worked on in its place.

A file of the latter notes what was sent of it and what the store said of that. So what this
machine has not sent yet, and what another one has sent since, are known, and neither is lost.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from blindvalm_jax import files, runs
from blindvalm_jax.checkpoints import layout, quarantine
from blindvalm_jax.errors import UserError
from blindvalm_jax.stores import places
from blindvalm_jax.stores.connection import Connection
from blindvalm_jax.stores.steps import LAST, UNFINISHED, is_last, is_log, is_piece, whole

_NOTES = ".sent.json"  # by name: what the store says of the file, its time of change and size here
_NOT_HERE = (0, 0)  # in place of both, of a file that is there alone
OF_OTHERS = (0, -1)  # and of one that another process of this run has sent


class Store:
    """A directory of an object store, and what is there of the one here."""

    def __init__(self, address: str, *, process: int = 0) -> None:
        """Connects; process: which one of several that work apart this is.

        Raises:
          UserError: the library of the store or what it needs to log in is missing.
        """
        self.directory = places.of_run(address, process=process)
        self._store = Connection(
            address,
            advice=f" What is here is in {self.directory}, and the same command sends it",
        )
        self._files, self._root = self._store.files, self._store.root
        self._sent: dict[str, tuple[str, int, int]] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes of this machine out: what they bring would take our place.

        Raises:
          UserError: another process is there, or the directory cannot be made.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.directory} cannot be made: {error.strerror}; {places.VARIABLE} may name "
                "another place"
            ) from error
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
        with self._store.failing("read"):
            there, sent = self._there(), self._noted()
            self._drop_parts(sent)
            here = contents(self.directory)
            unsent = [name for name, kind in here.items() if kind_sent(sent, name) != kind]
            changed = any(
                not there.get(name) or name not in sent or there[name] != sent[name][0]
                for name in there.keys() | (sent.keys() & here.keys())
                if not _is_of_others(name, there, sent)
            )
            if changed:
                self._move_aside(unsent if there else here)
                unsent, here = [], contents(self.directory)
                for name in here.keys() - there.keys():
                    (self.directory / name).unlink()
            self._sent = {name: known for name, known in sent.items() if name in there}
            for name, mark in there.items():
                if name in here and name in sent and sent[name][0] == mark:
                    continue
                if whole(name, there):
                    self._fetch(name, mark)
                else:
                    self._note(name, (mark, *_NOT_HERE))
        self._drop_unfinished()
        return unsent

    def _drop_unfinished(self) -> None:
        for step in (self.directory / "checkpoints").glob("*"):
            if step.is_dir() and not (step / LAST).exists():
                shutil.rmtree(step)

    def _drop_parts(self, sent: Mapping[str, tuple[str, int, int]]) -> None:
        """Removes steps of which this process has a part, where they were not sent to the end."""
        for step in layout.steps(self.directory):
            checkpoint = layout.directory(self.directory) / str(step)
            unsent = f"checkpoints/{step}/{LAST}" not in sent
            if unsent and layout.is_apart(checkpoint) and layout.fault(checkpoint) is not None:
                shutil.rmtree(checkpoint)

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
            f"warning: {self._store.address} was written by another machine or emptied, and is "
            f"brought as it is; what was here and is not there was moved to {aside}",
            file=sys.stderr,
            flush=True,
        )

    def _there(self) -> dict[str, str]:
        """The marks of the files there."""
        return {
            name: found.mark
            for name, found in self._store.below().items()
            if name and not UNFINISHED.search(name)
        }

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
        self._write_notes()

    def _write_notes(self) -> None:
        files.write_json(self.directory / _NOTES, self._sent, compact=True)

    def send(self) -> None:
        """Sends what is new or changed, and removes there what is gone here.

        Raises:
          UserError: it cannot be written.
        """
        with self._store.failing("written"):
            here = contents(self.directory)
            here = {name: kind for name, kind in here.items() if whole(name, here)}
            self._put(here)
            gone = {
                name
                for name, known in self._sent.items()
                if name not in here and not (known[1:] == OF_OTHERS and whole(name, here))
            }
            # first what makes a step whole
            for name in sorted(gone, key=lambda name: (not is_last(name), name)):
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(f"{self._root}/{name}")
                self._note(name, None)

    def pause(self, seconds: float) -> float:
        """How long to wait before the next sending, which is due in so many seconds."""
        return seconds

    def add(self, names: Collection[str]) -> None:
        """Sends these files as far as they are new or changed, and removes nothing there.

        Raises:
          UserError: they cannot be written.
        """
        with self._store.failing("written"):
            here = contents(self.directory)
            self._put({n: kind for n, kind in here.items() if n in names and whole(n, here)})

    def _put(self, here: Mapping[str, tuple[int, int]]) -> None:
        new = [name for name, kind in here.items() if kind_sent(self._sent, name) != kind]
        for name in sorted(new, key=_order):
            if name == quarantine.RECORD and not any(map(is_last, (*here, *self._sent))):
                continue  # the step that it tells of was finished since: both are sent next time
            try:
                self._files.put_file(str(self.directory / name), f"{self._root}/{name}")
            except FileNotFoundError:  # a checkpoint that is kept no longer
                if (self.directory / name).exists():
                    raise
            else:
                mark = self._store.mark(f"{self._root}/{name}")
                self._note(name, (mark, *here[name]))


def kind_sent(known: Mapping[str, tuple[str, int, int]], name: str) -> tuple[int, int] | None:
    """Time of change and size here, when a file was sent or brought."""
    return known[name][1:] if name in known else None


def _is_of_others(
    name: str, there: Mapping[str, str], sent: Mapping[str, tuple[str, int, int]]
) -> bool:
    """Whether a file is what another process of this run has sent: not another machine's work."""
    if name not in there:
        return False
    if is_log(name):
        return True
    known = sent.get(name)
    return is_piece(name) and (not whole(name, there) if known is None else known[1:] == OF_OTHERS)


def _order(name: str) -> tuple[bool, bool, str]:
    """In which files are sent: what makes a step whole late, what tells that there is one last."""
    return name == quarantine.RECORD, is_last(name), name


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of what is to be kept, by its name in the directory."""
    found = {}
    for place, _, names in os.walk(directory):  # leaves out directories that are gone since
        for path in (Path(place, name) for name in names):
            name = path.relative_to(directory).as_posix()
            if not UNFINISHED.search(name):
                with contextlib.suppress(FileNotFoundError):  # gone since
                    about = path.stat()
                    found[name] = (about.st_mtime_ns, about.st_size)
    return found
