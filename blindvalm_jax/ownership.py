"""Whose the directory of a run is: one for all processes, or, of a run in a store, each its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from blindvalm_jax.console import is_first

_apart = False


def apart() -> bool:
    """Whether each of several processes works in a directory of its own."""
    return _apart


def keeps() -> bool:
    """Whether this process renames and deletes in its directory: the first one, or each apart."""
    return _apart or is_first()


@contextlib.contextmanager
def each_its_own() -> Iterator[None]:
    """While it lasts the processes work apart."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False
