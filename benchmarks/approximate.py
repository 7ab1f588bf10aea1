"""FAISS in the benchmarks: its flags, where it is left out, and how long its index takes to make.

It searches by IVF-PQ in its default settings (see `faiss_engine`), in two ways: scores of the codes
alone, and --candidates of them ranked again by the vectors on disk.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from blindvalm_jax.grounding.faiss_engine import FaissEngine
    from blindvalm_jax.grounding.index import ImageIndex

_LARGEST = flags.DEFINE_integer(
    "faiss_largest",
    1_000_000,
    "Largest M that FAISS is trained for.",
)
CANDIDATES = flags.DEFINE_integer("candidates", 64, "Candidates ranked again.", lower_bound=4)
NPROBE = flags.DEFINE_integer("nprobe", 32, "Lists that FAISS visits.", lower_bound=1)

_SMALLEST = 256  # what a code of one byte is learned from


def left_out(size: int) -> str | None:
    """Why FAISS does not search an index of a size, None where it does."""
    if importlib.util.find_spec("faiss") is None:
        return "FAISS is left out: it is not installed (pip install -e '.[faiss]')"
    if size > _LARGEST.value:
        return f"FAISS is left out above --faiss_largest={_LARGEST.value:,} vectors"
    if size < _SMALLEST:
        return f"FAISS is left out below {_SMALLEST} vectors: it cannot learn its codes from fewer"
    return None


def announce(sizes: Iterable[int]) -> None:
    """Prints why FAISS is left out of some sizes, a line for each reason."""
    for reason in dict.fromkeys(filter(None, map(left_out, sizes))):
        print(reason, flush=True)


def versions() -> dict[str, str]:
    """FAISS's, where it is installed."""
    if importlib.util.find_spec("faiss") is None:
        return {}
    return {"faiss-cpu": importlib.metadata.version("faiss-cpu")}


def engine(index: ImageIndex, *, neighbours: int, candidates: int) -> FaissEngine:
    """FAISS over an index, by `faiss.index` in its directory, which is made if it is not there."""
    from blindvalm_jax.grounding.faiss_engine import FaissEngine

    return FaissEngine(index, neighbours=neighbours, nprobe=NPROBE.value, candidates=candidates)


def make(index: ImageIndex, *, neighbours: int) -> dict[str, Any]:
    """Makes `faiss.index`; its settings, and the seconds that training and adding took."""
    print(f"training FAISS for {len(index.vectors):,} vectors", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    made = engine(index, neighbours=neighbours, candidates=0)
    return {"seconds_to_make": time.perf_counter() - begin, "settings": dict(made.settings)}
