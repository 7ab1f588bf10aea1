"""What a CLIP takes once: its training, and the images that are put through it."""

from __future__ import annotations

import functools

from blindvalm_jax import files, hub, presets
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import clip_model, formats
from blindvalm_jax.models.vision import VisionConfig

_IMAGE = 224  # pixels, of OpenAI's


@functools.lru_cache(maxsize=8)
def training(name: str) -> float | None:
    """Model FLOPs of its training, where it is a run of ours; None: nothing here tells.

    Raises:
      UserError: it cannot be read.
    """
    path = hub.local_path(name)
    if formats.open_model(path).layout != "run":
        return None
    record = files.read_object(path / "run.json", hint="the record of the run that trained a CLIP")
    try:
        asked = record["config_as_given"]["train"]
        return float(record["flops_per_pair"]["total"] * asked["steps"] * asked["batch_size"])
    except KeyError:  # the text side of a language model's run, say
        return None


@functools.lru_cache(maxsize=8)
def image_tower(name: str) -> VisionConfig | None:
    """The shape of its image tower; None: it has none that is read."""
    try:
        return clip_model.load_vision(name).config
    except UserError:
        return None


def of_openai(width: int) -> tuple[str, VisionConfig | None]:
    """Name and image tower of the first of OpenAI's CLIPs whose features are so wide, if one is.

    It stands for a CLIP that is not named.
    """
    for name, (patch, (layers, inner, heads), _, projection, _) in presets.OPENAI_CLIPS.items():
        if projection == width:
            tower = VisionConfig(
                kind="vit",
                image_size=_IMAGE,
                width=inner,
                projection=projection,
                patch=patch,
                layers=layers,
                heads=heads,
                mlp_width=4 * inner,
            )
            return name, tower
    return "", None
