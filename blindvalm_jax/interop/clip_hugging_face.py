"""CLIP text towers in Hugging Face directories: `CLIPModel` and `CLIPTextModelWithProjection`.

The image side is read by `clip_hugging_face_vision`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blindvalm_jax import files
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import fields, rules, tensor_files, weights
from blindvalm_jax.interop.hugging_face import our_activation
from blindvalm_jax.interop.rules import Rule, Tensors
from blindvalm_jax.models.clip import TowerConfig

# Fields of the text config, with what transformers takes for one that is absent.
_FIELDS = {
    "vocab_size": fields.size(49408),
    "hidden_size": fields.size(512),
    "intermediate_size": fields.size(2048),
    "num_hidden_layers": fields.size(12),
    "num_attention_heads": fields.size(8),
    "max_position_embeddings": fields.size(77),
    "hidden_act": fields.name("quick_gelu"),
    "layer_norm_eps": fields.epsilon(1e-5),
    "bos_token_id": fields.token(49406),
    "eos_token_id": fields.token(49407),
}

# Older files hold the positions 0, 1, 2, ... as a buffer.
_BUFFER = "text_model.embeddings.position_ids"


def is_clip(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of a CLIP model or one of its towers."""
    return config.get("model_type") in ("clip", "clip_text_model", "clip_vision_model")


def load(directory: Path) -> tuple[TowerConfig, dict[str, Any]]:
    """The tower's config and our parameters; vision tensors are not read.

    Raises:
      UserError: the model has no text projection, or config and tensors do not fit ours.
    """
    content = files.read_object(directory / "config.json")
    source = str(directory)
    if content.get("model_type") not in ("clip", "clip_text_model"):
        raise UserError(
            f"{source}/config.json: expected model_type clip or clip_text_model, "
            f"got {content.get('model_type')!r}"
        )
    tensors = tensor_files.read_hugging_face(directory, skip=_skipped)
    check_projection(content, tensors, side="text", source=source)
    config = tower_config(content, tensors, source)
    params = rules.load(
        tensors,
        model=model_rules(),
        block=lambda index: block_rules(index, heads=config.heads),
        layers=config.layers,
        ignore=lambda name: name == _BUFFER,
        source=source,
    )
    weights.check(params, config, source)
    return config, params


def check_projection(content: dict[str, Any], tensors: Tensors, *, side: str, source: str) -> None:
    """Refuses a tower, "text" or "visual", whose features are not projected into CLIP's space."""
    projection = tensors.get(f"{side}_projection.weight")
    if projection is None or projection.ndim != 2:
        kinds = content.get("architectures")
        kind = kinds[0] if isinstance(kinds, list) and kinds else kinds
        name = "CLIPTextModel" if side == "text" else "CLIPVisionModel"
        raise UserError(
            f"{source} has no matrix {side}_projection.weight (architecture {kind}), so its "
            f"features are not in CLIP's space: take a CLIPModel or {name}WithProjection"
        )


def _skipped(name: str) -> bool:
    return name.startswith(("vision_model.", "visual_projection.")) or name == "logit_scale"


def tower_config(content: dict[str, Any], tensors: Tensors, source: str) -> TowerConfig:
    """The config of the text tower from a `config.json`; E is the height of text_projection."""
    where = f"{source}/config.json"
    values = fields.read(side_config(content, "text", where), _FIELDS, where)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        raise UserError(f"{where}: hidden_size {width} is not a multiple of {heads} heads")
    return TowerConfig(
        layers=values["num_hidden_layers"],
        width=width,
        heads=heads,
        mlp_width=values["intermediate_size"],
        projection=tensors["text_projection.weight"].shape[0],
        vocab_size=values["vocab_size"],
        context=values["max_position_embeddings"],
        activation=our_activation(values["hidden_act"], f"{where}: hidden_act"),
        norm_epsilon=values["layer_norm_eps"],
        start_id=_special(values["bos_token_id"], values["vocab_size"], stale=0, last=2),
        end_id=_special(values["eos_token_id"], values["vocab_size"], stale=2, last=1),
    )


def side_config(content: dict[str, Any], side: str, where: str) -> dict[str, Any]:
    """The table of one tower, "text" or "vision", in a `config.json`; a lone tower's is the whole.

    In a CLIPModel's the older form, `text_config_dict`, hides `text_config` as a whole: for a field
    that it lacks, transformers takes the default and not what `text_config` says.
    """
    if content["model_type"] != "clip":
        return content
    older = fields.table(content, f"{side}_config_dict", where)
    newer = fields.table(content, f"{side}_config", where)
    return older if older is not None else newer or {}


def _special(value: int | None, vocab_size: int, *, stale: int, last: int) -> int:
    """The id of the start or end token.

    Configs written before transformers 4.32 say 0 and 2, which CLIP's tokenizer never meant;
    transformers then looks for the largest id of a text, and CLIP's two specials end the
    vocabulary. An id outside the vocabulary is as meaningless.
    """
    if value is None or value == stale or not 0 <= value < vocab_size:
        return vocab_size - last
    return value


def model_rules() -> list[Rule]:
    """Embeddings, final norm, projection."""
    return [
        rules.same("token_embedding", "text_model.embeddings.token_embedding.weight"),
        rules.same("position_embedding", "text_model.embeddings.position_embedding.weight"),
        *rules.norm("ln_final", "text_model.final_layer_norm"),
        rules.transposed("text_projection", "text_projection.weight"),
    ]


def block_rules(index: int, *, heads: int, side: str = "text") -> list[Rule]:
    """One encoder layer of a tower, "text" or "vision"."""
    layer = f"{side}_model.encoder.layers.{index}"
    attn = f"{layer}.self_attn"
    return [
        *rules.norm("ln_1", f"{layer}.layer_norm1"),
        *rules.stacked_linear("attn/qkv", [f"{attn}.{x}_proj" for x in "qkv"], heads),
        *rules.attention_output(f"{attn}.out_proj", heads),
        *rules.norm("ln_2", f"{layer}.layer_norm2"),
        *rules.linear("c_fc", f"{layer}.mlp.fc1"),
        *rules.linear("c_proj", f"{layer}.mlp.fc2"),
    ]
