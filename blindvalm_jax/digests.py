"""Digests of arrays: two 32-bit sums over every bit, the same on any mesh and on the host.

Each 32-bit word of an array is mixed with its position and summed modulo 2^32, so that devices may
add in any order. The mixing is one-to-one at each position: one changed word always changes both
sums. Other damage (swapped values, a part replaced) is missed with probability of about 2^-64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

# Odd, so that a product with it is one-to-one; the mixing is the finalizer of MurmurHash3.
_SPREAD = 0x9E3779B1
_MIXING = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))
_HOST_WORDS = 1 << 18  # of an array on the host, mixed at once


def of_tree(tree: Any) -> dict[str, str]:
    """Digest of every leaf of a tree of JAX arrays, by its path: "params/h/.../kernel".

    In several processes every one calls it, and every one gets the same.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [jax.random.key_data(x) if _is_key(x) else x for _, x in leaves]
    sums = jax.device_get(_compiled(arrays))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _text(x, found)
        for (path, _), x, found in zip(leaves, arrays, sums, strict=True)
    }


def of_host(array: np.ndarray) -> str:
    """The same digest of an array on the host."""
    array = np.asarray(array, order="C")
    narrow = np.dtype(f"<u{min(4, array.dtype.itemsize)}")
    words = array.reshape(-1).view(narrow).reshape(-1)
    sums = [0, 0]
    for start in range(0, words.size, _HOST_WORDS):
        part = words[start : start + _HOST_WORDS].astype(np.uint32)
        positions = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        for which, mixed in enumerate(_mixed(part, positions)):
            sums[which] += int(mixed.sum(dtype=np.uint64))
    return _text(array, np.asarray([x % 2**32 for x in sums], np.uint32))


def of_host_tree(flat: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The digest of each array of a dict."""
    return {name: of_host(array) for name, array in flat.items()}


def differing(expected: Mapping[str, str], got: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with the leaves that do not have the digest they should, by name."""
    wrong = dict.fromkeys(expected.keys() - got.keys(), "is missing")
    wrong |= dict.fromkeys(got.keys() - expected.keys(), "has no digest")
    for name in expected.keys() & got.keys():
        if expected[name] != got[name]:
            wrong[name] = f"was saved as {expected[name]}, is {got[name]}"
    return dict(sorted(wrong.items()))


def listed(wrong: Mapping[str, str], *, most: int = 3) -> str:
    """The first few of what `differing` found, for one line."""
    texts = [f"{name} {reason}" for name, reason in wrong.items()]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def _is_key(x: Any) -> bool:
    """Whether an array holds typed random keys."""
    return isinstance(x, Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _text(array: Any, sums: np.ndarray) -> str:
    shape = ",".join(str(size) for size in array.shape)
    return f"{array.dtype}[{shape}] {sums[0]:08x}{sums[1]:08x}"


def _compiled(arrays: list[Array]) -> Array:
    """The sums [leaves, 2] of all arrays, on every process."""
    placed = next((x.sharding for x in arrays if isinstance(x.sharding, NamedSharding)), None)
    out = None if placed is None else NamedSharding(placed.mesh, PartitionSpec())
    return jax.jit(_sums, out_shardings=out)(arrays)


def _sums(arrays: list[Array]) -> Array:
    return jnp.stack([_sum(x) for x in arrays])


def _sum(x: Array) -> Array:
    """The two sums of one array; its shape stays, so that no device moves any of it.

    Both are one reduction: two would keep what they share in memory, as large as the array.
    """
    planes = _words(x)
    position = jnp.zeros((), jnp.uint32)
    for axis in range(x.ndim):
        stride = len(planes) * math.prod(x.shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride)
    zeros, axes = (np.uint32(0), np.uint32(0)), tuple(range(x.ndim))
    found = [
        jax.lax.reduce(_mixed(words, position + np.uint32(plane)), zeros, _add, axes)
        for plane, words in enumerate(planes)
    ]
    return jnp.stack([sum(part[1:], part[0]) for part in zip(*found, strict=True)])


def _add(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    return one[0] + other[0], one[1] + other[1]


def _words(x: Array) -> list[Array]:
    """The bits of each entry, lowest word first."""
    if x.dtype == bool:
        return [x.astype(jnp.uint32)]
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    if x.dtype.itemsize < 8:
        return [bits.astype(jnp.uint32)]
    return [bits.astype(jnp.uint32), (bits >> np.uint64(32)).astype(jnp.uint32)]


def _mixed(words: Any, positions: Any) -> tuple[Any, Any]:
    """What is summed of words at their positions, of NumPy or JAX alike."""
    mixed = words + positions * np.uint32(_SPREAD)
    for shift, factor in _MIXING:
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    mixed = mixed ^ (mixed >> np.uint32(16))
    return mixed, mixed * (positions * np.uint32(2) + np.uint32(1))
