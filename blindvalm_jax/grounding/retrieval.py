"""VALM's grounding: the image embeddings nearest to a text feature (arXiv 2205.10178, 3.2).

Exact search by inner product. Keys are visited in blocks, so that no array of size Q x M exists;
on a mesh every device searches the rows it holds, only candidates and winners travel. Among equal
scores the lowest index comes first. Scores are summed in fp32 whatever the keys are kept in;
queries of bfloat16 keys are rounded to bfloat16, those of fp32 keys are multiplied exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blindvalm_jax.errors import UserError

_SCORES_AT_ONCE = 1 << 25  # of a block, 128 MiB in fp32, where no block size is given
_LARGEST_INDEX = (1 << 31) - 1

# queries [B, T, E] and keys [M, E], or None where they are kept elsewhere -> vectors [B, T, K, E]
Search = Callable[[Array, Array | None], Array]


@struct.dataclass
class Retrieved:
    """The K nearest of each query, best first; arrays of jax in a step, of numpy on the host.

    scores_QK: fp32 inner products; index_QK: int32 rows of the keys; vectors_QKE: the keys
    themselves in fp32, None where they were not asked for.
    """

    scores_QK: Any
    index_QK: Any
    vectors_QKE: Any = None


class Engine(Protocol):
    """A search on the host over one index: numpy in, numpy out."""

    @property
    def neighbours(self) -> int:
        """K."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What determines the answers, as JSON values; `index` is the key of the index searched."""

    def search(self, queries_QE: np.ndarray, *, vectors: bool = True) -> Retrieved:
        """The neighbours of each query; without `vectors` their embeddings are left out."""


class Rows(Protocol):
    """Vectors [M, E] that are read in slices: a numpy array, or shards on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """M and E."""

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        """Consecutive vectors."""


def exact_search(
    queries_BTE: Array, keys_ME: Array, *, neighbours: int, block_size: int | None = None
) -> tuple[Array, Array]:
    """Search on one device: scores [B, T, K], best first, and indices into the M keys; no gradient.

    block_size: keys visited at once, None: as many as make a block of scores 128 MiB.

    Raises:
      UserError: fewer than K keys.
    """
    _check(len(keys_ME), neighbours)
    queries_QE = queries_BTE.reshape(-1, queries_BTE.shape[-1])
    scores_QK, index_QK = _nearest(
        jax.lax.stop_gradient(queries_QE),
        jax.lax.stop_gradient(keys_ME),
        len(keys_ME),
        neighbours=neighbours,
        block_size=block_size,
    )
    shape = (*queries_BTE.shape[:-1], neighbours)
    return scores_QK.reshape(shape), index_QK.reshape(shape)


def search(
    queries_QE: Array,
    keys_ME: Array,
    *,
    count: int,
    neighbours: int,
    mesh: Mesh,
    block_size: int | None = None,
    vectors: bool = True,
) -> Retrieved:
    """Search over keys that lie on all devices of a mesh, see `place_keys`; no gradient flows.

    count: M without the padding, whose rows are never found. The queries are gathered; each device
    finds the best of its rows for all of them, merges the candidates of its share of the queries,
    and receives that share's winners from their owners. The result is split by queries.

    Raises:
      UserError: fewer than K keys, or keys that the mesh does not divide.
    """
    _check(count, neighbours)
    if len(keys_ME) != padded_rows(count, mesh):
        raise UserError(
            f"keys of {len(keys_ME)} rows, expected {padded_rows(count, mesh)}: {count} and "
            f"padding to a multiple of {mesh.size} devices; place them with place_keys"
        )
    queries = len(queries_QE)
    padding = -queries % mesh.size
    rows = PartitionSpec(mesh.axis_names)
    found = jax.shard_map(
        functools.partial(
            _search_local,
            axes=mesh.axis_names,
            count=count,
            neighbours=neighbours,
            block_size=block_size,
            vectors=vectors,
        ),
        mesh=mesh,
        in_specs=(PartitionSpec(), rows),
        out_specs=rows,
    )(
        jax.lax.stop_gradient(jnp.pad(queries_QE, ((0, padding), (0, 0)))),
        jax.lax.stop_gradient(keys_ME),
    )
    return jax.tree.map(lambda x: x[:queries], found)


def keys_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of the keys over all axes of the mesh."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def padded_rows(count: int, mesh: Mesh) -> int:
    """Rows of `count` keys padded to a multiple of the devices."""
    return -(-count // mesh.size) * mesh.size


def place_keys(vectors: Rows, mesh: Mesh, *, dtype: Any = jnp.float32) -> Array:
    """Keys [padded M, E] on the mesh; each process reads only the rows of its devices.

    Raises:
      UserError: no vectors, or more than int32 can number.
    """
    count, width = vectors.shape
    if not 0 < count <= _LARGEST_INDEX:
        raise UserError(f"an index of {count} vectors; from 1 to {_LARGEST_INDEX:,} are possible")
    shape = (padded_rows(count, mesh), width)

    def part(place: tuple[slice, ...] | None) -> np.ndarray:
        first, last, _ = (place[0] if place else slice(None)).indices(shape[0])
        rows = np.zeros((last - first, width), dtype)
        real = vectors[min(first, count) : min(last, count)]
        rows[: len(real)] = real
        return rows

    return jax.make_array_from_callback(shape, keys_sharding(mesh), part)


class ExactEngine:
    """Exact search on the host's side: keys on the devices, queries in batches of few sizes."""

    def __init__(
        self,
        vectors: Rows,
        *,
        neighbours: int,
        mesh: Mesh,
        index_key: str = "",
        dtype: str = "float32",
        queries_at_once: int = 4096,
    ) -> None:
        """Places the vectors on the mesh in `dtype`; `index_key` names the index they are of."""
        count = vectors.shape[0]
        _check(count, neighbours)
        self.neighbours = neighbours
        self.settings = {"engine": "exact", "index": index_key, "dtype": dtype}
        self._keys_ME = place_keys(vectors, mesh, dtype=jnp.dtype(dtype))
        self._at_once = queries_at_once
        self._search = jax.jit(
            functools.partial(search, count=count, neighbours=neighbours, mesh=mesh),
            static_argnames="vectors",
        )

    def search(self, queries_QE: np.ndarray, *, vectors: bool = True) -> Retrieved:
        """See `Engine`."""
        # A power of two, so that few sizes are compiled; padding is dropped.
        size = min(self._at_once, 1 << max(len(queries_QE) - 1, 0).bit_length())
        parts = []
        for first in range(0, max(len(queries_QE), 1), size):
            part_QE = np.asarray(queries_QE[first : first + size], np.float32)
            padded_QE = np.pad(part_QE, ((0, size - len(part_QE)), (0, 0)))
            found = jax.device_get(self._search(padded_QE, self._keys_ME, vectors=vectors))
            real = len(part_QE)
            parts.append(jax.tree.map(lambda x, real=real: x[:real], found))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _check(count: int, neighbours: int) -> None:
    if not 1 <= neighbours <= count:
        raise UserError(
            f"{neighbours} neighbours of {count} vectors: K must be from 1 to their number; take "
            "fewer neighbours or a larger index"
        )


