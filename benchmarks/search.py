"""Queries per second of the searches for image neighbours, and what they find of the exact ones.

Vectors are synthetic and clustered (see `clusters`), queries lie around the same centres. Exact
search runs on all devices with keys in --search_dtype; FAISS, where it is installed, on the host's
threads, with and without --candidates ranked again. Recall counts how many of the K = 4 of exact
search are found, which are 1 for itself. The searches take turns in one process (see `turns.take`);
times are from host memory to host memory, vectors of the neighbours left out.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from benchmarks import approximate, turns

if TYPE_CHECKING:
    import numpy as np

    from blindvalm_jax.grounding.index import ImageIndex
    from blindvalm_jax.grounding.retrieval import Engine

_SIZES = flags.DEFINE_list("sizes", ["1000", "10000", "100000", "1000000"], "Index sizes M.")
_WIDTH = flags.DEFINE_integer("width", 512, "Width E of the vectors.", lower_bound=8)
_QUERIES = flags.DEFINE_integer("queries", 1024, "Queries of a turn.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("search_dtype", "float32", ["float32", "bfloat16"], "Keys on devices.")

_NEIGHBOURS = 4


def run() -> dict[str, Any]:
    """Prints the table and returns the numbers."""
    import jax

    from blindvalm_jax import runs

    sizes = sorted(turns.whole_numbers(_SIZES.value, "sizes", least=_NEIGHBOURS))
    approximate.announce(sizes)
    print(
        f"{'M':>10} {'engine':18} {'queries/s':>10} {'range':>16} {'ms/query':>9} "
        f"{'recall@4':>9} {'made, s':>8}"
    )
    rows = []
    for number, size in enumerate(sizes, start=1):
        title = f"{size:,} vectors (size {number} of {len(sizes)})"
        for row in _measured(size, title):
            speed = row["queries_per_second"]
            spread = f"{row['queries_per_second_low']:,.0f}-{row['queries_per_second_high']:,.0f}"
            print(
                f"{size:10,} {row['engine']:18} {speed:10,.0f} {spread:>16} {1e3 / speed:9.3f} "
                f"{row['recall']:9.3f} {row['seconds_to_make']:8.1f}",
                flush=True,
            )
            rows.append({"vectors": size, **row})
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {**runs.versions(), **approximate.versions()},
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
        "settings": {
            "width": _WIDTH.value,
            "queries": _QUERIES.value,
            "candidates": approximate.CANDIDATES.value,
            "nprobe": approximate.NPROBE.value,
            "neighbours": _NEIGHBOURS,
            "dtype": _DTYPE.value,
            "rounds": turns.ROUNDS.value,
        },
    }
    print(json.dumps(machine))
    return {"searches": rows, **machine}


def _measured(size: int, title: str) -> list[dict[str, Any]]:
    """Rows of the table for an index of a size."""
    import statistics

    from benchmarks import clusters
    from blindvalm_jax import indexing

    world = clusters.Clusters(size, _WIDTH.value)
    queries = world.vectors(range(size, size + _QUERIES.value))
    with tempfile.TemporaryDirectory() as directory:
        index = clusters.write_index(Path(directory), world)
        engines, made = _engines(index)
        turn = {
            name: functools.partial(_seconds, engine, queries) for name, engine in engines.items()
        }
        seconds = turns.take(turn, title=title)
        found = {
            name: engine.search(queries, vectors=False).index_QK for name, engine in engines.items()
        }
    return [
        {
            "engine": name,
            "queries_per_second": len(queries) / statistics.median(seconds[name]),
            "queries_per_second_low": len(queries) / max(seconds[name]),
            "queries_per_second_high": len(queries) / min(seconds[name]),
            "recall": indexing.recall(found[name], found["exact"]),
            "seconds_to_make": made[name],
            "settings": dict(engine.settings),
        }
        for name, engine in engines.items()
    ]


def _engines(index: ImageIndex) -> tuple[dict[str, Engine], dict[str, float]]:
    """The searches over an index by name, and the seconds that each took to make."""
    from blindvalm_jax import partitioning
    from blindvalm_jax.config import MeshConfig
    from blindvalm_jax.grounding.retrieval import ExactEngine

    mesh = partitioning.make_mesh(MeshConfig())
    begin = time.perf_counter()
    engines: dict[str, Engine] = {
        "exact": ExactEngine(
            index.vectors,
            neighbours=_NEIGHBOURS,
            mesh=mesh,
            index_key=index.manifest.key,
            dtype=_DTYPE.value,
        )
    }
    made = {"exact": time.perf_counter() - begin}
    if approximate.left_out(len(index.vectors)) is None:
        seconds = approximate.make(index, neighbours=_NEIGHBOURS)["seconds_to_make"]
        for candidates in (0, approximate.CANDIDATES.value):
            name = f"faiss, {candidates} ranked" if candidates else "faiss"
            made[name] = seconds  # both search the same file
            engines[name] = approximate.engine(index, neighbours=_NEIGHBOURS, candidates=candidates)
    return engines, made


def _seconds(engine: Engine, queries: np.ndarray) -> float:
    """How long a search takes."""
    begin = time.perf_counter()
    engine.search(queries, vectors=False)
    return time.perf_counter() - begin
