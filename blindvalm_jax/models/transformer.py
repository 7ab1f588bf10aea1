"""One attention module, one block, one stack: the decoder and the CLIP towers are made of these.

Parameters carry logical axis names (embed, heads, kv, mlp, vocab, layers); `partitioning.RULES`
says which mesh axis each one is split over. Under the pattern `Cached` attention keeps its keys and
values in the collection "cache".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from blindvalm_jax.config import FusionConfig
from blindvalm_jax.models import attention
from blindvalm_jax.models.initializers import Initializer, Initializers, partitioned

Activation = Callable[[Array], Array]

ACTIVATIONS: dict[str, Activation] = {
    "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What all blocks of a stack share."""

    width: int
    heads: int
    mlp_width: int
    activation: str
    norm_epsilon: float
    init: Initializers
    dtype: jnp.dtype
    dropout: float = 0.0
    attention_dropout: float = 0.0

    @property
    def head_width(self) -> int:
        """H = D / N."""
        return self.width // self.heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryShape:
    """Width of a block's memory vectors, and how the block uses them."""

    width: int
    fusion: FusionConfig


class Projection(nn.Module):
    """y = einsum(equation, x, kernel) + bias, computed in `dtype` from fp32 parameters."""

    equation: str
    kernel_shape: tuple[int, ...]
    bias_shape: tuple[int, ...]
    kernel_axes: tuple[str | None, ...]
    bias_axes: tuple[str | None, ...]
    kernel_init: Initializer
    bias_init: Initializer
    dtype: jnp.dtype

    def setup(self) -> None:
        """Declares kernel and bias."""
        kernel_init = partitioned(self.kernel_init, self.kernel_axes)
        bias_init = partitioned(self.bias_init, self.bias_axes)
        self.kernel = self.param("kernel", kernel_init, self.kernel_shape, jnp.float32)
        self.bias = self.param("bias", bias_init, self.bias_shape, jnp.float32)

    def __call__(self, x: Array) -> Array:
        """Applies the whole projection."""
        y = jnp.einsum(self.equation, x.astype(self.dtype), self.kernel.astype(self.dtype))
        return _add_bias(y, self.bias, self.dtype)


def _add_bias(y: Array, bias: Array, dtype: jnp.dtype) -> Array:
    return y + bias.astype(dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm over the last axis, statistics in fp32, result in `dtype`."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=jnp.float32,
        use_fast_variance=False,
        scale_init=partitioned(nn.initializers.ones, ("embed",)),
        bias_init=partitioned(nn.initializers.zeros, ("embed",)),
        name=name,
    )


class Attention(nn.Module):
    """Multi-head attention whose pattern, and memory if any, come from the caller."""

    shape: BlockShape
    deterministic: bool
    memory_shape: MemoryShape | None = None

    @nn.compact
    def __call__(
        self, x_BTD: Array, pattern: attention.Pattern, z_BTKE: Array | None
    ) -> tuple[Array, Array | None]:
        """Returns the output [B, T, D] and the share of weight on the memory [B, T] or None.

        z_BTKE: raw memory vectors; normed, projected and put beside the text keys (VALM, eq. 5).
        """
        shape = self.shape
        heads, head_width, width = shape.heads, shape.head_width, shape.width
        qkv = Projection(
            equation="btd,dcnh->btcnh",
            kernel_shape=(width, 3, heads, head_width),
            bias_shape=(3, heads, head_width),
            kernel_axes=("embed", None, "heads", "kv"),
            bias_axes=(None, "heads", "kv"),
            kernel_init=shape.init.qkv,
            bias_init=shape.init.qkv_bias,
            dtype=shape.dtype,
            name="qkv",
        )
        q_BTNH, k_BTNH, v_BTNH = jnp.moveaxis(qkv(x_BTD), 2, 0)
        memory, scaled_by = None, head_width
        if z_BTKE is not None:
            if self.memory_shape is None:
                raise ValueError("this attention was given a memory it has no parameters for")
            memory = MemoryProjection(shape, self.memory_shape, name="memory")(
                z_BTKE, qkv.kernel[:, 1:]
            )
            scaled_by = (
                width if self.memory_shape.fusion.query_scale == "model_width" else head_width
            )
        dropout = None
        if shape.attention_dropout > 0 and not self.deterministic:
            dropout = attention.Dropout(self.make_rng("dropout"), shape.attention_dropout)
        attend: Callable[..., attention.Attended]
        if isinstance(pattern, attention.Cached):
            size = (len(x_BTD), heads, pattern.capacity, head_width)
            kept_k = self.variable("cache", "k", jnp.zeros, size, k_BTNH.dtype)
            kept_v = self.variable("cache", "v", jnp.zeros, size, v_BTNH.dtype)
            kept_k.value = pattern.write(kept_k.value, k_BTNH)
            kept_v.value = pattern.write(kept_v.value, v_BTNH)
            attend = functools.partial(pattern.attend, k_BNSH=kept_k.value, v_BNSH=kept_v.value)
        else:
            attend = pattern.attend
        attended = attend(
            q_BTNH, k_BTNH, v_BTNH, scale=scaled_by**-0.5, memory=memory, dropout=dropout
        )
        if attended.memory_share_BNT is not None:
            self.sow("probes", "memory_share_BNT", attended.memory_share_BNT)
        # einsum sums over letters in their order: with these the kernel is read as it lies, with
        # n and h it is copied first, which one token at a time would notice.
        cached = isinstance(pattern, attention.Cached)
        out = Projection(
            equation="btij,ijd->btd" if cached else "btnh,nhd->btd",
            kernel_shape=(heads, head_width, width),
            bias_shape=(width,),
            kernel_axes=("heads", "kv", "embed"),
            bias_axes=("embed",),
            kernel_init=shape.init.out,
            bias_init=shape.init.out_bias,
            dtype=shape.dtype,
            name="out",
        )
        return out(attended.out_BTNH), attended.memory_share_BT


