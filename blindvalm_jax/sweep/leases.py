"""Who works on what, among workers that share a directory and nothing else.

A lease is a file that its holder touches again and again. One that nobody has touched for its
length is free: its holder has died, or hangs. What time it is, the file system says, so clocks of
machines need not agree; changes are made one at a time behind a lock of the directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from blindvalm_jax import files
from blindvalm_jax.errors import UserError

_RENEWALS = 4  # of a lease within its length: some may be late
_READ_ALONE = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclasses.dataclass(frozen=True)
class Lease:
    """Who holds it, and for how many more seconds without a word."""

    worker: str
    left: float

    @property
    def expired(self) -> bool:
        """Whether its holder has been silent too long."""
        return self.left <= 0


class Leases:
    """The leases of a directory, as one worker sees them."""

    def __init__(self, directory: Path, *, worker: str, seconds: float) -> None:
        """Makes the directory; seconds: how long a silent holder keeps what it holds."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._worker, self._seconds = directory, worker, seconds
        self._lock = directory / ".lock"

    def take(self, name: str) -> Lease | None:
        """Takes a lease that is free; None: taken. Otherwise who holds it."""
        with files.locked(self._lock):
            held = holder(self._directory, name)
            if held is not None and not held.expired:
                return held
            content = {"worker": self._worker, "seconds": self._seconds}
            files.write_json(self._path(name), content, compact=True)
            return None

    def renew(self, name: str) -> bool:
        """Keeps a lease for its length from now on; False: it is another's by now."""
        with files.locked(self._lock):
            held = holder(self._directory, name)
            if held is None or held.worker != self._worker:
                return False
            os.utime(self._path(name))
            return True

    def release(self, name: str) -> None:
        """Frees a lease, if it is still this worker's."""
        with files.locked(self._lock):
            held = holder(self._directory, name)
            if held is not None and held.worker == self._worker:
                self._path(name).unlink()

    @contextlib.contextmanager
    def kept(self, name: str, *, lost: Callable[[], None]) -> Iterator[None]:
        """Keeps a lease that was taken, from a thread of its own, and frees it on the way out.

        lost: called from that thread once another has it, as this process had stood still for long;
        or may have it, as the directory was out of reach for the length of the lease.
        """
        done = threading.Event()

        def renew() -> None:
            last = time.monotonic()
            while not done.wait(self._seconds / _RENEWALS):
                try:
                    kept = self.renew(name)
                    last = time.monotonic()
                except (OSError, UserError):  # a file server may come back
                    kept = time.monotonic() - last < self._seconds
                if not kept:
                    lost()
                    return

        thread = threading.Thread(target=renew, daemon=True, name=f"lease of {name}")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.release(name)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"


def holder(directory: Path, name: str) -> Lease | None:
    """Who holds a lease of a directory, expired or not; one without leases need not be there.

    Raises:
      UserError: its file is no lease.
    """
    path, clock = directory / f"{name}.json", directory / ".clock"
    try:
        touched, content = path.stat().st_mtime, path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        clock.touch()
        now = clock.stat().st_mtime
    except OSError as error:
        if error.errno not in _READ_ALONE:
            raise
        now = time.time()  # this machine's own
    try:
        held = json.loads(content)
        return Lease(str(held["worker"]), float(held["seconds"]) - (now - touched))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no lease ({error!r}): delete it") from error
