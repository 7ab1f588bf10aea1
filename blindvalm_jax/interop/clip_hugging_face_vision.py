"""CLIP's image side in Hugging Face directories, alone or beside its text side.

`CLIPVisionModelWithProjection` holds an image tower, `CLIPModel` both towers and the scale.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import clip_hugging_face, fields, rules, tensor_files, weights
from blindvalm_jax.interop.hugging_face import our_activation
from blindvalm_jax.interop.rules import Rule, Tensors
from blindvalm_jax.models.contrastive import ClipConfig
from blindvalm_jax.models.vision import CLIP_MEAN, CLIP_STD, VisionConfig

# The cap of CLIP's scale; no file says it.
SCALE_CAP = 100.0

# Fields of the vision config, with what transformers takes for one that is absent.
_FIELDS = {
    "hidden_size": fields.size(768),
    "intermediate_size": fields.size(3072),
    "num_hidden_layers": fields.size(12),
    "num_attention_heads": fields.size(12),
    "num_channels": fields.size(3),
    "image_size": fields.size(224),
    "patch_size": fields.size(32),
    "hidden_act": fields.name("quick_gelu"),
    "layer_norm_eps": fields.epsilon(1e-5),
}
_SCALE = {"logit_scale_init_value": fields.Field(2.6592, float, low=-10.0, high=10.0)}
_SWITCHES = {"do_rescale": fields.switch(True), "do_normalize": fields.switch(True)}
_RESCALE = {"rescale_factor": fields.Field(1 / 255, float)}

_MODELS = ("clip", "clip_vision_model")
_PROJECTION = "visual_projection.weight"
# Older files hold the positions 0, 1, 2, ... as a buffer.
_BUFFER = "vision_model.embeddings.position_ids"


def load(directory: Path) -> tuple[VisionConfig, dict[str, Any]]:
    """The image tower's config and our parameters; text tensors are not read.

    Raises:
      UserError: the model has no visual projection, or config and tensors do not fit ours.
    """
    content = files.read_object(directory / "config.json")
    source = str(directory)
    if content.get("model_type") not in _MODELS:
        raise UserError(
            f"{source}/config.json: expected model_type clip or clip_vision_model, "
            f"got {content.get('model_type')!r}"
        )
    tensors = tensor_files.read_hugging_face(directory, skip=_skipped)
    clip_hugging_face.check_projection(content, tensors, side="visual", source=source)
    config = vision_config(content, tensors, directory)
    params = rules.load(
        tensors,
        model=model_rules(config.patch),
        block=lambda index: clip_hugging_face.block_rules(index, heads=config.heads, side="vision"),
        layers=config.layers,
        ignore=lambda name: name == _BUFFER,
        source=source,
    )
    weights.check(params, config, source)
    return config, params


def shape(directory: Path) -> VisionConfig | None:
    """The shape of the image tower, None where there is none; of tensors its projection is read."""
    content = files.read_object(directory / "config.json")
    if content.get("model_type") not in _MODELS:
        return None
    tensors = tensor_files.read_hugging_face(directory, skip=lambda name: name != _PROJECTION)
    return vision_config(content, tensors, directory) if _PROJECTION in tensors else None


def load_both(directory: Path) -> tuple[ClipConfig, dict[str, Any]]:
    """A `CLIPModel` as the parameters "text", "vision" and "logit_scale".

    Raises:
      UserError: it lacks a side or the scale, or one does not fit ours.
    """
    content = files.read_object(directory / "config.json")
    source = str(directory)
    if content.get("model_type") != "clip":
        raise UserError(
            f"{source}/config.json: expected model_type clip for both towers, "
            f"got {content.get('model_type')!r}"
        )
    start = fields.read(content, _SCALE, f"{source}/config.json")["logit_scale_init_value"]
    text_config, text = clip_hugging_face.load(directory)
    vision_config, vision = load(directory)
    scale = tensor_files.read_hugging_face(directory, skip=lambda name: name != "logit_scale")
    if "logit_scale" not in scale or scale["logit_scale"].size != 1:
        raise UserError(f"{source}: expected a number logit_scale, got {scale or 'none'}")
    config = ClipConfig(
        text=text_config,
        vision=vision_config,
        temperature_start=min(math.exp(start), SCALE_CAP),  # 4.6052 is a hair above it
        temperature_cap=SCALE_CAP,
    )
    params = {"text": text, "vision": vision, "logit_scale": scale["logit_scale"].reshape(())}
    weights.check(params, config, source)
    return config, params


def _skipped(name: str) -> bool:
    return name.startswith(("text_model.", "text_projection.")) or name == "logit_scale"


def vision_config(content: dict[str, Any], tensors: Tensors, directory: Path) -> VisionConfig:
    """The config of the image tower; E is the height of visual_projection."""
    where = f"{directory}/config.json"
    table = clip_hugging_face.side_config(content, "vision", where)
    values = fields.read(table, _FIELDS, where)
    if values["num_channels"] != 3:
        raise UserError(f"{where}: num_channels must be 3, got {values['num_channels']}")
    activation = our_activation(values["hidden_act"], f"{where}: hidden_act")
    mean, std = _normalisation(directory)
    try:
        return VisionConfig(
            kind="vit",
            image_size=values["image_size"],
            patch=values["patch_size"],
            layers=values["num_hidden_layers"],
            width=values["hidden_size"],
            heads=values["num_attention_heads"],
            mlp_width=values["intermediate_size"],
            projection=tensors["visual_projection.weight"].shape[0],
            activation=activation,
            norm_epsilon=values["layer_norm_eps"],
            mean=mean,
            std=std,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _normalisation(directory: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the colours from the directory's image processor; else CLIP's.

    Processors are found as transformers finds them: inside `processor_config.json`, or in a file of
    their own.
    """
    content: dict[str, Any] | None = None
    whole, where = directory / "processor_config.json", ""
    if whole.exists():
        where = f"{whole}: image_processor"
        content = fields.table(files.read_object(whole), "image_processor", str(whole))
    if content is None and (directory / "preprocessor_config.json").exists():
        where = str(directory / "preprocessor_config.json")
        content = files.read_object(directory / "preprocessor_config.json")
    if content is None:
        return CLIP_MEAN, CLIP_STD
    off = [name for name, on in fields.read(content, _SWITCHES, where).items() if not on]
    factor = fields.read(content, _RESCALE, where)["rescale_factor"]
    if off or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(
            f"{where}: this tower takes bytes / 255 and normalises them, got "
            f"{', '.join(f'{name}=false' for name in off) or f'rescale_factor={factor}'}"
        )
    return (
        _colours(content.get("image_mean"), CLIP_MEAN, f"{where}: image_mean"),
        _colours(content.get("image_std"), CLIP_STD, f"{where}: image_std"),
    )