class MemoryProjection(nn.Module):
    """Keys and values of the memory: LayerNorm(z) W_kv + own biases.

    W_kv is the text's own in the reference (`grounding_kv=shared`). A memory of another width is
    first brought to the model's by a learned linear map.
    """

    shape: BlockShape
    memory_shape: MemoryShape

    @nn.compact
    def __call__(self, z_BTKE: Array, text_kv_DCNH: Array) -> attention.Memory:
        """z_BTKE to keys and values [B, T, K, N, H]; text_kv_DCNH: the text's kernel."""
        shape, memory_shape = self.shape, self.memory_shape
        heads, head_width, width = shape.heads, shape.head_width, shape.width
        if memory_shape.width != width:
            z_BTKE = Projection(
                equation="btke,ed->btkd",
                kernel_shape=(memory_shape.width, width),
                bias_shape=(width,),
                kernel_axes=(None, "embed"),
                bias_axes=("embed",),
                kernel_init=nn.initializers.lecun_normal(),
                bias_init=nn.initializers.zeros,
                dtype=shape.dtype,
                name="adapter",
            )(z_BTKE)
        z_BTKD = layer_norm(shape.norm_epsilon, shape.dtype, "norm")(z_BTKE)
        kernel_DCNH = text_kv_DCNH
        if memory_shape.fusion.grounding_kv == "own":
            axes = ("embed", None, "heads", "kv")
            init = partitioned(shape.init.qkv, axes)
            size = (width, 2, heads, head_width)
            kernel_DCNH = self.param("kv_kernel", init, size, jnp.float32)
        init = partitioned(shape.init.qkv_bias, (None, "heads", "kv"))
        bias_CNH = self.param("kv_bias", init, (2, heads, head_width), jnp.float32)
        kv = jnp.einsum("btkd,dcnh->btkcnh", z_BTKD, kernel_DCNH.astype(shape.dtype))
        k_BTKNH, v_BTKNH = jnp.moveaxis(_add_bias(kv, bias_CNH, shape.dtype), 3, 0)
        bias_N = None
        if memory_shape.fusion.memory_bias == "learned":
            # -10: a pretrained decoder starts out unchanged, the plain joint softmax would move it.
            init = partitioned(nn.initializers.constant(-10.0), ("heads",))
            bias_N = self.param("logit_bias", init, (heads,), jnp.float32)
        return attention.Memory(k_BTKNH, v_BTKNH, bias_N)


