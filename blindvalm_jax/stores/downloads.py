"""Files of a store, brought whole or not at all; one that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blindvalm_jax.data.workers import Progress
from blindvalm_jax.errors import UserError
from blindvalm_jax.stores import places
from blindvalm_jax.stores.connection import Connection, Found

_PART = 32 << 20  # bytes of one request
_AT_ONCE = 8  # files
_SPARE = 64 << 20  # bytes that stay free


def bring(
    store: Connection,
    wanted: Mapping[str, Found],
    *,
    to: Callable[[str], Path],
    work: Path,
    done: Callable[[str], None],
) -> None:
    """Brings files, several at once.

    wanted: by the library's name; to: where a file goes. work: a directory of the same file system
    for what is unfinished. done: told of each file that is there.

    Raises:
      UserError: the store cannot be read, or there is no room here.
      OSError: a file cannot be written.
    """
    work.mkdir(exist_ok=True)
    partials = {name: work / _partial_name(name, found) for name, found in wanted.items()}
    for path in set(work.iterdir()) - set(partials.values()):  # of what is there no longer
        path.unlink()
    there = {name: _size(path) for name, path in partials.items()}
    _check_room(store, sum(f.size - there[name] for name, f in wanted.items()), work)
    lock = threading.Lock()
    with (
        Progress(
            f"bring {store.address}", total=sum(f.size for f in wanted.values()), unit="B"
        ) as p,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):

        def advance(count: int) -> None:
            with lock:
                p.advance(count)

        def one(name: str) -> None:
            advance(there[name])
            path = to(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            _bring_one(store, name, wanted[name].size, partials[name], advance)
            os.replace(partials[name], path)
            with lock:
                done(name)

        try:
            for finished in [pool.submit(one, name) for name in sorted(wanted)]:
                finished.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _bring_one(
    store: Connection, name: str, size: int, partial: Path, advance: Callable[[int], None]
) -> None:
    """Brings the bytes of a file that are not there yet."""
    with partial.open("ab") as stream:
        while (start := stream.tell()) < size:
            end = min(start + _PART, size)
            part = store.part(name, start=start, end=end)
            if len(part) != end - start:
                raise UserError(
                    f"{store.address}: {name} gave {len(part)} bytes instead of {end - start}: it "
                    "was changed meanwhile; the same command brings it as it is now"
                )
            stream.write(part)
            advance(len(part))
        stream.flush()
        os.fsync(stream.fileno())


def _partial_name(name: str, found: Found) -> str:
    """Of one content alone: another one is not gone on with."""
    return hashlib.sha256(f"{name}\0{found.mark}\0{found.size}".encode()).hexdigest()[:32]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_room(store: Connection, size: int, directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if size + _SPARE > free:
        raise UserError(
            f"{store.address}: {size / 2**30:.2f} GiB are to be brought, and {places.root()} has "
            f"{free / 2**30:.2f} GiB free: free some, or name another place with {places.VARIABLE}"
        )
