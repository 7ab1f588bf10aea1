"""GPT-2 in Hugging Face directories: into our decoder and, for a plain GPT-2, back out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from blindvalm_jax import files, trees
from blindvalm_jax.config import DecoderConfig, FusionConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import fields, rules, tensor_files, weights
from blindvalm_jax.interop.hugging_face import our_activation, their_activation
from blindvalm_jax.interop.rules import Rule

# Fields, with what transformers takes for one that is absent.
_FIELDS = {
    "vocab_size": fields.size(50257),
    "n_positions": fields.size(1024),
    "n_embd": fields.size(768),
    "n_layer": fields.size(12),
    "n_head": fields.size(12),
    "n_inner": fields.size(None),
    "activation_function": fields.name("gelu_new"),
    "resid_pdrop": fields.rate(0.1),
    "embd_pdrop": fields.rate(0.1),
    "attn_pdrop": fields.rate(0.1),
    "layer_norm_epsilon": fields.epsilon(1e-5),
}

# Options that change the function, with the only value that our decoder has.
_FIXED: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}

# The causal mask, and the number written where it hides a key: buffers of old files.
_BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_HEAD = "lm_head.weight"
_PREFIX = "transformer."


def is_gpt2(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a GPT-2."""
    return config.get("model_type") == "gpt2"


def model_rules(vocab_multiple: int) -> list[Rule]:
    """Embedding (padded with zero rows), positions, final norm."""
    return [
        rules.embedding("wte.weight", vocab_multiple),
        rules.same("wpe", "wpe.weight"),
        *rules.norm("ln_f", "ln_f"),
    ]


def block_rules(index: int, *, heads: int) -> list[Rule]:
    """One block; its matrices are [in, out] (Conv1D), q, k and v side by side in one."""
    layer = f"h.{index}"
    return [
        *rules.norm("ln_1", f"{layer}.ln_1"),
        Rule(
            "attn/qkv/kernel",
            (f"{layer}.attn.c_attn.weight",),
            lambda w: w.reshape(w.shape[0], 3, heads, -1),
            lambda kernel: (kernel.reshape(kernel.shape[0], -1),),
        ),
        rules.packed_bias(f"{layer}.attn.c_attn.bias", heads),
        Rule(
            "attn/out/kernel",
            (f"{layer}.attn.c_proj.weight",),
            lambda w: w.reshape(heads, -1, w.shape[1]),
            lambda kernel: (kernel.reshape(-1, kernel.shape[-1]),),
        ),
        rules.same("attn/out/bias", f"{layer}.attn.c_proj.bias"),
        *rules.norm("ln_2", f"{layer}.ln_2"),
        rules.same("c_fc/kernel", f"{layer}.mlp.c_fc.weight"),
        rules.same("c_fc/bias", f"{layer}.mlp.c_fc.bias"),
        rules.same("c_proj/kernel", f"{layer}.mlp.c_proj.weight"),
        rules.same("c_proj/bias", f"{layer}.mlp.c_proj.bias"),
    ]


def load(
    directory: str | Path, *, vocab_multiple: int = 128
) -> tuple[weights.DecoderSpec, dict[str, Any]]:
    """The decoder's spec and our parameters from a GPT2LMHeadModel or GPT2Model directory.

    vocab_multiple: the embedding table gets zero rows up to a multiple of this.

    Raises:
      UserError: naming the option our decoder does not have, or the tensors that do not fit.
    """
    directory = Path(directory).expanduser()
    where = directory / "config.json"
    config = _decoder_config(files.read_object(where), str(where), vocab_multiple)
    tensors = _without_head(tensor_files.read_hugging_face(directory), str(directory))
    params = rules.load(
        tensors,
        model=model_rules(vocab_multiple),
        block=lambda index: block_rules(index, heads=config.heads),
        layers=config.layers,
        ignore=lambda name: _BUFFERS.fullmatch(name) is not None,
        source=str(directory),
    )
    spec = weights.DecoderSpec(
        decoder=config, fusion=FusionConfig(), vocab_size=config.vocab_size, fusion_layers=()
    )
    weights.check(params, spec, str(directory))
    return spec, params


