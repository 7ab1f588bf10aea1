"""SIGTERM: what a scheduler sends some seconds before it takes a machine away.

Where nothing would be lost, as before the first update, the process ends at once. While it trains,
the update under way is finished and saved, then it ends; several processes agree on the update.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils

from blindvalm_jax import process_log
from blindvalm_jax.command_line import print_stop
from blindvalm_jax.errors import PREEMPTED, Preempted

NOTHING_LOST = "the same command goes on from what is on disk"
_GRACE = 5.0  # seconds in which a process that has nothing to save cleans up

# What SIGTERM does: "end" raises `Preempted`, and ends the process if that takes too long, as in a
# compilation; "raise" raises it; "keep" remembers it.
Way = Literal["end", "raise", "keep"]


class Notice:
    """SIGTERM to this process, and whether its run stops for one; `noticed` makes it."""

    def __init__(self) -> None:
        """Nothing has come yet."""
        self.stopping = False  # of several processes the same on each
        self._asked = self._raised = False
        self._way: Way = "end"
        self._inner: Callable[[int], None] | None = None
        self._left = threading.Event()

    def begin(self, step: int) -> None:
        """Several processes enter the loop together, after `step` updates."""
        if jax.process_count() > 1:
            # JAX counts on from here: a notice before would name an update that is long done.
            multihost_utils.reached_preemption_sync_point(step)
            multihost_utils.sync_global_devices("the loop begins")

    def stops(self, step: int) -> bool:
        """Whether the run stops after this update; to be asked after each, on every process."""
        if jax.process_count() > 1:
            # Asked always: JAX counts the answers of all processes.
            self.stopping |= multihost_utils.reached_preemption_sync_point(step)
        else:
            self.stopping |= self._asked
        return self.stopping

    def came(self) -> bool:
        """Whether the run stops; of one process also for a signal since `stops` was asked."""
        if jax.process_count() == 1:
            self.stopping |= self._asked
        return self.stopping

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """While this lasts SIGTERM interrupts nothing: `stops` tells."""
        with self._going("keep"):
            yield

    @contextlib.contextmanager
    def cutting_short(self) -> Iterator[None]:
        """Work that SIGTERM cuts short: a run of one process is `stopping` then.

        Several processes end it together: one that left would keep the others waiting.
        """
        if jax.process_count() > 1:
            yield
            return
        try:
            with self._going("raise"):
                yield
        except Preempted:
            self.stopping = True

    @contextlib.contextmanager
    def _going(self, way: Way) -> Iterator[None]:
        before, self._way = self._way, way
        try:
            yield
        finally:
            self._way = before

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        self._inner = _installed_by_jax()
        before = signal.signal(signal.SIGTERM, self._handle)
        # Python runs a handler between two of its instructions: a thread is told meanwhile.
        read, write = os.pipe()
        os.set_blocking(write, False)
        woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        try:
            yield
        finally:
            self._left.set()
            signal.set_wakeup_fd(woken)
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
            os.close(write)

    def _handle(self, number: int, frame: Any) -> None:
        first, self._asked = not self._asked, True
        if self._way != "keep" and not self._raised:
            self._raised = True
            raise Preempted(NOTHING_LOST)
        if first and self._inner is not None:
            self._inner(number)

    def _listen(self, read: int) -> None:
        """Says that SIGTERM came; ends a process that nothing keeps and that does not end itself.

        Printing is not for a handler: it may interrupt printing.
        """
        told = False
        while data := os.read(read, 64):
            if signal.SIGTERM not in data or told:
                continue
            told = True
            way = self._way
            if way == "keep":
                said = "SIGTERM: what is under way is saved first"
                print(said, file=sys.stderr, flush=True)
                process_log.write_last(said)
            if way != "end":
                continue  # who keeps it saves and ends, however long that takes
            self._left.wait(_GRACE)
            if not self._left.is_set() and self._way == "end":
                print_stop(NOTHING_LOST)
                os._exit(PREEMPTED)
        os.close(read)


_notice: Notice | None = None


@contextlib.contextmanager
def noticed() -> Iterator[Notice]:
    """Notices SIGTERM while this lasts; inside itself it is the same notice.

    In a thread that is not the main one nothing is noticed: only that may handle signals.

    Raises:
      Preempted: SIGTERM came where nothing is lost by ending, or before this.
    """
    global _notice
    if _notice is not None:
        if _notice._asked:  # while a run before this one ended
            raise Preempted(NOTHING_LOST)
        yield _notice
    elif threading.current_thread() is not threading.main_thread():
        yield Notice()
    else:
        _notice = Notice()
        try:
            with _notice._installed():
                yield _notice
        finally:
            _notice = None


def stopping() -> bool:
    """Whether the run stops for SIGTERM: of several processes all do, after the same update."""
    return _notice is not None and _notice.stopping


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """While this lasts SIGTERM interrupts nothing, if it is noticed at all."""
    with contextlib.nullcontext() if _notice is None else _notice.kept():
        yield


def _installed_by_jax() -> Callable[[int], None] | None:
    """What JAX does on SIGTERM in one of several processes: it tells the others.

    Python takes its place without knowing of it, and JAX offers no other way to tell it.
    """
    if not jax.distributed.is_initialized():
        return None
    libc_signal = ctypes.CDLL(None).signal
    libc_signal.restype = ctypes.c_void_p
    libc_signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    address = libc_signal(signal.SIGTERM, None)
    none = (None, signal.SIG_DFL, signal.SIG_IGN)
    return None if address in none else ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
