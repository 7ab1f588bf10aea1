"""L2 norms layer by layer: of gradients, updates and parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

_STACKED = re.compile(r"blocks_(\d+)_\d+$")


def layer_norms(kind: str, tree: Mapping[str, Any]) -> dict[str, Array]:
    """`layers/<name>/<kind>_norm`: each block by its number, all else by its module's name.

    Blocks that are stacked are told apart: layer 3 has the same name in any cut of the stack.
    """
    return {f"layers/{name}/{kind}_norm": jnp.sqrt(x) for name, x in _squares(tree, "").items()}


def _squares(tree: Mapping[str, Any], prefix: str) -> dict[str, Array]:
    """Sums of squares by layer; a module that holds blocks is gone into."""
    found: dict[str, Array] = {}
    for name, branch in tree.items():
        stacked = _STACKED.match(name)
        if stacked:
            first, by_layer = int(stacked[1]), jax.vmap(_square)(branch)
            for layer in range(len(by_layer)):
                found[f"{prefix}{first + layer}"] = by_layer[layer]
        elif name.startswith("fusion_"):
            found[f"{prefix}{name.removeprefix('fusion_')}"] = _square(branch)
        elif isinstance(branch, Mapping) and _holds_blocks(branch):
            found |= _squares(branch, f"{prefix}{name}/")
        else:
            found[f"{prefix}{name}"] = _square(branch)
    return found


def _holds_blocks(branch: Mapping[str, Any]) -> bool:
    return any(
        _STACKED.match(name) or (isinstance(inside, Mapping) and _holds_blocks(inside))
        for name, inside in branch.items()
    )


def _square(tree: Any) -> Array:
    return sum(
        (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)), jnp.zeros(())
    )
