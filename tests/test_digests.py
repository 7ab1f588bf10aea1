"""Digests: the same on any mesh and on the host, another after any damage."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blindvalm_jax import config, digests, partitioning

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool")


def arrays() -> dict[str, np.ndarray]:
    """Every dtype in a matrix that all meshes divide, and shapes of every rank."""
    rng = np.random.default_rng(0)
    found = {name: (50 * rng.standard_normal((8, 12))).astype(jnp.dtype(name)) for name in DTYPES}
    for shape in [(), (7,), (2, 3, 4, 5), (0, 3)]:
        found[f"rank{len(shape)}"] = rng.standard_normal(shape).astype(np.float32)
    return found


def placed(values: dict[str, np.ndarray], mesh: Mesh, spec: PartitionSpec) -> dict[str, Any]:
    """The arrays on a mesh, those named by dtype split as `spec` says."""
    return {
        name: jax.device_put(x, NamedSharding(mesh, spec if name in DTYPES else PartitionSpec()))
        for name, x in values.items()
    }


@pytest.fixture(scope="module")
def on_host() -> dict[str, str]:
    return {name: digests.of_host(x) for name, x in arrays().items()}


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        ((8, 1, 1), PartitionSpec("data")),
        ((2, 2, 2), PartitionSpec(("data", "fsdp"), "tensor")),
        ((1, 4, 2), PartitionSpec("tensor", "fsdp")),
    ],
    ids=str,
)
def test_the_same_on_any_mesh_and_on_the_host(
    on_host: dict[str, str], sizes: tuple[int, int, int], spec: PartitionSpec
) -> None:
    mesh = partitioning.make_mesh(
        config.MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    )
    assert digests.of_tree(placed(arrays(), mesh, spec)) == on_host
    assert len(set(on_host.values())) == len(on_host)


def test_the_same_on_one_device(on_host: dict[str, str]) -> None:
    found = digests.of_tree({name: jnp.asarray(x) for name, x in arrays().items()})
    assert found == on_host


def test_eight_bytes_an_entry_are_two_words() -> None:
    """Only under x64 does a device hold them; on the host any file may."""
    values = np.random.default_rng(1).standard_normal((3, 5))
    with jax.enable_x64(True):
        assert digests.of_tree([jnp.asarray(values)]) == {"0": digests.of_host(values)}


def test_random_keys_and_names() -> None:
    key = jax.random.key(3)
    found = digests.of_tree({"a": {"key": key}, "b": [jnp.ones(2)]})
    assert list(found) == ["a/key", "b/0"]
    assert found["a/key"] == digests.of_host(np.asarray(jax.random.key_data(key)))


@pytest.mark.parametrize("name", DTYPES)
def test_every_flipped_bit_is_seen(name: str) -> None:
    value = arrays()[name][:2, :3].copy()
    seen = {digests.of_host(value)}
    flipped = value.reshape(-1).view(np.uint8)
    count = 0
    for byte in range(flipped.size):
        for bit in range(1 if name == "bool" else 8):
            flipped[byte] ^= 1 << bit
            seen.add(digests.of_host(value))
            flipped[byte] ^= 1 << bit
            count += 1
    assert len(seen) == count + 1


def test_order_shape_and_dtype_are_seen() -> None:
    value = np.random.default_rng(2).standard_normal((16, 16)).astype(np.float32)
    swapped, shifted = value.copy(), np.roll(value, 1, axis=1)
    swapped[3, 4], swapped[9, 1] = value[9, 1], value[3, 4]
    others = [swapped, shifted, value.T, value[::-1], value.reshape(8, 32), value.view(np.int32)]
    others += [np.zeros_like(value), np.zeros_like(value)[:8]]
    found = [digests.of_host(x) for x in [value, *others]]
    assert len({text.partition(" ")[2] for text in found[:5]}) == 5  # the sums, not what is beside
    assert len(set(found)) == len(found)


def test_large_arrays_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    value = arrays()["float32"]
    whole = digests.of_host(value)
    monkeypatch.setattr(digests, "_HOST_WORDS", 7)
    assert digests.of_host(value) == whole


def test_what_differs_is_named() -> None:
    expected = {"a": "float32[1] 00", "b": "float32[1] 11", "c": "int32[] 22"}
    got = {"a": "float32[1] 00", "b": "bfloat16[1] 11", "d": "int32[] 33"}
    assert digests.differing(expected, got) == {
        "b": "was saved as float32[1] 11, is bfloat16[1] 11",
        "c": "is missing",
        "d": "has no digest",
    }
    assert digests.differing(got, got) == {}
