"""How parameters start: fairseq's scheme (the paper's), GPT-2's, and OpenAI CLIP's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initializers:
    """One initializer per kind of parameter of a transformer."""

    embedding: Initializer
    position: Initializer
    qkv: Initializer
    qkv_bias: Initializer
    out: Initializer
    out_bias: Initializer
    mlp_in: Initializer
    mlp_in_bias: Initializer
    mlp_out: Initializer
    mlp_out_bias: Initializer


def partitioned(init: Initializer, axes: tuple[str | None, ...]) -> Initializer:
    """The same initializer, its parameter carrying the names of its logical axes."""
    return cast(Initializer, nn.with_logical_partitioning(init, axes))


def uniform(bound: float) -> Initializer:
    """U(-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def fairseq(*, width: int, mlp_width: int) -> Initializers:
    """fairseq's `transformer_lm_gpt` (reference.md, section 1).

    q, k, v: Xavier uniform with gain 1/sqrt(2), each matrix alone; output Xavier uniform; MLP and
    the q, k, v biases as torch.nn.Linear starts them; embedding N(0, D^-1/2).
    """
    xavier = math.sqrt(3.0 / width)  # sqrt(6 / (D + D))
    return Initializers(
        embedding=nn.initializers.normal(width**-0.5),
        position=nn.initializers.normal(width**-0.5),
        qkv=uniform(xavier / math.sqrt(2.0)),
        qkv_bias=uniform(width**-0.5),
        out=uniform(xavier),
        out_bias=nn.initializers.zeros,
        mlp_in=uniform(width**-0.5),
        mlp_in_bias=uniform(width**-0.5),
        mlp_out=uniform(mlp_width**-0.5),
        mlp_out_bias=uniform(mlp_width**-0.5),
    )


def gpt2(*, layers: int) -> Initializers:
    """GPT-2's: N(0, 0.02), residual projections divided by sqrt(2 L), zero biases."""
    normal = nn.initializers.normal(0.02)
    residual = nn.initializers.normal(0.02 / math.sqrt(2 * layers))
    zeros = nn.initializers.zeros
    return Initializers(
        embedding=normal,
        position=nn.initializers.normal(0.01),
        qkv=normal,
        qkv_bias=zeros,
        out=residual,
        out_bias=zeros,
        mlp_in=normal,
        mlp_in_bias=zeros,
        mlp_out=residual,
        mlp_out_bias=zeros,
    )


def clip(*, width: int, layers: int) -> Initializers:
    """OpenAI CLIP's text tower: N(0, D^-1/2), MLP input (2 D)^-1/2, residuals / sqrt(2 L)."""
    zeros = nn.initializers.zeros
    residual = nn.initializers.normal(width**-0.5 / math.sqrt(2 * layers))
    return Initializers(
        embedding=nn.initializers.normal(0.02),
        position=nn.initializers.normal(0.01),
        qkv=nn.initializers.normal(width**-0.5),
        qkv_bias=zeros,
        out=residual,
        out_bias=zeros,
        mlp_in=nn.initializers.normal((2 * width) ** -0.5),
        mlp_in_bias=zeros,
        mlp_out=residual,
        mlp_out_bias=zeros,
    )


def clip_vision(*, width: int, layers: int) -> Initializers:
    """OpenAI CLIP's image tower: class and position vectors N(0, D^-1/2); blocks as the text's.

    For the blocks OpenAI's code states its scheme for the text tower alone.
    """
    normal = nn.initializers.normal(width**-0.5)
    return dataclasses.replace(clip(width=width, layers=layers), embedding=normal, position=normal)
