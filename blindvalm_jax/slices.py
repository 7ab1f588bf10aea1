"""Devices in several slices: a fast network within each, a slower one between them.

A slice is a TPU pod slice, or the GPUs of a node. Gradients, summed once an update, may cross the
slower network; what fsdp and tensor send in every block must not.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from blindvalm_jax import process_layout
from blindvalm_jax.errors import UserError


def count(wanted: int, devices: Sequence[Any]) -> int:
    """Slices of a mesh: what `mesh.slices` says, for -1 what the devices report.

    Raises:
      UserError: they are simulated, and report nothing.
    """
    if wanted == -1 and process_layout.simulates():
        raise UserError(
            "mesh.slices=-1 takes what devices report, which simulated ones do not: give the "
            "number of slices that there will be, mesh.slices=1 for one"
        )
    return wanted if wanted != -1 else reported(devices, "slice_index")


def reported(devices: Sequence[Any], attribute: str) -> int:
    """How many different values of an attribute the devices have; 1 if they know none."""
    return len({getattr(device, attribute, None) for device in devices})


def arranged(sizes: Sequence[int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """The devices as [data, fsdp, tensor]; a slice is one of `slices` equal parts of the data axis.

    Where devices report no slices, their processes are taken for slices if there are as many;
    simulated devices are cut in their order.

    Raises:
      UserError: the data axis is no multiple of the slices, or the devices lie in another number of
        slices, or in unequal ones; or several slices would share a simulated process.
    """
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data is {sizes[0]}, not a multiple of mesh.slices = {slices}: the data axis "
            "goes across the slices, fsdp and tensor stay within one"
        )
    processes = process_layout.count()
    if process_layout.simulates() and processes > 1 and processes % slices:
        raise UserError(
            f"mesh.slices is {slices}, which does not divide the {processes} processes: a slice "
            "has whole ones"
        )
    found = {name: reported(devices, name) for name in ("slice_index", "process_index")}
    if slices not in found.values():
        if set(found.values()) == {1} and devices[0].platform == "cpu":
            return np.array(devices).reshape(sizes)
        raise UserError(
            f"mesh.slices is {slices}, the devices lie in {found['slice_index']} slices and "
            f"{found['process_index']} processes: set it to one of these, or to -1"
        )
    name = next(name for name, number in found.items() if number == slices)
    each = collections.Counter(getattr(device, name) for device in devices)
    if len(set(each.values())) > 1:
        raise UserError(
            f"mesh.slices={slices} does not fit the devices: by {name} they have "
            f"{', '.join(str(each[one]) for one in sorted(each))} of them, not equally many"
        )
    return in_order(sizes, devices)


def in_order(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as [data, fsdp, tensor]: slice after slice, in each process after process.

    Each process then has rows of its own, one block after the other, as batches are read. The way
    round a torus, which crosses from process to process, would not leave it that.
    """
    first: dict[int, int] = {}  # the first process of a slice, so that processes stay in order
    for device in devices:
        home = getattr(device, "slice_index", 0)
        first[home] = min(first.get(home, device.process_index), device.process_index)

    def place(device: Any) -> tuple[int, int, int, int]:
        home = getattr(device, "slice_index", 0)
        return first[home], home, device.process_index, device.id

    return np.array(sorted(devices, key=place)).reshape(sizes)
