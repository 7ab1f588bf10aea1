"""From a CLIP, images and windows of text to an image index, its neighbours and its recall.

What `python -m blindvalm_jax.index` does, on all devices of one process.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from blindvalm_jax import partitioning, system
from blindvalm_jax.config import Config, GroundingConfig, MeshConfig
from blindvalm_jax.data import images, pipeline
from blindvalm_jax.data.images import ImageSource
from blindvalm_jax.data.windows import Windows
from blindvalm_jax.errors import UserError
from blindvalm_jax.grounding import index_build, neighbours, text
from blindvalm_jax.grounding.faiss_engine import PAPER_NPROBE, FaissEngine
from blindvalm_jax.grounding.index import ClipHashes, ImageIndex, IndexManifest
from blindvalm_jax.grounding.neighbours import NeighboursManifest
from blindvalm_jax.grounding.retrieval import Engine, ExactEngine
from blindvalm_jax.interop import clip_model, clip_text
from blindvalm_jax.models.clip import Readout, TextTower
from blindvalm_jax.models.vision import VisionConfig, VisionTower
from blindvalm_jax.objectives import language

_NOISE = 0.5  # norm of what is added to a vector of norm 1 to make a query of it
_ROUNDS = 3


class TowerImages:
    """A source's images at the size of an image tower; see `index_build.Images`."""

    def __init__(self, source: ImageSource, size: int) -> None:
        """size: height and width in pixels."""
        self._source, self._size = source, size
        self._captions: dict[int, str] = {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the source and the size; reads every image, unless its hash is known."""
        return f"{images.fingerprint(self._source)} at {self._size} pixels"

    def __len__(self) -> int:
        """Number of images."""
        return len(self._source)

    def __getitem__(self, place: int) -> tuple[str, np.ndarray]:
        """Its id, and the image: uint8 [size, size, 3]."""
        item = self._source[place]
        self._captions[place] = item.captions[0] if item.captions else ""
        return item.id, images.resize(item.image, self._size)

    def caption(self, place: int) -> str:
        """The first caption of an image that was read; once, so that few are held."""
        return self._captions.pop(place)


def image_encoder(config: VisionConfig, params: Any, mesh: Mesh) -> index_build.Encode:
    """A function from images uint8 [b, H, W, 3] to float32 [b, E], rows over all devices."""
    tower = VisionTower(config)
    placed = jax.device_put(params, partitioning.replicated(mesh))
    encode = jax.jit(lambda params, images_BHWC: tower.apply({"params": params}, images_BHWC))

    def run(batch: np.ndarray) -> np.ndarray:
        with partitioning.use(mesh):
            return np.asarray(encode(placed, partitioning.put_rows(batch, mesh)))

    return run


def text_features(
    tower: system.Tower, mesh: Mesh, *, readout: Readout, dtype: str
) -> neighbours.Features:
    """A function from rows of windows to what the text tower says at each token [b, T, E].

    The tower is placed on the mesh and computes as in a run with `grounding.dtype` = `dtype`.
    """
    settings = Config(grounding=GroundingConfig(dtype=dtype))
    params = language.place_tower(tower, language.abstract_tower(tower.config, settings, mesh))
    module = TextTower(tower.config, system.DTYPES[dtype])
    read = jax.jit(functools.partial(text.features, module, readout=readout))

    def run(rows: pipeline.Batch) -> np.ndarray:
        with partitioning.use(mesh):
            return np.asarray(read(params, language.to_device(rows, mesh).tower))[:, :, 0]

    return run


def build(
    out: Path,
    source: ImageSource,
    clip: clip_model.Clip,
    *,
    name: str,
    batch_size: int,
    shard_size: int = index_build.SHARD_SIZE,
    dtype: str = "float16",
    skip_damaged: bool = False,
) -> IndexManifest:
    """Writes the index of a source's images by a CLIP's image tower; name: the source in words.

    skip_damaged: see `index_build.build`. A build goes on with the same batches and devices only.

    Raises:
      UserError: the batch cannot be split over the devices; and as `index_build.build`.
    """
    mesh = partitioning.make_mesh(MeshConfig())
    check_batch(batch_size, mesh)
    pictures = TowerImages(source, clip.config.vision.image_size)
    return index_build.build(
        out,
        pictures,
        image_encoder(clip.config.vision, clip.params["vision"], mesh),
        clip=ClipHashes(
            vision_sha256=clip.vision_sha256, text_sha256=clip.text_sha256, source=clip.source
        ),
        source=name,
        batch_size=batch_size,
        shard_size=shard_size,
        dtype=dtype,
        caption=pictures.caption,
        skip_damaged=skip_damaged,
        rounding=_rounding(mesh),
    )


def find_neighbours(
    out: Path,
    windows: Path,
    index: ImageIndex,
    tower: clip_text.Tower,
    *,
    readout: Readout,
    batch_size: int,
    dtype: str = "float32",
    engine: Callable[[Mesh], Engine],
) -> dict[str, NeighboursManifest]:
    """Writes `out/<split>` for each split that has windows; engine: makes the search on a mesh.

    Raises:
      UserError: tower, windows and index do not belong together; and as `neighbours.write`.
    """
    mesh = partitioning.make_mesh(MeshConfig())
    check_batch(batch_size, mesh)
    index.check_tower(tower.sha256)
    splits = {"train": Windows(windows, "train")}
    if splits["train"].manifest.splits["eval"].windows:
        splits["eval"] = Windows(windows, "eval")
    features = _features_of(splits["train"], tower, mesh, readout=readout, dtype=dtype)
    search = engine(mesh)
    return {
        name: neighbours.write(
            out / name,
            split,
            index,
            features,
            search,
            text_sha256=tower.sha256,
            readout=readout,
            dtype=dtype,
            batch_size=batch_size,
            rounding=_rounding(mesh),
        )
        for name, split in splits.items()
    }


def _rounding(mesh: Mesh) -> dict[str, Any]:
    """What decides how a tower rounds, besides the batch."""
    return {"devices": mesh.size, "device_kind": mesh.devices.flat[0].device_kind}


def _features_of(
    windows: Windows, tower: clip_text.Tower, mesh: Mesh, *, readout: Readout, dtype: str
) -> neighbours.Features:
    """`text_features` of a tower that fits windows."""
    manifest = windows.manifest
    if manifest.longest_segment != tower.config.longest_segment:
        raise UserError(
            f"the windows {windows.directory} were cut for a tower that reads "
            f"{manifest.longest_segment} tokens, {tower.source} reads "
            f"{tower.config.longest_segment}: prepare the text again"
        )
    read = system.prepare_tower(
        Config(),
        system.Tower(*tower[:2], tower.source, tower.sha256, tower.tokenizer),
        vocabulary=manifest.tower_record,
        resuming=True,
    )
    if read is None:
        raise ValueError("the default settings read no tower")
    return text_features(read, mesh, readout=readout, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Queries:
    """What a search is asked for: vectors float32 [Q, E]; about: what they are, as JSON values."""

    vectors: np.ndarray
    about: dict[str, Any]


def noisy_queries(index: ImageIndex, count: int, *, seed: int = 0) -> Queries:
    """Vectors of the index with normal noise, of norm 0.5 for vectors of norm 1; of norm 1 again.

    They lie where images lie. A CLIP's text lies elsewhere: see `text_queries`.

    Raises:
      UserError: fewer than one is asked for.
    """
    _check_queries(count)
    rng = np.random.default_rng(seed)
    vectors = index.vectors.rows(rng.integers(0, len(index.vectors), count))
    noise = rng.standard_normal(vectors.shape) * _NOISE / np.sqrt(vectors.shape[1])
    noisy = vectors + noise
    unit = (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)
    return Queries(unit, {"kind": "images", "noise": _NOISE, "count": count, "seed": seed})


def text_queries(
    index: ImageIndex,
    windows: Path,
    tower: clip_text.Tower,
    count: int,
    *,
    readout: Readout,
    batch_size: int,
    dtype: str = "float32",
    seed: int = 0,
) -> Queries:
    """What VALM asks: features of the text tower at real tokens of the training windows.

    Each token is drawn alike, and may be drawn again.

    Raises:
      UserError: fewer than one is asked for; as `find_neighbours`.
    """
    _check_queries(count)
    mesh = partitioning.make_mesh(MeshConfig())
    check_batch(batch_size, mesh)
    index.check_tower(tower.sha256)
    split = Windows(windows, "train")
    features = _features_of(split, tower, mesh, readout=readout, dtype=dtype)
    drawn = real_tokens(split, count, seed=seed)
    chosen, row = np.unique(drawn[:, 0], return_inverse=True)
    found = np.empty((count, index.vectors.shape[1]), np.float32)
    for first in range(0, len(chosen), batch_size):
        places = chosen[np.minimum(np.arange(first, first + batch_size), len(chosen) - 1)]
        rows = [pipeline.window_row(split[int(place)], tower=True) for place in places]
        said = features({name: np.stack([row[name] for row in rows]) for name in rows[0]})
        here = np.flatnonzero((row >= first) & (row < first + batch_size))
        found[here] = said[row[here] - first, drawn[here, 1]]
    about = {"windows": split.manifest.key, "text_sha256": tower.sha256, "readout": readout}
    return Queries(found, {"kind": "text", **about, "dtype": dtype, "count": count, "seed": seed})


def real_tokens(windows: Windows, count: int, *, seed: int) -> np.ndarray:
    """Tokens int64 [Q, 2] as window and position in it, none of them padding, each drawn alike."""
    rng = np.random.default_rng(seed)
    found: list[tuple[int, int]] = []
    while len(found) < count:
        window = int(rng.integers(len(windows)))
        position = int(rng.integers(windows.manifest.sequence_length))
        if position < windows[window]["count"]:
            found.append((window, position))
    return np.array(found, np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A search on some queries: queries a second, the share of the exact K found, its settings."""

    engine: str
    queries_per_second: float
    recall: float
    settings: dict[str, Any]


def measure_recall(
    index: ImageIndex,
    queries: Queries,
    *,
    neighbours: int,
    nprobe: int = PAPER_NPROBE,
    rerank: int = 0,
    lists: int = 0,
    code_bytes: int = 0,
    rebuild: bool = False,
) -> list[Measured]:
    """Exact search and FAISS on the same queries; its arguments: see `FaissEngine`.

    Speed is that of the median of 3 rounds after one that compiles, from host memory to host
    memory, vectors of the neighbours left out.

    Raises:
      UserError: FAISS is missing, or the index too small for it or for K.
    """
    engines: dict[str, Engine] = {
        "faiss": FaissEngine(
            index,
            neighbours=neighbours,
            nprobe=nprobe,
            candidates=rerank,
            lists=lists,
            code_bytes=code_bytes,
            rebuild=rebuild,
        ),
        "exact": ExactEngine(
            index.vectors,
            neighbours=neighbours,
            mesh=partitioning.make_mesh(MeshConfig()),
            index_key=index.manifest.key,
        ),
    }
    timed = {name: queries_per_second(made, queries.vectors) for name, made in engines.items()}
    exact = timed["exact"][1]
    return [
        Measured(
            engine=name,
            queries_per_second=timed[name][0],
            recall=recall(timed[name][1], exact),
            settings=dict(engines[name].settings),
        )
        for name in ("exact", "faiss")
    ]


def recall(found_QK: np.ndarray, exact_QK: np.ndarray) -> float:
    """Share of the exact neighbours that were found, over all queries."""
    return float(np.mean(np.any(found_QK[:, None, :] == exact_QK[:, :, None], axis=2)))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Refuses a batch that the devices cannot share."""
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(
            f"a batch of {batch_size} cannot be split over {mesh.size} devices: take a multiple"
        )


def _check_queries(count: int) -> None:
    if count < 1:
        raise UserError(f"at least one query is needed, got {count}")


def queries_per_second(engine: Engine, queries: np.ndarray) -> tuple[float, np.ndarray]:
    """Queries [Q, E] that an engine answers in a second, and the indices [Q, K] it found."""
    found = engine.search(queries, vectors=False).index_QK
    seconds = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        engine.search(queries, vectors=False)
        seconds.append(time.perf_counter() - begin)
    return len(queries) / statistics.median(seconds), found
