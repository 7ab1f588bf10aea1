"""Pretrained CLIP text towers, wherever they are and in whichever layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from blindvalm_jax import hub
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import formats, weights
from blindvalm_jax.interop.clip_openai import load_params as load_openai
from blindvalm_jax.models.clip import TowerConfig
from blindvalm_jax.models.contrastive import ClipConfig

__all__ = ["Tower", "load_openai", "load_tower"]


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

    A path may be a weights directory of ours (of a text tower, or of a whole CLIP, whose text side
    is taken), a Hugging Face or open_clip directory, or a file in OpenAI's layout. Only a hub id
    uses the network.

    heads, activation: for OpenAI's layout, where the file does not tell them (see `clip_openai`).

    Raises:
      UserError: nothing is there, or it holds no text tower that fits ours.
    """
    path = hub.local_path(name)
    found = formats.open_model(path)
    if found.layout == "weights":
        stored = weights.load(path, kind=("clip_text", "clip"))
        files = weights.tokenizer_directory(path)
        if isinstance(stored.config, ClipConfig):
            params = stored.params["text"]
            sha256 = weights.params_sha256(params)
            return Tower(stored.config.text, params, files, stored.source, sha256)
        return Tower(stored.tower, stored.params, files, stored.source, stored.sha256)
    if found.layout not in formats.TOWERS:
        raise UserError(
            f"{path} holds no CLIP text tower: expected the layout {', '.join(formats.TOWERS)} or "
            f"our weights, got {found.layout}"
        )
    model = formats.load(found, heads=heads, activation=activation)
    if not isinstance(model.config, TowerConfig):
        raise TypeError(f"{found.layout} gave a {type(model.config).__name__}")
    sha256 = weights.params_sha256(model.params)
    return Tower(model.config, model.params, model.tokenizer_directory, str(name), sha256)
