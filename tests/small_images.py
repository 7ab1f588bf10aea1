"""Small folders of images with captions for tests, made here: no file is needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from blindvalm_jax.toyworld import render
from blindvalm_jax.toyworld.world import COLORS, Object

SIDE = 16
SHAPES = ("circle", "cross")


def noise(count: int, *, side: int = SIDE, seed: int = 0) -> list[np.ndarray]:
    """Images of random pixels."""
    shape = (count, side, side, 3)
    return list(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


def write_folder(
    folder: Path, images: Sequence[np.ndarray], captions: Sequence[str | Sequence[str]]
) -> Path:
    """A folder of PNG files and their captions.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, texts) in enumerate(zip(images, captions, strict=True)):
        name = f"{number:03d}.png"
        PIL.Image.fromarray(image).save(folder / name)
        field = "caption" if isinstance(texts, str) else "captions"
        lines.append(json.dumps({"image": name, field: texts}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_toyworld(folder: Path, *, count: int, seed: int = 0) -> Path:
    """Rendered shapes in eight colours: 16 kinds of images, each with a caption of its own."""
    rng = np.random.default_rng(seed)
    images, captions = [], []
    for number in range(count):
        color, shape = COLORS[number % len(COLORS)], SHAPES[number // len(COLORS) % len(SHAPES)]
        thing = Object("thing", color, shape, "large", "train")
        images.append(render.render(thing, rng, count=1, image_size=SIDE)[0])
        captions.append([f"a photo of a {color} {shape}", f"this is a {shape} in {color}"])
    return write_folder(folder, images, captions)
