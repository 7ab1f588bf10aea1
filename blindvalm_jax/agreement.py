"""What all processes of a run must see alike; with one process nothing is asked."""

from __future__ import annotations

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from blindvalm_jax.console import is_first


def any_of(value: bool) -> bool:
    """Whether it is true in any process; all of them must ask."""
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def first_says(value: bool) -> bool:
    """What the first process says; all of them must ask."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def of_first(values: list[int]) -> list[int]:
    """The numbers that the first process has; all of them must ask."""
    if jax.process_count() == 1:
        return values
    count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(values), np.int32)))
    sent = np.zeros(count, np.int32)
    if is_first():
        sent[:] = values
    return [int(x) for x in multihost_utils.broadcast_one_to_all(sent)]


def same(text: str) -> bool:
    """Whether all processes have the same text; all of them must ask."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8).astype(np.int32)
    found = multihost_utils.process_allgather(digest)
    return bool(np.all(found == digest))


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
