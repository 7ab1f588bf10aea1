"""Pictures of objects: a shape in its colour on a noisy grey gradient, at a random place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from blindvalm_jax.toyworld.world import TEXT_SPLITS, Object, WorldConfig, stream

# sRGB; any two are at least 80 apart, and as far from every grey of the background.
PALETTE = {
    "red": (220, 35, 35),
    "yellow": (240, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 215),
    "purple": (135, 40, 170),
    "pink": (250, 140, 185),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
RADIUS = {"small": 0.16, "medium": 0.26, "large": 0.40}  # of the image's side
_RADIUS_SPREAD = 0.1  # relative
_SAMPLES = 3  # of a pixel's side
_COLOR_SPREAD = 6.0  # of 255, of the whole object
_PIXEL_NOISE = 5.0
_GREY, _TINT, _SLOPE = (90.0, 140.0), 8.0, 25.0

# Whether points, in units of the radius and with y downwards, lie in the shape. Cross and ring are
# thick enough to be told from square and circle where the radius is four pixels.
_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x * x + y * y < 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.9,
    "triangle": lambda x, y: (y < 0.75) & (np.abs(x) * 1.75 < y + 1),
    "cross": lambda x, y: (
        (np.minimum(np.abs(x), np.abs(y)) < 0.28) & (np.maximum(np.abs(x), np.abs(y)) < 1)
    ),
    "ring": lambda x, y: np.abs(x * x + y * y - 0.65) < 0.35,
}


def render(thing: Object, rng: np.random.Generator, *, count: int, image_size: int) -> np.ndarray:
    """uint8[count, image_size, image_size, 3] pictures of one object."""
    radius = RADIUS[thing.size] * rng.uniform(1 - _RADIUS_SPREAD, 1 + _RADIUS_SPREAD, count)
    center = radius + rng.random((2, count)) * (1 - 2 * radius)
    points = (np.arange(image_size * _SAMPLES) + 0.5) / (image_size * _SAMPLES)
    x, y = ((points - c[:, None]) / radius[:, None] for c in center.astype(np.float32))
    inside = _INSIDE[thing.shape](x[:, None, :], y[:, :, None])
    cells = inside.reshape(count, image_size, _SAMPLES, image_size, _SAMPLES)
    cover = cells.mean(axis=(2, 4), dtype=np.float32)[..., None]
    color = np.array(PALETTE[thing.color]) + rng.normal(0, _COLOR_SPREAD, (count, 1, 1, 3))
    mixed = cover * color + (1 - cover) * _background(rng, count, image_size)
    noise = _PIXEL_NOISE * rng.standard_normal(mixed.shape, dtype=np.float32)
    return np.clip(mixed + noise, 0, 255).round().astype(np.uint8)


def pictures(
    config: WorldConfig, split: str, number: int, thing: Object, *, count: int
) -> np.ndarray:
    """All `count` pictures that a split has of the object of a number; see `render`."""
    rng = stream(config, "images", TEXT_SPLITS.index(split), number)
    return render(thing, rng, count=count, image_size=config.image_size)


def _background(rng: np.random.Generator, count: int, image_size: int) -> np.ndarray:
    """float[count, image_size, image_size, 3]: a tinted grey that slopes in some direction."""
    grey = rng.uniform(*_GREY, (count, 1)) + rng.uniform(-_TINT, _TINT, (count, 3))
    angle, steps = rng.uniform(0, 2 * np.pi, (count, 1, 1)), np.linspace(-1, 1, image_size)
    slope = _SLOPE * (np.cos(angle) * steps[:, None] + np.sin(angle) * steps) / 2
    return grey[:, None, None] + slope[..., None]
