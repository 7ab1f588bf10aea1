"""A watchdog: a run in which no update ends any more says where it hangs, and ends."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator

from blindvalm_jax import process_log
from blindvalm_jax.command_line import print_error

_LOOKS = 10  # within the seconds it waits
_STDERR = 2  # whatever stands in for it in Python


class Watchdog:
    """Ends the process with exit code 1 when `fed` is not called for `seconds` (0: never).

    Use as a context manager. The stacks of all threads go to stderr before. Time in which the
    whole process was stopped, as by SIGSTOP, does not count if it is shorter than twice `seconds`.
    """

    def __init__(self, seconds: float) -> None:
        """Nothing is watched yet."""
        self._seconds, self._spent = seconds, 0.0
        self._pauses = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def fed(self) -> None:
        """An update has ended."""
        self._spent = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Watches nothing while this lasts: work that may take long."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self.fed()

    def __enter__(self) -> Watchdog:
        """Watches from now on."""
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Watches no more."""
        self._ended.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        interval = self._seconds / _LOOKS
        last = time.monotonic()
        while not self._ended.wait(interval):
            now = time.monotonic()
            self._spent += min(now - last, 2 * interval)
            last = now
            if self._pauses:
                self.fed()
                faulthandler.cancel_dump_traceback_later()
            else:  # code that hangs and lets no thread run is ended from outside of Python
                faulthandler.dump_traceback_later(2 * self._seconds, exit=True, file=_STDERR)
            if self._spent >= self._seconds:
                print_error(
                    f"no update has ended for {self._seconds:g} seconds "
                    "(train.watchdog_seconds): below is what each thread does; the same command "
                    "goes on from the newest checkpoint"
                )
                faulthandler.dump_traceback(_STDERR)
                process_log.write_stacks()
                os._exit(1)
        faulthandler.cancel_dump_traceback_later()