def _colours(value: Any, default: tuple[float, ...], where: str) -> tuple[float, ...]:
    """Three numbers; what transformers takes for ones that are absent."""
    if value is None:
        return default
    numbers = isinstance(value, list) and all(type(x) in (int, float) for x in value)
    if not numbers or len(value) != 3:
        raise UserError(f"{where} must be three numbers, got {value!r}")
    return tuple(float(x) for x in value)


def model_rules(patch: int) -> list[Rule]:
    """Embeddings, norms before and after the blocks, projection.

    The convolution's weight [D, C, side, side] is our kernel [side * side * C, D].
    """

    def load_patches(weight: np.ndarray) -> np.ndarray:
        return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])

    def save_patches(kernel: np.ndarray) -> tuple[np.ndarray, ...]:
        width = kernel.shape[1]
        return (kernel.reshape(patch, patch, -1, width).transpose(3, 2, 0, 1),)

    embeddings = "vision_model.embeddings"
    convolution = (f"{embeddings}.patch_embedding.weight",)
    return [
        rules.same("class_embedding", f"{embeddings}.class_embedding"),
        Rule("patch_embedding", convolution, load_patches, save_patches),
        rules.same("position_embedding", f"{embeddings}.position_embedding.weight"),
        # The name is misspelt there.
        *rules.norm("ln_pre", "vision_model.pre_layrnorm"),
        *rules.norm("ln_post", "vision_model.post_layernorm"),
        rules.transposed("visual_projection", "visual_projection.weight"),
    ]
