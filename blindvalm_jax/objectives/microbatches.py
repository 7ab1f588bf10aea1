"""A batch computed in parts, one after the other: which rows go where.

Every part takes rows from every device: row i goes to part i mod count.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def split(batch: Any, count: int) -> Any:
    """A tree of [B, ...] as one of [count, B / count, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)


def join(parts: Any) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts)
