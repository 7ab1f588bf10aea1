"""What a CLIP takes once: its training, and the images that are put through it."""

from __future__ import annotations

from blindvalm_jax import files, hub, presets
from blindvalm_jax.errors import UserError
from blindvalm_jax.interop import formats, run_directory
from blindvalm_jax.models.vision import VisionConfig

_IMAGE = 224  # pixels, of OpenAI's


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
        pair, rows = record["flops_per_pair"], record["config_as_given"]["train"]["batch_size"]
        return float(pair["total"] * rows * run_directory.steps(path)[-1])
    except KeyError as error:
        raise UserError(f"{path / 'run.json'} lacks {error}: it is no run of a CLIP") from error


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
    return "a CLIP", None
