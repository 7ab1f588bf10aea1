"""CLIP's text tower, over many texts packed into one row (Radford et al. 2021; reference.md, 1).

The tower is causal: its start token sees only itself and no token sees the <eos> that follows it.
So texts can share one start token and stand side by side without padding, each at the positions it
would have alone; `attention.Packed` keeps them apart.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from blindvalm_jax.models import attention, initializers
from blindvalm_jax.models.precision import einsum_fp32
from blindvalm_jax.models.transformer import BlockShape, Stack, layer_norm

Readout = Literal["token", "eos"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Shape of a text tower, as its checkpoint has it."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    projection: int
    vocab_size: int
    context: int = 77
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5
    start_id: int = 49406
    end_id: int = 49407

    @property
    def longest_segment(self) -> int:
        """Tokens that fit between the start and the end token."""
        return self.context - 2


class TextTower(nn.Module):
    """Text tower with a packed row as input; features are L2-normalised, as in CLIP's space.

    stacked: see `transformer.Stack`.
    """

    config: TowerConfig
    dtype: jnp.dtype = jnp.float32
    stacked: bool = True

    def __call__(self, tokens_BS: Array, starts_BS: Array, *, readout: Readout) -> Array:
        """Features [B, 1 + S, E] in fp32, of the start token and then of each token.

        tokens_BS: ids without start or end tokens; starts_BS: True where a text begins (a text has
        at most `config.longest_segment` tokens). readout "token": the tower's output at the token
        itself (the paper). "eos": at an <eos> put right after it, i.e. CLIP's embedding of the text
        up to that token; index 0 is then the empty text.
        """
        config = self.config
        batch = tokens_BS.shape[0]
        start_B1 = jnp.full((batch, 1), config.start_id, tokens_BS.dtype)
        tokens_BT = jnp.concatenate([start_B1, tokens_BS], axis=1)
        segment_BT, position_BT = packed_positions(starts_BS)
        if readout == "eos":
            eos_BT = jnp.full_like(tokens_BT, config.end_id)
            tokens_BT = jnp.concatenate([tokens_BT, eos_BT], axis=1)
            position_BT = jnp.concatenate([position_BT, position_BT + 1], axis=1)
        pattern = attention.Packed(segment_BT, config.longest_segment, side=readout == "eos")
        return self._features(tokens_BT, position_BT, pattern)

    def extend(
        self,
        tokens_BT: Array,
        slot_BT: Array,
        position_BT: Array,
        *,
        capacity: int,
        readout: Readout,
    ) -> Array:
        """Features [B, T, E] of tokens that go on rows whose earlier ones are in the cache.

        slot_BT: place of each token in its row, the start token in slot 0; `capacity` for filling,
        which is not kept. position_BT: place in its text, from 1; 0 for the start token.
        """
        slot_BS, window_BW = jnp.arange(capacity)[None, :], None
        reach = self.config.longest_segment
        if slot_BT.shape[1] == 1 and capacity > 1 + reach:
            # One token sees its text and the start token, however long the row has grown.
            back_W = jnp.pad(jnp.arange(reach), (1, 0))
            window_BW = (slot_BT - back_W[None, :]).at[:, 0].set(0)
            slot_BS = window_BW
        begin_BT = slot_BT - position_BT + 1
        own_BTS = slot_BS[:, None, :] >= jnp.maximum(begin_BT, 1)[:, :, None]
        own_BTS &= slot_BS[:, None, :] <= slot_BT[:, :, None]
        if readout == "eos":
            eos_BT = jnp.full_like(tokens_BT, self.config.end_id)
            tokens_BT = jnp.concatenate([tokens_BT, eos_BT], axis=1)
            position_BT = jnp.concatenate([position_BT, position_BT + 1], axis=1)
        mask_BTS = own_BTS | (jnp.arange(slot_BS.shape[1]) == 0)[None, None, :]
        pattern = attention.Cached(slot_BT, mask_BTS, capacity, window_BW, side=readout == "eos")
        return self._features(tokens_BT, position_BT, pattern)

    @nn.compact
    def _features(
        self, tokens_BT: Array, position_BT: Array, pattern: attention.Packed | attention.Cached
    ) -> Array:
        """Features of the tokens, or, where they are followed by <eos> side tokens, of those."""
        config = self.config
        init = initializers.clip(width=config.width, layers=config.layers)
        table_init = initializers.partitioned(init.embedding, (None, "embed"))
        size = (config.vocab_size, config.width)
        table = self.param("token_embedding", table_init, size, jnp.float32)
        position_init = initializers.partitioned(init.position, (None, "embed"))
        size = (config.context, config.width)
        positions = self.param("position_embedding", position_init, size, jnp.float32)
        table = nn.with_logical_constraint(table, (None, None))
        positions = nn.with_logical_constraint(positions, (None, None))
        x_BTD = jnp.take(table, tokens_BT, axis=0, mode="clip")
        x_BTD += jnp.take(positions, position_BT, axis=0, mode="clip")
        x_BTD = nn.with_logical_constraint(
            x_BTD.astype(self.dtype), ("batch", "length", "activation")
        )

        shape = BlockShape(
            width=config.width,
            heads=config.heads,
            mlp_width=config.mlp_width,
            activation=config.activation,
            norm_epsilon=config.norm_epsilon,
            init=init,
            dtype=self.dtype,
        )
        blocks = Stack(shape, config.layers, deterministic=True, stacked=self.stacked, name="h")
        x_BTD, _ = blocks(x_BTD, pattern)
        if pattern.side:
            x_BTD = x_BTD[:, tokens_BT.shape[1] // 2 :]
        x_BTD = layer_norm(config.norm_epsilon, self.dtype, "ln_final")(x_BTD)
        projection_init = initializers.partitioned(
            nn.initializers.normal(config.width**-0.5), ("embed", None)
        )
        size = (config.width, config.projection)
        projection = self.param("text_projection", projection_init, size, jnp.float32)
        return unit(einsum_fp32("btd,de->bte", x_BTD, projection.astype(self.dtype)))


def unit(features: Array) -> Array:
    """Each vector of the last axis divided by its L2 norm."""
    return features * jax.lax.rsqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True))


def packed_positions(starts_BS: Array) -> tuple[Array, Array]:
    """Segment number and position of each place of a packed row, the start token in front.

    starts_BS: True where a text begins. Returns two int32 [B, 1 + S]: 0 for the start token; the
    texts are numbered from 1 and each one's positions from 1.
    """
    starts_BS = starts_BS.at[:, 0].set(True)
    segment_BS = jnp.cumsum(starts_BS, axis=1, dtype=jnp.int32)
    at_S = jnp.arange(1, starts_BS.shape[1] + 1, dtype=jnp.int32)[None, :]
    begin_BS = jax.lax.cummax(jnp.where(starts_BS, at_S, 0), axis=1)
    position_BS = at_S - begin_BS + 1
    zero = ((0, 0), (1, 0))
    return jnp.pad(segment_BS, zero), jnp.pad(position_BS, zero)
