"""A worker of a sweep that is killed at a moment of its own.

    python -m tests.faults.dying_worker MOMENT run --config=SWEEP.py --workdir=DIR

A moment is before a rename, an fsync, a copy of a directory, the removal of a file, the renewal of
a lease, or inside a line of metrics or of the manifest. MOMENT counts them all, as +MOMENT those
from the first line of metrics on. A worker that ends prints how many it had.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blindvalm_jax import sinks
from blindvalm_jax.command_line import run_main
from blindvalm_jax.sweep.manifest import Manifest

MOST_CUTS = 3  # of a run in a row: killed more often it would be given up


def _dying(place: Any, name: str, moments: _Moments, *, at_last: Callable[..., None]) -> None:
    real = getattr(place, name)

    def call(*args: Any, **keywords: Any) -> Any:
        moments.counting |= place is sinks.MetricsFile
        if moments.is_last():
            at_last(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **keywords)

    setattr(place, name, call)


class _Moments:
    def __init__(self, last: str, workdir: Path) -> None:
        self.seen, self._last, self._workdir = 0, int(last), workdir
        self.counting = not last.startswith("+")

    def is_last(self) -> bool:
        """Counts a moment; none is the last while a run was cut off too often."""
        self.seen += self.counting
        if self.seen <= self._last:
            return False
        states = Manifest(self._workdir).states().values()
        return all(state.cut < MOST_CUTS for state in states if state.open)


def _nothing(*args: object) -> None:
    pass


def _half_a_line(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # of what is open for reading alone
        os.ftruncate(descriptor, max(0, os.fstat(descriptor).st_size - 7))


def _half_a_record(file: Any, *_: object) -> None:
    file._file.write(b'{"step": 7, "tra')


def main() -> None:
    """Runs a worker that dies, or ends before."""
    workdir = next(word.partition("=")[2] for word in sys.argv if word.startswith("--workdir="))
    moments = _Moments(sys.argv.pop(1), Path(workdir))
    for place, name in [
        *((os, name) for name in ("replace", "rename", "utime")),
        *((shutil, "copytree"), (Path, "unlink")),
    ]:
        _dying(place, name, moments, at_last=_nothing)
    _dying(os, "fsync", moments, at_last=_half_a_line)
    _dying(sinks.MetricsFile, "write", moments, at_last=_half_a_record)
    from blindvalm_jax.sweep import __main__ as sweep  # defines flags

    try:
        run_main(sweep.main)
    finally:
        print(f"moments: {moments.seen}", flush=True)


if __name__ == "__main__":
    main()