def _nearest(
    queries_QE: Array,
    keys_ME: Array,
    real: Array | int,
    *,
    neighbours: int,
    block_size: int | None,
) -> tuple[Array, Array]:
    """Scores and indices [Q, min(K, M)], block after block; rows from `real` on score -inf."""
    rows = len(keys_ME)
    wanted = block_size or _SCORES_AT_ONCE // max(len(queries_QE), 1)
    # The first block alone must give K candidates: there are none to start from.
    block = min(max(wanted, neighbours), rows)
    # Else every block of bfloat16 keys would be copied to fp32 and multiplied there.
    queries_QE = queries_QE.astype(keys_ME.dtype)

    def best_of(first: Array | int, keys_SE: Array) -> tuple[Array, Array]:
        scores_QS = jnp.einsum(
            "qe,se->qs",
            queries_QE,
            keys_SE,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        place_S = first + jnp.arange(len(keys_SE), dtype=jnp.int32)
        scores_QS = jnp.where((place_S < real)[None], scores_QS, -jnp.inf)
        scores_QK, index_QK = jax.lax.top_k(scores_QS, min(neighbours, len(keys_SE)))
        return scores_QK, index_QK + first

    def visit(number: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        first = number * block
        return _merge(best, best_of(first, jax.lax.dynamic_slice_in_dim(keys_ME, first, block)))

    blocks = rows // block
    best = jax.lax.fori_loop(1, blocks, visit, best_of(0, keys_ME[:block]))
    if rows % block:
        best = _merge(best, best_of(blocks * block, keys_ME[blocks * block :]))
    return best


def _merge(best: tuple[Array, Array], found: tuple[Array, Array]) -> tuple[Array, Array]:
    """As many as `best` of both; top_k keeps the order of equal scores, so earlier rows win."""
    scores_QK, index_QK = (jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True))
    scores_QK, place_QK = jax.lax.top_k(scores_QK, best[0].shape[1])
    return scores_QK, jnp.take_along_axis(index_QK, place_QK, axis=1)


def _search_local(
    queries_QE: Array,
    keys_ME: Array,
    *,
    axes: tuple[str, ...],
    count: int,
    neighbours: int,
    block_size: int | None,
    vectors: bool,
) -> Retrieved:
    """The part of one device, see `search`: its rows of the keys, its share of the result."""
    rows = len(keys_ME)
    first = jax.lax.axis_index(axes) * rows
    scores_QK, index_QK = _nearest(
        queries_QE, keys_ME, count - first, neighbours=neighbours, block_size=block_size
    )
    share = functools.partial(
        jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=1, tiled=True
    )
    # Candidates stand in the order of the devices, which is that of their indices.
    scores_QK, place_QK = jax.lax.top_k(share(scores_QK), neighbours)
    index_QK = jnp.take_along_axis(share(index_QK + first), place_QK, axis=1)
    if not vectors:
        return Retrieved(scores_QK, index_QK)

    def fetch(index_Q: Array) -> Array:
        place_Q = index_Q - first
        own_Q = (place_Q >= 0) & (place_Q < rows)
        found_QE = jnp.where(own_Q[:, None], keys_ME[jnp.where(own_Q, place_Q, 0)], 0)
        return jax.lax.psum_scatter(found_QE, axes, scatter_dimension=0, tiled=True)

    # One neighbour at a time: a device holds the winners of all queries for one k only.
    all_KQ = jax.lax.all_gather(index_QK, axes, tiled=True).T
    vectors_KQE = jax.lax.map(fetch, all_KQ)
    return Retrieved(scores_QK, index_QK, vectors_KQE.swapaxes(0, 1).astype(jnp.float32))