def _decoder_config(content: dict[str, Any], where: str, vocab_multiple: int) -> DecoderConfig:
    if not is_gpt2(content):
        raise UserError(f"{where}: expected model_type gpt2, got {content.get('model_type')!r}")
    odd = [
        f"{key}={content[key]!r}" for key, ours in _FIXED.items() if content.get(key, ours) != ours
    ]
    if odd:
        raise UserError(f"{where}: our decoder does not have the options {', '.join(odd)}")
    values = fields.read(content, _FIELDS, where)
    if values["resid_pdrop"] != values["embd_pdrop"]:
        raise UserError(
            f"{where}: resid_pdrop {values['resid_pdrop']} and embd_pdrop {values['embd_pdrop']} "
            f"differ, and our decoder has one rate for both: set them equal"
        )
    width, heads = values["n_embd"], values["n_head"]
    if width % heads:
        raise UserError(f"{where}: n_embd {width} is not a multiple of n_head {heads}")
    return DecoderConfig(
        layers=values["n_layer"],
        width=width,
        heads=heads,
        mlp_width=values["n_inner"] or 0,
        vocab_size=values["vocab_size"],
        vocab_multiple=vocab_multiple,
        positions="learned",
        max_positions=values["n_positions"],
        embedding_scale="none",
        activation=our_activation(values["activation_function"], f"{where}: activation_function"),
        norm_epsilon=values["layer_norm_epsilon"],
        dropout=values["resid_pdrop"],
        attention_dropout=values["attn_pdrop"],
        init="gpt2",
        fusion_layers=(),
    )


def _without_head(tensors: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Names without `transformer.`, and without an output projection that repeats the embedding."""
    head = tensors.pop(_HEAD, None)
    if any(name.startswith(_PREFIX) for name in tensors):
        outside = [name for name in tensors if not name.startswith(_PREFIX)]
        if outside:
            raise UserError(f"{source}: tensors outside the decoder, not understood: {outside}")
        tensors = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    if head is not None and not np.array_equal(head, tensors.get("wte.weight", np.zeros(0))):
        raise UserError(
            f"{source}: {_HEAD} differs from wte.weight, and our output projection is tied to the "
            f"embedding: this model cannot be expressed"
        )
    return tensors


def export_gpt2(
    params: Mapping[str, Any],
    config: DecoderConfig,
    *,
    vocab_size: int,
    directory: str | Path,
    eos_id: int | None = None,
    tokenizer_files: Path | None = None,
) -> None:
    """Writes a plain GPT-2 that `transformers.GPT2LMHeadModel.from_pretrained` reads.

    vocab_size: real entries; padded rows are left out. eos_id: where generation stops by itself;
    None writes null. tokenizer_files: the directory whose tokenizer files are copied beside it.

    Raises:
      UserError: GPT-2 has no place for something in the model, or the directory holds a model.
    """
    check_expressible(params, config)
    directory = Path(directory).expanduser()
    spec = weights.DecoderSpec(decoder=config, fusion=FusionConfig(), vocab_size=vocab_size)
    weights.check(params, spec, "parameters to export")
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise UserError(f"eos_id must be in 0 to {vocab_size - 1}, got {eos_id}")
    tensors = rules.save(
        params,
        model=model_rules(1),
        block=lambda index: block_rules(index, heads=config.heads),
        layers=config.layers,
    )
    tensors["wte.weight"] = np.ascontiguousarray(tensors["wte.weight"][:vocab_size])
    tensors = {f"{_PREFIX}{name}": array for name, array in tensors.items()}
    content = _config_json(config, vocab_size=vocab_size, eos_id=eos_id)
    generation = {"bos_token_id": eos_id, "eos_token_id": eos_id}
    if (directory / "config.json").exists() or (directory / "model.safetensors").exists():
        raise UserError(f"{directory} holds a model already: choose a new directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if tokenizer_files is not None:
            weights.copy_tokenizer(tokenizer_files, directory)
        saved = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        files.write_bytes(directory / "model.safetensors", saved)
        files.write_json(directory / "generation_config.json", generation)
        files.write_json(directory / "config.json", content)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error}") from error


def _config_json(config: DecoderConfig, *, vocab_size: int, eos_id: int | None) -> dict[str, Any]:
    return {
        **_FIXED,
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_width or None,
        "activation_function": their_activation(config.activation),
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "layer_norm_epsilon": config.norm_epsilon,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "dtype": "float32",
    }


def check_expressible(params: Mapping[str, Any], config: DecoderConfig) -> None:
    """Checks that a model is a plain GPT-2.

    Raises:
      UserError: naming what GPT-2 has no place for.
    """
    fused = sorted({path.split("/")[1] for path in trees.flatten(params) if "/fusion_" in path})
    if fused:
        raise UserError(f"GPT-2 has no place for the grounding of {', '.join(fused)}")
    if config.positions != "learned":
        raise UserError(
            "GPT-2 has learned positions: a model with decoder.positions=sinusoidal cannot be "
            "exported as one"
        )
    if config.embedding_scale != "none":
        raise UserError(
            f"GPT-2 does not scale its embeddings, and they are tied to its output, so that "
            f"decoder.embedding_scale={config.embedding_scale} cannot be folded into them"
        )
