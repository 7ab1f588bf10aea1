"""fairseq's Blind-VaLM, VaLM and GPT-2 decoders: tensor names under `decoder.`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from blindvalm_jax.interop import rules
from blindvalm_jax.interop.rules import Rule, Tensors
from blindvalm_jax.models.decoder import padded_vocab

# The reference saves these matrices and never uses them: the fusion layer projects its memory with
# the text's k_proj and v_proj. The other two are buffers that hold no learned value.
_DEAD = re.compile(
    r"layers\.\d+\.self_attn\.img_[kv]_proj\.weight$"
    r"|^version$|^embed_positions\._float_tensor$|^output_projection\.weight$"
)


def is_dead(name: str) -> bool:
    """True for tensors that a checkpoint holds and the reference never uses."""
    return _DEAD.search(name) is not None


def model_rules(vocab_multiple: int) -> list[Rule]:
    """Embedding (padded with zero rows) and final norm."""

    def pad(table: np.ndarray) -> np.ndarray:
        rows = padded_vocab(table.shape[0], vocab_multiple)
        return np.pad(table, ((0, rows - table.shape[0]), (0, 0)))

    embedding = Rule("wte", ("embed_tokens.weight",), pad, lambda table: (table,))
    return [embedding, *rules.norm("ln_f", "layer_norm")]


def block_rules(index: int, *, heads: int, fused: bool) -> list[Rule]:
    """One decoder layer; a fused one has the memory's norm and biases too."""
    layer = f"layers.{index}"
    attn = f"{layer}.self_attn"
    table = [
        *rules.norm("ln_1", f"{layer}.self_attn_layer_norm"),
        *rules.stacked_linear("attn/qkv", [f"{attn}.{x}_proj" for x in "qkv"], heads),
        *rules.attention_output(f"{attn}.out_proj", heads),
        *rules.norm("ln_2", f"{layer}.final_layer_norm"),
        *rules.linear("c_fc", f"{layer}.fc1"),
        *rules.linear("c_proj", f"{layer}.fc2"),
    ]
    if fused:
        biases = [f"{attn}.img_k_proj.bias", f"{attn}.img_v_proj.bias"]
        table += rules.norm("attn/memory/norm", f"{attn}.img_layer_norm")
        table.append(rules.stacked_bias("attn/memory/kv_bias", biases, heads))
    return table


def load_decoder(
    tensors: Tensors,
    *,
    layers: int,
    heads: int,
    fusion_layers: tuple[int, ...],
    vocab_multiple: int = 1,
    source: str,
) -> dict[str, Any]:
    """Our decoder parameters from fairseq's, whose names come without the `decoder.` in front."""
    return rules.load(
        tensors,
        model=model_rules(vocab_multiple),
        block=lambda index: block_rules(index, heads=heads, fused=index in fusion_layers),
        layers=layers,
        fusion_layers=fusion_layers,
        ignore=is_dead,
        source=source,
    )


def save_decoder(
    params: Mapping[str, Any],
    *,
    vocab_size: int,
    layers: int,
    heads: int,
    fusion_layers: tuple[int, ...],
) -> dict[str, np.ndarray]:
    """fairseq's tensors from our parameters (or from their gradients), without padded rows."""
    tensors = rules.save(
        params,
        model=model_rules(1),
        block=lambda index: block_rules(index, heads=heads, fused=index in fusion_layers),
        layers=layers,
        fusion_layers=fusion_layers,
    )
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"][:vocab_size]
    return tensors
