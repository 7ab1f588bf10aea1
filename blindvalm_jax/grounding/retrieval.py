"""VALM's grounding: the image embeddings nearest to a text feature (arXiv 2205.10178, 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

# queries [B, T, E] and keys [M, E], or None where they are kept elsewhere -> vectors [B, T, K, E]
Search = Callable[[Array, Array | None], Array]


def exact_search(queries_BTE: Array, keys_ME: Array, *, neighbours: int) -> tuple[Array, Array]:
    """Maximum-inner-product search: scores [B, T, K], best first, and indices into the M keys."""
    scores_BTM = jnp.einsum("bte,me->btm", queries_BTE, keys_ME, preferred_element_type=jnp.float32)
    scores_BTK, index_BTK = jax.lax.top_k(scores_BTM, neighbours)
    return scores_BTK, index_BTK
