"""CLIP text towers as OpenAI and open_clip lay them out: `transformer.resblocks.N` (reference.md, 1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from blindvalm_jax.config import TowerConfig
from blindvalm_jax.interop import rules
from blindvalm_jax.interop.rules import Rule, Tensors


def openai_model_rules() -> list[Rule]:
    """Embeddings, final norm, projection (used as x @ P, so not transposed)."""
    return [
        rules.same("token_embedding", "token_embedding.weight"),
        rules.same("position_embedding", "positional_embedding"),
        *rules.norm("ln_final", "ln_final"),
        rules.same("text_projection", "text_projection"),
    ]


def openai_block_rules(index: int, *, heads: int) -> list[Rule]:
    """One residual attention block; q, k, v are rows of one matrix [3 D, D]."""
    layer = f"transformer.resblocks.{index}"

    def load_kernel(weight: np.ndarray) -> np.ndarray:
        width = weight.shape[1]
        return weight.T.reshape(width, 3, heads, width // heads)

    def save_kernel(kernel: np.ndarray) -> tuple[np.ndarray, ...]:
        return (kernel.reshape(kernel.shape[0], -1).T,)

    return [
        *rules.norm("ln_1", f"{layer}.ln_1"),
        Rule("attn/qkv/kernel", (f"{layer}.attn.in_proj_weight",), load_kernel, save_kernel),
        Rule(
            "attn/qkv/bias",
            (f"{layer}.attn.in_proj_bias",),
            lambda bias: bias.reshape(3, heads, -1),
            lambda bias: (bias.reshape(-1),),
        ),
        *rules.attention_output(f"{layer}.attn.out_proj", heads),
        *rules.norm("ln_2", f"{layer}.ln_2"),
        *rules.linear("c_fc", f"{layer}.mlp.c_fc"),
        *rules.linear("c_proj", f"{layer}.mlp.c_proj"),
    ]


def load_openai(tensors: Tensors, *, config: TowerConfig, source: str) -> dict[str, Any]:
    """Our tower parameters from the text part of an OpenAI or open_clip checkpoint."""
    return rules.load(
        tensors,
        model=openai_model_rules(),
        block=lambda index: openai_block_rules(index, heads=config.heads),
        layers=config.layers,
        source=source,
    )
