"""Pretrained CLIP text towers, wherever they are and in whichever layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from blindvalm_jax.config import TowerConfig
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import clip_hugging_face, clip_openai, tensor_files, weights
from blindvalm_jax.interop.clip_openai import load_params as load_openai

__all__ = ["Tower", "load_openai", "load_tower"]

_HUB_PATTERNS = ["*.json", "*.txt", "*.safetensors"]


class Tower(NamedTuple):
    """A pretrained tower.

    tokenizer_directory: where tokenizer files lie beside the weights, or None; source: the path or
    hub id it came from; sha256: `weights.params_sha256`.
    """

    config: TowerConfig
    params: dict[str, Any]
    tokenizer_directory: Path | None
    source: str
    sha256: str


def load_tower(
    name: str | Path, *, heads: int | None = None, activation: str | None = None
) -> Tower:
    """Reads a tower from a path or, where no such path exists, a Hugging Face hub id.

    A path may be a weights directory of ours, a Hugging Face or open_clip directory, or a file in
    OpenAI's layout. Only a hub id (`owner/name`) uses the network.

    heads, activation: for OpenAI's layout, where the file does not tell them (see `clip_openai`).

    Raises:
      UserError: nothing is there, or it holds no text tower that fits ours.
    """
    path = local_path(name)
    directory = path if path.is_dir() else path.parent
    config_path = path / "config.json"
    if path.is_dir() and weights.is_weights_directory(path):
        stored = weights.load(path, kind="clip_text")
        return Tower(
            stored.tower,
            stored.params,
            weights.tokenizer_directory(path),
            stored.source,
            stored.sha256,
        )
    if path.is_dir() and config_path.exists():
        content = tensor_files.read_json(config_path)
        if not clip_hugging_face.is_clip(content):
            raise UserError(
                f"{config_path}: expected model_type clip or clip_text_model, "
                f"got {content.get('model_type')!r}"
            )
        if heads is not None or activation is not None:
            raise UserError(f"{path}: its config.json tells heads and activation; leave them out")
        config, params = clip_hugging_face.load(path)
    else:
        config, params = clip_openai.load(path, heads=heads, activation=activation)
    return Tower(
        config,
        params,
        weights.tokenizer_directory(directory),
        str(name),
        weights.params_sha256(params),
    )


def local_path(name: str | Path) -> Path:
    """The path itself if it exists; otherwise a downloaded copy of the hub repository it names.

    Raises:
      UserError: it is neither, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        raise UserError(f"{name} does not exist: give a directory, a file or a hub id (owner/name)")
    import huggingface_hub
    import huggingface_hub.errors

    try:
        found = huggingface_hub.snapshot_download(str(name), allow_patterns=_HUB_PATTERNS)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(
            f"{name} is no path here, and as a hub id it cannot be had ({type(error).__name__}): "
            f"check the name, or download it and give the directory"
        ) from error
    if not any(Path(found).glob("*.safetensors")):
        raise UserError(
            f"{name} has no safetensors file on the hub, and nothing else is downloaded: fetch its "
            f"weights and config.json into a directory yourself and give that"
        )
    return Path(found)
