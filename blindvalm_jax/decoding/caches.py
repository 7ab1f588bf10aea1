"""Keys and values of rows that are read in pieces, [B, N, S, H] of each block: S slots for tokens.

By name: "decoder" and, where there is one that is read, "tower", with a slot more for its start
token.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from blindvalm_jax.objectives.language_model import Model


def shapes(model: Model, *, rows: int, capacity: int, grounded: bool) -> dict[str, Any]:
    """Shapes and dtypes for a model without stacks; grounded: the tower is read too."""
    at_BT = jnp.zeros((rows, 1), jnp.int32)

    def decoder(key: Array) -> Any:
        z_BTKE = None
        if model.decoder.fusion_layers:
            z_BTKE = jnp.zeros((rows, 1, 1, model.decoder.memory_width))
        return model.decoder.init(key, at_BT, at_BT, z_BTKE, capacity=capacity, method="extend")[
            "cache"
        ]

    key = jax.random.key(0)
    found = {"decoder": jax.eval_shape(decoder, key)}
    if model.tower is not None and grounded:
        read = functools.partial(
            model.tower.init, capacity=capacity + 1, readout=model.readout, method="extend"
        )
        found["tower"] = jax.eval_shape(read, key, at_BT, at_BT, at_BT)["cache"]
    return found


def take(caches: dict[str, Any], rows_N: Array) -> dict[str, Any]:
    """Those of some rows."""
    return jax.tree.map(lambda x: jnp.take(x, rows_N, axis=0, mode="clip"), caches)


def padded(caches: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Those of shapes with more slots; zeros are in the new ones."""

    def pad(x: Array, shape: jax.ShapeDtypeStruct) -> Array:
        ends = zip(x.shape, shape.shape, strict=True)
        return jnp.pad(x, [(0, there - here) for here, there in ends])

    return jax.tree.map(pad, caches, wanted)
