"""Queries per second of the searches for image neighbours, and what FAISS finds of the exact ones.

Vectors are synthetic and clustered: unit vectors around M / 100 centres (10 at least), and queries
around the same centres. Exact search runs on all devices with keys in --search_dtype; FAISS, where
it is installed, on the host's threads in its default settings, with and without --candidates
ranked again. Recall counts how many of the exact K = 4 are found. Times are the median of 3 rounds
after one that compiles or warms up, from host memory to host memory, vectors of the neighbours
left out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

_SIZES = flags.DEFINE_list("sizes", ["1000", "10000", "100000", "1000000"], "Index sizes M.")
_FAISS_LARGEST = flags.DEFINE_integer(
    "faiss_largest", 100_000, "Largest M that FAISS is trained for; training takes long beyond."
)
_WIDTH = flags.DEFINE_integer("width", 512, "Width E of the vectors.", lower_bound=8)
_QUERIES = flags.DEFINE_integer("queries", 1024, "Queries of a round.", lower_bound=1)
_CANDIDATES = flags.DEFINE_integer("candidates", 64, "Candidates ranked again.", lower_bound=4)
_NPROBE = flags.DEFINE_integer("nprobe", 32, "Lists that FAISS visits.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("search_dtype", "float32", ["float32", "bfloat16"], "Keys on devices.")

_NEIGHBOURS = 4
# Distance of a vector from its centre, of norm 1: neighbours are near, but not copies.
_SPREAD = 0.6


def run() -> dict[str, Any]:
    """Prints the table and returns the numbers."""
    import jax

    from blindvalm_jax import runs

    print(
        f"{'M':>9} {'engine':18} {'queries/s':>11} {'ms/query':>9} {'recall@4':>9} {'made, s':>8}"
    )
    rows = []
    for size in map(int, _SIZES.value):
        for row in _measured(size):
            recall = f"{row['recall']:9.3f}" if "recall" in row else f"{'':9}"
            made = f"{row['seconds_to_make']:8.1f}"
            speed = f"{row['queries_per_second']:11,.0f} {1e3 / row['queries_per_second']:9.3f}"
            print(f"{size:9,} {row['engine']:18} {speed} {recall} {made}", flush=True)
            rows.append({"vectors": size, **row})
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {**runs.versions(), **_faiss_version()},
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
        "settings": {
            "width": _WIDTH.value,
            "queries": _QUERIES.value,
            "candidates": _CANDIDATES.value,
            "nprobe": _NPROBE.value,
            "neighbours": _NEIGHBOURS,
            "dtype": _DTYPE.value,
        },
    }
    print(json.dumps(machine))
    return {"searches": rows, **machine}


def _faiss_version() -> dict[str, str]:
    if importlib.util.find_spec("faiss") is None:
        return {}
    return {"faiss-cpu": importlib.metadata.version("faiss-cpu")}


def _measured(size: int) -> list[dict[str, Any]]:
    """Rows of the table for an index of a size."""
    from blindvalm_jax import partitioning
    from blindvalm_jax.config import MeshConfig
    from blindvalm_jax.grounding import index_build
    from blindvalm_jax.grounding.faiss_engine import FaissEngine
    from blindvalm_jax.grounding.index import ClipHashes, ImageIndex
    from blindvalm_jax.grounding.retrieval import ExactEngine
    from blindvalm_jax.indexing import queries_per_second

    world = _Clusters(size)
    queries = world.vectors(range(size, size + _QUERIES.value))
    clip = ClipHashes(vision_sha256="none", text_sha256="none", source="synthetic")
    with tempfile.TemporaryDirectory() as directory:
        index_build.build(
            Path(directory), world, world.encode, clip=clip, source="synthetic", batch_size=8192
        )
        index = ImageIndex.open(directory)
        mesh = partitioning.make_mesh(MeshConfig())
        begin = time.perf_counter()
        engine = ExactEngine(index.vectors, neighbours=_NEIGHBOURS, mesh=mesh, dtype=_DTYPE.value)
        made = time.perf_counter() - begin
        speed, exact = queries_per_second(engine, queries)
        rows = [{"engine": "exact", "queries_per_second": speed, "seconds_to_make": made}]
        del engine
        if size > _FAISS_LARGEST.value or not _faiss_version():
            return rows
        for candidates in (0, _CANDIDATES.value):
            begin = time.perf_counter()
            found = FaissEngine(
                index, neighbours=_NEIGHBOURS, nprobe=_NPROBE.value, candidates=candidates
            )
            made = time.perf_counter() - begin
            speed, answers = queries_per_second(found, queries)
            pairs = zip(answers, exact, strict=True)
            hits = [len(np.intersect1d(a, b)) / _NEIGHBOURS for a, b in pairs]
            rows.append(
                {
                    "engine": f"faiss, {candidates} ranked" if candidates else "faiss",
                    "queries_per_second": speed,
                    "recall": float(np.mean(hits)),
                    "seconds_to_make": made,
                    "faiss_settings": dict(found.settings),
                }
            )
    return rows


class _Clusters:
    """Images whose pixels say only their place, from which `encode` makes a clustered vector."""

    fingerprint = "clusters"

    def __init__(self, size: int) -> None:
        rng = np.random.default_rng(0)
        self._size = size
        self._centres = _unit(rng.standard_normal((max(10, size // 100), _WIDTH.value)))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: int) -> tuple[str, np.ndarray]:
        return str(place), np.frombuffer(place.to_bytes(3, "little"), np.uint8).reshape(1, 1, 3)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Vectors of a batch, drawn from the place of its first image."""
        first = int.from_bytes(images[0].tobytes(), "little")
        return self.vectors(range(first, first + len(images)))

    def vectors(self, places: range) -> np.ndarray:
        """Unit vectors float32 [b, E] around centres drawn at random."""
        rng = np.random.default_rng([1, places[0]])
        centres = self._centres[rng.integers(0, len(self._centres), len(places))]
        noise = _unit(rng.standard_normal((len(places), _WIDTH.value)))
        return _unit(centres + _SPREAD * noise).astype(np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
