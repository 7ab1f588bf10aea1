"""Synthetic image vectors in clusters: an index of them on disk, and neighbours found ahead in it.

Files are written and read by the code that a run uses; only images and text are missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from blindvalm_jax import files
from blindvalm_jax.data import output
from blindvalm_jax.data.output import FileRecord
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import index_build, neighbours
from blindvalm_jax.grounding.index import ClipHashes, ImageIndex
from blindvalm_jax.grounding.neighbours import Neighbours, NeighboursManifest

# Distance of a vector from its centre, of norm 1: neighbours are near, but not copies.
_SPREAD = 0.6
_VECTORS_PER_CENTRE = 100
_FEWEST_CENTRES = 10
_PLACE_BYTES = 3  # a place is the colour of its one pixel
BATCH = 8192
_CLIP = ClipHashes(vision_sha256="none", text_sha256="none", source="synthetic")


def centres_of(size: int) -> int:
    """How many centres M vectors have."""
    return max(_FEWEST_CENTRES, size // _VECTORS_PER_CENTRE)


class Clusters:
    """Images whose pixels say only their place, from which `encode` makes a clustered vector."""

    fingerprint = "clusters"

    def __init__(self, size: int, width: int, *, around: np.ndarray | None = None) -> None:
        """size: M; width: E; around: `centres_of(M)` unit vectors or more, drawn at random if None.

        Raises:
          UserError: more images than one pixel can number.
        """
        if size >= 1 << 8 * _PLACE_BYTES:
            raise UserError(f"at most {(1 << 8 * _PLACE_BYTES) - 1:,} vectors, got {size:,}")
        if around is None:
            rng = np.random.default_rng(0)
            around = _unit(rng.standard_normal((centres_of(size), width)))
        self._size, self._width = size, width
        self._centres = around[: centres_of(size)]

    def __len__(self) -> int:
        """M."""
        return self._size

    def __getitem__(self, place: int) -> tuple[str, np.ndarray]:
        """The id and the one pixel of an image."""
        pixel = np.frombuffer(place.to_bytes(_PLACE_BYTES, "little"), np.uint8)
        return str(place), pixel.reshape(1, 1, _PLACE_BYTES)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Vectors of a batch, drawn from the place of its first image."""
        first = int.from_bytes(images[0].tobytes(), "little")
        return self.vectors(range(first, first + len(images)))

    def vectors(self, places: range) -> np.ndarray:
        """Unit vectors float32 [b, E], each around one of the centres; from M on: queries."""
        rng = np.random.default_rng([1, places[0]])
        centres = self._centres[rng.integers(0, len(self._centres), len(places))]
        noise = _unit(rng.standard_normal((len(places), self._width)))
        return _unit(centres + _SPREAD * noise).astype(np.float32)


def write_index(directory: Path, clusters: Clusters) -> ImageIndex:
    """The index of all vectors, float16 on disk as the index command writes it."""
    index_build.build(
        directory, clusters, clusters.encode, clip=_CLIP, source="synthetic", batch_size=BATCH
    )
    return ImageIndex.open(directory)


def write_neighbours(
    directory: Path, index: ImageIndex, *, windows: int, length: int, each: int
) -> Neighbours:
    """Neighbours uint32 [windows, length, each] in an index, as a search would have left them.

    They are drawn at random from all vectors: a text's own lie closer together, so that looking
    these up touches more of the index than a run does.
    """
    directory.mkdir()
    rng = np.random.default_rng(0)
    content = output.npy(rng.integers(0, len(index.vectors), (windows, length, each), np.uint32))
    name = "neighbours-00000.npy"
    files.write_bytes(directory / name, bytes(content))
    shard = FileRecord(file=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    made = NeighboursManifest(
        windows_key="synthetic",
        split="train",
        windows=windows,
        length=length,
        index_key=index.manifest.key,
        text_sha256=index.manifest.text_sha256,
        readout="token",
        dtype="float32",
        neighbours=each,
        engine={"engine": "none"},
        windows_per_shard=windows,
        shards=(shard,),
    )
    files.write_json(directory / neighbours.FILE_NAME, dataclasses.asdict(made))
    return Neighbours.open(directory)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
