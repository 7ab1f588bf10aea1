"""Which process has which device: as JAX knows, or as a plan on simulated devices is told.

Simulated devices are all of the one process that plans. What several processes refuse asks here how
many there are, so that the plan of a machine that is not here refuses it as well.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from blindvalm_jax.errors import UserError

_simulated = _each = 0  # processes that a plan stands for, and devices of each; 0: there is none


def simulates() -> bool:
    """Whether devices are simulated for a plan."""
    return _simulated > 0


def count() -> int:
    """How many processes there are, or are planned for."""
    return _simulated or jax.process_count()


def of(device: Any) -> int:
    """The process that has a device."""
    return device.id // _each if _simulated else device.process_index


@contextlib.contextmanager
def simulated(processes: int, *, devices: int) -> Iterator[None]:
    """While it lasts, JAX's `devices` are planned for as many neighbours a process, as on a pod.

    Raises:
      UserError: the devices cannot be divided so.
    """
    global _simulated, _each
    if devices % processes:
        raise UserError(
            f"--simulated_processes={processes} does not divide --simulated_devices={devices}: "
            "each process has as many"
        )
    _simulated, _each = processes, devices // processes
    try:
        yield
    finally:
        _simulated = _each = 0


def check_rows(mesh: Mesh) -> None:
    """Refuses a mesh on which processes have no rows of their own, one block after the other.

    Raises:
      UserError: they would not.
    """
    each = collections.Counter(of(device) for device in mesh.devices.flat)
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    owners = [{of(device) for device in row} for row in rows]
    if any(len(owner) > 1 for owner in owners):
        raise UserError(
            f"mesh {dict(mesh.shape)} splits rows over fewer parts than there are processes "
            f"({len(each)}): mesh.tensor must stay within the {min(each.values())} devices of one"
        )
    order = [owner.pop() for owner in owners]
    if order != sorted(order):
        raise UserError(f"the devices of mesh {dict(mesh.shape)} are not in the processes' order")
