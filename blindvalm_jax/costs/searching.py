"""What it costs to find the images nearest to one token's feature, and to build what is asked.

Letters: M vectors of width E. FLOPs are of products and of the sums of codes; bytes are those read
for one query, of which queries of a batch share the vectors of an exact search.
"""

from __future__ import annotations

import dataclasses

from blindvalm_jax.costs import products
from blindvalm_jax.grounding.faiss_engine import FaissSettings
from blindvalm_jax.models.vision import VisionConfig

_CODES = 256  # values of a code's byte
_BYTES = 4  # of a centroid's values, and of vectors on disk
_KMEANS_ROUNDS = 10  # FAISS's own for the lists of an inverted file


@dataclasses.dataclass(frozen=True)
class Query:
    """One query: FLOPs, bytes read, and bytes of the index that has to be held."""

    flops: float
    read: float
    held: float


def exact(vectors: int, width: int, *, value_bytes: int) -> Query:
    """Every vector compared: 2 M E."""
    size = float(vectors * width * value_bytes)
    return Query(2.0 * vectors * width, size, size)


def ivf_pq(
    vectors: int, width: int, made: FaissSettings, *, nprobe: int, candidates: int = 0
) -> Query:
    """Inverted lists of product codes (Jegou et al. 2011), by inner product.

    Coarse quantizer 2 C E over C lists, tables of 256 inner products for each part of the vector
    (2 * 256 E), a sum of b terms for each code of the lists visited (nprobe M / C codes of b
    bytes); candidates: ranked again by their vectors, 2 E each.
    """
    codes = min(nprobe, made.lists) / made.lists * vectors * made.code_bytes
    compared = 2.0 * width * (made.lists + _CODES + candidates)
    held = vectors * (made.code_bytes + 8) + made.lists * width * _BYTES  # 8: a vector's number
    return Query(compared + codes, codes + candidates * width * _BYTES, float(held))


def gathered(neighbours: int, width: int, *, value_bytes: int) -> float:
    """Bytes of the K vectors of a token, which cost no FLOPs."""
    return float(neighbours * width * value_bytes)


def encoding(images: int, tower: VisionConfig) -> float:
    """FLOPs of encoding all images once."""
    return images * sum(product.forward for product in products.image_tower(tower))


def building(vectors: int, width: int, made: FaissSettings) -> float:
    """FLOPs of lists and codes: k-means over the sample, then each vector's list and code."""
    assigned = 2.0 * made.lists * width
    return _KMEANS_ROUNDS * made.train_vectors * assigned + vectors * (
        assigned + 2.0 * _CODES * width
    )
