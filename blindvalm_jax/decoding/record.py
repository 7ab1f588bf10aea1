"""Texts in a JSON file that is whole at any time, also when writing them comes to no end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from blindvalm_jax import files
from blindvalm_jax.decoding.generation import Written

_PART = 0.1  # of the time, at most, goes to files that will be replaced


class Record:
    """The file of a generation, as a context: at its end it is written, whatever ends it.

    "finished" in it says whether nothing did before the last text.
    """

    def __init__(self, out: Path | None, about: Mapping[str, Any]) -> None:
        """out: None: no file. about: what else the file says."""
        self._out, self._about = out, about
        self._texts: list[dict[str, Any]] = []
        self._next = 0.0

    def __enter__(self) -> Record:
        """Writes nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Writes the file; without a text it is left as it was."""
        self._write(finished=error is None)

    def add(self, texts: Sequence[Written]) -> None:
        """Takes texts that are done, and writes the file."""
        for text in texts:
            values = dataclasses.asdict(text)
            del values["shares"]
            self._texts.append(values)
        begin = time.monotonic()
        if begin >= self._next:
            self._write(finished=False)
            end = time.monotonic()
            self._next = end + (end - begin) / _PART

    def _write(self, *, finished: bool) -> None:
        if self._out is not None and self._texts:
            about = {**self._about, "finished": finished}
            files.write_json(self._out, {**about, "texts": self._texts})
