"""A directory of an object store and the one of this machine that is worked on in its place.

A file of the latter notes what was sent of it and what the store said of that. So what this
machine has not sent yet, and what another one has sent since, are known, and neither is lost.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from blindvalm_jax import files, runs
from blindvalm_jax.checkpoints import layout, quarantine
from blindvalm_jax.console import say_here
from blindvalm_jax.errors import UserError, first_line
from blindvalm_jax.stores import places
from blindvalm_jax.stores.connection import Connection, MissingError
from blindvalm_jax.stores.steps import (
    LAST,
    UNFINISHED,
    is_last,
    is_log,
    is_piece,
    last_of,
    number,
    step_of,
    whole,
)

Kind = TypeVar("Kind")
_NOTES = ".sent.json"  # by name: what the store says of the file, its time of change and size here
_NOT_HERE = (0, 0)  # in place of both, of a file that is there alone
_COMES, _GOES = (0, -2), (0, -3)  # and of one that is being brought, or sent
_AT_ONCE, _LARGE_AT_ONCE = 16, 4  # files that travel; of large ones libraries hold much in memory
_LARGE = 2**26  # bytes
_PARTS = 2  # steps of which parts are kept that were not sent
_NOTED = 2.0  # seconds between two writings of the notes
OF_OTHERS = (0, -1)  # and of one that another process of this run has sent


class Store:
    """A directory of an object store, and what is there of the one here."""

    def __init__(self, address: str, *, process: int = 0) -> None:
        """Connects; process: which one of several that work apart this is.

        Raises:
          UserError: the library of the store or what it needs to log in is missing.
        """
        self.directory = places.of_run(address, process=process)
        self._advice = (
            f" What is here is in {self.directory}, and the same command "
            f"{'goes on from what is there' if process else 'sends it'}"
        )
        self._store = Connection(address, advice=self._advice)
        self._root = self._store.root
        self._sent: dict[str, tuple[str, int, int]] = {}
        self._notes = threading.Lock()
        self._written = 0.0  # when the notes were

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes of this machine out: what they bring would take our place.

        Raises:
          UserError: another process is there, or the directory cannot be made.
        """
        with self._bringing():
            self.directory.mkdir(parents=True, exist_ok=True)
        with files.held(self.directory / runs.LOCK):
            yield

    def bring(self) -> list[str]:
        """Makes the directory here what is there, without steps that were not sent to the end.

        Only what differs travels. What is left of such steps there goes when next is sent. If
        nothing was changed there since the last sending, what was not sent stays, and its names are
        returned; otherwise it is moved aside.

        Raises:
          UserError: the store cannot be read, or the directory not be written.
        """
        with self._bringing():
            there, sent = self._there(), self._noted()
            self._drop_parts(there)
            here = contents(self.directory)
            unsent = [
                name
                for name, kind in here.items()
                if kind_sent(sent, name) not in (kind, _COMES if name in there else kind)
            ]
            changed = any(
                not there.get(name) or name not in sent or there[name] != sent[name][0]
                for name in there.keys() | (sent.keys() & here.keys())
                if not _is_of_this_run(name, there, sent)
            )
            if changed:
                self._move_aside(unsent if there else here)
                unsent, here = [], contents(self.directory)
                for name in here.keys() - there.keys():
                    (self.directory / name).unlink()
            self._sent = {name: known for name, known in sent.items() if name in there}
            differs = [
                name
                for name, mark in there.items()
                if name not in here
                or name not in unsent
                and (kind_sent(sent, name) == _COMES or sent[name][0] != mark)
            ]
            for name in differs:
                if not whole(name, there):
                    self._sent[name] = (there[name], *_NOT_HERE)
            self._fetch({name: there[name] for name in differs if whole(name, there)})
            self._drop_unfinished()
        return unsent

    def _bringing(self) -> contextlib.AbstractContextManager[None]:
        return self._here("brought", f"; {places.VARIABLE} may name another place")

    def _sending(self) -> contextlib.AbstractContextManager[None]:
        return self._here("sent", f".{self._advice}")

    @contextlib.contextmanager
    def _here(self, what: str, advice: str) -> Iterator[None]:
        """Turns what a file of this machine says into one line."""
        try:
            yield
        except BrokenPipeError:  # of standard output
            raise
        except OSError as error:
            place = error.filename2 or error.filename or self.directory
            raise UserError(
                f"{self._store.address} cannot be {what}: {place}: "
                f"{error.strerror or first_line(error)}{advice}"
            ) from error

    def _drop_unfinished(self) -> None:
        for step in (self.directory / "checkpoints").glob("*"):
            if step.is_dir() and not (step / LAST).exists():
                shutil.rmtree(step)

    def _drop_parts(self, there: Collection[str]) -> None:
        """Puts aside steps of which this process has a part, and which are not whole there."""
        parts = [
            step
            for step in layout.steps(self.directory)
            if last_of(str(step)) not in there
            and layout.is_apart(checkpoint := layout.directory(self.directory) / str(step))
            and layout.fault(checkpoint) is not None
        ]
        self._put_parts_aside(parts)
        if parts and not any(map(is_last, there)) and quarantine.RECORD not in there:
            # It tells of these steps: the run begins anew.
            (self.directory / quarantine.RECORD).unlink(missing_ok=True)

    def _put_parts_aside(self, steps: Iterable[int]) -> None:
        """Keeps what this process has of these steps beside the directory, of the newest two.

        Nobody can go on from it alone; where the store has nothing, all parts together are a step.
        """
        place = self.directory.with_name(f"{self.directory.name}.unsent-part")
        for step in sorted(steps):
            place.mkdir(exist_ok=True)
            shutil.rmtree(place / str(step), ignore_errors=True)
            os.rename(layout.directory(self.directory) / str(step), place / str(step))
            say_here(
                f"warning: step {step} is not whole in {self._store.address}: what this process "
                f"has of it was moved to {place}"
            )
            kept = sorted(int(path.name) for path in place.iterdir() if path.name.isdecimal())
            for old in kept[:-_PARTS]:
                shutil.rmtree(place / str(old))

    def _fetch(self, marks: Mapping[str, str]) -> None:
        """Brings files; what was brought is noted, so that another try goes on from there."""

        def fetch(name: str) -> None:
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as partial:
                self._store.get(f"{self._root}/{name}", partial)
            self._note(name, (marks[name], path.stat().st_mtime_ns, path.stat().st_size))

        self.directory.mkdir(parents=True, exist_ok=True)
        self._sent.update({name: (mark, *_COMES) for name, mark in marks.items()})
        self._write_notes()
        self._each(fetch, marks)

    def _each(
        self, work: Callable[[str], None], names: Iterable[str], *, at_once: int = _AT_ONCE
    ) -> None:
        """Does what there is to do with each file, with several at once; then notes are written.

        Raises the first error, once what is under way has ended.
        """
        try:
            with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
                collections.deque(pool.map(work, names), maxlen=0)
        finally:
            self._write_notes()

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
        """Notes that a file is the same here and there, or on neither side.

        Written now and then: if some are lost, their files travel once more.
        """
        with self._notes:
            self._sent.pop(name, None)
            if known is not None:
                self._sent[name] = known
        if time.monotonic() - self._written > _NOTED:
            self._write_notes()

    def _write_notes(self) -> None:
        with self._notes:
            files.write_json(self.directory / _NOTES, self._sent, compact=True)
            self._written = time.monotonic()

    def send(self) -> None:
        """Sends what is new or changed, and removes there what is gone here.

        What is there always holds a whole step, once it did.

        Raises:
          UserError: it cannot be written, or what is here not be read.
        """
        with self._sending():
            self._put(_of_whole_steps(contents(self.directory)))
            self._remove(self._gone(_of_whole_steps(contents(self.directory))))

    def _gone(self, here: Mapping[str, tuple[int, int]]) -> list[str]:
        """What is there and no longer here; the newest whole step stays, unless it is bad."""
        sent = (name for name, known in self._sent.items() if known[1:] != _GOES and is_last(name))
        newest = str(max(map(number, sent), default=""))
        kept = None if last_of(newest) in here or self._is_bad(newest, here) else newest
        return [
            name
            for name, known in self._sent.items()
            if name not in here
            and not (known[1:] == OF_OTHERS and whole(name, here))
            and (kept is None or step_of(name) != kept)
        ]

    def _is_bad(self, step: str, here: Mapping[str, tuple[int, int]]) -> bool:
        """Whether what is there of a step, not an earlier one of its number, is in quarantine."""
        place = re.compile(rf"({quarantine.DIRECTORY}/{step}(\.\d+)?)/")
        places = {found[1] for name in here if (found := place.match(name))}
        sent = kind_sent(self._sent, last_of(step))
        return any(here.get(f"{place}/{LAST}", sent) == sent for place in places)

    def _remove(self, names: Collection[str]) -> None:
        def remove(name: str) -> None:
            with contextlib.suppress(MissingError):
                self._store.remove(f"{self._root}/{name}")
            self._note(name, None)

        for group in (filter(is_last, names), itertools.filterfalse(is_last, names)):
            if some := list(group):  # first what makes steps whole
                self._each(remove, some)

    def pause(self, seconds: float) -> float:
        """How long to wait before the next sending, which is due in so many seconds."""
        return seconds

    def add(self, names: Collection[str]) -> None:
        """As `send`, these files alone, and removes nothing there."""
        with self._sending():
            here = contents(self.directory)
            self._put({n: kind for n, kind in here.items() if n in names and whole(n, here)})

    def _put(self, here: Mapping[str, tuple[int, int]]) -> None:
        new = self._new(here)
        # What is there of a step that was saved anew is no step meanwhile.
        self._remove([name for name in new if is_last(name) and name in self._sent])

        def put(name: str) -> None:
            try:
                self._store.put(self.directory / name, f"{self._root}/{name}")
            except (FileNotFoundError, MissingError):  # a checkpoint that is kept no longer
                if (self.directory / name).exists():
                    raise
            else:
                mark = self._store.mark(f"{self._root}/{name}")
                self._note(name, (mark, *here[name]))

        for group in _in_order(new):
            if group == [quarantine.RECORD] and not any(map(is_last, (*here, *self._sent))):
                continue  # the step that it tells of was finished since: both are sent next time
            # Noted first: whoever finds them there sees that they are no other machine's work.
            self._sent.update(dict.fromkeys(group, ("", *_GOES)))
            self._write_notes()
            large = [name for name in group if here[name][1] >= _LARGE]
            self._each(put, large, at_once=_LARGE_AT_ONCE)
            self._each(put, [name for name in group if here[name][1] < _LARGE])

    def _new(self, here: Mapping[str, tuple[int, int]]) -> list[str]:
        """What was not sent as it is here."""
        return [name for name, kind in here.items() if kind_sent(self._sent, name) != kind]


