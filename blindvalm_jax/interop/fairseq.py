"""fairseq's Blind-VaLM, VaLM and GPT-2 decoders: tensor names under `decoder.`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax.config import DecoderConfig, FusionConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import fields, rules, tensor_files, weights
from blindvalm_jax.interop.rules import Rule, Tensors

# The reference saves these matrices and never uses them: the fusion layer projects its memory with
# the text's k_proj and v_proj. The other two are buffers that hold no learned value.
_DEAD = re.compile(
    r"layers\.\d+\.self_attn\.img_[kv]_proj\.weight$"
    r"|^version$|^embed_positions\._float_tensor$|^output_projection\.weight$"
)

# fairseq's names of activations; gelu_fast is an older name of gelu_accurate.
_ACTIVATIONS = {"gelu": "gelu_erf", "gelu_accurate": "gelu_tanh", "gelu_fast": "gelu_tanh"}

# Arguments of a checkpoint that are read; dropout, where it is not stated, is ours.
_FIELDS = {
    "decoder_attention_heads": fields.size(None),
    "activation_fn": fields.name(None),
    "no_token_positional_embeddings": fields.switch(False),
    "no_scale_embedding": fields.switch(False),
    "dropout": fields.rate(DecoderConfig.dropout),
    "attention_dropout": fields.rate(DecoderConfig.attention_dropout),
}


def is_dead(name: str) -> bool:
    """True for tensors that a checkpoint holds and the reference never uses."""
    return _DEAD.search(name) is not None


def model_rules(vocab_multiple: int) -> list[Rule]:
    """Embedding (padded with zero rows) and final norm."""
    embedding = rules.embedding("embed_tokens.weight", vocab_multiple)
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


def load_checkpoint(
    path: str | Path,
    *,
    heads: int | None = None,
    activation: str | None = None,
    vocab_multiple: int = 128,
    content: Any = None,
) -> tuple[weights.DecoderSpec, dict[str, Any]]:
    """The decoder's spec and our parameters from a whole checkpoint (.pt) or a .safetensors file.

    Sizes come from the tensors; the fusion layers are those with img_* tensors. heads: needed where
    the checkpoint carries no arguments. activation: the exact GELU, which all architectures of the
    reference use, unless the arguments or the caller say otherwise. content: of a torch file, when
    it has been read.

    Raises:
      UserError: naming what is missing, not understood, or contradicts the checkpoint's arguments.
    """
    path = Path(path).expanduser()
    source = str(path)
    arguments: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        tensors = tensor_files.read_safetensors(path)
    else:
        content = tensor_files.read_torch(path) if content is None else content
        arguments = _arguments(content)
        tensors = tensor_files.state_dict(content, path)
    tensors = _decoder_tensors(tensors, source)
    spec = _spec(
        tensors,
        arguments,
        heads=heads,
        activation=activation,
        multiple=vocab_multiple,
        source=source,
    )
    params = load_decoder(
        tensors,
        layers=spec.decoder.layers,
        heads=spec.decoder.heads,
        fusion_layers=spec.fusion_layers,
        vocab_multiple=vocab_multiple,
        source=source,
    )
    weights.check(params, spec, source)
    return spec, params


def has_layout(names: set[str]) -> bool:
    """Whether tensor names are those of a fairseq decoder."""
    return any(re.match(r"(decoder\.)?layers\.\d+\.self_attn\.[kqv]_proj\.", n) for n in names)


def _arguments(content: Any) -> dict[str, Any]:
    """The arguments of the model in a checkpoint: `args`, or `cfg.model` since fairseq 1.0."""
    if not isinstance(content, Mapping):
        return {}
    found = content.get("args")
    if found is None and isinstance(content.get("cfg"), Mapping):
        found = content["cfg"].get("model")
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    return dict(found) if isinstance(found, Mapping) else {}


def _decoder_tensors(tensors: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Names without `decoder.`; others are left as they are, and so reported by `load_decoder`."""
    if not has_layout(set(tensors)):
        raise UserError(
            f"{source} is no fairseq decoder: no tensor decoder.layers.N.self_attn.k_proj among "
            f"{sorted(tensors)[:8]}"
        )
    if any(name.startswith("decoder.") for name in tensors):
        outside = [name for name in tensors if not name.startswith("decoder.")]
        if outside:
            raise UserError(f"{source}: tensors outside the decoder, not understood: {outside}")
        tensors = {name.removeprefix("decoder."): value for name, value in tensors.items()}
    head, table = tensors.get("output_projection.weight"), tensors.get("embed_tokens.weight")
    if head is not None and (table is None or not np.array_equal(head, table)):
        raise UserError(
            f"{source}: output_projection.weight differs from embed_tokens.weight, and our output "
            f"projection is tied to the embedding: this model cannot be expressed"
        )
    return tensors


def _spec(
    tensors: Tensors,
    arguments: dict[str, Any],
    *,
    heads: int | None,
    activation: str | None,
    multiple: int,
    source: str,
) -> weights.DecoderSpec:
    arguments = fields.read(arguments, _FIELDS, f"{source}: arguments")
    # The one choice of fairseq's that changes the function without a trace in the tensors.
    if arguments["no_token_positional_embeddings"]:
        raise UserError(f"{source}: our decoder is not made without position embeddings")
    stated = None
    if arguments["activation_fn"] is not None:
        if arguments["activation_fn"] not in _ACTIVATIONS:
            raise UserError(
                f"{source}: activation_fn must be one of {', '.join(_ACTIVATIONS)}, "
                f"got {arguments['activation_fn']!r}"
            )
        stated = _ACTIVATIONS[arguments["activation_fn"]]
    table, wide = tensors.get("embed_tokens.weight"), tensors.get("layers.0.fc1.weight")
    if table is None or wide is None or table.ndim != 2 or wide.ndim != 2:
        raise UserError(
            f"{source}: expected the matrices embed_tokens.weight and layers.0.fc1.weight among "
            f"{sorted(tensors)[:8]}"
        )
    vocab_size, width = table.shape
    heads = _agreed("heads", heads, arguments["decoder_attention_heads"], source)
    if heads is None or heads < 1 or width % heads:
        raise UserError(f"{source}: give --heads, a divisor of the width {width}; got {heads}")
    layers = {int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))}
    fused = {int(m[1]) for n in tensors if (m := re.match(r"layers\.(\d+)\.self_attn\.img_", n))}
    config = DecoderConfig(
        layers=max(layers) + 1,
        width=width,
        heads=heads,
        mlp_width=wide.shape[0],
        vocab_size=vocab_size,
        vocab_multiple=multiple,
        embedding_scale="none" if arguments["no_scale_embedding"] else "sqrt_width",
        activation=_agreed("activation", activation, stated, source) or "gelu_erf",
        dropout=arguments["dropout"],
        attention_dropout=arguments["attention_dropout"],
        fusion_layers=tuple(sorted(fused)),
    )
    return weights.DecoderSpec(
        decoder=config,
        fusion=FusionConfig(query_scale="model_width", grounding_kv="shared", memory_bias="none"),
        vocab_size=vocab_size,
        fusion_layers=tuple(sorted(fused)),
        memory_width=width if fused else 0,
    )


def _agreed(name: str, given: Any, stated: Any, source: str) -> Any:
    """The value the caller gave or the checkpoint states; both must agree where both exist."""
    if given is not None and stated is not None and given != stated:
        raise UserError(f"{source} states {name} {stated}, got --{name}={given}: leave it out")
    return stated if given is None else given
