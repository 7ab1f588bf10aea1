"""Records that are damaged: named, and on request replaced by others."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import numpy as np

from blindvalm_jax.errors import UserError

_TRIES = 100


class DamagedRecord(UserError):
    """A record that is not there or cannot be read; the message names its file and its number."""


class Source(Protocol):
    """Records by number."""

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> Any:
        """One of them; a `DamagedRecord` where it cannot be read."""


class Replacing:
    """A source that gives another record in the place of one that is damaged.

    Which one depends on the number of the damaged record alone, so that batches stay a function of
    (seed, step) on any number of processes; it is drawn from all records, so that no record stands
    for all of a lost file. `damaged` says what was found so far, each record once.
    """

    def __init__(self, source: Source, damaged: list[str]) -> None:
        """damaged: where it is said; several sources may share it."""
        self.source, self.damaged = source, damaged
        self._known: set[int] = set()
        self._lock = threading.Lock()  # threads read ahead

    def __len__(self) -> int:
        """Number of records."""
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        """A record, or the first sound one of those drawn for it.

        Raises:
          UserError: a hundred in a row are damaged.
        """
        rng = None
        number = int(index)
        for _ in range(_TRIES):
            if number not in self._known:
                try:
                    return self.source[number]
                except DamagedRecord as error:
                    self._note(number, str(error))
            rng = rng or np.random.default_rng(int(index))
            number = int(rng.integers(len(self)))
        raise UserError(
            f"{_TRIES} records drawn for record {index} are all damaged; one: {self.damaged[-1]}"
        )

    def _note(self, number: int, message: str) -> None:
        with self._lock:
            if number not in self._known:
                self._known.add(number)
                self.damaged.append(message)
