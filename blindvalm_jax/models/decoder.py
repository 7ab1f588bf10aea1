"""The language model: GPT-2 with the paper's face or OpenAI's, with or without fusion blocks.

The paper's (fairseq `transformer_lm_gpt`): sinusoidal positions counted over real tokens, token
embeddings times sqrt(D), exact GELU. OpenAI's: learned positions, no factor, tanh GELU. Both:
pre-norm blocks, final LayerNorm, output projection tied to the embedding (reference.md, section 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax import Array

from blindvalm_jax.config import DecoderConfig, FusionConfig
from blindvalm_jax.models import attention, initializers
from blindvalm_jax.models.precision import einsum_fp32
from blindvalm_jax.models.transformer import BlockShape, MemoryShape, Stack, layer_norm


@struct.dataclass
class Hidden:
    """States before the output projection.

    hidden_BTD: after the final LayerNorm; memory_share_LBT: mean weight on the memory of each
    fusion layer, or None without one.
    """

    hidden_BTD: Array
    memory_share_LBT: Array | None = None


class Decoder(nn.Module):
    """Causal language model over a vocabulary padded to a multiple of `vocab_multiple`.

    vocab_size: real entries V; logits of the padded rows are the lowest float. fusion_layers:
    indices of the blocks that take a memory of width `memory_width`. stacked: see `Stack`.
    """

    config: DecoderConfig
    fusion: FusionConfig
    vocab_size: int
    fusion_layers: tuple[int, ...] = ()
    memory_width: int = 0
    dtype: jnp.dtype = jnp.float32
    kernel: str = "xla"
    remat: str = "none"
    scan_unroll: int = 1
    deterministic: bool = True
    stacked: bool = True

    def setup(self) -> None:
        """Declares embeddings, blocks and the final norm."""
        config = self.config
        mlp_width = config.mlp_width or 4 * config.width
        if config.init == "fairseq":
            init = initializers.fairseq(width=config.width, mlp_width=mlp_width)
        else:
            init = initializers.gpt2(layers=config.layers)
        shape = BlockShape(
            width=config.width,
            heads=config.heads,
            mlp_width=mlp_width,
            activation=config.activation,
            norm_epsilon=config.norm_epsilon,
            init=init,
            dtype=self.dtype,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
        )
        rows = padded_vocab(self.vocab_size, config.vocab_multiple)
        real_rows = jnp.arange(rows)[:, None] < self.vocab_size
        table_init = initializers.partitioned(
            lambda *args: init.embedding(*args) * real_rows, ("vocab", "embed")
        )
        size = (rows, config.width)
        self.wte = self.param("wte", table_init, size, jnp.float32)
        if config.positions == "learned":
            position_init = initializers.partitioned(init.position, (None, "embed"))
            size = (config.max_positions, config.width)
            self.wpe = self.param("wpe", position_init, size, jnp.float32)
        self.drop = nn.Dropout(config.dropout, deterministic=self.deterministic)
        memory_shape = None
        if self.fusion_layers:
            memory_shape = MemoryShape(width=self.memory_width, fusion=self.fusion)
        self.h = Stack(
            shape=shape,
            layers=config.layers,
            deterministic=self.deterministic,
            fusion_layers=self.fusion_layers,
            memory_shape=memory_shape,
            remat=self.remat,
            scan_unroll=self.scan_unroll,
            stacked=self.stacked,
        )
        self.ln_f = layer_norm(config.norm_epsilon, self.dtype, "ln_f")

    def __call__(
        self, tokens_BT: Array, z_BTKE: Array | None = None, valid_BT: Array | None = None
    ) -> Array:
        """Logits [B, T, V padded], fp32. See `hidden` for the arguments."""
        return self.logits(self.hidden(tokens_BT, z_BTKE, valid_BT).hidden_BTD)

    def hidden(
        self,
        tokens_BT: Array,
        z_BTKE: Array | None = None,
        valid_BT: Array | None = None,
        grounded_BT: Array | None = None,
    ) -> Hidden:
        """States before the output projection.

        z_BTKE: K grounding vectors of each position, needed iff there are fusion layers.
        valid_BT: False at pads. Pads take no position and are no keys of plain blocks; fusion
        blocks do see them, as in the reference. None: all valid.
        grounded_BT: False where a position is to do without its grounding vectors. None: nowhere.
        """
        return self.transform(self.embed(tokens_BT, valid_BT), z_BTKE, valid_BT, grounded_BT)

    def extend(
        self, tokens_BT: Array, slot_BT: Array, z_BTKE: Array | None = None, *, capacity: int
    ) -> Array:
        """States [B, T, D] of tokens that go on rows whose earlier ones are in the cache.

        slot_BT: place of each token in its row, from 0; `capacity` for filling, which is not kept.
        """
        mask_BTS = jnp.arange(capacity)[None, None, :] <= slot_BT[:, :, None]
        x_BTD = self.embed(tokens_BT, place_BT=slot_BT)
        pattern = attention.Cached(slot_BT, mask_BTS, capacity)
        return self._blocks(x_BTD, pattern, z_BTKE).hidden_BTD

    def embed(
        self, tokens_BT: Array, valid_BT: Array | None = None, place_BT: Array | None = None
    ) -> Array:
        """Token plus position embedding [B, T, D].

        place_BT: of each token in its row, from 0; None: they are whole rows.
        """
        table = nn.with_logical_constraint(self.wte, ("vocab", None))
        # Cast after the lookup: its gradient adds up a token's occurrences, which half precision
        # cannot. "clip": ids are known to be in range.
        x_BTD = jnp.take(table, tokens_BT, axis=0, mode="clip").astype(self.dtype)
        if self.config.embedding_scale == "sqrt_width":
            x_BTD = x_BTD * math.sqrt(self.config.width)
        if self.config.positions == "learned" and place_BT is not None:
            position_BTD = jnp.take(self.wpe, place_BT, axis=0, mode="clip")
        elif self.config.positions == "learned":
            position_BTD = self.wpe[None, : tokens_BT.shape[1]]
        elif place_BT is not None:
            position_BTD = sinusoids(place_BT + 2, self.config.width)
        else:
            position_BTD = sinusoidal(tokens_BT.shape[1], self.config.width, valid_BT)
        x_BTD = x_BTD + position_BTD.astype(self.dtype)
        return nn.with_logical_constraint(self.drop(x_BTD), ("batch", "length", "activation"))

    def transform(
        self,
        x_BTD: Array,
        z_BTKE: Array | None = None,
        valid_BT: Array | None = None,
        grounded_BT: Array | None = None,
    ) -> Hidden:
        """Blocks and final norm over embedded tokens."""
        return self._blocks(x_BTD, attention.Causal(valid_BT, grounded_BT, self.kernel), z_BTKE)

    def _blocks(self, x_BTD: Array, pattern: attention.Pattern, z_BTKE: Array | None) -> Hidden:
        if (z_BTKE is None) != (not self.fusion_layers):
            raise ValueError(
                f"grounding features must be given iff there are fusion layers: got "
                f"{None if z_BTKE is None else z_BTKE.shape} for layers {self.fusion_layers}"
            )
        z_BTKE = None if z_BTKE is None else z_BTKE.astype(self.dtype)
        x_BTD, share_LBT = self.h(x_BTD, pattern, z_BTKE)
        return Hidden(self.ln_f(x_BTD), share_LBT)

    def logits(self, hidden_BTD: Array) -> Array:
        """Tied output projection [B, T, V padded] in fp32; padded entries hold the lowest float."""
        hidden_BTD = hidden_BTD.astype(self.dtype)
        logits_BTV = einsum_fp32("btd,vd->btv", hidden_BTD, self.wte.astype(self.dtype))
        logits_BTV = nn.with_logical_constraint(logits_BTV, ("batch", "length", "vocab"))
        real_V = jnp.arange(logits_BTV.shape[-1]) < self.vocab_size
        return jnp.where(real_V[None, None], logits_BTV, jnp.finfo(jnp.float32).min)


def memory_shares(probes: Mapping[str, Any]) -> Array:
    """Weight [L', B, T, N] that each head of each fusion layer gave a position's grounding vectors.

    The rest, up to 1, went to the text. probes: the collection "probes" of a call of `hidden` or
    `extend` with mutable=["probes"]; without that nothing is computed for it.
    """
    layers = sorted(probes["h"], key=lambda name: int(name.removeprefix("fusion_")))
    shares = [probes["h"][name]["attn"]["memory_share_BNT"][0] for name in layers]
    return jnp.stack(shares).swapaxes(2, 3)


def padded_vocab(vocab_size: int, multiple: int) -> int:
    """Rows of the embedding table: V rounded up to the multiple."""
    return -(-vocab_size // multiple) * multiple


def sinusoidal(length: int, width: int, valid_BT: Array | None) -> Array:
    """fairseq's position embedding [B or 1, T, D] (reference.md, section 1).

    The first real token has position 2, pads take no position and get zeros.
    """
    if valid_BT is None:
        valid_BT = jnp.ones((1, length), bool)
    position_BT = jnp.cumsum(valid_BT, axis=1) + 1
    table_BTD = sinusoids(position_BT, width)
    return jnp.where(valid_BT[:, :, None], table_BTD, 0.0)


def sinusoids(position_BT: Array, width: int) -> Array:
    """[sin(p w), cos(p w)] of each position p [B, T, D], w_j = exp(-j ln(1e4) / (D/2 - 1))."""
    half = width // 2
    frequency = jnp.exp(jnp.arange(half) * (-math.log(1e4) / (half - 1)))
    angle = position_BT[:, :, None] * frequency[None, None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