class Block(nn.Module):
    """Pre-norm transformer block; with a memory shape, its attention takes a memory."""

    shape: BlockShape
    deterministic: bool
    memory_shape: MemoryShape | None = None

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        pattern: attention.Pattern,
        z_BTKE: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """Returns x after the block [B, T, D] and the share of weight on the memory, or None."""
        shape = self.shape
        drop = nn.Dropout(shape.dropout, deterministic=self.deterministic)
        h_BTD = layer_norm(shape.norm_epsilon, shape.dtype, "ln_1")(x_BTD)
        attend = Attention(shape, self.deterministic, self.memory_shape, name="attn")
        h_BTD, share_BT = attend(h_BTD, pattern, z_BTKE)
        x_BTD = _constrain(x_BTD + drop(h_BTD))
        h_BTD = layer_norm(shape.norm_epsilon, shape.dtype, "ln_2")(x_BTD)
        h_BTF = Projection(
            equation="btd,df->btf",
            kernel_shape=(shape.width, shape.mlp_width),
            bias_shape=(shape.mlp_width,),
            kernel_axes=("embed", "mlp"),
            bias_axes=("mlp",),
            kernel_init=shape.init.mlp_in,
            bias_init=shape.init.mlp_in_bias,
            dtype=shape.dtype,
            name="c_fc",
        )(h_BTD)
        h_BTF = nn.with_logical_constraint(h_BTF, ("batch", "length", "mlp"))
        h_BTD = Projection(
            equation="btf,fd->btd",
            kernel_shape=(shape.mlp_width, shape.width),
            bias_shape=(shape.width,),
            kernel_axes=("mlp", "embed"),
            bias_axes=("embed",),
            kernel_init=shape.init.mlp_out,
            bias_init=shape.init.mlp_out_bias,
            dtype=shape.dtype,
            name="c_proj",
        )(ACTIVATIONS[shape.activation](h_BTF))
        x_BTD = _constrain(x_BTD + drop(h_BTD))
        self.sow("intermediates", "output", x_BTD)
        return x_BTD, share_BT


def _constrain(x_BTD: Array) -> Array:
    return nn.with_logical_constraint(x_BTD, ("batch", "length", "activation"))


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of plain blocks start .. stop-1, or one block with a memory."""

    start: int
    stop: int
    fused: bool

    @property
    def name(self) -> str:
        """Name of its parameters."""
        return f"fusion_{self.start}" if self.fused else f"blocks_{self.start}_{self.stop - 1}"


def split_stack(layers: int, fusion_layers: tuple[int, ...]) -> tuple[Segment, ...]:
    """Cuts `layers` blocks into stacked runs of plain blocks around the fusion blocks."""
    segments, start = [], 0
    for fused in sorted(fusion_layers):
        if start < fused:
            segments.append(Segment(start, fused, fused=False))
        segments.append(Segment(fused, fused + 1, fused=True))
        start = fused + 1
    if start < layers:
        segments.append(Segment(start, layers, fused=False))
    return tuple(segments)


class Stack(nn.Module):
    """All blocks of a model; runs of plain blocks are scanned over stacked parameters.

    stacked: False: each plain block has parameters of its own, as `decoding.unstacked` makes them.
    """

    shape: BlockShape
    layers: int
    deterministic: bool
    fusion_layers: tuple[int, ...] = ()
    memory_shape: MemoryShape | None = None
    remat: str = "none"
    scan_unroll: int = 1
    stacked: bool = True

    @nn.compact
    def __call__(
        self,
        x_BTD: Array,
        pattern: attention.Pattern,
        z_BTKE: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """Returns x after all blocks and the memory's share per fusion layer [L', B, T] or None."""
        # Inside a loop XLA cannot merge what is computed again with what was there; elsewhere it
        # must be kept from it.
        scanned_block, block = self._block(prevent_cse=self.scan_unroll > 1), self._block()
        shares: list[Array] = []
        for segment in split_stack(self.layers, self.fusion_layers):
            if segment.fused:
                fused = block(self.shape, self.deterministic, self.memory_shape, name=segment.name)
                x_BTD, share_BT = fused(x_BTD, pattern, z_BTKE)
                if share_BT is not None:
                    shares.append(share_BT)
            elif not self.stacked:
                for index in range(segment.start, segment.stop):
                    plain = block(self.shape, self.deterministic, name=f"block_{index}")
                    x_BTD, _ = plain(x_BTD, pattern)
            else:
                length = segment.stop - segment.start
                scanned = nn.scan(
                    scanned_block,
                    variable_axes={"params": 0, "intermediates": 0, "cache": 0},
                    split_rngs={"params": True, "dropout": True},
                    in_axes=nn.broadcast,
                    length=length,
                    unroll=min(self.scan_unroll, length),
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x_BTD, _ = scanned(self.shape, self.deterministic, name=segment.name)(
                    x_BTD, pattern
                )
        return x_BTD, jnp.stack(shares) if shares else None

    def _block(self, *, prevent_cse: bool = True) -> type[Block]:
        if self.remat == "none":
            return Block
        return nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=prevent_cse)
