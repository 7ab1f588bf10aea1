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
    hub id it came from; sha256: `weights.params_sha256`; tokenizer: kind and fingerprint of the
    tokenizer it was trained with, where recorded.
    """

    config: TowerConfig
    params: dict[str, Any]
    tokenizer_directory: Path | None
    source: str
    sha256: str
    tokenizer: dict[str, str] | None = None


def load_tower(
    name: str | Path, *, heads: int | None = None, activation: str | None = None
) -> Tower:
    """Reads a tower from a path or, where no such path exists, a Hugging Face hub id.

    A path may be a contrastive run or a weights directory of ours (of a text tower, or of a whole
    CLIP, whose text side is taken), a Hugging Face or open_clip directory, or a file in OpenAI's
    layout. Only a hub id uses the network.

    heads, activation: for OpenAI's layout, where the file does not tell them (see `clip_openai`).

    Raises:
      UserError: nothing is there, or it holds no text tower that fits ours.
    """
    path = hub.local_path(name)
    found = formats.open_model(path)
    if found.layout == "weights":
        stored = weights.load(path, kind=("clip_text", "clip"))
        files = weights.tokenizer_directory(path)
        return _text_side(
            stored.config, stored.params, files, stored.source, stored.tokenizer, path
        )
    if found.layout not in (*formats.TOWERS, "run"):
        raise UserError(
            f"{path} holds no CLIP text tower: expected the layout {', '.join(formats.TOWERS)}, a "
            f"contrastive run or our weights, got {found.layout}"
        )
    model = formats.load(found, heads=heads, activation=activation)
    source = model.source if found.layout == "run" else str(name)
    return _text_side(
        model.config, model.params, model.tokenizer_directory, source, model.tokenizer, path
    )


def _text_side(
    config: weights.Spec,
    params: dict[str, Any],
    files: Path | None,
    source: str,
    tokenizer: dict[str, str] | None,
    path: Path,
) -> Tower:
    """The text tower that was read, alone or as the side of a CLIP."""
    if isinstance(config, ClipConfig):
        config, params = config.text, params["text"]
    if not isinstance(config, TowerConfig):
        raise UserError(f"{path} is a {weights.kind_of(config)}, expected a CLIP or its text tower")
    return Tower(config, params, files, source, weights.params_sha256(params), tokenizer)
