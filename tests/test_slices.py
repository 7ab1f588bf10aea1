"""Meshes over several slices: only the data axis crosses from one to another."""

from __future__ import annotations

import dataclasses
import random

import jax
import numpy as np
import pytest

from blindvalm_jax import collectives, config, partitioning, planning, process_layout, slices
from blindvalm_jax.config import MeshConfig
from blindvalm_jax.errors import UserError
from tests import small_models
from tests.test_planning import settings


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device that is not here; order: its number within its slice."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "some GPU"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def devices(slices: int, each: int, *, report: bool = True) -> list[Device]:
    """Devices of several slices in no order; report: by slice_index, else by process alone."""
    found = [
        Device(s * each + i, process_index=s, slice_index=s if report else 0)
        for s in range(slices)
        for i in range(each)
    ]
    random.Random(0).shuffle(found)
    return found


def pod(slices: int = 1) -> list[Device]:
    """Slices of a v5litepod-16: a torus of 4 x 4 chips, a process for each square of 2 x 2."""
    found = []
    for s in range(slices):
        for y in range(4):
            for x in range(4):
                process = 4 * s + 2 * (y // 2) + x // 2
                chip = Device(16 * s + 4 * y + x, process, s, "tpu", "TPU v5 lite", (x, y, 0))
                found.append(chip)
    return found


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        *[((16, 1, 1), 1), ((1, 16, 1), 1), ((4, 4, 1), 1), ((4, 1, 4), 1), ((2, 8, 1), 1)],
        *[((2, 4, 2), 1), ((4, 8, 1), 2), ((2, 4, 4), 2), ((32, 1, 1), 2), ((2, 16, 1), 2)],
    ],
)
def test_processes_of_a_pod_have_rows_of_their_own_in_order(
    sizes: tuple[int, int, int], count: int
) -> None:
    """Also where an axis is no axis of the torus, and cut from several of them."""
    data, fsdp, tensor = sizes
    wanted = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, slices=-1)
    mesh = partitioning.make_mesh(wanted, pod(count))
    process_layout.check_rows(mesh)
    assert mesh.devices.shape == sizes
    assert len(set(mesh.devices.flat)) == 16 * count
    owners = [device.process_index for device in mesh.devices.flat]
    assert owners == sorted(owners)
    for part in np.split(mesh.devices, count):
        assert len({device.slice_index for device in part.flat}) == 1


def test_rows_that_processes_share_are_refused() -> None:
    mesh = partitioning.make_mesh(MeshConfig(data=2, tensor=8), pod())
    with pytest.raises(UserError, match=r"mesh\.tensor must stay within"):
        process_layout.check_rows(mesh)


def test_processes_stay_in_order_where_slices_are_numbered_otherwise() -> None:
    there = [Device(i, process_index=i // 4, slice_index=1 - i // 8) for i in range(16)]
    mesh = partitioning.make_mesh(MeshConfig(data=16), there)
    process_layout.check_rows(mesh)


@pytest.mark.parametrize("report", [True, False], ids=["slices", "processes"])
@pytest.mark.parametrize("sizes", [(4, 2, 1), (4, 1, 2), (2, 2, 2)])
def test_only_the_data_axis_crosses_slices(sizes: tuple[int, int, int], report: bool) -> None:
    found = slices.arranged(sizes, 2, devices(2, 4, report=report))
    assert found.shape == sizes
    assert len({device.id for device in found.flat}) == 8
    home = np.vectorize(lambda device: device.process_index)(found)
    for part, rows in enumerate(np.split(home, 2)):  # halves of the data axis
        assert set(rows.flat) == {part}


def test_slices_are_counted_as_devices_report_them() -> None:
    assert slices.count(-1, devices(4, 2)) == 4
    assert slices.count(-1, devices(4, 2, report=False)) == 1
    assert slices.count(-1, jax.devices()) == 1
    assert slices.count(3, devices(4, 2)) == 3


@pytest.mark.parametrize(
    ("sizes", "count", "there", "message"),
    [
        ((3, 2, 1), 2, devices(2, 3), "mesh.data is 3, not a multiple of mesh.slices = 2"),
        ((4, 2, 1), 4, devices(2, 4), "mesh.slices is 4, the devices lie in 2 slices and 2 proc"),
        ((2, 3, 1), 2, devices(2, 3) + devices(1, 2), "does not fit the devices"),
    ],
    ids=["data", "number", "unequal"],
)
def test_slices_that_are_not_there_are_one_line(
    sizes: tuple[int, int, int], count: int, there: list[Device], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        slices.arranged(sizes, count, there)
    assert "\n" not in str(error.value)


def test_simulated_slices_keep_what_fsdp_sends_within_one() -> None:
    """Groups of the program's collectives, in the numbers of the devices."""
    values = settings((4, 2, 1), mesh__slices=2)
    with small_models.quick_compilation():
        plan = planning.of_settings(values)
    order = [device.id for device in plan.mesh.devices.flat]
    assert order == sorted(order)
    along = {total.axes for total in collectives.totals(plan.collectives)}
    assert ("fsdp",) in along
    for axes in along - {("data", "fsdp"), ("data",)}:
        assert "data" not in axes
    assert config.resolve(values, vocab_size=500, mesh=plan.mesh.shape).mesh.slices == 2


def test_a_mesh_of_one_slice_is_what_it_was() -> None:
    for count in (1, -1):
        mesh = partitioning.make_mesh(MeshConfig(data=2, fsdp=4, slices=count))
        assert mesh == partitioning.make_mesh(MeshConfig(data=2, fsdp=4))
    with pytest.raises(UserError, match="mesh.data is 1, not a multiple of mesh.slices = 2"):
        partitioning.make_mesh(MeshConfig(data=1, fsdp=8, slices=2))
