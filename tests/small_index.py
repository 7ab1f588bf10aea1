"""Images and an image tower of numpy, so small that an index of them takes no time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from blindvalm_jax.grounding import index, index_build

SIDE = 4
WIDTH = 16
CLIP = index.ClipHashes(vision_sha256="v" * 64, text_sha256="t" * 64, source="numpy")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """`count` noisy copies of a few patterns; every picture is a function of its place."""

    count: int
    patterns: int = 20
    fingerprint: str = "pictures"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> tuple[str, np.ndarray]:
        shape = (SIDE, SIDE, 3)
        pattern = np.random.default_rng(place % self.patterns).integers(40, 216, shape)
        noise = np.random.default_rng([1, place]).integers(-40, 41, shape)
        return f"picture-{place}", (pattern + noise).astype(np.uint8)


def encode(images: np.ndarray) -> np.ndarray:
    """float32 [b, E], of norm 1; no row depends on another, to the last bit."""
    matrix = np.random.default_rng(0).standard_normal((SIDE * SIDE * 3, WIDTH))
    found = [(image.reshape(-1) / 127.5 - 1) @ matrix for image in images]
    return np.stack([row / np.linalg.norm(row) for row in found]).astype(np.float32)


def caption(place: int) -> str:
    """A caption that is not ASCII."""
    return f"a picture, the {place}th, très joli"


def build(out: Path, count: int = 50, **changes: Any) -> index.IndexManifest:
    """An index of `count` pictures in shards of 16."""
    values: dict[str, Any] = {"clip": CLIP, "source": "made here", "batch_size": 8}
    values |= {"images": Pictures(count), "encode": encode, "shard_size": 16, "caption": caption}
    return index_build.build(out, **{**values, **changes})
