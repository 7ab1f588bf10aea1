"""Pretrained models in any format: which format a path holds, and reading it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from blindvalm_jax import files, hub
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import (
    clip_hugging_face,
    clip_hugging_face_vision,
    clip_openai,
    fairseq,
    gpt2,
    run_directory,
    tensor_files,
    weights,
)

TOWERS = ("hf_clip", "openai_clip", "open_clip")
FORMATS = ("run", "hf_gpt2", "fairseq", *TOWERS)

# What may be read of a Hugging Face CLIP.
SIDES = ("text", "image", "both")

# Formats that say themselves how many heads there are and which activation.
_COMPLETE = ("run", "hf_gpt2", "hf_clip")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A path and its layout: one of `FORMATS`, or "weights" for a weights directory of ours.

    content: what a torch file holds, so that it is read once; None for everything else.
    """

    path: Path
    layout: str
    content: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """A model that was read.

    source: where from; tokenizer_directory: where its tokenizer files lie, if any do; tokenizer:
    kind and fingerprint, where the source records them; eos_id: the same for the id that ends a
    document.
    """

    config: weights.Spec
    params: dict[str, Any]
    source: str
    tokenizer_directory: Path | None = None
    tokenizer: dict[str, str] | None = None
    eos_id: int | None = None


def read(
    name: str,
    *,
    layout: str = "auto",
    heads: int | None = None,
    activation: str | None = None,
    towers: str = "text",
) -> Converted:
    """Reads a model in any of the formats, from a path or hub id; "auto" finds out which.

    towers: what is read of a Hugging Face CLIP, one of `SIDES`.

    Raises:
      UserError: the format is not known, does not fit, or was given an option it does not take.
    """
    path = hub.local_path(name)
    found = open_model(path) if layout == "auto" else Opened(path, layout)
    model = load(found, heads=heads, activation=activation, towers=towers)
    # A hub id says more than the place of its copy here.
    return model if model.source != str(path) else dataclasses.replace(model, source=name)


def open_model(path: Path) -> Opened:
    """Finds out the layout of a directory by its config, or of a file by its tensors' names.

    Raises:
      UserError: it is of none.
    """
    if path.is_dir():
        return Opened(path, _layout_of_directory(path))
    content = None if path.suffix == ".safetensors" else tensor_files.read_torch(path)
    names = tensor_files.names(path, content)
    if fairseq.has_layout(names):
        return Opened(path, "fairseq", content)
    if clip_openai.has_layout(names):
        return Opened(path, "openai_clip", content)
    raise UserError(
        f"{path}: its tensors are of no known layout ({', '.join(sorted(names)[:4])}, ...); for a "
        f"Hugging Face model give its directory"
    )


def _layout_of_directory(path: Path) -> str:
    if run_directory.is_run(path):
        return "run"
    if weights.is_weights_directory(path):
        return "weights"
    model_type = None
    if (path / "config.json").exists():
        content = files.read_object(path / "config.json")
        if gpt2.is_gpt2(content):
            return "hf_gpt2"
        if clip_hugging_face.is_clip(content):
            return "hf_clip"
        model_type = content.get("model_type")
    if any((path / name).exists() for name in clip_openai.OPEN_CLIP):
        return "open_clip"
    raise UserError(
        f"{path} has no config.json of a GPT-2 or CLIP (model_type {model_type!r}) and none of "
        f"{', '.join(clip_openai.OPEN_CLIP)}: give the weights file itself, or to convert --from"
    )


def load(
    found: Opened,
    *,
    heads: int | None = None,
    activation: str | None = None,
    towers: str = "text",
) -> Converted:
    """Reads a model whose layout is known; see `read`.

    Raises:
      UserError: it does not fit, or was given an option its format does not take.
    """
    path, layout = found.path, found.layout
    if layout == "weights":
        raise UserError(f"{path} is a weights directory already: give --to to convert it")
    if layout in _COMPLETE and (heads is not None or activation is not None):
        raise UserError(f"{path}: its config.json tells heads and activation; leave them out")
    if towers != "text" and layout != "hf_clip":
        raise UserError(f"{path}: {towers} can be read of a Hugging Face CLIP alone, got {layout}")
    if layout == "run":
        run = run_directory.load(path)
        return Converted(
            config=run.config,
            params=run.params,
            source=f"{path}, step {run.step}",
            tokenizer_directory=run.tokenizer_directory,
            tokenizer=run.tokenizer,
            eos_id=run.eos_id,
        )
    config: weights.Spec
    if layout == "fairseq":
        config, params = fairseq.load_checkpoint(
            path, heads=heads, activation=activation, content=found.content
        )
        return Converted(config=config, params=params, source=str(path))
    if layout == "hf_gpt2":
        config, params = gpt2.load(path)
    elif layout == "hf_clip" and towers == "image":
        config, params = clip_hugging_face_vision.load(path)
        return Converted(config=config, params=params, source=str(path))
    elif layout == "hf_clip" and towers == "both":
        config, params = clip_hugging_face_vision.load_both(path)
    elif layout == "hf_clip":
        config, params = clip_hugging_face.load(path)
    else:
        config, params = clip_openai.load(
            path, heads=heads, activation=activation, content=found.content
        )
    files = weights.tokenizer_directory(path if path.is_dir() else path.parent)
    return Converted(config=config, params=params, source=str(path), tokenizer_directory=files)


def load_weights(path: Path) -> Converted:
    """A decoder of ours, from its weights directory.

    Raises:
      UserError: it is none.
    """
    stored = weights.load(path, kind="decoder")
    return Converted(
        config=stored.config,
        params=stored.params,
        source=stored.source,
        tokenizer_directory=weights.tokenizer_directory(path),
        tokenizer=stored.tokenizer,
    )
