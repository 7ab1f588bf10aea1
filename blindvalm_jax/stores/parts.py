"""A run of several processes in an object store: each has a directory of its own, and its part.

The first sends the run as one process does, and what makes a step whole once all others have said,
through JAX's coordination service, that their pieces of its arrays are there. These and a log are
all that the others send; what they have besides is a copy of what the store holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # JAX has no public name for what processes tell each other

from blindvalm_jax.console import warn
from blindvalm_jax.stores.mirror import OF_OTHERS, Store, contents, kind_sent
from blindvalm_jax.stores.steps import is_last, is_log, is_piece, last_of, step_of, whole
from blindvalm_jax.survival import preemption

_KEY = "blindvalm_jax/sent"  # of the coordination service, and behind it the process
_POLL = 0.2  # seconds between two looks at what the others say
_PATIENCE = 600.0  # seconds that the first process waits at the end for what the others send
_SOON = 10.0  # and where it may be ending alone


class First(Store):
    """What the first process brings and sends."""

    def __init__(self, address: str) -> None:
        """Connects; raises as `Store`."""
        super().__init__(address)
        self._shared = False  # whether the others have begun, and have parts
        self._told: dict[int, Any] = {}
        self._lacking: set[str] = set()  # steps of which a part lacks

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
        new = {x for x in here if is_last(x) and kind_sent(self._sent, x) != here[x]}
        super()._put({name: kind for name, kind in here.items() if name not in new})
        others = range(1, jax.process_count())
        ready = {x for x in new if all(step_of(x) in self._steps_of(other) for other in others)}
        if ready:
            self._note_parts(ready, here)
            super()._put({name: k for name, k in here.items() if name in ready or name not in new})
        self._lacking = {step for x in new - ready if (step := step_of(x)) is not None}

    def _steps_of(self, other: int) -> list[str]:
        return self._told[other]["steps"] if other in self._told else []

    def _note_parts(self, ready: set[str], here: Mapping[str, tuple[int, int]]) -> None:
        """Notes what the others have sent of steps, and of earlier ones that are kept no longer."""
        newest = max(map(_number, ready))
        for name, mark in self._there().items():
            if not is_piece(name) or name in here or _number(name) > newest:
                continue
            if not whole(name, here) or last_of(str(_number(name))) in ready:
                self._sent[name] = (mark, *OF_OTHERS)
        self._write_notes()

    def pause(self, seconds: float) -> float:
        """How long to wait before the next sending: not long where only another part lacks."""
        return min(seconds, 1.0) if self._lacking else seconds

    def finish(self, *, together: bool) -> None:
        """Waits for what the others send last, and says what lacks; together: all are ending.

        Raises:
          UserError: the store cannot be written.
        """
        try:
            _wait(_all_others_are_done, seconds=_PATIENCE if together else _SOON)
            if self._lacking:
                self.send()
            if self._lacking:
                warn(
                    f"step {', '.join(sorted(self._lacking, key=int))} is not whole in "
                    f"{self._store.address}: another process has not sent its part; what goes on "
                    "there goes on from the checkpoint before"
                )
        finally:
            _say(0, steps=[], done=True)


class Other(Store):
    """What another process than the first brings and sends."""

    def __init__(self, address: str, *, process: int) -> None:
        """Connects; raises as `Store`."""
        super().__init__(address, process=process)
        self._process = process

    def begin(self) -> None:
        """Makes the directory what the store holds: nothing in it is this process's alone.

        Raises:
          UserError: the store cannot be read.
        """
        with self._store.failing("read"):
            there, here, sent = self._there(), contents(self.directory), self._noted()
            same = {
                name
                for name, kind in here.items()
                if name in there
                and whole(name, there)
                and kind_sent(sent, name) == kind
                and sent[name][0] == there[name]
            }
            for name in here.keys() - same:
                (self.directory / name).unlink()
            self._sent = {name: known for name, known in sent.items() if name in same}
            self._write_notes()
            for name, mark in there.items():
                if name not in same and whole(name, there):
                    self._fetch(name, mark)
        self._drop_unfinished()
        _drop_empty(self.directory)

    def send(self) -> None:
        """Sends this process's pieces of whole steps and its log, and says which steps are there.

        Raises:
          UserError: it cannot be written.
        """
        with self._store.failing("written"):
            here = contents(self.directory)
            pieces = {x: k for x, k in here.items() if is_piece(x) and whole(x, here)}
            logs = {x: k for x, k in here.items() if is_log(x, process=self._process)}
            self._put(pieces | logs)
            for name in [x for x in self._sent if x not in here]:
                del self._sent[name]
        _say(self._process, steps=self._steps(here), done=False)

    def _steps(self, here: Mapping[str, tuple[int, int]]) -> list[str]:
        """The steps of which all that is here was sent."""
        steps = {step for x in here if is_last(x) and (step := step_of(x)) is not None}
        lacking = {
            step_of(x)
            for x, kind in here.items()
            if is_piece(x) and kind_sent(self._sent, x) != kind
        }
        return sorted(steps - lacking, key=int)

    def finish(self, *, together: bool) -> None:
        """Says that no more comes; where all end, it waits for the first, which serves all."""
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


def _number(name: str) -> int:
    """The step whose checkpoint a file is of."""
    return int(step_of(name) or 0)


def _drop_empty(directory: Path) -> None:
    """Removes empty directories: of a checkpoint that is in quarantine they would tell."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _say(process: int, *, steps: list[str], done: bool) -> None:
    """Tells the others which steps this process has sent its part of, and whether that is all."""
    said = json.dumps({"steps": steps, "done": done})
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
    """Waits until something holds, or for so long."""
    begin = time.monotonic()
    while not holds() and (seconds is None or time.monotonic() - begin < seconds):
        time.sleep(_POLL)