def kind_sent(known: Mapping[str, tuple[str, int, int]], name: str) -> tuple[int, int] | None:
    """Time of change and size here, when a file was sent or brought."""
    return known[name][1:] if name in known else None


def _is_of_this_run(
    name: str, there: Mapping[str, str], sent: Mapping[str, tuple[str, int, int]]
) -> bool:
    """Whether a file there is no other machine's work though this process has not sent it.

    So is what another process of the run has sent, and of a step that is not whole all.
    """
    kind = kind_sent(sent, name)
    if kind == _GOES or name not in there:
        return kind == _GOES
    return is_log(name) or not whole(name, there) or (is_piece(name) and kind == OF_OTHERS)


def _of_whole_steps(here: Mapping[str, Kind]) -> dict[str, Kind]:
    return {name: kind for name, kind in here.items() if whole(name, here)}


def _in_order(names: Iterable[str]) -> list[list[str]]:
    """Files in groups that are sent one after the other.

    Of checkpoints the newest comes first, what makes it whole behind all else of it. Last what
    tells that there is a checkpoint.
    """
    groups = collections.defaultdict(list)
    for name in names:
        step = step_of(name)
        rank = (2, 0) if name == quarantine.RECORD else (0, 0) if step is None else (1, -int(step))
        groups[*rank, is_last(name)].append(name)
    return [groups[key] for key in sorted(groups)]


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
