"""A run of several processes in an object store: each has a directory of its own, and its part.

The first sends the run as one process does, and what makes a step whole once all others have said,
through JAX's coordination service, that their pieces of its arrays are there. These and a log are
all that the others send; what they have besides is a copy of what the store holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # JAX has no public name for what processes tell each other

from blindvalm_jax import process_log
from blindvalm_jax.checkpoints import layout
from blindvalm_jax.console import warn
from blindvalm_jax.errors import UserError
from blindvalm_jax.stores.mirror import OF_OTHERS, Store, contents, kind_sent
from blindvalm_jax.stores.steps import LAST, is_last, is_log, is_piece, last_of, number, whole
from blindvalm_jax.survival import preemption

_KEY = "blindvalm_jax/sent"  # of the coordination service, and behind it the process
_POLL = 0.2  # seconds between two looks at what the others say
_PATIENCE = 1800.0  # seconds that the first process waits at the end while nothing comes
_SOON = 10.0  # and where it may be ending alone
_LONG = 300.0  # seconds after which a part that lacks is told of


class First(Store):
    """What the first process brings and sends."""

    def __init__(self, address: str) -> None:
        """Connects; raises as `Store`."""
        super().__init__(address)
        self._shared = False  # whether the others have begun, and have parts
        self._told: dict[int, Any] = {}
        self._lacking: dict[str, float] = {}  # since when a part of a step lacks, inf: said so

    def begin(self) -> None:
        """Makes the directory and the store the same, before the others bring theirs.

        Raises:
          UserError: the store cannot be read or written.
        """
        if self.bring():
            print(f"what was not sent of {self.directory} is sent first", flush=True)
        with preemption.kept():
            self.send()  # also removes what is left there of steps that were not sent to the end
        self._shared = True

    def send(self) -> None:
        """Sends as one process does, but what makes a step whole once all parts of it are there.

        Raises:
          UserError: it cannot be written.
        """
        if self._shared:
            self._told = _said()
        super().send()

    def _put(self, here: Mapping[str, tuple[int, int]]) -> None:
        if not self._shared:
            super()._put(here)
            return
        new = {name for name in self._new(here) if is_last(name)}
        self._remove([name for name in new if name in self._sent])
        super()._put({name: kind for name, kind in here.items() if name not in new})
        ready = self._ready(new, here)
        if ready:
            super()._put({name: k for name, k in here.items() if name in ready or name not in new})
        now = time.monotonic()
        lacking = {str(number(name)) for name in new - ready}
        self._lacking = {step: self._lacking.get(step, now) for step in lacking}
        self._warn_of_lacking(now)

    def _ready(self, new: Collection[str], here: Mapping[str, tuple[int, int]]) -> set[str]:
        """What may make steps whole: the others have sent their parts, and no piece lacks there."""
        told = {name for name in new if not self._silent(str(number(name)))}
        if not told:
            return set()
        there = self._there()
        ready = set()
        for name in told:
            checkpoint = layout.directory(self.directory) / str(number(name))
            pieces = layout.pieces(checkpoint)
            if pieces is not None and all(name.replace(LAST, x) in there for x in pieces):
                ready.add(name)
        self._note_parts(ready, here, there)
        return ready

    def _silent(self, step: str) -> list[int]:
        """The other processes that have not sent their part of a step."""
        identity = _identity(self.directory, step)
        return [
            other
            for other in range(1, jax.process_count())
            if not identity or self._told.get(other, {"steps": {}})["steps"].get(step) != identity
        ]

    def _note_parts(
        self, ready: set[str], here: Mapping[str, tuple[int, int]], there: Mapping[str, str]
    ) -> None:
        """Notes what the others have sent of steps, and of earlier ones that are kept no longer."""
        if not ready:
            return
        newest = max(map(number, ready))
        for name, mark in there.items():
            if not is_piece(name) or name in here or number(name) > newest:
                continue
            if not whole(name, here) or last_of(str(number(name))) in ready:
                self._sent[name] = (mark, *OF_OTHERS)
        self._write_notes()

    def _warn_of_lacking(self, now: float) -> None:
        for step, since in self._lacking.items():
            if now - since > _LONG:
                self._lacking[step] = math.inf
                warn(f"{self._lack(step)}; training goes on")

    def _lack(self, step: str) -> str:
        silent = ", ".join(map(str, self._silent(step)))
        return (
            f"step {step} is not whole in {self._store.address}: "
            + (f"process {silent} has not sent its part" if silent else "pieces are missing there")
            + f" (see the logs of processes in {process_log.DIRECTORY}/)"
        )

    def pause(self, seconds: float) -> float:
        """How long to wait before the next sending: not long where only another part lacks."""
        return min(seconds, 1.0) if self._lacking else seconds

    def finish(self, *, ended: bool, together: bool) -> None:
        """Waits for what the others send last, and says what lacks.

        Args:
          ended: training has come to its end.
          together: all processes are ending; else the others may wait for this one to be gone.

        Raises:
          UserError: the store cannot be written, or, of training that has ended, lacks a part.
        """
        try:
            _wait(_all_others_are_done, seconds=_PATIENCE if together else _SOON)
            if self._lacking:
                self.send()
            if self._lacking:
                said = "; ".join(map(self._lack, sorted(self._lacking, key=int)))
                said += ". What goes on there goes on from the newest step that is whole"
                if ended:
                    raise UserError(said)
                warn(said)
        finally:
            _say(0, steps={}, done=True)


class Other(Store):
    """What another process than the first brings and sends."""

    def __init__(self, address: str, *, process: int) -> None:
        """Connects; raises as `Store`."""
        super().__init__(address, process=process)
        self._process = process

    def begin(self) -> None:
        """Makes the directory what the store holds: nothing in it is this process's alone.

        Raises:
          UserError: the store cannot be read, or the directory not be written.
        """
        with self._bringing():
            there, sent = self._there(), self._noted()
            steps = map(str, layout.steps(self.directory))
            self._put_parts_aside([int(step) for step in steps if last_of(step) not in there])
            here = contents(self.directory)
            same = {
                name
                for name, kind in here.items()
                if name in there
                and whole(name, there)
                and kind_sent(sent, name) == kind
                and sent[name][0] == there[name]
            }
            log = process_log.name(self._process)
            if log in here and there.get(log) in (None, sent.get(log, ("",))[0]):
                same.add(log)  # what it said last is here alone
            for name in here.keys() - same:
                (self.directory / name).unlink()
            self._sent = {name: known for name, known in sent.items() if name in same}
            self._fetch(
                {name: x for name, x in there.items() if name not in same and whole(name, there)}
            )
            self._drop_unfinished()
            _drop_empty(self.directory)

    def send(self) -> None:
        """Sends this process's pieces of whole steps and its log, and says which steps are there.

        Raises:
          UserError: it cannot be written, or what is here not be read.
        """
        with self._sending():
            here = contents(self.directory)
            pieces = {x: k for x, k in here.items() if is_piece(x) and whole(x, here)}
            logs = {x: k for x, k in here.items() if is_log(x, process=self._process)}
            self._put(pieces | logs)
            for name in [x for x in self._sent if x not in here]:
                del self._sent[name]
        _say(self._process, steps=self._steps(here), done=False)

    def _write_notes(self) -> None:
        super()._write_notes()
        self._tell_progress()

    def _tell_progress(self) -> None:
        """So that the first one waits as long as something comes."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first is gone: told elsewhere
            said = _said().get(self._process, {"steps": {}})
            _say(self._process, steps=said["steps"], done=False, files=len(self._sent))

    def _steps(self, here: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """The steps of which all that is here was sent, and what tells them from others."""
        steps = {str(number(name)) for name in here if is_last(name)}
        lacking = {str(number(name)) for name in self._new(here) if is_piece(name)}
        return {step: _identity(self.directory, step) for step in steps - lacking}

    def finish(self, *, ended: bool, together: bool) -> None:
        """Says that no more comes; where all end, it waits for the first, which serves all."""
        del ended
        _say(self._process, steps=self._steps(contents(self.directory)), done=True)
        if together:
            _wait(lambda: 0 in _said(), seconds=None)


def of_this_process(address: str) -> First | Other:
    """The store as this process, one of several, brings from it and sends to it.

    Raises:
      UserError: the library of the store or what it needs to log in is missing.
    """
    process = jax.process_index()
    return Other(address, process=process) if process else First(address)


def _identity(run: Path, step: str) -> str:
    """What tells a step from another save of its number: a hash of the digests of its arrays."""
    try:
        found = layout.read_json(layout.directory(run) / step, layout.DIGESTS)
    except UserError:  # kept no longer
        return ""
    return hashlib.sha256(json.dumps(found.get("leaves"), sort_keys=True).encode()).hexdigest()


def _drop_empty(directory: Path) -> None:
    """Removes empty directories: of a checkpoint that is in quarantine they would tell."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _say(process: int, *, steps: Mapping[str, str], done: bool, files: int = 0) -> None:
    """Tells the others which steps this process has sent its part of, and whether that is all.

    files: that it has sent, told on the way.
    """
    said = json.dumps({"steps": dict(steps), "done": done, "files": files})
    _client().key_value_set(f"{_KEY}/{process}", said, allow_overwrite=True)


def _said() -> dict[int, Any]:
    """What each process has said last."""
    found = _client().key_value_dir_get(f"{_KEY}/")
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


def _client() -> Any:
    """What reaches the coordination service."""
    return distributed.global_state.client


def _all_others_are_done() -> bool:
    said = _said()
    return all(x in said and said[x]["done"] for x in range(1, jax.process_count()))


def _wait(holds: Callable[[], bool], *, seconds: float | None) -> None:
    """Waits until something holds, or until nobody has said anything new for so long."""
    begin, last = time.monotonic(), _said()
    while not holds() and (seconds is None or time.monotonic() - begin < seconds):
        time.sleep(_POLL)
        if (said := _said()) != last:
            begin, last = time.monotonic(), said
