"""BLIND-VALM's grounding: what the frozen CLIP text tower says at each token (arXiv 2409.11148)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from blindvalm_jax.models.clip import Readout, TextTower


@struct.dataclass
class TowerInput:
    """What the tower reads for a batch of rows.

    tokens_BS: tower ids; starts_BS: where its texts begin; index_BT: for each language-model token
    the tower token that speaks for it, counting the start token as 0. None: one to one.
    """

    tokens_BS: Array
    starts_BS: Array
    index_BT: Array | None = None


def features(tower: TextTower, params: Any, inputs: TowerInput, *, readout: Readout) -> Array:
    """Grounding features z [B, T, 1, E] of each language-model token; no gradient flows back."""
    packed_BTE: Any = tower.apply(
        {"params": params}, inputs.tokens_BS, inputs.starts_BS, readout=readout
    )
    if inputs.index_BT is None:
        features_BTE = packed_BTE[:, 1:]
    else:
        features_BTE = jnp.take_along_axis(packed_BTE, inputs.index_BT[:, :, None], axis=1)
    return jax.lax.stop_gradient(features_BTE)[:, :, None, :]


def shuffled(z_BTKE: Array) -> Array:
    """Control: each row gets the features of the row before it, which say nothing of its text."""
    return jnp.roll(z_BTKE, 1, axis=0)
