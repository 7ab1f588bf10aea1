"""Whole CLIPs, text and image tower together, and image towers alone, wherever they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from blindvalm_jax import hub
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import clip_hugging_face_vision, formats, run_directory, weights
from blindvalm_jax.models.contrastive import ClipConfig
from blindvalm_jax.models.vision import VisionConfig

__all__ = ["Clip", "Vision", "load_clip", "load_vision", "vision_shape"]


class Clip(NamedTuple):
    """A pretrained CLIP; its parameters are "text", "vision" and "logit_scale".

    tokenizer_directory: where tokenizer files lie beside the weights, or None; source: the path or
    hub id it came from. sha256: `weights.params_sha256` of all; text_sha256 and vision_sha256: of
    each tower's own tree, as `clip_text.load_tower` and `load_vision` report it; tokenizer: kind
    and fingerprint of the tokenizer it was trained with, where recorded.
    """

    config: ClipConfig
    params: dict[str, Any]
    tokenizer_directory: Path | None
    source: str
    sha256: str
    text_sha256: str
    vision_sha256: str
    tokenizer: dict[str, str] | None = None


class Vision(NamedTuple):
    """A pretrained image tower; source: the path or hub id; sha256: `weights.params_sha256`."""

    config: VisionConfig
    params: dict[str, Any]
    source: str
    sha256: str


def load_clip(name: str | Path) -> Clip:
    """Reads a CLIP from a path or, where no such path exists, a Hugging Face hub id.

    A path may be a contrastive run, a weights directory of ours of kind "clip", or a Hugging Face
    `CLIPModel`.

    Raises:
      UserError: nothing is there, or it holds no CLIP with both towers.
    """
    path = hub.local_path(name)
    layout = _layout(path)
    config: weights.Spec
    tokenizer, files = None, weights.tokenizer_directory(path)
    if layout == "weights":
        stored = weights.load(path, kind="clip")
        config, params, source = stored.config, stored.params, stored.source
        tokenizer = stored.tokenizer
    elif layout == "run":
        run = run_directory.load(path)
        config, params, source = run.config, run.params, f"{path}, step {run.step}"
        tokenizer, files = run.tokenizer, run.tokenizer_directory
    else:
        config, params = clip_hugging_face_vision.load_both(path)
        source = str(name)
    if not isinstance(config, ClipConfig):
        raise UserError(f"{path} is a {weights.kind_of(config)}, expected a CLIP")
    return Clip(
        config,
        params,
        files,
        source,
        weights.params_sha256(params),
        weights.params_sha256(params["text"]),
        weights.params_sha256(params["vision"]),
        tokenizer,
    )


def load_vision(name: str | Path) -> Vision:
    """Reads an image tower from a path or, where no such path exists, a Hugging Face hub id.

    A path may be a contrastive run or a weights directory of ours (of an image tower, or of a whole
    CLIP, whose image side is taken), a Hugging Face `CLIPModel` or `CLIPVisionModelWithProjection`.

    Raises:
      UserError: nothing is there, or it holds no image tower that fits ours.
    """
    path = hub.local_path(name)
    config: weights.Spec
    layout = _layout(path)
    if layout in ("weights", "run"):
        if layout == "weights":
            stored = weights.load(path, kind=("clip_vision", "clip"))
            config, params, source = stored.config, stored.params, stored.source
        else:
            clip = load_clip(path)
            config, params, source = clip.config, clip.params, clip.source
        if isinstance(config, ClipConfig):
            config, params = config.vision, params["vision"]
    else:
        config, params = clip_hugging_face_vision.load(path)
        source = str(name)
    if not isinstance(config, VisionConfig):
        raise TypeError(f"{path} gave a {type(config).__name__}")
    return Vision(config, params, source, weights.params_sha256(params))


def vision_shape(name: str | Path) -> VisionConfig | None:
    """The shape of the image tower that `load_vision` gives, whose weights are not read.

    None: there is none.

    Raises:
      UserError: nothing is there, or its files do not say.
    """
    path = hub.local_path(name)
    layout = formats.open_model(path).layout
    if layout == "hf_clip":
        return clip_hugging_face_vision.shape(path)
    if layout not in ("weights", "run"):
        return None
    spec = weights.spec(path) if layout == "weights" else run_directory.spec(path)
    if isinstance(spec, ClipConfig):
        return spec.vision
    return spec if isinstance(spec, VisionConfig) else None


def _layout(path: Path) -> str:
    layout = formats.open_model(path).layout
    if layout not in ("weights", "hf_clip", "run"):
        raise UserError(
            f"{path} holds no image tower that is read: expected the layout hf_clip, a "
            f"contrastive run or our weights, got {layout}"
        )
    return layout
