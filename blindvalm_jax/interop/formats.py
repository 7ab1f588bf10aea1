"""Pretrained models in any format: which format a path holds, and reading it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import (
    clip_hugging_face,
    clip_openai,
    clip_text,
    fairseq,
    gpt2,
    tensor_files,
    weights,
)

FORMATS = ("hf_gpt2", "hf_clip", "openai_clip", "open_clip", "fairseq")


@dataclasses.dataclass(frozen=True)
class Converted:
    """A model that was read; tokenizer_directory: where its tokenizer files lie, if any do."""

    config: weights.Spec
    params: dict[str, Any]
    tokenizer_directory: Path | None


def read(
    name: str, *, layout: str = "auto", heads: int | None = None, activation: str | None = None
) -> Converted:
    """Reads a model in any of the formats; "auto" finds out which.

    Raises:
      UserError: the format is not known, does not fit, or was given an option it does not take.
    """
    path = clip_text.local_path(name)
    if layout == "auto":
        layout = recognise(path)
    if layout in ("hf_gpt2", "hf_clip") and (heads is not None or activation is not None):
        raise UserError(f"{path}: its config.json tells heads and activation; leave them out")
    if layout == "fairseq":
        spec, params = fairseq.load_checkpoint(path, heads=heads, activation=activation)
        return Converted(spec, params, None)
    if layout == "hf_gpt2":
        spec, params = gpt2.load(path)
        return Converted(spec, params, weights.tokenizer_directory(path))
    if layout == "hf_clip":
        tower, params = clip_hugging_face.load(path)
    else:
        tower, params = clip_openai.load(path, heads=heads, activation=activation)
    directory = path if path.is_dir() else path.parent
    return Converted(tower, params, weights.tokenizer_directory(directory))


def recognise(path: Path) -> str:
    """The format of a directory, by its config, or of a file, by its tensors' names."""
    if path.is_dir():
        if weights.is_weights_directory(path):
            raise UserError(f"{path} is a weights directory already: give --to to convert it")
        if (path / "config.json").exists():
            content = tensor_files.read_json(path / "config.json")
            if gpt2.is_gpt2(content):
                return "hf_gpt2"
            if clip_hugging_face.is_clip(content):
                return "hf_clip"
        if (path / clip_openai.OPEN_CLIP_CONFIG).exists():
            return "open_clip"
        raise UserError(
            f"{path} has no config.json of a GPT-2 or CLIP and no {clip_openai.OPEN_CLIP_CONFIG}: "
            f"give the weights file itself, or --from"
        )
    names = tensor_files.names(path)
    if fairseq.has_layout(names):
        return "fairseq"
    if clip_openai.has_layout(names):
        return "openai_clip"
    raise UserError(
        f"{path}: its tensors are of no known layout ({', '.join(sorted(names)[:4])}, ...); for a "
        f"Hugging Face model give its directory"
    )
